"""What is alive long after its response is found, named, and held by nobody for it."""

import asyncio
import contextlib
import dataclasses
import gc
import logging
import math
import pickle
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Set
from weakref import WeakKeyDictionary, ref

import pytest
from aiohttp import web

from aiohttp_cyclebreak import (
    BodyReleasedError,
    BreakEvent,
    Radar,
    Stats,
    chains,
    connections,
    radar,
    setup,
    stats,
)
from aiohttp_cyclebreak.counts import Counts
from aiohttp_cyclebreak.radar import Watch, watch_of

from .service import (
    HANDSHAKE,
    LOOPS,
    TIMEOUT,
    Service,
    alive,
    no_collector,
    run,
    serve,
    spin,
    wrap_tasks,
)
from .test_hostile_exceptions import Strange


@pytest.fixture(autouse=True, scope="module")
def _no_garbage() -> None:
    gc.collect()  # not gc.freeze(), which hides what holds a request


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    HELD.clear()


def requests_of(app: web.Application) -> int:
    """How many requests of an application there are; other tests have some too."""
    return sum(each.app is app for each in alive(web.Request))


# No look but those of the test, which say what time it is.
BY_HAND = Radar(interval=1e6, max_pause=10_000, budget=60_000)


@contextlib.contextmanager
def logged() -> Iterator[List[str]]:
    """The messages of the library's logger, and not their records."""
    messages: List[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Handler()
    radar.logger.addHandler(handler)
    try:
        yield messages
    finally:
        radar.logger.removeHandler(handler)


def application(*handlers: Any, options: Radar = BY_HAND) -> web.Application:
    """An application with each handler at a route that has its name."""
    app = web.Application()
    for handler in handlers:
        app.router.add_get(f"/{handler.__name__}/{{secret}}", handler)
    setup(app, radar=options)
    return app


def watching(app: web.Application) -> Watch:
    watch = watch_of(app)
    assert watch is not None
    return watch


# When each was first looked at by hand: how long a look takes counts for nothing.
_FIRST: "WeakKeyDictionary[Watch, float]" = WeakKeyDictionary()


async def look(app: web.Application, later: float = 0.0) -> Stats:
    """Look at the requests, so many seconds after the first time."""
    watch = watching(app)
    now = _FIRST.setdefault(watch, time.monotonic()) + later
    await watch.look(now)
    return watch.stats(now)


async def closed(service: Service) -> None:
    """Wait until every connection is gone; tasks of the application may go on."""
    server = service.runner.server
    assert server is not None
    while server.connections:
        await asyncio.sleep(0.001)
    await spin()


async def answer(request: web.Request) -> web.Response:
    return web.Response(text="ok")


async def refuse(request: web.Request) -> web.Response:
    raise web.HTTPBadRequest(reason="no secret")


HELD: List[Any] = []


class Leaks:
    """Four ways to keep a request for ever."""

    def __init__(self) -> None:
        self.tasks: List[asyncio.Task[Any]] = []
        self.never = asyncio.Event()
        kept: Dict[str, Any] = {}

        async def closure(request: web.Request) -> web.Response:
            kept[str(len(kept))] = request
            return web.Response(text="ok")

        self.closure = closure
        self.clear = lambda: kept.clear()

    async def in_a_list(self, request: web.Request) -> web.Response:
        HELD.append(request)
        return web.Response(text="ok")

    async def in_a_task(self, request: web.Request) -> web.Response:
        self.tasks.append(asyncio.ensure_future(self.never_ends(request)))
        return web.Response(text="ok")

    async def never_ends(self, request: web.Request) -> None:
        await self.never.wait()

    async def in_a_cycle(self, request: web.Request) -> web.Response:
        request["itself"] = request
        return web.Response(text="ok")

    async def let_go(self) -> None:
        HELD.clear()
        self.clear()
        self.never.set()
        if self.tasks:
            await asyncio.wait(self.tasks)
        self.tasks.clear()


SECRET = "s3cret"


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "in_a_list",
            [
                "held for good",
                "module tests.test_radar: global 'HELD'",
                "list: index 0",
            ],
        ),
        ("closure", ["closure over 'kept'", "key of type str"]),
        (
            "in_a_task",
            ["not over", "never_ends", "local variable 'request'", "test_radar.py:"],
        ),
        ("in_a_cycle", ["reference cycle", "value of a key of type str"]),
    ],
)
def test_what_an_application_keeps_is_found(
    name: str, said: List[str], loop: str
) -> None:
    """By route, age, number and the chain that holds it, and without any value."""

    async def main() -> List[str]:
        leaks = Leaks()
        app = application(answer, getattr(leaks, name))
        with logged() as messages:
            async with serve(app) as service:
                for _ in range(3):
                    await service.ask("/answer/" + SECRET)
                    await service.ask(f"/{name}/{SECRET}?{SECRET}", f"X: {SECRET}")
                await closed(service)
                found = await look(app)
                assert (found.alive, found.outlived, found.overdue) == (3, 3, {})
                assert messages == []
                found = await look(app, 29.0)
                assert (found.overdue, messages) == ({}, [])
                found = await look(app, 40.0)
                assert found.overdue == {f"/{name}/{{secret}}": 3}
                assert math.isclose(
                    found.oldest[f"/{name}/{{secret}}"], 40.0, abs_tol=20.0
                )
                assert found.reports == 1
                await leaks.let_go()
        return messages

    with no_collector():
        messages = run(main(), loop)
        gc.collect()
    assert len(messages) == 1
    for each in (
        f"/{name}/{{secret}}: 3, the oldest for ",
        "more than 30 s after their response: 3, 3 of them not reported yet",
        *said,
        "aiohttp.web_request.Request",
    ):
        assert each in messages[0]
    assert SECRET not in messages[0]
    assert "/answer" not in messages[0]


