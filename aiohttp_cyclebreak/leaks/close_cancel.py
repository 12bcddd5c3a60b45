"""The client closes an idle keep-alive connection."""

from aiohttp import web

from ._leak import Affected, Kind, Leak, Step, get

_CHAIN = (
    "connection task -> its stored CancelledError -> traceback -> "
    "frame of RequestHandler.start -> that task, and the request"
)
_UPSTREAM = "https://github.com/aio-libs/aiohttp/issues/10548"
_AFFECTED = (Affected(since=(3, 10, 6), until=(3, 11, 13), python=(3, 9)),)


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
        affected=_AFFECTED,
        upstream=_UPSTREAM,
        build=_build,
        visits=((get(), Step.ANSWER),),
    ),
    Leak(
        id="none-response",
        title="the handler returns None",
        kind=Kind.DELAYED,
        chain=_CHAIN,
        affected=(
            Affected(until=(3, 10, 5)),
            Affected(since=(3, 10, 6), until=(3, 11, 13), python=(3, 9)),
        ),
        upstream=_UPSTREAM,
        build=_build_nothing,
        visits=((get(), Step.BYTES),),
    ),
)
