"""Whoever logs or reports during the request sees the whole exception."""

import asyncio
import contextlib
import gc
import inspect
import io
import logging
import logging.handlers
import re
import sys
import traceback
from functools import partial
from typing import Any, Callable, Dict, List, Tuple

import pytest
from aiohttp import web

from aiohttp_cyclebreak import cyclebreak, setup

from .naive import NAIVE
from .service import LOOPS, idle, run, serve, spin

pytestmark = pytest.mark.usefixtures("few_objects")


Guard = Callable[[web.Application], Any]

# Any middleware adds a line of its own to a traceback: the control has one too.
GUARDS: Dict[str, Guard] = {
    "appended": lambda app: app.middlewares.append(cyclebreak()),
    "outermost": lambda app: app.middlewares.insert(0, cyclebreak()),
    "setup": setup,
}


def bare(app: web.Application) -> None:
    app.middlewares.append(idle)


async def chained(request: web.Request) -> web.Response:
    marker = "local of the handler"
    try:
        {}[marker]
    except KeyError as exc:
        raise ValueError("from the handler") from exc
    return web.Response()


async def context(request: web.Request) -> web.Response:
    try:
        int("x")
    except ValueError:
        {}["missing"]
    return web.Response()


async def several(request: web.Request) -> web.Response:
    async def fail(number: int) -> None:
        raise ValueError(f"task {number}")

    async with asyncio.TaskGroup() as group:
        for number in range(3):
            group.create_task(fail(number))
    return web.Response()


async def returns_nothing(request: web.Request) -> None:
    pass


