"""The application keeps the exception itself."""

import asyncio
from typing import Any, Set

from aiohttp import web

from ._leak import Affected, Kind, Leak, Step, get

# aiohttp 3.14 wants keys of its own kind.
_ERROR: Any = (
    web.RequestKey("error", Exception) if hasattr(web, "RequestKey") else "error"
)


def _fail() -> None:
    raise ValueError("kept")


async def _stash(request: web.Request) -> web.Response:
    try:
        _fail()
    except ValueError as exc:
        request[_ERROR] = exc
        raise
    return web.Response()


async def _stash_and_answer(request: web.Request) -> web.Response:
    try:
        _fail()
    except ValueError as exc:
        request[_ERROR] = exc
    return web.Response(text="ok")


async def _raise(request: web.Request) -> web.Response:
    _fail()
    return web.Response()


async def _keep_another(request: web.Request) -> web.Response:
    error = None
    try:
        _fail()
    except ValueError as exc:
        error = exc
    raise web.HTTPBadRequest(text=str(error))


async def _keep_traceback(request: web.Request) -> web.Response:
    try:
        raise web.HTTPBadRequest
    except web.HTTPBadRequest as exc:
        traceback = exc.__traceback__  # noqa: F841
        raise


async def _return(request: web.Request) -> web.StreamResponse:
    try:
        raise web.HTTPBadRequest
    except web.HTTPBadRequest as exc:
        response = exc
    return response


@web.middleware
async def _keep(request: web.Request, handler: Any) -> web.StreamResponse:
    error = None
    try:
        response: web.StreamResponse = await handler(request)
    except ValueError as exc:
        error = exc
    if error is not None:
        return web.json_response({"error": str(error)}, status=500)
    return response


_SINGLETON = LookupError("one instance for all requests")


async def _raise_singleton(request: web.Request) -> web.Response:
    raise _SINGLETON


async def _translate_singleton(request: web.Request) -> web.Response:
    try:
        raise _SINGLETON
    except LookupError as exc:
        raise web.HTTPNotFound(text="translated") from exc


_readers: "Set[asyncio.Future[None]]" = set()


async def _read_late(request: web.Request, answered: asyncio.Event) -> None:
    await answered.wait()
    try:
        await request.read()
    except web.PayloadAccessError:
        pass


async def _defer(request: web.Request) -> web.StreamResponse:
    # The reader is woken by the response's end, as a background task that is given
    # a request is; and held, as asyncio asks for.
    answered = asyncio.Event()
    reader = asyncio.ensure_future(_read_late(request, answered))
    _readers.add(reader)
    reader.add_done_callback(_readers.discard)
    response = web.Response(text="ok")
    await response.prepare(request)
    await response.write_eof()
    asyncio.get_running_loop().call_later(0.01, answered.set)
    return response


def _build(app: web.Application) -> None:
    app.router.add_get("/stash", _stash)
    app.router.add_get("/answered", _stash_and_answer)
    app.router.add_get("/raise", _raise)
    app.router.add_get("/another", _keep_another)
    app.router.add_get("/traceback", _keep_traceback)
    app.router.add_get("/returned", _return)
    app.router.add_get("/singleton", _raise_singleton)
    app.router.add_get("/translated", _translate_singleton)
    app.router.add_post("/late", _defer)


def _build_keeping(app: web.Application) -> None:
    _build(app)
    app.middlewares.append(_keep)


_STASH = "request -> exception -> traceback -> frame -> request"
_READ_LATE = b"POST /late HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\nbody"

LEAKS = (
    Leak(
        id="stash",
        title='request["error"] = exc, and it is raised',
        kind=Kind.DELAYED,
        chain=_STASH,
        build=_build,
        visits=((get("/stash"), Step.ANSWER),),
    ),
    Leak(
        id="stash/answered",
        title='request["error"] = exc, and it is not raised',
        kind=Kind.DELAYED,
        chain=_STASH,
        build=_build,
        visits=((get("/answered"), Step.ANSWER),),
    ),
    Leak(
        id="kept-local",
        title="a middleware catches the exception and keeps it in a local",
        kind=Kind.DELAYED,
        chain="exception -> traceback -> frame of the middleware -> exception",
        build=_build_keeping,
        visits=((get("/raise"), Step.ANSWER),),
    ),
    Leak(
        id="kept-local/another",
        title="the handler keeps one exception in a local and raises another",
        kind=Kind.DELAYED,
        chain="exception -> traceback -> frame of the handler -> exception",
        build=_build,
        visits=((get("/another"), Step.ANSWER),),
    ),
    Leak(
        id="kept-local/traceback",
        title="the handler keeps the traceback in a local",
        kind=Kind.DELAYED,
        chain="traceback -> frame of the handler -> traceback",
        build=_build,
        visits=((get("/traceback"), Step.ANSWER),),
    ),
    Leak(
        id="kept-local/returned",
        title="the handler catches a web.HTTPException and returns it",
        kind=Kind.DELAYED,
        chain="exception -> traceback -> frame of the handler -> exception",
        build=_build,
        visits=((get("/returned"), Step.ANSWER),),
    ),
    Leak(
        id="singleton",
        title="one exception instance is raised again and again",
        kind=Kind.PERMANENT,
        chain="the application -> exception -> traceback of every time -> request",
        build=_build,
        visits=((get("/singleton"), Step.ANSWER),),
    ),
    Leak(
        id="singleton/cause",
        title="one exception instance is the cause of others, again and again",
        kind=Kind.PERMANENT,
        chain="the application -> exception -> traceback of every time -> request",
        build=_build,
        visits=((get("/translated"), Step.ANSWER),),
    ),
    Leak(
        id="late-read",
        title="a background task reads the body after the response",
        kind=Kind.PERMANENT,
        chain=(
            "web_protocol._PAYLOAD_ACCESS_ERROR -> traceback of every reader -> "
            "frame of the reader -> request"
        ),
        affected=(Affected(since=(3, 10, 6)),),
        build=_build,
        visits=((_READ_LATE, Step.ANSWER),),
    ),
    Leak(
        id="late-read/own-error",
        title="a background task reads too late a body that has an error of its own",
        kind=Kind.DELAYED,
        chain=(
            "request -> payload -> PayloadAccessError -> traceback -> "
            "frame of the reader -> request"
        ),
        affected=(Affected(until=(3, 10, 5)),),
        build=_build,
        visits=((_READ_LATE, Step.ANSWER),),
    ),
)