@pytest.mark.parametrize("loop", LOOPS)
def test_the_radar_holds_nothing(loop: str) -> None:
    """What it has reported goes as soon as its holder lets go, uncollected."""

    async def main() -> None:
        leaks = Leaks()
        app = application(leaks.in_a_list, leaks.in_a_task, leaks.closure)
        async with serve(app) as service:
            with logged() as messages, no_collector():
                for name in ("in_a_list", "in_a_task", "closure"):
                    await service.ask(f"/{name}/x")
                await closed(service)
                await look(app)
                for number in range(1, 5):  # two are reported again and again
                    await look(app, 61.0 * number)
                assert len(messages) == 3
                assert requests_of(app) == 3
                await leaks.let_go()
                assert requests_of(app) == 0
                found = await look(app, 500.0)
                assert (found.alive, found.outlived, found.overdue) == (0, 0, {})

    run(main(), loop)


def test_a_search_that_is_ended_holds_nothing() -> None:
    """Between two of its steps it holds the request, and lets go when cancelled."""

    async def main() -> None:
        leaks = Leaks()
        app = application(leaks.in_a_list)
        async with serve(app) as service:
            with no_collector():
                await service.ask("/in_a_list/x")
                await closed(service)
                await look(app)
                watch = watching(app)
                task = asyncio.ensure_future(watch.look(time.monotonic() + 31.0))
                while not watch._reports:
                    await asyncio.sleep(0)
                HELD.clear()
                assert requests_of(app) == 1
                task.cancel()
                await asyncio.wait([task])
                assert requests_of(app) == 0

    with logged() as messages:
        run(main())
    assert messages == []


def test_a_request_that_goes_during_the_search_is_no_news() -> None:
    """Its chain is looked at again before it is told."""

    async def main() -> None:
        leaks = Leaks()
        app = application(leaks.in_a_list)
        async with serve(app) as service:
            await service.ask("/in_a_list/x")
            await closed(service)
            await look(app)
            watch = watching(app)
            task = asyncio.ensure_future(watch.look(time.monotonic() + 31.0))
            while not watch._reports:
                await asyncio.sleep(0)
            HELD.clear()
            await task

    with logged() as messages:
        run(main())
    assert len(messages) == 1
    assert messages[0].endswith("the garbage collector knows of any more.")


def test_a_request_that_is_gone_before_the_search() -> None:
    """There is nothing to look for, and that is no failure."""

    class Gone:
        pass

    reference: Any = ref(Gone())
    assert run(Watch(BY_HAND)._explain(reference)) == "gone by now."


async def _open_stream(service: Service, path: str) -> Any:
    client = await service.connect()
    await client.get(path)
    return client


