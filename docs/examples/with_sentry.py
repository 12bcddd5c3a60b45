"""Sentry beside us: its events have every frame and every local."""

import os

import sentry_sdk
from aiohttp import web
from sentry_sdk.integrations.aiohttp import AioHttpIntegration

from aiohttp_cyclebreak import setup


async def fail(request: web.Request) -> web.Response:
    order = 42
    raise ValueError(f"order {order} cannot be shipped")


def create_app() -> web.Application:
    sentry_sdk.init(
        dsn=os.environ.get("SENTRY_DSN"), integrations=[AioHttpIntegration()]
    )
    app = web.Application()
    app.router.add_get("/", fail)
    setup(app)
    return app
