"""When is it safe? Follows a request to the end of its task, a connection to its.

Nothing about an exception changes while its request is in flight: it is noted on
the way, and severed when the request's own task is done, which is after the
response, aiohttp's log lines and the access log.  What a plain request raises as its
response, and nobody else has, is left to the connection instead: to its next request,
until which aiohttp has it too, or to its end.
"""

import asyncio
import gc
import logging
import sys
from contextvars import ContextVar
from functools import partial
from sys import getrefcount
from types import FrameType
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Coroutine,
    Dict,
    Iterable,
    List,
    Optional,
    Set,
    Tuple,
    cast,
)
from weakref import WeakKeyDictionary, getweakrefs, ref

import aiohttp
from aiohttp import hdrs, web

from . import internals
from .calls import Calls
from .internals import (
    HANDLE_REQUEST,
    connection_of_response,
    connection_task,
    has_gone_on,
)
from .options import BodyReleasedError, BreakEvent, Options
from .sever import (
    COUNTS_ARE_EXACT,
    Cut,
    awaiting_frames,
    cause_of,
    context_of,
    detach,
    empty,
    empty_with_callers,
    frames_of,
    graph,
    handled_by,
    in_flight,
    is_finished,
    leads_on,
    local_values,
    owns_its_traceback,
    returns_of,
    sever,
    traceback_of,
)

__all__ = (
    "Watching",
    "begin",
    "calls_are_followed",
    "complain",
    "connections",
    "errors",
    "follow_calls",
    "follow_connection",
    "has_put_off",
    "kept_requests",
    "leave_alone",
    "note",
    "note_call",
    "note_failed_call",
    "note_last",
    "note_last_attempt",
    "note_parser_error",
    "note_successful_call",
    "passed",
    "pending",
)

logger = logging.getLogger("aiohttp_cyclebreak")


_complaints: Dict[str, int] = {}  # and how often

# What ends the process, out of a callback too; all else that one raises is logged.
# CancelledError, for one, comes out of exception() of a task that was cancelled.
_ENDS = (KeyboardInterrupt, SystemExit)


def _complain(about: str) -> None:
    """Log the error being handled, the first time that it happens there."""
    _complaints[about] = _complaints.get(about, 0) + 1
    if _complaints[about] == 1:
        logger.exception(
            "%s failed; the request is not affected, and this is not logged again",
            about,
        )


complain = _complain  # for the other modules


def errors() -> int:
    """How often something failed here, or in a callback, since the process began."""
    return sum(_complaints.values())


# Neither of these keeps anything alive: a request is followed by the callbacks of its
# task and a connection by those of its own, so what is never finished (a loop that
# is closed too early) is let go with the task.
connections: "Dict[int, ref[_Connection]]" = {}
_callers: "Dict[int, ref[_Caller]]" = {}
# Who has noted an exception.
_in_hand: "Dict[int, Tuple[ref[_Holder], ...]]" = {}
# Connections that have put an exception off, or still have one later, by its id.
pending: "Dict[int, ref[_Connection]]" = {}

# Where a request has what follows it, beside its own attributes.
_FOLLOWED = "_cyclebreak"

# Of a request that has noted so many exceptions, all but half of that are severed while
# it goes on: a handler can stream for ever, and its calls fail again and again.
_MOST = 100


def _forget_holder(keys: List[int], holder: "ref[_Holder]") -> None:
    """Forget who had exceptions in hand, and is gone since its loop was closed."""
    for key in keys:
        _take_from_hand(key, holder)


def _take_from_hand(key: int, holder: "ref[_Holder]") -> None:
    # It may be there twice: by two roots, both of which lead to the exception.
    others = tuple(each for each in _in_hand.pop(key, ()) if each is not holder)
    if others:
        _in_hand[key] = others


if TYPE_CHECKING:
    _RequestReference = ref[web.BaseRequest]
else:  # which cannot be subscripted before Python 3.9
    _RequestReference = ref


class Watching(_RequestReference):
    """A weak reference to a request by which the library never reads its body."""

    __slots__ = ()


def _name(function: Any) -> str:
    """Say which function it is, without asking it: its repr may fail, or tell."""
    return str(getattr(function, "__qualname__", type(function).__qualname__))


