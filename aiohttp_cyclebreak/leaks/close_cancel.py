"""The client closes an idle keep-alive connection."""

from aiohttp import web

from ._leak import CLOSE_CANCEL, Affected, Kind, Leak, Step, get

_CHAIN = (
    "connection task -> its stored CancelledError -> traceback -> "
    "frame of RequestHandler.start -> that task, and the request"
)
_UPSTREAM = "https://github.com/aio-libs/aiohttp/issues/10548"


async def _answer(request: web.Request) -> web.Response:
    return web.Response(text="ok")


def _build(app: web.Application) -> None:
    app.router.add_get("/", _answer)


async def _return_nothing(request: web.Request) -> None:
    await request.read()


def _build_nothing(app: web.Application) -> None:
    app.router.add_get("/", _return_nothing)  # type: ignore[arg-type]


LEAKS = (
    Leak(
        id="close-cancel",
        title="the client closes an idle keep-alive connection",
        kind=Kind.DELAYED,
        chain=_CHAIN,
        affected=(CLOSE_CANCEL,),
        upstream=_UPSTREAM,
        build=_build,
        visits=((get(), Step.ANSWER),),
    ),
    Leak(
        id="none-response",
        title="the handler returns None",
        kind=Kind.DELAYED,
        chain=_CHAIN,
        affected=(Affected(until=(3, 10, 5)), CLOSE_CANCEL),
        upstream=_UPSTREAM,
        build=_build_nothing,
        visits=((get(), Step.BYTES),),
    ),
)
