"""A long run: what grows with requests, and does it go on growing?

Not collected by pytest; ``nox -s soak`` runs it: 200,000 mixed requests from another
process, 1,000 concurrent requests that fail, and 5,000 connections that stay open.
It compares the end of the first tenth of the long run with the end of the last, and
exits with 1 where something has grown; the collector runs at the tenths only.
``--bare`` runs the same without the library, to compare.
"""

import argparse
import asyncio
import contextlib
import gc
import logging
import multiprocessing
import resource
import socket
import struct
import sys
import time
from typing import Any, List, NamedTuple, Tuple

import aiohttp
from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from aiohttp_cyclebreak import callers, complaints, connections, guard_server, holders

from .service import LOOPS, Client, run, start
from .test_hostile_clients import TEXT_FRAME, UPGRADE, get, post
from .test_interleavings import ANSWERS, Application

CLIENTS = 8  # connections at a time, from the other process
BODY = b"x" * 70_000
COUNTED = (web.BaseRequest, web.StreamResponse, RequestHandler, BaseException)
CONTAINERS = (
    connections.followed_connections,
    connections.settled_connections,
    connections.keeping_connections,
    connections.undecided_connections,
    callers._callers,
    holders.in_hand,
    holders.pending,
)

# One round of each client: what it sends, and what that is.
ROUND: Tuple[Tuple[bytes, str], ...] = (
    (get("/succeed"), "succeed"),
    (get("/hold"), "hold"),
    (get("/missing"), "missing"),
    (get("/redirect"), "redirect"),
    (post("/upload", len(BODY)) + BODY, "upload"),
    (get("/chain"), "chain"),
    (get("/share"), "share"),
    (get("/late"), "late"),
    (post("/refuse", len(BODY)) + BODY, "refuse"),
    (get("/succeed") + get("/hold"), "pipelined"),
    (post("/upload", len(BODY)) + BODY[:100], "reset"),
    (UPGRADE + TEXT_FRAME, "websocket"),
    (get("/fail"), "fail"),
    (b"no HTTP\r\n\r\n", "malformed"),
)
REQUESTS_A_ROUND = len(ROUND) + 1  # two are pipelined


class Sample(NamedTuple):
    """What there is at one moment of a run in which nothing else is collected."""

    requests: int
    alive: Tuple[int, ...]  # of COUNTED, before the collection
    tracked: int  # objects, after it
    resident: int  # KiB, after it
    containers: Tuple[int, ...]  # of the library: CONTAINERS, and its complaints

    @classmethod
    def take(cls, requests: int) -> "Sample":
        found = dict.fromkeys(COUNTED, 0)
        for each in gc.get_objects():
            for counted in COUNTED:
                found[counted] += issubclass(type(each), counted)
        gc.collect()
        return cls(
            requests,
            tuple(found.values()),
            len(gc.get_objects()),
            resident_size(),
            (*map(len, CONTAINERS), len(complaints._complaints)),
        )


def resident_size() -> int:
    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[1])
    return pages * resource.getpagesize() // 1024