class _Holder:
    """Who has exceptions in hand, and is to be done with them."""

    __slots__ = ("exceptions", "in_hand", "reference", "__weakref__")

    def __init__(self) -> None:
        self.exceptions: List[BaseException] = []
        self.in_hand: List[int] = []  # the ids of those, and of what they lead to
        self.reference: Optional[ref[_Holder]] = None

    def note(self, root: BaseException) -> None:
        for exc in self.exceptions:
            if exc is root:
                return
        self.exceptions.append(root)
        own = self.reference
        if own is None:
            forget = partial(_forget_holder, self.in_hand)
            own = self.reference = ref(self, forget)
        for exc in graph(root) if leads_on(root) else (root,):
            key = id(exc)
            self.in_hand.append(key)
            _in_hand[key] = (*_in_hand.get(key, ()), own)

    def _let_go(self) -> None:
        own = self.reference
        if own is not None:
            for key in self.in_hand:
                _take_from_hand(key, own)
            self.in_hand = []
            self.reference = None

    def _take_out(self, roots: List[BaseException]) -> None:
        """Let go of some exceptions, and keep the others in hand."""
        self._let_go()
        out = set(map(id, roots))
        others = [exc for exc in self.exceptions if id(exc) not in out]
        self.exceptions = []
        for exc in others:
            self.note(exc)


