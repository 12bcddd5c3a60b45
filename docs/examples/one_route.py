"""Some routes are guarded, or left alone, and no others."""

from aiohttp import web

from aiohttp_cyclebreak import break_cycles, cyclebreak, keep_cycles


@break_cycles
async def refuse(request: web.Request) -> web.Response:
    raise web.HTTPBadRequest(text="no")


@break_cycles
class Item(web.View):
    async def get(self) -> web.Response:
        raise web.HTTPNotFound(text="no such item")


def create_app() -> web.Application:
    """Make an application without our middleware: two of its routes are guarded."""
    app = web.Application()
    app.router.add_get("/refuse", refuse)
    app.router.add_view("/item", Item)
    return app


@keep_cycles
async def debug(request: web.Request) -> web.Response:
    raise web.HTTPBadRequest(text="whose locals somebody looks at later")


def create_guarded_app() -> web.Application:
    """Make an application with our middleware: one of its routes is left alone."""
    app = web.Application(middlewares=[cyclebreak()])
    app.router.add_get("/debug", debug)
    return app
