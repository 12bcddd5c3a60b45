"""Clients that go wrong in every phase: everybody else is answered, nothing is left."""

import asyncio
import contextlib
import gc
import socket
import sys
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from aiohttp_cyclebreak import connections, guard_server, holders, setup

from .service import (
    AIOHTTP,
    HANDSHAKE,
    LOOPS,
    TIMEOUT,
    Client,
    Service,
    run,
    spin,
    start,
)

pytestmark = pytest.mark.usefixtures("few_objects")

VISITS = 2
CHUNK = b"x" * 65536

# AppRunner(handler_cancellation=True) is there from aiohttp 3.9 on.
CANCELLATION = [False, True] if AIOHTTP >= (3, 9) else [False]

# What is counted: requests, their responses, and connections.
COUNTED = (web.BaseRequest, web.StreamResponse, RequestHandler)

# How an application is guarded, and what must be gone after a client's fault.  The
# connections that never carried a request are out of a middleware's reach.
GUARDS: Dict[str, Tuple[Any, Any, Tuple[type, ...]]] = {
    "setup": (setup, None, COUNTED[:2]),
    "server": (None, guard_server, COUNTED),
}


async def until(condition: Callable[[], Any]) -> None:
    """Wait for a condition, for as long as only a hang would take."""
    for _ in range(int(TIMEOUT * 1000)):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise TimeoutError(f"it never came true: {condition}")


@contextlib.contextmanager
def new_objects() -> Iterator[Callable[[], Dict[type, int]]]:
    """Leave freeing to reference counts; count what has come since and is there."""

    def count() -> Dict[type, int]:
        found = dict.fromkeys(COUNTED, 0)
        known: Dict[int, List[type]] = {}  # a class may refuse to be a key
        for each in gc.get_objects():  # none that are frozen
            counted = known.get(id(type(each)))
            if counted is None:
                bases = {id(base) for base in type(each).__mro__}
                counted = [cls for cls in COUNTED if id(cls) in bases]
                known[id(type(each))] = counted
            for cls in counted:
                found[cls] += 1
        return found

    gc.disable()
    gc.freeze()
    try:
        yield count
    finally:
        # Here, and not in the middle of something else: what is thrown away logs.
        gc.collect()
        gc.unfreeze()
        gc.enable()


class State:
    """Where the server's handlers are, for the clients to know when to go wrong."""

    def __init__(self) -> None:
        self.begun = 0  # handlers that have come to the point of the fault
        self.ended = 0
        self.release = asyncio.Event()

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/ok", self.ok)
        app.router.add_get("/fail", self.fail)
        app.router.add_get("/raise", self.refuse)
        app.router.add_post("/echo", self.echo)
        app.router.add_post("/body", self.counted(self.body))
        app.router.add_get("/wait", self.counted(self.wait))
        app.router.add_get("/stream", self.counted(self.stream))
        app.router.add_get("/websocket", self.counted(self.websocket))
        return app

    def counted(self, handler: Any) -> Any:
        async def counting(request: web.Request) -> web.StreamResponse:
            try:
                return await handler(request)  # type: ignore[no-any-return]
            except BaseException as exc:
                kept = exc  # noqa: F841  # a cycle through this frame
                raise
            finally:
                self.ended += 1

        return counting

    async def ok(self, request: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def fail(self, request: web.Request) -> web.Response:
        # Returned: raised, it would leave something of its own on a bare server.
        return web.Response(status=409, text="no")

    async def refuse(self, request: web.Request) -> web.Response:
        raise web.HTTPConflict(text="no")

    async def echo(self, request: web.Request) -> web.Response:
        return web.Response(text=await request.text())

    async def body(self, request: web.Request) -> web.Response:
        await request.content.readany()
        self.begun += 1
        await request.read()
        raise web.HTTPBadRequest(text="never asked for")

    async def wait(self, request: web.Request) -> web.Response:
        self.begun += 1
        await self.release.wait()
        raise web.HTTPGone(text="waited")

    async def stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(CHUNK)
        self.begun += 1
        while True:
            await response.write(CHUNK)
            await asyncio.sleep(0)  # a write to a lost connection may not suspend

    async def websocket(self, request: web.Request) -> web.StreamResponse:
        response = web.WebSocketResponse()
        await response.prepare(request)
        await response.receive_str()
        self.begun += 1
        # Whatever comes next is no text: this raises, or it is cancelled.
        await response.receive_str()
        return response


def get(path: str, *headers: str) -> bytes:
    return "\r\n".join(
        [f"GET {path} HTTP/1.1", "Host: localhost", *headers, "", ""]
    ).encode()


def post(path: str, length: int) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}"
    return f"{head}\r\n\r\n".encode()


