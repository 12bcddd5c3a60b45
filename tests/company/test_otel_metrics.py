"""The numbers as OpenTelemetry's real SDK reads them."""

import asyncio
import importlib
import pathlib
import time
from typing import Any, Dict, List

import pytest
from aiohttp import web

from aiohttp_cyclebreak import Radar, setup
from aiohttp_cyclebreak.radar import watch_of
from tests.service import run, serve

metrics = pytest.importorskip(
    "opentelemetry.sdk.metrics", reason="needs the extra 'company'"
)
export = pytest.importorskip(
    "opentelemetry.sdk.metrics.export", reason="needs the extra 'company'"
)

EXAMPLES = pathlib.Path(__file__).parents[2] / "docs" / "examples"


def _points(reader: Any) -> Dict[str, Any]:
    data = reader.get_metrics_data()
    assert data is not None
    return {
        metric.name: {
            tuple(sorted(point.attributes.items())): point.value
            for point in metric.data.data_points
        }
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }


def test_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """What docs/metrics.rst shows: the numbers, with the route and the type."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    otel_metrics = importlib.import_module("otel_metrics")

    async def main() -> Dict[str, Any]:
        kept: List[Any] = []

        async def keep(request: web.Request) -> web.Response:
            kept.append(request)
            return web.Response()

        async def refuse(request: web.Request) -> web.Response:
            raise web.HTTPBadRequest

        app = web.Application()
        app.router.add_get("/keep/{name}", keep)
        app.router.add_get("/refuse", refuse)
        setup(app, radar=Radar(interval=1e6))
        reader = export.InMemoryMetricReader()
        provider = metrics.MeterProvider(metric_readers=[reader])
        otel_metrics.observe(app, provider.get_meter("myapp"))
        async with serve(app) as service:
            for path in ("/keep/secret", "/refuse", "/refuse"):
                await service.ask(path)
            assert service.runner.server is not None
            while service.runner.server.connections:
                await asyncio.sleep(0.001)
            watch = watch_of(app)
            assert watch is not None
            await watch.look(time.monotonic())
            await watch.look(time.monotonic() + 31.0)
            points = _points(reader)
        provider.shutdown()
        return points

    bad_request = "aiohttp.web_exceptions.HTTPBadRequest"
    assert run(main()) == {
        "aiohttp_cyclebreak.requests.alive": {(): 1},
        "aiohttp_cyclebreak.requests.overdue": {(("http.route", "/keep/{name}"),): 1},
        "aiohttp_cyclebreak.severed": {
            (("exception.type", bad_request), ("http.route", "/refuse")): 2
        },
        "aiohttp_cyclebreak.errors": {(): 0},
    }
