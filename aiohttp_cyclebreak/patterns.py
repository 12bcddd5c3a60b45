"""Which leak is a chain of references, and what stops it?"""

import asyncio
from types import FrameType
from typing import Any, Iterator, Optional, Set, Tuple

from aiohttp import web

from .counts import type_name
from .exceptions import is_instance
from .leaks import CATALOGUE, Remedy
from .naming import is_of, is_resumable

__all__ = ("advise", "marks_of", "recognise")

_FRAME, _TASK = "a frame of the application", "a task"
_ERROR, _HTTP_ERROR = "an error", "an error that is a response"
_LOW_LEVEL = "aiohttp.web_request.BaseRequest"

# The first whose marks are all there is what a chain is; the catalogue's other leaks
# come down to one of these.
_PATTERNS: Tuple[Tuple[str, str, Tuple[str, ...]], ...] = (
    ("permanent", "late-read", ("aiohttp.web_protocol.PayloadAccessError",)),
    (
        "permanent",
        "cve-2024-52303",
        ("functools._lru_cache_wrapper", "aiohttp.web_urldispatcher.SystemRoute"),
    ),
    ("permanent", "gateway/released", ("global '_CONNECTION_CLOSED_EXCEPTION'",)),
    ("permanent", "singleton", (_ERROR, "traceback")),
    ("live", "idle-body", ("RequestHandler.start", "local variable 'request'")),
    *(
        ("delayed", "gateway", (mark, _ERROR))
        for mark in (
            "aiohttp.client_proto.ResponseHandler",
            "aiohttp.client_reqrep.ClientResponse",
            "aiohttp.client:_request",
            "aiohttp.connector:_wrap_create_connection",
            "aiohttp.connector:_create_direct_connection",
            "aiohappyeyeballs.impl:start_connection",
        )
    ),
    ("delayed", "websocket", ("aiohttp.web_ws.WebSocketResponse",)),
    ("delayed", "late-read", ("aiohttp.web_protocol.PayloadAccessError",)),
    ("delayed", "payload", ("aiohttp.streams.StreamReader", _ERROR, "traceback")),
    (
        "delayed",
        "started",
        ("aiohttp.web_protocol:start", "local variable 'task'", _ERROR),
    ),
    # Before CPython 3.11 the task holds the traceback of its cancellation alone.
    ("delayed", "close-cancel", ("aiohttp.web_protocol:start", _TASK, "traceback")),
    ("delayed", "no-route", ("aiohttp.web_urldispatcher.MatchInfoError",)),
    ("delayed", "no-route", ("aiohttp.web_urldispatcher.SystemRoute",)),
    ("delayed", "stash", ("attribute '_state'", _ERROR, "traceback")),
    (
        "delayed",
        "http-exception",
        ("aiohttp.web_protocol:_handle_request", "local variable 'resp'", _HTTP_ERROR),
    ),
    (
        "delayed",
        "client-gone",
        ("aiohttp.base_protocol:_drain_helper", _ERROR, "traceback"),
    ),
    ("delayed", "kept-local", (_FRAME, "traceback")),
)


def marks_of(each: Any) -> Iterator[str]:
    """What a chain is told by: modules and functions of frames, types, attributes."""
    kind = type(each)
    yield type_name(kind)
    if kind is FrameType:
        module = dict.get(each.f_globals, "__name__")
        yield f"{module}:{each.f_code.co_name}"
        if not is_of(module, ("aiohttp", "asyncio")):
            yield _FRAME
    if is_resumable(each):
        yield str(each.__qualname__)
    if issubclass(kind, asyncio.Task):
        yield _TASK
    if issubclass(kind, BaseException):
        yield _ERROR
    if is_instance(each, web.HTTPException):
        yield _HTTP_ERROR


def recognise(kind: str, marks: Set[str]) -> Optional[str]:
    """The id of the catalogue's leak that a chain is, or what its variants share."""
    for its_kind, leak, needed in _PATTERNS:
        if its_kind == kind and marks.issuperset(needed):
            return leak
    return None


_REMEDIES = {
    Remedy.MIDDLEWARE: (
        "cyclebreak() among the application's middlewares stops this, and setup(app)"
        " also where one of them raises"
    ),
    Remedy.CLIENT: (
        "client_cyclebreak() among the trace_configs of the client session stops this"
    ),
    Remedy.SERVER: "guard_server(runner) stops this",
}
_ADVICE = {
    "delayed": (
        "Cut one of these references once the request is answered: del the variable, "
        "or clear the attribute."
    ),
    "live": (
        "It is let go when what the first line names ends; if that is too late, give "
        "it only what it needs of the request."
    ),
    "permanent": (
        "Remove it from what the first lines name once the request is answered, or "
        "keep only what you need of it."
    ),
    "unknown": "Look again with a larger budget, and without gc.freeze().",
}


# A chain does not tell whether the exception left the handler.
_SWALLOWED = (
    "No middleware sees what a handler swallows: have it store the exception in the "
    "request, or raise another one from it."
)


def advise(kind: str, leak: Optional[str], marks: Set[str]) -> str:
    """What to do about a chain."""
    for each in CATALOGUE:
        if f"{each.id}/".startswith(f"{leak}/"):
            remedy = each.remedy
            if remedy is Remedy.MIDDLEWARE and _LOW_LEVEL in marks:
                remedy = Remedy.SERVER  # a web.Server has no application
            advice = f"{_REMEDIES[remedy]}; {leak} of the catalogue: {each.title}."
            if leak == "kept-local":
                advice = f"{advice} {_SWALLOWED}"
            return f"{advice} {each.upstream}".rstrip()
    if kind == "delayed" and {_ERROR, "traceback"} & marks:
        return (
            f"{_ADVICE[kind]} cyclebreak() does it for exceptions that leave a handler."
        )
    return _ADVICE[kind]