def test_streams_and_websockets_that_run_are_not_reported() -> None:
    """Nor a response that is still being sent, until they end."""

    async def main() -> None:
        end = asyncio.Event()
        running = 0

        async def stream(request: web.Request) -> web.StreamResponse:
            nonlocal running
            HELD.append(request)
            response = web.StreamResponse()
            await response.prepare(request)
            running += 1
            await end.wait()
            return response

        async def websocket(request: web.Request) -> web.StreamResponse:
            nonlocal running
            HELD.append(request)
            response = web.WebSocketResponse()
            await response.prepare(request)
            running += 1
            await response.receive()
            return response

        async def large(request: web.Request) -> web.StreamResponse:
            nonlocal running
            HELD.append(request)
            running += 1
            return web.Response(body=bytes(50_000_000))

        app = application(stream, websocket, large)
        async with serve(app) as service:
            clients = [
                await _open_stream(service, "/stream/x"),
                await _open_stream(service, "/large/x"),
            ]
            upgrade = await service.connect()
            await upgrade.get("/websocket/x", *HANDSHAKE)
            while running < 3:
                await asyncio.sleep(0.001)
            await spin()
            for later in (0.0, 31.0, 3600.0):
                found = await look(app, later)
                assert (found.alive, found.outlived, found.overdue) == (3, 0, {})
            end.set()
            for client in (*clients, upgrade):
                client.reset()
            await closed(service)
            assert (await look(app, 3600.0)).outlived == 3
            found = await look(app, 3700.0)
            assert len(found.overdue) == 3  # the application holds them still

    with logged() as messages:
        run(main())
    assert len(messages) == 1


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_last_request_of_an_idle_connection_is_not_reported(wrapped: bool) -> None:
    """Aiohttp itself has that, until the next one comes."""

    async def main() -> None:
        if wrapped:
            wrap_tasks()
        leaks = Leaks()
        app = application(answer, leaks.in_a_list)
        async with serve(app) as service:
            clients = [await service.connect() for _ in range(2)]
            for client, name in zip(clients, ("answer", "in_a_list")):
                await client.get(f"/{name}/x")
                assert await client.answer() == (200, "ok")
            await spin()
            for later in (0.0, 31.0, 3600.0):
                found = await look(app, later)
                assert (found.alive, found.outlived, found.overdue) == (2, 0, {})
            for client in clients:
                await client.get("/answer/x")
                await client.answer()
            await spin()
            assert (await look(app, 3600.0)).outlived == 1
            found = await look(app, 3700.0)
            assert found.overdue == {"/in_a_list/{secret}": 1}
            for client in clients:
                client.close()

    with logged() as messages:
        run(main())
    assert len(messages) == 1


