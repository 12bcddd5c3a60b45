"""The handler calls another service, and the call fails."""

import asyncio
import contextlib
import socket
import threading
from dataclasses import replace
from typing import AsyncIterator, Awaitable, Callable, Dict, List, Optional, Tuple

import aiohttp
from aiohttp import web

from ._leak import Affected, Kind, Leak, Remedy, Step, get

__all__ = ("LEAKS", "Gateway", "Upstream", "gateway_of")

_OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"
_HALF = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf a body"
_NOT_HTTP = b"220 mail.example ESMTP\r\n\r\n"
_Answers = Tuple[Optional[bytes], ...]


class Upstream:
    """A service that fails, in a thread: its own end makes no cyclic garbage.

    Args:
        answers: what it sends on one connection after the other, before it closes
            it; None: it never answers. Without any, it refuses every connection.
    """

    def __init__(self, answers: _Answers) -> None:
        self.connections = 0
        self._answers = answers
        self._stopping = False
        self._sock = socket.socket()
        self._sock.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._sock.getsockname()[1]}/"
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def start(self) -> None:
        if self._answers:
            self._sock.listen()
            self._thread.start()

    def stop(self) -> None:
        if self._answers:
            # Closing its socket does not wake a thread that waits for a connection.
            self._stopping = True
            socket.create_connection(self._sock.getsockname()).close()
            self._thread.join()
        self._sock.close()

    def _serve(self) -> None:
        silent: List[socket.socket] = []
        while True:
            client, _ = self._sock.accept()
            if self._stopping:
                client.close()
                break
            answer = self._answers[self.connections % len(self._answers)]
            self.connections += 1
            with contextlib.suppress(OSError):
                if not self.answer(client, answer):
                    silent.append(client)
                    continue
            client.close()
        for client in silent:
            client.close()

    def answer(self, client: socket.socket, answer: Optional[bytes]) -> bool:
        """Serve one connection; return whether it is to be closed."""
        received = b""
        while b"\r\n\r\n" not in received:
            received += client.recv(65536) or b"\r\n\r\n"
        if answer is not None:
            client.sendall(answer)
        return answer is not None


class Gateway:
    """What a handler calls, and the client session that it calls with.

    Attributes:
        trace_configs: what the session is given.
    """

    def __init__(self, answers: _Answers) -> None:
        self.trace_configs: List[aiohttp.TraceConfig] = []
        self._upstream = Upstream(answers)
        # Seconds: short where every call has to wait for it.
        self._timeout = 0.05 if None in answers else 60.0
        self._session: Optional[aiohttp.ClientSession] = None

    @property
    def connections(self) -> int:
        """How many connections to other services there were."""
        return self._upstream.connections

    async def open(self, app: web.Application) -> AsyncIterator[None]:
        """Be there from the application's start to its end."""
        self._upstream.start()
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=self._timeout),
            trace_configs=self.trace_configs,
        )
        yield
        await self._session.close()
        self._upstream.stop()

    async def call(self, request: web.Request) -> bytes:
        """Call the other service, on behalf of a request, which the frame holds."""
        assert self._session is not None
        async with self._session.get(self._upstream.url) as response:
            return await response.read()

    async def call_and_release(self, request: web.Request) -> bytes:
        """Call it, and read what it sends when it is too late."""
        assert self._session is not None
        async with self._session.get(self._upstream.url) as response:
            pass
        return await response.read()


def gateway_of(app: web.Application) -> Optional[Gateway]:
    """The gateway that an application of this group has."""
    for each in app.cleanup_ctx:
        gateway = getattr(each, "__self__", None)
        if isinstance(gateway, Gateway):
            return gateway
    return None


_Handler = Callable[[Gateway, web.Request], Awaitable[web.Response]]
_FAILURES = (aiohttp.ClientError, asyncio.TimeoutError)


async def _let_fly(gateway: Gateway, request: web.Request) -> web.Response:
    return web.Response(body=await gateway.call(request))


