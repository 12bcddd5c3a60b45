"""How much is left behind? Runs a leak against a real server and counts."""

import asyncio
import contextlib
import gc
import logging
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import (
    Any,
    Awaitable,
    Callable,
    Dict,
    Iterator,
    List,
    Optional,
    Sequence,
)

from aiohttp import web

from .client import client_cyclebreak
from .exceptions import mro_of
from .internals import CLOSES_LOST, body_size
from .leaks import Kind, Leak, Remedy, Step, Visit, gateway_of
from .middleware import cyclebreak
from .server import guard_server

__all__ = (
    "Count",
    "Floor",
    "collect_garbage",
    "lasts",
    "measure",
    "measure_floor",
    "quiet",
    "remedy",
    "requests_alive",
    "spin",
)

_TIMEOUT = 60.0  # seconds; only a hang is this long
_VISITS = 20  # of each kind, unless said otherwise


@dataclass(frozen=True)
class Count:
    """What was left after all clients had gone.

    Attributes:
        connections: how many connections there were.
        requests: how many requests were served.
        left: requests still alive, the cyclic garbage collector being off; of a
            leak that is live, those that have a body and are in no cycle.
        permanent: those of them that a collection did not free.
        garbage: objects that only a collection freed, above asyncio's own.
    """

    connections: int
    requests: int
    left: int
    permanent: int
    garbage: int

    def left_as(self, kind: Kind) -> int:
        """How many requests are left for this reason.

        Two leaks may differ by kind alone, so that other requests are not its own.
        """
        if kind is Kind.PERMANENT:
            return self.permanent
        if kind is Kind.LIVE:
            return self.left
        return self.left - self.permanent

    def shows(self, kind: Kind) -> bool:
        """Whether a leak of this kind occurred, with requests or without any."""
        without_requests = kind is Kind.DELAYED and not self.left and self.garbage > 0
        return self.left_as(kind) > 0 or without_requests

    @property
    def is_clean(self) -> bool:
        """Whether nothing is left, of any kind."""
        return not (self.left or self.permanent or self.garbage)


@dataclass(frozen=True)
class Floor:
    """Objects of cyclic garbage that are made without aiohttp.

    Attributes:
        closed: by asyncio for each connection that the client closes.
        reset: by asyncio for each connection that the client resets.
        outgoing: by asyncio for each connection to another service.
    """

    closed: float
    reset: float
    outgoing: float

    def of(self, visits: Sequence[Visit], times: int, outgoing: int) -> int:
        """What is made when visits are paid so many times, with such connections."""
        each = sum(
            self.reset if Step.RESET in steps else self.closed for steps in visits
        )
        return round(each * times + self.outgoing * outgoing)


class _Client:
    """A blocking socket: it makes no cycles of its own, and no transport does."""

    def __init__(
        self,
        port: int,
        begun: Callable[[], int] = lambda: 0,
        is_unread: Callable[[], bool] = lambda: True,
        is_accepted: Callable[[], bool] = lambda: True,
    ) -> None:
        self._port = port
        self._begun = begun
        self._is_unread = is_unread
        self._is_accepted = is_accepted
        # One thread: the default executor starts more of them as it goes.
        self._thread = ThreadPoolExecutor(1)
        self._staying: List[socket.socket] = []

    async def pay(self, steps: Visit) -> None:
        """Pay one visit, while the loop goes on serving."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self.visit, steps)

    def leave(self) -> None:
        """Close the connections that were left open."""
        while self._staying:
            self._staying.pop().close()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def visit(self, steps: Visit) -> None:
        begun = self._begun()
        sent = 0
        address = ("127.0.0.1", self._port)
        with contextlib.ExitStack() as stack:
            sock = stack.enter_context(socket.create_connection(address, _TIMEOUT))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            received = b""
            for step in steps:
                if isinstance(step, bytes):
                    sock.sendall(step)
                    sent += 1
                elif step is Step.ANSWER:
                    received = self._answer(sock, received)
                elif step is Step.BYTES:
                    sock.recv(65536)
                elif step is Step.BEGUN:
                    self._wait(partial(self._have_begun, begun + sent), step)
                elif step is Step.ACCEPTED:
                    self._wait(self._is_accepted, step)
                elif step is Step.UNREAD:
                    self._wait(self._is_unread, step)
                elif step is Step.STAY:
                    self._staying.append(sock)
                    stack.pop_all()
                elif step is Step.RESET:
                    linger = struct.pack("ii", 1, 0)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    def _have_begun(self, requests: int) -> bool:
        return self._begun() >= requests

    @staticmethod
    def _wait(is_so: Callable[[], bool], step: Step) -> None:
        deadline = time.monotonic() + _TIMEOUT
        while not is_so():
            if time.monotonic() > deadline:
                raise TimeoutError(f"in vain: {step.value}")
            time.sleep(0.0005)

    @staticmethod
    def _answer(sock: socket.socket, received: bytes) -> bytes:
        """Read one response; return what came after it."""
        while b"\r\n\r\n" not in received:
            chunk = sock.recv(65536)
            if not chunk:
                raise ConnectionError(
                    f"closed in the middle of an answer: {received!r}"
                )
            received += chunk
        head, _, body = received.partition(b"\r\n\r\n")
        length = 0
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        while len(body) < length:
            chunk = sock.recv(65536)
            if not chunk:
                raise ConnectionError("closed in the middle of a body")
            body += chunk
        return body[length:]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep log records of expected errors from being printed, or held by a handler."""
    loggers = [logging.getLogger(name) for name in ("aiohttp", "asyncio")]
    states = [(each.propagate, each.handlers[:]) for each in loggers]
    for each in loggers:
        each.propagate = False
        each.handlers[:] = [logging.NullHandler()]
    try:
        yield
    finally:
        for each, (propagate, handlers) in zip(loggers, states):
            each.propagate = propagate
            each.handlers[:] = handlers