def test_a_response_that_was_raised_is_kept_by_a_connection_that_goes_on() -> None:
    """Until the next response, however long that takes: aiohttp itself has it."""

    async def main() -> None:
        end, started = asyncio.Event(), asyncio.Event()

        async def stream(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            started.set()
            await end.wait()
            return response

        app = application(refuse, stream)
        async with serve(app) as service:
            client = await service.connect()
            try:
                await client.get("/refuse/x")
                assert (await client.answer())[0] == 400
                await client.get("/stream/x")
                await asyncio.wait_for(started.wait(), TIMEOUT)
                for later in (0.0, 31.0, 3600.0):
                    found = await look(app, later)
                    assert (found.outlived, found.overdue) == (0, {})
            finally:
                end.set()
            client.close()
            await closed(service)
            assert (await look(app)).alive == 0

    with logged() as messages, no_collector():
        run(main())
    assert messages == []


def test_a_request_whose_exception_another_one_has_is_not_reported() -> None:
    """The guard severs it when the connection is done, or the other request."""

    async def main() -> None:
        error = ValueError()
        end = asyncio.Event()
        waiting = asyncio.Event()

        async def refused(request: web.Request) -> web.Response:
            strange = Strange()  # noqa: F841
            try:
                raise error
            except ValueError as exc:
                raise web.HTTPBadRequest from exc

        async def waits(request: web.Request) -> web.Response:
            try:
                raise error
            except ValueError:
                waiting.set()
                await end.wait()
            return web.Response()

        app = application(answer, refused, waits)
        async with serve(app) as service:
            other, client = await service.connect(), await service.connect()
            try:
                await other.get("/waits/x")
                await asyncio.wait_for(waiting.wait(), TIMEOUT)
                await client.get("/refused/x")
                assert (await client.answer())[0] == 400
                await client.get("/answer/x")
                assert (await client.answer())[0] == 200
                await spin()
                found = await look(app)
                assert (found.alive, found.outlived) == (3, 1)
                assert len(connections.kept_requests()) == 1
                for later in (31.0, 62.0, 3600.0):
                    found = await look(app, later)
                    assert found.overdue == {}
            finally:
                end.set()
            await other.answer()
            client.close()
            other.close()
            await closed(service)
            gc.collect()
            assert (await look(app)).alive == 0

    with logged() as messages:
        run(main())
    assert messages == []


def test_a_request_that_is_no_longer_kept_is_looked_at_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The guard has let go of it, and something else has not."""
    kept: Set[int] = set()
    monkeypatch.setattr(radar, "kept_requests", lambda: kept)

    async def main() -> List[Dict[str, int]]:
        leaks = Leaks()
        app = application(leaks.in_a_list)
        async with serve(app) as service:
            await service.ask("/in_a_list/x")
            await closed(service)
            found = [(await look(app)).overdue]
            kept.update(map(id, alive(web.Request)))
            found.append((await look(app, 31.0)).overdue)
            kept.clear()
            for later in (32.0, 63.0):
                found.append((await look(app, later)).overdue)
        return found

    with logged():
        assert run(main()) == [{}, {}, {}, {"/in_a_list/{secret}": 1}]


def test_connections_are_asked_once_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they keep, and only where something is overdue."""
    asked = 0

    def ask() -> Set[int]:
        nonlocal asked
        asked += 1
        return connections.kept_requests()

    monkeypatch.setattr(radar, "kept_requests", ask)

    async def main() -> None:
        leaks = Leaks()
        app = application(leaks.in_a_list, leaks.closure, leaks.in_a_task)
        async with serve(app) as service:
            for name in ("in_a_list", "closure", "in_a_task"):
                await service.ask(f"/{name}/x")
            await closed(service)
            for later, times in ((0.0, 0), (31.0, 1), (62.0, 1)):
                await look(app, later)
                assert asked == times
            assert len(stats(app).overdue) == 3
            await leaks.let_go()

    with logged():
        run(main())


def test_a_request_is_reported_once() -> None:
    """Until a route was explained that was not; and so many reports in a minute."""

    async def main() -> None:
        leaks = Leaks()
        app = application(leaks.in_a_list, leaks.closure)
        async with serve(app) as service:
            await service.ask("/in_a_list/x")
            await service.ask("/closure/x")
            await closed(service)
            await look(app)
            await look(app, 31.0)
            assert len(messages) == 1
            await look(app, 90.0)  # the other route waits for its minute
            assert len(messages) == 1
            await look(app, 92.0)
            assert len(messages) == 2
            for later in (200.0, 300.0):
                await look(app, later)
            assert len(messages) == 2  # there is no news
            await service.ask("/closure/y")
            await closed(service)
            await look(app)
            await look(app, 400.0)
            assert len(messages) == 3
            assert "3, 1 of them not reported yet" in messages[2]
            assert "One of /in_a_list" in messages[0]
            assert "One of /closure" in messages[1]

    with logged() as messages:
        run(main())


def reports(**options: float) -> List[str]:
    """What a radar with these options says of one request that is left."""

    async def main() -> None:
        leaks = Leaks()
        app = application(
            leaks.in_a_list, options=dataclasses.replace(BY_HAND, **options)
        )
        async with serve(app) as service:
            await service.ask("/in_a_list/x")
            await closed(service)
            await look(app)
            await look(app, 31.0)

    with logged() as messages:
        run(main())
    return messages


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_pause": 1e-6}, "and max_pause is 1e-06"),
        ({"budget": 1e-6}, "longer than 1e-06 ms, the budget"),
    ],
)
def test_a_search_that_would_take_too_long_is_not_made(
    options: Dict[str, float], said: str
) -> None:
    """The report says so, and has its numbers all the same."""
    messages = reports(**options)
    assert len(messages) == 1
    assert said in messages[0]
    assert "/in_a_list/{secret}: 1, " in messages[0]


