"""Outgoing calls that fail: the incoming request goes, and nobody notices."""

import asyncio
import base64
import contextlib
import gc
import hashlib
import itertools
import re
import socket
import ssl
import sys
import threading
import traceback
import weakref
from collections import deque
from contextvars import ContextVar
from typing import (
    Any,
    AsyncIterator,
    Awaitable,
    Callable,
    Deque,
    Dict,
    List,
    Optional,
    Set,
    Tuple,
)

import aiohttp
import pytest
import trustme
from aiohttp import web
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ClientRequest

from aiohttp_cyclebreak import (
    break_cycles,
    calls,
    client_cyclebreak,
    cyclebreak,
    guard_server,
    holders,
    keep_cycles,
    requests,
    setup,
)
from aiohttp_cyclebreak.exceptions import frames_of
from aiohttp_cyclebreak.holders import MOST_NOTED
from aiohttp_cyclebreak.leaks.gateway import Upstream

from .service import AIOHTTP, LOOPS, Service, alive, no_collector, run, serve, spin

pytestmark = pytest.mark.usefixtures("few_objects")

# An upstream closes after each answer. If it did not say so, the client would take
# the connection for the next call as well, and might find it closed.
OK = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"
HALF = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"
NOT_HTTP = b"220 mail.example ESMTP\r\n\r\n"
FAILURES = (aiohttp.ClientError, asyncio.TimeoutError)

Call = Callable[[web.Request, aiohttp.ClientSession, str], Awaitable[Any]]


class Fixture:
    """An application whose handlers call an upstream."""

    def __init__(self, service: Service, session: aiohttp.ClientSession) -> None:
        self.service = service
        self.session = session

    async def ask(self, path: str = "/") -> Tuple[int, str]:
        answer = await self.service.ask(path)
        await self.service.settle()
        return answer


@contextlib.asynccontextmanager
async def gateway(
    handler: Call,
    upstream: Upstream,
    *,
    guarded: bool = True,
    install: Callable[[web.Application], Any] = setup,
    guard: Callable[[web.AppRunner], Any] = lambda runner: None,
    **options: Any,
) -> AsyncIterator[Fixture]:
    traces = [client_cyclebreak()] if guarded else []
    traces += options.pop("trace_configs", [])
    app = web.Application()
    if guarded:
        install(app)

    async def handle(request: web.Request) -> web.Response:
        found = await handler(request, session, upstream.url)
        return found if isinstance(found, web.Response) else web.Response(text=found)

    app.router.add_get("/{tail:.*}", handle)
    upstream.start()
    try:
        async with aiohttp.ClientSession(
            trace_configs=traces, **options
        ) as session, serve(app, guard) as service:
            yield Fixture(service, session)
    finally:
        upstream.stop()


async def count_left(fixture: Fixture, visits: int = 4) -> Dict[str, int]:
    """What a few requests leave, with the collector off and nobody connected."""
    await fixture.ask()  # fills the caches
    with no_collector():
        before = {cls: len(alive(cls)) for cls in KINDS}
        for _ in range(visits):
            await fixture.ask()
        await spin()
        left = {cls.__name__: len(alive(cls)) - before[cls] for cls in KINDS}
    gc.collect()
    return left


def requests_left(
    handler: Any,
    upstream: Upstream,
    status: int,
    loop: str = "asyncio",
    *,
    guarded: bool,
) -> int:
    """How many of four requests a gateway leaves, each answered with a status."""

    async def main() -> int:
        async with gateway(handler, upstream, guarded=guarded) as fixture:
            assert (await fixture.ask())[0] == status
            return (await count_left(fixture))["BaseRequest"]

    return run(main(), loop)


KINDS = (web.BaseRequest, aiohttp.ClientResponse, ResponseHandler)
NOTHING = {cls.__name__: 0 for cls in KINDS}


def assert_stopped(
    main: Callable[[bool], Awaitable[Dict[str, int]]], loop: str
) -> None:
    """Something is left without us, and nothing with us."""
    bare = run(main(False), loop)
    assert run(main(True), loop) == NOTHING
    if bare == NOTHING:
        pytest.skip(
            f"aiohttp {aiohttp.__version__} on {sys.version_info[:2]} keeps none"
        )


async def read(request: web.Request, session: aiohttp.ClientSession, url: str) -> str:
    async with session.get(url) as response:
        return await response.text()


async def swallow(
    request: web.Request, session: aiohttp.ClientSession, url: str
) -> web.Response:
    try:
        return web.Response(text=await read(request, session, url))
    except FAILURES as exc:
        return web.Response(status=502, text=type(exc).__name__)


class TLSUpstream(Upstream):
    """Speaks TLS, with a certificate of an authority that may be unknown."""

    def __init__(self, authority: trustme.CA, answers: Any) -> None:
        super().__init__(answers)
        self.url = self.url.replace("http:", "https:")
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(self._context)

    def answer(self, client: socket.socket, answer: Optional[bytes]) -> bool:
        with self._context.wrap_socket(client, server_side=True) as secured:
            super().answer(secured, answer)
        return True


class WebSocketUpstream(Upstream):
    """Shakes hands, sends what it is told, and disconnects or falls silent."""

    hangs = False

    def answer(self, client: socket.socket, answer: Optional[bytes]) -> bool:
        received = b""
        while b"\r\n\r\n" not in received:
            received += client.recv(65536)
        found = re.search(rb"(?i)sec-websocket-key: *(\S+)", received)
        assert found is not None
        magic = found[1] + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(magic).digest())
        client.sendall(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Accept: " + accept + b"\r\n\r\n"
        )
        client.sendall(answer or b"")
        return not self.hangs


def path_asked_of(client: socket.socket) -> bytes:
    received = b""
    while b"\r\n\r\n" not in received:
        received += client.recv(65536) or b"GET gone \r\n\r\n"
    return received.split()[1]


class Moves(Upstream):
    """Redirects every call."""

    def __init__(self, to: str) -> None:
        super().__init__((b"",))
        self._to = to.encode()

    def answer(self, client: socket.socket, answer: Optional[bytes]) -> bool:
        client.sendall(
            b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nConnection: close\r\n"
            b"Location: " + self._to + path_asked_of(client)[1:] + b"\r\n\r\n"
        )
        return True


class KeepAliveUpstream(Upstream):
    """Answers one request on a connection, and cuts the next one."""

    def answer(self, client: socket.socket, answer: Optional[bytes]) -> bool:
        threading.Thread(target=self._talk, args=(client,), daemon=True).start()
        return False

    def _talk(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):  # the test is over
            super().answer(client, OK.replace(b"Connection: close\r\n", b""))
            super().answer(client, b"")


class CutsFirst(Upstream):
    """Cuts the first attempt of each call, answers the second; one is held for good."""

    def __init__(self) -> None:
        super().__init__((OK,))
        self.holds = False
        self._seen: Set[bytes] = set()

    def answer(self, client: socket.socket, answer: Optional[bytes]) -> bool:
        path = path_asked_of(client)
        if path == b"/held":
            self.holds = True
            return False
        if path in self._seen:
            client.sendall(answer or b"")
        self._seen.add(path)
        return True


# --- nothing is left ------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
def test_a_timeout_that_flies_leaves_nothing(loop: str) -> None:
    """The one of twenty combinations that no version keeps."""

    async def main() -> Dict[str, int]:
        timeout = aiohttp.ClientTimeout(total=0.03)
        async with gateway(read, Upstream((None,)), timeout=timeout) as fixture:
            return await count_left(fixture)

    assert run(main(), loop) == NOTHING


def a_task_group_keeps_what_it_raises() -> bool:
    """Whether it is in a reference cycle: https://github.com/python/cpython/issues/124958."""

    class Local:
        pass

    async def fail() -> None:
        raise LookupError

    async def swallow() -> Callable[[], Any]:
        local = Local()
        try:
            async with asyncio.TaskGroup() as tasks:  # type: ignore[attr-defined,unused-ignore]
                tasks.create_task(fail())
        except Exception:
            pass
        return weakref.ref(local)

    with no_collector():
        return run(swallow())() is not None


@pytest.mark.skipif(sys.version_info < (3, 11), reason="there are no task groups")
@pytest.mark.parametrize("end", ["swallow", "clear", "raise", "gather"])
def test_a_task_group_of_calls(end: str) -> None:
    """Its frame keeps the group that it raises, which only the handler sees."""
    left = 4 if end == "swallow" and a_task_group_keeps_what_it_raises() else 0

    async def handle(
        request: web.Request, session: aiohttp.ClientSession, url: str
    ) -> web.Response:
        try:
            if end == "gather":
                await asyncio.gather(*[read(request, session, url) for _ in range(2)])
            else:
                async with asyncio.TaskGroup() as tasks:  # type: ignore[attr-defined,unused-ignore]
                    for _ in range(2):
                        tasks.create_task(read(request, session, url))
        except Exception as exc:
            if end == "raise":
                raise web.HTTPBadGateway from exc
            if end == "clear":
                exc.__traceback__ = None
            return web.Response(status=502)
        raise AssertionError

    async def main() -> int:
        async with gateway(handle, Upstream(())) as fixture:
            assert (await fixture.ask())[0] == 502
            return (await count_left(fixture))["BaseRequest"]

    assert run(main()) == left


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("answer", [b"", HALF, NOT_HTTP])
def test_tls(answer: bytes, trusted: bool, loop: str) -> None:
    authority = trustme.CA()
    context = ssl.create_default_context()
    if trusted:
        authority.configure_trust(context)

    async def main(guarded: bool) -> Dict[str, int]:
        upstream = TLSUpstream(authority, (answer,))
        connector = aiohttp.TCPConnector(ssl=context)
        async with gateway(
            swallow, upstream, guarded=guarded, connector=connector
        ) as fixture:
            assert (await fixture.ask())[0] == 502
            return await count_left(fixture)

    assert_stopped(main, loop)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("answer", [None, b"", HALF, NOT_HTTP])
