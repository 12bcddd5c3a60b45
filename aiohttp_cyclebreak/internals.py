"""Where does aiohttp keep back-references? Every private attribute that is touched.

Nothing else in the package touches a private attribute of aiohttp or asyncio.
Each function says which versions of aiohttp have what it touches, and does
nothing where that is missing.
"""

import asyncio
import contextlib
import gc
import itertools
import re
import sys
from collections import deque
from contextvars import Context
from functools import partial
from types import CodeType, FrameType, FunctionType, MethodType
from typing import Any, Callable, Deque, Iterator, List, Optional, Tuple, Type, cast
from weakref import WeakMethod, WeakValueDictionary, ref

import aiohttp
from aiohttp import client_reqrep, hdrs, web, web_app, web_protocol
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_urldispatcher import SystemRoute

from .exceptions import frames_of, is_exception, is_instance, traceback_of
from .options import Options
from .running import wrapped_coroutine

__all__ = (
    "CLOSES_LOST",
    "HANDLE_REQUEST",
    "KEEPS_FIRST_ATTEMPTS",
    "RELEASED_HAVE_ONE_ERROR",
    "all_tasks",
    "body_size",
    "cancellation_of",
    "connection_coroutine",
    "connection_holds",
    "connection_of_plain",
    "connection_of_response",
    "connection_of_upload",
    "connection_task",
    "context_of",
    "error_beside",
    "error_of",
    "error_of_call",
    "error_of_last_attempt",
    "error_of_websocket",
    "follow_websockets",
    "forget_missing_route",
    "functions_among_middlewares",
    "guard_connections",
    "guard_options",
    "has_gone_on",
    "has_middlewares",
    "has_read_body",
    "has_request",
    "is_awaited",
    "is_being_answered",
    "is_of_sending",
    "is_outermost",
    "is_request",
    "is_same",
    "is_websocket_of",
    "keeps_nothing",
    "kept_exceptions",
    "lacks",
    "make_innermost",
    "missing_route",
    "options_of_server",
    "original_of",
    "outcome_of",
    "own_task",
    "refuse_as_middleware",
    "release_body",
    "release_payload",
    "release_read_body",
    "release_websocket",
    "request_task",
    "response_of",
    "resume_reading",
    "route_of",
    "subapps",
    "take_off",
    "upload_of",
)


_VERSION = tuple(int(part) for part in re.findall(r"\d+", aiohttp.__version__)[:3])

# The code of a request's task.  Its frame is the outermost in the traceback of what
# came out of all middlewares; its local ``resp`` is what was raised as the response.
# aiohttp: 3.8 to 3.14.
HANDLE_REQUEST: Optional[CodeType] = getattr(
    getattr(web_protocol.RequestHandler, "_handle_request", None), "__code__", None
)

# Whether aiohttp closes a transport that was lost.  From CPython 3.12 on that ends a
# cycle of the transport's own, which a reset leaves.
CLOSES_LOST = _VERSION >= (3, 10, 6)

# The code of a connection's task.
_START: Optional[CodeType] = getattr(
    getattr(web_protocol.RequestHandler, "start", None), "__code__", None
)


def request_task(request: web.BaseRequest) -> "Optional[asyncio.Task[Any]]":
    """The task that aiohttp made for this request.

    That is mostly the current one.  Below :func:`asyncio.shield` or
    :func:`asyncio.wait_for` (before Python 3.12) it is not; then it is the one
    that the connection's task waits for.

    aiohttp: ``RequestHandler._handle_request`` and ``._current_request``,
    ``BaseRequest._payload_writer``, 3.8 to 3.14.
    asyncio: ``Task._fut_waiter``, 3.8 to 3.14.

    Returns:
        The task, or None when the request is not being served (a mocked one).
    """
    connection = request.task
    try:
        current = asyncio.current_task()
        running = asyncio.get_running_loop() if current is None else current.get_loop()
    except RuntimeError:
        return None  # the coroutine is thrown away
    loop_of = getattr(connection, "get_loop", None)
    if loop_of is None or loop_of() is not running:
        return None  # as above, while another loop happens to run
    waiting_for = getattr(connection, "_fut_waiter", None)
    if current is not None:
        if waiting_for is current:  # also if a task factory has wrapped its coroutine
            return current
        coroutine = current.get_coro() if hasattr(current, "get_coro") else None
        if getattr(coroutine, "cr_code", None) is HANDLE_REQUEST:
            return current
        # Another request may run this one's handler, and its coroutine be wrapped too.
        outermost = connection.get_coro() if hasattr(connection, "get_coro") else None
        is_wrapped = getattr(outermost, "cr_code", None) is not _START
        if is_wrapped and coroutine is not None and _is_called_by(HANDLE_REQUEST):
            return current
    # In a task of the application's own: aiohttp must still be at this request.
    if not _is_current(request):
        return None
    return waiting_for if isinstance(waiting_for, asyncio.Task) else None


def is_request(value: object) -> bool:
    """Whether a value is a request of aiohttp's.

    An application may give its handlers an object of its own in place of it.
    """
    return is_instance(value, web.BaseRequest)


