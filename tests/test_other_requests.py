"""One exception in flight in several requests: none of them is disturbed."""

import asyncio
import contextlib
import gc
import logging
import os
import queue
import signal
import sys
import threading
import traceback
import warnings
import weakref
from typing import Any, Callable, Dict, List, Tuple, Type

import pytest
from aiohttp import web

from aiohttp_cyclebreak import (
    break_cycles,
    connections,
    cyclebreak,
    holders,
    setup,
    tracebacks,
)

from .naive import NAIVE
from .service import LOOPS, TIMEOUT, alive, no_collector, run, serve, spin

pytestmark = pytest.mark.usefixtures("few_objects")

OURS = os.path.dirname(connections.__file__)
REQUESTS = 6

Guard = Callable[[web.Application], Any]

GUARDS: Dict[str, Guard] = {
    "appended": lambda app: app.middlewares.append(cyclebreak()),
    "outermost": lambda app: app.middlewares.insert(0, cyclebreak()),
    "setup": setup,
    "without clearing": lambda app: setup(app, clear_frames=False),
}


class Shared:
    """Six requests meet one exception, and answer one after the other.

    How each of them meets it is the *trigger*; an outer error middleware, or the
    handler itself, holds it for as long as it is told to, formats it and answers.
    """

    def __init__(self, trigger: str, holder: str) -> None:
        self.trigger = trigger
        self.holder = holder
        self.instance = LookupError("one for all")
        self.waiting = 0
        self.caught = 0
        self.closed: List[int] = []
        self.reports: Dict[int, str] = {}
        self.locals: Dict[int, bool] = {}
        self.turn = [asyncio.Event() for _ in range(REQUESTS)]
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def fail(self, number: int) -> None:
        marker = f"request {number}"
        self.waiting += 1
        if self.trigger == "future":
            await self.future
        while self.waiting < REQUESTS:
            await asyncio.sleep(0)
        if self.trigger == "translated":
            try:
                raise self.instance
            except LookupError as exc:
                raise web.HTTPBadGateway(text=marker) from exc
        raise self.instance

    async def hold(self, number: int, exc: BaseException) -> web.Response:
        self.caught += 1
        try:
            await self.turn[number].wait()
        except GeneratorExit:
            self.closed.append(number)
            raise
        chain = [exc] if exc.__cause__ is None else [exc, exc.__cause__]
        self.reports[number] = "".join(
            traceback.format_exception(type(exc), exc, exc.__traceback__)
        )
        # The frame of fail() must be there, with its locals, for every request.
        frames = [
            frame
            for each in chain
            for frame, _ in traceback.walk_tb(each.__traceback__)
            if frame.f_code.co_name == "fail"
        ]
        self.locals[number] = bool(frames) and all(
            "marker" in frame.f_locals for frame in frames
        )
        return web.Response(text=str(number), status=500)

    async def handler(self, request: web.Request) -> web.Response:
        number = int(request.match_info["number"])
        if self.holder == "handler":
            try:
                await self.fail(number)
            except Exception as exc:
                return await self.hold(number, exc)
        await self.fail(number)
        return web.Response()

    @property
    def middleware(self) -> Any:
        @web.middleware
        async def catch(request: web.Request, handler: Any) -> web.StreamResponse:
            try:
                return await handler(request)  # type: ignore[no-any-return]
            except Exception as exc:
                return await self.hold(int(request.match_info["number"]), exc)

        return catch


async def share(
    trigger: str, holder: str, guard: Guard, timeout: float = 30.0
) -> Tuple[Shared, List[Any]]:
    shared = Shared(trigger, holder)
    app = web.Application()
    app.router.add_get("/{number}", shared.handler)
    app.middlewares.append(shared.middleware)
    guard(app)
    async with serve(app) as service:
        clients = [await service.connect() for _ in range(REQUESTS)]
        for number, client in enumerate(clients):
            await client.get(f"/{number}")
        while shared.waiting < REQUESTS:
            await asyncio.sleep(0.001)
        if trigger == "future":
            shared.future.set_exception(shared.instance)
        while shared.caught < REQUESTS and not shared.closed:
            await asyncio.sleep(0.001)
        answers: List[Any] = []
        for number, client in enumerate(clients):
            shared.turn[number].set()
            try:
                answers.append(await asyncio.wait_for(client.answer(), timeout))
            except (asyncio.TimeoutError, ConnectionError) as exc:
                answers.append(exc)
            client.close()
            # The request's task is done, and its connection's, before the next.
            for _ in range(50):
                await asyncio.sleep(0)
        if not all(isinstance(answer, tuple) for answer in answers):
            # Whoever awaits a coroutine that was closed waits for ever.
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
        await service.settle()
    return shared, answers


TRIGGERS = ("future", "singleton", "translated")


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("holder", ["middleware", "handler"])
@pytest.mark.parametrize("trigger", TRIGGERS)
def test_every_request_is_answered_and_formats_the_traceback(
    trigger: str, holder: str, guard: str, loop: str
) -> None:
    """One exception in six requests: each has all of it until it is done itself."""
    shared, answers = run(share(trigger, holder, GUARDS[guard]), loop)
    assert answers == [(500, str(number)) for number in range(REQUESTS)]
    assert not shared.closed
    assert all("in fail" in shared.reports[number] for number in range(REQUESTS))
    if guard != "without clearing" or holder == "middleware":
        assert all(shared.locals[number] for number in range(REQUESTS))