@contextlib.contextmanager
def _collector_off() -> Iterator[None]:
    """Switch the cyclic garbage collector off, and see only what is new."""
    enabled = gc.isenabled()
    frozen = gc.get_freeze_count()
    gc.collect()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        if not frozen:  # or somebody else froze more than this
            gc.unfreeze()
        if enabled:
            gc.enable()


def _collect() -> int:
    """Collect, and count the objects that only a collection freed.

    What :func:`gc.collect` returns has the weak references in it that it called
    back.  An event loop has one for each file descriptor that a transport had, and
    how many those were is a matter of timing.
    """
    garbage = len(collect_garbage())
    gc.collect()
    return garbage


def collect_garbage() -> List[Any]:
    """Collect, and give what only that has freed.

    It goes once the list goes, by another collection.
    """
    flags = gc.get_debug()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
    finally:
        gc.set_debug(flags)
    garbage = gc.garbage[:]
    gc.garbage.clear()
    return garbage


def requests_alive() -> List[web.BaseRequest]:
    """The requests that are there."""
    # Not isinstance(): the class is abstract, and remembers whom it is asked about; and
    # a proxy may answer for its class with an error.  By id: a metaclass may compare
    # its classes as it likes.
    wanted = id(web.BaseRequest)
    return [each for each in gc.get_objects() if wanted in map(id, mro_of(type(each)))]


async def _settle(busy: Callable[[], Any], tasks: "set[asyncio.Task[Any]]") -> None:
    """Wait until every connection is gone and every task that it started is done."""
    deadline = time.monotonic() + _TIMEOUT
    while busy() or asyncio.all_tasks() - tasks:
        if time.monotonic() > deadline:
            raise TimeoutError(f"still busy: {asyncio.all_tasks() - tasks!r}")
        await asyncio.sleep(0.001)
    await spin()


def lasts(steps: Visit) -> bool:
    """Whether a connection may last until everything is counted."""
    return Step.STAY in steps or Step.LEAVE in steps


async def spin() -> None:
    """Let the loop do what it has been given, and what that gives it."""
    for _ in range(10):
        await asyncio.sleep(0)


def _listen() -> socket.socket:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return sock


def _is_unread(server: web.Server) -> bool:
    """Whether a server has more to send than the buffers of a connection take."""
    transports: Any = [each.transport for each in server.connections]
    return any(each and each.get_write_buffer_size() for each in transports)


def _is_reading(server: web.Server) -> bool:
    """Whether a server reads from a connection, and so is to see that it is closed."""
    transports: Any = [each.transport for each in server.connections]
    return any(each and each.is_reading() for each in transports)


def remedy(leak: Leak) -> "Dict[str, Callable[[Any], Any]]":
    """What stops a leak, as arguments for :func:`measure`."""
    if leak.remedy is Remedy.SERVER:
        return {"guard_runner": guard_server}
    middleware = cyclebreak()

    def guard(app: web.Application) -> None:
        app.middlewares.append(middleware)
        gateway = gateway_of(app)
        if gateway is not None:
            gateway.trace_configs.append(client_cyclebreak())

    return {"guard": guard}


