"""What the pages on the radar and the metrics show, run as they show it."""

import asyncio
import importlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from typing import Any, Dict, List, Set

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from aiohttp_cyclebreak import Radar
from aiohttp_cyclebreak.radar import watch_of

from .service import run, serve, spin
from .test_examples import EXAMPLES, ask, gunicorn
from .test_prometheus import Application
from .test_radar import logged

PROMTOOL = shutil.which("promtool")


def _chain_lines(text: str) -> List[str]:
    """What a report says of this service's own file and module."""
    text = re.sub(r"\(.*/(?=three_leaks)", "(", text.replace("__main__", "three_leaks"))
    return [line for line in text.splitlines() if "three_leaks" in line]


def test_three_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is found, and named: by its route, its file and its variable."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    three_leaks = importlib.import_module("three_leaks")

    async def main() -> None:
        radar = Radar(interval=1e6, budget=60_000, max_pause=10_000)
        app = three_leaks.create_app(radar)
        watch = watch_of(app)
        assert watch is not None
        async with serve(app) as service:
            for number in range(3):
                for path in ("/visits", f"/report/{number}", "/mail"):
                    assert (await service.ask(path))[0] == 200
            assert service.runner.server is not None
            while service.runner.server.connections:
                await asyncio.sleep(0.001)
            await spin()
            now = time.monotonic()
            for later in (0.0, 31.0, 92.0, 153.0, 214.0):
                await watch.look(now + later)
            found = watch.stats(now + 214.0)
            assert found.overdue == {"/visits": 3, "/report/{number}": 3, "/mail": 3}

    with logged() as messages:
        run(main())
    three_leaks.visits.clear()
    reports = {
        re.findall(r"One of (\S+) is", message)[0]: message for message in messages
    }
    assert len(messages) == len(reports) == 3
    assert "module three_leaks: global 'visits'" in reports["/visits"]
    assert "closure over 'cache'" in reports["/report/{number}"]
    assert "three_leaks.py:" in reports["/report/{number}"]
    mail = reports["/mail"]
    assert re.search(
        r"(coroutine|frame of) send_mail \(.*three_leaks.py:\d+\): "
        r"local variable 'request'",
        mail,
    )
    assert "held by something that is not over" in mail
    if sys.version_info < (3, 11):  # a coroutine and its frame are two objects there
        return
    told = "\n".join(_chain_lines("\n".join(messages)))
    for line in _chain_lines((EXAMPLES / "three_leaks.txt").read_text()):
        assert line in told  # what the page shows


