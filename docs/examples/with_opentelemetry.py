"""OpenTelemetry beside us: its spans have the whole traceback."""

from aiohttp import web
from opentelemetry.instrumentation.aiohttp_server import AioHttpServerInstrumentor

from aiohttp_cyclebreak import setup


async def refuse(request: web.Request) -> web.Response:
    try:
        int("no number")
    except ValueError as exc:
        raise web.HTTPBadRequest(text="not a number") from exc
    return web.Response()


def create_app() -> web.Application:
    AioHttpServerInstrumentor().instrument()  # before the application is made
    app = web.Application()
    app.router.add_get("/", refuse)
    setup(app)
    return app
