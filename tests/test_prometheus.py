"""What Prometheus scrapes is what happened."""

import asyncio
import contextlib
import os
import pathlib
import subprocess
import sys
import time
from typing import Any, AsyncIterator, Dict, List

import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from aiohttp_cyclebreak import Radar, Stats, setup
from aiohttp_cyclebreak.prometheus import export
from aiohttp_cyclebreak.radar import Watch, watch_of

from .service import Service, run, serve, spin

BAD_REQUEST = "aiohttp.web_exceptions.HTTPBadRequest"


def scrape(registry: CollectorRegistry, documented: bool = True) -> Dict[str, float]:
    """The samples of a registry, by name and labels."""
    found = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        assert family.documentation.endswith(".") or not documented
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
            name = sample.name.replace("aiohttp_cyclebreak_", "")
            found[f"{name}{{{labels}}}"] = sample.value
    return {name: value for name, value in found.items() if "_created{" not in name}


class Application:
    """One that refuses, and keeps what it is told to keep until it lets go."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.kept: List[Any] = []
        self.app = web.Application()
        self.app.router.add_get("/refuse", self.refuse)
        self.app.router.add_get("/keep/{name}", self.keep)
        setup(self.app, radar=Radar(interval=1e6))
        export(self.app, registry=registry)
        watch = watch_of(self.app)
        assert watch is not None
        self.watch: Watch = watch

    async def refuse(self, request: web.Request) -> web.Response:
        raise web.HTTPBadRequest

    async def keep(self, request: web.Request) -> web.Response:
        self.kept.append(request)
        return web.Response()

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator[Service]:
        async with serve(self.app) as service:
            yield service

    async def ask(self, service: Service, *paths: str) -> None:
        for path in paths:
            await service.ask(path)
        assert service.runner.server is not None
        while service.runner.server.connections:
            await asyncio.sleep(0.001)
        await spin()

    async def look(self, later: float = 0.0) -> None:
        await self.watch.look(time.monotonic() + later)


NOTHING = {
    "requests_alive{}": 0.0,
    "requests_outlived{}": 0.0,
    "exceptions_cut_total{}": 0.0,
    "frames_cut_total{}": 0.0,
    "reports_total{}": 0.0,
    "errors_total{}": 0.0,
}


def test_the_metrics() -> None:
    """Counters only rise, gauges fall again, and a path is never a label."""

    async def main() -> None:
        registry = CollectorRegistry()
        mine = Application(registry)
        assert scrape(registry) == NOTHING
        async with mine.serve() as service:
            await mine.ask(service, "/refuse", "/keep/a", "/refuse", "/none", "/keep/b")
            await mine.look()
            found = scrape(registry)
            assert found["requests_alive{}"] == found["requests_outlived{}"] == 2
            assert found[f"severed_total{{exception={BAD_REQUEST},route=/refuse}}"] == 2
            assert found["exceptions_cut_total{}"] == 3
            assert found["frames_cut_total{}"] >= 3
            assert not any("overdue" in name for name in found)
            await mine.look(31.0)
            found = scrape(registry)
            assert found["requests_overdue{route=/keep/{name}}"] == 2
            age = found["oldest_overdue_request_age_seconds{route=/keep/{name}}"]
            assert age >= 30
            assert found["reports_total{}"] == 1
            mine.kept.clear()
            await mine.ask(service, "/refuse")
            await mine.look(62.0)
            found = scrape(registry)
            assert found["requests_alive{}"] == found["requests_outlived{}"] == 0
            assert found["requests_overdue{route=/keep/{name}}"] == 0
            assert found["oldest_overdue_request_age_seconds{route=/keep/{name}}"] == 0
            assert found[f"severed_total{{exception={BAD_REQUEST},route=/refuse}}"] == 3
            assert found["errors_total{}"] == 0

    run(main())


def test_what_happened_last_is_shown_when_the_application_has_stopped() -> None:
    """With no request of it any more."""

    async def main() -> None:
        registry = CollectorRegistry()
        mine = Application(registry)
        async with mine.serve() as service:
            await mine.ask(service, "/refuse", "/keep/a")
            await mine.look()
            await mine.ask(service, "/refuse")
            assert scrape(registry)["requests_alive{}"] == 1
        found = scrape(registry)
        assert found["requests_alive{}"] == found["requests_outlived{}"] == 0
        assert found[f"severed_total{{exception={BAD_REQUEST},route=/refuse}}"] == 2

    run(main())


def test_two_applications_are_added_up() -> None:
    """And one that is exported twice is counted once."""

    async def main() -> None:
        registry = CollectorRegistry()
        first, second = Application(registry), Application(registry)
        export(first.app, registry=registry)
        async with first.serve() as one, second.serve() as two:
            await first.ask(one, "/refuse", "/keep/a")
            await second.ask(two, "/refuse", "/keep/a", "/keep/b")
            for each in (first, second):
                await each.look()
                await each.look(31.0)
            found = scrape(registry)
            assert found["requests_alive{}"] == 3
            assert found["requests_overdue{route=/keep/{name}}"] == 3
            assert found[f"severed_total{{exception={BAD_REQUEST},route=/refuse}}"] == 2

    run(main())


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The metrics are there, and zero."""
    monkeypatch.setenv("AIOHTTP_CYCLEBREAK", "off")
    registry = CollectorRegistry()
    app = web.Application()
    setup(app, radar=Radar())
    export(app, registry=registry)
    assert scrape(registry) == NOTHING


