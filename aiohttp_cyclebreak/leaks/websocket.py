"""A websocket ends otherwise than by its closing handshake."""

from typing import Any

from aiohttp import web

from ._leak import NOT_CANCELLED, Affected, Kind, Leak, Step, Visit, get

_OPEN = (
    "Upgrade: websocket",
    "Connection: Upgrade",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)
# A masked text frame that holds "hi"; the same with an opcode that there is not.
_TEXT = b"\x81\x82\x00\x00\x00\x00hi"
_INVALID = b"\x83\x82\x00\x00\x00\x00hi"
_CHAIN = (
    "WebSocketResponse and its reader -> the exception -> traceback -> "
    "frame of receive() -> the WebSocketResponse"
)


# aiohttp 3.14 wants keys of its own kind.
_WEBSOCKET: Any = (
    web.RequestKey("websocket", web.WebSocketResponse)
    if hasattr(web, "RequestKey")
    else "websocket"
)


async def _echo(request: web.Request) -> web.StreamResponse:
    websocket = web.WebSocketResponse()
    await websocket.prepare(request)
    async for message in websocket:
        await websocket.send_str(message.data)
    return websocket


async def _fail(request: web.Request) -> web.StreamResponse:
    websocket = web.WebSocketResponse()
    await websocket.prepare(request)
    async for message in websocket:
        raise ValueError(message.data)
    return websocket


async def _fail_late(request: web.Request) -> web.StreamResponse:
    websocket = web.WebSocketResponse()
    await websocket.prepare(request)
    async for _ in websocket:
        pass
    raise ValueError("after the websocket was closed")


async def _fail_after_close(request: web.Request) -> web.StreamResponse:
    websocket = web.WebSocketResponse()
    await websocket.prepare(request)
    await websocket.receive()
    await websocket.receive()
    raise web.HTTPBadRequest


async def _store(request: web.Request) -> web.StreamResponse:
    websocket = web.WebSocketResponse()
    await websocket.prepare(request)
    request[_WEBSOCKET] = websocket
    async for message in websocket:
        await websocket.send_str(message.data)
    return websocket


def _build(app: web.Application) -> None:
    app.router.add_get("/echo", _echo)
    app.router.add_get("/fail", _fail)
    app.router.add_get("/late", _fail_late)
    app.router.add_get("/close", _fail_after_close)
    app.router.add_get("/store", _store)


_ALL = Affected()


def _leak(
    variant: str,
    title: str,
    path: str,
    sent: bytes,
    *end: Step,
    affected: Affected = _ALL,
) -> Leak:
    steps: Visit = (get(path, *_OPEN), Step.BYTES, sent, Step.BYTES, *end)
    return Leak(
        id="websocket" + variant,
        title=title,
        kind=Kind.DELAYED,
        chain=_CHAIN,
        build=_build,
        visits=(steps,),
        affected=(affected,),
    )


LEAKS = (
    Leak(
        id="websocket/raise-after",
        title="the handler of a websocket raises when the client is gone",
        kind=Kind.DELAYED,
        chain=_CHAIN,
        build=_build,
        visits=((get("/close", *_OPEN), Step.BYTES, _TEXT),),
        affected=(NOT_CANCELLED,),
    ),
    _leak(
        "",
        "a websocket is reset",
        "/echo",
        _TEXT,
        Step.RESET,
        affected=NOT_CANCELLED,
    ),
    _leak(
        "/dropped",
        "a websocket is closed without a handshake",
        "/echo",
        _TEXT,
        affected=NOT_CANCELLED,
    ),
    _leak("/invalid", "a websocket is sent an invalid frame", "/echo", _INVALID),
    _leak("/raise", "the handler of a websocket raises", "/fail", _TEXT),
    _leak("/stored", "a websocket is kept in its request", "/store", _TEXT),
    _leak(
        "/raise-late",
        "the handler of a websocket raises after an invalid frame",
        "/late",
        _INVALID,
    ),
)