def _is_called_by(code: Optional[CodeType]) -> bool:
    """Whether the step of the current task goes through a function.

    asyncio: ``Handle._run``, which runs that, and ``BaseEventLoop.create_task``, for
    one that is started eagerly, 3.8 to 3.14; uvloop has no frames for them.
    """
    functions = (asyncio.Handle._run, asyncio.BaseEventLoop.create_task)
    ends = [getattr(each, "__code__", None) for each in functions]  # or it is patched
    frame: Optional[FrameType] = sys._getframe()
    while frame is not None and frame.f_code not in ends:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False


def own_task(request: Any) -> "Optional[asyncio.Task[Any]]":
    """The current task, if it is the one that aiohttp has made for a request.

    Inside of :func:`asyncio.shield` or :func:`asyncio.wait_for` (before Python 3.12) it
    is another one, which outer middlewares may not wait for to its end; and a request
    may run another one's handler.

    aiohttp: as :func:`request_task`, and ``BaseRequest._task``, 3.8 to 3.14.
    asyncio: ``Task._fut_waiter``, 3.8 to 3.14; of a connection that is running, since
    the task was started eagerly, it is None.
    """
    try:
        current: Any = asyncio.current_task()
        waiting_for = getattr(request._task, "_fut_waiter", None)
        if waiting_for is current or (
            waiting_for is None and current.get_coro().cr_code is HANDLE_REQUEST
        ):
            return current  # type: ignore[no-any-return]
    except Exception:  # there is none, or it is of any class
        pass
    return None


def is_awaited(request: web.BaseRequest, task: "asyncio.Future[Any]") -> bool:
    """Whether the connection's task has yet to learn that a request's is done.

    aiohttp: ``BaseRequest._task``, which is None from 3.11.14 on once it has learned.
    asyncio: ``Task._fut_waiter``, 3.8 to 3.14.  Without it the answer is yes.
    """
    connection: Any = request.task
    return connection is not None and getattr(connection, "_fut_waiter", task) is task


def response_of(task: "asyncio.Future[Any]") -> Any:
    """The response that a request's task, which is done, was for: an exception perhaps.

    aiohttp: what ``RequestHandler._handle_request`` returns, 3.8 to 3.14.
    """
    if task.cancelled() or task.exception() is not None:
        return None
    return task.result()[0]


def outcome_of(task: "asyncio.Future[Any]") -> Any:
    """The exception or the result of a task that is done.

    asyncio: ``Future._exception`` and ``._result``, 3.8 to 3.14; asking for them in
    public would tell asyncio that an exception was seen.
    """
    error = getattr(task, "_exception", None)
    return getattr(task, "_result", None) if error is None else error


def context_of(task: "asyncio.Future[Any]") -> Optional[Context]:
    """The context that a task runs in: that itself, where others get a copy.

    asyncio: ``Task.get_context()`` from CPython 3.12 on.  Before, what a task in C
    holds, ahead of its callbacks' contexts, or ``Task._context`` of one in Python.

    Returns:
        The context; None, which asyncio takes for a copy of the current one: it is not
        known.
    """
    get_context = getattr(task, "get_context", None)
    if get_context is not None:
        return get_context()  # type: ignore[no-any-return]
    for each in gc.get_referents(task):
        if type(each) is Context:
            return each
    return getattr(task, "_context", None)


def error_of(task: "asyncio.Future[Any]") -> Optional[BaseException]:
    """The exception of a task that is done, if it has one and was not cancelled.

    asyncio: as for :func:`outcome_of`.
    """
    error: Optional[BaseException] = getattr(task, "_exception", None)
    return error


def cancellation_of(task: "asyncio.Future[Any]") -> Optional[BaseException]:
    """The exception with which a task was cancelled, if it keeps one.

    asyncio: what a task holds, on CPython 3.9 to 3.13; asking for it in public would
    take it from whoever awaits the task.  On 3.9 and 3.10 it leads on to another one,
    of the task that this one waited for.
    """
    for each in gc.get_referents(task):
        if isinstance(each, asyncio.CancelledError):
            return each
    return None


# Frames of what task factories have put around the coroutines of both tasks.
_MOST_WRAPPERS = 7


def is_of_sending(frames: Iterator[FrameType]) -> bool:
    """Whether the frames of a connection's exception are those of sending a response.

    aiohttp: ``RequestHandler._handle_request``, which calls ``.finish_response``, below
    ``.start``, 3.8 to 3.14.  Without one of them the answer is no.
    """
    codes = [frame.f_code for frame in itertools.islice(frames, _MOST_WRAPPERS + 3)]
    finish = getattr(web_protocol.RequestHandler, "finish_response", None)
    sending: Any = (HANDLE_REQUEST, getattr(finish, "__code__", None))
    return sending in zip(codes, codes[1:])


def is_websocket_of(request: web.BaseRequest, value: object) -> bool:
    """Whether a value is this request's websocket, and not that of another one.

    A handler that broadcasts has those of others among its locals.

    aiohttp: ``StreamResponse._req`` and ``BaseRequest._payload_writer``, which a clone
    of the request shares, 3.8 to 3.14.
    """
    if not is_instance(value, web.WebSocketResponse):
        return False
    own = getattr(value, "_req", None)
    return own is not None and own._payload_writer is request._payload_writer