@pytest.mark.parametrize("trigger", TRIGGERS)
def test_and_the_last_of_them_leaves_nothing(trigger: str) -> None:
    """What the others left to it, the last request severs."""

    async def main() -> int:
        with no_collector():
            before = len(alive())
            _shared, answers = await share(trigger, "middleware", setup)
            assert len(answers) == REQUESTS
            await asyncio.sleep(0)
            return len(alive()) - before

    assert run(main()) == 0


@pytest.mark.thorough
@pytest.mark.parametrize("naive", NAIVE)
@pytest.mark.parametrize("trigger", TRIGGERS)
def test_the_naive_way_is_caught(trigger: str, naive: str) -> None:
    """Clearing all frames loses locals everywhere, and answers before 3.13."""

    def guard(app: web.Application) -> None:
        app.middlewares.append(NAIVE[naive])

    shared, answers = run(share(trigger, "middleware", guard, timeout=0.5))
    assert (
        shared.closed
        or any(not isinstance(answer, tuple) for answer in answers)
        or not all(shared.locals.get(number) for number in range(REQUESTS))
    )


@pytest.mark.parametrize("guard", ["none", *GUARDS])
def test_a_suspended_generator_in_a_traceback_is_not_closed(guard: str) -> None:
    """It goes on after the request in whose traceback it was."""
    closed = []
    kept: List[Any] = []

    def numbers() -> Any:
        try:
            raise ValueError("caught by the generator")
        except ValueError as exc:
            try:
                yield exc
                yield "still here"
            except GeneratorExit:
                closed.append("generator")
                raise

    async def handler(request: web.Request) -> web.Response:
        generator = numbers()
        kept.append(generator)
        raise next(generator)

    async def main() -> None:
        app = web.Application()
        app.router.add_get("/", handler)
        if guard != "none":
            GUARDS[guard](app)
        async with serve(app) as service:
            assert (await service.ask())[0] == 500
            await service.settle()

    run(main())
    assert not closed
    assert next(kept[0]) == "still here"


@pytest.mark.parametrize("guard", ["none", *GUARDS])
def test_a_suspended_coroutine_in_a_traceback_is_not_closed(guard: str) -> None:
    """A task that caught the exception first goes on after the request."""
    outcome: List[str] = []

    async def main() -> None:
        go_on = asyncio.Event()
        failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def worker(exc: BaseException) -> None:
            try:
                raise exc
            except ValueError:
                failed.set_result(None)
                await go_on.wait()
                outcome.append(traceback.format_exc())

        async def handler(request: web.Request) -> web.Response:
            exc = ValueError("shared with a worker")
            tasks.append(asyncio.ensure_future(worker(exc)))
            await failed
            raise exc

        tasks: List[Any] = []
        app = web.Application()
        app.router.add_get("/", handler)
        if guard != "none":
            GUARDS[guard](app)
        async with serve(app) as service:
            assert (await service.ask())[0] == 500
            while service.runner.server and service.runner.server.connections:
                await asyncio.sleep(0.001)
            for _ in range(20):
                await asyncio.sleep(0)
            go_on.set()
            await tasks[0]

    run(main())
    assert "in worker" in outcome[0]


def test_decorated_routes_share_as_well() -> None:
    """The decorator counts in flight as the middleware does."""

    async def main() -> Tuple[Shared, List[Any]]:
        def guard(app: web.Application) -> None:
            pass

        original = Shared.handler
        try:
            Shared.handler = break_cycles(original)  # type: ignore[method-assign]
            return await share("singleton", "middleware", guard)
        finally:
            Shared.handler = original  # type: ignore[method-assign]

    shared, answers = run(main())
    assert answers == [(500, str(number)) for number in range(REQUESTS)]
    assert all(shared.locals[number] for number in range(REQUESTS))


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("install", GUARDS)
def test_who_has_called_what_failed_keeps_its_locals(
    install: str, asynchronous: bool
) -> None:
    """A cached failure leads by f_back to the frames of the request that met it first.

    That one has failed of something else, and is being reported.
    """
    failures: List[BaseException] = []
    reported: List[bool] = []

    def compute() -> None:
        raise LookupError("cached")

    def look_up() -> None:
        try:
            compute()
        except LookupError as exc:
            failures.append(exc)

    async def look_up_later() -> None:
        try:
            await asyncio.sleep(0)
            compute()
        except LookupError as exc:
            failures.append(exc)

    async def handler(request: web.Request) -> web.Response:
        marker = "audit"
        if asynchronous:
            await look_up_later()
        else:
            look_up()
        raise RuntimeError(marker)

    async def other(request: web.Request) -> web.Response:
        raise failures[0]

    async def main() -> None:
        waits, goes_on = asyncio.Event(), asyncio.Event()

        @web.middleware
        async def report(request: web.Request, handler: Any) -> web.StreamResponse:
            try:
                return await handler(request)  # type: ignore[no-any-return]
            except RuntimeError as exc:
                waits.set()
                await goes_on.wait()
                frames = [frame for frame, _ in traceback.walk_tb(exc.__traceback__)]
                reported.append(any("marker" in frame.f_locals for frame in frames))
                return web.Response(status=500)

        app = web.Application(middlewares=[report])
        app.router.add_get("/", handler)
        app.router.add_get("/other", other)
        GUARDS[install](app)
        async with serve(app) as service:
            client = await service.connect()
            await client.get("/")
            await waits.wait()
            assert (await service.ask("/other"))[0] == 500
            for _ in range(10):
                await asyncio.sleep(0)
            goes_on.set()
            assert (await client.answer())[0] == 500
            client.close()

    run(main())
    assert reported == [True]