UPGRADE = get("/websocket", *HANDSHAKE)
TEXT_FRAME = b"\x81\x82\0\0\0\0hi"  # masked, as a client's must be


# What a client has sent when it goes wrong, and whether a handler has begun by then.
PHASES: Dict[str, Tuple[bytes, bool]] = {
    "connected": (b"", False),
    "headers": (b"GET /ok HTTP/1.1\r\nHost: loc", False),
    "body": (post("/body", 100_000) + b"half of it", True),
    "chunked body": (
        b"POST /body HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"4\r\nhalf\r\n5\r\nand",
        True,
    ),
    "handler": (get("/wait"), True),
    "response": (get("/stream"), True),
    "pipelined, between": (get("/fail") + b"GET /ok HT", False),
    "pipelined, the first at work": (get("/wait") + get("/fail") + get("/ok"), True),
    "pipelined, the second's body": (
        get("/fail") + post("/body", 100_000) + b"half of it",
        True,
    ),
    "websocket": (UPGRADE + TEXT_FRAME, True),
    "websocket, in a frame": (UPGRADE + TEXT_FRAME + TEXT_FRAME[:3], True),
}


def close(client: Client) -> None:
    client.close()


def reset(client: Client) -> None:
    client.reset()


def half_close(client: Client) -> None:
    client.sock.shutdown(socket.SHUT_WR)


def garbage(client: Client) -> None:
    """It goes on with what is no HTTP, no body and no frame, and hangs up."""
    client.sock.send(b"\xff\x00 is nothing\r\n\r\n" * 3)
    client.close()


FAULTS = {f.__name__: f for f in (close, reset, half_close, garbage)}


async def start_state(
    state: State, name: str, timeout: float = 0.1, **options: Any
) -> Tuple[web.AppRunner, Service]:
    """Serve it guarded; what is still at work at the end is given *timeout* seconds."""
    app = state.application()
    guard_app, guard_runner, _ = GUARDS.get(name, (None, None, ()))
    if guard_app is not None:
        guard_app(app)
    site_options: Dict[str, Any] = {}
    (options if AIOHTTP >= (3, 9) else site_options)["shutdown_timeout"] = timeout
    runner = web.AppRunner(app, **options)
    await runner.setup()
    if guard_runner is not None:
        guard_runner(runner)
    return runner, await start(runner, **site_options)


async def behave(client: Client) -> None:
    """Somebody else, on a connection of its own, who is to be answered as ever."""
    await client.get("/ok")
    assert await client.answer() == (200, "ok")
    await client.get("/fail")
    assert await client.answer() == (409, "no")
    await client.post("/echo", b"said")
    assert await client.answer() == (200, "said")


def watch_callbacks() -> List[str]:
    """What the event loop reports, as texts: an exception would be held by them."""
    reports: List[str] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda loop, context: reports.append(f"{context!r}")
    )
    return reports


async def go_wrong(
    name: str, phase: str, fault: str, **options: Any
) -> Tuple[Dict[type, int], List[str]]:
    """Let clients go wrong; say what is left and what the event loop reported."""
    sent, begins = PHASES[phase]
    state = State()
    reports = watch_callbacks()
    runner, service = await start_state(state, name, **options)
    server: Any = runner.server
    other = await service.connect()
    await behave(other)
    with new_objects() as count:
        for _ in range(VISITS):
            begun = state.begun
            state.release.clear()
            client = await service.connect()
            await until(lambda: len(server.connections) == 2)
            await client.send(sent)
            await until(lambda begun=begun + begins: state.begun == begun)
            FAULTS[fault](client)
            await behave(other)
            state.release.set()
            if fault == "half_close":
                # The server has read its last; it may still have things to say.
                await drain(client)
                client.close()
            await until(lambda: len(server.connections) == 1)
            await until(lambda: state.ended == state.begun)
            await behave(other)
        other.close()
        await service.settle()
        left = count()
    await runner.cleanup()
    return left, reports


