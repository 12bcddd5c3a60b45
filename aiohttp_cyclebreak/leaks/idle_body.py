"""An idle keep-alive connection keeps its last request, with its body."""

import asyncio

from aiohttp import web

from ._leak import Affected, Kind, Leak, Step, Visit, post

_CHAIN = "frame of RequestHandler.start, which is suspended -> request -> body"


async def _read(request: web.Request) -> web.Response:
    return web.Response(text=str(len(await request.read())))


async def _parse(request: web.Request) -> web.Response:
    return web.Response(text=str(len(await request.post())))


async def _refuse(request: web.Request) -> web.Response:
    while not request.content.is_eof():
        await asyncio.sleep(0)
    return web.Response(status=413)


def _build(app: web.Application) -> None:
    app.router.add_post("/", _read)
    app.router.add_post("/refuse", _refuse)
    app.router.add_post("/form", _parse)


def _leak(variant: str, title: str, sent: bytes) -> Leak:
    visit: Visit = (sent, Step.ANSWER, Step.STAY)
    return Leak(
        id="idle-body" + variant,
        title=title,
        kind=Kind.LIVE,
        chain=_CHAIN,
        build=_build,
        visits=(visit,),
    )


LEAKS = (
    _leak("", "an idle keep-alive connection keeps a body", post(bytes(500_000))),
    _leak(
        "/form",
        "an idle keep-alive connection keeps a form",
        post(
            b"a=" + b"b" * 500_000,
            path="/form",
            type="application/x-www-form-urlencoded",
        ),
    ),
    Leak(
        id="idle-body/unread",
        title="a body that nobody reads keeps a connection whose client has gone",
        kind=Kind.LIVE,
        chain="frame of RequestHandler.start, which waits for a request while reading "
        "is paused -> request -> body",
        build=_build,
        # What has come is too much with the last byte, which pauses reading.
        visits=((post(bytes(2**17 + 1), path="/refuse"), Step.ANSWER, Step.LEAVE),),
        affected=(Affected(until=(3, 11, 10)),),
        upstream="https://github.com/aio-libs/aiohttp/issues/10169",
    ),
)