def _metrics_of(text: str) -> Dict[str, float]:
    return {
        f"{sample.name}{sorted(sample.labels.items())}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def _scrape(port: int) -> Dict[str, float]:
    url = f"http://127.0.0.1:{port}/metrics"
    with urllib.request.urlopen(url, timeout=120) as answer:
        return _metrics_of(answer.read().decode())


@pytest.mark.processes
def test_gunicorn_workers_are_added_up(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One scrape has the numbers of both; those of one that has died are taken off."""
    pytest.importorskip("gunicorn")
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    with gunicorn("-c", "gunicorn_metrics.py", "metrics_app:create_app") as (
        master,
        port,
    ):
        _wait_for_workers(tmp_path, 2)
        _scrape(port)
        kept: Dict[int, int] = {}  # by worker
        while len(kept) < 2 or sum(kept.values()) < 20:
            worker = ask(port, "/keep/x")["worker"]
            kept[worker] = kept.get(worker, 0) + 1
        for _ in range(30):
            assert ask(port, "/refuse") == 400
        bad_request = "aiohttp.web_exceptions.HTTPBadRequest"
        severed = (
            "aiohttp_cyclebreak_severed_total"
            f"[('exception', '{bad_request}'), ('route', '/refuse')]"
        )
        outlived = "aiohttp_cyclebreak_requests_outlived[]"
        _until(port, {severed: 30, outlived: sum(kept.values())})

        victim, other = kept
        os.kill(victim, signal.SIGKILL)
        _wait_for_workers(tmp_path, 3)
        _until(port, {severed: 30, outlived: kept[other]})
        master.send_signal(signal.SIGTERM)
        output, _ = master.communicate(timeout=60)
        assert "Traceback" not in output


def _wait_for_workers(folder: pathlib.Path, number: int) -> None:
    """Wait until so many have made their files, those that have died included.

    prometheus_client makes each empty at first, and fails if it is read at that very
    moment.  That of the counters is a worker's last.
    """
    for _ in range(600):
        sizes = [each.stat().st_size for each in folder.glob("counter_*.db")]
        if len(sizes) == number and all(sizes):
            return
        time.sleep(0.05)
    raise AssertionError(sizes)


def _until(port: int, expected: Dict[str, float]) -> None:
    """Scrape until it is so: the radars look once a second."""
    found: Dict[str, Any] = {}
    for _ in range(600):
        try:
            scraped = _scrape(port)
        except OSError:  # a connection to the worker that was killed
            continue
        found = {name: scraped.get(name) for name in expected}
        if found == expected:
            return
        time.sleep(0.05)
    assert found == expected


# What the rules and the dashboard ask for.


def _names(expression: str) -> Set[str]:
    without_strings = re.sub(r'"[^"]*"', "", expression)
    return set(re.findall(r"\b(?:aiohttp|process|python)_\w+", without_strings))


@pytest.fixture(scope="module")
def existing() -> Set[str]:
    """The names of the metrics of a service that has an overdue request."""

    async def main() -> Set[str]:
        registry = CollectorRegistry()
        mine = Application(registry)
        async with mine.serve() as service:
            await mine.ask(service, "/keep/a", "/refuse")
            await mine.look()
            await mine.look(31.0)
            text = (generate_latest(registry) + generate_latest(REGISTRY)).decode()
        return {
            sample.name
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    found: Set[str] = run(main())
    return found


def test_every_metric_of_the_dashboard_exists(existing: Set[str]) -> None:
    """And there is one panel at least for each of ours."""
    dashboard = json.loads((EXAMPLES / "grafana_dashboard.json").read_text())
    expressions = [
        target["expr"] for panel in dashboard["panels"] for target in panel["targets"]
    ]
    names = set().union(*map(_names, expressions))
    assert names <= existing
    ours = {
        name
        for name in existing
        if name.startswith("aiohttp_") and not name.endswith("_created")
    }
    assert ours <= names


def test_every_metric_of_the_alerts_exists(existing: Set[str]) -> None:
    """The rules ask for nothing that is never exported."""
    names = _names((EXAMPLES / "alerts.yml").read_text()) - {"aiohttp_cyclebreak"}
    assert names
    assert names <= existing


def _promtool(*arguments: str) -> "subprocess.CompletedProcess[str]":
    if PROMTOOL is None:
        pytest.skip("NOT CHECKED: there is no promtool (Debian package prometheus)")
    return subprocess.run(
        [PROMTOOL, *arguments], capture_output=True, text=True, cwd=EXAMPLES
    )


@pytest.mark.processes
def test_the_alerts_fire_on_recorded_series() -> None:
    """Promtool finds that they do for the leaking service, and not for the guarded."""
    checked = _promtool("check", "config", "prometheus.yml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    tested = _promtool("test", "rules", "alerts_test.yml")
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.processes
def test_promtool_would_find_what_is_wrong(tmp_path: pathlib.Path) -> None:
    """With the guarded service's series for the leaking one's, the tests fail."""
    shutil.copy(EXAMPLES / "alerts.yml", tmp_path)
    text = (EXAMPLES / "alerts_test.yml").read_text()
    swapped = re.sub(
        r"(series: .*instance=\")(guarded|leaking)",
        lambda match: match[1] + {"guarded": "leaking", "leaking": "guarded"}[match[2]],
        text,
    )
    assert swapped != text
    path = tmp_path / "alerts_test.yml"
    path.write_text(swapped)
    tested = _promtool("test", "rules", str(path))
    assert tested.returncode != 0
    assert "LiveRequestsGrow" in tested.stdout + tested.stderr


def test_the_tests_of_the_alerts_are_of_the_recorded_series() -> None:
    """Nobody has written them by hand."""
    record_series = importlib.import_module("tests.record_series")
    recorded = json.loads(record_series.RECORDED.read_text())
    written = (EXAMPLES / "alerts_test.yml").read_text()
    assert record_series.tests_of_alerts(recorded) == written
