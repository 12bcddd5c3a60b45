"""When is it safe? Follows a request to the end of its task, a connection to its.

Nothing about an exception changes while its request is in flight: it is noted on
the way, and severed when the request's own task is done, which is after the
response, aiohttp's log lines and the access log.
"""

import asyncio
import logging
import sys
from contextvars import ContextVar
from functools import partial
from types import FrameType
from typing import (
    Any,
    Callable,
    Container,
    Dict,
    List,
    Optional,
    Set,
    Tuple,
    cast,
)
from weakref import ref

from aiohttp import hdrs, web

from . import internals
from .calls import Calls
from .options import BodyReleasedError, BreakEvent, Options
from .sever import (
    COUNTS_ARE_EXACT,
    Cut,
    detach,
    empty_with_callers,
    frames_of,
    graph,
    in_flight,
    leads_on,
    local_values,
    owns_its_traceback,
    running_frames,
    sever,
)

__all__ = (
    "begin",
    "follow_calls",
    "follow_connection",
    "leave_alone",
    "note",
    "note_call",
    "note_failed_call",
    "note_parser_error",
    "passed",
)

logger = logging.getLogger("aiohttp_cyclebreak")


_complaints: Set[str] = set()

# What ends the process, out of a callback too; all else that one raises is logged.
# CancelledError, for one, comes out of exception() of a task that was cancelled.
_ENDS = (KeyboardInterrupt, SystemExit)


def _complain(about: str) -> None:
    """Log the error being handled, the first time that it happens there."""
    if about not in _complaints:
        _complaints.add(about)
        logger.exception(
            "%s failed; the request is not affected, and this is not logged again",
            about,
        )


# Neither of these keeps anything alive: a request is followed by the callbacks of its
# task and a connection by those of its own, so what is never finished (a loop that
# is closed too early) is let go with the task.
_connections: "Dict[int, ref[_Connection]]" = {}
_callers: "Dict[int, ref[_Caller]]" = {}
_in_hand: "Dict[int, List[ref[_Holder]]]" = {}  # who has noted an exception

# Where a request has what follows it, beside its own attributes.
_FOLLOWED = "_cyclebreak"

# Of a request that has noted more exceptions than that, the older half is severed
# while it goes on: a handler can stream for ever, and its calls fail again and again.
_MOST = 100


def _forget_holder(key: int, holder: "ref[_Holder]") -> None:
    """Forget who had an exception in hand, and is gone since its loop was closed."""
    others = [each for each in _in_hand.pop(key, ()) if each is not holder]
    if others:
        _in_hand[key] = others


def _name(function: Any) -> str:
    """Say which function it is, without asking it: its repr may fail, or tell."""
    return str(getattr(function, "__qualname__", type(function).__qualname__))


