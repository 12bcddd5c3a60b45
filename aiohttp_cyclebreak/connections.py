"""When is a connection done? Follows it to the end of its task.

Where a plain request raised its response, and only aiohttp has that, the connection
keeps the exception until aiohttp has let go of it: until the next request has been
handled, or its own end.
"""

import asyncio
import gc
from contextvars import Context
from functools import partial
from sys import getrefcount
from types import FrameType
from typing import (
    Any,
    Callable,
    Container,
    Dict,
    Iterable,
    List,
    Optional,
    Set,
    Tuple,
)
from weakref import ref

from aiohttp import web

from . import internals
from .complaints import complain
from .exceptions import frames_of, goes_by_itself, graph, leads_on, traceback_of
from .frames import (
    COUNTS_ARE_EXACT,
    Emptied,
    empty_with_callers,
    is_finished,
    returns_of,
)
from .holders import leave, pending, somebody_has, sort_out
from .internals import HANDLE_REQUEST, has_gone_on
from .sever import sever

__all__ = (
    "Connection",
    "clear_request_frame",
    "follow_connection",
    "followed_connections",
    "keeping_connections",
    "kept_requests",
    "note_parser_error",
    "settled_connections",
    "undecided_connections",
    "unread_has_come",
)

# By the id of its task.  This keeps nothing alive: a callback of its task holds a
# connection, which goes with that even if its loop was closed before it ended.
followed_connections: "Dict[int, ref[Connection]]" = {}
# Those of them that have nothing put off: after a plain success there is nothing to do.
settled_connections: Set[int] = set()
# Those that keep for later what somebody has in hand.
keeping_connections: "Dict[int, ref[Connection]]" = {}
# Those whose put-off response another middleware may swallow, until anything waits.
undecided_connections: Set[int] = set()

# Exceptions that a connection keeps for later.  Who has them in hand may never be done
# with them: a worker that goes on is in the traceback of each.
_MOST_LATER = 4

# The last instructions of a request's task that is over; before CPython 3.13
# frame.clear() would close a coroutine that is suspended.
_RETURNS = frozenset() if HANDLE_REQUEST is None else returns_of(HANDLE_REQUEST)


def clear_request_frame(exc: BaseException) -> bool:
    """Clear the frame of a request's task, by which a raised response leads to itself.

    Its traceback begins with that frame, and the frame has it in a local.

    Returns:
        Whether it does, and the frame is over.
    """
    entry = traceback_of(exc)
    frame = None if entry is None else entry.tb_frame
    if (
        frame is None
        or frame.f_code is not HANDLE_REQUEST
        or frame.f_lasti not in _RETURNS
    ):
        return False
    frame.clear()
    return True