class Down(Exception):
    """What a weak reference can be made of; the built-in ones allow none."""


@pytest.mark.parametrize("stays", [False, True])
@pytest.mark.parametrize("failure", [Down, ConnectionError])
@pytest.mark.parametrize("install", ["appended", "outermost", "setup"])
def test_a_worker_that_goes_on_keeps_no_requests(
    install: str,
    failure: Type[Exception],
    stays: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It hands what fails to one handler after the other, and has nothing in hand.

    On one connection that stays open, or on one for each request.
    """
    monkeypatch.setattr(holders, "_SOON", 0)

    async def work(queue: "asyncio.Queue[Any]") -> None:
        while True:
            future = await queue.get()
            try:
                raise failure
            except Exception as exc:
                future.set_exception(exc)
            del future

    async def main(guard: Any) -> List[int]:
        queue: asyncio.Queue[Any] = asyncio.Queue()
        worker = asyncio.ensure_future(work(queue))

        async def handler(request: web.Request) -> web.Response:
            future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            queue.put_nowait(future)
            try:
                await future
            except failure as exc:
                raise web.HTTPServiceUnavailable from exc
            return web.Response()

        app = web.Application()
        app.router.add_get("/", handler)
        guard(app)
        with no_collector():
            before = len(alive())
            async with serve(app) as service:
                client = await service.connect()
                for number in range(30):
                    if not stays and number:
                        client.close()
                        client = await service.connect()
                    await client.get("/")
                    assert (await client.answer())[0] == 503
                await spin()
                found = [len(alive()) - before]
                client.close()
                await service.settle()
            await spin()
            found.append(len(alive()) - before)
        worker.cancel()
        await asyncio.wait([worker])
        return found

    assert min(run(main(lambda app: None))) >= 29
    open_, closed = run(main(GUARDS[install]))
    assert open_ <= connections._MOST_LATER
    assert closed == 0


def test_a_worker_that_waits_with_an_instance_keeps_few_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its traceback grows by each request that raises it, and by what the worker tries.

    The worker's report has its own part of it, and that of the last request.
    """
    # It would format all of that each time.
    monkeypatch.setattr(logging.getLogger("aiohttp.server"), "disabled", True)
    monkeypatch.setattr(tracebacks, "_MOST_OF_EACH", 50)
    instance = Down("one for all")
    texts: List[str] = []

    def connect(marker: str) -> None:
        raise instance

    async def work(goes_on: asyncio.Event) -> None:
        for _ in range(100):  # it has tried for long
            try:
                connect("an earlier one of the worker's")
            except Down:
                await asyncio.sleep(0)
        try:
            connect("the worker's")
        except Down as exc:
            await goes_on.wait()
            texts.extend(traceback.format_tb(exc.__traceback__))
            markers = [
                frame.f_locals["marker"]
                for frame, _ in traceback.walk_tb(exc.__traceback__)
                if frame.f_code is connect.__code__
            ]
            assert {"a request's", "the worker's"} <= set(markers)

    async def handler(request: web.Request) -> web.Response:
        connect("a request's")
        return web.Response()

    async def left(guard: Guard) -> int:
        goes_on = asyncio.Event()
        worker = asyncio.ensure_future(work(goes_on))
        app = web.Application()
        app.router.add_get("/", handler)
        guard(app)
        with no_collector():
            before = len(alive())
            async with serve(app) as service:
                for _ in range(150):
                    assert (await service.ask())[0] == 500
                await service.settle()
            found = len(alive()) - before
        goes_on.set()
        await worker
        return found

    assert run(left(lambda app: None)) == 150
    assert len(texts) > 600
    instance.__traceback__ = None
    texts.clear()
    assert run(left(setup)) < 75
    assert len(texts) < 300
    assert any("in work" in text for text in texts)


async def _dive(depth: int) -> None:
    if not depth:
        await asyncio.sleep(0.01)
        raise Down
    await _dive(depth - 1)


async def _dive_in_tasks(depth: int) -> None:
    if not depth:
        raise Down
    await asyncio.gather(_dive_in_tasks(depth - 1))


async def _dive_and_wait(depth: int) -> None:
    if not depth:
        raise Down
    task = asyncio.ensure_future(_dive_and_wait(depth - 1))
    await asyncio.wait([task])
    task.result()


async def _dive_and_raise_again(depth: int) -> None:
    if not depth:
        raise Down
    try:
        await _dive_and_raise_again(depth - 1)
    except Down as exc:
        raise exc


@pytest.mark.parametrize(
    "dive", [_dive, _dive_in_tasks, _dive_and_wait, _dive_and_raise_again]
)
def test_one_long_traceback_stays_whole_for_who_has_it_in_hand(dive: Any) -> None:
    """It is of one raise, whose functions do not know by their frames who called them.

    Before CPython 3.12 those of coroutines do not.
    """

    async def lines(guard: Guard) -> int:
        tasks: List[asyncio.Future[None]] = []
        found: List[str] = []
        first_is_over = asyncio.Event()

        async def wait() -> None:
            if not tasks:
                tasks.append(asyncio.ensure_future(dive(220)))
            await asyncio.shield(tasks[0])

        async def first(request: web.Request) -> web.Response:
            try:
                await wait()
            except Down as exc:
                raise web.HTTPBadGateway from exc
            return web.Response()

        async def second(request: web.Request) -> web.Response:
            try:
                await wait()
            except Down as exc:
                await first_is_over.wait()
                frames = traceback.walk_tb(exc.__traceback__)
                found.extend(frame.f_code.co_name for frame, _ in frames)
            return web.Response()

        app = web.Application()
        app.router.add_get("/1", first)
        app.router.add_get("/2", second)
        guard(app)
        async with serve(app) as service:
            waits = asyncio.ensure_future(service.ask("/2"))
            assert (await service.ask("/1"))[0] == 502
            await spin()
            first_is_over.set()
            assert (await waits)[0] == 200
        return found.count(dive.__name__)

    assert run(lines(setup)) == run(lines(lambda app: None)) > 220


@pytest.mark.parametrize("depth", [10, 200])
@pytest.mark.parametrize("guard", ["appended", "setup"])
def test_who_has_a_cause_in_hand_finds_who_has_failed_with_it(
    guard: str, depth: int
) -> None:
    """However long its traceback is: what that one raised has the same frame."""
    instance = LookupError("one for all")
    found: List[bool] = []

    def dive(deeper: int) -> None:
        if not deeper:
            raise instance
        dive(deeper - 1)

    async def main() -> None:
        has_failed, others_are_over = asyncio.Event(), asyncio.Event()

        @web.middleware
        async def report(request: web.Request, handler: Any) -> web.StreamResponse:
            try:
                return await handler(request)  # type: ignore[no-any-return]
            except LookupError:
                has_failed.set()
                await others_are_over.wait()
                found.append(
                    any(
                        frame.f_code is translate.__code__
                        and "marker" in frame.f_locals
                        for frame, _ in traceback.walk_tb(instance.__traceback__)
                    )
                )
                raise

        async def fail(request: web.Request) -> web.Response:
            dive(0)
            return web.Response()

        async def translate(request: web.Request) -> web.Response:
            marker = "local"
            try:
                dive(depth)
            except LookupError as exc:
                raise web.HTTPBadGateway(text=marker) from exc
            return web.Response()

        app = web.Application(middlewares=[report])
        app.router.add_get("/fail", fail)
        app.router.add_get("/translate", translate)
        GUARDS[guard](app)
        async with serve(app) as service:
            first = asyncio.ensure_future(service.ask("/fail"))
            await has_failed.wait()
            assert (await service.ask("/translate"))[0] == 502
            await spin()
            others_are_over.set()
            assert (await first)[0] == 500

    run(main())
    assert found == [True]


def test_who_has_an_instance_as_the_outcome_of_a_task_finds_its_own_stack(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its request waits outside of all frames of the traceback, while others raise."""
    monkeypatch.setattr(tracebacks, "_MOST_OF_EACH", 10)

    async def markers(guard: Guard) -> List[str]:
        instance = Down("one for all")
        found: List[str] = []
        is_raised, others_are_over = asyncio.Event(), asyncio.Event()

        def connect(marker: str) -> None:
            raise instance

        @web.middleware
        async def isolate(request: web.Request, handler: Any) -> web.StreamResponse:
            task = asyncio.ensure_future(handler(request))
            await asyncio.wait([task])
            is_raised.set()
            if request.path == "/waits":
                await others_are_over.wait()
                for frame, _ in traceback.walk_tb(instance.__traceback__):
                    found.append(frame.f_locals.get("marker", ""))
            return task.result()  # type: ignore[no-any-return]

        async def handler(request: web.Request) -> web.Response:
            try:
                connect(request.path)
            except Down as exc:
                if request.path == "/waits":
                    raise
                raise web.HTTPBadGateway from exc
            return web.Response()

        app = web.Application(middlewares=[isolate])
        app.router.add_get("/{name}", handler)
        guard(app)
        for _ in range(60):
            with contextlib.suppress(Down):
                connect("before")
        async with serve(app) as service:
            waits = asyncio.ensure_future(service.ask("/waits"))
            await is_raised.wait()
            for _ in range(100):
                assert (await service.ask("/another"))[0] == 502
            others_are_over.set()
            assert (await waits)[0] == 500
        return found

    assert "/waits" in run(markers(lambda app: None))
    assert "/waits" in run(markers(setup))


@pytest.mark.parametrize("following", ["/fail", "POST"])
@pytest.mark.parametrize("install", ["appended", "setup"])
def test_what_a_worker_lets_go_during_a_request_goes_with_that(
    install: str, following: str
) -> None:
    """The connection has kept it until then, and may be idle from now on."""
    hold: List[asyncio.Event] = []

    async def work(future: "asyncio.Future[Any]") -> None:
        try:
            raise ConnectionError
        except ConnectionError as exc:
            future.set_exception(exc)
            del future
            await hold[0].wait()

    async def refuse(request: web.Request) -> web.Response:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        hold[:] = [asyncio.Event()]
        workers.append(asyncio.ensure_future(work(future)))
        try:
            await future
        except ConnectionError as exc:
            raise web.HTTPServiceUnavailable from exc
        raise AssertionError

    async def let_go(request: web.Request) -> web.Response:
        await request.read()
        hold[0].set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if request.path == "/fail":
            raise web.HTTPServiceUnavailable from ValueError()
        return web.Response()

    workers: List[Any] = []

    async def main(guard: Any) -> int:
        app = web.Application()
        app.router.add_get("/", refuse)
        app.router.add_route("*", "/{tail:.+}", let_go)
        guard(app)
        with no_collector():
            before = len(alive())
            async with serve(app) as service:
                client = await service.connect()
                await client.get("/")
                assert (await client.answer())[0] == 503
                if following == "POST":
                    await client.post("/post", b"body")
                else:
                    await client.get(following)
                assert (await client.answer())[0] in (200, 503)
                await spin()
                found = len(alive()) - before
                client.close()
                await service.settle()
            workers.clear()
        return found

    assert run(main(lambda app: None)) == 2
    assert run(main(GUARDS[install])) == 1


@pytest.mark.parametrize("stays", [False, True])
@pytest.mark.parametrize("install", ["appended", "setup"])
def test_a_thread_that_goes_on_keeps_no_requests(install: str, stays: bool) -> None:
    """It runs one call after the other, as that of a database does."""

    def work(calls: "queue.Queue[Any]") -> None:
        for future in iter(calls.get, None):
            try:
                raise Down
            except Exception as exc:
                future.get_loop().call_soon_threadsafe(future.set_exception, exc)
            future = None

    async def main(guard: Any) -> List[int]:
        calls: queue.Queue[Any] = queue.Queue()
        thread = threading.Thread(target=work, args=(calls,), daemon=True)
        thread.start()

        async def handler(request: web.Request) -> web.Response:
            future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            calls.put(future)
            await future
            return web.Response()

        async def translate(request: web.Request) -> web.Response:
            try:
                return await handler(request)
            except Down as exc:
                raise web.HTTPServiceUnavailable from exc

        app = web.Application()
        app.router.add_get("/", translate if stays else handler)
        guard(app)
        with no_collector():
            before = len(alive())
            async with serve(app) as service:
                client = await service.connect()
                for number in range(10):
                    if not stays and number:
                        client.close()
                        client = await service.connect()
                    await client.get("/")
                    assert (await client.answer())[0] == (503 if stays else 500)
                await spin()
                found = [len(alive()) - before]
                client.close()
                await service.settle()
            await spin()
            found.append(len(alive()) - before)
            calls.put(None)
            thread.join()
        return found

    assert min(run(main(lambda app: None))) >= 9
    open_, closed = run(main(GUARDS[install]))
    assert open_ <= connections._MOST_LATER
    assert closed <= 2  # the thread may have been in its except block still


@pytest.mark.parametrize("failure", [Down, ConnectionError])
@pytest.mark.parametrize("install", ["appended", "outermost", "setup"])
def test_what_a_thread_has_handed_on_goes_when_more_has_come(
    install: str, failure: Type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in its ``except`` block still, as an executor's may be, for an instant."""
    monkeypatch.setattr(holders, "_SOON", 3600)

    def work(calls: "queue.Queue[Any]", goes_on: threading.Semaphore) -> None:
        for future in iter(calls.get, None):
            try:
                raise failure
            except failure as exc:
                future.get_loop().call_soon_threadsafe(future.set_exception, exc)
                future = None
                goes_on.acquire()
            calls.task_done()

    async def main(guard: Any) -> List[int]:
        calls: queue.Queue[Any] = queue.Queue()
        goes_on = threading.Semaphore(0)
        thread = threading.Thread(target=work, args=(calls, goes_on), daemon=True)
        thread.start()

        async def handler(request: web.Request) -> web.Response:
            future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            calls.put(future)
            await future
            return web.Response()

        app = web.Application()
        app.router.add_get("/", handler)
        guard(app)
        found = []
        with no_collector():
            before = len(alive())
            async with serve(app) as service:
                for _ in range(3):
                    assert (await service.ask())[0] == 500
                    await service.settle()
                    found.append(len(alive()) - before)
                    goes_on.release()
                    calls.join()
            calls.put(None)
            thread.join()
        return found

    assert run(main(lambda app: None)) == [1, 2, 3]
    assert max(run(main(GUARDS[install]))) <= 1  # that of the thread


def test_what_is_left_over_is_not_held_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With many tasks a look waits for more to look at, but no longer than that."""
    monkeypatch.setattr(holders, "_SOON", 0)

    async def main() -> None:
        tasks = [asyncio.ensure_future(asyncio.sleep(3600)) for _ in range(32)]
        holders.leave([ConnectionError()])
        await spin()
        marker = Down()
        gone = weakref.ref(marker)
        holders.leave([ConnectionError(marker)])
        del marker
        assert gone() is not None  # no weak reference can be made of that
        await spin()
        assert gone() is None
        for each in tasks:
            each.cancel()
        await asyncio.wait(tasks)

    run(main())


def test_what_is_kept_is_left_alone_by_who_looks_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is the cause of what a worker was in the traceback of."""
    monkeypatch.setattr(holders, "_SOON", 0)
    kept: List[BaseException] = []

    async def work(futures: "asyncio.Queue[Any]") -> None:
        future = await futures.get()
        try:
            raise Down
        except Down as exc:
            future.set_exception(exc)
        await futures.get()

    def fail() -> None:
        marker = "to be kept"  # noqa: F841
        raise LookupError

    async def main() -> None:
        futures: asyncio.Queue[Any] = asyncio.Queue()
        worker = asyncio.ensure_future(work(futures))

        async def handler(request: web.Request) -> web.Response:
            future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            futures.put_nowait(future)
            try:
                fail()
            except LookupError as exc:
                kept.append(exc)
            try:
                await future
            except Down as exc:
                exc.__cause__ = kept[0]
                raise
            return web.Response()

        app = web.Application()
        app.router.add_get("/", handler)
        setup(app, keep=lambda request, exc: isinstance(exc, LookupError))
        async with serve(app) as service:
            assert (await service.ask())[0] == 500
            await service.settle()
        await spin()
        worker.cancel()
        await asyncio.wait([worker])

    run(main())
    outer, frame = [each for each, _ in traceback.walk_tb(kept[0].__traceback__)]
    assert frame.f_locals == {"marker": "to be kept"}
    assert "request" in outer.f_locals  # the other one has it too


def test_what_is_kept_is_left_alone_when_the_connection_goes_on() -> None:
    """It shares a frame with what a worker had in hand, and has let go."""
    kept: List[BaseException] = []
    had: List[BaseException] = []
    workers: List[Any] = []

    async def work(future: "asyncio.Future[Any]", go: asyncio.Event) -> None:
        try:
            raise Down
        except Down as exc:
            had.append(exc)
            future.set_exception(exc)
            await go.wait()

    async def main() -> None:
        go = asyncio.Event()

        async def refuse(request: web.Request) -> web.Response:
            future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            workers.append(asyncio.ensure_future(work(future, go)))
            try:
                raise LookupError
            except LookupError as exc:
                kept.append(exc)
            try:
                await future
            except Down as exc:
                exc.__cause__ = kept[0]
                raise web.HTTPServiceUnavailable from exc
            raise AssertionError

        app = web.Application()
        app.router.add_get("/", refuse)
        setup(app, keep=lambda request, exc: isinstance(exc, LookupError))
        async with serve(app) as service:
            client = await service.connect()
            await client.get("/")
            assert (await client.answer())[0] == 503
            go.set()
            await asyncio.wait(workers)
            await client.get("/missing")
            assert (await client.answer())[0] == 404
            await spin()
            frames = [frame for frame, _ in traceback.walk_tb(had[0].__traceback__)]
            assert [frame.f_code.co_name for frame in frames] == ["refuse", "work"]
            assert "request" in frames[0].f_locals
            assert frames[1].f_locals == {}
            client.close()
            await service.settle()

    run(main())


async def fail_and_wait(found: List[BaseException], go: asyncio.Event) -> None:
    marker = "local"
    try:
        raise Down(marker)
    except Down as exc:
        found.append(exc)
        await go.wait()


def test_what_is_left_over_is_looked_at_when_more_has_come() -> None:
    """Who had it in hand is done with it by then."""
    found: List[BaseException] = []

    async def main() -> None:
        for number in range(2):
            go = asyncio.Event()
            task = asyncio.ensure_future(fail_and_wait(found, go))
            await asyncio.sleep(0)
            holders.leave(found[number:])
            await spin()
            (frame,) = (each for each, _ in traceback.walk_tb(found[0].__traceback__))
            assert ("marker" in frame.f_locals) is (number == 0)
            go.set()
            await task

    run(main())


def test_what_is_left_over_is_looked_at_again_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who had it in hand at the first look is done with it by then."""
    found: List[BaseException] = []
    timers: List[Any] = []

    def call_at(when: float, callback: Any, *, context: Any) -> None:
        timers.append(callback)

    def has_locals() -> bool:
        (frame,) = (each for each, _ in traceback.walk_tb(found[0].__traceback__))
        return "marker" in frame.f_locals

    async def main() -> None:
        monkeypatch.setattr(asyncio.get_running_loop(), "call_at", call_at)
        go = asyncio.Event()
        task = asyncio.ensure_future(fail_and_wait(found, go))
        await asyncio.sleep(0)
        holders.leave(found)
        await spin()
        go.set()
        await task
        assert has_locals()
        (look,) = timers
        look()
        assert not has_locals()

    run(main())


def fail_while_it_is_handled(number: int, then: Callable[[], Any]) -> None:
    """Leave so many exceptions over, of a function that executes, as in a thread."""
    try:
        raise ConnectionError
    except ConnectionError as exc:
        holders.leave([exc])
        if number > 1:
            fail_while_it_is_handled(number - 1, then)
        else:
            then()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="nothing tells that it executes")
def test_what_a_thread_has_in_hand_is_held_for_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One timer is for all of them, and is set again for those that came later."""
    timers: List[Tuple[float, Any]] = []
    held: List[int] = []

    def call_at(when: float, callback: Any, *, context: Any) -> None:
        timers.append((when, callback))

    async def main() -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        monkeypatch.setattr(loop, "call_at", call_at)
        monkeypatch.setattr(loop, "time", lambda: now)

        def fail_later() -> None:
            nonlocal now
            now += holders._SOON / 2
            fail_while_it_is_handled(1, look)

        def look() -> None:
            nonlocal now
            left_over = holders._left_over[loop]
            left_over.look()
            while timers:
                held.append(len(left_over.held))
                now, look_at_last = timers.pop()
                look_at_last()
            held.append(len(left_over.held))

        fail_while_it_is_handled(1, fail_later)

    run(main())
    assert held == [2, 1, 0]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="nothing tells that it executes")
def test_of_very_many_that_threads_have_in_hand_the_last_are_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(holders, "MOST_NOTED", 10)
    held: List[int] = []

    async def main() -> None:
        left_over = holders._left_over.setdefault(
            asyncio.get_running_loop(), holders._LeftOver()
        )

        def look() -> None:
            held.append(len(left_over.held))
            left_over.look()
            held.append(len(left_over.held))

        fail_while_it_is_handled(3 * holders.MOST_NOTED, look)

    run(main())
    assert held == [30, 10]


def test_of_very_many_that_are_left_over_the_first_ones_are_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who has them may never let go of them."""
    monkeypatch.setattr(holders, "MOST_NOTED", 10)

    async def main() -> int:
        last = None
        for _ in range(3 * holders.MOST_NOTED):
            failure = Down()
            failure.__context__ = last
            try:
                raise failure
            except Down as exc:
                last = exc
            holders.leave([failure])
            await asyncio.sleep(0)
        return len(holders._left_over[asyncio.get_running_loop()].exceptions)

    assert run(main()) <= 12  # as many, and for each task one


def test_few_tasks_are_looked_into_for_what_is_left_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only those that are in a traceback: there may be thousands."""
    looked: List[int] = []
    look_into = holders.look_into

    def count(tasks: Any, lists: bool = False) -> Any:
        looked.append(len(list(tasks)))
        return look_into(tasks, lists)

    monkeypatch.setattr(holders, "look_into", count)
    monkeypatch.setattr(holders, "_SOON", 0)

    async def fail(waits: asyncio.Event) -> None:
        try:
            raise ConnectionError
        except ConnectionError as exc:
            found.append(exc)
        await waits.wait()

    found: List[BaseException] = []

    async def main() -> None:
        waits = asyncio.Event()
        tasks = [asyncio.ensure_future(waits.wait()) for _ in range(50)]
        tasks.append(asyncio.ensure_future(fail(waits)))
        await asyncio.sleep(0)
        holders.leave(found)
        await spin()
        waits.set()
        await asyncio.wait(tasks)

    run(main())
    assert max(looked) == 1


def test_a_request_that_was_being_sent_when_its_exception_was_severed() -> None:
    """It is behind the frames that were emptied then: the next one looks at it."""
    kept: List[BaseException] = []

    async def main(install: Guard) -> int:
        app = web.Application()
        failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def swallow(request: web.Request) -> web.Response:
            try:
                await failed
            except LookupError as exc:
                kept.append(exc)
            return web.Response(body=bytes(8_000_000))  # more than the buffers take

        async def fail(request: web.Request) -> web.Response:
            raise kept[0]

        async def store(request: web.Request) -> web.Response:
            request["error"] = kept[0]
            return web.Response()

        for handler in (swallow, fail, store):
            app.router.add_get(f"/{handler.__name__}", handler)
        install(app)
        failed.set_exception(LookupError())
        async with serve(app) as service:
            with no_collector():
                before = len(alive())
                client = await service.connect()
                await client.get("/swallow")
                while not kept:
                    await asyncio.sleep(0)
                await spin()
                assert (await service.ask("/fail"))[0] == 500
                assert (await client.answer())[0] == 200
                client.close()
                await service.settle()
                assert (await service.ask("/store"))[0] == 200
                await service.settle()
                return len(alive()) - before

    assert run(main(lambda app: None)) >= 2
    kept.clear()
    gc.collect()
    assert run(main(setup)) == 0


@pytest.mark.parametrize("status", [200, 500, 502, 503])
def test_what_many_have_is_not_walked_by_each_of_them(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The traceback of one instance has the frames of all requests that raise it."""
    # It would format all of that each time.
    monkeypatch.setattr(logging.getLogger("aiohttp.server"), "disabled", True)

    async def calls_of_ours(requests: int) -> int:
        instance = LookupError("one for all")
        calls = waiting = 0
        goes_on = asyncio.Event()

        @web.middleware
        async def translate(request: web.Request, handler: Any) -> web.StreamResponse:
            try:
                return await handler(request)  # type: ignore[no-any-return]
            except LookupError as exc:
                if status == 500:
                    raise
                # Nothing can be cut off while they wait, and they end one by one.
                for _ in range(request["number"]):
                    await asyncio.sleep(0)
                raise web.HTTPServiceUnavailable from exc

        async def handler(request: web.Request) -> web.Response:
            nonlocal waiting
            waiting += 1
            request["number"] = waiting
            await goes_on.wait()
            try:
                raise instance
            except LookupError as exc:
                if status == 502:
                    raise web.HTTPBadGateway() from exc
                if status in (500, 503):
                    raise
                request["error"] = exc
            return web.Response()

        def count(frame: Any, event: str, argument: Any) -> None:
            nonlocal calls  # a generator that goes on is called as well
            calls += event == "call" and frame.f_code.co_filename.startswith(OURS)

        app = web.Application(middlewares=[translate])
        app.router.add_get("/", handler)
        GUARDS["setup" if status == 503 else "appended"](app)
        async with serve(app) as service:
            clients = [await service.connect() for _ in range(requests)]
            for client in clients:
                await client.get("/")
            while waiting < requests:
                await asyncio.sleep(0.001)
            goes_on.set()
            sys.setprofile(count)
            try:
                statuses = {(await client.answer())[0] for client in clients}
                await spin()
            finally:
                sys.setprofile(None)
            assert statuses == {status}
            for client in clients:
                client.close()
            await service.settle()
        return calls

    few, many = run(calls_of_ours(10)), run(calls_of_ours(80))
    assert many < 1.5 * 8 * few


def test_a_loop_that_was_closed_goes_although_it_was_to_look_again() -> None:
    """What is left over is found by the loop, and must not lead back to it."""

    async def main() -> Any:
        loop = asyncio.get_running_loop()
        # With so many tasks not all that is left over is looked at at once.
        tasks = [asyncio.ensure_future(asyncio.sleep(60)) for _ in range(40)]
        for _ in range(2):
            holders.leave([ValueError()])
            await spin()
        assert holders._left_over[loop].held
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        return weakref.ref(loop)

    loop = run(main())
    gc.collect()
    assert loop() is None


def test_threads_with_loops_of_their_own_note_the_same_exception() -> None:
    """Each has it in hand until it lets go, whatever the others do meanwhile."""
    outage = ConnectionError("one for all")
    failed: List[BaseException] = []

    def note_again_and_again() -> None:
        loop = asyncio.new_event_loop()
        task = loop.create_future()
        try:
            for _ in range(20_000):
                holder = holders.Holder(task)
                holder.note(outage)
                assert holders.somebody_has(outage)
                assert 0 not in holders.sort_out([outage]).spared
                holder._let_go()
        except BaseException as exc:
            failed.append(exc)
        finally:
            loop.close()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=note_again_and_again) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert failed == []
    assert not holders.somebody_has(outage)


def test_a_collection_does_not_wait_for_a_thread_that_notes_an_exception() -> None:
    """That one may wait, in a finalizer, for a lock of the thread that collects."""
    loop = asyncio.new_event_loop()
    error = ValueError()
    left = [holders.Holder(loop.create_future())]  # and its loop is closed
    loop.close()
    left[0].note(ValueError())
    notes, collected = threading.Event(), threading.Event()

    def note() -> None:
        with holders._changing:
            notes.set()
            collected.wait(TIMEOUT)

    def collect() -> None:
        left.clear()
        collected.set()

    threads = [threading.Thread(target=note), threading.Thread(target=collect)]
    for thread in threads:
        thread.start()
        assert notes.wait(TIMEOUT)
    assert collected.wait(TIMEOUT / 2)
    for thread in threads:
        thread.join()
    last = holders.Holder(loop.create_future())
    last.note(error)
    assert list(holders.in_hand) == [id(error)]  # what has gone is taken out by now
    del last
    assert not holders.in_hand
    taken: List[bool] = []

    def take() -> None:
        taken.append(holders._changing.acquire(timeout=TIMEOUT))
        if taken[0]:
            holders._changing.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    assert taken == [True]  # or this thread would have it still


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows")
def test_a_forked_process_does_not_wait_for_a_thread_that_it_has_not() -> None:
    """One that notes an exception at that moment is not there to be done with it."""
    notes, forked = threading.Event(), threading.Event()

    def note() -> None:
        with holders._changing:
            notes.set()
            forked.wait()

    async def handler(request: web.Request) -> web.Response:
        raise LookupError("it is not there")

    async def main() -> int:
        app = web.Application()
        app.router.add_get("/", handler)
        setup(app)
        async with serve(app) as service:
            status, _ = await service.ask()
            await service.settle()
        return status

    thread = threading.Thread(target=note)
    thread.start()
    notes.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from CPython 3.12 on: what could hang is here
        child = os.fork()
    if not child:
        status = 0
        try:
            signal.alarm(int(TIMEOUT))
            status = run(main()) // 100
        finally:
            os._exit(status)
    forked.set()
    thread.join()
    _, ended = os.waitpid(child, 0)
    assert not os.WIFSIGNALED(ended)
    assert os.WEXITSTATUS(ended) == 5
