"""TLS and UNIX sockets, on asyncio's own event loop and on uvloop."""

import asyncio
import contextlib
import io
import logging
import pathlib
import re
import socket
import ssl
from typing import Any, Callable, List, Tuple

import pytest
import trustme
from aiohttp import web

from aiohttp_cyclebreak import guard_server

from ..service import HANDSHAKE, LOOPS, TIMEOUT, Service, alive, no_collector, run
from ..test_diagnostics import normalized
from .compare import BARE, GUARDED, Install, keeps_itself, without_what_differs

if not hasattr(socket, "AF_UNIX"):
    pytest.skip("there are no UNIX sockets", allow_module_level=True)

Connect = Callable[[], socket.socket]


async def refuse(request: web.Request) -> web.Response:
    assert request.transport is not None
    secure = request.transport.get_extra_info("sslcontext") is not None
    raise web.HTTPBadRequest(text="over TLS" if secure else "in the clear")


async def upgrade(request: web.Request) -> web.WebSocketResponse:
    websocket = web.WebSocketResponse()
    await websocket.prepare(request)
    raise ValueError(websocket)  # held by what it raises


def talk(connect: Connect, lines: Tuple[str, ...]) -> str:
    """Send one request and read up to the end, in a thread that may block."""
    with connect() as sock:
        sock.settimeout(TIMEOUT)
        sock.sendall("\r\n".join([*lines, "Host: localhost", "", ""]).encode())
        received = b""
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            while True:
                chunk = sock.recv(65536)
                if not chunk:
                    break
                received += chunk
        return without_what_differs(received.decode(errors="replace"))


CLOSE = "Connection: close"
REQUESTS = [
    ("GET /refuse HTTP/1.1", CLOSE),
    ("GET /fail HTTP/1.1", CLOSE),
    ("GET /missing HTTP/1.1", CLOSE),
    ("GET /upgrade HTTP/1.1", *HANDSHAKE),
] * 2


async def start(runner: Any, transport: str, folder: pathlib.Path) -> Connect:
    """Start a site of the runner, and give what connects to it."""
    if transport == "unix":
        # Such a path may not be long, and that of the folder may be.
        address = str(folder / "s")
        if len(address.encode()) > 100:
            pytest.skip("the path of the temporary folder is too long for a socket")
        await web.UnixSite(runner, address).start()

        def connect() -> socket.socket:
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(address)
            return sock

        return connect
    authority = trustme.CA()
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    await web.SockSite(runner, sock, ssl_context=server).start()

    def connect_securely() -> socket.socket:
        plain = socket.create_connection(("127.0.0.1", port))
        return client.wrap_socket(plain, server_hostname="localhost")

    return connect_securely


INSTALLED = {
    **{f"{position}": GUARDED[position] for position in GUARDED},
    "guard_server": BARE["setup"],
}


def served(
    name: str, install: Install, transport: str, folder: pathlib.Path, loop: str
) -> Tuple[List[str], str, int]:
    """The answers, what was logged, and how many requests are left."""

    async def main() -> Tuple[List[str], int]:
        app = web.Application()
        app.router.add_get("/refuse", refuse)
        app.router.add_get("/fail", keeps_itself)
        app.router.add_get("/upgrade", upgrade)
        install(app)
        runner = web.AppRunner(app)
        with no_collector():
            before = len(alive())
            await runner.setup()
            if name == "guard_server":
                guard_server(runner)
            connect = await start(runner, transport, folder)
            service = Service(runner, 0)
            event_loop = asyncio.get_running_loop()
            answers = [
                await event_loop.run_in_executor(None, talk, connect, lines)
                for lines in REQUESTS
            ]
            await service.settle()
            left = len(alive()) - before
            await runner.cleanup()
        return answers, left

    stream = io.StringIO()
    log_handler = logging.StreamHandler(stream)
    logger = logging.getLogger("aiohttp.server")
    logger.addHandler(log_handler)
    try:
        answers, left = run(main(), loop)
    finally:
        logger.removeHandler(log_handler)
    ours = r'(?m)^ *File "[^"]*", line \d+, in guarded\w*\n.*\n'
    return answers, normalized(re.sub(ours, "", stream.getvalue())), left


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.parametrize("transport", ["tls", "unix"])
def test_the_same_answers_and_nothing_left(
    transport: str, name: str, loop: str, tmp_path: pathlib.Path
) -> None:
    """Refusals, errors, missing routes and a websocket that fails."""
    control = BARE.get(name, BARE["setup"])
    *expected, kept = served("bare", control, transport, tmp_path, loop)
    *found, left = served(name, INSTALLED[name], transport, tmp_path, loop)
    assert ("over TLS" if transport == "tls" else "in the clear") in expected[0][0]
    assert [answer.split()[1] for answer in expected[0]] == [
        *["400", "500", "404", "101"] * 2
    ]
    assert found == expected
    assert kept >= 6
    assert left == 0
