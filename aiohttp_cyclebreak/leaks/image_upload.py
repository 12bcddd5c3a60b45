"""aiohttp issue #10548 as it was reported: images posted to a JSON handler."""

from aiohttp import web

from ._leak import Kind, Leak, Step, post

# The first bytes of a PNG file; the rest need not be an image to be no JSON.
_IMAGE = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 16
_JSON = b'{"image": "' + b"A" * 4096 + b'"}'
_OVERSIZE = 1024**2 + 1  # client_max_size is 1 MiB unless set


def _enlarge(body: bytes) -> bytes:
    return body + b" " * (_OVERSIZE - len(body))


async def _receive(request: web.Request) -> web.Response:
    data = await request.json()
    return web.json_response({"received": len(data["image"])})


def _build(app: web.Application) -> None:
    app.router.add_post("/image", _receive)


LEAKS = (
    Leak(
        id="image-upload",
        title="images posted to request.json(): small, over the limit, valid, invalid",
        kind=Kind.DELAYED,
        chain=(
            "as close-cancel and http-exception: the connection's task, or the 413, "
            "-> traceback -> frame -> the request and its body"
        ),
        upstream="https://github.com/aio-libs/aiohttp/issues/10548",
        build=_build,
        visits=tuple(
            (
                post(
                    _enlarge(body) if large else body,
                    f"Connection: {connection}",
                    path="/image",
                    type=type,
                ),
                Step.ANSWER,
            )
            for body, type in ((_JSON, "application/json"), (_IMAGE, "image/png"))
            for large in (False, True)
            for connection in ("keep-alive", "close")
        ),
    ),
)
