"""For ``gunicorn gunicorn_app:create_runner -k aiohttp.GunicornWebWorker``."""

import gc
import os

from aiohttp import web

from aiohttp_cyclebreak import guard_server


class GuardedRunner(web.AppRunner):
    """A runner whose every connection is guarded, whoever sets it up."""

    async def setup(self) -> None:
        await super().setup()
        guard_server(self)


async def refuse(request: web.Request) -> web.Response:
    raise web.HTTPBadRequest(text="no")


async def count(request: web.Request) -> web.Response:
    """How many requests this worker has in memory, itself and this one."""
    alive = sum(web.BaseRequest in type(each).__mro__ for each in gc.get_objects())
    return web.json_response({"worker": os.getpid(), "alive": alive})


async def create_runner() -> web.AppRunner:
    app = web.Application()
    app.router.add_get("/", refuse)
    app.router.add_get("/count", count)
    return GuardedRunner(app)
