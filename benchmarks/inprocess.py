"""Requests without a socket: a connection of aiohttp's that is fed bytes.

What is left of a request is the work of aiohttp and of the application.  A real one
costs the system calls as well, so that ratios come out higher here than there:
``keepalive.py`` has those.  Differences are the same.
"""

import asyncio
import gc
import random
import time
from itertools import cycle, islice
from typing import Any, Dict, Iterator, List, Sequence

from aiohttp import web
from ways import start_runner


class Transport(asyncio.Transport):
    """Takes what is written, and tells when that was an answer."""

    def __init__(self) -> None:
        super().__init__()
        self.writes = 0
        self.closed = False

    def write(self, data: Any) -> None:
        self.writes += 1

    def writelines(self, data: Any) -> None:
        self.writes += 1

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True


async def answer(request: web.Request) -> web.Response:
    return web.Response(text="ok")


async def refuse(request: web.Request) -> web.Response:
    raise web.HTTPBadRequest


async def refuse_rows(request: web.Request) -> web.Response:
    """Refuse what was looked up already; the frame has the rows."""
    rows = [{"id": number, "tags": [number]} for number in range(150)]
    raise web.HTTPBadRequest(text=f"{len(rows)} rows")


async def receive(request: web.Request) -> web.Response:
    await request.read()
    return web.Response(text="ok")


async def refuse_upload(request: web.Request) -> web.Response:
    await request.read()
    raise web.HTTPBadRequest


REQUESTS = {
    "success": b"GET /ok HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "failure": b"GET /fail HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "failure with rows": b"GET /rows HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "upload": b"POST /body HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody",
    "upload refused": (
        b"POST /refuse HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody"
    ),
}


class Connection:
    """A kept connection to a server."""

    def __init__(self, runner: web.AppRunner) -> None:
        assert runner.server is not None
        self._protocol: Any = runner.server()
        self._transport = Transport()
        self._protocol.connection_made(self._transport)

    async def ask(self, data: bytes) -> None:
        """Send a request, and wait for its answer and for what follows that."""
        transport = self._transport
        writes = transport.writes
        self._protocol.data_received(data)
        while transport.writes == writes:
            if transport.closed:
                raise ConnectionError("the server has closed the connection")
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    def close(self) -> None:
        self._protocol.connection_lost(None)


async def serve(way: str) -> web.AppRunner:
    """Make an application that is guarded in one of the WAYS."""
    app = web.Application()
    app.router.add_get("/ok", answer)
    app.router.add_get("/fail", refuse)
    app.router.add_get("/rows", refuse_rows)
    app.router.add_post("/body", receive)
    app.router.add_post("/refuse", refuse_upload)
    return await start_runner(app, way)


async def batch(connections: Iterator[Connection], kind: str, size: int) -> float:
    """Send requests, each on the next connection.

    Returns:
        Seconds of CPU time a request.  A collection of the younger generations is
        part of it: what one way leaves to the collector is not for the next to pay.
    """
    data = REQUESTS[kind]
    start = time.process_time()
    for connection in islice(connections, size):
        await connection.ask(data)
    gc.collect(1)
    return (time.process_time() - start) / size


async def by_turns(
    connections: Dict[str, Sequence[Connection]],
    kind: str,
    rounds: int,
    size: int,
    seed: int = 0,
) -> Dict[str, List[float]]:
    """Measure each way in every round, in another order each time.

    Returns:
        For each way its seconds of CPU time a request, one value a round.
    """
    order = random.Random(seed)
    taken: Dict[str, List[float]] = {way: [] for way in connections}
    turns = list(connections)
    next_ones = {way: cycle(connections[way]) for way in turns}
    for way in turns:
        await batch(next_ones[way], kind, size)
    for _ in range(rounds):
        order.shuffle(turns)
        for way in turns:
            taken[way].append(await batch(next_ones[way], kind, size))
    return taken