class Connection:
    """A connection that is followed to the end of its task."""

    __slots__ = (
        "coroutine",
        "frame",
        "errors",
        "unread",
        "later",
        "following",
        "key",
        "put_off",
        "raised_by",
        "asked",
        "emptied",
        "reference",
        "task",
        "__weakref__",
    )

    def __init__(self, task: "asyncio.Task[Any]") -> None:
        self.key = id(task)
        # Of the task, until it is done: aiohttp keeps the last request and response in
        # its locals.  A request forgets the task before that, from 3.11.14 on.
        self.coroutine: Any = internals.connection_coroutine(task)
        self.frame: Optional[FrameType] = getattr(self.coroutine, "cr_frame", None)
        # Of aiohttp's parser, and whether to clear their frames.
        self.errors: List[Tuple[BaseException, bool]] = []
        # Releases a body that came after the answer, and says whether it has.
        self.unread: Optional[Callable[[], bool]] = None
        # Exceptions that somebody had in hand, whether to clear their frames, and the
        # ids of what is kept of those that they lead to.
        self.later: Dict[int, Tuple[BaseException, bool, Container[int]]] = {}
        self.following = 0  # requests by a callback of their task
        # What a request has raised, and is severed when the next one has been handled
        # or the connection ends: until then aiohttp has it as well, as the response, in
        # the live frame of the connection's task.  If the request's task is asked, it
        # is severed when that is done.
        self.put_off: Optional[BaseException] = None
        self.raised_by: Optional[web.BaseRequest] = None
        # The request whose task is asked in the end, until then.
        self.asked: Optional[web.BaseRequest] = None
        # For requests whose tasks were done while others were still followed: they may
        # be clones of one request, and share its frames.
        self.emptied: Optional[Emptied] = None
        self.task = ref(task)
        self.reference = ref(self, partial(_forget_connection, self.key))

    def holds(self, value: object) -> bool:
        """Whether the connection's task has this request or response as its last."""
        return internals.connection_holds(self.coroutine, self.frame, value)

    def take_back(self) -> Optional[BaseException]:
        """Have nothing put off any more, and return what was."""
        exc = self.put_off
        self.put_off = self.raised_by = None
        pending.pop(id(exc), None)
        return exc

    def take_back_of(self, request: web.BaseRequest) -> Optional[BaseException]:
        """As :meth:`take_back`, if it is of this request."""
        raised_by = self.raised_by
        if raised_by is None or not internals.is_same(raised_by, request):
            return None
        return self.take_back()

    def forget_swallowed(self) -> bool:
        """Let go of what was put off, if nobody has it: it is not the response.

        Returns:
            Whether all of it has gone.
        """
        exc = self.put_off
        if exc is not None:
            # References: the attribute, the variable, the argument.
            if getrefcount(exc) != 3 or not goes_by_itself(exc):
                return False
            self.take_back()
        return True

    def sever_put_off(self, request: Optional[web.BaseRequest]) -> None:
        """Sever what was put off, if the connection has gone on from its request.

        If nobody but aiohttp has it, then all of it goes by itself, once the frame of
        the request's task does not hold it.  Its traceback stays: somebody else may
        have it after all, in place of one of the references that are counted here.

        Args:
            request: the one that is being handled; None: the connection has ended.
        """
        exc, raised_by = self.put_off, self.raised_by
        if exc is None or raised_by is None:
            return
        # References: the attribute, the variable, the argument, the frame of the
        # request's task; and that of the connection's, if that goes on.
        known = 4 if request is None else 5
        if (
            getrefcount(exc) == known
            and internals.keeps_nothing(raised_by)
            and goes_by_itself(exc)
            and clear_request_frame(exc)
            and getrefcount(exc) == known - 1
        ):
            self.put_off = self.raised_by = None
            pending.pop(id(exc), None)
            return
        if request is not None and not has_gone_on(raised_by, request):
            return
        self.take_back()
        found = [exc, *internals.kept_exceptions(raised_by)]
        # A task that was started eagerly handles this request before all callbacks of
        # the earlier one's task have run.
        asyncio.get_running_loop().call_soon(self.sever_shared, found)

    def sever_shared(self, exceptions: List[BaseException]) -> None:
        """Sever what no request has noted, and not only aiohttp has."""
        try:
            sorted_out = sort_out(exceptions)
            for _, own in sorted_out.ready:
                sever(own, spared=sorted_out.spared)
            if self.coroutine is None:  # it has ended
                leave(sorted_out.in_flight)
            else:
                self.keep_for_later(sorted_out.in_flight, True)
        except Exception:
            complain("severing what was put off")

    def release_unread(self) -> None:
        """Release a body that came after the answer, if aiohttp has armed it."""
        try:
            if self.unread is not None and self.unread():
                self.unread = None
        except Exception:
            complain("releasing a body that was not read")

    def needs(self, exc: BaseException) -> bool:
        """Whether an exception is put off, and its request is still being answered."""
        raised_by = self.raised_by
        return (
            self.put_off is exc
            and raised_by is not None
            and internals.is_being_answered(raised_by, self.task())
        )

    def keep_for_later(
        self,
        exceptions: Iterable[BaseException],
        clear_frames: bool,
        kept: Container[int] = (),
    ) -> None:
        """Keep what somebody has in hand, until the connection goes on or ends.

        That is the last few; what came before is not kept alive.
        """
        for exc in exceptions:
            self.later[id(exc)] = exc, clear_frames, kept
            keeping_connections[self.key] = self.reference
        while len(self.later) > _MOST_LATER:
            oldest, clears, leads_to = self.later.pop(next(iter(self.later)))
            leave([oldest], clears, leads_to)

    def sever_later_ones(self) -> None:
        """Sever what was kept for later, but for what somebody still has in hand."""
        later, self.later = self.later, {}
        keeping_connections.pop(self.key, None)
        roots = [exc for exc, _, _ in later.values()]
        sorted_out = sort_out(roots)
        still = [exc for exc in roots if somebody_has(exc)]
        still += [exc for exc in sorted_out.in_flight if id(exc) in later]
        for exc in still:
            self.keep_for_later([exc], *later[id(exc)][1:])
        # Only those: what they lead to may be kept for good, or others may sever it.
        ready = [exc for _, own in sorted_out.ready for exc in own]
        spared = sorted_out.spared
        spared.exceptions += [exc for exc in ready if id(exc) not in later]
        own = [exc for exc in ready if id(exc) in later]
        # Each as its request's options have it: its text stays, or its locals.
        for clear_frames in (True, False):
            as_asked = [exc for exc in own if later[id(exc)][1] is clear_frames]
            sever(as_asked, clear_frames=clear_frames, spared=spared)

    def _sever_cancellation(self, task: "asyncio.Future[Any]") -> None:
        """Sever what a connection was cancelled with while it sent a response.

        With ``handler_cancellation=True`` a client that goes away does that, after all
        middlewares.  What came through a handler is the request's, and so is what it
        leads to; here it is nobody's but the task's.
        """
        error = internals.cancellation_of(task)
        if (
            error is not None
            and internals.is_of_sending(frames_of(error))
            and not leads_on(error)
            # References: the task, the variable, the argument.
            and COUNTS_ARE_EXACT
            and getrefcount(error) == 3
        ):
            self.sever_shared([error])

    def done(self, task: "asyncio.Future[Any]") -> None:
        try:
            if self.frame is not None:
                empty_with_callers(self.frame)
            self.sever_put_off(None)
            if task.cancelled():
                self._sever_cancellation(task)
            self.release_unread()
            if self.later:
                self.sever_later_ones()
            for exc, clear_frames, kept in self.later.values():
                leave([exc], clear_frames, kept)
            for error, clear_frames in self.errors:
                sever(graph(error), clear_frames=clear_frames)
        except Exception:
            complain("severing a connection")
        finally:
            self.take_back()
            _remove_connection(self.key)
            self.coroutine = self.frame = self.asked = self.emptied = None
            self.errors = []
            self.unread = None
            self.later = {}