class _Holder:
    """Who has exceptions in hand, and is to be done with them."""

    __slots__ = ("exceptions", "in_hand", "__weakref__")

    def __init__(self) -> None:
        self.exceptions: List[BaseException] = []
        self.in_hand: List[int] = []  # the ids of those, and of what they lead to

    def note(self, root: BaseException) -> None:
        for exc in self.exceptions:
            if exc is root:
                return
        self.exceptions.append(root)
        for exc in graph(root):
            self.in_hand.append(id(exc))
            forget = partial(_forget_holder, id(exc))
            _in_hand.setdefault(id(exc), []).append(ref(self, forget))

    def _let_go(self) -> None:
        for key in self.in_hand:
            holders = _in_hand.pop(key, ())
            others = [each for each in holders if each() not in (self, None)]
            if others:
                _in_hand[key] = others
        self.in_hand = []

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

    __slots__ = ("request", "options", "connection", "calls", "kept")

    def __init__(
        self, request: web.BaseRequest, connection: "Optional[_Connection]"
    ) -> None:
        super().__init__()
        self.request = request
        self.connection = connection  # aiohttp lets go of request.task before the end
        self.options: List[Options] = []
        self.calls: List[_Serving] = []
        self.kept = False

    def note_call(self, exc: BaseException) -> None:
        self.note(exc)
        if len(self.exceptions) > _MOST:
            oldest = self.exceptions[: _MOST // 2]
            self._take_out(oldest)
            if not self.kept:
                self._sever(oldest, _own_frames())

    def done(self, task: "asyncio.Future[Any]") -> None:
        if internals.is_awaited(self.request, task):
            # Started eagerly, the task wakes the connection's task only after it
            # has called this; and that one may log the exception still.
            task.get_loop().call_soon(self.end, task)
        else:
            self.end(task)

    def end(self, task: "asyncio.Future[Any]") -> None:
        request = self.request
        try:
            request.__dict__.pop(_FOLLOWED, None)
            for kept in internals.kept_exceptions(request):
                self.note(kept)
            for serving in self.calls:
                serving.over = True
                for error in serving.errors():
                    self.note(error)
            self._let_go()
            if self.connection is not None:
                self.connection.sever_later_ones()
            if not self.kept:
                if not self._drop(task):
                    self._sever(self.exceptions)
                self._release(task)
        except Exception:
            _complain("severing a request")
        finally:
            self._let_go()
            # The traceback of an exception that is left alone may lead here.
            self.exceptions = []
            self.connection = None

    def _drop(self, task: "asyncio.Future[Any]") -> bool:
        """Cut only what aiohttp holds, if nobody else holds anything.

        Then the rest goes by itself, in a tenth of the time that severing takes.
        """
        if not COUNTS_ARE_EXACT or hdrs.UPGRADE in self.request.headers:
            return False  # the frames of a websocket's handler are to be looked at
        for options in self.options:
            if options.keep is not None or options.on_break is not None:
                return False
        frame = None if self.connection is None else self.connection.frame
        missing = internals.missing_route(self.request)
        response: Any = internals.response_of(task)
        for exc in self.exceptions:
            references = sys.getrefcount(exc)
            # The list, the variable, the argument; for the response, its variable and
            # the task's result too, its frame, and perhaps that of the connection.
            known = 3
            if exc is response:
                known = 6 + internals.connection_holds(self.request, frame, exc)
            if references != known or exc is missing or leads_on(exc):
                return False
            if not owns_its_traceback(exc):
                return False
            if exc is response and internals.frame_of_response(exc) is None:
                return False  # it was returned
        for exc in self.exceptions:
            if exc is response:
                empty_with_callers(internals.frame_of_response(exc), {})
            else:
                detach(exc)
        return True

    def _sever(self, roots: List[BaseException], running: Container[int] = ()) -> None:
        """Sever what nobody needs any more; leave the rest to who has it in hand."""
        sorted_out = _sort_out(roots, self._is_kept, running)
        if self.connection is not None:
            for exc in sorted_out.in_flight:
                # By somebody who passed no middleware: a background task.
                self.connection.later[id(exc)] = exc, self._clears_frames
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
        release_body = any(options.release_body for options in self.options)
        if release_body and request.content.is_eof():
            internals.release_body(request, BodyReleasedError)
        elif not internals.release_payload(request):
            # The client still sends the body; aiohttp reads on for a while.
            if self.connection is not None:
                self.connection.unread = request


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
    running: Container[int] = (),
) -> _SortedOut:
    sorted_out = _SortedOut()
    covered: Set[int] = set()
    kept: Dict[int, BaseException] = {}
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
            elif in_flight(exc, running):
                sorted_out.spare += frames_of(exc)
                sorted_out.in_flight.append(exc)
            else:
                own.append(exc)
        if own:
            sorted_out.ready.append((root, own))
    return sorted_out


class _Connection:
    """A connection that is followed to the end of its task."""

    __slots__ = ("frame", "errors", "unread", "later", "__weakref__")

    def __init__(self, frame: Optional[FrameType]) -> None:
        self.frame = frame
        self.errors: List[BaseException] = []
        self.unread: Optional[web.BaseRequest] = None
        # Exceptions that somebody had in hand, and whether to clear their frames.
        self.later: Dict[int, Tuple[BaseException, bool]] = {}

    def sever_later_ones(self) -> None:
        for key, (exc, clear_frames) in list(self.later.items()):
            if not (_somebody_has(exc) or in_flight(exc)):
                del self.later[key]
                sever([exc], clear_frames=clear_frames)

    def done(self, task: "asyncio.Future[Any]") -> None:
        try:
            _connections.pop(id(task), None)
            empty_with_callers(self.frame, {})
            if self.unread is not None:
                internals.release_payload(self.unread)
            self.sever_later_ones()
            for error in self.errors:
                sever(graph(error))
        except Exception:
            _complain("severing a connection")
        finally:
            self.frame = None
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
        self.request = ref(request)


class _Caller(_Holder):
    """A task that makes outgoing calls outside of any guarded request."""

    __slots__ = ("calls",)

    def __init__(self) -> None:
        super().__init__()
        self.calls = Calls()

    def call_ended(self) -> None:
        """Sever what earlier calls have left, but what is being handled."""
        handled = sys.exc_info()[1]  # or by who awaits this
        spare = () if handled is None else graph(handled)
        ids = set(map(id, spare))
        self._sever([exc for exc in self.exceptions if id(exc) not in ids])

    def done(self, task: "asyncio.Future[Any]") -> None:
        try:
            _callers.pop(id(task), None)
            self.note_errors()
            self._sever(self.exceptions)
        except Exception:
            _complain("severing the calls of a task")
        finally:
            self._let_go()
            self.exceptions = []

    def note_errors(self) -> None:
        for error in self.calls.errors():
            self.note(error)

    def _sever(self, roots: List[BaseException]) -> None:
        self._take_out(roots)
        sorted_out = _sort_out(roots, lambda exc: False, _own_frames())
        for _, own in sorted_out.ready:
            sever(own, spare=sorted_out.spare)
        for exc in sorted_out.in_flight[-_MOST:]:
            self.note(exc)


