"""A real server on loopback, and clients that are plain sockets."""

import asyncio
import contextlib
import gc
import logging
import socket
import struct
from typing import Any, AsyncIterator, Callable, Coroutine, Dict, List, Tuple

import aiohttp
from aiohttp import web

try:
    import uvloop
except ImportError:
    uvloop = None

AIOHTTP = tuple(int(part) for part in aiohttp.__version__.split(".")[:3])

LOOPS: Dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop
}
if uvloop is not None:
    LOOPS["uvloop"] = uvloop.new_event_loop

TIMEOUT = 30.0  # seconds, for a hang: nothing is measured by it

# The headers that ask for a websocket.
HANDSHAKE = (
    "Upgrade: websocket",
    "Connection: Upgrade",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)


def run(main: Coroutine[Any, Any, Any], loop: str = "asyncio") -> Any:
    """Run a coroutine to its end in a new event loop, as ``asyncio.run`` does."""
    event_loop = LOOPS[loop]()
    asyncio.set_event_loop(event_loop)
    try:
        return event_loop.run_until_complete(main)
    finally:
        event_loop.run_until_complete(event_loop.shutdown_asyncgens())
        asyncio.set_event_loop(None)
        event_loop.close()


def wrap_tasks() -> None:
    """Have the running loop wrap each task's coroutine in another, as Sentry does."""

    async def wrapper(coroutine: Any) -> Any:
        return await coroutine

    def factory(loop: Any, coroutine: Any, **options: Any) -> Any:
        return asyncio.Task(wrapper(coroutine), loop=loop, **options)

    asyncio.get_running_loop().set_task_factory(factory)


class Client:
    """One connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._received = b""

    @classmethod
    async def open(cls, port: int) -> "Client":
        sock = socket.socket()
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        return cls(sock)

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def get(self, path: str = "/", *headers: str) -> None:
        lines = [f"GET {path} HTTP/1.1", "Host: localhost", *headers, "", ""]
        await self.send("\r\n".join(lines).encode())

    async def post(self, path: str, body: bytes, *headers: str) -> None:
        lines = [
            f"POST {path} HTTP/1.1",
            "Host: localhost",
            f"Content-Length: {len(body)}",
            *headers,
            "",
            "",
        ]
        await self.send("\r\n".join(lines).encode() + body)

    async def _more(self) -> None:
        loop = asyncio.get_running_loop()
        chunk = await asyncio.wait_for(loop.sock_recv(self.sock, 65536), TIMEOUT)
        if not chunk:
            raise ConnectionError("the server closed the connection")
        self._received += chunk

    async def answer(self) -> Tuple[int, str]:
        """Read one response: its status and its body."""
        while b"\r\n\r\n" not in self._received:
            await self._more()
        head, _, self._received = self._received.partition(b"\r\n\r\n")
        length = 0
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        while len(self._received) < length:
            await self._more()
        body, self._received = self._received[:length], self._received[length:]
        return int(head.split()[1]), body.decode()

    def close(self) -> None:
        self.sock.close()

    def reset(self) -> None:
        linger = struct.pack("ii", 1, 0)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.sock.close()


class Service:
    """A served application."""

    def __init__(self, runner: web.AppRunner, port: int) -> None:
        self.runner = runner
        self.port = port
        self._tasks = asyncio.all_tasks()

    async def connect(self) -> Client:
        return await Client.open(self.port)

    async def ask(self, path: str = "/", *headers: str) -> Tuple[int, str]:
        """Send one request on a connection of its own, and close it."""
        client = await self.connect()
        try:
            await client.get(path, *headers)
            return await client.answer()
        finally:
            client.close()

    async def settle(self) -> None:
        """Wait until every connection is gone and every task is done."""
        server = self.runner.server
        assert server is not None
        for _ in range(int(TIMEOUT * 1000)):
            if not server.connections and not asyncio.all_tasks() - self._tasks:
                break
            await asyncio.sleep(0.001)
        else:
            raise TimeoutError(asyncio.all_tasks() - self._tasks)
        await spin()


async def go_away(service: Service, path: str = "/") -> None:
    """Reset a connection while the server waits for its client to read."""
    client = await service.connect()
    await client.get(path)
    server: Any = service.runner.server
    while not any(
        each.transport is not None and each.transport.get_write_buffer_size()
        for each in server.connections
    ):
        await asyncio.sleep(0)
    client.reset()
    await service.settle()


async def spin() -> None:
    """Let the loop do what it has been given, and what that gives it."""
    for _ in range(10):
        await asyncio.sleep(0)


async def start(runner: Any, **site_options: Any) -> Service:
    """Start a runner that is set up, on a free port of loopback."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    await web.SockSite(runner, sock, **site_options).start()
    return Service(runner, sock.getsockname()[1])


@web.middleware
async def idle(request: web.Request, handler: Any) -> web.StreamResponse:
    """Do nothing, as any middleware that is neither ours nor swallows anything."""
    return await handler(request)  # type: ignore[no-any-return]


@contextlib.asynccontextmanager
async def serve(
    app: web.Application,
    guard: Callable[[web.AppRunner], Any] = lambda runner: None,
    **options: Any,
) -> AsyncIterator[Service]:
    """Serve an application on a free port of loopback."""
    runner = web.AppRunner(app, **options)
    await runner.setup()
    guard(runner)
    service = await start(runner)
    try:
        yield service
    finally:
        await runner.cleanup()


class Records(logging.Handler):
    """What is logged, as text: a record would hold its exception."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: List[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@contextlib.contextmanager
def no_collector() -> Any:
    """Leave freeing to reference counts."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def alive(cls: type = web.BaseRequest) -> List[Any]:
    """The objects of a class that are still there."""
    return [each for each in gc.get_objects() if isinstance(each, cls)]
