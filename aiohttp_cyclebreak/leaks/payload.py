"""The client vanishes while its body is read."""

from typing import Any

from aiohttp import web

from ._leak import NOT_CANCELLED, Kind, Leak, Step, post

_FORM = "application/x-www-form-urlencoded"
_MULTIPART = "multipart/form-data; boundary=limit"
_PART = (
    b'--limit\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n'
    b"Content-Type: image/png\r\n\r\n" + b"P" * 4096
)


async def _raw(request: web.Request) -> web.Response:
    async for _ in request.content.iter_chunked(1024):
        pass
    return web.Response()


async def _json(request: web.Request) -> web.Response:
    return web.json_response(await request.json())


async def _form(request: web.Request) -> web.Response:
    await request.post()
    return web.Response()


async def _parts(request: web.Request) -> web.Response:
    parts: Any = await request.multipart()
    async for part in parts:
        await part.read()
    return web.Response()


async def _nested(request: web.Request) -> web.Response:
    async def receive() -> bytes:  # closes over the request
        return await request.read()

    await receive()
    return web.Response()


async def _swallow(request: web.Request) -> web.Response:
    try:
        await request.read()
    except Exception:
        return web.Response(status=400)
    return web.Response()


def _build(app: web.Application) -> None:
    app.router.add_post("/raw", _raw)
    app.router.add_post("/json", _json)
    app.router.add_post("/form", _form)
    app.router.add_post("/multipart", _form)
    app.router.add_post("/parts", _parts)
    app.router.add_post("/nested", _nested)
    app.router.add_post("/swallowed", _swallow)


def _leak(variant: str, title: str, path: str, body: bytes, type: str) -> Leak:
    sent = post(body, path=path, type=type, length=100_000)
    return Leak(
        id="payload" + variant,
        title=title,
        kind=Kind.DELAYED,
        chain=(
            "request -> payload -> StreamReader._exception -> traceback -> "
            "frame of whoever read -> request"
        ),
        build=_build,
        visits=((sent, Step.BEGUN), (sent, Step.BEGUN, Step.RESET)),
        affected=(NOT_CANCELLED,),
    )


LEAKS = (
    _leak("", "the client vanishes in a raw body", "/raw", b"x" * 4096, "text/plain"),
    _leak(
        "/json",
        "the client vanishes in a JSON body",
        "/json",
        b'{"a": "' + b"b" * 4096,
        "application/json",
    ),
    _leak("/form", "the client vanishes in a form", "/form", b"a=" + b"b" * 99, _FORM),
    _leak(
        "/multipart",
        "the client vanishes in an upload read by request.post()",
        "/multipart",
        _PART,
        _MULTIPART,
    ),
    _leak(
        "/parts",
        "the client vanishes in an upload read part by part",
        "/parts",
        _PART,
        _MULTIPART,
    ),
    _leak(
        "/nested",
        "the client vanishes in a body read by a nested function",
        "/nested",
        b"x" * 4096,
        "text/plain",
    ),
    _leak(
        "/swallowed",
        "the client vanishes in a body, and the handler answers all the same",
        "/swallowed",
        b"x" * 4096,
        "text/plain",
    ),
)
