"""An application and its sub-application: one call guards both."""

from typing import Any

from aiohttp import web

from aiohttp_cyclebreak import setup


async def show(request: web.Request) -> web.Response:
    raise LookupError("no such order")


@web.middleware
async def translate(request: web.Request, handler: Any) -> web.StreamResponse:
    """Swallow what a handler raises, and raise something else."""
    try:
        response: web.StreamResponse = await handler(request)
    except LookupError as exc:
        raise web.HTTPNotFound(text=str(exc)) from exc
    return response


def create_app() -> web.Application:
    orders = web.Application(middlewares=[translate])
    orders.router.add_get("/{number}", show)
    app = web.Application()
    app.add_subapp("/orders/", orders)
    setup(app)
    return app
