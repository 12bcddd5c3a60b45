"""What else could be done? Memory and pauses of each, under the same load.

A service with many live objects refuses uploads of clients that close their
connections, in a process of its own: bare, with ``gc.collect()`` on a timer, with
lower thresholds, and guarded.  With ``--close`` it is the server that closes them.
It runs on Linux, where the memory of a process is known.
"""

import argparse
import asyncio
import gc
import json
import os
import subprocess
import sys
import time
from typing import Any, Callable, Dict, List

from aiohttp import web

from aiohttp_cyclebreak import cyclebreak

BODY = 500_000  # bytes
HELD = 0.3  # seconds that a handler takes
LIVE = 500_000  # objects that the service has

_timers: "List[asyncio.Future[None]]" = []


def collect_every(seconds: float) -> Callable[[web.Application], None]:
    """Collect on a timer."""

    async def collect(app: web.Application) -> None:
        async def repeat() -> None:
            while True:
                await asyncio.sleep(seconds)
                gc.collect()

        _timers.append(asyncio.ensure_future(repeat()))

    return lambda app: app.on_startup.append(collect)


ALTERNATIVES: Dict[str, Callable[[web.Application], Any]] = {
    "bare": lambda app: None,
    "gc.collect() every second": collect_every(1),
    "gc.collect() every 10 seconds": collect_every(10),
    "gc.set_threshold(100, 2, 2)": lambda app: gc.set_threshold(100, 2, 2),
    "cyclebreak()": lambda app: app.middlewares.append(cyclebreak()),
}


def resident() -> int:
    """The bytes that this process has in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def refuse(request: web.Request) -> web.Response:
    """Read an upload, think about it, and refuse it."""
    await request.read()
    await asyncio.sleep(HELD)
    raise web.HTTPBadRequest(text="no")


async def serve(name: str) -> None:
    """Serve until the standard input ends; print the port, then what was measured."""
    live = [{"number": number} for number in range(LIVE)]
    app = web.Application(client_max_size=2 * BODY)
    app.router.add_post("/", refuse)
    ALTERNATIVES[name](app)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    gc.collect()
    pauses: List[float] = []

    def note(phase: str, info: Dict[str, int]) -> None:
        if phase == "start":
            pauses.append(-time.perf_counter())
        else:
            pauses[-1] += time.perf_counter()

    gc.callbacks.append(note)
    print(runner.addresses[0][1], flush=True)
    start = peak = resident()
    cpu = time.process_time()
    ended = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    while not ended.done():
        peak = max(peak, resident())
        await asyncio.sleep(0.01)
    gc.callbacks.remove(note)
    said = {
        "peak": peak - start,
        "cpu": time.process_time() - cpu,
        "collector": sum(pauses),
        "longest": max(pauses, default=0.0),
    }
    print(json.dumps(said), flush=True)
    await runner.cleanup()
    del live


async def load(port: int, requests: int, clients: int, close: bool) -> None:
    """Send the uploads, each on a connection of its own."""
    connection = "close" if close else "keep-alive"
    lines = [
        "POST / HTTP/1.1",
        "Host: localhost",
        f"Connection: {connection}",
        f"Content-Length: {BODY}",
        "",
        "",
    ]
    sent = "\r\n".join(lines).encode() + bytes(BODY)

    async def client(times: int) -> None:
        for _ in range(times):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            answer = await reader.readuntil(b"\r\n\r\nno")
            assert answer.startswith(b"HTTP/1.1 400"), answer
            writer.close()

    await asyncio.gather(*(client(requests // clients) for _ in range(clients)))


def measure(name: str, requests: int, clients: int, close: bool) -> str:
    """Measure one alternative; give a row of the table."""
    command = [sys.executable, __file__, "--serve", name]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        asyncio.run(load(port, requests, clients, close))
        said = json.loads(server.communicate()[0])
    return (
        f'"{name}", {said["peak"] / 2**20:.0f}, {1000 * said["longest"]:.0f}, '
        f"{said['collector']:.1f}, {said['cpu']:.1f}"
    )


def main() -> None:
    """Print a table, as CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--close", action="store_true")
    parser.add_argument("--serve", choices=ALTERNATIVES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        asyncio.run(serve(args.serve))
        return
    print('"", "peak, MiB", "longest collection, ms", "all collections, s", "CPU, s"')
    for name in ALTERNATIVES:
        print(measure(name, args.requests, args.clients, args.close), flush=True)


if __name__ == "__main__":
    main()