class _PastRequest:
    """What a response's public attributes, and a websocket's close(), ask of a request.

    aiohttp: ``StreamResponse.__repr__`` and ``.task``, 3.8 to 3.14; what
    ``WebSocketResponse`` does to its transport, 3.8 to 3.14, and with
    ``RequestHandler._timeout_ceil_threshold``, 3.9 to 3.14.
    """

    __slots__ = ("method", "path", "task", "_protocol")

    _payload_writer = writer = None

    def __init__(self, request: web.BaseRequest) -> None:
        self.method = request.method
        self.path = request.path
        self.task = None if _FORGETS_TASK else request.task
        self._protocol = request.protocol

    @property
    def transport(self) -> Optional[asyncio.Transport]:
        return self._protocol.transport


# A request forgets its connection's task when it is over.
_FORGETS_TASK = _VERSION >= (3, 11, 14)


def release_websocket(
    request: web.BaseRequest, response: Optional[web.StreamResponse]
) -> None:
    """Cut a finished websocket off from its request, its timers and the connection.

    One whose handler raised is not closed yet: the next ping of its heartbeat fails,
    closes it, and ends the connection if that is still open, as it is after an
    :exc:`aiohttp.web.HTTPException`.

    aiohttp: ``StreamResponse._req``, 3.8 to 3.14; the timers of the heartbeat, 3.8
    to 3.14, some of which a dead peer leaves behind; and
    ``RequestHandler._data_received_cb``, 3.14.
    """
    if response is None or not is_websocket_of(request, response):
        return
    websocket = cast(web.WebSocketResponse, response)
    own: Any = response._req
    transport = own.transport
    if websocket.closed:
        for name in ("_heartbeat_cb", "_pong_response_cb"):
            timer = getattr(websocket, name, None)
            if isinstance(timer, asyncio.Handle):
                timer.cancel()
                setattr(websocket, name, None)
    heard: Any = getattr(own.protocol, "_data_received_cb", None)
    if heard is not None:
        if websocket.closed or transport is None or transport.is_closing():
            own.protocol._data_received_cb = None
        elif isinstance(heard, MethodType) and heard.__self__ is websocket:
            # It leads to the protocol, which keeps this when the connection has ended.
            # Until then the event loop has the websocket, by a timer of the heartbeat.
            own.protocol._data_received_cb = partial(_call_weakly, WeakMethod(heard))
    response._req = cast(web.BaseRequest, _PastRequest(own))


def _call_weakly(method: "WeakMethod[Callable[[], None]]") -> None:
    function = method()
    if function is not None:
        function()


def connection_task(request: Any) -> Any:
    """The task of a request's connection; None: it has none, or is none of aiohttp's.

    aiohttp: ``BaseRequest._task``, 3.8 to 3.14.  Without it the property is asked.
    """
    try:
        return request._task
    except Exception:
        return request.task if is_request(request) else None


def connection_coroutine(task: "asyncio.Task[Any]") -> Any:
    """The coroutine of a connection, which lives for as long as its task.

    A task factory, such as Sentry's, may put another one around it.

    aiohttp: ``RequestHandler.start``, 3.8 to 3.14; its locals keep the last
    request, response and task, and before 3.11.14 the connection's own task.
    """
    return wrapped_coroutine(task.get_coro(), _START)


_PAYLOAD_ACCESS_ERROR: Optional[BaseException] = getattr(
    web_protocol, "_PAYLOAD_ACCESS_ERROR", None
)


# Bound once: these are looked up for every request.
_MatchInfo = web.UrlMappingMatchInfo
_Response = web.Response
_UPGRADE = hdrs.UPGRADE


def keeps_nothing(request: Any) -> bool:
    """Whether a request has no body, nothing stored, and a route.

    aiohttp: ``BaseRequest._payload`` and ``._state``, ``Request._match_info``, 3.8
    to 3.14.  Without them the answer is no.
    """
    try:
        return (
            request._payload is EMPTY_PAYLOAD
            and not request._state
            and type(request._match_info) is _MatchInfo
        )
    except AttributeError:
        return False


def connection_of_response(request: Any) -> "Optional[asyncio.Task[Any]]":
    """The connection's task, if an HTTPException can be the response of a request.

    That is one which keeps nothing, asks for no websocket, and is the one that is being
    handled, no clone of it.

    aiohttp: as :func:`keeps_nothing`, ``BaseRequest._headers``, ``._protocol`` and
    ``._task``, and ``RequestHandler._current_request``, 3.8 to 3.14.

    Returns:
        The task; None when there is more to look at.
    """
    try:
        if (
            request._payload is EMPTY_PAYLOAD
            and not request._state
            and type(request._match_info) is _MatchInfo
            and request._protocol._current_request is request
            and _UPGRADE not in request._headers
        ):
            return request._task  # type: ignore[no-any-return]
    except Exception:  # an application may pass on an object of its own as a request
        pass
    return None


def connection_of_upload(request: Any) -> "Optional[asyncio.Task[Any]]":
    """As :func:`connection_of_response`, of a request that has a body.

    aiohttp: as there, from 3.10.6 on: before, each body has an exception of its own
    in the end (see :func:`release_payload`).

    Returns:
        The task; None when there is no body, or more to look at.
    """
    try:
        if (
            request._payload is not EMPTY_PAYLOAD
            and _PAYLOAD_ACCESS_ERROR is not None
            and not request._state
            and type(request._match_info) is _MatchInfo
            and request._protocol._current_request is request
            and _UPGRADE not in request._headers
        ):
            return request._task  # type: ignore[no-any-return]
    except Exception:  # as above
        pass
    return None