_calls_are_followed = False
_serving: "ContextVar[Optional[_Serving]]" = ContextVar("_serving", default=None)


def follow_calls() -> None:
    """Follow outgoing calls from now on; until then they cost a request nothing."""
    global _calls_are_followed
    _calls_are_followed = True


def begin(request: web.BaseRequest, options: Options) -> None:
    """Make the outgoing calls that follow, here and in child tasks, the request's."""
    if not _calls_are_followed:
        return
    try:
        serving = _serving.get()
        if serving is None or serving.request() is not request:
            _serving.set(_Serving(request, options))
        elif not any(each is options for each in serving.options):
            serving.options.append(options)
    except Exception:
        _complain("following a request's calls")


def _own_frames() -> Set[int]:
    task = asyncio.current_task()
    return running_frames(None if task is None else task.get_coro())


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
        caller = _Caller()
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
            serving.add(made_with)
            return
        caller = _calling_task()
        if caller is None:
            return
        look = caller.calls.add(made_with)
        if look:
            caller.note_errors()
        if caller.exceptions:
            caller.call_ended()
        if look:
            caller.calls.forget_dead()
    except Exception:
        _complain("noting a call")


def note_failed_call(exc: BaseException) -> None:
    """Remember the exception of an outgoing call; nothing about it changes yet."""
    if type(exc) is GeneratorExit:
        return
    try:
        serving = _serving.get()
        request = None if serving is None or serving.over else serving.request()
        followed = None if request is None else _follow(request, None)
        if followed is not None:
            followed.note_call(exc)
            return
        # Outside of any, or nobody knows any more which task handles it.
        caller = _calling_task()
        if caller is not None:
            caller.note_errors()
            caller.note(exc)
            caller.call_ended()
    except Exception:
        _complain("noting a failed call")


def _take_part(followed: _Request, serving: _Serving) -> None:
    if serving not in followed.calls:
        followed.calls.append(serving)
    for options in serving.options:
        if not any(each is options for each in followed.options):
            followed.options.append(options)


def _connection_of(request: web.BaseRequest) -> Optional[_Connection]:
    found = _connections.get(id(request.task))
    return None if found is None else found()


def follow_connection(task: Any) -> None:
    """Follow a connection to the end of its task, if it is not followed yet."""
    if id(task) in _connections or not isinstance(task, asyncio.Task):
        return  # a mocked request has no task
    key = id(task)
    connection = _Connection(internals.connection_frame(task))
    # The callback is given the reference, which is then the default of pop().
    _connections[key] = ref(connection, partial(_connections.pop, key))
    task.add_done_callback(connection.done)


def note_parser_error(task: Any, exc: BaseException) -> None:
    """Remember an exception that made a connection end without any request."""
    try:
        found = _connections.get(id(task))
        connection = None if found is None else found()
        if connection is not None:
            connection.errors.append(exc)
    except Exception:
        _complain("noting a parser's error")


def _follow(request: web.BaseRequest, options: Optional[Options]) -> Optional[_Request]:
    followed: Optional[_Request] = request.__dict__.get(_FOLLOWED)
    if followed is None:
        task = internals.request_task(request)
        if task is None:
            return None
        follow_connection(request.task)
        connection = _connection_of(request)
        followed = request.__dict__[_FOLLOWED] = _Request(request, connection)
        task.add_done_callback(followed.done)
    if options is not None and not any(each is options for each in followed.options):
        followed.options.append(options)
    if _calls_are_followed:
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
        if id(request.task) not in _connections:
            follow_connection(request.task)
        if not internals.keeps_nothing(request):
            _follow(request, options)
        # isinstance() is asked last: the class is abstract, which makes it slow.
        if type(response) is not web.Response:
            error: Any = response  # an HTTPException that was caught and returned
            if isinstance(response, web.WebSocketResponse):
                _follow(request, options)
                error = response.exception()
            if isinstance(error, BaseException):
                note(request, error, options)
        if _calls_are_followed:
            _look_at_calls(request, options)
    except Exception:
        _complain("looking at a request")


def _look_at_calls(request: web.Request, options: Options) -> None:
    serving = _calls_of(request)
    if serving is None:
        return
    for error in serving.errors():
        note(request, error, options)
    if _FOLLOWED not in request.__dict__:
        serving.over = True  # nothing looks at the request's end


def _somebody_has(exc: BaseException) -> bool:
    return any(holder() is not None for holder in _in_hand.get(id(exc), ()))


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