def follow_connection(task: Any) -> "Optional[Connection]":
    """Follow a connection to the end of its task, if it is not followed yet."""
    connection = _connection_of(task)
    if connection is None and isinstance(task, asyncio.Task):  # a mock has none
        connection = Connection(task)
        followed_connections[connection.key] = connection.reference
        # Not in the context of the first request: the callback keeps it to the end.
        task.add_done_callback(connection.done, context=Context())
    return connection


def _connection_of(task: Any) -> "Optional[Connection]":
    found = followed_connections.get(id(task))
    return None if found is None else found()


def _remove_connection(key: int) -> None:
    followed_connections.pop(key, None)
    settled_connections.discard(key)
    undecided_connections.discard(key)
    keeping_connections.pop(key, None)


def _forget_connection(key: int, reference: "ref[Connection]") -> None:
    """Forget one that is gone without an end, since its loop was closed."""
    if followed_connections.get(key) is reference:
        _remove_connection(key)
    # Forget what those had pending that are gone; each time that would be quadratic.
    if len(pending) > 2 * len(followed_connections):
        # Copied in one step: another thread may change it.
        for found, holder in list(pending.items()):
            if holder() is None:
                pending.pop(found, None)


def unread_has_come(reference: "ref[Connection]") -> None:
    """Release a connection's unread body as soon as aiohttp has armed it.

    Args:
        reference: to the connection, which has the body.
    """
    connection = reference()
    task = None if connection is None else connection.task()
    if connection is not None and task is not None:
        # aiohttp, which waits for this, has been woken before, and arms it then.
        task.get_loop().call_soon(connection.release_unread, context=Context())


def note_parser_error(task: Any, exc: BaseException, clear_frames: bool) -> None:
    """Remember what was wrong with a malformed request, which no middleware sees."""
    try:
        connection = _connection_of(task)
        if connection is not None:
            connection.errors.append((exc, clear_frames))
    except Exception:
        complain("noting a parser's error")


def kept_requests() -> Set[int]:
    """The ids of the requests that are held by what is kept to be severed later."""
    return {
        id(value)
        for connection in [found() for found in list(followed_connections.values())]
        if connection is not None
        for exc, _, _ in list(connection.later.values())
        for frame in frames_of(exc)
        if is_finished(frame)  # what a task of its own runs is for itself
        for value in gc.get_referents(frame)
        if internals.is_request(value)
    }