def test_redirects(answer: Optional[bytes], loop: str) -> None:
    async def main(guarded: bool) -> Dict[str, int]:
        target = Upstream(() if answer is None else (answer,))
        target.start()
        # Or it depends on who is faster whether that connection comes to the pool.
        close = "HTTP/1.1 302 Found\r\nConnection: close\r\n"
        location = f"{close}Location: {target.url}\r\n"
        upstream = Upstream((f"{location}Content-Length: 4\r\n\r\nmove".encode(),))
        try:
            async with gateway(swallow, upstream, guarded=guarded) as fixture:
                assert (await fixture.ask())[0] == 502
                return await count_left(fixture)
        finally:
            target.stop()

    assert_stopped(main, loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_pooled_connection_that_was_closed(loop: str) -> None:
    """A call is tried again on a new connection; nothing is raised at all."""

    async def twice(
        request: web.Request, session: aiohttp.ClientSession, url: str
    ) -> str:
        first = await read(request, session, url)
        try:
            return first + await read(request, session, url)
        except FAILURES:  # before aiohttp 3.10 it is not tried again
            return first

    async def main(guarded: bool) -> Dict[str, int]:
        upstream = KeepAliveUpstream((b"",))
        # One connection, or a second one may be in the pool by the time of a retry.
        connector = aiohttp.TCPConnector(limit=1)
        async with gateway(
            twice, upstream, guarded=guarded, connector=connector
        ) as fixture:
            assert (await fixture.ask())[0] == 200
            return await count_left(fixture)

    assert_stopped(main, loop)


# Before, a call that is cut fails at once.
TRIES_AGAIN = AIOHTTP >= (3, 10)
numbers = itertools.count()


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("limit", [0, 1])
@pytest.mark.parametrize("redirected", [False, True])
def test_calls_that_are_tried_again_at_once(
    redirected: bool, limit: int, loop: str
) -> None:
    """Each on its own, however many there are; with one connection they take turns."""

    async def handler(
        request: web.Request, session: aiohttp.ClientSession, url: str
    ) -> web.Response:
        calls = [swallow(request, session, f"{url}{next(numbers)}") for _ in range(5)]
        statuses = {response.status for response in await asyncio.gather(*calls)}
        assert statuses == {200 if TRIES_AGAIN else 502}
        return web.Response()

    async def main(guarded: bool) -> Dict[str, int]:
        upstream = CutsFirst()
        moves = Moves(upstream.url)
        moves.start()
        try:
            async with gateway(
                (lambda request, session, _: handler(request, session, moves.url))
                if redirected
                else handler,
                upstream,
                guarded=guarded,
                connector=aiohttp.TCPConnector(limit=limit),
            ) as fixture:
                assert (await fixture.ask())[0] == 200
                return await count_left(fixture)
        finally:
            moves.stop()

    assert_stopped(main, loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_call_that_is_to_be_tried_again_and_is_cancelled(loop: str) -> None:
    """Up to aiohttp 3.10.10 it has to wait until others let go of their connections."""

    async def handler(
        request: web.Request, session: aiohttp.ClientSession, url: str
    ) -> str:
        calls = [
            asyncio.ensure_future(swallow(request, session, url + path))
            for path in (str(next(numbers)), "held")
        ]
        while not upstreams[-1].holds:
            await asyncio.sleep(0.001)
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        upstreams[-1].holds = False
        return "cancelled"

    upstreams: List[CutsFirst] = []

    async def main(guarded: bool) -> Dict[str, int]:
        upstreams.append(CutsFirst())
        connector = aiohttp.TCPConnector(limit=1)
        async with gateway(
            handler, upstreams[-1], guarded=guarded, connector=connector
        ) as fixture:
            assert (await fixture.ask())[0] == 200
            return await count_left(fixture)

    assert_stopped(main, loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_retries_in_the_handler(loop: str) -> None:
    async def retry(
        request: web.Request, session: aiohttp.ClientSession, url: str
    ) -> web.Response:
        for _ in range(5):
            response = await swallow(request, session, url)
        return response

    async def main(guarded: bool) -> Dict[str, int]:
        upstream = Upstream((HALF, b"", NOT_HTTP))
        async with gateway(retry, upstream, guarded=guarded) as fixture:
            return await count_left(fixture)

    assert_stopped(main, loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_one_session_and_a_connector_limit_for_many(loop: str) -> None:
    """Calls that wait for each other's connections, some of them in vain."""

    async def main(guarded: bool) -> Dict[str, int]:
        async with gateway(
            swallow,
            Upstream((HALF, b"", OK, NOT_HTTP)),
            guarded=guarded,
            connector=aiohttp.TCPConnector(limit=2),
        ) as fixture:

            class Many(Fixture):
                async def ask(self, path: str = "/") -> Tuple[int, str]:
                    asked = [self.service.ask() for _ in range(20)]
                    answers = await asyncio.gather(*asked)
                    assert {status for status, _ in answers} <= {200, 502}
                    await self.service.settle()
                    return answers[0]

            return await count_left(Many(fixture.service, fixture.session), visits=2)

    assert_stopped(main, loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_streaming_download_that_the_client_drops(loop: str) -> None:
    """The upstream goes on, the handler is cancelled or fails to write."""
    begun: List[asyncio.Event] = []

    async def stream(
        request: web.Request, session: aiohttp.ClientSession, url: str
    ) -> web.Response:
        async with session.get(url) as upstream:
            response = web.StreamResponse()
            await response.prepare(request)
            begun[0].set()
            async for chunk in upstream.content.iter_any():
                await response.write(chunk)
        raise AssertionError("the upstream never ends")

    async def main(guarded: bool) -> Dict[str, int]:
        begun[:] = [asyncio.Event()]
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nsome"
        upstream = Upstream((head,))

        async with gateway(stream, upstream, guarded=guarded) as fixture:

            class Dropped(Fixture):
                async def ask(self, path: str = "/") -> Tuple[int, str]:
                    begun[0].clear()
                    client = await self.service.connect()
                    await client.get()
                    await begun[0].wait()
                    client.reset()
                    await self.service.settle()
                    return 0, ""

            return await count_left(Dropped(fixture.service, fixture.session))

    assert_stopped(main, loop)


FRAMES = {"cut": b"", "invalid": b"\xff\xff\xff\xff", "text": b"\x81\x02hi"}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("hangs", [False, True])
@pytest.mark.parametrize("frames", FRAMES)
def test_websockets(frames: str, hangs: bool, loop: str) -> None:
    async def talk(
        request: web.Request, session: aiohttp.ClientSession, url: str
    ) -> str:
        found = []
        try:
            async with session.ws_connect(url, timeout=0.01) as websocket:
                try:
                    while not websocket.closed:
                        message = await asyncio.wait_for(websocket.receive(), 0.01)
                        found.append(message.type.name)
                        message.json()
                except (asyncio.TimeoutError, ValueError, TypeError) as exc:
                    found.append(type(exc).__name__)
        except FAILURES as exc:
            found.append(type(exc).__name__)
        return " ".join(found)

    async def main(guarded: bool) -> Dict[str, int]:
        upstream = WebSocketUpstream((FRAMES[frames],))
        upstream.hangs = hangs
        async with gateway(talk, upstream, guarded=guarded) as fixture:
            assert (await fixture.ask())[0] == 200
            return await count_left(fixture)

    assert_stopped(main, loop)


INSTALLED: Dict[str, Callable[[web.Application], Any]] = {
    "appended": lambda app: app.middlewares.append(cyclebreak()),
    "inserted": lambda app: app.middlewares.insert(0, cyclebreak()),
    "setup": setup,
    "without clearing": lambda app: setup(app, clear_frames=False),
}


@pytest.mark.parametrize("install", INSTALLED)
@pytest.mark.parametrize("answer", [b"", HALF, NOT_HTTP])
def test_however_it_is_installed(answer: bytes, install: str) -> None:
    async def main(guarded: bool) -> Dict[str, int]:
        async with gateway(
            swallow,
            Upstream((answer,)),
            guarded=guarded,
            install=INSTALLED[install],
        ) as fixture:
            return await count_left(fixture)

    assert_stopped(main, "asyncio")


# --- nobody notices -------------------------------------------------------------


def text_of(exc: BaseException) -> str:
    """What is printed of an exception, from the handler on.

    What is above differs by our layers, and the ports differ anyway.
    """
    entry = exc.__traceback__
    while entry is not None and entry.tb_frame.f_code.co_name not in (
        "handler",
        "main",
    ):
        entry = entry.tb_next
    text = "".join(traceback.format_exception(type(exc), exc, entry))
    return re.sub(r"\b\d{4,5}\b", "port", text)


@pytest.mark.parametrize("answer", [None, b"", HALF, NOT_HTTP])
def test_errors_and_tracebacks_are_the_same(
    answer: Optional[bytes],
) -> None:
    """While they are handled, in a log record, and long after the request."""

    async def main(guarded: bool) -> List[str]:
        texts: List[str] = []
        kept: List[BaseException] = []

        async def handler(
            request: web.Request, session: aiohttp.ClientSession, url: str
        ) -> Any:
            try:
                return await read(request, session, url)
            except FAILURES as exc:
                texts.append(text_of(exc))
                kept.append(exc)
                raise

        upstream = Upstream(() if answer is None else (answer,))
        async with gateway(handler, upstream, guarded=guarded) as fixture:
            for _ in range(2):
                assert (await fixture.ask())[0] == 500
        texts += map(text_of, kept)
        assert len(texts) == 4
        return texts

    assert run(main(True)) == run(main(False))


def test_child_tasks_have_their_locals_until_the_request_ends() -> None:
    """A handler that has gathered its errors may look at every frame of them."""
    seen: List[Any] = []

    async def child(session: aiohttp.ClientSession, url: str, number: int) -> None:
        marker = f"call {number}"
        async with session.get(url) as response:
            await response.read()
            assert marker

    def markers(errors: List[BaseException]) -> List[Any]:
        return [
            frame.f_locals.get("marker")
            for exc in errors
            for frame, _ in traceback.walk_tb(exc.__traceback__)
            if frame.f_code is child.__code__
        ]

    async def handler(
        request: web.Request, session: aiohttp.ClientSession, url: str
    ) -> str:
        children = [child(session, url, number) for number in range(3)]
        errors: Any = await asyncio.gather(*children, return_exceptions=True)
        await spin()
        seen.append(markers(errors))
        kept.append(errors)
        return "done"

    kept: List[List[BaseException]] = []

    async def main() -> None:
        async with gateway(handler, Upstream((HALF,))) as fixture:
            await fixture.ask()

    run(main())
    assert seen == [["call 0", "call 1", "call 2"]]
    assert markers(kept[0]) == [None] * 3  # severed since


def test_other_tracing_and_classes_are_left_as_they_are() -> None:
    class Request(ClientRequest):
        pass

    class WebSocket(aiohttp.ClientWebSocketResponse):
        pass

    seen: List[str] = []
    made: List[Any] = []

    async def end(session: Any, context: Any, params: Any) -> None:
        seen.append("end")

    async def failed(session: Any, context: Any, params: Any) -> None:
        seen.append(type(params.exception).__name__)

    other = aiohttp.TraceConfig()
    other.on_request_end.append(end)
    other.on_request_exception.append(failed)

    async def handler(
        request: web.Request, session: aiohttp.ClientSession, url: str
    ) -> str:
        try:
            return await read(request, session, url)
        except FAILURES:
            return "failed"

    async def talk(
        request: web.Request, session: aiohttp.ClientSession, url: str
    ) -> str:
        async with session.ws_connect(url) as websocket:
            made.append(websocket)
        return "talked"

    async def main() -> None:
        answers = (OK, NOT_HTTP)
        async with gateway(
            handler, Upstream(answers), trace_configs=[other], request_class=Request
        ) as fixture:
            assert (await fixture.ask())[1] == "ok"
            assert (await fixture.ask())[1] == "failed"
        upstream = WebSocketUpstream((b"\x88\x02\x03\xe8",))
        async with gateway(talk, upstream, ws_response_class=WebSocket) as fixture:
            assert (await fixture.ask())[1] == "talked"

    run(main())
    assert seen[0] == "end"
    assert seen[1] in ("ClientResponseError", "ServerDisconnectedError")
    assert isinstance(made[0], WebSocket)
    assert type(made[0]).__name__ == "WebSocket"
    assert type(made[0]).__qualname__ == WebSocket.__qualname__


class FailingResolver(aiohttp.abc.AbstractResolver):
    """One lookup for all, which fails once everybody waits for it."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def resolve(self, *args: Any, **kwargs: Any) -> Any:
        await self.go.wait()
        raise OSError("no such host")

    async def close(self) -> None:
        pass


@pytest.mark.parametrize("loop", LOOPS)
def test_a_failure_that_several_requests_share(loop: str) -> None:
    """The resolver's one exception is raised in six requests, answered in turn."""
    requests = 6

    async def main(guarded: bool) -> Dict[str, int]:
        resolver = FailingResolver()
        turns = [asyncio.Event() for _ in range(requests)]
        begun: List[int] = []
        caught: List[int] = []
        reports: List[str] = []
        whole: List[bool] = []

        async def handler(
            request: web.Request, session: aiohttp.ClientSession, url: str
        ) -> web.Response:
            number = int(request.path[1:])
            begun.append(number)
            try:
                await session.get("http://unknown.example/")
            except FAILURES as exc:
                caught.append(number)
                await turns[number].wait()
                reports.append(text_of(exc))
                frames = [frame for frame, _ in traceback.walk_tb(exc.__traceback__)]
                whole.append("request" in frames[0].f_locals)
                whole.append("url" in frames[1].f_locals or len(frames) < 3)
            return web.Response(status=502)

        connector = aiohttp.TCPConnector(resolver=resolver)
        async with gateway(
            handler, Upstream(()), guarded=guarded, connector=connector
        ) as fixture:
            with no_collector():
                before = {cls: len(alive(cls)) for cls in KINDS}
                asked = [
                    asyncio.ensure_future(fixture.service.ask(f"/{number}"))
                    for number in range(requests)
                ]
                while len(begun) < requests:
                    await asyncio.sleep(0)
                await spin()  # from there to the resolver nothing has to be waited for
                resolver.go.set()
                while len(caught) < requests:
                    await asyncio.sleep(0)
                for number in (3, 0, 5, 1, 4, 2):
                    turns[number].set()
                    assert (await asked[number])[0] == 502
                asked.clear()
                await fixture.service.settle()
                left = {c.__name__: len(alive(c)) - before[c] for c in KINDS}
            assert len(reports) == requests
            assert all("no such host" in report for report in reports)
            assert all("in resolve" in report for report in reports)
            assert all(whole)
        gc.collect()
        return left

    assert_stopped(main, loop)


@pytest.mark.parametrize("install", ["keep", "below", "keep_cycles", "off"])
def test_what_is_to_be_kept_is_kept(
    install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: List[BaseException] = []

    async def handler(
        request: web.Request, session: aiohttp.ClientSession, url: str
    ) -> str:
        marker = "here"
        try:
            return await read(request, session, url)
        except FAILURES as exc:
            kept.append(exc)
            return marker

    if install == "off":
        monkeypatch.setenv("AIOHTTP_CYCLEBREAK", "off")

    def keep(request: web.Request, exc: BaseException) -> bool:
        return True

    async def main() -> None:
        def set_up(app: web.Application) -> None:
            if install != "below":
                setup(app, keep=keep if install == "keep" else None)

        def guard(runner: web.AppRunner) -> None:
            if install == "below":
                guard_server(runner, keep=keep)

        async with gateway(
            keep_cycles(_with_request(handler))
            if install == "keep_cycles"
            else handler,
            Upstream((HALF,)),
            install=set_up,
            guard=guard,
        ) as fixture:
            await fixture.ask()

    run(main())
    frames = [frame for frame, _ in traceback.walk_tb(kept[0].__traceback__)]
    assert frames[0].f_locals["marker"] == "here"
    assert "response" in frames[1].f_locals


def test_an_inner_layer_is_asked_what_to_keep() -> None:
    """Of calls that the handler swallows, too."""
    kept: List[BaseException] = []

    async def handler(
        request: web.Request, session: aiohttp.ClientSession, url: str
    ) -> str:
        try:
            return await read(request, session, url)
        except FAILURES as exc:
            kept.append(exc)
            return "failed"

    def install(app: web.Application) -> None:
        inner = cyclebreak(keep=lambda request, exc: True)
        app.middlewares.extend([cyclebreak(), inner])

    async def main() -> None:
        async with gateway(handler, Upstream(()), install=install) as fixture:
            assert await fixture.ask() == (200, "failed")

    run(main())
    frames = [frame for frame, _ in traceback.walk_tb(kept[0].__traceback__)]
    assert "url" in frames[1].f_locals


def test_a_proxy_that_breaks_off_leaves_a_protocol_and_no_request() -> None:
    """Of the client, which is in a cycle with its parser, where no exception is."""

    async def handler(
        request: web.Request, session: aiohttp.ClientSession, url: str
    ) -> web.Response:
        try:
            async with session.get("https://127.0.0.1:1/", proxy=url):
                raise AssertionError
        except aiohttp.ClientError as exc:
            return web.Response(status=502, text=type(exc).__name__)

    async def main(guarded: bool) -> Dict[str, int]:
        taken = Upstream((b"HTTP/1.1 200 OK\r\n\r\n",))  # then it closes
        async with gateway(handler, taken, guarded=guarded) as fixture:
            return await count_left(fixture)

    assert run(main(False))["ResponseHandler"] == 8
    assert run(main(True)) == {**NOTHING, "ResponseHandler": 4}


def _with_request(handler: Call) -> Call:
    async def with_request(
        request: web.Request, session: aiohttp.ClientSession, url: str
    ) -> Any:
        return await handler(request, session, url)

    return with_request


# --- outside a request ----------------------------------------------------------


class Marker:
    """A local of a function that has called and failed."""


async def call(session: aiohttp.ClientSession, url: str) -> None:
    marker = Marker()
    async with session.get(url) as response:
        await response.read()
        assert marker


def markers_in(exc: Optional[BaseException]) -> int:
    assert exc is not None
    return sum(
        isinstance(value, Marker)
        for frame, _ in traceback.walk_tb(exc.__traceback__)
        for value in frame.f_locals.values()
    )


@contextlib.asynccontextmanager
async def session_of(
    upstream: Upstream, guarded: bool = True
) -> AsyncIterator[Tuple[aiohttp.ClientSession, str]]:
    traces = [client_cyclebreak()] if guarded else []
    upstream.start()
    try:
        async with aiohttp.ClientSession(trace_configs=traces) as session:
            yield session, upstream.url
    finally:
        upstream.stop()


async def in_a_task(session: aiohttp.ClientSession, url: str) -> None:
    await asyncio.ensure_future(call(session, url))


async def gathered(session: aiohttp.ClientSession, url: str) -> None:
    await asyncio.gather(call(session, url))


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("answer", [None, HALF, NOT_HTTP])
@pytest.mark.parametrize("call", [call, in_a_task, gathered])
def test_nothing_piles_up_in_a_worker_that_never_ends(
    call: Any, answer: Optional[bytes], loop: str
) -> None:
    """Bare, every failure waits for the collector; guarded, the last one does."""

    async def main(guarded: bool) -> List[int]:
        counts = []
        upstream = Upstream(() if answer is None else (answer,))
        async with session_of(upstream, guarded) as (session, url):
            with no_collector():
                before = len(alive(Marker)) + len(alive(ResponseHandler))
                for number in range(80):
                    try:
                        await call(session, url)
                    except FAILURES:
                        pass
                    await asyncio.sleep(0)
                    if number % 16 < 15:
                        continue
                    left = len(alive(Marker)) + len(alive(ResponseHandler))
                    counts.append(left - before)
        gc.collect()
        return counts

    bare = run(main(False), loop)
    assert bare[-1] >= 80
    # What breaks off after the headers is looked for now and then.
    assert max(run(main(True), loop)) <= (66 if answer == HALF else 2)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("call", [call, in_a_task, gathered])
def test_calls_of_a_worker_that_are_tried_again(call: Any, loop: str) -> None:
    """Bare, each leaves its first attempt to the collector; guarded, only the last."""

    async def main(guarded: bool) -> List[int]:
        counts = []
        async with session_of(CutsFirst(), guarded) as (session, url):
            with no_collector():
                before = len(alive(ResponseHandler))
                for number in range(40):
                    with contextlib.suppress(*(() if TRIES_AGAIN else FAILURES)):
                        await call(session, f"{url}{number}")
                    await asyncio.sleep(0)
                    counts.append(len(alive(ResponseHandler)) - before)
        gc.collect()
        return counts

    bare = run(main(False), loop)
    assert max(run(main(True), loop)) <= 2
    if AIOHTTP >= (3, 11, 14):
        pytest.skip(f"aiohttp {aiohttp.__version__} keeps none")
    assert bare[-1] >= 40


class Job:
    pass


JOB: "ContextVar[Any]" = ContextVar("job", default=None)


def test_calls_of_many_tasks_leave_few_timers() -> None:
    """Who awaits such a task has what it has raised in hand: it is looked at later."""

    async def main() -> int:
        timers: List[asyncio.TimerHandle] = []
        loop: Any = asyncio.get_running_loop()
        call_later = loop.call_later

        def note(*args: Any, **kwargs: Any) -> asyncio.TimerHandle:
            timers.append(call_later(*args, **kwargs))
            return timers[-1]

        loop.call_later = note
        async with session_of(Upstream(())) as (session, url):
            for _ in range(40):
                with contextlib.suppress(*FAILURES):
                    await in_a_task(session, url)
            return sum(not each.cancelled() for each in timers)

    assert run(main()) <= 1


def test_a_worker_keeps_no_context_of_an_earlier_job() -> None:
    """It is followed by a callback, and made while its first job makes a call."""

    async def main(guarded: bool) -> int:
        async with session_of(Upstream((HALF,)), guarded) as (session, url):

            async def work() -> int:
                for _ in range(3):
                    JOB.set(Job())
                    with contextlib.suppress(*FAILURES):
                        await call(session, url)
                await spin()
                gc.collect()
                return len(alive(Job))

            return await asyncio.ensure_future(work())

    assert run(main(False)) == 1
    assert run(main(True)) == 1


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_worker_that_waits_with_a_failure_keeps_no_context(goes_on: bool) -> None:
    """It was to be looked at again, in the context of its job, and has gone before."""

    async def main() -> int:
        async with session_of(Upstream((NOT_HTTP, OK))) as (session, url):

            async def work() -> int:
                JOB.set(Job())
                try:
                    await call(session, url)
                except FAILURES:
                    await spin()
                JOB.set(None)
                if goes_on:
                    await call(session, url)
                    await spin()
                return len(alive(Job))

            with no_collector():
                left = await asyncio.ensure_future(work())
                await spin()
                return left if goes_on else len(alive(Job))

    assert run(main()) == 0


@pytest.mark.parametrize("guarded", [False, True], ids=["bare", "guarded"])
def test_a_worker_has_nothing_of_a_call_that_took_too_long(guarded: bool) -> None:
    """Not even until its next call, which may need what this one has."""
    found: List[bool] = []

    async def main() -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            sock.listen()  # nobody answers
            url = f"http://127.0.0.1:{sock.getsockname()[1]}/"
            traces = [client_cyclebreak()] if guarded else []
            timeout = aiohttp.ClientTimeout(total=0.05)
            async with aiohttp.ClientSession(
                trace_configs=traces, timeout=timeout
            ) as session:
                before = len(alive(Marker))
                with contextlib.suppress(asyncio.TimeoutError):
                    await call(session, url)
                await spin()
                found.append(len(alive(Marker)) > before)

    with no_collector():
        run(main())
    assert found == [False]


def test_a_worker_that_has_ended_leaves_nothing() -> None:
    async def main() -> int:
        async with session_of(Upstream((HALF,))) as (session, url):
            with no_collector():
                before = len(alive(Marker)) + len(alive(aiohttp.ClientResponse))
                for _ in range(5):
                    task = asyncio.ensure_future(call(session, url))
                    await asyncio.wait([task])
                    assert task.exception() is not None
                    del task
                await spin()
                return len(alive(Marker)) + len(alive(aiohttp.ClientResponse)) - before

    assert run(main()) == 0


@pytest.mark.parametrize(
    "gather", [list, enumerate, "in a dict", "in other tasks", "at once"]
)
def test_a_handler_has_the_failures_of_all_that_it_gathers(gather: Any) -> None:
    """However many they are, and in whatever it has them, until it has answered."""
    number = 3 * MOST_NOTED
    pauses = gather != "at once"
    kept: List[int] = []

    async def handler(
        request: web.Request, session: aiohttp.ClientSession, url: str
    ) -> str:
        with socket.socket() as sock:  # which nobody listens to
            sock.bind(("127.0.0.1", 0))
            refused = f"http://127.0.0.1:{sock.getsockname()[1]}/"
            failed: Any = await asyncio.gather(
                *(call(session, refused) for _ in range(number)), return_exceptions=True
            )
            if callable(gather):
                failed = list(gather(failed))
            elif gather == "in a dict":
                failed = dict(enumerate(failed))
            if pauses:  # other calls fail while it reports them
                for _ in range(2 * number):
                    with contextlib.suppress(*FAILURES):
                        other = call(session, refused)
                        if gather == "in other tasks":  # it has made no call itself
                            other = asyncio.gather(other)
                        await other
            if gather is enumerate:
                failed = dict(failed)
            if isinstance(failed, dict):
                failed = failed.values()
            kept.append(sum(map(markers_in, failed)))
        return "ok"

    async def main() -> int:
        async with gateway(handler, Upstream((OK,))) as fixture:
            return (await count_left(fixture, visits=1))["BaseRequest"]

    assert run(main()) == 0
    assert kept == [number] * 2


def test_a_worker_may_log_late() -> None:
    """The text is whole for ever, the locals until the task's next call has ended."""

    async def main() -> None:
        errors: List[BaseException] = []
        texts: List[str] = []
        async with session_of(Upstream((NOT_HTTP,))) as (session, url):
            for _ in range(3):
                try:
                    await call(session, url)
                except FAILURES as exc:
                    errors.append(exc)
                    texts.append(text_of(exc))
                await asyncio.sleep(0)
                assert markers_in(errors[-1]) == 1
                assert not any(map(markers_in, errors[:-1]))
            assert list(map(text_of, errors)) == texts

    run(main())


def test_a_success_is_a_next_call_too() -> None:
    """What the call before it has left goes, whatever becomes of this one."""

    async def main() -> None:
        errors: List[BaseException] = []
        async with session_of(Upstream((NOT_HTTP, OK))) as (session, url):
            try:
                await call(session, url)
            except FAILURES as exc:
                errors.append(exc)
            await asyncio.sleep(0)
            assert markers_in(errors[0]) == 1
            await call(session, url)
            await asyncio.sleep(0)
            assert markers_in(errors[0]) == 0

    run(main())


def test_an_exception_that_is_being_handled_is_left_whole() -> None:
    """Another call in the except block, which fails or not, is not the end of it."""

    async def main() -> None:
        answers = (HALF, HALF, OK)
        async with session_of(Upstream(answers)) as (session, url):
            try:
                try:
                    await call(session, url)
                except FAILURES:
                    try:
                        await call(session, url)
                    except FAILURES:
                        await call(session, url)  # this one succeeds
                        raise
            except FAILURES as exc:
                assert markers_in(exc) == 1
                # CPython 3.8 does not set it where a task is woken by an exception.
                assert exc.__context__ is None or markers_in(exc.__context__) == 1
                assert exc.__context__ is not None or sys.version_info < (3, 9)

    run(main())


@pytest.mark.parametrize("answer", [None, b"", HALF, NOT_HTTP])
def test_what_outer_functions_handle_is_left_whole(answer: Optional[bytes]) -> None:
    """However deep below it other calls fail, and whatever it is."""

    async def fail_inside(session: aiohttp.ClientSession, url: str) -> None:
        for _ in range(3):
            try:
                await call(session, url)
            except FAILURES:
                await asyncio.sleep(0)

    async def own_error() -> None:
        marker = Marker()
        raise ValueError(marker is None)

    async def swallow_and_raise(session: aiohttp.ClientSession, url: str) -> None:
        marker = Marker()
        try:
            await call(session, url)
        except FAILURES:
            pass
        raise ValueError(marker is None)

    async def main() -> None:
        upstream = Upstream(() if answer is None else (answer,))
        async with session_of(upstream) as (session, url):
            for fail in (
                own_error(),
                call(session, url),
                swallow_and_raise(session, url),
            ):
                try:
                    await fail
                except (ValueError, *FAILURES) as exc:
                    await fail_inside(session, url)
                    assert markers_in(exc) == 1
            # And what it has in a variable.
            last: Optional[BaseException] = None
            try:
                await call(session, url)
            except FAILURES as exc:
                last = exc
            await fail_inside(session, url)
            assert markers_in(last) == 1

    run(main())


def test_a_task_that_outlives_its_request_is_on_its_own() -> None:
    """What it meets is severed when it ends, and the request goes before that."""

    async def main() -> None:
        go = asyncio.Event()
        tasks: List[asyncio.Task[None]] = []

        async def later(session: aiohttp.ClientSession, url: str) -> None:
            await go.wait()
            await call(session, url)

        async def handler(
            request: web.Request, session: aiohttp.ClientSession, url: str
        ) -> str:
            tasks.append(asyncio.get_running_loop().create_task(later(session, url)))
            return "done"

        async with gateway(handler, Upstream((HALF,))) as fixture:
            with no_collector():
                before = len(alive(web.BaseRequest))
                markers = len(alive(Marker))
                for _ in range(3):
                    assert await fixture.service.ask() == (200, "done")
                while fixture.service.runner.server.connections:
                    await asyncio.sleep(0)
                await spin()
                if AIOHTTP >= (3, 11, 14) or AIOHTTP < (3, 10, 6):
                    # In between, close-cancel keeps them; the guard comes after that.
                    assert len(alive(web.BaseRequest)) == before
                go.set()
                await asyncio.wait(tasks)
                assert all(task.exception() is not None for task in tasks)
                tasks.clear()
                await fixture.service.settle()
                assert len(alive(web.BaseRequest)) == before
                assert len(alive(Marker)) == markers

    run(main())


def test_a_body_that_breaks_off_when_the_request_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of calls that are gathered the others go on when the first has failed."""
    looks: List[None] = []

    def look(*args: Any, look: Any = requests._look_at_unread) -> None:
        looks.append(None)
        look(*args)

    monkeypatch.setattr(requests, "_look_at_unread", look)

    async def main(guarded: bool, **options: Any) -> int:
        ends: List[asyncio.Future[None]] = []

        async def part(upstream: web.BaseRequest) -> web.StreamResponse:
            response = web.StreamResponse()
            response.content_length = 100
            await response.prepare(upstream)
            await response.write(b"half")
            await ends[-1]
            assert upstream.transport is not None
            upstream.transport.abort()
            return response

        async def read_on(
            request: web.Request, session: aiohttp.ClientSession, url: str
        ) -> None:
            async with session.get(url) as response:
                begun.set()
                with contextlib.suppress(aiohttp.ClientError):
                    await response.read()

        async def handler(
            request: web.Request, session: aiohttp.ClientSession, url: str
        ) -> str:
            ends.append(asyncio.get_running_loop().create_future())
            tasks.append(asyncio.ensure_future(read_on(request, session, other)))
            await begun.wait()
            return "ended"

        begun = asyncio.Event()
        tasks: List[asyncio.Future[None]] = []
        runner = web.ServerRunner(web.Server(part))
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        other = f"http://{host}:{port}/"
        try:
            async with gateway(
                handler,
                Upstream(()),
                guarded=guarded,
                install=lambda app: setup(app, **options),
            ) as fixture:
                with no_collector():
                    before = len(alive(web.Request))
                    await fixture.service.ask("/")
                    looks.clear()
                    for _ in range(1000):
                        if not guarded or options or len(looks) > 1:
                            break
                        await asyncio.sleep(0.01)
                    ends.pop().set_result(None)
                    await tasks.pop()
                    for _ in range(100):  # the next pause is 0.4 seconds
                        left = len(alive(web.Request)) - before
                        if not guarded or options or not left:
                            break
                        await asyncio.sleep(0.1)
                    return left
        finally:
            await runner.cleanup()

    assert run(main(False)) == 1
    assert run(main(True)) == 0
    # Nobody could ask any more what its options say.
    assert run(main(True, clear_frames=False)) == 1


@pytest.mark.parametrize("calls_too", [True, False])
def test_a_success_of_a_task_that_outlives_its_request(calls_too: bool) -> None:
    """It is a next call of the task's own, whether the request was followed or not."""
    errors: List[BaseException] = []
    left: List[int] = []
    tasks: List[Any] = []

    async def later(session: aiohttp.ClientSession, url: str, go: Any) -> None:
        await go.wait()
        for _ in range(2):
            try:
                await call(session, url)
            except FAILURES as exc:
                errors.append(exc)
            await asyncio.sleep(0)
            left.append(markers_in(errors[0]))

    async def main() -> None:
        go = asyncio.Event()

        async def handler(
            request: web.Request, session: aiohttp.ClientSession, url: str
        ) -> str:
            if calls_too:
                with contextlib.suppress(*FAILURES):
                    await call(session, url)
            tasks.append(asyncio.ensure_future(later(session, url, go)))
            return "done"

        answers = [NOT_HTTP] * calls_too + [NOT_HTTP, OK]
        async with gateway(handler, Upstream(answers)) as fixture:
            await fixture.service.ask()
            await spin()
            go.set()
            await tasks[0]
            await fixture.service.settle()

    run(main())
    assert len(errors) == 1
    assert left == [1, 0]


@pytest.mark.parametrize(("answers", "most"), [((), 101), ((HALF,), 101 + 32)])
@pytest.mark.parametrize("call", [call, in_a_task, gathered])
def test_a_stream_of_failing_calls_does_not_pile_up(
    call: Any, answers: Any, most: int
) -> None:
    """A handler that never ends has at most a hundred failed calls in hand.

    Those whose bodies break off are looked for now and then: once 32 more have come.
    """

    async def main(guarded: bool) -> int:
        found = []

        async def handler(
            request: web.Request, session: aiohttp.ClientSession, url: str
        ) -> str:
            for _ in range(300):
                try:
                    await call(session, url)
                except FAILURES:
                    pass
                await asyncio.sleep(0)
            found.append(len(alive(Marker)))
            return "done"

        async with gateway(handler, Upstream(answers), guarded=guarded) as fixture:
            with no_collector():
                before = len(alive(Marker))
                await fixture.ask()
                left = len(alive(Marker)) - before
                assert left == (0 if guarded else 300)
            gc.collect()
        return found[0] - before

    assert run(main(False)) == 300
    assert run(main(True)) <= most


@pytest.mark.parametrize("fails", [True, False])
def test_messages_that_a_task_of_others_handles_leave_no_trace(fails: bool) -> None:
    """Of each message its calls would be followed, until the stream ends."""
    found: List[int] = []

    @break_cycles
    async def handle_message(request: web.Request) -> None:
        if fails:
            raise ValueError

    async def main() -> int:
        messages: asyncio.Queue[Any] = asyncio.Queue()

        async def work() -> None:
            while True:
                request, handled = await messages.get()
                with contextlib.suppress(ValueError):
                    await handle_message(request)
                handled.set()

        async def handler(
            request: web.Request, session: aiohttp.ClientSession, url: str
        ) -> str:
            request["user"] = "somebody"
            for _ in range(50):
                handled = asyncio.Event()
                messages.put_nowait((request, handled))
                await handled.wait()
            found.append(len(alive(calls.Serving)))
            return "done"

        worker = asyncio.ensure_future(work())
        async with gateway(handler, Upstream(())) as fixture:
            with no_collector():
                # One after the other, so that the worker goes from one to the other.
                before = len(alive(calls.Serving))
                await asyncio.gather(fixture.service.ask(), fixture.service.ask())
        worker.cancel()
        return max(found) - before

    assert run(main()) <= 4


def test_a_task_of_others_handles_messages_of_several_requests_in_turn() -> None:
    """What fails for one of them is not left to the others, which go on."""

    async def main(guarded: bool) -> int:
        messages: asyncio.Queue[Any] = asyncio.Queue()
        sessions: List[aiohttp.ClientSession] = []
        urls: List[str] = []

        async def handle_message(request: web.Request) -> None:
            with contextlib.suppress(*FAILURES):
                await read(request, sessions[0], urls[0])

        if guarded:
            handle_message = break_cycles(handle_message)

        async def work() -> None:
            while True:
                request, handled = await messages.get()
                await handle_message(request)
                handled.set_result(None)
                del request, handled

        async def handler(
            request: web.Request, session: aiohttp.ClientSession, url: str
        ) -> str:
            sessions[:], urls[:] = [session], [url]
            turns[request.path] = asyncio.Queue()
            while await turns[request.path].get():
                handled = asyncio.get_running_loop().create_future()
                messages.put_nowait((request, handled))
                await handled
                done.put_nowait(None)
            return "done"

        turns: Dict[str, asyncio.Queue[bool]] = {}
        done: asyncio.Queue[None] = asyncio.Queue()
        worker = asyncio.ensure_future(work())
        async with gateway(handler, Upstream((HALF,)), guarded=guarded) as fixture:
            with no_collector():
                before = len(alive())
                asked = []
                for path in ("/stays", "/ends"):
                    asked.append(asyncio.ensure_future(fixture.service.ask(path)))
                    while path not in turns:
                        await asyncio.sleep(0)
                for path in ("/ends", "/stays", "/ends"):
                    turns[path].put_nowait(True)
                    await done.get()
                turns["/ends"].put_nowait(False)
                assert (await asked[1])[0] == 200
                await spin()
                left = sum(each.path == "/ends" for each in alive())
                turns["/stays"].put_nowait(False)
                assert (await asked[0])[0] == 200
                await fixture.service.settle()
                assert len(alive()) - before == (0 if guarded else 2)
        worker.cancel()
        return left

    assert run(main(False)) == 1
    assert run(main(True)) == 0


@pytest.mark.parametrize("keeps", [True, False])
def test_keep_cycles_is_of_a_stream_of_failing_calls_too(keeps: bool) -> None:
    """While it goes on, as when it has ended."""
    number = 2 * MOST_NOTED
    kept: Deque[BaseException] = deque()  # where nobody looks for what is in use
    whole: List[int] = []

    async def handler(
        request: web.Request, session: aiohttp.ClientSession, url: str
    ) -> str:
        for _ in range(number):
            try:
                await call(session, url)
            except FAILURES as exc:
                kept.append(exc)
            await asyncio.sleep(0)
        whole.append(sum(map(markers_in, kept)))
        return "done"

    async def main() -> None:
        decorated = keep_cycles(_with_request(handler)) if keeps else handler
        async with gateway(decorated, Upstream(())) as fixture:
            await fixture.ask()

    run(main())
    if keeps:
        assert whole == [number]
    else:
        assert whole[0] <= MOST_NOTED + 1
    assert sum(map(markers_in, kept)) == (number if keeps else 0)


class BrokenOff(Fixture):
    """Answers that end before they should."""

    async def ask(self, path: str = "/") -> Tuple[int, str]:
        client = await self.service.connect()
        await client.get()
        with contextlib.suppress(ConnectionError):
            await client.answer()
        client.close()
        await self.service.settle()
        return 0, ""


@pytest.mark.parametrize("loop", LOOPS)
def test_a_body_that_breaks_off_in_a_handler_that_refuses(loop: str) -> None:
    """What it raises is something else, outside of any ``except`` block."""

    async def handler(
        request: web.Request, session: aiohttp.ClientSession, url: str
    ) -> str:
        async with session.get(url) as response:
            with contextlib.suppress(aiohttp.ClientError):
                await response.read()
        raise web.HTTPBadGateway

    async def main(guarded: bool) -> Dict[str, int]:
        async with gateway(handler, Upstream((HALF,)), guarded=guarded) as fixture:
            return await count_left(fixture)

    assert_stopped(main, loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_body_that_is_read_when_the_response_is_sent(loop: str) -> None:
    """It breaks off after the handler has returned."""

    async def stream(
        request: web.Request, session: aiohttp.ClientSession, url: str
    ) -> web.Response:
        response = await session.get(url)

        async def chunks() -> AsyncIterator[bytes]:
            async with response:
                async for chunk in response.content.iter_any():
                    yield chunk

        return web.Response(body=chunks())

    async def main(guarded: bool) -> Dict[str, int]:
        async with gateway(stream, Upstream((HALF,)), guarded=guarded) as fixture:
            return await count_left(BrokenOff(fixture.service, fixture.session))

    assert_stopped(main, loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_body_that_takes_too_long_when_the_response_is_sent(loop: str) -> None:
    """The call's timeout is raised out of the request's task, which its frames have."""
    timeout = aiohttp.ClientTimeout(total=0.05)

    async def stream(
        request: web.Request, session: aiohttp.ClientSession, url: str
    ) -> web.Response:
        response = await session.get(url, timeout=timeout)

        async def chunks() -> AsyncIterator[bytes]:
            async with response:
                async for chunk in response.content.iter_any():
                    yield chunk

        return web.Response(body=chunks())

    async def main(guarded: bool) -> int:
        async with gateway(stream, SaysHalf(), guarded=guarded) as fixture:
            broken_off = BrokenOff(fixture.service, fixture.session)
            return (await count_left(broken_off))["BaseRequest"]

    assert run(main(False), loop) == (4 if AIOHTTP >= (3, 8, 2) else 0)
    assert run(main(True), loop) == 0


class SaysHalf(Upstream):
    """Sends half a body, and falls silent."""

    def __init__(self) -> None:
        super().__init__((HALF,))

    def answer(self, client: socket.socket, answer: Optional[bytes]) -> bool:
        super().answer(client, answer)
        return False


class Final(type):
    """Refuses to be subclassed, and to be hashed."""

    def __new__(cls, name: str, bases: Any, namespace: Any) -> Any:
        if any(isinstance(base, Final) for base in bases):
            raise TypeError("final")
        return super().__new__(cls, name, bases, namespace)

    def __hash__(cls) -> int:
        raise TypeError("not to be hashed")


def test_classes_of_the_session_that_fight_back() -> None:
    """They are used as they are: the call works, and is followed by its response."""

    class Request(ClientRequest, metaclass=Final):
        pass

    class WebSocket(aiohttp.ClientWebSocketResponse, metaclass=Final):
        pass

    def make_websocket(*args: Any, **kwargs: Any) -> Any:
        return aiohttp.ClientWebSocketResponse(*args, **kwargs)

    async def talk(
        request: web.Request, session: aiohttp.ClientSession, url: str
    ) -> str:
        async with session.ws_connect(url) as websocket:
            return type(websocket).__name__

    async def main(**options: Any) -> Tuple[int, str]:
        upstream = WebSocketUpstream((b"\x88\x02\x03\xe8",))
        async with gateway(talk, upstream, **options) as fixture:
            return await fixture.ask()

    plain = (200, "ClientWebSocketResponse")
    assert run(main(request_class=Request)) == plain
    assert run(main(ws_response_class=WebSocket)) == (200, "WebSocket")
    assert run(main(ws_response_class=make_websocket)) == plain


def test_a_response_that_is_read_too_late() -> None:
    """From 3.10.9 on all have one exception, in a module of aiohttp's, for good."""

    async def handler(
        request: web.Request, session: aiohttp.ClientSession, url: str
    ) -> str:
        async with session.get(url) as response:
            assert response.content.is_eof()
        try:
            return await response.text()
        except aiohttp.ClientConnectionError as exc:
            return str(exc)

    async def main(guarded: bool) -> Dict[str, int]:
        async with gateway(handler, Upstream((OK,)), guarded=guarded) as fixture:
            assert await fixture.ask() == (200, "Connection closed")
            return await count_left(fixture)

    assert run(main(False))["BaseRequest"] == 4
    assert run(main(True)) == NOTHING


def test_what_reads_responses_too_late_and_hides_its_request() -> None:
    """It is not known by whom, but very many are not kept."""

    async def read_too_late(
        requests: List[web.Request], session: aiohttp.ClientSession, url: str
    ) -> str:
        async with session.get(url) as response:
            pass
        try:
            return await response.text()
        except aiohttp.ClientConnectionError as exc:
            return str(exc)

    async def handler(
        request: web.Request, session: aiohttp.ClientSession, url: str
    ) -> str:
        return await read_too_late([request], session, url)

    async def main(guarded: bool) -> int:
        async with gateway(handler, Upstream((OK,)), guarded=guarded) as fixture:
            return (await count_left(fixture, visits=100))["BaseRequest"]

    assert run(main(False)) == 100
    assert run(main(True)) < 80


def test_a_response_that_is_read_too_late_by_another_request() -> None:
    """It finds the locals of what it has in hand: nobody else severs that."""
    found: List[bool] = []

    async def read_too_late(session: aiohttp.ClientSession, url: str) -> str:
        marker = "local"  # noqa: F841
        async with session.get(url) as response:
            pass
        try:
            return await response.text()
        except aiohttp.ClientConnectionError as exc:
            raise LookupError from exc

    async def handler(
        request: web.Request, session: aiohttp.ClientSession, url: str
    ) -> str:
        if request.path == "/ends":
            return await read(request, session, url)
        try:
            await read_too_late(session, url)
        except LookupError as exc:
            begun.set()
            await ended.wait()
            assert exc.__cause__ is not None
            frames = list(frames_of(exc.__cause__))
            found.append(any("marker" in frame.f_locals for frame in frames))
            del frames
        return "reported"

    async def main() -> None:
        nonlocal begun, ended
        begun, ended = asyncio.Event(), asyncio.Event()
        async with gateway(handler, Upstream((OK,))) as fixture:
            reports = asyncio.ensure_future(fixture.service.ask("/reports"))
            await begun.wait()
            assert (await fixture.service.ask("/ends"))[0] == 200
            await spin()
            ended.set()
            assert (await reports)[0] == 200

    begun: Any = None
    ended: Any = None
    run(main())
    assert found == [True]


def test_what_a_handler_calls_reads_a_response_too_late() -> None:
    """From CPython 3.12 on its frame leads to that of the handler."""

    async def read_too_late(session: aiohttp.ClientSession, url: str) -> str:
        async with session.get(url) as response:
            pass
        try:
            return await response.text()
        except aiohttp.ClientConnectionError as exc:
            return str(exc)

    async def handler(
        request: web.Request, session: aiohttp.ClientSession, url: str
    ) -> str:
        return await read_too_late(session, url)

    async def main(guarded: bool) -> int:
        async with gateway(handler, Upstream((OK,)), guarded=guarded) as fixture:
            return (await count_left(fixture))["BaseRequest"]

    if sys.version_info >= (3, 12):
        assert run(main(False)) == 4
    assert run(main(True)) == 0


@pytest.mark.skipif(
    sys.version_info < (3, 12), reason="frames that have ended lead to no others"
)
def test_others_that_read_responses_too_late_meanwhile() -> None:
    """Their frames come before those by which a request is led to."""

    async def read_too_late(session: aiohttp.ClientSession, url: str) -> str:
        async with session.get(url) as response:
            pass
        try:
            return await response.text()
        except aiohttp.ClientConnectionError as exc:
            return str(exc)

    async def handler(
        request: web.Request, session: aiohttp.ClientSession, url: str
    ) -> str:
        message = await read_too_late(session, url)
        if request.path == "/waits":
            begun.set()
            await ended.wait()
        return message

    async def main(guarded: bool) -> int:
        nonlocal begun, ended
        async with gateway(handler, Upstream((OK,)), guarded=guarded) as fixture:
            await fixture.ask()
            with no_collector():
                before = len(alive())
                begun, ended = asyncio.Event(), asyncio.Event()
                waits = asyncio.ensure_future(fixture.service.ask("/waits"))
                await begun.wait()
                answer = await fixture.service.ask()
                assert answer == (200, "Connection closed")
                ended.set()
                assert await waits == (200, "Connection closed")
                await fixture.service.settle()
                await spin()
                return len(alive()) - before

    begun: Any = None
    ended: Any = None
    assert run(main(False)) == 2
    assert run(main(True)) == 0


@pytest.mark.skipif(AIOHTTP < (3, 10, 9), reason="each response has its own exception")
@pytest.mark.parametrize("calls_another", [False, True])
def test_what_a_worker_has_read_too_late_is_looked_through_once(
    calls_another: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for days, and the requests that come then have nothing to do with it."""
    looks: List[bool] = []
    leads_to = calls.leads_to

    def look(exc: BaseException, target: object) -> bool:
        looks.append(leads_to(exc, target))
        return looks[-1]

    monkeypatch.setattr(calls, "leads_to", look)

    async def read_too_late(session: aiohttp.ClientSession, url: str) -> None:
        async with session.get(url) as response:
            pass
        with contextlib.suppress(aiohttp.ClientConnectionError):
            await response.read()

    async def handler(
        request: web.Request, session: aiohttp.ClientSession, url: str
    ) -> str:
        if request.path == "/late":
            await read_too_late(session, url)
        return "answered"

    async def work(session: aiohttp.ClientSession, url: str) -> None:
        for _ in range(5):
            if calls_another:
                await read_too_late(session, url)
                continue
            async with session.get(url) as response:
                pass
            with contextlib.suppress(aiohttp.ClientConnectionError):
                await response.read()
        is_idle.set()
        await asyncio.Event().wait()

    async def main() -> None:
        nonlocal is_idle
        is_idle = asyncio.Event()
        upstream = Upstream((OK,))
        async with gateway(handler, upstream) as fixture:
            await fixture.service.ask("/late")
            worker = asyncio.ensure_future(work(fixture.session, upstream.url))
            await is_idle.wait()
            looks.clear()
            for path in ("/", "/", "/", "/late", "/", "/"):
                assert await fixture.service.ask(path) == (200, "answered")
                await spin()
            worker.cancel()
            await asyncio.wait([worker])
        assert len(looks) <= 3  # twice for the one that has raised it

    is_idle: Any = None
    run(main())


class WithoutContent(aiohttp.ClientResponse):
    """Reads its body at once, and has no stream then."""

    async def start(self, *args: Any) -> "WithoutContent":
        await super().start(*args)
        self._body = await self.content.read()
        self.content: Any = None
        return self


@pytest.mark.parametrize("with_loop", [False, True])
def test_a_call_that_is_thrown_away(with_loop: bool) -> None:
    """Nobody is there any more who could have in hand what it has failed with.

    That is a ``GeneratorExit``, or that its connection cannot be closed any more.
    """
    ended: List[BaseException] = []

    async def note_end(session: Any, context: Any, params: Any) -> None:
        ended.append(params.exception)

    async def main() -> Any:
        trace_config = aiohttp.TraceConfig()
        signals: Any = trace_config
        signals.on_request_exception.append(note_end)
        session = aiohttp.ClientSession(
            trace_configs=[client_cyclebreak(), trace_config]
        )
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        task = asyncio.ensure_future(call(session, url))
        while not [each for each in alive(ResponseHandler) if each.transport]:
            await asyncio.sleep(0)
        await spin()
        coroutine: Any = task.get_coro()
        if not with_loop:
            coroutine.close()
            assert not holders.in_hand
            task.cancel()
            with contextlib.suppress(RuntimeError, asyncio.CancelledError):
                await task
        return session, coroutine

    with socket.create_server(("127.0.0.1", 0)) as silent:
        session, coroutine = run(main())
        if with_loop:
            with pytest.raises(RuntimeError, match="Event loop is closed"):
                coroutine.close()
            assert not holders.in_hand
    assert [type(each) for each in ended] == [
        RuntimeError if with_loop else GeneratorExit
    ]
    with contextlib.suppress(RuntimeError):
        run(session.close())


def test_calls_that_are_followed_from_the_middle_of_a_request() -> None:
    """The first session that asks for it is made by its handler."""

    async def main(guarded: bool) -> int:
        async def handler(request: web.Request) -> web.Response:
            trace_configs = [client_cyclebreak()] if guarded else None
            async with aiohttp.ClientSession(trace_configs=trace_configs) as session:
                with contextlib.suppress(*FAILURES):
                    await read(request, session, upstream.url)
            return web.Response()

        app = web.Application()
        app.router.add_get("/", handler)
        if guarded:
            setup(app)
        upstream = Upstream((HALF,))
        upstream.start()
        try:
            with no_collector():
                before = len(alive())
                async with serve(app) as service:
                    for _ in range(3):
                        calls.are_followed = False
                        assert (await service.ask())[0] == 200
                        await service.settle()
                return len(alive()) - before
        finally:
            upstream.stop()

    assert run(main(guarded=False)) == 3
    assert run(main(guarded=True)) == 0


def test_a_call_succeeds_that_cannot_be_followed() -> None:
    """There is no stream to look at, or no session to change."""
    with pytest.warns(DeprecationWarning, match="ClientSession"):

        class Sealed(aiohttp.ClientSession):
            def __setattr__(self, name: str, value: Any) -> None:
                if name == "_ws_response_class" and hasattr(self, name):
                    raise AttributeError(name)
                object.__setattr__(self, name, value)

    async def handler(
        request: web.Request, session: aiohttp.ClientSession, url: str
    ) -> str:
        traces = [client_cyclebreak()]
        if "websocket" not in request.path:
            return await read(request, session, url)
        sealed = Sealed(trace_configs=traces)
        async with sealed, sealed.ws_connect(url) as websocket:
            return type(websocket).__name__

    async def main(upstream: Upstream, path: str) -> Tuple[int, str]:
        response_class: Any = WithoutContent
        async with gateway(handler, upstream, response_class=response_class) as fixture:
            return await fixture.ask(path)

    assert run(main(Upstream((OK,)), "/")) == (200, "ok")
    upstream = WebSocketUpstream((b"\x88\x02\x03\xe8",))
    plain = (200, "ClientWebSocketResponse")
    assert run(main(upstream, "/websocket")) == plain


def test_successful_calls_leave_no_trace_of_themselves() -> None:
    """One long request may make any number of them."""

    async def main() -> None:
        sizes = []

        async def handler(
            request: web.Request, session: aiohttp.ClientSession, url: str
        ) -> str:
            serving = calls.current.get()
            assert serving is not None
            for _ in range(500):
                await read(request, session, url)
                sizes.append(len(serving._followed))
            return "done"

        async with gateway(handler, Upstream((OK,))) as fixture:
            await fixture.ask()
        assert len(sizes) == 500
        assert max(sizes) <= 64

    run(main())


def test_a_decorated_route_and_a_guarded_server() -> None:
    async def main(how: str) -> Dict[str, int]:
        handler: Any = swallow
        if how == "decorator":
            handler = break_cycles(swallow)
        async with gateway(handler, Upstream((HALF,)), install=lambda app: None) as f:
            return await count_left(f)

    assert run(main("decorator")) == NOTHING


def test_it_is_made_once_for_many_sessions() -> None:
    """A session a request is a bad habit, and must not make classes each time."""

    async def main() -> None:
        trace = client_cyclebreak()
        upstream = Upstream((OK,))
        upstream.start()
        classes = set()
        try:
            for _ in range(3):
                async with aiohttp.ClientSession(trace_configs=[trace]) as session:
                    async with session.get(upstream.url) as response:
                        assert await response.read() == b"ok"
                    classes.add(session._ws_response_class)
        finally:
            upstream.stop()
        assert len(classes) == 1

    run(main())


@pytest.mark.parametrize("loop", LOOPS)
def test_a_call_that_fails_for_an_upload_is_stopped_too(loop: str) -> None:
    """The handler has read its body, and swallows the failure."""

    async def main(guarded: bool) -> int:
        upstream = Upstream([b""])
        async with gateway(read_and_swallow, upstream, guarded=guarded) as fixture:
            with no_collector():
                before = len(alive(web.BaseRequest))
                for _ in range(3):
                    client = await fixture.service.connect()
                    await client.send(
                        b"GET / HTTP/1.1\r\nHost: localhost\r\n"
                        b"Content-Length: 4\r\n\r\nbody"
                    )
                    assert (await client.answer())[0] == 502
                    client.close()
                    await fixture.service.settle()
                left = len(alive(web.BaseRequest)) - before
            gc.collect()
        return left

    assert run(main(True), loop) == 0
    if run(main(False), loop) == 0:
        pytest.skip(f"aiohttp {aiohttp.__version__} keeps none")


class AnswersEarly(Upstream):
    """Sends the headers before the upload has come, and later half of the body."""

    def __init__(self) -> None:
        super().__init__([HALF])
        self.upload_fails = threading.Event()

    def answer(self, client: socket.socket, answer: Optional[bytes]) -> bool:
        path_asked_of(client)
        headers, _, half = HALF.rpartition(b"\r\n")
        client.sendall(headers + b"\r\n")
        self.upload_fails.wait(10)
        client.sendall(half)
        return True


@pytest.mark.parametrize("loop", LOOPS)
def test_an_upload_that_fails_once_the_headers_have_come(loop: str) -> None:
    """The connection keeps that exception, and the body one of its own."""
    upstream = AnswersEarly()

    async def handle(
        request: web.Request, session: aiohttp.ClientSession, url: str
    ) -> web.Response:
        has_come = asyncio.Event()
        failed = asyncio.Event()

        async def chunks() -> AsyncIterator[bytes]:
            yield request.path.encode()
            await has_come.wait()
            failed.set()
            raise LookupError

        upstream.upload_fails.clear()
        try:
            async with session.post(url, data=chunks()) as response:
                has_come.set()
                await failed.wait()
                await spin()
                upstream.upload_fails.set()
                await response.read()
        except FAILURES as exc:
            return web.Response(status=502, text=type(exc).__name__)
        raise AssertionError

    async def main(guarded: bool) -> int:
        async with gateway(handle, upstream, guarded=guarded) as fixture:
            assert await fixture.ask() == (502, "ClientPayloadError")
            return (await count_left(fixture))["BaseRequest"]

    assert run(main(False), loop) == 4
    upstream = AnswersEarly()
    assert run(main(True), loop) == 0


class RefusesEarly(Upstream):
    """Refuses the upload before it has come; all of the answer is in its headers."""

    def answer(self, client: socket.socket, answer: Optional[bytes]) -> bool:
        path_asked_of(client)
        client.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
        client.recv(65536)  # until the connection ends
        return False


@pytest.mark.skipif(
    not (3, 9) <= AIOHTTP < (3, 11, 14),
    reason="the call does not have the connection of the upload any more",
)
@pytest.mark.parametrize("loop", LOOPS)
def test_an_upload_that_fails_when_all_of_the_answer_has_come(loop: str) -> None:
    """It is cancelled then, and raises something else."""

    async def handle(
        request: web.Request, session: aiohttp.ClientSession, url: str
    ) -> web.Response:
        failed = asyncio.Event()

        async def chunks() -> AsyncIterator[bytes]:
            yield request.path.encode()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                failed.set()
                raise LookupError from None

        async with session.post(url, data=chunks()) as response:
            await failed.wait()
            await spin()
            return web.Response(status=response.status)

    for guarded, left in ((False, 4), (True, 0)):
        upstream = RefusesEarly([b""])
        found = requests_left(handle, upstream, 413, loop, guarded=guarded)
        assert found == left


@pytest.mark.skipif(
    AIOHTTP >= (3, 11, 14),
    reason="nothing keeps the exception of the upload when the call is known to fail",
)
@pytest.mark.parametrize("steps", range(4))
@pytest.mark.parametrize("loop", LOOPS)
def test_an_upload_that_fails_with_its_call(loop: str, steps: int) -> None:
    """In the same step of the event loop: the connection keeps that exception."""

    async def handle(
        request: web.Request, session: aiohttp.ClientSession, url: str
    ) -> web.Response:
        async def chunks() -> AsyncIterator[bytes]:
            path = request.path
            (transport,) = {each.transport for each in alive(ResponseHandler)} - {None}
            yield path.encode()
            while not transport.is_closing():
                await asyncio.sleep(0)
            for _ in range(steps):
                await asyncio.sleep(0)
            raise LookupError

        try:
            async with session.post(url, data=chunks()) as response:
                await response.read()
        except (*FAILURES, LookupError):  # itself, up to aiohttp 3.9
            return web.Response(status=502)
        raise AssertionError

    for guarded, left in ((False, 4), (True, 0)):
        upstream = Upstream([b""])
        found = requests_left(handle, upstream, 502, loop, guarded=guarded)
        assert found == left


@pytest.mark.skipif(AIOHTTP < (3, 14), reason="aiohttp has no UploadTracker")
@pytest.mark.parametrize("is_stored", [False, True])
def test_what_a_tracker_of_uploads_raises(is_stored: bool) -> None:
    """Nobody but the handler is told of it, which has the tracker in a local."""

    async def handle(
        request: web.Request, session: aiohttp.ClientSession, url: str
    ) -> web.Response:
        async def chunks() -> AsyncIterator[bytes]:
            yield b"chunk"
            await asyncio.Event().wait()

        client: Any = aiohttp  # with what only its newest releases have
        tracker = client.UploadTracker()
        call: Any = session.post
        async with call(url, data=chunks(), upload_tracker=tracker) as response:
            assert await response.read() == b"ok"
        try:
            await tracker.upload_complete
        except aiohttp.ClientError as exc:
            if is_stored:
                request["error"] = exc
            return web.Response(status=502)
        raise AssertionError

    for guarded, left in ((False, 4), (True, 0 if is_stored else 4)):
        upstream = Upstream((OK,))
        found = requests_left(handle, upstream, 502, guarded=guarded)
        assert found == left


async def read_and_swallow(
    request: web.Request, session: aiohttp.ClientSession, url: str
) -> web.Response:
    await request.read()
    return await swallow(request, session, url)