async def too_late(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    raise ValueError("after prepare()")


HANDLERS: Dict[str, Any] = {
    "cause": chained,
    "context": context,
    "nothing": returns_nothing,
    "prepared": too_late,
}
if sys.version_info >= (3, 11):
    HANDLERS["group"] = several


def normalized(text: str) -> str:
    """A traceback without the lines of middlewares, which differ."""
    ours = r'(?m)^[ |]*File "[^"]*", line \d+, in (idle|cyclebreak_middleware)\n.*\n'
    text = re.sub(ours, "", text)
    text = re.sub(r"(?m)^[ |]*[~^]+\n", "", text)
    return re.sub(r"127\.0\.0\.1:\d+|0x[0-9a-f]+", "ADDRESS", text)


async def logged(
    handler: Any, guard: Guard, make: Callable[[io.StringIO], logging.Handler]
) -> str:
    """What aiohttp logs of two failing requests, once they are over."""
    stream = io.StringIO()
    log_handler = make(stream)
    logger = logging.getLogger("aiohttp.server")
    logger.addHandler(log_handler)
    try:
        app = web.Application()
        app.router.add_get("/", handler)
        guard(app)
        async with serve(app) as service:
            for _ in range(2):
                client = await service.connect()
                await client.get()
                with contextlib.suppress(ConnectionError):
                    await client.answer()
                client.close()
            await service.settle()
    finally:
        logger.removeHandler(log_handler)
    log_handler.close()
    return normalized(stream.getvalue())


def to_stream(stream: io.StringIO) -> logging.Handler:
    return logging.StreamHandler(stream)


def to_memory(stream: io.StringIO) -> logging.Handler:
    """Formats the records only when it is closed: long after the requests."""
    return logging.handlers.MemoryHandler(
        1000, flushLevel=logging.CRITICAL + 1, target=logging.StreamHandler(stream)
    )


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("make", [to_stream, to_memory])
@pytest.mark.parametrize("handler", HANDLERS)
def test_aiohttp_logs_the_same_text(
    handler: str, make: Any, guard: str, loop: str
) -> None:
    """Also in a handler that formats after the request: only locals are gone then."""
    expected = run(logged(HANDLERS[handler], bare, make), loop)
    assert expected.count("Traceback") >= 2 or handler == "nothing"
    assert run(logged(HANDLERS[handler], GUARDS[guard], make), loop) == expected


def test_the_naive_way_loses_text() -> None:
    """A chained traceback that is formatted later."""

    def guard(app: web.Application) -> None:
        app.middlewares.append(NAIVE["at once"])

    expected = run(logged(chained, bare, to_stream))
    assert run(logged(chained, guard, to_stream)) != expected


def frames(exc: BaseException) -> List[Tuple[str, List[str]]]:
    """Functions and names of locals in the traceback."""
    return [
        (frame.f_code.co_name, sorted(frame.f_locals))
        for frame, _ in traceback.walk_tb(exc.__traceback__)
        if frame.f_code.co_name not in ("idle", "cyclebreak_middleware")
    ]


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("end", ["outer", "inner"])
def test_a_reporter_sees_every_frame_and_local(end: str, guard: str) -> None:
    """A middleware at either end, as Sentry's is, while the request is in flight."""
    seen: List[Any] = []

    @web.middleware
    async def report(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            return await handler(request)  # type: ignore[no-any-return]
        except Exception as exc:
            await spin()
            assert exc.__cause__ is not None
            seen.append((frames(exc), frames(exc.__cause__)))
            raise

    async def main(guard: Guard) -> Any:
        app = web.Application()
        app.router.add_get("/", chained)
        guard(app)
        if end == "outer":
            app.middlewares.insert(0, report)
        else:
            app.middlewares.append(report)
        async with serve(app) as service:
            await service.ask()
            await service.settle()
        return seen.pop()

    expected = run(main(bare))
    assert ("chained", ["marker", "request"]) in expected[0]
    assert run(main(GUARDS[guard])) == expected


class _Reporter(logging.Handler):
    """Looks into the frames of what asyncio logs, at once, as Sentry's does."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: List[Any] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            self.seen.append(frames(record.exc_info[1]))


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("guard", [*GUARDS, "without clearing"])
def test_a_failure_that_others_could_have_waited_for(guard: str, asked: bool) -> None:
    """If none did, asyncio logs it when its future goes: with the locals."""
    reporter = _Reporter()
    logger = logging.getLogger("asyncio")

    async def main(guard: Guard) -> Any:
        shared: List[Any] = []

        async def handler(request: web.Request) -> web.Response:
            future = asyncio.get_running_loop().create_future()
            if asked:
                shared.append(future)
            try:
                {}["missing"]
            except KeyError as exc:
                future.set_exception(exc)
                raise
            return web.Response()

        app = web.Application()
        app.router.add_get("/", handler)
        guard(app)
        async with serve(app) as service:
            await service.ask()
            await service.settle()
            for future in shared:
                with pytest.raises(KeyError):
                    await future
        gc.collect()
        return [reporter.seen.pop() for _ in list(reporter.seen)]

    logger.addHandler(reporter)
    try:
        expected = run(main(bare))
        assert len(expected) == (0 if asked else 1)
        assert all("request" in each[-1][1] for each in expected)
        guards = {**GUARDS, "without clearing": partial(setup, clear_frames=False)}
        assert run(main(guards[guard])) == expected
    finally:
        logger.removeHandler(reporter)


@pytest.mark.parametrize("has_own", [False, True])
@pytest.mark.parametrize("guard", GUARDS)
def test_locals_that_a_reporter_has_read_do_not_keep_the_request(
    guard: str, has_own: bool
) -> None:
    """Reading f_locals leaves a dict of them in the frame before CPython 3.13."""
    from .service import alive, no_collector

    @web.middleware
    async def report(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            return await handler(request)  # type: ignore[no-any-return]
        except Exception as exc:
            for frame, _ in traceback.walk_tb(exc.__traceback__):
                len(frame.f_locals)
            raise

    async def refuse(request: web.Request) -> web.Response:
        if has_own:
            fields = locals()  # the dict has itself from then on
        raise web.HTTPBadRequest

    async def main(guard: Guard) -> int:
        app = web.Application()
        app.router.add_get("/", refuse)
        app.middlewares.append(report)
        guard(app)
        with no_collector():
            before = len(alive())
            async with serve(app) as service:
                for _ in range(5):
                    await service.ask()
                await service.settle()
                return len(alive()) - before

    assert run(main(bare)) == 5
    assert run(main(GUARDS[guard])) == 0


async def refuse(request: web.Request) -> web.Response:
    raise web.HTTPBadRequest()


@pytest.mark.parametrize("guard", GUARDS)
def test_a_background_task_still_formats_the_whole_traceback(guard: str) -> None:
    """It was handed the exception by a middleware, and comes to it later."""
    texts: List[str] = []

    async def main(guard: Guard) -> str:
        go_on = asyncio.Event()

        async def notify(exc: BaseException) -> None:
            await go_on.wait()
            lines = traceback.format_exception(type(exc), exc, exc.__traceback__)
            texts.append(normalized("".join(lines)))

        @web.middleware
        async def hand_over(request: web.Request, handler: Any) -> web.StreamResponse:
            try:
                return await handler(request)  # type: ignore[no-any-return]
            except Exception as exc:
                tasks.append(asyncio.ensure_future(notify(exc)))
                raise

        tasks: List[Any] = []
        app = web.Application()
        app.router.add_get("/", chained)
        app.middlewares.append(hand_over)
        guard(app)
        async with serve(app) as service:
            await service.ask()
            while service.runner.server and service.runner.server.connections:
                await asyncio.sleep(0.001)
            await spin()
            go_on.set()
            await tasks[0]
        return texts.pop()

    expected = run(main(bare))
    assert "in chained" in expected
    assert "KeyError" in expected
    assert run(main(GUARDS[guard])) == expected


@pytest.mark.parametrize("guard", GUARDS)
def test_a_background_task_keeps_a_working_request(guard: str) -> None:
    """Headers, match info, application, stored keys, and a body that was read."""
    outcome: List[Any] = []

    async def main() -> None:
        go_on = asyncio.Event()

        async def work(request: web.Request) -> None:
            await go_on.wait()
            assert isinstance(request["error"], ValueError)
            outcome.append(
                (
                    request.headers["X-Test"],
                    request.match_info["name"],
                    request.app is app,
                    request["stored"],
                    await request.read(),
                    request.path,
                    request.match_info.route.resource is not None,
                )
            )

        async def fail(request: web.Request) -> web.Response:
            request["stored"] = "value"
            await request.read()
            tasks.append(asyncio.ensure_future(work(request)))
            try:
                raise ValueError
            except ValueError as exc:
                request["error"] = exc
                raise

        tasks: List[Any] = []
        app = web.Application()
        app.router.add_post("/{name}", fail)
        GUARDS[guard](app)
        async with serve(app) as service:
            client = await service.connect()
            await client.post("/item", b"body", "X-Test: yes")
            assert (await client.answer())[0] == 500
            client.close()
            while service.runner.server and service.runner.server.connections:
                await asyncio.sleep(0.001)
            await spin()
            go_on.set()
            await tasks[0]

    run(main())
    assert outcome == [("yes", "item", True, "value", b"body", "/item", True)]


@pytest.mark.parametrize("guard", GUARDS)
def test_a_body_read_too_late_raises_what_aiohttp_raises(guard: str) -> None:
    """Never an empty body."""
    outcome: List[Any] = []

    async def main() -> None:
        go_on = asyncio.Event()

        async def work(request: web.Request) -> None:
            await go_on.wait()
            for _ in range(2):
                try:
                    await request.read()
                except web.PayloadAccessError as exc:
                    outcome.append(exc)

        async def answer(request: web.Request) -> web.Response:
            tasks.append(asyncio.ensure_future(work(request)))
            return web.Response()

        tasks: List[Any] = []
        app = web.Application()
        app.router.add_post("/", answer)
        GUARDS[guard](app)
        async with serve(app) as service:
            client = await service.connect()
            await client.post("/", b"body")
            await client.answer()
            await spin()
            go_on.set()
            await tasks[0]
            client.close()

    run(main())
    assert len(outcome) == 2
    assert outcome[0] is not outcome[1]


@pytest.mark.parametrize("guard", GUARDS)
def test_who_was_given_the_locals_keeps_them(guard: str) -> None:
    """Before CPython 3.13 ``locals()`` gives the very dict that the frame has."""
    outcome: List[Any] = []

    async def main() -> None:
        go_on = asyncio.Event()

        async def work(fields: Dict[str, Any]) -> None:
            await go_on.wait()
            outcome.append(fields.get("marker"))

        async def fail(request: web.Request) -> web.Response:
            marker = "to be audited"
            tasks.append(asyncio.ensure_future(work(locals())))
            try:
                {}[marker]
            except KeyError as exc:
                raise ValueError from exc
            return web.Response()

        tasks: List[Any] = []
        app = web.Application()
        app.router.add_get("/", fail)
        GUARDS[guard](app)
        async with serve(app) as service:
            assert (await service.ask())[0] == 500
            while service.runner.server and service.runner.server.connections:
                await asyncio.sleep(0.001)
            await spin()
            go_on.set()
            await tasks[0]

    run(main())
    assert outcome == ["to be audited"]


@pytest.mark.parametrize("guard", GUARDS)
def test_a_background_task_finds_the_handler_of_a_missing_route(guard: str) -> None:
    """Metrics and logs take its name."""

    async def main(guard: Guard) -> List[Any]:
        app = web.Application()
        requests: List[web.Request] = []

        @web.middleware
        async def hold(request: web.Request, handler: Any) -> web.StreamResponse:
            requests.append(request)
            return await handler(request)  # type: ignore[no-any-return]

        app.middlewares.append(hold)
        guard(app)
        async with serve(app) as service:
            assert (await service.ask("/missing"))[0] == 404
            await service.settle()
        found: Any = requests[0].match_info.handler
        names = [found.__module__, found.__qualname__, found.__name__]
        with pytest.raises(web.HTTPNotFound):
            await found(requests[0])
        return [*names, inspect.iscoroutinefunction(found)]

    assert run(main(GUARDS[guard])) == run(main(bare))