async def drain(client: Client) -> None:
    loop = asyncio.get_running_loop()
    try:
        while await asyncio.wait_for(loop.sock_recv(client.sock, 65536), TIMEOUT):
            pass
    except ConnectionError:
        pass


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("cancellation", CANCELLATION)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("phase", PHASES)
def test_a_client_that_goes_wrong_leaves_nothing(
    phase: str, fault: str, cancellation: bool, loop: str
) -> None:
    """Somebody else is answered all the while, bare as guarded."""
    options = {"handler_cancellation": True} if cancellation else {}
    bare, reports = run(go_wrong("bare", phase, fault, **options), loop)
    if PHASES[phase][1]:  # the handler keeps what it is ended by, on every version
        assert bare[web.BaseRequest] >= VISITS
    for name, (_, _, gone) in GUARDS.items():
        if name == "setup" and fault == "garbage" and not PHASES[phase][1]:
            continue  # a malformed request never comes to a middleware
        if name == "setup" and loop != "asyncio":
            continue  # what differs between event loops does not between guards
        left, guarded_reports = run(go_wrong(name, phase, fault, **options), loop)
        assert {cls: left[cls] for cls in gone} == dict.fromkeys(gone, 0), name
        assert len(guarded_reports) <= len(reports), guarded_reports


@pytest.mark.parametrize("loop", LOOPS)
def test_a_client_that_sends_one_byte_at_a_time(loop: str) -> None:
    """Its requests are answered as those of any other, and then it is gone."""
    sent = (
        get("/ok")
        + post("/echo", 4)
        + b"slow"
        + get("/raise")
        + b"POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        b"\r\n2\r\nby\r\n3;ext=1\r\nte!\r\n0\r\n\r\n" + get("/missing")
    )

    async def main(name: str) -> Dict[type, int]:
        state = State()
        runner, service = await start_state(state, name)
        with new_objects() as count:
            client = await service.connect()
            client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in sent:
                await client.send(bytes([byte]))
                await asyncio.sleep(0)
            answers = [await client.answer() for _ in range(5)]
            assert [status for status, _ in answers] == [200, 200, 409, 200, 404]
            assert [text for _, text in answers[:4]] == ["ok", "slow", "no", "byte!"]
            client.close()
            await service.settle()
            left = count()
        await runner.cleanup()
        return left

    assert run(main("bare"), loop)[web.BaseRequest] >= 2  # refused and not found
    for name, (_, _, gone) in GUARDS.items():
        left = run(main(name), loop)
        assert {cls: left[cls] for cls in gone} == dict.fromkeys(gone, 0), name


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("cancellation", CANCELLATION)
def test_shutdown_with_clients_in_every_phase(cancellation: bool, loop: str) -> None:
    """They neither go on nor hang up: nothing but the shutdown ends them."""
    options = {"handler_cancellation": True} if cancellation else {}

    async def main(name: str) -> Dict[type, int]:
        state = State()
        runner, service = await start_state(state, name, **options)
        server: Any = runner.server
        with new_objects() as count:
            clients = []
            for sent, begins in PHASES.values():
                begun = state.begun
                clients.append(await service.connect())
                await clients[-1].send(sent)
                await until(lambda begun=begun + begins: state.begun == begun)
            clients.append(await service.connect())
            await behave(clients[-1])  # one that is idle
            await until(lambda: len(server.connections) == len(clients))
            transports = [each.transport for each in server.connections]
            await runner.cleanup()
            for client in clients:
                client.close()
            await until(lambda: len(asyncio.all_tasks()) == 1)
            # One that has something to send is closed when its client is known to be.
            await until(lambda: not any(t.get_write_buffer_size() for t in transports))
            transports.clear()
            assert state.ended == state.begun
            await spin()
            return count()

    assert run(main("bare"), loop)[web.BaseRequest] > 0
    for name, (_, _, gone) in GUARDS.items():
        left = run(main(name), loop)
        assert {cls: left[cls] for cls in gone} == dict.fromkeys(gone, 0), name


async def wait_for_ever() -> None:
    # For nothing that an application refers to: aiohttp 3.10 caches applications.
    await asyncio.get_running_loop().create_future()


# How a handler takes it that the loop is closed under it: its coroutine is thrown
# away, with a GeneratorExit, when the collector finds it.
async def indifferent() -> None:
    await wait_for_ever()


async def clean_up() -> None:
    try:
        await wait_for_ever()
    finally:
        await asyncio.sleep(0)  # "coroutine ignored GeneratorExit"


async def translate() -> None:
    try:
        await wait_for_ever()
    except BaseException as exc:
        raise web.HTTPBadGateway from exc


async def fail_at_once() -> None:
    raise LookupError


ENDS = {f.__name__: f for f in (indifferent, clean_up, translate, fail_at_once)}