def test_wrong_use() -> None:
    """It is refused before the application starts."""
    registry = CollectorRegistry()
    with pytest.raises(TypeError, match=r"must be an aiohttp\.web\.Application"):
        export(None, registry=registry)  # type: ignore[arg-type]
    with pytest.raises(LookupError, match=r"call setup\(app, radar=Radar\(\)\)"):
        export(web.Application(), registry=registry)
    app = web.Application()
    setup(app, radar=Radar())
    for wrong in (None, "x"):
        with pytest.raises(TypeError, match="registry must be a CollectorRegistry"):
            export(app, registry=wrong)  # type: ignore[arg-type]


def test_a_name_that_is_taken() -> None:
    """Then nothing is registered, and it can be done again."""
    registry = CollectorRegistry()
    taken = Gauge("aiohttp_cyclebreak_frames_cut_total", "Another.", registry=registry)
    app = web.Application()
    setup(app, radar=Radar())
    with pytest.raises(ValueError, match="aiohttp_cyclebreak_frames_cut"):
        export(app, registry=registry)
    assert list(scrape(registry)) == ["frames_cut_total{}"]
    registry.unregister(taken)
    export(app, registry=registry)
    assert scrape(registry) == NOTHING


def found_by(number: int) -> Stats:
    return Stats(
        alive=number,
        outlived=number,
        overdue={"/x": number},
        oldest={"/x": 10.0 * number},
        severed={("/x", "ValueError"): number},
        exceptions=number,
        frames=number,
        reports=number,
        errors=number,
    )


def shown(total: int, oldest: float) -> Dict[str, float]:
    return {
        **dict.fromkeys(NOTHING, float(total)),
        "requests_overdue{route=/x}": total,
        "severed_total{exception=ValueError,route=/x}": total,
        "oldest_overdue_request_age_seconds{route=/x}": oldest,
    }


def tell(app: web.Application, number: int) -> None:
    watch = watch_of(app)
    assert watch is not None
    for each in watch.on_look:
        each(watch, found_by(number))


def test_what_was_counted_is_not_counted_again() -> None:
    """However often the radar looks."""
    registry = CollectorRegistry()
    app = web.Application()
    setup(app, radar=Radar())
    export(app, registry=registry)
    for number in (2, 2, 5, 5):
        tell(app, number)
        assert scrape(registry) == shown(number, 10.0 * number)


def test_failures_are_those_of_the_process() -> None:
    """Each application tells of all of them, and they are counted once."""
    registry = CollectorRegistry()
    apps = [web.Application(), web.Application()]
    for app in apps:
        setup(app, radar=Radar())
        export(app, registry=registry)
    for number in (2, 3):
        for app in apps:
            tell(app, number)
    found = scrape(registry)
    assert (found["errors_total{}"], found["frames_cut_total{}"]) == (3, 6)


def write_as_a_worker(number: int) -> None:
    """In a process of its own, which the client has looked for at its import."""
    app = web.Application()
    setup(app, radar=Radar())
    for _ in range(3):
        export(app, registry=CollectorRegistry())
    export(app)
    for _ in range(2):
        tell(app, number)


def test_workers_are_added_up(tmp_path: pathlib.Path) -> None:
    """And what one has exported to several registries is counted once."""
    for number in (3, 2):
        subprocess.run(
            [
                sys.executable,
                "-c",
                f"from {__name__} import write_as_a_worker as w; w({number})",
            ],
            check=True,
            cwd=pathlib.Path(__file__).parent.parent,
            env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
        )
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))  # type: ignore[no-untyped-call]
    assert scrape(registry, documented=False) == shown(5, 30.0)
