"""Record what Prometheus would see of three services, for the alerts and the charts.

``python -m tests.record_series`` serves each of them in a process of its own for
fifteen minutes, with the same requests, scrapes them every 15 seconds and writes
``recorded_series.json`` and ``alerts_test.yml`` in ``docs/examples``; with ``--minutes
0`` only the second, from what was recorded before.

- ``guarded``: refuses uploads, beside a radar and its metrics.
- ``leaking``: the same, and keeps one request in ten in a list; its ``on_break`` fails.
- ``bare``: as the first, with ``AIOHTTP_CYCLEBREAK=off``.
"""

import argparse
import asyncio
import json
import os
import pathlib
import socket
import sys
import time
from typing import Any, Dict, List

import aiohttp
from aiohttp import web

EXAMPLES = pathlib.Path(__file__).parent.parent / "docs" / "examples"
RECORDED = EXAMPLES / "recorded_series.json"
TESTS = EXAMPLES / "alerts_test.yml"
SERVICES = ("guarded", "leaking", "bare")
INTERVAL = 15  # seconds between two scrapes
ALERTED = (  # of these, those that a rule asks for
    "aiohttp_cyclebreak_requests_o",
    "aiohttp_cyclebreak_errors_total",
    "python_gc_objects_collected_total",
)
METRICS = (
    "aiohttp_cyclebreak_requests_alive",
    "aiohttp_cyclebreak_requests_outlived",
    "aiohttp_cyclebreak_requests_overdue",
    "aiohttp_cyclebreak_oldest_overdue_request_age_seconds",
    "aiohttp_cyclebreak_severed_total",
    "aiohttp_cyclebreak_frames_cut_total",
    "aiohttp_cyclebreak_reports_total",
    "aiohttp_cyclebreak_errors_total",
    "python_gc_objects_collected_total",
    "python_gc_collections_total",
    "process_resident_memory_bytes",
)


def serve(name: str, port: int) -> None:
    """Serve one of them, until the process is ended."""
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

    from aiohttp_cyclebreak import Radar, setup
    from aiohttp_cyclebreak.prometheus import export

    kept: List[Any] = []

    async def upload(request: web.Request) -> web.Response:
        body = await request.read()
        await asyncio.sleep(0.1)
        raise web.HTTPUnprocessableEntity(text=f"no image: {len(body)} bytes")

    async def keep(request: web.Request) -> web.Response:
        if name == "leaking":
            kept.append(request)
        return web.Response(text="ok")

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(
            body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )

    def fail(event: Any) -> None:
        raise RuntimeError("on_break of this service")

    app = web.Application()
    setup(app, radar=Radar(), on_break=fail if name == "leaking" else None)
    export(app)
    app.router.add_post("/upload", upload)
    app.router.add_get("/keep/{name}", keep)
    app.router.add_get("/metrics", metrics)
    web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None)


async def ask_for_ever(session: aiohttp.ClientSession, url: str) -> None:
    number = 0
    while True:
        number += 1
        if number % 10:
            async with session.post(url + "/upload", data=bytes(20_000)) as answer:
                await answer.read()
        else:
            async with session.get(f"{url}/keep/{number}") as answer:
                await answer.read()
        await asyncio.sleep(0.2)


async def scrape(session: aiohttp.ClientSession, url: str) -> Dict[str, float]:
    from prometheus_client.parser import text_string_to_metric_families

    async with session.get(url + "/metrics") as answer:
        text = await answer.text()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in METRICS:
                labels = ",".join(
                    f'{k}="{v}"' for k, v in sorted(sample.labels.items())
                )
                found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


async def record(minutes: float, ports: List[int]) -> Dict[str, Any]:
    series: Dict[str, Dict[str, List[Any]]] = {name: {} for name in SERVICES}
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "tests.record_series", "--serve", name, "--port", str(port)),
            env={
                **os.environ,
                "AIOHTTP_CYCLEBREAK": "off" if name == "bare" else "on",
            },
        )
        for name, port in zip(SERVICES, ports)
    ]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    clients: List[asyncio.Task[None]] = []
    connector = aiohttp.TCPConnector(limit=0)
    try:
        async with aiohttp.ClientSession(connector=connector) as session:
            for url in urls:
                while True:
                    try:
                        await scrape(session, url)
                        break
                    except aiohttp.ClientError:
                        await asyncio.sleep(0.1)
            clients += [
                asyncio.ensure_future(ask_for_ever(session, url))
                for url in urls
                for _ in range(10)
            ]
            samples = int(minutes * 60 / INTERVAL)
            began = time.monotonic()
            for number in range(samples):
                await asyncio.sleep(began + number * INTERVAL - time.monotonic())
                for name, url in zip(SERVICES, urls):
                    for key, value in (await scrape(session, url)).items():
                        values = series[name].setdefault(key, [None] * number)
                        values.append(value)
            for client in clients:
                client.cancel()
            await asyncio.wait(clients)
    finally:
        for process in processes:
            process.terminate()
            await process.wait()
    return {
        "made_with": f"CPython {sys.version.split()[0]}, aiohttp {aiohttp.__version__}",
        "interval": INTERVAL,
        "services": series,
    }


# Which alerts fire in the end.
FIRING = {
    "bare": ["CollectorPressure"],
    "guarded": [],
    "leaking": ["CyclebreakErrors", "LiveRequestsGrow", "RequestsOverdue"],
}


def tests_of_alerts(recorded: Dict[str, Any]) -> str:
    """What ``promtool test rules`` is to find, given what was recorded."""
    lines = [
        "# Written by python -m tests.record_series: see there for the services.",
        f"# {recorded['made_with']}; check with: promtool test rules alerts_test.yml",
        "rule_files: [alerts.yml]",
        f"evaluation_interval: {recorded['interval']}s",
        "tests:",
        f"  - interval: {recorded['interval']}s",
        "    input_series:",
    ]
    samples = 0
    for instance, series in recorded["services"].items():
        for key, values in series.items():
            name, _, labels = key.partition("{")
            if not name.startswith(ALERTED):
                continue
            samples = max(samples, len(values))
            labels = f'{{instance="{instance}",{labels}'.replace(",}", "}")
            numbers = " ".join("_" if each is None else f"{each:g}" for each in values)
            lines += [f"      - series: '{name}{labels}'", f"        values: {numbers}"]
    lines.append("    promql_expr_test:")
    expression = (
        'count by (instance, alertname) (ALERTS{alertstate="firing",instance="%s"})'
    )
    for instance, firing in FIRING.items():
        lines += [
            f"      - expr: '{expression % instance}'",
            f"        eval_time: {(samples - 1) * recorded['interval']}s",
            "        exp_samples:" + ("" if firing else " []"),
        ]
        for alert in firing:
            labels = f'{{instance="{instance}",alertname="{alert}"}}'
            lines += [f"          - labels: '{labels}'", "            value: 1"]
    return "\n".join(lines) + "\n"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--serve", choices=SERVICES)
    parser.add_argument("--port", type=int, nargs="*", default=[])
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.port[0])
        return
    if arguments.minutes == 0:
        recorded = json.loads(RECORDED.read_text())
        TESTS.write_text(tests_of_alerts(recorded))
        return
    ports = arguments.port or [free_port() for _ in SERVICES]
    recorded = asyncio.run(record(arguments.minutes, ports))
    RECORDED.write_text(json.dumps(recorded) + "\n")
    TESTS.write_text(tests_of_alerts(recorded))


if __name__ == "__main__":
    main()
