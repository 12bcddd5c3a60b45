"""CPU time a request, beside bare aiohttp and a middleware that does nothing.

Each way is fed the same bytes by turns, in one process and without a socket; the
median of many batches counts, the collector's work included.  Run it with the
aiohttp and the CPython that you have: ``python benchmarks/overhead.py``.
"""

import argparse
import asyncio
import gc
import platform
import statistics
import time
from typing import Any, Callable, Dict, List

import aiohttp
from aiohttp import web

from aiohttp_cyclebreak import Radar, cyclebreak, guard_server, setup


class Transport(asyncio.Transport):
    """Takes what is written, and counts it."""

    def __init__(self) -> None:
        super().__init__()
        self.writes = 0

    def write(self, data: Any) -> None:
        self.writes += 1

    def writelines(self, data: Any) -> None:
        self.writes += 1

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        pass


@web.middleware
async def idle(request: web.Request, handler: Any) -> web.StreamResponse:
    return await handler(request)  # type: ignore[no-any-return]


async def answer(request: web.Request) -> web.Response:
    return web.Response(text="ok")


async def refuse(request: web.Request) -> web.Response:
    raise web.HTTPBadRequest


async def receive(request: web.Request) -> web.Response:
    await request.read()
    return web.Response(text="ok")


WAYS: Dict[str, Callable[[web.Application], Any]] = {
    "bare": lambda app: None,
    "idle": lambda app: app.middlewares.append(idle),
    "cyclebreak()": lambda app: app.middlewares.append(cyclebreak()),
    "setup()": setup,
    "guard_server()": lambda app: None,
    "release_body": lambda app: setup(app, release_body=True),
    "radar": lambda app: setup(app, radar=Radar()),
}
REQUESTS = {
    "success": b"GET /ok HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "failure": b"GET /fail HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "upload": b"POST /body HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody",
}


async def connect(way: str) -> Any:
    app = web.Application()
    app.router.add_get("/ok", answer)
    app.router.add_get("/fail", refuse)
    app.router.add_post("/body", receive)
    WAYS[way](app)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    if way == "guard_server()":
        guard_server(runner)
    assert runner.server is not None
    protocol, transport = runner.server(), Transport()
    protocol.connection_made(transport)
    await asyncio.sleep(0)
    return protocol, transport


async def batch(protocol: Any, transport: Transport, data: bytes, size: int) -> float:
    """Microseconds a request."""
    start = time.process_time()
    for _ in range(size):
        writes = transport.writes
        protocol.data_received(data)
        while transport.writes == writes:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
    return (time.process_time() - start) / size * 1e6


async def main(batches: int, size: int, objects: int) -> None:
    ballast: List[Any] = [[] for _ in range(objects)]
    gc.collect()
    connections = {way: await connect(way) for way in WAYS}
    print(
        f"aiohttp {aiohttp.__version__} on CPython {platform.python_version()}, "
        f"{platform.machine()}, {len(ballast)} other objects; "
        "microseconds a request, and how many times bare"
    )
    for kind, data in REQUESTS.items():
        taken: Dict[str, List[float]] = {way: [] for way in WAYS}
        for _ in range(batches):
            for way, (protocol, transport) in connections.items():
                taken[way].append(await batch(protocol, transport, data, size))
        bare = statistics.median(taken["bare"])
        for way, times in taken.items():
            median = statistics.median(times)
            print(f"{kind:8} {way:15} {median:7.1f}  {median / bare:5.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=30)
    parser.add_argument("--size", type=int, default=500, help="requests a batch")
    parser.add_argument("--objects", type=int, default=0, help="others kept alive")
    asyncio.run(main(**vars(parser.parse_args())))