def is_outermost(request: Any, middleware: Callable[..., Any]) -> bool:
    """Whether a middleware is the outermost of all that a request goes through.

    aiohttp: ``Request._match_info``, ``UrlMappingMatchInfo._apps`` and
    ``Application._middlewares``, 3.8 to 3.14.  Without them the answer is no.
    """
    try:
        return request._match_info._apps[0]._middlewares[0] is middleware
    except Exception:  # as above
        return False


def is_same(request: Any, other: Any) -> bool:
    """Whether two requests are one, or one is a clone of the other.

    aiohttp: ``BaseRequest._payload_writer``, 3.8 to 3.14, which clones share.
    """
    return request.writer is other.writer


def _is_current(request: web.BaseRequest) -> bool:
    """Whether a request's connection is at this request, and its handler is running.

    aiohttp: ``RequestHandler._current_request``, 3.8 to 3.14.  Without it the answer
    is no.
    """
    current = getattr(request.protocol, "_current_request", None)
    return current is request or (current is not None and is_same(current, request))


def original_of(request: Any) -> web.BaseRequest:
    """The request that aiohttp has made, where this is a clone of it, or this one.

    aiohttp: ``RequestHandler._current_request``, 3.8 to 3.14.  Without it it is taken
    for no clone.
    """
    current: Any = getattr(request.protocol, "_current_request", None)
    is_clone = current is not None and is_same(current, request)
    original: web.BaseRequest = current if is_clone else request
    return original


def has_gone_on(earlier: Any, request: Any) -> bool:
    """Whether a connection is at this request, and done with an earlier one.

    aiohttp: ``RequestHandler._current_request``, 3.8 to 3.14.  Without it the answer
    is no.

    Args:
        earlier: the earlier one.
        request: a request, or a clone of it.
    """
    return _is_current(request) and not is_same(earlier, request)


def is_being_answered(request: Any, task: "Optional[asyncio.Task[Any]]") -> bool:
    """Whether a connection, by its task, waits for the task of this request.

    aiohttp: ``RequestHandler._current_request``, 3.8 to 3.14: the next one is handled,
    or, while a response is sent, none.
    asyncio: ``Task._fut_waiter``, 3.8 to 3.14.
    """
    if not hasattr(getattr(task, "_fut_waiter", None), "get_coro"):
        return False
    current = getattr(request.protocol, "_current_request", None)
    return current is None or is_same(current, request)


def connection_of_plain(
    request: Any, response: object
) -> "Optional[asyncio.Task[Any]]":
    """The connection's task, if a request and its response keep nothing of each other.

    That is so of most: see :func:`keeps_nothing`.  It is written out here, since this
    runs for every request that succeeds.

    aiohttp: as there, and ``BaseRequest._task``, 3.8 to 3.14.

    Returns:
        The task; None when there is more to look at.
    """
    try:
        if (
            type(response) is _Response
            and request._payload is EMPTY_PAYLOAD
            and not request._state
            and type(request._match_info) is _MatchInfo
        ):
            return request._task  # type: ignore[no-any-return]
    except Exception:  # as in connection_of_response()
        pass
    return None


def kept_exceptions(request: web.BaseRequest) -> List[BaseException]:
    """The exceptions that a request holds itself: of its body, and stored.

    aiohttp: ``BaseRequest._payload`` and ``._state``, 3.8 to 3.14.
    """
    kept: List[BaseException] = []
    payload = getattr(request, "_payload", EMPTY_PAYLOAD)
    if payload is not EMPTY_PAYLOAD:
        error: Any = payload.exception()
        # It may be a class, and one for all requests is none of this one's.
        if is_exception(error) and error is not _PAYLOAD_ACCESS_ERROR:
            kept.append(error)
    state = getattr(request, "_state", None)
    if state:
        kept += filter(is_exception, state.values())
    return kept


def release_payload(
    payload: aiohttp.StreamReader, late: Type[web.PayloadAccessError]
) -> bool:
    """Let a body that is read too late raise an error of the reader's own.

    After the response aiohttp arms the payload with a ``PayloadAccessError``.
    From 3.10.6 on that is one instance for the whole process
    (``web_protocol._PAYLOAD_ACCESS_ERROR``): its traceback gathers the frames of
    all who read too late, for good.  Before, it is one a request, which holds
    the request in a reference cycle.  A stream reader raises a fresh instance
    when it is armed with the class.

    aiohttp: 3.8 to 3.14.

    Args:
        payload: the body.
        late: that error's class.

    Returns:
        Whether the payload is armed, so that nothing is left to do.
    """
    error = payload.exception()
    if isinstance(error, web.PayloadAccessError):
        payload.set_exception(late)  # type: ignore[arg-type]
        return True
    return error is not None


def release_body(request: web.BaseRequest, error: Type[BaseException]) -> None:
    """Let go of what a request has of its body, once aiohttp has done with it.

    aiohttp: as :func:`release_read_body`, and ``StreamReader._buffer``, 3.8 to 3.14.

    Args:
        request: the request.
        error: what whoever reads the body then is told, by a class so that each
            reader gets an instance of its own.
    """
    request.content.set_exception(error)  # type: ignore[arg-type]
    if hasattr(request.content, "_buffer"):
        request.content._buffer = deque()
    release_read_body(request)