@pytest.mark.parametrize(
    ("options", "steps", "said"),
    [
        ({"budget": 700, "max_pause": 1e6}, 3, "longer than 700 ms, the budget"),
        ({"budget": 1e6, "max_pause": 100}, 1, "about 200 ms, and max_pause is 100"),
    ],
)
def test_a_search_is_given_up_when_its_time_is_over(
    options: Dict[str, float], steps: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of all its steps together, or that of one, as long as the step before."""
    taken: List[float] = []
    clock = SimpleNamespace(
        monotonic=time.monotonic, perf_counter=lambda: 0.2 * len(taken)
    )
    monkeypatch.setattr("aiohttp_cyclebreak.radar.time", clock)

    def step(looking: Any) -> bool:
        taken.append(0.2)
        return len(taken) < 10

    monkeypatch.setattr(chains.Looking, "step", step)

    messages = reports(**options)
    assert len(taken) == steps
    assert said in messages[0]


def test_a_search_that_fails_takes_no_report_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor does the report say more of the error than its type."""

    def fail(*_: Any) -> Any:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(chains.Looking, "step", fail)

    async def main() -> None:
        leaks = Leaks()
        app = application(leaks.in_a_list)
        async with serve(app) as service:
            await service.ask("/in_a_list/x")
            await closed(service)
            await look(app)
            found = await look(app, 31.0)
            assert found.reports == 1

    with logged() as messages:
        run(main())
    assert len(messages) == 1
    assert "/in_a_list/{secret}: 1, " in messages[0]
    assert messages[0].endswith("but the chain could not be told: RuntimeError")


def test_what_a_search_comes_across_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Held by thousands, the request is reported without its chain."""
    monkeypatch.setattr(radar, "_MOST", 50)

    async def main() -> None:
        leaks = Leaks()
        app = application(leaks.in_a_list)
        async with serve(app) as service:
            await service.ask("/in_a_list/x")
            await closed(service)
            boxes = [[HELD.pop()] for _ in range(1)]
            for _ in range(3):  # a lattice without an end in sight
                boxes = [list(boxes) for _ in range(200)]
            await look(app)
            await look(app, 31.0)

    with logged() as messages:
        run(main())
    assert len(messages) == 1
    assert "One of /in_a_list/{secret} is held by something" in messages[0]


def test_what_is_remembered_is_bounded() -> None:
    """Requests that are gone are forgotten under load, without any look."""

    class Gone:
        pass

    watch = Watch(Radar())
    kept = [Gone() for _ in range(100)]
    for each in kept:
        watch.add(each)  # type: ignore[arg-type]
    most = 0
    for _ in range(50_000):
        watch.add(Gone())  # type: ignore[arg-type]
        most = max(most, len(watch._unsettled))
    assert most <= radar._MANY + 1
    assert watch.stats(0.0).alive == 100


def test_what_is_forgotten_during_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two slices there is load, and then there are fewer to look at."""

    class Gone:
        pass

    monkeypatch.setattr(radar, "_SLICE", 1)
    monkeypatch.setattr(radar, "_MANY", 0)
    watch = Watch(Radar())
    many = [Gone() for _ in range(10)]
    watch._many = 10
    for each in many:
        watch.add(each)  # type: ignore[arg-type]
    many.clear()
    del each
    looking = watch._sweep(0.0)
    next(looking)
    watch._many = 0
    watch.add(Gone())  # type: ignore[arg-type]
    assert len(watch._unsettled) == 1
    assert len(list(looking)) < 9


def test_names_are_bounded() -> None:
    """Classes made a request are counted, and neither named for ever nor kept."""

    async def main() -> Stats:
        async def fails(request: web.Request) -> web.Response:
            number = request.match_info["secret"]
            raise type(f"Error{number}", (web.HTTPBadRequest,), {})

        app = application(fails)
        async with serve(app) as service:
            client = await service.connect()
            for number in range(250):
                await client.get(f"/fails/{number}")
                assert (await client.answer())[0] == 400
            client.close()
            await closed(service)
            return stats(app)

    found = run(main())
    assert len(found.severed) == 201
    assert found.severed["/fails/{secret}", "other"] == 50
    assert sum(found.severed.values()) == 250
    gc.collect()
    assert not [
        each for each in web.HTTPBadRequest.__subclasses__() if "Error" in each.__name__
    ]


def test_ten_routes_are_in_a_report() -> None:
    """Those that most is left of; how many others there are is said."""

    async def keeps(request: web.Request) -> web.Response:
        HELD.append(request)
        return web.Response()

    async def main() -> None:
        app = web.Application()
        for number in range(12):
            app.router.add_get(f"/{number}", keeps)
        setup(app, radar=BY_HAND)
        async with serve(app) as service:
            for number in (*range(12), *range(2, 12)):
                await service.ask(f"/{number}")
            await closed(service)
            await look(app)
            await look(app, 31.0)

    with logged() as messages:
        run(main())
    _, *lines = messages[0].splitlines()
    assert [line.partition(",")[0] for line in lines[:11]] == [
        *(f"    /{number}: 2" for number in range(2, 12)),
        "    and 2 more routes",
    ]


def test_pairs_of_names_are_bounded() -> None:
    """Many routes, and many types on each, are named up to a limit."""
    counts = Counts()
    types = [type(f"Error{number}", (Exception,), {}) for number in range(10)]
    for number in range(300):
        for each in types:
            counts.count(BreakEvent("GET", f"/{number}", each, 1, 1, 1))
    assert len(counts.severed) == 1001
    assert len({route for route, _ in counts.severed}) <= 201
    assert counts.severed["other", "other"] == 2000
    assert counts.exceptions == 3000


def test_a_thread_that_has_a_request_is_named() -> None:
    """An executor's job that never ends holds what it was given."""

    async def main() -> None:
        end, started = threading.Event(), asyncio.Event()
        jobs: List[Any] = []
        loop = asyncio.get_running_loop()

        def job(request: web.Request) -> None:
            loop.call_soon_threadsafe(started.set)
            end.wait(TIMEOUT)

        async def hands_over(request: web.Request) -> web.Response:
            jobs.append(loop.run_in_executor(None, job, request))
            return web.Response(text="ok")

        app = application(hands_over)
        async with serve(app) as service:
            try:
                await service.ask("/hands_over/x")
                await asyncio.wait_for(started.wait(), TIMEOUT)
                await closed(service)
                await look(app)
                await look(app, 31.0)
            finally:
                end.set()
            await asyncio.wait(jobs)

    with logged() as messages:
        run(main())
    assert len(messages) == 1
    if (3, 11) <= sys.version_info < (3, 13):  # it cannot be seen without a trace
        assert messages[0].endswith("the garbage collector knows of any more.")
        return
    assert "job (" in messages[0] or "run (" in messages[0]
    assert "held by something that is not over" in messages[0]


@pytest.mark.parametrize("held", [False, True])
def test_what_is_severed_is_counted(held: bool) -> None:
    """Whether somebody else holds the exception or not, and where no route matched."""

    async def main() -> Stats:
        errors: List[BaseException] = []

        async def breaks(request: web.Request) -> web.Response:
            try:
                {}["missing"]
            except KeyError as exc:
                raise ValueError from exc
            return web.Response()

        app = application(answer, refuse, breaks)

        @web.middleware
        async def keep(request: web.Request, handler: Any) -> web.StreamResponse:
            try:
                return await handler(request)  # type: ignore[no-any-return]
            except BaseException as exc:
                if held:
                    errors.append(exc)
                raise

        app.middlewares.append(keep)
        async with serve(app) as service:
            for path in ("/refuse/1", "/refuse/2", "/answer/1", "/none", "/breaks/1"):
                await service.ask(path)
            await closed(service)
            return stats(app)

    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
    try:
        found = run(main())
    finally:
        logging.getLogger("aiohttp.server").setLevel(logging.NOTSET)
    assert found.severed == {
        ("/refuse/{secret}", "aiohttp.web_exceptions.HTTPBadRequest"): 2,
        ("unmatched", "aiohttp.web_exceptions.HTTPNotFound"): 1,
        ("/breaks/{secret}", "ValueError"): 1,
    }
    assert found.exceptions == 5
    assert found.frames > 0
    assert found.errors == 0


def test_what_is_swallowed_is_counted() -> None:
    """Though it is let go before its request ends."""

    async def main() -> Stats:
        locals_of_failures: List[Any] = []
        left: List[bool] = []

        class Local:
            pass

        async def breaks(request: web.Request) -> web.Response:
            local = Local()
            locals_of_failures.append(ref(local))
            raise ValueError

        @web.middleware
        async def swallow(request: web.Request, handler: Any) -> web.StreamResponse:
            with contextlib.suppress(ValueError):
                return await handler(request)  # type: ignore[no-any-return]
            await spin()
            left.extend(found() is not None for found in locals_of_failures)
            return web.Response()

        app = application(breaks)
        app.middlewares.append(swallow)
        async with serve(app) as service:
            assert (await service.ask("/breaks/1"))[0] == 200
            await closed(service)
            assert left == [False]
            return stats(app)

    found = run(main())
    assert found.severed == {("/breaks/{secret}", "ValueError"): 1}
    assert found.exceptions == 1
    assert found.frames > 0


def test_the_other_options_hold_beside_a_radar() -> None:
    """What is kept is whole, of the rest the tracebacks go, and bodies go too."""

    class Kept(web.HTTPBadRequest):
        pass

    async def main() -> None:
        errors: Dict[str, BaseException] = {}

        async def fails(request: web.Request) -> web.Response:
            HELD.append(request)
            error = Kept() if request.path == "/kept" else web.HTTPBadRequest()
            errors[request.path] = error
            raise error

        app = web.Application()
        app.router.add_post("/kept", fails)
        app.router.add_post("/cut", fails)
        setup(
            app,
            radar=BY_HAND,
            keep=lambda request, exc: isinstance(exc, Kept),
            clear_frames=False,
            release_body=True,
        )
        async with serve(app) as service:
            for path in ("/kept", "/cut"):
                client = await service.connect()
                await client.post(path, b"body")
                assert (await client.answer())[0] == 400
                client.close()
            await closed(service)
            for request in HELD:
                with pytest.raises(BodyReleasedError):
                    await request.read()
            assert errors["/kept"].__traceback__ is not None
            assert errors["/cut"].__traceback__ is None
            # Of an older aiohttp, the error of each body as well.
            severed = set(stats(app).severed)
            assert ("/cut", "aiohttp.web_exceptions.HTTPBadRequest") in severed
            assert not any(name.endswith("Kept") for _, name in severed)
            errors.clear()

    run(main())


def test_it_looks_once_an_interval() -> None:
    """However much the application does meanwhile."""

    async def main() -> None:
        app = application(answer, options=Radar(interval=1e6))
        looks: List[Stats] = []
        watching(app).on_look.append(lambda _, found: looks.append(found))
        async with serve(app) as service:
            for _ in range(3):
                await service.ask("/answer/x")
            await closed(service)
            assert len(looks) == 1

    run(main())


def test_a_look_at_many_requests_goes_on_in_slices() -> None:
    """Between which others have their turn."""

    async def main() -> None:
        async def clones(request: web.Request) -> web.Response:
            HELD.extend(request.clone() for _ in range(5000))
            return web.Response(text="ok")

        app = application(clones)
        async with serve(app) as service:
            await service.ask("/clones/x")
            await closed(service)
        for each in HELD:
            watching(app).add(each)
        for later in (0.0, 1.0):
            looking = asyncio.ensure_future(look(app, later))
            turns = 0
            while not looking.done():
                turns += 1
                await asyncio.sleep(0)
            assert (await looking).outlived == 5000
            # The second time each is only asked whether it is alive.
            assert turns >= (2 if later else 10)

    run(main())


def test_stats_do_not_change() -> None:
    """They are a snapshot, which leads to nothing that is counted on."""
    app = application(answer)
    found = stats(app)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.alive = 1  # type: ignore[misc]
    assert found == Stats()
    watching(app).counts.severed["a", "b"] = 1
    assert found.severed == {}
    later = stats(app)
    later.severed["a", "b"] = 2  # type: ignore[index]
    assert stats(app).severed == {("a", "b"): 1}


def test_stats_can_be_sent_elsewhere() -> None:
    """To another process, or as what a dataclass is made of."""
    app = application(answer)
    watching(app).counts.severed["a", "b"] = 1
    found = stats(app)
    assert pickle.loads(pickle.dumps(found)) == found
    assert dataclasses.asdict(found)["severed"] == {("a", "b"): 1}


@pytest.mark.expects_complaint
def test_errors_of_our_own_are_counted() -> None:
    """Each time, though they are logged once."""

    async def main() -> Stats:
        def told(_: Any) -> None:
            raise ValueError("from a callback")

        app = web.Application()
        app.router.add_get("/", refuse)
        setup(app, radar=BY_HAND, on_break=told)
        async with serve(app) as service:
            for _ in range(3):
                await service.ask("/")
            await closed(service)
            return stats(app)

    with logged() as messages:
        assert run(main()).errors == 3
    assert len(messages) == 1


@pytest.mark.expects_complaint
def test_a_radar_that_fails_affects_no_request() -> None:
    """It says so once, and goes on."""

    async def main() -> None:
        app = application(answer, options=Radar(interval=1e-3))
        looks = 0
        enough = asyncio.Event()

        def fail(_: Watch, found: Stats) -> None:
            nonlocal looks
            looks += 1
            if looks == 3:
                enough.set()
            raise ValueError("of a listener")

        watching(app).on_look.append(fail)
        async with serve(app) as service:
            await asyncio.wait_for(enough.wait(), TIMEOUT)
            assert await service.ask("/answer/x") == (200, "ok")

    with logged() as messages:
        run(main())
    assert len(messages) == 1
    assert messages[0].startswith("exporting what the radar has found failed")


@pytest.mark.expects_complaint
def test_a_resource_that_fails_to_tell_its_path() -> None:
    """Its requests are not watched, all others are."""

    class Resource(web.PlainResource):
        @property
        def canonical(self) -> str:
            if HELD:
                raise ValueError("of a resource")
            return "/hostile"

    async def main() -> None:
        leaks = Leaks()
        app = application(leaks.in_a_list)
        resource = Resource("/hostile")
        resource.add_route("GET", leaks.in_a_list)
        app.router.register_resource(resource)
        async with serve(app) as service:
            for path in ("/in_a_list/x", "/hostile", "/in_a_list/y"):
                assert await service.ask(path) == (200, "ok")
            await closed(service)
            assert (await look(app)).outlived == 2

    with logged() as messages:
        run(main())
    assert len(messages) == 1
    assert messages[0].startswith("looking at a request that is alive failed")


def test_it_runs_with_the_application() -> None:
    """From its start, restarts included, and one task for all that serve it."""

    async def main() -> None:
        leaks = Leaks()
        app = application(
            leaks.in_a_list,
            options=Radar(interval=1e-3, max_age=1e-3, report_every=1e-3),
        )
        looks = asyncio.Event()
        watch = watching(app)
        expected = 0

        def tell(_: Watch, found: Stats) -> None:
            if found.outlived == expected:
                looks.set()

        watch.on_look.append(tell)
        before = asyncio.all_tasks()
        for _ in range(2):
            async with serve(app) as service, serve(app):
                radars = [
                    task
                    for task in asyncio.all_tasks() - before
                    if "_look_from_time_to_time" in repr(task)
                ]
                assert len(radars) == 1
                expected += 1
                looks.clear()
                await service.ask("/in_a_list/x")
                await asyncio.wait_for(looks.wait(), TIMEOUT)
            assert radars[0].done()
        assert stats(app).outlived == 2

    with logged() as messages:
        run(main())
    assert messages


def test_one_radar_for_two_applications() -> None:
    """Each is watched by itself; a sub-application's routes are its parent's."""

    async def main() -> None:
        leaks = Leaks()
        first, second, below = (
            application(answer),
            application(answer),
            web.Application(),
        )
        below.router.add_get("/leak", leaks.in_a_list)
        first.add_subapp("/below", below)
        async with serve(first) as one, serve(second) as two:
            await one.ask("/below/leak")
            await one.ask("/below/none")
            await two.ask("/answer/x")
            await closed(one)
            await look(first)
            found = await look(first, 31.0)
            assert found.overdue == {"/below/leak": 1}
            assert [type_ for _, type_ in found.severed] == [
                "aiohttp.web_exceptions.HTTPNotFound"
            ]
            assert (await look(second)).alive == 0
        with pytest.raises(LookupError, match="is not watched"):
            stats(below)

    with logged():
        run(main())


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is watched, and whoever asks for numbers gets zeros."""
    monkeypatch.setenv("AIOHTTP_CYCLEBREAK", "off")

    async def main() -> None:
        app = application(answer)
        async with serve(app) as service:
            assert await service.ask("/answer/x") == (200, "ok")
            assert watch_of(app) is None
            assert stats(app) == Stats()

    with logged() as messages:
        run(main())
    assert messages == ["AIOHTTP_CYCLEBREAK=off: requests are not guarded"]


OPTIONS = ("max_age", "interval", "report_every", "budget", "max_pause")


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0, ValueError),
        (-1.0, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        (True, TypeError),
        ("30", TypeError),
        (None, TypeError),
    ],
)
def test_wrong_options(option: str, value: Any, error: Any) -> None:
    """They are refused where they are written, and named."""
    with pytest.raises(error, match=f"{option} must be"):
        Radar(**{option: value})


def test_wrong_use() -> None:
    """It is refused before the application starts."""
    app = web.Application()
    with pytest.raises(TypeError, match="radar must be a Radar or None"):
        setup(app, radar=30.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"must be an aiohttp\.web\.Application"):
        stats(None)  # type: ignore[arg-type]
    setup(app)
    setup(app)
    with pytest.raises(LookupError, match="is not watched"):
        stats(app)
    with pytest.raises(RuntimeError, match="was called for"):
        setup(app, radar=Radar())
    app = web.Application()
    setup(app, radar=Radar(max_age=10))
    setup(app, radar=Radar(max_age=10))
    setup(app)
    with pytest.raises(RuntimeError, match="was called for"):
        setup(app, radar=Radar(max_age=20))
    assert len(app.cleanup_ctx) == 1
