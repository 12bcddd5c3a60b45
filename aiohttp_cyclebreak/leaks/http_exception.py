"""The handler raises a web.HTTPException, whatever its status."""

from aiohttp import web

from ._leak import Kind, Leak, Step, get, post

_CHAIN = (
    "the exception -> traceback -> frame of RequestHandler._handle_request -> "
    "its local resp, which is the exception"
)


async def _refuse(request: web.Request) -> web.Response:
    raise web.HTTPBadRequest(text="no")


async def _redirect(request: web.Request) -> web.Response:
    raise web.HTTPFound("/elsewhere")


async def _read(request: web.Request) -> web.Response:
    await request.read()
    return web.Response()


async def _translate(request: web.Request) -> web.Response:
    try:
        int("no number")
    except ValueError as exc:
        raise web.HTTPInternalServerError(text="translated") from exc
    return web.Response()


class _View(web.View):
    async def get(self) -> web.Response:
        raise web.HTTPBadRequest(text="no")


def _build(app: web.Application) -> None:
    app.router.add_get("/", _refuse)
    app.router.add_get("/redirect", _redirect)
    app.router.add_get("/translated", _translate)
    app.router.add_view("/view", _View)
    app.router.add_post("/", _read)
    sub = web.Application()
    sub.router.add_get("/", _refuse)
    app.add_subapp("/sub", sub)


def _leak(variant: str, title: str, *sent: bytes) -> Leak:
    return Leak(
        id="http-exception" + variant,
        title=title,
        kind=Kind.DELAYED,
        chain=_CHAIN,
        build=_build,
        visits=((*sent, *(Step.ANSWER for _ in sent)),),
    )


LEAKS = (
    _leak("", "the handler raises web.HTTPBadRequest", get()),
    _leak("/redirect", "the handler raises a redirect", get("/redirect")),
    _leak(
        "/too-large",
        "the handler reads a body over client_max_size",
        post(bytes(2 * 1024**2)),
    ),
    _leak("/view", "a method of a web.View raises", get("/view")),
    _leak("/subapp", "a handler of a sub-application raises", get("/sub/")),
    _leak(
        "/chained", "the handler raises it from another exception", get("/translated")
    ),
    _leak(
        "/close",
        "the handler raises, and the connection is not kept",
        get("/", "Connection: close"),
    ),
    _leak(
        "/pipelined",
        "the handlers of three pipelined requests raise",
        get(),
        get("/redirect"),
        get(),
    ),
)