# From 3.11.11 on a body that has come whole lets its connection read on (#10169).
_STAYS_PAUSED = _VERSION < (3, 11, 11)


def resume_reading(request: web.BaseRequest) -> None:
    """Let a connection read on that was paused for a body which has come whole.

    Unless somebody reads that, it would neither read the next request nor see that its
    client has gone, until it has been idle for aiohttp's ``keepalive_timeout``.

    aiohttp: ``BaseProtocol.resume_reading()``, 3.8 to 3.11.10.
    """
    if _STAYS_PAUSED and request.content.is_eof():
        request.protocol.resume_reading()


def has_read_body(request: web.BaseRequest) -> bool:
    """Whether a request has the body that was read, or what was parsed from it.

    aiohttp: as :func:`release_read_body`.
    """
    return (
        getattr(request, "_read_bytes", None) is not None
        or getattr(request, "_post", None) is not None
    )


def release_read_body(request: web.BaseRequest) -> None:
    """Let go of the body that was read, and of what was parsed from it.

    aiohttp: ``BaseRequest._read_bytes`` and ``._post``, 3.8 to 3.14.
    """
    for name in ("_read_bytes", "_post"):
        if hasattr(request, name):
            setattr(request, name, None)


def body_size(request: web.BaseRequest) -> int:
    """How many bytes of its body a request still has.

    aiohttp: ``BaseRequest._read_bytes``, ``StreamReader._buffer``, 3.8 to 3.14.
    """
    read = getattr(request, "_read_bytes", None) or b""
    return len(read) + sum(map(len, getattr(request.content, "_buffer", ())))


def has_request(request: web.BaseRequest) -> bool:
    """Whether the connection still has a request: it is served, or was the last one.

    A connection serves one request at a time, and an idle keep-alive connection keeps
    its last one, in a local variable of the coroutine that its task runs.  Another
    variable keeps the last response: that may be an exception, whose traceback leads to
    the request.  The collector is asked, as in :func:`connection_holds`.

    aiohttp: the locals ``request`` and ``resp`` of ``RequestHandler.start``, its
    ``._task_handler``, ``StreamResponse._req`` and ``BaseRequest._payload_writer``,
    which a clone of the request shares, 3.8 to 3.14.
    The request itself knows its connection's task, and from 3.11.14 on only until its
    response is sent.
    """
    task: Any = getattr(request, "_task", None)
    if task is None:
        task = getattr(getattr(request, "_protocol", None), "_task_handler", None)
    if not isinstance(task, asyncio.Task) or task.done():
        return False
    coroutine = connection_coroutine(task)
    for each in gc.get_referents(coroutine, getattr(coroutine, "cr_frame", None)):
        if is_request(each):
            if each._payload_writer is request._payload_writer:
                return True
        elif is_instance(each, web.StreamResponse):
            held = [each._req]
            if is_exception(each):
                held += gc.get_referents(*frames_of(each))
            if any(known is request for known in held):
                return True
    return False


def all_tasks() -> "List[asyncio.Task[Any]]":
    """The tasks of every loop, done or not, as far as asyncio's Python code has them.

    asyncio: ``tasks._all_tasks``, 3.8 to 3.11, and ``tasks._scheduled_tasks``, 3.12
    and 3.13.  Without them, those of the running loop that are not done.
    """
    for name in ("_all_tasks", "_scheduled_tasks"):
        try:
            return list(getattr(asyncio.tasks, name))
        except (AttributeError, RuntimeError):  # another thread makes a task
            continue
    return list(asyncio.all_tasks())


def route_of(request: web.BaseRequest) -> Any:
    """The route of a request, or None where the router failed to find one.

    aiohttp: ``Request._match_info``, 3.8 to 3.14.
    """
    return getattr(getattr(request, "_match_info", None), "route", None)


def connection_holds(coroutine: Any, frame: Optional[FrameType], value: object) -> bool:
    """Whether the coroutine of a connection's task refers to a request or response.

    The collector is asked: reading the locals of a frame that goes on would leave
    references to them in it, before Python 3.13.

    aiohttp: the locals ``request`` and ``resp`` of ``RequestHandler.start``, 3.8 to
    3.14.
    """
    # From CPython 3.11 on the locals are the coroutine's until it is over.
    for each in gc.get_referents(coroutine, frame):  # noqa: SIM110 - as in frames
        if each is value:
            return True
    return False


def missing_route(request: web.BaseRequest) -> Optional[web.HTTPException]:
    """The 404 or 405 of a request for which there is no route.

    aiohttp: ``Request._match_info``, 3.8 to 3.14.  A request of the low-level
    server has none.
    """
    match_info: Any = getattr(request, "_match_info", None)
    error: Optional[web.HTTPException] = getattr(match_info, "http_exception", None)
    return error


def _raising(error: web.HTTPException) -> Callable[..., Any]:
    """A handler that raises an exception, as that of the route for it does.

    Like a bound method, and unlike a partial function, it has a name: a task that
    outlives the response may still ask for it.
    """

    async def _handle(request: web.Request) -> web.StreamResponse:
        raise error

    _handle.__module__ = SystemRoute.__module__
    _handle.__qualname__ = f"{SystemRoute.__qualname__}.{_handle.__name__}"
    return _handle


