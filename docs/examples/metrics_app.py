"""A service that Prometheus can scrape, of one process or of gunicorn's workers.

``gunicorn -c gunicorn_metrics.py metrics_app:create_app``
"""

import os

from aiohttp import web
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    generate_latest,
    multiprocess,
)

from aiohttp_cyclebreak import Radar, setup
from aiohttp_cyclebreak.prometheus import export

kept = []


async def refuse(request):
    raise web.HTTPBadRequest


async def keep(request):
    kept.append(request)
    return web.json_response({"worker": os.getpid()})


async def metrics(request):
    registry = REGISTRY
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # reads what all workers wrote
    return web.Response(
        body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST}
    )


async def create_app():
    app = web.Application()
    setup(app, radar=Radar(interval=1.0))
    export(app)
    app.router.add_get("/refuse", refuse)
    app.router.add_get("/keep/{name}", keep)
    app.router.add_get("/metrics", metrics)
    return app
