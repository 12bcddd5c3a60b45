"""An idle keep-alive connection keeps its last request, with its body."""

from aiohttp import web

from ._leak import Kind, Leak, Step, Visit, post

_CHAIN = "frame of RequestHandler.start, which is suspended -> request -> body"


async def _read(request: web.Request) -> web.Response:
    return web.Response(text=str(len(await request.read())))


async def _parse(request: web.Request) -> web.Response:
    return web.Response(text=str(len(await request.post())))


def _build(app: web.Application) -> None:
    app.router.add_post("/", _read)
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
)