def forget_missing_route(request: web.BaseRequest) -> None:
    """Open the reference cycle of the route that stands for a 404 or 405.

    ``SystemRoute._handler`` is a method bound to the route itself: 3.8 to 3.14
    (aiohttp pull request #10573).  The route stays usable.

    ``StreamResponse._req`` of the answer, which the route has: 3.8 to 3.14.  One that
    was sent to its end has let go of its request; not so if the client has gone before.

    3.10.6 to 3.10.10 keep every such route in an unbounded ``lru_cache``
    (``web_app._build_middlewares``) once the application has any middleware:
    CVE-2024-52303.  Those before and after cache nothing of the kind.
    """
    route = route_of(request)
    error = missing_route(request)
    if isinstance(route, SystemRoute) and error is not None:
        route._handler = _raising(error)
        own: Any = getattr(error, "_req", None)
        if own is not None and is_same(own, request):
            error._req = cast(web.BaseRequest, _PastRequest(own))  # its repr asks
    if _forget_chains is not None:
        _forget_chains()


def _clearing(cached: str) -> Optional[Callable[[], None]]:
    """What empties the cache of one of aiohttp's functions, if it has one."""
    return getattr(getattr(web_app, cached, None), "cache_clear", None)


_forget_chains = _clearing("_build_middlewares")  # 3.10.6 to 3.10.10
_forget_routed_chains = _clearing("_cached_build_middleware")  # since 3.10.11


def subapps(app: web.Application) -> Iterator[web.Application]:
    """Every application below this one, at any depth.

    aiohttp: ``Application._subapps``, 3.8 to 3.14.
    """
    for subapp in getattr(app, "_subapps", ()):
        yield subapp
        yield from subapps(subapp)


def make_innermost(app: web.Application, middleware: Callable[..., Any]) -> None:
    """Make a middleware the innermost of an application, frozen or not.

    Adding a sub-application freezes its middlewares, long before anything runs.

    aiohttp: ``Application._middlewares_handlers``, 3.8 to 3.14, innermost first, and
    the process's cache of what is made of them, which it fills again:
    ``web_app._build_middlewares`` in 3.10.6 to 3.10.10, ``._cached_build_middleware``
    since 3.10.11.
    """
    middlewares = app.middlewares
    if not middlewares.frozen:
        take_off(app, middleware)
        middlewares.append(middleware)
        return
    handlers: Optional[Tuple[Any, ...]] = getattr(app, "_middlewares_handlers", None)
    if isinstance(handlers, tuple):
        others = tuple(each for each in handlers if each[0] is not middleware)
        app._middlewares_handlers = ((middleware, True), *others)
        # The application may have been served without it.
        for forget in (_forget_chains, _forget_routed_chains):
            if forget is not None:
                forget()


def has_middlewares(app: web.Application, *but: Callable[..., Any]) -> bool:
    """Whether an application or one below it has any middleware but these.

    aiohttp: as :func:`subapps`.
    """
    ours = set(map(id, but))
    return any(
        id(middleware) not in ours
        for each in (app, *subapps(app))
        for middleware in each.middlewares
    )


def take_off(app: web.Application, middleware: Callable[..., Any]) -> None:
    """Take a middleware off an application that is not frozen yet, if it has it.

    Others are any objects, which may compare as they like.
    """
    for index, each in enumerate(app.middlewares):
        if each is middleware:
            del app.middlewares[index]
            return


def functions_among_middlewares(app: web.Application) -> Iterator[Callable[..., Any]]:
    """The middlewares that are functions, as ours are: others may have no hash."""
    return (each for each in app.middlewares if type(each) is FunctionType)


class _NoMiddleware:
    """What says at start-up that a function is no middleware."""

    def __init__(self, message: str) -> None:
        self._message = message

    def __eq__(self, other: object) -> bool:
        raise TypeError(self._message)

    __hash__ = None  # type: ignore[assignment]


def refuse_as_middleware(function: Any, message: str) -> None:
    """Have an application that is given a function as a middleware not start.

    All versions: without this aiohttp takes it for a middleware of the old style, and
    calls it for each request.  When an application is frozen, the version of each
    middleware is compared with 1.

    Args:
        function: what makes middlewares, and is none.
        message: of the :exc:`TypeError` that is raised then.
    """
    function.__middleware_version__ = _NoMiddleware(message)


class _Guarded:
    """What a guarded server and its connections have in common."""

    __slots__ = ()

    guard_options: Options


def guard_options(request: Any) -> Optional[Options]:
    """The options of the guarded server that a request is of.

    Several runners may serve one application.

    Returns:
        The options; None: it is of no guarded server.
    """
    try:
        protocol = request.protocol
        if isinstance(protocol, _Guarded):
            return protocol.guard_options
    except Exception:  # an application may pass on an object of its own as a request
        pass
    return None


def lacks() -> List[str]:
    """What :func:`guard_connections` needs and this aiohttp does not have."""
    handler: Any = web_protocol.RequestHandler
    needed = (
        (web_protocol, "_ErrInfo"),
        (handler, "_messages"),
        (handler, "_request_handler"),
        (handler, "_task_handler"),
    )
    return [
        f"{owner.__name__}.{name}" for owner, name in needed if not hasattr(owner, name)
    ]


