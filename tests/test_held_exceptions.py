"""Exceptions that the application holds on to, and requests that overlap."""

import asyncio
import contextlib
import gc
import sys
import traceback
import types
import weakref
from collections import deque
from pathlib import Path
from typing import Any, Callable, Deque, Dict, List, Optional, Type

import pytest
from aiohttp import web

import aiohttp_cyclebreak
from aiohttp_cyclebreak import break_cycles, cyclebreak, holders, setup
from aiohttp_cyclebreak.exceptions import frames_of, graph
from aiohttp_cyclebreak.frames import COUNTS_ARE_EXACT
from aiohttp_cyclebreak.holders import MOST_NOTED
from aiohttp_cyclebreak.requests import FOLLOWED
from aiohttp_cyclebreak.sever import sever

from .service import AIOHTTP, HANDSHAKE, alive, no_collector, run, serve, spin, start
from .test_hostile_exceptions import Strange

if sys.version_info >= (3, 11):
    from builtins import ExceptionGroup
else:
    from exceptiongroup import ExceptionGroup

pytestmark = pytest.mark.usefixtures("few_objects")

OURS = str(Path(aiohttp_cyclebreak.__file__).parent)

Guard = Callable[[web.Application], Any]
GUARDS: Dict[str, Guard] = {
    "appended": lambda app: app.middlewares.append(cyclebreak()),
    "setup": setup,
    "with on_break": lambda app: setup(app, on_break=lambda event: None),
}


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("translated", [False, True])
def test_requests_that_always_overlap_are_not_kept(
    translated: bool, guard: str
) -> None:
    """Each ends while another has the same exception in hand."""
    outage = ConnectionError("pool is down")
    turn: Dict[int, asyncio.Event] = {}
    caught: List[int] = []

    @web.middleware
    async def audit(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            return await handler(request)  # type: ignore[no-any-return]
        except Exception:
            caught.append(int(request.match_info["number"]))
            await turn[caught[-1]].wait()
            raise

    async def fail(request: web.Request) -> web.Response:
        if translated:
            raise web.HTTPServiceUnavailable from outage
        raise outage.with_traceback(None)

    async def main() -> List[int]:
        left = []
        app = web.Application()
        app.router.add_get("/{number}", fail)
        app.middlewares.append(audit)
        GUARDS[guard](app)
        with no_collector():
            before = len(alive())
            async with serve(app) as service:
                clients: List[Any] = []
                for number in range(30):
                    turn[number] = asyncio.Event()
                    clients.append(await service.connect())
                    await clients[-1].get(f"/{number}")
                    while len(caught) <= number:
                        await asyncio.sleep(0)
                    if number:  # the one before ends only now
                        turn[number - 1].set()
                        await clients[-2].answer()
                        clients[-2].close()
                    left.append(len(alive()) - before)
                turn[number].set()
                await clients[-1].answer()
                clients[-1].close()
                await service.settle()
                left.append(len(alive()) - before)
        return left

    left = run(main())
    assert max(left) <= 6
    assert left[-1] == 0


@pytest.mark.parametrize("guard", GUARDS)
def test_a_failure_at_the_start_that_is_raised_again_keeps_no_request(
    guard: str,
) -> None:
    """The function that has caught it runs the event loop."""
    failures: List[Exception] = []

    async def refuse(request: web.Request) -> web.Response:
        raise failures[0]

    async def main(guard: Guard) -> int:
        app = web.Application()
        app.router.add_get("/", refuse)
        guard(app)
        with no_collector():
            before = len(alive())
            async with serve(app) as service:
                for _ in range(20):
                    await service.ask()
                await service.settle()
            return len(alive()) - before

    for each, expected in ((lambda app: None, 20), (GUARDS[guard], 0)):
        failures.clear()
        try:
            raise ConnectionError("no peer")
        except ConnectionError as exc:
            failures.append(exc)
        assert run(main(each)) == expected


@pytest.mark.parametrize("guard", GUARDS)
def test_a_background_task_with_an_error_in_hand_keeps_no_request(guard: str) -> None:
    """A reconnecting one, whose error each request is refused from."""
    errors: List[BaseException] = []

    async def reconnect() -> None:
        try:
            raise ConnectionError("no peer")
        except ConnectionError as exc:
            errors.append(exc)
            await asyncio.sleep(3600)

    async def refuse(request: web.Request) -> web.Response:
        raise web.HTTPServiceUnavailable from errors[0]

    async def main() -> int:
        task = asyncio.ensure_future(reconnect())
        await asyncio.sleep(0)
        app = web.Application()
        app.router.add_get("/", refuse)
        GUARDS[guard](app)
        with no_collector():
            before = len(alive())
            async with serve(app) as service:
                client = await service.connect()
                for _ in range(20):
                    await client.get()
                    await client.answer()
                left = len(alive()) - before
                client.close()
            task.cancel()
        return left

    assert run(main()) <= 1  # the connection's last


@pytest.mark.parametrize("guard", GUARDS)
def test_a_background_task_has_the_cause_of_its_error_in_hand_too(guard: str) -> None:
    """Each request is refused from that error, and reported with all of its causes."""
    errors: List[BaseException] = []
    found: List[Any] = []

    def look(exc: Optional[BaseException]) -> None:
        """Note where the causes come from, with a local of each."""
        names = []
        while exc is not None:
            for frame, _ in traceback.walk_tb(exc.__traceback__):
                names.append((frame.f_code.co_name, frame.f_locals.get("local")))
            exc = exc.__cause__
        found.append(names)

    def resolve() -> None:
        local = "of the cause"
        raise OSError(local)

    def connect() -> None:
        local = "of the error"
        try:
            resolve()
        except OSError as exc:
            raise ConnectionError(local) from exc

    async def reconnect(go_on: asyncio.Event) -> None:
        try:
            connect()
        except ConnectionError as exc:
            errors.append(exc)
            await go_on.wait()
            look(exc)

    async def refuse(request: web.Request) -> web.Response:
        look(errors[0])
        raise web.HTTPServiceUnavailable from errors[0]

    async def main(guard: Guard) -> List[Any]:
        go_on = asyncio.Event()
        task = asyncio.ensure_future(reconnect(go_on))
        await asyncio.sleep(0)
        app = web.Application()
        app.router.add_get("/", refuse)
        guard(app)
        async with serve(app) as service:
            for _ in range(3):
                await service.ask()
                await service.settle()
            go_on.set()
            await task
        errors.clear()
        reports = list(found)
        found.clear()
        return reports

    expected = run(main(lambda app: None))
    whole = [
        ("reconnect", None),
        ("connect", "of the error"),
        ("connect", "of the error"),
        ("resolve", "of the cause"),
    ]
    assert expected == [whole] * 4
    assert run(main(GUARDS[guard])) == expected


@pytest.mark.parametrize("causes", [0, 2, 10])
@pytest.mark.parametrize("guard", GUARDS)
def test_an_error_in_hand_waits_with_the_connection_however_many_causes_it_has(
    guard: str, causes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a built-in one: only the connection holds it until the task is done."""
    monkeypatch.setattr(holders, "_SOON", 0.0)

    def fail(times: int) -> None:
        if not times:
            raise LookupError
        try:
            fail(times - 1)
        except LookupError as exc:
            raise LookupError from exc

    async def main(guard: Guard) -> int:
        go_on = asyncio.Event()
        errors: asyncio.Queue[BaseException] = asyncio.Queue()

        async def work() -> None:
            try:
                raise await errors.get()
            except LookupError:
                await go_on.wait()

        async def refuse(request: web.Request) -> web.Response:
            try:
                fail(causes)
            except LookupError as exc:
                error = exc  # a cycle of its own
            errors.put_nowait(error)
            await spin()
            raise web.HTTPServiceUnavailable from error

        async def succeed(request: web.Request) -> web.Response:
            return web.Response()

        task = asyncio.ensure_future(work())
        app = web.Application()
        app.router.add_get("/refuse", refuse)
        app.router.add_get("/succeed", succeed)
        guard(app)
        with no_collector():
            async with serve(app) as service:
                client = await service.connect()
                await client.get("/refuse")
                assert (await client.answer())[0] == 503
                await spin()  # what is left over is looked at, and not held for longer
                go_on.set()
                await task
                del task
                await client.get("/succeed")
                assert (await client.answer())[0] == 200
                client.close()
                await service.settle()
            return sum(each.path == "/refuse" for each in alive())

    assert run(main(lambda app: None)) == 1
    gc.collect()
    assert run(main(GUARDS[guard])) == 0


def deep() -> None:
    raise web.HTTPBadRequest(text="from the deep")


@web.middleware
async def returning(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        return await handler(request)  # type: ignore[no-any-return]
    except web.HTTPException as exc:
        return exc


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("how", ["kept alive", "closed", "pipelined", "returned"])
def test_who_holds_a_response_prints_its_traceback(how: str, guard: str) -> None:
    """However it was answered, and whatever aiohttp still holds of it."""
    held: List[BaseException] = []

    async def handler(request: web.Request) -> web.Response:
        try:
            deep()
        except web.HTTPException as exc:
            held.append(exc)
            raise
        return web.Response()

    async def answer(request: web.Request) -> web.Response:
        return web.Response()

    async def main() -> None:
        app = web.Application()
        app.router.add_get("/", handler)
        app.router.add_get("/ok", answer)
        if how == "returned":
            app.middlewares.append(returning)
        GUARDS[guard](app)
        async with serve(app) as service:
            client = await service.connect()
            if how == "pipelined":
                request = "GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n"
                await client.send((request % "/" + request % "/ok").encode())
                await client.answer()
            else:
                await client.get(
                    "/", *(["Connection: close"] if how == "closed" else [])
                )
            await client.answer()
            client.close()
            await service.settle()

    run(main())
    lines = traceback.format_tb(held[0].__traceback__)
    assert any("in handler" in line for line in lines)
    assert any("in deep" in line for line in lines)


def reraise(exc: BaseException) -> None:
    try:
        raise exc
    finally:
        del exc  # an empty frame that nobody emptied


def parse(data: bytes) -> None:
    del data
    raise ValueError("bad")


@pytest.mark.parametrize("guard", ["appended", "setup"])
def test_an_instance_that_comes_out_of_generators_is_cut_down_too(guard: str) -> None:
    """Those go on: their frames, among the others, are not emptied."""
    instance = LookupError("one for all")
    generators: List[Any] = []

    def attempts() -> Any:
        try:
            raise instance
        except LookupError as exc:
            yield exc

    async def handler(request: web.Request) -> web.Response:
        generators.append(attempts())
        raise next(generators[-1])

    async def main(guard: Guard) -> List[int]:
        app = web.Application()
        app.router.add_get("/", handler)
        guard(app)
        entries = []
        with no_collector():
            before = len(alive())
            async with serve(app) as service:
                for _ in range(6):
                    assert (await service.ask())[0] == 500
                    await service.settle()
                    entries.append(sum(1 for _ in frames_of(instance)))
            left = len(alive()) - before
        generators.clear()  # aiohttp caches the handler, which has them
        return [left, entries[-1] - entries[2]]

    left, grown = run(main(lambda app: None))
    assert left == 6
    assert grown > 0
    instance.__traceback__ = None
    gc.collect()
    assert run(main(GUARDS[guard])) == [0, 0]


@pytest.mark.parametrize("guard", GUARDS)
def test_frames_that_were_empty_before_are_no_reason(guard: str) -> None:
    """The idiom of six.reraise(): its text stays, the second time too."""
    held: List[BaseException] = []

    async def handler(request: web.Request) -> web.Response:
        try:
            parse(b"data")
        except ValueError as exc:
            held.append(exc)
            reraise(exc)
        return web.Response()

    async def again(request: web.Request) -> web.Response:
        raise web.HTTPBadGateway from held[0]

    async def main() -> None:
        app = web.Application()
        app.router.add_get("/", handler)
        app.router.add_get("/again", again)
        GUARDS[guard](app)
        async with serve(app) as service:
            for path in ("/", "/again", "/again"):
                await service.ask(path)
            await service.settle()

    run(main())
    lines = traceback.format_tb(held[0].__traceback__)
    assert any("in parse" in line for line in lines)
    assert any("in handler" in line for line in lines)


@pytest.mark.parametrize("guard", GUARDS)
def test_a_function_that_fails_elsewhere_goes_with_its_handler(guard: str) -> None:
    """As a generator that an upload reads: the handler has it, and fails too."""

    async def handler(request: web.Request) -> web.Response:
        async def upload() -> None:
            raise LookupError(request.path)

        task = asyncio.ensure_future(upload())
        await asyncio.wait([task])
        request["error"] = task.exception()
        raise ValueError

    async def main(guarded: bool) -> int:
        app = web.Application()
        app.router.add_get("/", handler)
        if guarded:
            GUARDS[guard](app)
        async with serve(app) as service:
            await service.ask()
            await service.settle()
            with no_collector():
                before = len(alive())
                for _ in range(4):
                    assert (await service.ask())[0] == 500
                await service.settle()
                return len(alive()) - before

    assert run(main(False)) == 4
    assert run(main(True)) == 0


def test_a_copy_of_a_function_keeps_what_it_closes_over() -> None:
    """It shares the whole closure with the one in the traceback."""

    def make() -> Any:
        name = "closed over"

        def work(fail: bool = True) -> str:
            if fail:
                raise ValueError
            return name

        copy = types.FunctionType(
            work.__code__, work.__globals__, "copy", (False,), work.__closure__
        )
        try:
            work()
        except ValueError as exc:
            return exc, copy

    exc, copy = make()
    sever(graph(exc))
    assert copy() == "closed over"


def test_a_function_that_is_referred_to_weakly_works_while_it_is_there() -> None:
    """A receiver of a signal, as blinker has them; who has the exception has it."""
    receivers: Any = weakref.WeakSet()
    failures: List[ValueError] = []

    async def fail(request: web.Request) -> web.Response:
        name = request.path

        def receive(fail: bool = False, *, suffix: str = "!") -> str:
            if fail:
                raise ValueError(name)
            return name + suffix

        receivers.add(receive)
        receive(fail=True)
        return web.Response()

    async def send(request: web.Request) -> web.Response:
        return web.Response(text=" ".join(receive() for receive in receivers))

    @web.middleware
    async def keep_last(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            return await handler(request)  # type: ignore[no-any-return]
        except ValueError as exc:
            failures.append(exc)
            return web.Response(status=500)

    async def main(guard: Guard) -> str:
        failures.clear()
        app = web.Application(middlewares=[keep_last])
        app.router.add_get("/fail", fail)
        app.router.add_get("/send", send)
        guard(app)
        async with serve(app) as service:
            await service.ask("/fail")
            return (await service.ask("/send"))[1]

    # Before CPython 3.11 only a local variable has the function, not its own frame too.
    expected = "/fail!" if sys.version_info >= (3, 11) else ""
    with no_collector():
        assert run(main(lambda app: None)) == "/fail!"
        for guard in GUARDS.values():
            assert run(main(guard)) == expected


@pytest.mark.parametrize("guard", GUARDS)
def test_what_the_application_stored_is_not_asked_what_it_is(guard: str) -> None:
    """A lazy proxy would be evaluated, and may lie."""
    asked: List[str] = []

    class Lazy:
        @property
        def __class__(self) -> Any:  # type: ignore[override]
            asked.append("class")
            return ValueError

    async def handler(request: web.Request) -> web.Response:
        request["user"] = Lazy()
        raise web.HTTPBadRequest

    async def main() -> int:
        app = web.Application()
        app.router.add_get("/", handler)
        GUARDS[guard](app)
        with no_collector():
            before = len(alive())
            async with serve(app) as service:
                await service.ask()
                await service.settle()
                return len(alive()) - before

    assert run(main()) == 0
    assert not asked


@pytest.mark.parametrize("guard", GUARDS)
def test_a_websocket_whose_peer_is_dead(guard: str) -> None:
    """Its heartbeat's last timer leads back to it."""

    async def main(guard: Guard) -> int:
        done = asyncio.Event()

        async def handler(request: web.Request) -> web.StreamResponse:
            websocket = web.WebSocketResponse(heartbeat=0.01)
            await websocket.prepare(request)
            try:
                async for _ in websocket:
                    pass
            finally:  # up to aiohttp 3.8.1 it is cancelled
                done.set()
            return websocket

        app = web.Application()
        app.router.add_get("/", handler)
        guard(app)
        with no_collector():
            before = len(alive())
            async with serve(app) as service:
                client = await service.connect()
                await client.get("/", *HANDSHAKE)
                await done.wait()  # it never answers a ping
                client.close()
                await service.settle()
                return len(alive()) - before

    assert run(main(GUARDS[guard])) == 0


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("guard", GUARDS)
def test_a_websocket_whose_client_breaks_the_protocol_unread(
    guard: str, fails: bool
) -> None:
    """The handler only sends, and never gets to know: the reader keeps the error."""

    async def main(guard: Guard) -> int:
        async def handler(request: web.Request) -> web.StreamResponse:
            websocket = web.WebSocketResponse()
            await websocket.prepare(request)
            await websocket.send_str("hello")
            if fails:
                raise ValueError("while sending")
            return websocket

        app = web.Application()
        app.router.add_get("/", handler)
        guard(app)
        with no_collector():
            before = len(alive())
            async with serve(app) as service:
                client = await service.connect()
                head = "\r\n".join(("GET / HTTP/1.1", "Host: a", *HANDSHAKE, "", ""))
                # At once, so that it is parsed below the handler's frame.
                await client.send(head.encode() + b"no frame at all")
                assert (await client.answer())[0] == 101
                client.close()
                await service.settle()
                return len(alive()) - before

    assert run(main(lambda app: None)) == 1
    assert run(main(GUARDS[guard])) == 0


@pytest.mark.skipif(
    AIOHTTP < (3, 8, 2) and sys.version_info < (3, 11), reason="it cancels the handler"
)
@pytest.mark.parametrize("guard", GUARDS)
def test_a_websocket_that_is_returned_open_and_whose_client_hangs_up(
    guard: str,
) -> None:
    """It is closed after all middlewares, and keeps why that has failed."""

    async def main(guard: Guard) -> Any:
        errors: List[type] = []

        class Websocket(web.WebSocketResponse):
            async def close(self, **options: Any) -> bool:  # type: ignore[override]
                try:
                    return await super().close(**options)
                finally:
                    errors.append(type(self.exception()))

        async def handler(request: web.Request) -> web.StreamResponse:
            websocket = Websocket()
            await websocket.prepare(request)
            return websocket

        app = web.Application()
        app.router.add_get("/", handler)
        guard(app)
        with no_collector():
            before = len(alive()), len(alive(Websocket))
            async with serve(app) as service:
                client = await service.connect()
                await client.get("/", *HANDSHAKE)
                assert (await client.answer())[0] == 101
                client.close()
                await service.settle()
                left = len(alive()) - before[0], len(alive(Websocket)) - before[1]
                return left, errors

    left, errors = run(main(lambda app: None))
    assert left == (1, 1)
    assert errors != [type(None)]
    assert run(main(GUARDS[guard])) == ((0, 0), errors)


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("error", [ValueError, web.HTTPBadRequest])
def test_a_heartbeat_closes_what_the_handler_left_open(
    error: Type[Exception], guard: str
) -> None:
    """Who has a set of them asks which are closed; aiohttp may leave the connection."""
    closes = hasattr(web.WebSocketResponse, "_handle_ping_pong_exception")
    if error is ValueError and not closes:
        pytest.skip("a ping that fails closes no websocket on this aiohttp")

    async def main(guard: Guard) -> Any:
        sockets: List[web.WebSocketResponse] = []

        async def handler(request: web.Request) -> web.StreamResponse:
            websocket = web.WebSocketResponse(heartbeat=0.05)
            await websocket.prepare(request)
            sockets.append(websocket)
            raise error

        app = web.Application()
        app.router.add_get("/", handler)
        guard(app)
        with no_collector():
            before = len(alive())
            async with serve(app) as service:
                client = await service.connect()
                await client.get("/", *HANDSHAKE)
                while not (sockets and sockets[0].closed):
                    await asyncio.sleep(0.01)
                server = service.runner.server
                assert server is not None
                while server.connections:
                    await asyncio.sleep(0.01)
                client.close()
                await service.settle()
                left = len(alive()) - before
                return left, sockets[0].close_code, type(sockets[0].exception())

    bare = run(asyncio.wait_for(main(lambda app: None), 30))
    guarded = run(asyncio.wait_for(main(GUARDS[guard]), 30))
    assert guarded == (0, *bare[1:])


def test_a_websocket_that_the_handler_left_open_goes_with_its_heartbeat() -> None:
    """From aiohttp 3.14 on the protocol tells it of whatever comes in."""
    if sys.version_info >= (3, 12):
        pytest.skip("the websocket has the exception of its ping, which leads to it")
    closes = hasattr(web.WebSocketResponse, "_handle_ping_pong_exception")
    if not closes:
        pytest.skip("a ping that fails closes no websocket on this aiohttp")
    sockets: List[Any] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        websocket = web.WebSocketResponse(heartbeat=0.05)
        await websocket.prepare(request)
        sockets.append(weakref.ref(websocket))
        raise web.HTTPBadRequest

    async def main() -> None:
        app = web.Application()
        app.router.add_get("/", handler)
        setup(app)
        with no_collector():
            async with serve(app) as service:
                client = await service.connect()
                await client.get("/", *HANDSHAKE)
                while not sockets:
                    await asyncio.sleep(0)
                client.close()
                while sockets[0]() is not None:
                    await asyncio.sleep(0.01)

    run(asyncio.wait_for(main(), 30))


@pytest.mark.parametrize("guard", GUARDS)
def test_the_websocket_of_another_request_is_left_alone(guard: str) -> None:
    """A handler that broadcasts fails with it among its locals."""
    sockets: List[web.WebSocketResponse] = []

    async def listen(request: web.Request) -> web.StreamResponse:
        websocket = web.WebSocketResponse(heartbeat=3600)
        await websocket.prepare(request)
        sockets.append(websocket)
        async for _ in websocket:
            pass
        return websocket

    async def broadcast(request: web.Request) -> web.StreamResponse:
        websocket = web.WebSocketResponse()
        await websocket.prepare(request)
        other = sockets[0]
        await other.send_str("hello")
        raise ValueError("while broadcasting")

    async def main() -> Any:
        app = web.Application()
        app.router.add_get("/listen", listen)
        app.router.add_get("/broadcast", broadcast)
        GUARDS[guard](app)
        async with serve(app) as service:
            listener, sender = await service.connect(), await service.connect()
            await listener.get("/listen", *HANDSHAKE)
            while not sockets:
                await asyncio.sleep(0)
            before = (sockets[0]._req, sockets[0]._heartbeat_cb)
            await sender.get("/broadcast", *HANDSHAKE)
            server = service.runner.server
            assert server is not None
            while len(server.connections) > 1 or server.requests_count < 2:
                await asyncio.sleep(0.001)
            for _ in range(20):
                await asyncio.sleep(0)
            after = (sockets[0]._req, sockets[0]._heartbeat_cb)
            cancelled = after[1] is not None and after[1].cancelled()
            listener.close()
            sender.close()
            await service.settle()
        return before[0] is not None, before == after, cancelled

    assert run(main()) == (True, True, False)


async def tried(call: Any) -> Any:
    try:
        return await call
    except Exception as exc:
        return type(exc), str(exc)


async def returns_its_websocket(request: web.Request, held: List[Any]) -> Any:
    websocket = web.WebSocketResponse()
    await websocket.prepare(request)
    held.append(websocket)
    async for _ in websocket:
        pass
    return websocket


async def fails(request: web.Request, held: List[Any]) -> Any:
    websocket = web.WebSocketResponse()
    await websocket.prepare(request)
    held.append(websocket)
    async for _ in websocket:
        raise ValueError("a bad message")


class Consumer:
    """Of its methods no frame has the websocket, only this."""

    def __init__(self) -> None:
        self.websocket = web.WebSocketResponse()

    async def consume(self, request: web.Request) -> None:
        await self.websocket.prepare(request)
        async for _ in self.websocket:
            raise ValueError("a bad message")


async def fails_in_an_object(request: web.Request, held: List[Any]) -> Any:
    consumer = Consumer()
    held.append(consumer.websocket)
    await consumer.consume(request)


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("ends", [returns_its_websocket, fails, fails_in_an_object])
def test_a_websocket_that_is_held_for_good_is_as_bare(ends: Any, guard: str) -> None:
    """A set of them, which another request goes through and logs; its request goes."""

    async def main(guard: Guard) -> Any:
        held: List[web.WebSocketResponse] = []

        async def handler(request: web.Request) -> web.StreamResponse:
            return await ends(request, held)  # type: ignore[no-any-return]

        app = web.Application()
        app.router.add_get("/{name}", handler)
        guard(app)
        with no_collector():
            before = len(alive())
            async with serve(app) as service:
                client = await service.connect()
                await client.get("/socket", *HANDSHAKE)
                await client.answer()
                await client.send(bytes((0x81, 0x80, 0, 0, 0, 0)))  # an empty text
                if ends is returns_its_websocket:
                    await client.send(bytes((0x88, 0x80, 0, 0, 0, 0)))
                await service.settle()
                client.close()
                left = len(alive()) - before
                websocket = held[0]
                seen = [
                    repr(websocket),
                    websocket.prepared,
                    type(websocket.task),
                    websocket.keep_alive,
                    websocket.closed,
                    websocket.close_code,
                    websocket.exception(),
                    await tried(websocket.send_str("hello")),
                    await tried(websocket.ping()),
                    await tried(websocket.close()),
                ]
                return left, seen, (repr(websocket), websocket.close_code)

    bare = run(main(lambda app: None))
    assert bare[0] == 1
    assert run(main(GUARDS[guard])) == (0, *bare[1:])


@pytest.mark.skipif(AIOHTTP < (3, 8, 2), reason="it cancels the handler")
@pytest.mark.parametrize("guard", GUARDS)
def test_a_404_whose_client_has_gone_is_as_bare(guard: str) -> None:
    """Who has it for long, a log's queue for instance, prints it; its request goes."""

    async def main(guard: Guard) -> Any:
        held: List[web.HTTPException] = []
        gone = asyncio.Event()

        @web.middleware
        async def hold(request: web.Request, handler: Any) -> web.StreamResponse:
            try:
                return await handler(request)  # type: ignore[no-any-return]
            except web.HTTPException as exc:
                held.append(exc)
                await gone.wait()
                raise

        app = web.Application(middlewares=[hold])
        guard(app)
        with no_collector():
            before = len(alive())
            async with serve(app) as service:
                client = await service.connect()
                await client.get("/missing")
                while not held:
                    await asyncio.sleep(0.001)
                client.reset()
                server: Any = service.runner.server
                (connection,) = server.connections
                while connection.transport is not None:
                    await asyncio.sleep(0.001)
                del connection
                gone.set()
                await service.settle()
                held[0].__traceback__ = None
                left = len(alive()) - before
                return left, repr(held[0]), type(held[0].task)

    bare = run(main(lambda app: None))
    assert bare[0] == 1
    assert run(main(GUARDS[guard])) == (0, *bare[1:])


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("how", ["a function", "a response"])
def test_what_is_left_behind_a_failure_goes_with_a_later_request(
    how: str, guard: str
) -> None:
    """Something else has it when the failure, which is cached, is severed first.

    That is a function of the request's own, or aiohttp, which sends its response.
    """
    failures: List[LookupError] = []
    functions: List[Any] = []

    async def first(request: web.Request) -> web.Response:
        def fail() -> None:
            raise LookupError(request.path)

        if how == "a function":
            functions.append(fail)
        try:
            fail()
        except LookupError as exc:
            failures.append(exc)
        if how == "a function":
            raise web.HTTPBadGateway from failures[0]
        return web.Response()

    async def second(request: web.Request) -> web.Response:
        raise failures[0]

    async def later(request: web.Request) -> web.Response:
        raise web.HTTPBadGateway from failures[0]

    async def main(guard: Guard) -> int:
        is_sent = asyncio.Event()

        async def prepare(request: web.Request, response: Any) -> None:
            if request.path == "/first" and how == "a response":
                await is_sent.wait()

        failures.clear()
        app = web.Application()
        app.on_response_prepare.append(prepare)
        for each in (first, second, later):
            app.router.add_get(f"/{each.__name__}", each)
        guard(app)
        with no_collector():
            before = len(alive())
            async with serve(app) as service:
                asked = asyncio.ensure_future(service.ask("/first"))
                while not failures:
                    await asyncio.sleep(0)
                if how == "a response":
                    await service.ask("/second")
                is_sent.set()
                await asked
                await service.settle()
                functions.clear()
                await service.ask("/later")
                await service.settle()
                return len(alive()) - before

    assert run(main(lambda app: None)) >= 2
    assert run(main(GUARDS[guard])) == 0


class Marker:
    """What the frame of each failure has in a local."""


FAILURES = 3 * MOST_NOTED


async def go_on_failing(
    guard: Guard, how: str, failures: Optional[List[BaseException]] = None
) -> List[int]:
    """Fail again and again in one request, and count what is kept meanwhile."""
    kept: List[int] = []
    app = web.Application()

    async def fail(request: web.Request) -> web.Response:
        request["marker"] = marker = Marker()  # noqa: F841
        if how == "clones that succeed":
            return web.Response()
        raise web.HTTPConflict if how == "clones that refuse" else ValueError

    async def again(call: Callable[[], Any]) -> web.Response:
        caught = failures
        strange = Strange()  # noqa: F841
        for _ in range(FAILURES):
            try:
                await call()
            except (ValueError, web.HTTPConflict) as exc:
                if caught is not None:
                    caught.append(exc)
            await asyncio.sleep(0)
        kept.append(len(alive(Marker)))
        for exc in caught or ():
            assert "marker" in list(frames_of(exc))[-1].f_locals
        return web.Response()

    @web.middleware
    async def retry(request: web.Request, handler: Any) -> web.StreamResponse:
        if request.path == "/retried":
            return await again(lambda: handler(request))
        return await handler(request)  # type: ignore[no-any-return]

    async def decorated(request: web.Request) -> web.Response:
        return await again(lambda: break_cycles(fail)(request))

    async def dispatch(request: web.Request) -> web.Response:
        return await again(lambda: app._handle(request.clone(rel_url="/failing")))

    app.middlewares.append(retry)
    app.router.add_get("/retried", fail)
    app.router.add_get("/failing", fail)
    app.router.add_get("/", decorated if how == "decorated" else dispatch)
    guard(app)
    with no_collector():
        async with serve(app) as service:
            path = "/retried" if how == "retried" else "/"
            assert (await service.ask(path))[0] == 200
            await service.settle()
            kept.append(len(alive(Marker)))
    return kept


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize(
    "how",
    [
        "retried",
        "decorated",
        "clones that fail",
        "clones that refuse",
        "clones that succeed",
    ],
)
def test_a_request_that_goes_on_and_on_keeps_few_of_its_failures(
    how: str, guard: str
) -> None:
    """Bare, each goes when it was handled, and it may be a websocket's messages."""
    [kept, left] = run(go_on_failing(GUARDS[guard], how))
    assert kept < 2 * MOST_NOTED
    assert left == 0


@pytest.mark.parametrize("size", [0, 8_000_000], ids=["ended", "being sent"])
def test_a_task_fails_for_the_hundredth_time_when_its_request_has_been_answered(
    size: int,
) -> None:
    """What it has failed with is severed when the request ends, or has been by then."""
    kept: List[BaseException] = []

    async def fail(request: web.Request) -> web.Response:
        raise LookupError

    async def main(guarded: bool) -> int:
        function = break_cycles(fail) if guarded else fail
        tasks: List[asyncio.Future[None]] = []

        async def fail_and_keep(request: web.Request) -> None:
            try:
                await function(request)
            except LookupError as exc:
                kept.append(exc)

        async def handler(request: web.Request) -> web.Response:
            for _ in range(MOST_NOTED - 1):
                await fail_and_keep(request)
            loop = asyncio.get_running_loop()
            go = loop.create_future()

            async def fail_at_the_end() -> None:
                await go
                await fail_and_keep(request)

            tasks.append(asyncio.ensure_future(fail_at_the_end()))
            # Once both wait for it; this goes on first.
            loop.call_soon(loop.call_soon, go.set_result, None)
            await go
            return web.Response(body=bytes(size))

        app = web.Application()
        app.router.add_get("/", handler)
        async with serve(app) as service:
            with no_collector():
                before = len(alive())
                client = await service.connect()
                await client.get()
                while not tasks or not tasks[0].done():
                    await asyncio.sleep(0)
                assert (await client.answer())[0] == 200
                client.close()
                await service.settle()
                tasks.clear()
                assert len(kept) == MOST_NOTED
                return len(alive()) - before

    assert run(main(guarded=False)) == 1
    kept.clear()
    gc.collect()
    assert run(main(guarded=True)) == 0


def test_a_request_that_was_followed_and_is_thrown_away_with_its_loop() -> None:
    """What it raises then is noted in no task."""
    tasks: List[Any] = []

    @break_cycles
    async def fail(request: web.Request) -> web.Response:
        raise LookupError

    async def handler(request: web.Request) -> web.Response:
        with contextlib.suppress(LookupError):
            await fail(request)
        tasks.append(asyncio.current_task())
        try:
            await asyncio.get_running_loop().create_future()
        except GeneratorExit:
            raise asyncio.CancelledError from None
        return web.Response()

    async def main() -> Any:
        app = web.Application()
        app.router.add_get("/", handler)
        setup(app)
        runner = web.AppRunner(app)
        await runner.setup()
        client = await (await start(runner)).connect()
        await client.get()
        while not tasks:
            await asyncio.sleep(0)
        return client

    client = run(main())
    with pytest.raises(asyncio.CancelledError):
        tasks.pop().get_coro().close()
    client.close()
    gc.collect()
    assert not holders.in_hand


async def answer_200(handler: Any) -> None:
    app = web.Application()
    app.router.add_get("/", handler)
    async with serve(app) as service:
        assert (await service.ask())[0] == 200
        await service.settle()


def test_a_cause_of_what_a_request_goes_on_with_is_left_whole() -> None:
    """Of many that lead to it the older ones are severed, and the newer are in hand."""
    outage: Deque[BaseException] = deque()  # where nobody looks for what is in use
    kept: Deque[BaseException] = deque()
    seen: List[bool] = []

    def has_local() -> bool:
        return any("marker" in frame.f_locals for frame in frames_of(outage[0]))

    def connect() -> None:
        marker = "local"
        outage.append(ConnectionError(marker))
        raise outage[0]

    @break_cycles
    async def fail(request: web.Request) -> web.Response:
        raise LookupError from outage[0]

    async def handler(request: web.Request) -> web.Response:
        with contextlib.suppress(ConnectionError):
            connect()
        for _ in range(MOST_NOTED + 1):
            try:
                await fail(request)
            except LookupError as exc:
                kept.append(exc)
        for _ in range(2):
            await asyncio.sleep(0)
        seen.append(has_local())
        return web.Response()

    run(answer_200(handler))
    assert seen == [True]
    assert not has_local()


def test_what_a_task_has_of_a_request_that_goes_on_goes_with_the_task() -> None:
    """It has raised the failure itself, and no middleware knows of it."""

    class Down(Exception):
        """One that allows weak references, as built-in ones do not."""

    kept: Deque[BaseException] = deque()  # where nobody looks for what is in use
    seen: List[bool] = []

    def look() -> None:
        seen.append(any("marker" in frame.f_locals for frame in frames_of(kept[0])))

    @break_cycles
    async def fail(request: web.Request) -> web.Response:
        marker = "local"
        raise Down(marker)

    async def raise_again(go_on: asyncio.Event) -> None:
        try:
            raise kept[0]
        except Down:
            await go_on.wait()

    async def handler(request: web.Request) -> web.Response:
        go_on = asyncio.Event()
        task = None
        for _ in range(MOST_NOTED + 1):
            try:
                await fail(request)
            except Down as exc:
                kept.append(exc)
            if task is None:
                task = asyncio.ensure_future(raise_again(go_on))
                await asyncio.sleep(0)
        for _ in range(2):
            await asyncio.sleep(0)
        look()
        go_on.set()
        assert task is not None
        await task
        loop = asyncio.get_running_loop()
        loop.call_soon(holders._left_over[loop].look)  # as its timer does
        await asyncio.sleep(0)
        look()
        return web.Response()

    run(answer_200(handler))
    assert seen == [True, False]


@pytest.mark.parametrize(
    "how", ["retried", "clones that fail", "clones that refuse", "clones that succeed"]
)
def test_without_a_guard_a_request_that_goes_on_keeps_none(how: str) -> None:
    """Or the test above would be of a leak, and not of what is worse than bare."""
    [kept, left] = run(go_on_failing(lambda app: None, how))
    assert kept <= 1
    assert left <= 1


def test_a_request_that_goes_on_finds_the_locals_of_what_it_has_in_a_list() -> None:
    """It may report all of them in the end."""
    failures: List[BaseException] = []
    run(go_on_failing(setup, "retried", failures))
    assert len(failures) == FAILURES


def test_what_a_request_keeps_is_not_gone_through_for_each_failure() -> None:
    """It may have thousands in a list, and let go of as many others."""

    @break_cycles
    async def fail(request: web.Request) -> None:
        raise ValueError

    async def calls_of_ours(failures: int) -> int:
        calls = 0

        def count(frame: Any, event: str, argument: Any) -> None:
            nonlocal calls  # a generator that goes on is called as well
            calls += event == "call" and frame.f_code.co_filename.startswith(OURS)

        async def handler(request: web.Request) -> web.Response:
            kept = []
            sys.setprofile(count)
            try:
                for number in range(failures):
                    try:
                        await fail(request)
                    except ValueError as exc:
                        if number % 2:
                            kept.append(exc)
                    await asyncio.sleep(0)
            finally:
                sys.setprofile(None)
            return web.Response()

        app = web.Application()
        app.router.add_get("/", handler)
        async with serve(app) as service:
            assert (await service.ask())[0] == 200
            await service.settle()
        return calls

    few, many = run(calls_of_ours(MOST_NOTED)), run(calls_of_ours(8 * MOST_NOTED))
    assert many < 1.5 * 8 * few


class Attempt:
    """What has a task, and is among the locals of who has failed with that."""

    def __init__(self, coroutine: Any) -> None:
        self.task = asyncio.ensure_future(coroutine)

    async def outcome(self) -> Any:
        return await self.task


async def go_on_attempting(
    guard: Guard, how: str, break_cycles: Callable[[Any], Any] = break_cycles
) -> List[int]:
    """As above, in a task of its own each time, and what is kept after a collection."""
    kept: List[int] = []

    @break_cycles
    async def fail(request: web.Request) -> None:
        marker = Marker()  # noqa: F841
        raise ValueError

    @break_cycles
    async def ask(request: web.Request, attempt: Attempt) -> None:
        exc: Any = attempt.task.exception()
        raise exc

    async def attempt_one(request: web.Request, attempts: List[Attempt]) -> None:
        attempt = Attempt(fail(request))
        if how != "forgotten":
            attempts.append(attempt)
        with contextlib.suppress(ValueError):
            await attempt.outcome()
        if how == "asked again":
            with contextlib.suppress(ValueError):
                await ask(request, attempts[0])

    async def handler(request: web.Request) -> web.Response:
        attempts: List[Attempt] = []
        for _ in range(FAILURES):
            await attempt_one(request, attempts)
            await asyncio.sleep(0)
        for attempt in attempts:
            exc: Any = attempt.task.exception()
            assert any("marker" in frame.f_locals for frame in frames_of(exc))
        if how == "forgotten, uncollected":
            attempts.clear()
        if "uncollected" not in how:
            gc.collect()
        kept.append(len(alive(Marker)))
        return web.Response()

    app = web.Application()
    app.router.add_get("/", handler)
    guard(app)
    with no_collector():
        async with serve(app) as service:
            assert (await service.ask())[0] == 200
            await service.settle()
            kept.append(len(alive(Marker)))
    return kept


@pytest.mark.parametrize("guard", GUARDS)
def test_what_a_task_has_failed_with_is_held_by_the_task(guard: str) -> None:
    """Whatever else has the task: only the collector knows, and frees both."""
    assert (
        run(go_on_attempting(lambda app: None, "forgotten", lambda each: each))[0] == 0
    )
    [kept, left] = run(go_on_attempting(GUARDS[guard], "forgotten"))
    assert kept < MOST_NOTED
    assert left == 0


@pytest.mark.parametrize("how", ["kept", "asked again", "forgotten, uncollected"])
@pytest.mark.parametrize("guard", GUARDS)
def test_who_asks_a_task_late_finds_the_locals(guard: str, how: str) -> None:
    """And at the end of the request all of them go."""
    assert run(go_on_attempting(GUARDS[guard], how)) == [FAILURES, 0]


def test_failures_that_each_lead_to_all_before_them_are_noted_once() -> None:
    """Bare, each is one more; a list of all below for each grows with their square."""
    numbers: List[int] = []

    @break_cycles
    async def fail(request: web.Request, last: Optional[BaseException]) -> None:
        marker = Marker()  # noqa: F841
        raise ValueError from last

    async def handler(request: web.Request) -> web.Response:
        last: Optional[BaseException] = None
        for _ in range(FAILURES):
            try:
                await fail(request, last)
            except ValueError as exc:
                last = exc
            await asyncio.sleep(0)
        numbers.append(sum(map(len, request.__dict__[FOLLOWED].noted.values())))
        while last is not None:
            assert "marker" in list(frames_of(last))[-1].f_locals
            last = last.__cause__
        return web.Response()

    async def main() -> int:
        app = web.Application()
        app.router.add_get("/", handler)
        with no_collector():
            async with serve(app) as service:
                assert (await service.ask())[0] == 200
                await service.settle()
                return len(alive(Marker))

    assert run(main()) == 0
    assert numbers == [FAILURES]


def test_tasks_that_have_swallowed_their_failures_are_forgotten() -> None:
    """By a stream that has each of its messages handled in a task of its own."""
    numbers: List[int] = []

    @break_cycles
    async def fail(request: web.Request) -> None:
        raise ValueError

    async def swallow(request: web.Request) -> None:
        with contextlib.suppress(ValueError):
            await fail(request)

    async def handler(request: web.Request) -> web.Response:
        others: List[Any] = []
        for _ in range(FAILURES):
            await asyncio.ensure_future(swallow(request))
            # The next task is not where that one was, in memory.
            others.append(asyncio.ensure_future(asyncio.sleep(0)))
            numbers.append(len(request.__dict__[FOLLOWED].callers))
        return web.Response()

    async def main() -> None:
        app = web.Application()
        app.router.add_get("/", handler)
        async with serve(app) as service:
            await service.ask()
            await service.settle()

    run(main())
    assert max(numbers) <= MOST_NOTED + 1


@pytest.mark.skipif(AIOHTTP < (3, 8, 2), reason="it cancels the handler")
def test_a_websocket_whose_handler_goes_on_is_left_alone() -> None:
    """It is among the locals of what fails again and again."""
    tasks: List[Any] = []

    @break_cycles
    async def fail(request: web.Request, websocket: web.WebSocketResponse) -> None:
        raise ValueError

    async def handler(request: web.Request) -> web.WebSocketResponse:
        websocket = web.WebSocketResponse()
        await websocket.prepare(request)
        for _ in range(FAILURES):
            with contextlib.suppress(ValueError):
                await fail(request, websocket)
            await asyncio.sleep(0)
        tasks.extend([websocket.task, request.task])
        await websocket.close()
        return websocket

    async def main() -> None:
        app = web.Application()
        app.router.add_get("/", handler)
        async with serve(app) as service:
            assert (await service.ask("/", *HANDSHAKE))[0] == 101
            await service.settle()

    run(main())
    assert tasks[0] is tasks[1] is not None


class Group(ExceptionGroup):  # type: ignore[misc, type-arg]
    """One that nobody else has."""


@pytest.mark.skipif(not COUNTS_ARE_EXACT, reason="they tell who has it")
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("error", [ValueError, web.HTTPBadGateway])
@pytest.mark.parametrize("guard", GUARDS)
def test_who_holds_a_member_that_was_raised_finds_the_others(
    guard: str, error: Type[Exception], held: bool
) -> None:
    """Its context is the group that it is in: a loop that is not printed as one."""
    holding: List[BaseException] = []

    @web.middleware
    async def report(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            return await handler(request)  # type: ignore[no-any-return]
        except Exception as exc:
            if held:
                holding.append(exc)
            raise

    async def fail(request: web.Request) -> web.Response:
        try:
            raise Group("both", [error(), KeyError("the other")])
        except Group as group:
            raise group.exceptions[0]  # noqa: B904

    async def main(guard: Guard) -> List[int]:
        app = web.Application(middlewares=[report])
        app.router.add_get("/", fail)
        guard(app)
        with no_collector():
            async with serve(app) as service:
                assert (await service.ask())[0] >= 500
                await service.settle()
                left = [len(alive()), len(alive(Group))]
        assert [len(graph(exc)) for exc in holding] == [3] * held
        holding.clear()  # aiohttp caches the middleware, which has it
        return left

    assert run(main(lambda app: None)) == [1, 1]
    assert run(main(GUARDS[guard])) == [0, int(held)]


class Clumsy:
    """What lets go of it keeps an error, and by that its caller's frame."""

    def __del__(self) -> None:
        try:
            raise ValueError
        except ValueError as exc:
            kept = exc  # noqa: F841  # a cycle of its own


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("body", [b"", b"body"])
@pytest.mark.parametrize("cause", [None, KeyError("cause")])
@pytest.mark.parametrize("error", [LookupError, web.HTTPConflict])
def test_a_finalizer_that_keeps_the_frame_that_called_it_keeps_no_request(
    error: Type[Exception], cause: Any, body: bytes, guard: str
) -> None:
    """Bare, that is none of the library's."""

    async def fail(request: web.Request) -> web.Response:
        if body:
            await request.read()
        await let_go()

    async def let_go() -> None:
        clumsy = Clumsy()  # noqa: F841
        raise error from cause

    async def main(guard: Guard) -> int:
        app = web.Application()
        app.router.add_post("/", fail)
        guard(app)
        with no_collector():
            async with serve(app) as service:
                client = await service.connect()
                await client.post("/", body)
                assert (await client.answer())[0] >= 400
                client.close()
                await service.settle()
                return len(alive())

    assert run(main(GUARDS[guard])) == 0
