"""A request for which there is no route: 404 and 405."""

from typing import Any

from aiohttp import web

from ._leak import Affected, Kind, Leak, Step, get, post


async def _answer(request: web.Request) -> web.Response:
    return web.Response(text="ok")


def _build(app: web.Application) -> None:
    app.router.add_get("/", _answer)


@web.middleware
async def _idle(request: web.Request, handler: Any) -> web.StreamResponse:
    response: web.StreamResponse = await handler(request)
    return response


def _build_with_middleware(app: web.Application) -> None:
    _build(app)
    app.middlewares.append(_idle)


_CHAIN = (
    "as http-exception; and SystemRoute -> its handler, a method bound to it, "
    "and its HTTPException"
)
_UPSTREAM = "https://github.com/aio-libs/aiohttp/pull/10573"

LEAKS = (
    Leak(
        id="no-route",
        title="404: no route for the path",
        kind=Kind.DELAYED,
        chain=_CHAIN,
        upstream=_UPSTREAM,
        build=_build,
        visits=((get("/missing"), Step.ANSWER),),
    ),
    Leak(
        id="no-route/method",
        title="405: no route for the method",
        kind=Kind.DELAYED,
        chain=_CHAIN,
        upstream=_UPSTREAM,
        build=_build,
        visits=((post(b"x"), Step.ANSWER),),
    ),
    Leak(
        id="cve-2024-52303",
        title="404 in an application that has a middleware",
        kind=Kind.PERMANENT,
        chain=(
            "the lru_cache of web_app._build_middlewares -> SystemRoute -> "
            "HTTPException -> traceback -> frame -> request"
        ),
        affected=(Affected(since=(3, 10, 6), until=(3, 10, 10)),),
        upstream="https://github.com/advisories/GHSA-27mf-ghqm-j3j8",
        build=_build_with_middleware,
        visits=((get("/missing"), Step.ANSWER),),
    ),
)