def guard_connections(
    server: web.Server,
    options: Options,
    *,
    connected: Callable[[Any], Any],
    refused: Callable[[Any, BaseException], None],
    lost: Callable[[Any, BaseException], None],
    around: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> None:
    """Make a server, and no other, tell of its connections and requests.

    Its class and that of the connections it makes become subclasses of what they
    are: nothing that other servers share is touched.

    aiohttp: ``RequestHandler._task_handler``, ``._messages``, ``._request_handler``
    and ``web_protocol._ErrInfo``, 3.8 to 3.14; see :func:`lacks`.  Without
    ``._current_request``, ``._drain_waiter`` or ``.log_access``, 3.8 to 3.14, some of
    what is lost is not told.
    asyncio: ``Future._exception``, 3.8 to 3.14: who asks for it in public has seen it.

    Args:
        server: the server, before its first connection, and not guarded yet.
        options: what :func:`guard_options` tells of its requests.
        connected: called with the task of each connection.
        refused: called with that task and what was wrong with a request.
        lost: called with a request and what is raised there, or was and aiohttp has
            caught it, since the client has gone while something was sent to it.
        around: makes the handler of a connection's requests from the server's own.
    """
    handler_class: Any = web_protocol.RequestHandler

    class GuardedRequestHandler(handler_class, _Guarded):  # type: ignore[misc]
        __slots__ = ()

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            task = self._task_handler
            connected(task)
            self._messages = _Messages(task, refused)  # type: ignore[misc]

        def connection_lost(self, exc: Optional[BaseException]) -> None:
            # The handler may swallow it.  The connection forgets both below.
            request = getattr(self, "_current_request", None)
            waiter = getattr(self, "_drain_waiter", None)
            super().connection_lost(exc)
            error = getattr(waiter, "_exception", None)
            if request is not None and error is not None:
                lost(request, error)

        def log_access(self, request: Any, *args: Any, **kwargs: Any) -> None:
            # aiohttp catches what is raised while it sends a response, and is in that
            # block now.
            super().log_access(request, *args, **kwargs)
            error = sys.exc_info()[1]
            if issubclass(type(error), ConnectionError):
                lost(request, error)  # type: ignore[arg-type]

    GuardedRequestHandler.guard_options = options
    _name_like(GuardedRequestHandler, handler_class)
    base: Any = type(server)

    class GuardedServer(base, _Guarded):  # type: ignore[misc]
        def __call__(self) -> Any:
            protocol = super().__call__()
            if type(protocol) is handler_class:
                protocol.__class__ = GuardedRequestHandler
                # Of each connection: a server may be given another handler later.
                protocol._request_handler = around(protocol._request_handler)
            return protocol

    GuardedServer.guard_options = options
    _name_like(GuardedServer, base)
    server.__class__ = GuardedServer


def _name_like(cls: type, base: type) -> None:
    """Have a subclass go by the name of its base: asyncio's log lines have it."""
    cls.__module__, cls.__name__ = base.__module__, base.__name__
    cls.__qualname__ = base.__qualname__


def options_of_server(server: web.Server) -> Optional[Options]:
    """What :func:`guard_connections` was given for a server; None: nothing yet."""
    return server.guard_options if isinstance(server, _Guarded) else None


class _Messages(Deque[Any]):
    """A connection's queue of requests, which tells of those that are malformed.

    Not all are found where the data comes in, nor does the connection come to all.

    aiohttp: ``web_protocol._ErrInfo``, 3.8 to 3.14.
    """

    __slots__ = ("_refused", "_task")

    def __init__(
        self, task: Any, refused: Callable[[Any, BaseException], None]
    ) -> None:
        super().__init__()
        # Weakly: in the end neither the connection nor, from 3.11.14 on, a request has
        # the task, which may lead to a request by what cancelled it, and that leads
        # here.
        self._task = ref(task)
        self._refused = refused

    def append(self, message: Any) -> None:
        super().append(message)
        if isinstance(message[0], web_protocol._ErrInfo):
            task = self._task()
            self._refused(task, message[0].exc)
            if task is not None:
                # A connection that ends before it comes to this would keep it, and its
                # context may be what an earlier request has raised as its response.
                task.add_done_callback(self.forget, context=Context())

    def forget(self, task: Any) -> None:
        self.clear()


def error_of_call(holder: Any) -> Optional[BaseException]:
    """The exception that an object of aiohttp's client keeps.

    aiohttp: ``exception()`` of the client's protocol, of ``ClientResponse.content``,
    of a ``ClientWebSocketResponse`` and of its ``._reader``, 3.8 to 3.14.

    Args:
        holder: a response, a websocket or the protocol of a connection.
    """
    content = getattr(holder, "content", None)  # None until the headers have come
    return _first_error((holder, content, getattr(holder, "_reader", None)))


def upload_of(
    response: aiohttp.ClientResponse,
) -> "Optional[Tuple[asyncio.Task[None], Any]]":
    """The task that still sends the body of a call which is answered already, if any.

    If it fails, nobody is told: the connection's protocol has the exception, on some
    releases only until it is closed.

    aiohttp: ``ClientResponse._writer``, 3.8 to 3.14.

    Returns:
        The task and the protocol.
    """
    writer = getattr(response, "_writer", None)
    if not isinstance(writer, asyncio.Task) or writer.done():
        return None
    connection = getattr(response, "connection", None)
    protocol = getattr(connection, "protocol", None)
    return None if protocol is None else (writer, protocol)


def error_beside(exc: BaseException) -> Optional[BaseException]:
    """What the connection of a call has that has failed without an answer.

    If the upload has failed at the same time, that is another exception than the one
    that is raised, and nobody is told of it.

    aiohttp: the local ``self`` of ``ClientResponse.start``, which is in the traceback,
    and its ``_protocol``, 3.8 to 3.14.
    """
    for frame in frames_of(exc):
        # Not by its code, as in error_of_last_attempt().
        if (
            frame.f_code.co_name == "start"
            and frame.f_globals is client_reqrep.__dict__
        ):
            for each in gc.get_referents(frame):
                if isinstance(each, aiohttp.ClientResponse):
                    return error_of_call(getattr(each, "_protocol", None))
    return None


# One for all responses that are released; up to 3.10.8 each has one of its own.
_RELEASED: Optional[BaseException] = getattr(
    client_reqrep, "_CONNECTION_CLOSED_EXCEPTION", None
)
RELEASED_HAVE_ONE_ERROR = _RELEASED is not None


def error_of_released() -> Optional[BaseException]:
    """What reading a response raises that was released, once that was tried.

    It is in aiohttp's module, and its traceback, with each request that has tried, for
    as long as the process runs.

    aiohttp: ``client_reqrep._CONNECTION_CLOSED_EXCEPTION``, 3.10.9 to 3.14 (#9405).
    """
    if _RELEASED is None or traceback_of(_RELEASED) is None:
        return None
    return _RELEASED


def error_of_websocket(websocket: web.WebSocketResponse) -> Optional[BaseException]:
    """The exception of a websocket of the server's, or of what it has not read.

    A client may break the protocol although the handler only sends.

    aiohttp: ``exception()``, and ``WebSocketResponse._reader``, 3.8 to 3.14.
    """
    return _first_error((websocket, getattr(websocket, "_reader", None)))


def _first_error(holders: Tuple[Any, ...]) -> Optional[BaseException]:
    for each in holders:
        exception = getattr(each, "exception", None)
        error: Any = None if exception is None else exception()
        if error is not None and is_exception(error):  # most often there is none
            return error  # type: ignore[no-any-return]
    return None


# A call that is tried again on another connection tells its tracing nothing of the
# first attempt, whose exception the connection's protocol keeps.  Before these releases
# no call is tried again, and after them nothing is kept.
KEEPS_FIRST_ATTEMPTS = (3, 10) <= _VERSION < (3, 11, 14)


def error_of_last_attempt() -> Optional[BaseException]:
    """The exception of the attempt before, of the call that this is called below.

    Nothing but a local variable leads to it while a call is tried again.

    aiohttp: the local ``resp`` of ``ClientSession._request``, 3.8 to 3.11, which from
    3.12 on is one of a function inside of that; and ``ClientResponse._protocol``, 3.8
    to 3.14.  It is asked for where :data:`KEEPS_FIRST_ATTEMPTS` says so.
    """
    frame: Optional[FrameType] = sys._getframe()
    while frame is not None:
        # Not by its code: tools replace the method by one that calls it.
        if (
            frame.f_code.co_name == "_request"
            and frame.f_globals is aiohttp.client.__dict__
        ):
            values = frame.f_locals
            response = values.get("resp")
            if sys.version_info < (3, 13):
                values.clear()  # the frame would keep this copy of them
            return error_of_call(getattr(response, "_protocol", None))
        frame = frame.f_back
    return None


def follow_websockets(
    session: aiohttp.ClientSession, opened: Callable[[Any], None]
) -> None:
    """Make a client session, and no other, tell of each websocket that it opens.

    It is made after the last event of its tracing.

    aiohttp: ``ClientSession._ws_response_class``, 3.8 to 3.14; without it nothing
    is told.

    Args:
        session: the session, before the websocket is made.
        opened: called with each websocket.
    """
    base: Any = getattr(session, "_ws_response_class", None)
    if isinstance(base, type) and not issubclass(base, _Follows):
        # A session of the application's may refuse, and its calls succeed all the same.
        with contextlib.suppress(Exception):
            session._ws_response_class = _following(base, opened)


class _Follows:
    __slots__ = ()


# One class for all sessions: making one takes longer than the call does.  By id, and
# weakly: a metaclass may refuse to be hashed, and a class of one session goes with it.
_made: "WeakValueDictionary[int, Any]" = WeakValueDictionary()
_lasting: List[Any] = []  # that of aiohttp's own class


def _following(base: Any, opened: Callable[[Any], None]) -> Any:
    cls = _made.get(id(base))
    if cls is not None:
        return cls
    try:

        class Following(base, _Follows):  # type: ignore[misc]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                opened(self)

        cls = Following
        _name_like(cls, base)
    except Exception:  # it is final, or its metaclass wants to know more
        return base
    _made[id(base)] = cls
    if base is aiohttp.ClientWebSocketResponse:
        _lasting.append(cls)
    return cls
