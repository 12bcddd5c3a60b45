"""CPU time a successful outgoing call, beside a client session that traces nothing.

Sessions call one upstream, in another process, by turns, on kept connections: one
without any tracing, one with an empty ``TraceConfig``, one with
``client_cyclebreak()``.  They do it in a task of their own and in a guarded request,
and get the body with the headers, or with ``--later`` after them; the median of many
small batches counts.  ``python benchmarks/calls.py``.
"""

import argparse
import asyncio
import multiprocessing
import platform
import socket
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any, Dict, List

import aiohttp
from aiohttp import web

from aiohttp_cyclebreak import client_cyclebreak, setup

HEADERS = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"
BODY = b"ok"
LATER = 0.0005  # seconds after the headers, so that they are not read together


class Upstream(asyncio.Protocol):
    """Answers every segment that it is sent."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if data.startswith(b"GET /later "):
            self.transport.write(HEADERS)
            asyncio.get_running_loop().call_later(LATER, self.transport.write, BODY)
        else:
            self.transport.write(HEADERS + BODY)


def serve(ready: Connection) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Upstream, "127.0.0.1", 0)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


async def batch(session: aiohttp.ClientSession, url: str, size: int) -> float:
    """Microseconds a call."""
    start = time.process_time()
    for _ in range(size):
        async with session.get(url) as response:
            await response.read()
    return (time.process_time() - start) / size * 1e6


async def compare(
    where: str,
    sessions: Dict[str, aiohttp.ClientSession],
    url: str,
    batches: int,
    size: int,
) -> None:
    taken: Dict[str, List[float]] = {way: [] for way in sessions}
    turns = list(sessions.items())
    for _ in range(batches):
        turns.append(turns.pop(0))  # none is always the one after another
        for way, session in turns:
            taken[way].append(await batch(session, url, size))
    empty = taken["empty TraceConfig"]
    for way, times in taken.items():
        # Each with the batch beside it: what the machine does meanwhile cancels out.
        more = statistics.median(a - b for a, b in zip(times, empty))
        median = statistics.median(times)
        print(f"{where:9} {way:20} {median:7.1f}  {more:+5.1f}", flush=True)


async def main(port: int, batches: int, size: int, later: bool) -> None:
    url = f"http://127.0.0.1:{port}/{'later' if later else ''}"
    print(
        f"aiohttp {aiohttp.__version__} on CPython {platform.python_version()}, "
        f"{platform.machine()}; microseconds a call, and more than with an empty "
        "TraceConfig"
    )
    ways: Dict[str, Any] = {
        "no tracing": None,
        "empty TraceConfig": [aiohttp.TraceConfig()],
        "client_cyclebreak()": [client_cyclebreak()],
    }
    sessions = {
        way: aiohttp.ClientSession(trace_configs=traces) for way, traces in ways.items()
    }

    async def handle(request: web.Request) -> web.Response:
        await compare("a request", sessions, url, batches, size)
        return web.Response()

    app = web.Application()
    setup(app)
    app.router.add_get("/", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    await web.SockSite(runner, sock).start()
    try:
        await compare("a task", sessions, url, batches, size)
        async with aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None)
        ) as session, session.get(
            f"http://127.0.0.1:{sock.getsockname()[1]}/"
        ) as response:
            response.raise_for_status()
    finally:
        for each in sessions.values():
            await each.close()
        await runner.cleanup()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=3000)
    parser.add_argument("--size", type=int, default=2, help="calls a batch")
    parser.add_argument(
        "--later", action="store_true", help="the body after the headers"
    )
    args = parser.parse_args()
    here, there = multiprocessing.Pipe()
    process = multiprocessing.Process(target=serve, args=(there,), daemon=True)
    process.start()
    asyncio.run(main(here.recv(), args.batches, args.size, args.later))
    process.terminate()
