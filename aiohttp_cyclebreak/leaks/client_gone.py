"""The client goes away while something large is sent to it."""

from functools import lru_cache

from aiohttp import web

from ._leak import NOT_CANCELLED, Kind, Leak, Remedy, Step, get

# More than the buffers of a connection take, so that aiohttp waits for the client.
_SIZE = 20_000_000


@lru_cache(maxsize=None)
def _body() -> bytes:
    """One for all responses: bare they all stay, and verify may run in a small pod."""
    return bytes(_SIZE)


async def _answer(request: web.Request) -> web.Response:
    return web.Response(body=_body())


async def _stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    try:
        for _ in range(200):  # in parts: bare, the one being written stays
            await response.write(bytes(_SIZE // 200))
    except ConnectionError:
        pass
    return response


def _build(app: web.Application) -> None:
    app.router.add_get("/", _answer)
    app.router.add_get("/stream", _stream)


def _leak(variant: str, title: str, path: str, frame: str) -> Leak:
    return Leak(
        id="client-gone/" + variant,
        title=title,
        kind=Kind.DELAYED,
        chain=(
            "frame of BaseProtocol._drain_helper -> future -> exception -> traceback "
            f"-> that frame, and that of {frame} -> request"
        ),
        build=_build,
        visits=((get(path), Step.UNREAD, Step.RESET),),
        affected=(NOT_CANCELLED,),
        remedy=Remedy.SERVER,
    )


LEAKS = (
    _leak(
        "response",
        "the client goes away while a large response is sent",
        "/",
        "RequestHandler.finish_response",
    ),
    _leak(
        "stream",
        "the client goes away while a handler streams, which swallows that",
        "/stream",
        "the handler",
    ),
)