class Connection:
    """A blocking client in a process of its own."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.sock: Any = None
        self.received = b""

    def connect(self) -> None:
        if self.sock is None:
            self.sock = socket.create_connection(("127.0.0.1", self.port), 60)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.received = b""

    def close(self, reset: bool = False) -> None:
        if reset:
            linger = struct.pack("ii", 1, 0)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.sock.close()
        self.sock = None

    def answer(self) -> int:
        while b"\r\n\r\n" not in self.received:
            self.more()
        head, _, self.received = self.received.partition(b"\r\n\r\n")
        length = 0
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        while len(self.received) < length:
            self.more()
        self.received = self.received[length:]
        return int(head.split()[1])

    def more(self) -> None:
        chunk = self.sock.recv(65536)
        if not chunk:
            raise ConnectionError("the server closed the connection")
        self.received += chunk

    def visit(self, sent: bytes, name: str) -> None:
        self.connect()
        self.sock.sendall(sent)
        expected: List[int] = []
        if name == "pipelined":
            expected = [ANSWERS["succeed"][0], ANSWERS["hold"][0]]
        elif name == "websocket":
            expected = [101]
        elif name == "malformed":
            expected = [400]
        elif name != "reset":
            expected = [ANSWERS[name][0]]
        for status in expected:
            answered = self.answer()
            if answered != status:
                raise AssertionError(f"{name}: {answered}, not {status}")
        if name in ("reset", "websocket"):
            self.close(reset=True)
        elif name in ("fail", "malformed", "refuse"):
            self.close()


def load(port: int, rounds: int, started: Any) -> None:
    """What the other process does: so many rounds, with some connections in turn."""
    started.wait()
    connections = [Connection(port) for _ in range(CLIENTS)]
    for number in range(rounds):
        # They are out of step, so that what fails overlaps with what is open.
        for step, connection in enumerate(connections):
            connection.visit(*ROUND[(number + step) % len(ROUND)])
    for connection in connections:
        if connection.sock is not None:
            connection.close()


@contextlib.asynccontextmanager
async def serving(bare: bool) -> Any:
    runner = web.AppRunner(Application().make(), access_log=None)
    await runner.setup()
    if not bare:
        guard_server(runner, release_body=False)
    service = await start(runner, backlog=4096)
    try:
        yield service
    finally:
        await runner.cleanup()


async def soak(requests: int, bare: bool) -> List[Sample]:
    """Serve the long run; take a sample at each tenth of it."""
    samples: List[Sample] = []
    context = multiprocessing.get_context("spawn")
    visits = requests * len(ROUND) // REQUESTS_A_ROUND
    rounds = visits // CLIENTS + 1
    gc.disable()
    async with serving(bare) as service:
        server = service.runner.server
        started = context.Event()
        process = context.Process(target=load, args=(service.port, rounds, started))
        process.start()
        started.set()
        while process.is_alive():
            if server.requests_count >= len(samples) * requests // 10:
                samples.append(Sample.take(server.requests_count))
                print(*samples[-1], sep="\t", flush=True)
            await asyncio.sleep(0.02)
        process.join()
        if process.exitcode:
            raise SystemExit("a client was not answered as it should have been")
        await service.settle()
        samples.append(Sample.take(server.requests_count))
        print(*samples[-1], sep="\t", flush=True)
    gc.enable()
    return samples


def grown(samples: List[Sample]) -> List[str]:
    """What is more at the end than it was after the first tenth."""
    start, first, last = samples[0], samples[1], samples[-1]
    wrong = []
    # Each client has one request at work, and perhaps one that has just been answered.
    most = max(sample.alive[0] for sample in samples)
    if most > 4 * CLIENTS:
        wrong.append(f"{most} requests waited for the collector")
    # All connections are gone at the end: nothing of them may wait for a collection.
    for name, number in zip((each.__name__ for each in COUNTED[:3]), last.alive):
        if number:
            wrong.append(f"{number} of {name} are left")
    if any(last.containers[:-1]):
        wrong.append(f"entries are left in the library's containers: {last.containers}")
    if complaints._complaints:
        wrong.append(f"it complained: {complaints._complaints}")
    # The first tenth fills caches.  What grows with the requests grows nine times as
    # much in the other nine; a third of that is taken for growth.
    for name in ("tracked", "resident"):
        filled = getattr(first, name) - getattr(start, name)
        more = getattr(last, name) - getattr(first, name)
        if more > 3 * max(filled, 0):
            wrong.append(f"{name}: {filled} more in the first tenth, then {more} more")
    return wrong


def raise_the_limit() -> None:
    """Both ends of every connection are in this process."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def many(number: int, paths: Tuple[str, ...], stay: bool, bare: bool) -> str:
    """Let many clients ask at once; all are answered, and what is kept is counted."""
    async with serving(bare) as service:
        await service.ask("/succeed")
        await service.settle()
        gc.collect()
        gc.disable()
        gc.freeze()
        try:
            clients: List[Client] = [await service.connect() for _ in range(number)]
            for client, name in zip(clients, paths * number):
                await client.get(f"/{name}")
            for client, name in zip(clients, paths * number):
                status, _ = await client.answer()
                assert status == ANSWERS[name][0], (name, status)
            server = service.runner.server
            if stay:
                assert len(server.connections) == number
            kept = requests_alive()
            followed = len(connections.followed_connections)
            for client in clients:
                client.close()
            await service.settle()
            left = requests_alive()
        finally:
            gc.unfreeze()
            gc.enable()
        gc.collect()
    containers = tuple(map(len, CONTAINERS))
    text = (
        f"{number} {'idle connections' if stay else 'at once'}: all answered; "
        f"requests alive {kept}, followed connections {followed}; "
        f"after all have gone {left} and {containers}"
    )
    if not bare:
        # A connection that is open keeps its last request, as aiohttp does.
        assert kept <= number, text
        assert not left, text
        assert not any(containers), text
    return text


def requests_alive() -> int:
    return sum(issubclass(type(each), web.BaseRequest) for each in gc.get_objects())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--concurrent", type=int, default=1_000)
    parser.add_argument("--connections", type=int, default=5_000)
    parser.add_argument("--loop", choices=LOOPS, default="asyncio")
    parser.add_argument("--bare", action="store_true")
    arguments = parser.parse_args()
    raise_the_limit()
    logging.disable(logging.CRITICAL)
    print("CPython", sys.version.split()[0], "aiohttp", aiohttp.__version__, end=" ")
    print(arguments.loop, "bare" if arguments.bare else "guarded")
    # First, while the process is small: what is freed later stays resident.
    print("requests\talive\ttracked\tresident/KiB\tcontainers")
    begun = time.monotonic()
    samples = run(soak(arguments.requests, arguments.bare), arguments.loop)
    print(f"{samples[-1].requests} requests in {time.monotonic() - begun:.0f} s")
    failing = ("hold", "fail", "chain", "share", "missing")
    for number, paths, stay in (
        (arguments.concurrent, failing, False),
        (arguments.connections, ("succeed", "hold", "missing", "share"), True),
    ):
        print(run(many(number, paths, stay, arguments.bare), arguments.loop))
    wrong = grown(samples)
    print("\n".join(wrong) or "flat")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