def close_the_loop(name: str, end: str) -> None:
    """Close a loop that has connections open; hold nothing of it."""
    begun: List[str] = []

    @web.middleware
    async def report(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            return await handler(request)  # type: ignore[no-any-return]
        except LookupError:
            begun.append(end)
            await wait_for_ever()  # as long as it takes to report it
            raise

    async def handler(request: web.Request) -> web.Response:
        if end != "fail_at_once":
            begun.append(end)
        await ENDS[end]()
        return web.Response()

    async def main() -> List[Client]:
        app = web.Application(middlewares=[report])
        app.router.add_get("/end", handler)
        if name == "setup":
            setup(app)
        runner = web.AppRunner(app)
        await runner.setup()
        if name == "server":
            guard_server(runner)
        service = await start(runner)
        clients = []
        for _ in range(VISITS):
            clients.append(await service.connect())
            await clients[-1].send(get("/end"))
        await until(lambda: len(begun) == VISITS)
        return clients

    event_loop = asyncio.new_event_loop()
    asyncio.set_event_loop(event_loop)
    clients = event_loop.run_until_complete(main())
    event_loop.close()
    asyncio.set_event_loop(None)
    for client in clients:
        client.close()


def close_the_loop_and_collect_in(
    main: Any, name: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Close a loop under its requests; at the end nothing of it may be left."""
    # What cannot be raised when a task is thrown away: pytest's hook would hold it.
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    gc.collect()
    held = len(connections.followed_connections), len(holders.in_hand)
    with new_objects() as count:
        close_the_loop(name, end)
        main()
        for _ in range(3):  # finalizers make garbage of their own
            gc.collect()
        assert not any(count().values())
    assert (len(connections.followed_connections), len(holders.in_hand)) == held


# Otherwise pytest holds the transport of each warning that one was never closed.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("name", ["bare", *GUARDS])
def test_a_loop_closed_with_connections_open(
    name: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector finds all of it, bare as guarded; nothing stays in our containers.

    Not on uvloop: of a closed loop that has open transports it keeps all, for good,
    and did so without us.
    """
    close_the_loop_and_collect_in(lambda: None, name, end, monkeypatch)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("name", ["bare", *GUARDS])
def test_what_a_closed_loop_left_is_collected_during_a_request(
    name: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is thrown away then belongs to no task, least of all to the current one."""

    async def collect(request: web.Request) -> web.Response:
        gc.collect()
        raise web.HTTPConflict(text="collected")

    async def ok(request: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def main() -> None:
        app = web.Application()
        app.router.add_get("/", collect)
        app.router.add_get("/ok", ok)
        if name != "bare":
            setup(app)
        runner = web.AppRunner(app)
        await runner.setup()
        service = await start(runner)
        assert await service.ask("/") == (409, "collected")
        assert await service.ask("/ok") == (200, "ok")
        await service.settle()
        await runner.cleanup()

    close_the_loop_and_collect_in(lambda: run(main()), name, end, monkeypatch)


@pytest.mark.skipif(AIOHTTP < (3, 8, 2), reason="it cancels those handlers")
@pytest.mark.parametrize("guard", GUARDS)
def test_a_client_that_goes_away_before_it_hears_that_nothing_is_there(
    guard: str,
) -> None:
    """The route of a 404 has its answer, which has the request until it is sent."""
    guard_app, guard_runner, _ = GUARDS[guard]

    async def main(guard_app: Any, guard_runner: Any) -> int:
        state = State()

        @web.middleware
        async def look_up(request: web.Request, handler: Any) -> web.StreamResponse:
            state.begun += 1
            await state.release.wait()
            return await handler(request)  # type: ignore[no-any-return]

        app = web.Application(middlewares=[look_up])
        if guard_app is not None:
            guard_app(app)
        runner = web.AppRunner(app)
        await runner.setup()
        if guard_runner is not None:
            guard_runner(runner)
        service = await start(runner)
        with new_objects() as count:
            clients = [await service.connect() for _ in range(VISITS)]
            for client in clients:
                await client.get("/missing")
            await until(lambda: state.begun == VISITS)
            for client in clients:
                client.reset()
            server: Any = runner.server
            await until(lambda: not any(each.transport for each in server.connections))
            state.release.set()
            await service.settle()
            del client, clients
            found = count()[web.BaseRequest]
        await runner.cleanup()
        return found

    assert run(main(None, None)) == VISITS
    assert run(main(guard_app, guard_runner)) == 0
