"""Something fails after the response was started with prepare()."""

import asyncio

from aiohttp import web

from ._leak import NOT_CANCELLED, Kind, Leak, Step, get

_CHAIN = (
    "frame of RequestHandler.start -> the request's task -> ConnectionError -> "
    "traceback -> that frame, and the request"
)


async def _fail(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b"first")
    raise ValueError("after the response was started")


async def _stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    while True:  # until the client is gone: a write to nobody raises
        await response.write(b"x" * 65536)
        await asyncio.sleep(0)


def _build(app: web.Application) -> None:
    app.router.add_get("/fail", _fail)
    app.router.add_get("/stream", _stream)


LEAKS = (
    Leak(
        id="started",
        title="the handler raises after prepare()",
        kind=Kind.DELAYED,
        chain=_CHAIN,
        build=_build,
        visits=((get("/fail"), Step.BYTES),),
    ),
    Leak(
        id="started/vanished",
        title="the client vanishes while the response is written",
        kind=Kind.DELAYED,
        chain=_CHAIN,
        build=_build,
        visits=((get("/stream"), Step.BYTES, Step.RESET),),
        affected=(NOT_CANCELLED,),
    ),
)