class _Request(_Holder):
    """A request that is followed to the end of its task."""

    __slots__ = (
        "request",
        "options",
        "are_default",
        "releases_body",
        "connection",
        "calls",
        "callers",
        "looks",
        "kept",
    )

    def __init__(
        self, request: web.BaseRequest, connection: "Optional[_Connection]"
    ) -> None:
        super().__init__()
        self.request = request
        self.connection = connection  # aiohttp lets go of request.task before the end
        self.options: List[Options] = []
        self.are_default = True  # all of those
        self.releases_body = False  # one of those
        self.calls: List[_Serving] = []
        self.callers: Dict[int, ref[asyncio.Task[Any]]] = {}  # whose calls failed
        self.looks = False
        self.kept = False

    def add(self, options: Options) -> None:
        for each in self.options:
            if each is options:
                return
        self.options.append(options)
        self.are_default = self.are_default and options.are_default
        self.releases_body = self.releases_body or options.release_body

    def note_call(self, exc: BaseException, task: "asyncio.Task[Any]") -> None:
        self.note(exc)
        self.callers[id(task)] = ref(task)
        if len(self.exceptions) >= _MOST and not self.looks:
            self.looks = True
            task.get_loop().call_soon(self.sever_older_ones)

    def sever_older_ones(self) -> None:
        try:
            self.looks = False
            own = internals.request_task(self.request)
            if own is None or _FOLLOWED not in self.request.__dict__:
                return  # it has ended
            self.callers[id(own)] = ref(own)
            alive = [task for found in self.callers.values() for task in [found()]]
            tasks = [task for task in alive if task is not None and not task.done()]
            self.callers = {id(task): ref(task) for task in tasks}
            in_use = _look_into(tasks)
            older = self.exceptions[: -_MOST // 2]
            self._take_out(older)
            if not self.kept:
                self._sever(older, in_use)
        except Exception:
            _complain("severing a request that goes on")

    def done(self, task: "asyncio.Future[Any]") -> None:
        if internals.is_awaited(self.request, task):
            # Started eagerly, the task wakes the connection's task only after it
            # has called this; and that one may log the exception still.
            task.get_loop().call_soon(self.end, task)
        else:
            self.end(task)

    def end(self, task: "asyncio.Future[Any]") -> None:
        try:
            self.request.__dict__.pop(_FOLLOWED, None)
            for kept in internals.kept_exceptions(self.request):
                self.note(kept)
            for serving in self.calls:
                serving.over = True
                for error in serving.errors():
                    self.note(error)
            self._let_go()
            connection = self.connection
            if connection is not None:
                connection.following -= 1
                if connection.later:
                    connection.sever_later_ones()
            if not self.kept:
                if self.exceptions and not self._drop(task):
                    self._sever(self.exceptions)
                self._release(task)
                if connection is not None and internals.has_read_body(self.request):
                    if self.exceptions:
                        # The task's other callbacks may come to it by its response.
                        release = self._release_read_body
                        task.get_loop().call_soon(release, connection, self.exceptions)
                    else:
                        self._release_read_body(connection, [])
        except Exception:
            _complain("severing a request")
        finally:
            self._let_go()
            # The traceback of an exception that is left alone may lead here.
            self.exceptions = []
            self.connection = None

    def _drop(self, task: "asyncio.Future[Any]") -> bool:
        """Cut only what aiohttp holds, if nobody else holds anything.

        Then the rest goes by itself, in a fraction of the time that severing takes.
        """
        connection = self.connection
        if len(self.exceptions) != 1 or connection is None or not COUNTS_ARE_EXACT:
            return False
        if not self.are_default:
            return False
        # The frames of a websocket's handler are to be looked at.
        if hdrs.UPGRADE in self.request.headers:
            return False
        exc = self.exceptions[0]
        response: Any = internals.response_of(task)
        # The list, the variable, the argument; for the response, its variable and
        # the task's result too, its frame, and perhaps that of the connection.
        known = 3
        if exc is response:
            known = 6 + internals.connection_holds(
                connection.coroutine, connection.frame, exc
            )
        if sys.getrefcount(exc) != known or leads_on(exc):
            return False
        if exc is internals.missing_route(self.request):
            return False
        # If the response's did not come to aiohttp's frame, it was returned.
        code = HANDLE_REQUEST if exc is response else None
        if not owns_its_traceback(exc, code):
            return False
        if any(options.listener for options in self.options):
            frames = sum(1 for _ in frames_of(exc))
            self._tell(exc, Cut(exceptions=1, tracebacks=frames, frames=frames))
        if exc is response:  # some of the count may be made up by somebody else
            empty_with_callers(next(frames_of(exc)), {})
        else:
            detach(exc)
        return True

    def _sever(
        self, roots: List[BaseException], in_use: "Optional[_InUse]" = None
    ) -> None:
        """Sever what nobody needs any more; leave the rest to who has it in hand.

        Args:
            roots: what this request has noted.
            in_use: what its own tasks need; None: they are done.
        """
        sorted_out = _sort_out(roots, self._is_kept, in_use or _InUse())
        # Somebody runs with those who passed no middleware: a background task.
        if in_use is not None:
            _leave(sorted_out.in_flight, self._clears_frames)
        elif self.connection is not None:
            self.connection.keep_for_later(sorted_out.in_flight, self._clears_frames)
        for root, own in sorted_out.ready:
            own += _websocket_errors(self.request, own)
            cut = sever(own, clear_frames=self._clears_frames, spare=sorted_out.spare)
            self._tell(root, cut)

    @property
    def _clears_frames(self) -> bool:
        return all(options.clear_frames for options in self.options)

    def _is_kept(self, exc: BaseException) -> bool:
        for options in self.options:
            if options.keep is None:
                continue
            try:
                if options.keep(cast(web.Request, self.request), exc):
                    return True
            except _ENDS:
                raise
            except BaseException:
                _complain(f"keep={_name(options.keep)}")
                return True  # a leak is better than a traceback lost
        return False

    def _tell(self, root: BaseException, cut: Cut) -> None:
        listeners = [each.on_break for each in self.options if each.on_break]
        listeners += [each.listener for each in self.options if each.listener]
        if not listeners:
            return
        resource = getattr(internals.route_of(self.request), "resource", None)
        event = BreakEvent(
            method=self.request.method,
            route=getattr(resource, "canonical", None),
            exception=type(root),
            exceptions=cut.exceptions,
            tracebacks=cut.tracebacks,
            frames=cut.frames,
        )
        for on_break in listeners:
            try:
                on_break(event)
            except _ENDS:
                raise
            except BaseException:
                _complain(f"on_break={_name(on_break)}")

    def _release(self, task: "asyncio.Future[Any]") -> None:
        request = self.request
        if hdrs.UPGRADE in request.headers:
            internals.release_websocket(request, internals.response_of(task))
        if internals.missing_route(request) is not None:
            internals.forget_missing_route(request)
        if not request.body_exists:
            return
        connection = self.connection
        if self.releases_body and request.content.is_eof():
            internals.release_body(request, BodyReleasedError)
        elif not internals.release_payload(request.content) and connection is not None:
            # The client still sends the body; aiohttp reads on for a while.
            connection.unread = request.content

    def _release_read_body(
        self, connection: "_Connection", exceptions: List[BaseException]
    ) -> None:
        """Let go of the body, if nobody but the connection's task has the request.

        Nobody can read it any more then, and an idle connection would keep it until
        its next request.
        """
        try:
            request = self.request
            if not COUNTS_ARE_EXACT:
                return
            for reference in getweakrefs(request):
                if type(reference) is not Watching:
                    return
            for exc in exceptions:
                # What is left of the response's traceback goes with the response only.
                # The list, the variable, the argument; the connection's variable.
                known = 3 + internals.connection_holds(
                    connection.coroutine, connection.frame, exc
                )
                if getrefcount(exc) == known and owns_its_traceback(exc):
                    for frame in frames_of(exc):
                        empty(frame)
            # The attribute, the variable, the argument; the connection's variable.
            known = 3 + internals.connection_holds(
                connection.coroutine, connection.frame, request
            )
            if (
                getrefcount(request) == known
                and getrefcount(request.__dict__) == _UNSHARED_DICT
            ):
                internals.release_read_body(request)
        except Exception:
            _complain("releasing a body")


class _InUse:
    """What tasks that are suspended need: their frames, and what they have in hand."""

    __slots__ = ("exceptions", "frames")

    def __init__(self) -> None:
        self.frames: Set[int] = set()  # by id
        self.exceptions: Dict[int, BaseException] = {}


def _look_into(tasks: "Iterable[asyncio.Task[Any]]") -> _InUse:
    """Look, from a callback of the event loop, at what its tasks need."""
    in_use = _InUse()
    for task in tasks:
        coroutine = task.get_coro()
        in_use.frames |= awaiting_frames(coroutine)
        for exc in handled_by(coroutine):
            in_use.exceptions.update((id(below), below) for below in graph(exc))
    return in_use


class _SortedOut:
    """What of some exceptions is to be severed, and what of them is needed."""

    __slots__ = ("in_flight", "ready", "spare")

    def __init__(self) -> None:
        self.ready: List[Tuple[BaseException, List[BaseException]]] = []
        self.in_flight: List[BaseException] = []
        self.spare: List[FrameType] = []


def _sort_out(
    roots: List[BaseException],
    is_kept: Callable[[BaseException], bool],
    in_use: _InUse,
) -> _SortedOut:
    sorted_out = _SortedOut()
    covered: Set[int] = set()
    kept: Dict[int, BaseException] = {}
    for exc in in_use.exceptions.values():
        sorted_out.spare += frames_of(exc)
    # Latest first, so that the whole of a chain comes before its parts.
    for root in reversed(roots):
        exceptions = [exc for exc in graph(root) if id(exc) not in covered]
        covered.update(map(id, exceptions))
        for exc in exceptions:
            if id(exc) not in kept and is_kept(exc):
                kept.update((id(below), below) for below in graph(exc))
        own = []
        for exc in exceptions:
            if id(exc) in kept or _somebody_has(exc):
                sorted_out.spare += frames_of(exc)
            elif id(exc) in in_use.exceptions or in_flight(exc, in_use.frames):
                sorted_out.spare += frames_of(exc)
                sorted_out.in_flight.append(exc)
            else:
                own.append(exc)
        if own:
            sorted_out.ready.append((root, own))
    running = {id(frame) for exc in sorted_out.in_flight for frame in frames_of(exc)}
    if running:  # what shares a frame with one of those is to be looked at again too
        for _, own in sorted_out.ready:
            sorted_out.in_flight += [
                exc for exc in own if any(id(f) in running for f in frames_of(exc))
            ]
    return sorted_out


class _LeftOver:
    """What a task still ran with when those were done who had noted it, by loop.

    Nobody tells when that task is done with it, so it is looked for when more comes.
    An exception is held weakly, if its class allows that: the collector may have it.
    """

    __slots__ = ("exceptions", "many", "looks")

    def __init__(self) -> None:
        self.exceptions: Dict[int, Tuple[Callable[[], Any], bool]] = {}
        self.many = 1  # one look is at all tasks: so many come for one
        self.looks = False

    def add(self, exc: BaseException, clear_frames: bool) -> None:
        try:
            self.exceptions[id(exc)] = ref(exc), clear_frames
        except TypeError:
            return  # of a built-in class: to hold it could keep what nobody else does
        if len(self.exceptions) >= self.many and not self.looks:
            self.looks = True
            asyncio.get_running_loop().call_soon(self.look)

    def look(self) -> None:
        try:
            self.looks = False
            tasks = asyncio.all_tasks()
            in_use = _look_into(tasks)
            for key, (found, clear_frames) in list(self.exceptions.items()):
                exc = found()
                if exc is None:
                    del self.exceptions[key]
                    continue
                sorted_out = _sort_out([exc], lambda exc: False, in_use)
                for _, own in sorted_out.ready:
                    sever(own, clear_frames=clear_frames, spare=sorted_out.spare)
                if not sorted_out.in_flight:
                    del self.exceptions[key]
            while len(self.exceptions) > _MOST + len(tasks):
                del self.exceptions[next(iter(self.exceptions))]
            self.many = len(self.exceptions) + max(1, len(tasks) // 8)
        except Exception:
            _complain("looking for what is left over")


_left_over: "WeakKeyDictionary[asyncio.AbstractEventLoop, _LeftOver]" = (
    WeakKeyDictionary()
)


def _leave(exceptions: Iterable[BaseException], clear_frames: bool = True) -> None:
    for exc in exceptions:
        loop = asyncio.get_running_loop()
        if loop not in _left_over:
            _left_over[loop] = _LeftOver()
        _left_over[loop].add(exc, clear_frames)


# Where the frame of a request's task is over; before CPython 3.13 frame.clear() closes
# a coroutine that is suspended.
_RETURNS = frozenset() if HANDLE_REQUEST is None else returns_of(HANDLE_REQUEST)


class _Connection:
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
        "reference",
        "task",
        "__weakref__",
    )

    def __init__(self, task: "asyncio.Task[Any]") -> None:
        self.key = id(task)
        # aiohttp 3.13 has the request forget its task before it is done.
        self.coroutine: Any = task.get_coro()
        self.frame = internals.connection_frame(task)
        self.errors: List[BaseException] = []
        self.unread: Optional[aiohttp.StreamReader] = None  # of a body
        # Exceptions that somebody had in hand, and whether to clear their frames.
        self.later: Dict[int, Tuple[BaseException, bool]] = {}
        self.following = 0  # requests by a callback of their task
        # What a request has raised, and is severed when the next one comes or the
        # connection ends.  Until then aiohttp has it as well, as the response, in the
        # live frame of the connection's task.
        self.put_off: Optional[BaseException] = None
        self.raised_by: Optional[web.BaseRequest] = None
        self.task = ref(task)
        self.reference = ref(self, partial(_forget_connection, self.key))

    def take_back(self) -> Optional[BaseException]:
        """Put it off no longer."""
        exc = self.put_off
        self.put_off = self.raised_by = None
        pending.pop(id(exc), None)
        return exc

    def take_back_of(self, request: web.BaseRequest) -> Optional[BaseException]:
        """Put it off no longer, if it is of this request."""
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
            # The attribute, the variable, the argument.
            if getrefcount(exc) != 3 or leads_on(exc) or not owns_its_traceback(exc):
                return False
            self.take_back()
        return True

    def sever_put_off(self, request: Optional[web.BaseRequest]) -> None:
        """Sever what was put off, if the connection has gone on from its request.

        If nobody but aiohttp has it, then all of it goes by itself, once the frame of
        the request's task does not hold it.  Its traceback stays, since the count of
        references may be made up by somebody else.

        Args:
            request: one that is to be handled now; None: the connection has ended.
        """
        exc, raised_by = self.put_off, self.raised_by
        if exc is None or raised_by is None:
            return
        # The attribute, the variable, the argument, the frame of the request's task;
        # and that of the connection's, if that goes on.
        known = 4 if request is None else 5
        if (
            getrefcount(exc) == known
            and cause_of(exc) is None
            and context_of(exc) is None
            and internals.keeps_nothing(raised_by)
            and owns_its_traceback(exc, HANDLE_REQUEST)
        ):
            entry: Any = traceback_of(exc)
            frame = entry.tb_frame
            if frame.f_lasti in _RETURNS:  # so that the connection has gone on
                frame.clear()
                if getrefcount(exc) == known - 1:
                    self.put_off = self.raised_by = None
                    pending.pop(id(exc), None)
                    return
        if request is not None and not has_gone_on(raised_by, request):
            return
        self.take_back()
        found = [exc, *internals.kept_exceptions(raised_by)]
        if request is None:
            self.sever_shared(found)
        else:
            # A task that was started eagerly is handling this request before all the
            # callbacks of the earlier one's have run.
            asyncio.get_running_loop().call_soon(self.sever_shared, found)

    def sever_shared(self, exceptions: List[BaseException]) -> None:
        """Sever what nobody has noted, and somebody has but aiohttp."""
        try:
            sorted_out = _sort_out(exceptions, lambda exc: False, _InUse())
            for _, own in sorted_out.ready:
                sever(own, spare=sorted_out.spare)
            _leave(sorted_out.in_flight)
        except Exception:
            _complain("severing what was put off")

    def is_answering(self) -> bool:
        """Whether it waits for the task of a request still."""
        return internals.is_being_answered(self.task())

    def keep_for_later(
        self, exceptions: Iterable[BaseException], clear_frames: bool
    ) -> None:
        """Keep what somebody has in hand, until the connection goes on or ends."""
        for exc in exceptions:
            self.later[id(exc)] = exc, clear_frames
            pending[id(exc)] = self.reference

    def sever_later_ones(self) -> None:
        later, self.later = self.later, {}
        for key in later:
            pending.pop(key, None)
        clear_frames = all(clear for _, clear in later.values())
        roots = [exc for exc, _ in later.values()]
        sorted_out = _sort_out(roots, lambda exc: False, _InUse())
        still = [exc for exc in roots if _somebody_has(exc)]
        still += [exc for exc in sorted_out.in_flight if id(exc) in later]
        self.keep_for_later(still, clear_frames)
        # What these lead to may be kept, or is looked at by others.
        ready = [exc for _, own in sorted_out.ready for exc in own]
        spare = sorted_out.spare
        spare += [f for exc in ready if id(exc) not in later for f in frames_of(exc)]
        own = [exc for exc in ready if id(exc) in later]
        sever(own, clear_frames=clear_frames, spare=spare)

    def done(self, task: "asyncio.Future[Any]") -> None:
        try:
            empty_with_callers(self.frame, {})
            self.sever_put_off(None)
            if self.unread is not None:
                internals.release_payload(self.unread)
            if self.later:
                self.sever_later_ones()
            for key, (exc, clear_frames) in self.later.items():
                pending.pop(key, None)
                _leave([exc], clear_frames)
            for error in self.errors:
                sever(graph(error))
        except Exception:
            _complain("severing a connection")
        finally:
            connections.pop(self.key, None)
            self.take_back()
            self.coroutine = self.frame = None
            self.errors = []
            self.unread = None
            self.later = {}


class _Serving(Calls):
    """The outgoing calls of one request, as its handlers and their tasks see it."""

    __slots__ = ("options", "over", "request")

    def __init__(self, request: web.BaseRequest, options: Options) -> None:
        super().__init__()
        self.options = [options]
        self.over = False  # tasks that outlive the request are on their own
        # Every task that a handler starts, and for as long as it runs, has this in
        # its context.
        self.request = Watching(request)


class _Caller(_Holder):
    """A task that makes outgoing calls outside of any guarded request."""

    __slots__ = ("calls", "due", "task")

    def __init__(self, task: "asyncio.Task[Any]") -> None:
        super().__init__()
        self.calls = Calls()
        self.due: List[BaseException] = []
        self.task = ref(task)

    def call_ended(self) -> None:
        """Sever what earlier calls have left, once the task waits for something.

        Only then does the interpreter tell what the task has in hand.
        """
        current = sys.exc_info()[1]
        waits = not self.due
        self.due = [exc for exc in self.exceptions if exc is not current]
        task = self.task()
        if self.due and waits and task is not None:
            task.get_loop().call_soon(self.sever_due_ones)

    def sever_due_ones(self) -> None:
        try:
            due, self.due = self.due, []
            task = self.task()
            if task is not None and not task.done():
                in_use = _look_into([task])
                self._sever(due, in_use)
                self.calls.forget_dead()
        except Exception:
            _complain("severing the calls of a task")

    def done(self, task: "asyncio.Future[Any]") -> None:
        try:
            _callers.pop(id(task), None)
            self.note_errors()
            self._sever(self.exceptions, _InUse())
            _leave(self.exceptions)
        except Exception:
            _complain("severing the calls of a task")
        finally:
            self._let_go()
            self.exceptions = []
            self.due = []

    def note_errors(self) -> None:
        for error in self.calls.errors():
            self.note(error)

    def _sever(self, roots: List[BaseException], in_use: _InUse) -> None:
        self._take_out(roots)
        sorted_out = _sort_out(roots, lambda exc: False, in_use)
        for _, own in sorted_out.ready:
            sever(own, spare=sorted_out.spare)
        for exc in sorted_out.in_flight[-_MOST:]:
            self.note(exc)


calls_are_followed = False
_serving: "ContextVar[Optional[_Serving]]" = ContextVar("_serving", default=None)


def follow_calls() -> None:
    """Follow outgoing calls from now on; until then they cost a request nothing."""
    global calls_are_followed
    calls_are_followed = True


def begin(request: web.BaseRequest, options: Options) -> None:
    """Take up a request: the one before it on the connection is done for certain.

    Its outgoing calls, here and in child tasks, are followed as the request's.
    """
    try:
        if pending:
            connection = _connection_of(connection_task(request))
            if connection is not None:
                if connection.put_off is not None:
                    connection.sever_put_off(request)
                if connection.later:
                    connection.sever_later_ones()
        if not calls_are_followed or not internals.is_request(request):
            return
        serving = _serving.get()
        if serving is None or serving.request() is not request:
            _serving.set(_Serving(request, options))
        elif not any(each is options for each in serving.options):
            serving.options.append(options)
    except Exception:
        _complain("taking up a request")


def _calls_of(request: web.BaseRequest) -> Optional[_Serving]:
    serving = _serving.get()
    if serving is None or serving.request() is not request:
        return None
    return serving


def _calling_task() -> Optional[_Caller]:
    task = asyncio.current_task()
    if task is None:
        return None
    key = id(task)
    found = _callers.get(key)
    caller = None if found is None else found()
    if caller is None:
        caller = _Caller(task)
        _callers[key] = ref(caller, partial(_callers.pop, key))
        task.add_done_callback(caller.done)
    return caller


def note_call(made_with: Any) -> None:
    """Remember what a call is made with, to which an error may come later.

    This runs for every outgoing call, most of which succeed.

    Args:
        made_with: a response, a websocket or the protocol of a connection.
    """
    try:
        serving = _serving.get()
        if serving is not None and not serving.over:
            if serving.add(made_with):
                _look_for_errors(serving)
            return
        caller = _calling_task()
        if caller is None:
            return
        look = caller.calls.add(made_with)
        if look:
            caller.note_errors()
        if caller.exceptions:
            caller.call_ended()
    except Exception:
        _complain("noting a call")


def note_successful_call() -> None:
    """Tell a task whose earlier calls have failed that another one has ended."""
    if not _in_hand:
        return  # nobody's have
    try:
        serving = _serving.get()
        if serving is not None and not serving.over:
            return
        found = _callers.get(id(asyncio.current_task()))
        caller = None if found is None else found()
        if caller is not None and caller.exceptions:
            caller.call_ended()
    except Exception:
        _complain("noting a call")


def _look_for_errors(serving: _Serving) -> None:
    request = serving.request()
    if request is None:  # gone without an end: a clone of another one
        serving.over = True
        return
    errors = serving.errors()
    task = asyncio.current_task()
    followed = _follow(request, None) if errors and task is not None else None
    for error in errors:
        if followed is not None and task is not None:
            followed.note_call(error, task)
    serving.forget_dead()


def note_failed_call(exc: BaseException) -> None:
    """Remember the exception of an outgoing call; nothing about it changes yet."""
    if type(exc) is GeneratorExit:
        return
    try:
        serving = _serving.get()
        request = None if serving is None or serving.over else serving.request()
        followed = None if request is None else _follow(request, None)
        task = asyncio.current_task()
        if followed is not None and task is not None:
            followed.note_call(exc, task)
            return
        # Outside of any, or nobody knows any more which task handles it.
        caller = _calling_task()
        if caller is not None:
            caller.note_errors()
            caller.note(exc)
            caller.call_ended()
    except Exception:
        _complain("noting a failed call")


def note_last_attempt() -> None:
    """Remember why the call that is on its way is tried again, if it is."""
    try:
        error = internals.error_of_last_attempt()
        if error is not None:
            note_failed_call(error)
    except Exception:
        _complain("noting an attempt to call")


def _take_part(followed: _Request, serving: _Serving) -> None:
    if serving not in followed.calls:
        followed.calls.append(serving)
    for options in serving.options:
        followed.add(options)


def kept_requests() -> Set[int]:
    """The ids of the requests that exceptions lead to which are to be severed later."""
    return {
        id(value)
        for connection in [found() for found in list(connections.values())]
        if connection is not None
        for exc, _ in list(connection.later.values())
        for frame in frames_of(exc)
        if is_finished(frame)  # what a task of its own runs is for itself
        for value in gc.get_referents(frame)
        if web.BaseRequest in type(value).__mro__
    }


def follow_connection(task: Any) -> "Optional[_Connection]":
    """Follow a connection to the end of its task, if it is not followed yet."""
    connection = _connection_of(task)
    if connection is None and isinstance(task, asyncio.Task):  # a mock has none
        connection = _Connection(task)
        connections[connection.key] = connection.reference
        task.add_done_callback(connection.done)
    return connection


def has_put_off(request: web.BaseRequest) -> bool:
    """Whether a request's connection has put something off."""
    connection = _connection_of(connection_task(request))
    return connection is not None and connection.put_off is not None


def _connection_of(task: Any) -> "Optional[_Connection]":
    found = connections.get(id(task))
    return None if found is None else found()


def _forget_connection(key: int, reference: "ref[_Connection]") -> None:
    """Forget one that is gone without an end, since its loop was closed."""
    if connections.get(key) is reference:
        connections.pop(key, None)
    if len(pending) > 2 * len(connections):  # not for each: that would be quadratic
        for found in [each for each, holder in pending.items() if holder() is None]:
            pending.pop(found, None)


def note_parser_error(task: Any, exc: BaseException) -> None:
    """Remember an exception that made a connection end without any request."""
    try:
        connection = _connection_of(task)
        if connection is not None:
            connection.errors.append(exc)
    except Exception:
        _complain("noting a parser's error")


def _follow(request: web.BaseRequest, options: Optional[Options]) -> Optional[_Request]:
    if not internals.is_request(request):
        return None
    followed: Optional[_Request] = request.__dict__.get(_FOLLOWED)
    if followed is None:
        task = internals.request_task(request)
        if task is None:
            return None
        connection = follow_connection(request.task)
        followed = request.__dict__[_FOLLOWED] = _Request(request, connection)
        task.add_done_callback(followed.done)
        if connection is not None:
            connection.following += 1
            exc = connection.take_back_of(request)
            if exc is not None:
                followed.note(exc)
    if options is not None:
        followed.add(options)
    if calls_are_followed:
        serving = _calls_of(request)
        if serving is not None:
            _take_part(followed, serving)
    return followed


def note(request: web.BaseRequest, exc: BaseException, options: Options) -> None:
    """Remember that an exception went by; nothing about it changes yet."""
    if type(exc) is GeneratorExit:  # the coroutine is thrown away, not the request
        return
    try:
        followed = _follow(request, options)
        if followed is not None:
            followed.note(exc)
    except Exception:
        _complain("noting an exception")


def note_last(
    request: web.BaseRequest,
    exc: web.HTTPException,
    options: Options,
    middleware: Optional[Callable[..., Any]],
) -> None:
    """As :func:`note`, of the response perhaps: outside of all middlewares is aiohttp.

    Nobody else has most of those, and a callback for each would cost more than all the
    rest.  It is put off; who asks further inside does not know yet whether it is
    swallowed on its way.

    Args:
        request: as for :func:`note`.
        exc: as for :func:`note`.
        options: as for :func:`note`.
        middleware: the outermost one; None: it is outside of all middlewares.
    """
    try:
        if options.are_silent and not calls_are_followed:
            task = connection_of_response(request, middleware)
            if task is not None and not leads_on(exc):
                connection = follow_connection(task)
                if connection is not None and not connection.following:
                    put_off = connection.put_off
                    if put_off is None:
                        if getrefcount(exc) == _UNSHARED:
                            connection.put_off = exc
                            connection.raised_by = request
                            pending[id(exc)] = connection.reference
                            return
                    # The attribute and the variable.
                    elif put_off is exc and getrefcount(exc) == _UNSHARED + 2:
                        return
    except Exception:
        _complain("putting off an exception")
    note(request, exc, options)


# How many references there are to a __dict__ that is of one object only.
_UNSHARED_DICT = getrefcount(logger.__dict__)


def _count_references(exc: BaseException) -> int:
    return getrefcount(exc)


async def _raise() -> None:
    raise Exception


async def _count_when_caught() -> int:
    try:
        await _raise()
    except BaseException as exc:
        return _count_references(exc)
    raise AssertionError


def _run_at_once(coroutine: "Coroutine[Any, Any, int]") -> int:
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return int(stop.value)
    raise AssertionError


# How many references to an exception note_last() counts if nobody else has any.  What
# traces the program may have some.
_UNSHARED = -1
if COUNTS_ARE_EXACT and sys.gettrace() is None:
    _UNSHARED = _run_at_once(_count_when_caught())


def leave_alone(request: web.BaseRequest, kept: bool) -> None:
    """Leave the exceptions of a request alone, or no longer."""
    try:
        followed = _follow(request, None)
        if followed is not None:
            followed.kept = kept
    except Exception:
        _complain("opting out")


def passed(
    request: web.Request, response: web.StreamResponse, options: Options
) -> None:
    """Follow a request that raised nothing, if it may keep something all the same.

    This runs for every request that succeeds, and most keep nothing: no body that
    could be read too late, nothing that the application stored, a route, and a
    response that is no websocket.  A connection is followed from its first request.
    """
    try:
        if not internals.is_request(request):
            return
        connection = follow_connection(request.task)
        if not internals.keeps_nothing(request):
            _follow(request, options)
        elif pending:
            if connection is not None and not connection.forget_swallowed():
                _follow(request, options)
        # isinstance() is asked last: the class is abstract, which makes it slow.
        if type(response) is not web.Response:
            error: Any = response  # an HTTPException that was caught and returned
            if isinstance(response, web.WebSocketResponse):
                _follow(request, options)
                error = response.exception()
            if isinstance(error, BaseException):
                note(request, error, options)
        if calls_are_followed:
            _look_at_calls(request, options)
    except Exception:
        _complain("looking at a request")


def _look_at_calls(request: web.Request, options: Options) -> None:
    serving = _calls_of(request)
    if serving is None:
        return
    for error in serving.errors():
        note(request, error, options)
    if serving.unread():
        _follow(request, options)  # perhaps it is read to be the answer's own body
    if _FOLLOWED not in request.__dict__:
        serving.over = True  # nothing looks at the request's end


def _somebody_has(exc: BaseException) -> bool:
    for holder in _in_hand.get(id(exc), ()):
        if holder() is not None:
            return True
    found = pending.get(id(exc))
    connection = None if found is None else found()
    return (
        connection is not None
        and connection.put_off is exc
        and connection.is_answering()
    )


def _websocket_errors(
    request: web.BaseRequest, exceptions: List[BaseException]
) -> List[BaseException]:
    """The errors kept by a websocket whose handler raised, and so returned none."""
    if hdrs.UPGRADE not in request.headers:
        return []
    found: Dict[int, BaseException] = {}
    for exc in exceptions:
        for frame in frames_of(exc):
            for value in local_values(frame):
                if internals.is_websocket_of(request, value):
                    internals.release_websocket(request, value)
                    error = value.exception()
                    if error is not None:
                        found.update((id(below), below) for below in graph(error))
    for exc in exceptions:
        found.pop(id(exc), None)
    return list(found.values())