async def _swallow(gateway: Gateway, request: web.Request) -> web.Response:
    try:
        return web.Response(body=await gateway.call(request))
    except _FAILURES:
        return web.Response(status=502)


async def _translate(gateway: Gateway, request: web.Request) -> web.Response:
    try:
        return web.Response(body=await gateway.call(request))
    except _FAILURES as exc:
        raise web.HTTPBadGateway(text="the upstream failed") from exc


async def _read_too_late(gateway: Gateway, request: web.Request) -> web.Response:
    try:
        return web.Response(body=await gateway.call_and_release(request))
    except aiohttp.ClientError:
        return web.Response(status=502)


async def _gather(gateway: Gateway, request: web.Request) -> web.Response:
    calls = gateway.call(request), gateway.call(request)
    await asyncio.gather(*calls, return_exceptions=True)
    return web.Response(status=502)


_UPSTREAMS: Dict[str, Tuple[str, _Answers]] = {
    "refused": ("refuses the connection", ()),
    "cut": ("disconnects", (b"",)),
    "half": ("sends half a body", (_HALF,)),
    "timeout": ("never answers", (None,)),
    "not-http": ("does not speak HTTP", (_NOT_HTTP,)),
}
_HANDLERS: Dict[str, Tuple[str, _Handler]] = {
    "fly": ("the handler lets the error fly", _let_fly),
    "swallow": ("the handler answers 502", _swallow),
    "translate": ("the handler raises HTTPBadGateway", _translate),
    "gather": ("the handler gathers the errors", _gather),
}
# The client was fixed for one upstream in 3.11.14, as the server was.
_FIXED = Affected(until=(3, 11, 13))
_AFFECTED: Dict[str, Tuple[Affected, ...]] = {
    "cut/fly": (_FIXED,),
    "cut/swallow": (_FIXED,),
    "cut/gather": (_FIXED,),
    "timeout/swallow": (Affected(since=(3, 10, 6), until=(3, 11, 13), python=(3, 9)),),
    "timeout/gather": (
        Affected(since=(3, 10, 6), python=(3, 9)),
        Affected(since=(3, 10, 8)),
    ),
    "retried": (_FIXED,),
    "released": (Affected(since=(3, 10, 9)),),
    "released/own-error": (Affected(until=(3, 10, 8)),),
}


def _leak(id: str, title: str, answers: _Answers, handler: _Handler) -> Leak:
    def build(app: web.Application) -> None:
        gateway = Gateway(answers)

        async def handle(request: web.Request) -> web.Response:
            return await handler(gateway, request)

        app.cleanup_ctx.append(gateway.open)
        app.router.add_get("/", handle)

    return Leak(
        id="gateway/" + id,
        title=title,
        kind=Kind.DELAYED,
        chain=(
            "protocol, response or connector of the client -> exception -> traceback "
            "-> frame of the handler -> request"
        ),
        affected=_AFFECTED.get(id, (Affected(),)),
        upstream="https://github.com/aio-libs/aiohttp/issues/10535",
        build=build,
        visits=((get(), Step.ANSWER),),
        remedy=Remedy.CLIENT,
    )


LEAKS = (
    *(
        _leak(f"{upstream}/{name}", f"the upstream {does}: {it}", answers, handler)
        for upstream, (does, answers) in _UPSTREAMS.items()
        for name, (it, handler) in _HANDLERS.items()
        if (upstream, name) != ("timeout", "fly")  # in no version
    ),
    _leak(
        "retried",
        "the upstream disconnects, and answers the second attempt",
        (b"", _OK),
        _let_fly,
    ),
    replace(
        _leak(
            "released",
            "the handler reads a response after its release",
            (_OK,),
            _read_too_late,
        ),
        kind=Kind.PERMANENT,
        chain=(
            "module of the client -> exception -> traceback -> frame of the handler "
            "-> request"
        ),
        upstream="https://github.com/aio-libs/aiohttp/pull/9405",
    ),
    _leak(
        "released/own-error",
        "the handler reads a response after its release",
        (_OK,),
        _read_too_late,
    ),
)