async def measure(
    leak: Leak,
    floor: Floor,
    guard: Optional[Callable[[web.Application], Any]] = None,
    guard_runner: Optional[Callable[[web.AppRunner], Any]] = None,
    visits: int = _VISITS,
) -> Count:
    """Run one leak against a real server on loopback and count what is left.

    Args:
        leak: what to run.
        floor: what asyncio leaves by itself, measured in the same process.
        guard: called with the application before it is set up.
        guard_runner: called with the runner once it is set up.
        visits: how often each of the leak's visits is paid.

    Returns:
        What was left after all clients had gone.
    """
    app = web.Application()
    leak.build(app)
    if guard is not None:
        guard(app)
    runner = web.AppRunner(app)
    with quiet():
        await runner.setup()
        if guard_runner is not None:
            guard_runner(runner)
        sock = _listen()
        await web.SockSite(runner, sock).start()
        server = runner.server
        assert server is not None
        client = _Client(
            sock.getsockname()[1],
            lambda: server.requests_count,
            partial(_is_unread, server),
            lambda: bool(server.connections),
        )
        tasks = set(asyncio.all_tasks())
        busy = partial(getattr, server, "connections")
        gateway = gateway_of(app)

        async def visit(times: int) -> None:
            for _ in range(times):
                for steps in leak.visits:
                    await client.pay(steps)
                    if lasts(steps):
                        await spin()
                        if Step.LEAVE in steps:
                            await _settle(
                                partial(_is_reading, server), asyncio.all_tasks()
                            )
                    else:
                        await _settle(busy, tasks)

        async def end() -> None:
            client.leave()
            await spin()
            if any(Step.LEAVE in steps for steps in leak.visits):
                for connection in server.connections:
                    connection.force_close()
            await _settle(busy, tasks)

        try:
            await visit(1)  # fills the caches
            await end()
            with _collector_off():
                before = server.requests_count
                outgoing = gateway.connections if gateway is not None else 0
                alive = len(requests_alive())
                await visit(visits)
                left = len(requests_alive()) - alive
                garbage = _collect()
                if leak.kind is Kind.LIVE:
                    left = sum(body_size(each) > 0 for each in requests_alive())
                    await end()
                    garbage += _collect()
                # What was collected may have put its finalizers into the loop.
                await _settle(busy, tasks)
                gc.collect()
                permanent = len(requests_alive()) - alive
            if gateway is not None:
                outgoing = gateway.connections - outgoing
            return Count(
                connections=visits * len(leak.visits),
                requests=server.requests_count - before,
                left=left,
                permanent=permanent,
                garbage=max(0, garbage - floor.of(leak.visits, visits, outgoing)),
            )
        finally:
            await runner.cleanup()
            client.close()


async def measure_floor() -> Floor:
    """Count the cyclic garbage of connections that have nothing to do with aiohttp."""
    loop = asyncio.get_running_loop()
    open_connections = set()

    class Protocol(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport
            open_connections.add(id(self))

        def data_received(self, data: bytes) -> None:
            self.data = data

        def connection_lost(self, exc: Optional[BaseException]) -> None:
            if CLOSES_LOST:
                self.transport.close()
            open_connections.discard(id(self))

    sock = _listen()
    server = await loop.create_server(Protocol, sock=sock)
    client = _Client(sock.getsockname()[1], is_accepted=lambda: bool(open_connections))
    tasks = set(asyncio.all_tasks())

    async def count(times: int, visit: Callable[[], Awaitable[None]]) -> float:
        with _collector_off():
            for _ in range(times):
                await visit()
                await _settle(lambda: open_connections, tasks)
            return _collect() / times

    async def call_out() -> None:
        transport, _ = await loop.create_connection(Protocol, *sock.getsockname())
        await _settle(lambda: len(open_connections) < 2, tasks)  # until both ends are
        transport.close()

    closing: Visit = (b"x", Step.ACCEPTED)
    try:
        await count(1, partial(client.pay, closing))
        await count(1, call_out)
        closed = await count(_VISITS, partial(client.pay, closing))
        return Floor(
            closed=closed,
            reset=await count(_VISITS, partial(client.pay, (*closing, Step.RESET))),
            outgoing=await count(_VISITS, call_out) - closed,
        )
    finally:
        client.close()
        server.close()
        await server.wait_closed()
