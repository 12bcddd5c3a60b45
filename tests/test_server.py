"""guard_server(): one runner, its connections, and those that carry no request."""

import asyncio
import contextlib
import logging
import pathlib
import socket
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any, AsyncIterator, List, Optional

import pytest
from aiohttp import web, web_protocol

from aiohttp_cyclebreak import BreakEvent, guard_server, setup

from .service import (
    AIOHTTP,
    LOOPS,
    Records,
    alive,
    go_away,
    no_collector,
    run,
    start,
    wrap_tasks,
)

pytestmark = pytest.mark.usefixtures("few_objects")


async def refuse(request: web.BaseRequest) -> web.Response:
    raise web.HTTPBadRequest(text="no")


async def store(request: web.BaseRequest) -> web.Response:
    try:
        raise LookupError
    except LookupError as exc:
        request["error"] = exc
    return web.Response()


async def succeed(request: web.BaseRequest) -> web.Response:
    return web.Response()


@web.middleware
async def swallow(request: web.Request, handler: Any) -> web.StreamResponse:
    error = None
    try:
        return await handler(request)  # type: ignore[no-any-return]
    except web.HTTPException as exc:
        error = exc
    return web.Response(text=str(error), status=500)


@web.middleware
async def swallow_from_a_task(request: web.Request, handler: Any) -> web.StreamResponse:
    error = None
    try:
        return await asyncio.ensure_future(handler(request))
    except web.HTTPException as exc:
        error = exc
    return web.Response(text=str(error), status=500)


def application(*middlewares: Any) -> web.Application:
    app = web.Application(middlewares=middlewares)
    app.router.add_get("/", refuse)
    sub = web.Application(middlewares=middlewares)
    sub.router.add_get("/", refuse)
    app.add_subapp("/sub/", sub)
    return app


async def requests_left(runner: Any, guarded: bool, *paths: str, **options: Any) -> int:
    with no_collector():
        before = len(alive())
        await runner.setup()
        if guarded:
            guard_server(runner, **options)
        service = await start(runner)
        for path in paths:
            await service.ask(path)
        await service.settle()
        left = len(alive()) - before
        await runner.cleanup()
        return left


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("middlewares", [(), (swallow,), (swallow_from_a_task,)])
def test_it_needs_no_middleware(middlewares: Any, loop: str) -> None:
    """Also where the application swallows what its handlers raise."""
    paths = ["/", "/sub/", "/missing"] * 3

    async def main(guarded: bool) -> int:
        app = application(*middlewares)
        return await requests_left(web.AppRunner(app), guarded, *paths)

    assert run(main(guarded=False), loop) == 9
    assert run(main(guarded=True), loop) == 0


@pytest.mark.parametrize("with_middlewares", [False, True])
def test_tasks_that_a_factory_wraps(with_middlewares: bool) -> None:
    """Sentry's does, OpenTelemetry's and aiomonitor's, from their first step on.

    The frame of the connection, which has its last request, is then an inner one.
    """

    async def answer(request: web.Request) -> web.Response:
        return web.Response()

    async def main(guarded: bool) -> int:
        wrap_tasks()
        app = application()
        app.router.add_get("/ok", answer)
        if with_middlewares and guarded:
            setup(app)
        runner = web.AppRunner(app)
        paths = ["/ok", "/", "/missing"] * 3
        return await requests_left(runner, guarded and not with_middlewares, *paths)

    # From aiohttp 3.10.6 to 3.11.13 a connection that is closed leaves its last
    # request, if its task keeps what it was cancelled with: from CPython 3.9 on.
    leaves_last = (3, 10, 6) <= AIOHTTP < (3, 11, 14) and sys.version_info >= (3, 9)
    assert run(main(guarded=False)) == (9 if leaves_last else 6)
    assert run(main(guarded=True)) == 0


@pytest.mark.parametrize("middlewares", [(), (swallow,)])
def test_what_keep_is_true_of_is_kept(middlewares: Any) -> None:
    """It is asked with the request and the exception."""
    asked: List[Any] = []

    def keep(request: web.Request, exc: BaseException) -> bool:
        asked.append((request.path, type(exc)))
        return request.path == "/"

    async def main() -> int:
        runner = web.AppRunner(application(*middlewares))
        return await requests_left(runner, True, "/", "/sub/", "/", keep=keep)

    assert run(main()) == 2
    assert set(asked) == {(path, web.HTTPBadRequest) for path in ("/", "/sub/")}


@pytest.mark.parametrize("clear", [True, False])
def test_clear_frames(clear: bool) -> None:
    """Who holds the exception finds a traceback without locals, or none."""
    held: List[BaseException] = []

    @web.middleware
    async def hold(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            return await handler(request)  # type: ignore[no-any-return]
        except web.HTTPException as exc:
            held.append(exc)
            raise

    async def main() -> int:
        runner = web.AppRunner(application(hold))
        return await requests_left(runner, True, "/", clear_frames=clear)

    assert run(main()) == 0
    assert (held[0].__traceback__ is not None) is clear


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("handler", [refuse, store, succeed])
def test_a_low_level_server(handler: Any, loop: str) -> None:
    """A ServerRunner has no application, no route and no middleware."""

    async def main(guarded: bool) -> int:
        return await requests_left(
            web.ServerRunner(web.Server(handler)), guarded, *["/"] * 5
        )

    # What succeeds stays only where each connection that its client closes does.
    has_task = (3, 10, 6) <= AIOHTTP < (3, 11, 14) and sys.version_info >= (3, 9)
    stays = handler is not succeed or has_task
    assert run(main(guarded=False), loop) == 5 * stays
    assert run(main(guarded=True), loop) == 0


# More than the buffers of a connection take.
LARGE = 20_000_000


async def respond(request: web.Request) -> web.Response:
    return web.Response(body=bytes(LARGE))


async def refuse_at_length(request: web.Request) -> web.Response:
    raise web.HTTPBadRequest(body=bytes(LARGE))


async def generate(request: web.Request) -> web.Response:
    async def body() -> AsyncIterator[bytes]:
        yield bytes(LARGE)

    return web.Response(body=body())


async def stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(bytes(LARGE))
    return response


async def swallow_and_stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    try:
        await response.write(bytes(LARGE))
    except ConnectionError:
        pass
    return response


SENT = (respond, refuse_at_length, generate, stream, swallow_and_stream)


async def left_by_clients_that_go(
    handler: Any, cancellation: bool = False, **options: Any
) -> int:
    app = web.Application()
    app.router.add_get("/", handler)
    serving: Any = {"handler_cancellation": True} if cancellation else {}
    runner = web.AppRunner(app, access_log_format="%r %s", **serving)
    with no_collector():
        before = len(alive())
        await runner.setup()
        if options.pop("guarded", True):
            guard_server(runner, **options)
        service = await start(runner)
        for _ in range(3):
            await go_away(service)
        left = len(alive()) - before
        await runner.cleanup()
        return left


@pytest.mark.skipif(AIOHTTP < (3, 8, 2), reason="it cancels those handlers")
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("handler", SENT)
def test_clients_that_go_away_while_something_is_sent(handler: Any, loop: str) -> None:
    """The future that aiohttp's writer waits for keeps the exception that it raises."""
    assert run(left_by_clients_that_go(handler, guarded=False), loop) == 3
    assert run(left_by_clients_that_go(handler), loop) == 0


@pytest.mark.skipif(AIOHTTP < (3, 9), reason="it cancels no handler")
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("handler", SENT)
def test_clients_that_go_away_and_cancel_what_is_sent(handler: Any, loop: str) -> None:
    """The connection's task keeps the cancellation, and its frames the request.

    From aiohttp 3.10.6 to 3.11.13 the request has that task; what was raised as the
    response has the request then, which makes a cycle without a frame.  CPython 3.9
    and 3.10 keep one cancellation for each task that waits for another.
    """
    is_raised = handler is refuse_at_length
    has_task = (3, 10, 6) <= AIOHTTP < (3, 11, 14) and sys.version_info >= (3, 9)
    bare = run(left_by_clients_that_go(handler, True, guarded=False), loop)
    assert bare == (3 if has_task or is_raised else 0)
    left = run(left_by_clients_that_go(handler, True), loop)
    is_chain = sys.version_info < (3, 11) and handler in (respond, generate)
    assert left == (bare if has_task and (is_raised or is_chain) else 0)


@pytest.mark.skipif(AIOHTTP < (3, 9), reason="it cancels no handler")
def test_what_is_kept_stays_whole_when_sending_it_is_cancelled() -> None:
    """It is the context of the cancellation, which nobody but the task has."""
    kept: List[BaseException] = []

    def keep(request: web.Request, exc: BaseException) -> bool:
        if isinstance(exc, web.HTTPException):
            kept.append(exc)
        return True

    assert run(left_by_clients_that_go(refuse_at_length, True, keep=keep)) == 3
    for exc in kept:
        *_, frame = [each for each, _ in traceback.walk_tb(exc.__traceback__)]
        assert "request" in frame.f_locals
    assert len({id(exc) for exc in kept}) == 3


@pytest.mark.skipif(AIOHTTP < (3, 9), reason="it cancels no handler")
@pytest.mark.parametrize("cancellation", [False, True])
def test_clients_that_go_away_from_wrapped_tasks(cancellation: bool) -> None:
    """The request's task is then known by the connection's, which waits for it."""

    async def main(guarded: bool) -> int:
        wrap_tasks()
        return await left_by_clients_that_go(respond, cancellation, guarded=guarded)

    has_task = (3, 10, 6) <= AIOHTTP < (3, 11, 14) and sys.version_info >= (3, 9)
    assert run(main(guarded=False)) == (3 if has_task or not cancellation else 0)
    is_chain = cancellation and has_task and sys.version_info < (3, 11)  # as above
    assert run(main(guarded=True)) == (3 if is_chain else 0)


@pytest.mark.skipif(AIOHTTP < (3, 8, 2), reason="what it cancels may be left")
def test_clients_that_go_away_while_a_file_is_sent(tmp_path: pathlib.Path) -> None:
    """There it is a future of the event loop's."""
    path = tmp_path / "large"
    path.write_bytes(bytes(LARGE))

    async def send(request: web.Request) -> web.FileResponse:
        return web.FileResponse(path)

    async def main(guarded: bool) -> int:
        app = web.Application()
        app.router.add_get("/", send)
        runner = web.AppRunner(app)
        loop = asyncio.get_running_loop()
        # A thread lets go of its job, which has the request, at a moment of its own:
        # this one before it takes the next.
        loop.set_default_executor(ThreadPoolExecutor(1))
        with no_collector():
            before = len(alive())
            await runner.setup()
            if guarded:
                guard_server(runner)
            service = await start(runner)
            for _ in range(3):
                client = await service.connect()
                await client.get("/")
                received = b""
                while not received.partition(b"\r\n\r\n")[2]:
                    received += await loop.sock_recv(client.sock, 1000)
                client.reset()
                await service.settle()
            await loop.run_in_executor(None, int)
            left = len(alive()) - before
            await runner.cleanup()
            return left

    assert run(main(guarded=False)) == 3
    assert run(main(guarded=True)) == 0


@pytest.mark.skipif(AIOHTTP < (3, 8, 2), reason="it cancels those handlers")
@pytest.mark.parametrize("handler", [respond, swallow_and_stream])
def test_options_hold_for_clients_that_go_away(handler: Any) -> None:
    """They are asked and told as for an exception that is raised."""
    events: List[BreakEvent] = []
    asked: List[Any] = []

    def keep(request: web.Request, exc: BaseException) -> bool:
        asked.append((request.path, issubclass(type(exc), ConnectionError)))
        return True

    assert run(left_by_clients_that_go(handler, keep=keep)) == 3
    assert set(asked) == {("/", True)}
    assert run(left_by_clients_that_go(handler, on_break=events.append)) == 0
    assert {(event.method, event.route) for event in events} == {("GET", "/")}
    assert run(left_by_clients_that_go(handler, clear_frames=False)) == 0


@pytest.mark.skipif(AIOHTTP < (3, 8, 2), reason="it cancels those handlers")
@pytest.mark.parametrize("handler", SENT)
def test_what_is_logged_of_clients_that_go_away(handler: Any) -> None:
    """The access log and aiohttp's errors are as bare."""

    def logged(guarded: bool) -> List[str]:
        records = Records()
        logger = logging.getLogger("aiohttp")
        level = logger.level
        logger.addHandler(records)
        logger.setLevel(logging.INFO)
        try:
            run(left_by_clients_that_go(handler, guarded=guarded))
        finally:
            logger.removeHandler(records)
            logger.setLevel(level)
        return [line.partition("\n")[0] for line in records.lines]

    bare = logged(guarded=False)
    assert len(bare) == 3
    assert logged(guarded=True) == bare


@pytest.mark.parametrize("shared", [False, True])
def test_only_this_runner_is_affected(shared: bool) -> None:
    """Two runners in one process, one guarded and one not, of one application too."""

    async def main() -> List[int]:
        apps = [application(), application()]
        if shared:
            apps[1] = apps[0]
        runners = [web.AppRunner(app) for app in apps]
        left = []
        with no_collector():
            services = []
            for number, runner in enumerate(runners):
                await runner.setup()
                if not number:
                    guard_server(runner)
                services.append(await start(runner))
            for service in services:
                before = len(alive())
                for _ in range(5):
                    await service.ask("/")
                await service.settle()
                left.append(len(alive()) - before)
            for runner in runners:
                await runner.cleanup()
        return left

    assert run(main()) == [0, 5]


def test_one_application_guarded_by_several_runners() -> None:
    """Each by its own options; the application gets no longer with each of them."""
    depths: List[int] = []

    @web.middleware
    async def measure(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            return await handler(request)  # type: ignore[no-any-return]
        except web.HTTPException as exc:
            depths.append(len(list(traceback.walk_tb(exc.__traceback__))))
            return web.Response()

    async def main() -> List[int]:
        app = application(measure)
        events: List[List[BreakEvent]] = [[], [], []]
        for each in events:
            runner = web.AppRunner(app)
            await runner.setup()
            guard_server(runner, on_break=each.append)
            service = await start(runner)
            await service.ask("/")
            await service.ask("/sub/")
            await service.settle()
            await runner.cleanup()
        return [len(each) for each in events]

    assert run(main()) == [2, 2, 2]
    assert depths == depths[:1] * 6


def test_an_application_that_was_served_before() -> None:
    """Each route has a chain of middlewares by then, without ours."""

    async def main(guarded: bool) -> int:
        app = application(swallow)
        first = web.AppRunner(app)
        await first.setup()
        service = await start(first)
        await service.ask("/")
        await service.ask("/sub/")
        await service.settle()
        second = web.AppRunner(app)
        left = await requests_left(second, guarded, "/", "/sub/")
        await first.cleanup()
        return left

    assert run(main(guarded=False)) == 2
    assert run(main(guarded=True)) == 0


def test_a_runner_of_ones_own_guards_itself() -> None:
    """What gunicorn's workers are given, and what replaces run_app()."""

    class GuardedRunner(web.AppRunner):
        async def setup(self) -> None:
            await super().setup()
            guard_server(self)

    async def main() -> int:
        with no_collector():
            before = len(alive())
            runner = GuardedRunner(application())
            await runner.setup()
            service = await start(runner)
            await service.ask("/")
            await service.settle()
            left = len(alive()) - before
            await runner.cleanup()
            return left

    assert run(main()) == 0


def test_a_server_that_is_given_another_handler_later() -> None:
    """Those who connect after that get to it, as bare."""

    async def other(request: web.BaseRequest) -> web.Response:
        raise web.HTTPGone(text="moved")

    async def main(guarded: bool) -> Any:
        server = web.Server(refuse)
        runner = web.ServerRunner(server)
        with no_collector():
            before = len(alive())
            await runner.setup()
            if guarded:
                guard_server(runner)
            service = await start(runner)
            answers = [await service.ask()]
            server.request_handler = other
            answers.append(await service.ask())
            await service.settle()
            left = len(alive()) - before
            await runner.cleanup()
            return left, answers

    assert run(main(guarded=True)) == (0, run(main(guarded=False))[1])


def test_twice_is_once() -> None:
    """One event for each request."""
    events: List[BreakEvent] = []

    async def main() -> None:
        runner = web.AppRunner(application())
        await runner.setup()
        for _ in range(2):
            guard_server(runner, on_break=events.append)
        guard_server(runner)
        for other in (print, lambda event: None):
            with pytest.raises(RuntimeError, match="before, with other options"):
                guard_server(runner, on_break=other)
        service = await start(runner)
        await service.ask("/")
        await service.settle()
        await runner.cleanup()

    run(main())
    assert [event.exception for event in events] == [web.HTTPBadRequest]


@pytest.mark.parametrize("wrong", [None, web.Application(), "runner"])
def test_anything_else_than_a_runner_is_a_type_error(wrong: Any) -> None:
    """The application is a likely slip."""
    with pytest.raises(TypeError, match="^runner must be an"):
        guard_server(wrong)


@pytest.mark.parametrize(
    ("option", "value"),
    [("keep", 1), ("on_break", 1), ("clear_frames", 1), ("release_body", None)],
)
def test_a_wrong_option_is_named(option: str, value: Any) -> None:
    """As for the middleware."""

    async def main() -> None:
        with pytest.raises(TypeError, match=f"^{option} must be"):
            guard_server(web.AppRunner(web.Application()), **{option: value})

    run(main())


def test_too_early_and_too_late_are_errors() -> None:
    """And say what to do."""

    async def main() -> None:
        runner = web.AppRunner(application())
        with pytest.raises(RuntimeError, match=r"await runner\.setup\(\) before"):
            guard_server(runner)
        await runner.setup()
        await start(runner)
        with pytest.raises(RuntimeError, match=r"before the first site\.start\(\)"):
            guard_server(runner)
        await runner.cleanup()

    run(main())


def test_other_internals_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than guess, it says what is missing."""

    async def main() -> None:
        runner = web.AppRunner(application())
        await runner.setup()
        monkeypatch.delattr(web_protocol, "_ErrInfo")
        with pytest.raises(RuntimeError, match=r"_ErrInfo: install a newer"):
            guard_server(runner)
        await runner.cleanup()

    run(main())


def test_the_switch(monkeypatch: pytest.MonkeyPatch, log: List[str]) -> None:
    """AIOHTTP_CYCLEBREAK=off leaves the server as it is."""
    monkeypatch.setenv("AIOHTTP_CYCLEBREAK", "off")

    async def main() -> int:
        return await requests_left(web.AppRunner(application()), True, *["/"] * 3)

    assert run(main()) == 3
    assert "AIOHTTP_CYCLEBREAK=off" in log[0]


def test_a_malformed_request_is_answered_and_logged_as_before() -> None:
    """Nothing that aiohttp does about it changes."""

    async def main(guarded: bool) -> List[bytes]:
        runner = web.AppRunner(application())
        await runner.setup()
        if guarded:
            guard_server(runner)
        service = await start(runner)
        answers = []
        for sent in (b"not HTTP\r\n\r\n", b"GET / HTTP/1.1\r\nbad header\r\n\r\n"):
            client = await service.connect()
            await client.send(sent)
            try:
                status, body = await client.answer()
                answers.append(b"%d %s" % (status, body.encode()))
            except ConnectionError:
                answers.append(b"closed")
            client.close()
        await service.settle()
        await runner.cleanup()
        return answers

    bare = run(main(guarded=False))
    assert bare[0].startswith(b"400")
    assert run(main(guarded=True)) == bare


@pytest.mark.parametrize("clear_frames", [None, True, False])
def test_a_malformed_request_is_severed_as_the_options_have_it(
    clear_frames: Optional[bool],
) -> None:
    """A log handler that keeps the record has the locals, where they are to stay."""
    kept: List[Any] = []

    class Keeps(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info is not None:
                kept.append(record.exc_info)

    async def main() -> None:
        runner = web.AppRunner(application())
        await runner.setup()
        if clear_frames is not None:
            guard_server(runner, clear_frames=clear_frames)
        service = await start(runner)
        client = await service.connect()
        await client.send(b"not HTTP\r\n\r\n")
        assert (await client.answer())[0] == 400
        client.close()
        await service.settle()
        await runner.cleanup()

    handler = Keeps()
    logger = logging.getLogger("aiohttp.server")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.DEBUG)  # as newer releases log it
    try:
        with no_collector():
            before = len(alive(web.RequestHandler))
            run(main())
            ((_, error, entry),) = kept
            frames = [frame for frame, _ in traceback.walk_tb(entry)]
            has_locals = "self" in frames[0].f_locals
            assert has_locals is (clear_frames is not True)
            assert (error.__traceback__ is None) is (clear_frames is False)
            del error, entry, frames
            kept.clear()
            left = len(alive(web.RequestHandler)) - before
            assert left == (clear_frames is None)
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def test_a_connection_goes_by_the_name_it_had() -> None:
    """Where aiohttp fails, as some releases do at a broken URL, asyncio logs it."""

    async def main(guarded: bool) -> Any:
        records = Records()
        logging.getLogger("asyncio").addHandler(records)
        runner = web.AppRunner(application())
        await runner.setup()
        if guarded:
            guard_server(runner)
        server = runner.server
        assert server is not None
        service = await start(runner)
        client = await service.connect()
        await client.get("/")
        await client.answer()
        names = [repr(each) for each in server.connections]
        names += [repr(server).partition(" at ")[0]]
        await client.get("http://[no/")
        with contextlib.suppress(ConnectionError):
            await client.answer()
        client.close()
        await service.settle()
        await runner.cleanup()
        logging.getLogger("asyncio").removeHandler(records)
        lines = "\n".join(records.lines).splitlines()
        return names, [line for line in lines if line.startswith("protocol:")]

    bare = run(main(guarded=False))
    assert run(main(guarded=True)) == bare


UPGRADE = (
    b"GET /%s HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
)


@pytest.mark.parametrize("half_closes", [False, True])
@pytest.mark.parametrize(
    "first", [b"", UPGRADE % b"ok", UPGRADE % b"close", UPGRADE % b"refuse"]
)
def test_a_malformed_request_behind_another_one(
    first: bytes, half_closes: bool
) -> None:
    """An upgrade that is declined is followed by what is parsed after the answer.

    aiohttp does not come to that if the answer closes the connection, or its client
    has done so.
    """

    async def handle(request: web.Request) -> web.Response:
        if request.path == "/refuse":
            raise web.HTTPBadRequest
        response = web.Response()
        if request.path == "/close":
            response.force_close()
        return response

    async def main() -> int:
        app = web.Application()
        app.router.add_get("/{name}", handle)
        runner = web.AppRunner(app)
        with no_collector():
            before = len(alive(web_protocol.RequestHandler))
            await runner.setup()
            guard_server(runner)
            service = await start(runner)
            for _ in range(3):
                client = await service.connect()
                await client.send(first + b"not HTTP\r\n\r\n")
                if half_closes:
                    client.sock.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionError):
                    while True:
                        await client.answer()
                client.close()
            await service.settle()
            left = len(alive(web_protocol.RequestHandler)) - before
            await runner.cleanup()
            return left

    assert run(main()) == 0


@pytest.mark.skipif(AIOHTTP < (3, 9), reason="it waits a minute for a busy handler")
def test_shutdown_with_connections_open() -> None:
    """Idle and busy ones, as a deployment finds them."""

    async def main() -> int:
        with no_collector():
            before = len(alive())
            waiting = asyncio.Event()

            async def wait(request: web.Request) -> web.Response:
                waiting.set()
                await asyncio.Event().wait()
                return web.Response()

            app = application()
            app.router.add_get("/wait", wait)
            runner = web.AppRunner(app, handler_cancellation=True)
            await runner.setup()
            guard_server(runner)
            service = await start(runner)
            clients = [await service.connect() for _ in range(3)]
            await clients[0].get("/")
            await clients[0].answer()
            await clients[1].get("/wait")
            await waiting.wait()
            clients[1].close()
            await runner.cleanup()
            for client in clients:
                client.close()
            for _ in range(50):
                await asyncio.sleep(0)
            return len(alive()) - before

    assert run(main()) == 0
