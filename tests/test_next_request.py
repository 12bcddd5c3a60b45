"""Exceptions that are left to the connection, until its next request or its end."""

import asyncio
import builtins
import contextlib
import gc
import logging
import sys
import traceback
from contextvars import ContextVar
from types import FrameType
from typing import Any, Callable, Dict, Iterator, List, Tuple
from weakref import ref

import pytest
from aiohttp import web

from aiohttp_cyclebreak import (
    Radar,
    break_cycles,
    complaints,
    connections,
    cyclebreak,
    guard_server,
    holders,
    keep_cycles,
    setup,
    stats,
)

from .service import (
    AIOHTTP,
    LOOPS,
    TIMEOUT,
    Client,
    alive,
    idle,
    no_collector,
    run,
    serve,
    spin,
    start,
    wrap_tasks,
)
from .test_hostile_exceptions import Strange

pytestmark = pytest.mark.usefixtures("few_objects")


Guard = Callable[[web.Application], Any]
GUARDS: Dict[str, Guard] = {
    "appended": lambda app: app.middlewares.append(cyclebreak()),
    # What it sees may be swallowed still: the request's task is asked in the end.
    "below": lambda app: app.middlewares.extend([idle, cyclebreak()]),
    "outermost": lambda app: app.middlewares.insert(0, cyclebreak()),
    "setup": setup,
}


async def refuse(request: web.Request) -> web.Response:
    marker = request.path
    raise web.HTTPBadRequest(text=marker)


async def answer(request: web.Request) -> web.Response:
    await request.read()
    return web.Response(text="ok")


def application(*middlewares: Any) -> web.Application:
    app = web.Application(middlewares=middlewares)
    app.router.add_get("/refuse/{number}", refuse)
    app.router.add_route("*", "/", answer)
    return app


def has_local(exc: BaseException, function: str, name: str) -> bool:
    """Whether a frame of a function in the exception's traceback has this local."""
    return any(
        name in frame.f_locals
        for frame, _ in traceback.walk_tb(exc.__traceback__)
        if frame.f_code.co_name == function
    )


def nothing_is_held() -> bool:
    """Whether no connection holds what was on its way out of a request."""
    found = [each() for each in list(connections.followed_connections.values())]
    return all(each is None or each.put_off is None for each in found)


async def ask(client: Client, path: str) -> int:
    if path == "POST":
        await client.post("/", b"body")
    else:
        await client.get(path)
    status, _ = await client.answer()
    return status


async def left_by(prepare: Guard, path: str, status: int, install: Guard) -> int:
    """How many requests are left of three, each on a connection of its own."""
    app = application()
    prepare(app)
    install(app)
    with no_collector():
        before = len(alive())
        async with serve(app) as service:
            for _ in range(3):
                assert (await service.ask(path))[0] == status
                await service.settle()
        return len(alive()) - before


def serve_under(guard: str, app: web.Application) -> Any:
    """Serve with one of the guards, or guard_server(); for any other name with none."""
    if guard in GUARDS:
        GUARDS[guard](app)
    return serve(app, guard_server) if guard == "guard_server" else serve(app)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize(
    "following",
    [[], ["/"], ["/missing"], ["POST"], ["/", "/"]],
    ids=["refused again", "success", "no route", "body", "two"],
)
def test_an_open_connection_keeps_its_last_requests_only(
    following: List[str], guard: str, loop: str
) -> None:
    """Whatever the next request is; bare, each that was refused waits."""

    async def main(install: Guard) -> List[int]:
        left = []
        app = application()
        install(app)
        async with serve(app) as service:
            client = await service.connect()
            await ask(client, "/")
            with no_collector():
                for number in range(4):
                    assert await ask(client, f"/refuse/{number}") == 400
                    for path in following:
                        await ask(client, path)
                    await spin()
                    left.append(len(alive()))
                    if following and install is GUARDS[guard]:
                        refused = f"/refuse/{number}"
                        assert refused not in [each.path for each in alive()]
            client.close()
            await service.settle()
        return left

    bare = run(main(lambda app: None), loop)
    assert bare[-1] >= bare[0] + 3
    guarded = run(main(GUARDS[guard]), loop)
    assert guarded[-1] <= guarded[0] <= 2


def test_an_open_connection_keeps_no_emptied_frames() -> None:
    """They are remembered for the requests that end together, and no longer."""

    async def fail(request: web.Request) -> web.Response:
        try:
            raise LookupError
        except LookupError as exc:
            raise web.HTTPBadRequest from exc

    async def main(install: Guard) -> int:
        app = web.Application()
        app.router.add_get("/", fail)
        install(app)
        async with serve(app) as service:
            client = await service.connect()
            with no_collector():
                for _ in range(5):
                    assert await ask(client, "/") == 400
                    await spin()
                frames = [each for each in gc.get_objects() if type(each) is FrameType]
                left = sum(each.f_code is fail.__code__ for each in frames)
                frames.clear()
            client.close()
            await service.settle()
        return left

    assert run(main(lambda app: None)) >= 5
    assert run(main(setup)) <= 1


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("hangs_up", [True, False])
@pytest.mark.parametrize("api", ["setup", "guard_server"])
def test_the_end_of_the_connection_is_the_latest(
    api: str, hangs_up: bool, loop: str
) -> None:
    """No next request comes: the client hangs up, or the server shuts down."""

    async def main(guarded: bool) -> int:
        app = application()
        if guarded and api == "setup":
            setup(app)
        runner = web.AppRunner(app)
        with no_collector():
            before = len(alive())
            await runner.setup()
            if guarded and api == "guard_server":
                guard_server(runner)
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            client = await Client.open(runner.addresses[0][1])
            assert await ask(client, "/refuse/1") == 400
            if hangs_up:
                client.close()
            while hangs_up and runner.server.connections:  # type: ignore[union-attr]
                await asyncio.sleep(0)
            await runner.cleanup()
            client.close()
            await spin()
            return len(alive()) - before

    assert run(main(False), loop) == 1
    assert run(main(True), loop) == 0


# One that is outside sees none.
@pytest.mark.parametrize("api", ["appended", "below", "setup"])
@pytest.mark.parametrize("held", [1, 2, 3])
@pytest.mark.parametrize("pauses", [True, False])
@pytest.mark.parametrize("how", ["swallowed", "raised", "returned"])
@pytest.mark.filterwarnings("ignore:returning HTTPException:DeprecationWarning")
def test_who_holds_the_exception_prints_all_of_it(
    how: str, pauses: bool, held: int, api: str
) -> None:
    """Also where the references are as many as those that aiohttp has itself."""
    kept: List[BaseException] = []

    @web.middleware
    async def keep(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            return await handler(request)  # type: ignore[no-any-return]
        except web.HTTPException as exc:
            kept.extend([exc] * held)
            if how == "swallowed":
                return web.Response(status=400)
            if how == "returned":
                return exc
            raise

    async def pause(request: web.Request, response: Any) -> None:
        # The connection waits for the request's task only after it has raised.
        await asyncio.sleep(0)

    def line_is_there() -> bool:
        return "in refuse" in "".join(traceback.format_tb(kept[0].__traceback__))

    async def main() -> None:
        app = application(keep)
        if pauses:
            app.on_response_prepare.append(pause)
        GUARDS[api](app)
        async with serve(app) as service:
            client = await service.connect()
            for path in ("/refuse/1", "/", "/"):
                await ask(client, path)
                await spin()
                assert line_is_there()
                assert nothing_is_held()
                assert not holders.pending or how != "swallowed"
            client.close()
            await service.settle()

    with no_collector():
        before = len(alive())
        run(main())
        assert line_is_there()
        assert len(alive()) == before


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("where", ["below", "sub-application"])
@pytest.mark.parametrize("following", ["/health", "/missing"])
def test_it_waits_for_no_request_that_comes_to_others_only(
    following: str, where: str, loop: str
) -> None:
    """The next request of the connection is answered outside of ours, as are all."""

    @web.middleware
    async def answers_itself(request: web.Request, handler: Any) -> web.StreamResponse:
        if request.path == "/health":
            return web.Response()
        if request.path == "/missing":
            raise web.HTTPNotFound
        return await handler(request)  # type: ignore[no-any-return]

    async def main(install: Guard) -> List[str]:
        app = application(answers_itself)
        if where == "below":
            install(app)
        else:
            inner = application()
            install(inner)
            app.add_subapp("/sub", inner)
        async with serve(app) as service:
            client = await service.connect()
            prefix = "/sub" if where == "sub-application" else ""
            assert await ask(client, f"{prefix}/refuse/1") == 400
            for _ in range(3):
                assert await ask(client, following) in (200, 404)
            await spin()
            paths = {each.path for each in alive()}
            client.close()
            await service.settle()
        return sorted(path for path in paths if "refuse" in path)

    with no_collector():
        assert run(main(lambda app: None), loop)
        gc.collect()
        install: Guard = lambda app: app.middlewares.append(cyclebreak())  # noqa: E731
        assert run(main(install), loop) == []


# One that is outside sees none of what others run, or swallow.
@pytest.mark.parametrize("api", ["appended", "setup"])
@pytest.mark.parametrize("closes", [True, False])
@pytest.mark.parametrize("wrapped", [False, True])
def test_another_request_that_runs_the_handler_finds_its_locals(
    wrapped: bool, closes: bool, api: str
) -> None:
    """It leads a batch, and goes on when that of the exception is answered."""
    batch: List[Any] = []
    found: List[bool] = []
    events: List[asyncio.Event] = []

    @web.middleware
    async def collect(request: web.Request, handler: Any) -> web.StreamResponse:
        if request.path != "/refuse/1":
            return await handler(request)  # type: ignore[no-any-return]
        answered = asyncio.get_running_loop().create_future()
        batch.append((handler, request, answered))
        await answered
        return web.Response(status=202)

    async def lead(request: web.Request) -> web.Response:
        events.append(asyncio.Event())
        while not batch:
            await asyncio.sleep(0)
        handler, member, answered = batch.pop()
        error = await outcome(handler(member))
        answered.set_result(None)
        del handler, member, answered
        await events[0].wait()
        found.append(has_local(error, "refuse", "marker"))
        return web.Response()

    async def outcome(coroutine: Any) -> BaseException:
        try:
            await coroutine
        except web.HTTPException as exc:
            return exc
        raise AssertionError

    async def main() -> int:
        if wrapped:
            wrap_tasks()
        app = application(collect)
        app.router.add_get("/lead", lead)
        GUARDS[api](app)
        with no_collector():
            before = len(alive())
            async with serve(app) as service:
                leader, member = await service.connect(), await service.connect()
                await leader.get("/lead")
                assert await ask(member, "/refuse/1") == 202
                if closes:
                    member.close()
                else:
                    assert await ask(member, "/") == 200
                await spin()
                events[0].set()
                assert (await leader.answer())[0] == 200
                member.close()
                leader.close()
                await service.settle()
            return len(alive()) - before

    assert run(main()) == 0
    assert found == [True]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_who_holds_it_while_the_next_is_answered_outside(
    method: str, loop: str
) -> None:
    """Sent at once, that may be before the end of the first is asked for."""
    kept: List[BaseException] = []

    @web.middleware
    async def keep(request: web.Request, handler: Any) -> web.StreamResponse:
        if request.path == "/health":
            return web.Response()
        try:
            return await handler(request)  # type: ignore[no-any-return]
        except web.HTTPException as exc:
            kept.append(exc)
            raise

    async def main() -> int:
        app = application(keep)
        app.router.add_post("/refuse/{number}", refuse)
        app.middlewares.append(cyclebreak())
        before = len(alive())
        async with serve(app) as service:
            client = await service.connect()
            lines = "HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
            await client.send(f"{method} /refuse/1 {lines}GET /health {lines}".encode())
            assert (await client.answer())[0] == 400
            assert (await client.answer())[0] == 200
            client.close()
            await service.settle()
        return len(alive()) - before

    with no_collector():
        assert run(main(), loop) == 0
    assert kept


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("api", ["appended", "setup"])
@pytest.mark.parametrize("raises", [True, False])
def test_what_a_task_had_in_hand_goes_with_the_connection(
    raises: bool, api: str, loop: str
) -> None:
    """Two requests were sent at once; the task of the first is done after both."""
    events: List[asyncio.Event] = []
    tasks: List[Any] = []

    async def report(exc: BaseException) -> None:
        try:
            raise exc
        except web.HTTPException:
            await events[0].wait()

    @web.middleware
    async def hand_over(request: web.Request, handler: Any) -> web.StreamResponse:
        if request.path == "/refuse/1":
            await asyncio.sleep(0)  # the connection waits for its task
        try:
            return await handler(request)  # type: ignore[no-any-return]
        except web.HTTPException as exc:
            tasks.append(asyncio.ensure_future(report(exc)))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            if raises:
                raise
            return web.Response(status=400)

    async def main() -> int:
        app = application(hand_over)
        GUARDS[api](app)
        with no_collector():
            before = len(alive())
            async with serve(app) as service:
                events.append(asyncio.Event())
                client = await service.connect()
                request = b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n"
                await client.send(request % b"/refuse/1" + request % b"/")
                assert (await client.answer())[0] == 400
                assert (await client.answer())[0] == 200
                events[0].set()
                await tasks.pop()
                client.close()
                await service.settle()
            return len(alive()) - before

    assert run(main(), loop) == 0


@pytest.mark.parametrize("api", GUARDS)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_who_looks_it_up_by_a_weak_reference_prints_all_of_it(
    method: str, api: str
) -> None:
    """Of what is the last response of an idle connection, with or without a body."""
    kept: List[Any] = []

    @web.middleware
    async def keep(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            return await handler(request)  # type: ignore[no-any-return]
        except web.HTTPException as exc:
            kept.append(ref(exc))
            raise

    async def main() -> None:
        app = application(keep)
        app.router.add_post("/refuse/{number}", refuse)
        GUARDS[api](app)
        async with serve(app) as service:
            client = await service.connect()
            if method == "POST":
                await client.post("/refuse/1", b"body")
            else:
                await client.get("/refuse/1")
            assert (await client.answer())[0] == 400
            await spin()
            lines = traceback.format_tb(kept[0]().__traceback__)
            assert "in refuse" in "".join(lines)
            client.close()
            await service.settle()

    with no_collector():
        before = len(alive())
        run(main())
        assert len(alive()) == before


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("again", ["request", "clone"])
def test_a_request_that_is_tried_again_reports_the_first_failure(
    again: str, guard: str
) -> None:
    """With its locals: the second attempt is no next request."""
    reported: List[bool] = []

    @web.middleware
    async def retry(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            return await handler(request)  # type: ignore[no-any-return]
        except web.HTTPException as exc:
            try:
                await handler(request if again == "request" else request.clone())
            except web.HTTPException:
                await asyncio.sleep(0)
            reported.append(has_local(exc, "refuse", "marker"))
            raise

    async def main() -> int:
        app = application(retry)
        GUARDS[guard](app)
        with no_collector():
            before = len(alive())
            async with serve(app) as service:
                for _ in range(3):
                    assert (await service.ask("/refuse/1"))[0] == 400
                    await service.settle()
            return len(alive()) - before

    assert run(main()) == 0
    assert reported == [True] * 3


# One that is outside does not see the failure.
@pytest.mark.parametrize("guard", ["appended", "below", "setup"])
@pytest.mark.parametrize("again", ["request", "clone"])
def test_a_request_that_succeeds_when_it_is_tried_again_reports_its_failure(
    again: str, guard: str
) -> None:
    """With its locals, though no function that it came through goes on."""
    fails: List[bool] = []
    reported: List[bool] = []

    async def attempt(request: web.Request, handler: Any) -> Any:
        try:
            return await handler(request)
        except web.HTTPException as exc:
            return exc

    @web.middleware
    async def retry(request: web.Request, handler: Any) -> web.StreamResponse:
        failed = await attempt(request, handler)
        fails.clear()
        other = request if again == "request" else request.clone()
        response: web.StreamResponse = await attempt(other, handler)
        await asyncio.sleep(0)
        reported.append(has_local(failed, "fail_once", "marker"))
        return response

    async def fail_once(request: web.Request) -> web.Response:
        marker = request.path
        if fails:
            raise web.HTTPBadRequest(text=marker)
        return web.Response()

    async def main() -> int:
        app = application(retry)
        app.router.add_get("/fail", fail_once)
        GUARDS[guard](app)
        with no_collector():
            before = len(alive())
            async with serve(app) as service:
                for _ in range(3):
                    fails.append(True)
                    assert (await service.ask("/fail"))[0] == 200
                    await service.settle()
            return len(alive()) - before

    assert run(main()) == 0
    assert reported == [True] * 3


class Lent:
    """What is given back when it is finalized, as many a connection of a pool is."""

    def __init__(self, pool: asyncio.Semaphore) -> None:
        self.pool = pool

    def fail(self) -> None:
        raise ValueError("lent")

    def __del__(self) -> None:
        self.pool.release()


class Converted(KeyError):
    __slots__ = ("strange",)

    def __init__(self, original: BaseException) -> None:
        super().__init__(original)
        self.original = original
        self.strange = Strange()


class Converting:
    """Has the failure, which it raises another one for, in its own arguments."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, exc: Any, entry: Any) -> None:
        raise Converted(exc)


@pytest.mark.parametrize("guard", ["bare", *GUARDS, "guard_server"])
@pytest.mark.parametrize(
    "failure",
    [
        *["alone", "with a cause", "with a cause that was noted", "converted"],
        *["a response", "a response with a cause"],
    ],
)
@pytest.mark.parametrize("when", ["at once", "soon", "in the except block"])
def test_what_a_failed_attempt_has_is_given_back_to_the_next(
    when: str, failure: str, guard: str
) -> None:
    """It would wait for it: nobody but us has the failure that was swallowed."""

    @web.middleware
    async def retry(request: web.Request, handler: Any) -> web.StreamResponse:
        for _ in range(2):
            try:
                return await handler(request)  # type: ignore[no-any-return]
            except (ValueError, KeyError, web.HTTPServiceUnavailable):
                if when == "in the except block":
                    await spin()
            if when == "soon":
                await spin()
        return web.Response()

    async def part(request: web.Request, lent: Lent) -> None:
        lent.fail()

    if guard != "bare":
        part = break_cycles(part)

    async def main() -> int:
        pool = asyncio.Semaphore(1)

        async def fail(request: web.Request) -> web.Response:
            await asyncio.wait_for(pool.acquire(), TIMEOUT)
            lent = Lent(pool)
            if failure == "a response":
                raise web.HTTPServiceUnavailable
            try:
                if failure == "converted":
                    with Converting():
                        lent.fail()
                if failure == "with a cause that was noted":
                    await part(request, lent)
                lent.fail()
            except ValueError as exc:
                if "with a cause" in failure and "response" not in failure:
                    raise KeyError(request.path) from exc
                if failure == "a response with a cause":
                    raise web.HTTPServiceUnavailable from exc
                raise
            return web.Response()

        app = application(retry)
        app.router.add_get("/fail", fail)
        with no_collector():
            before = len(alive())
            async with serve_under(guard, app) as service:
                assert (await service.ask("/fail"))[0] == 200
                await service.settle()
            return len(alive()) - before

    left = run(main())
    assert guard == "bare" or left == 0


@pytest.mark.parametrize("guard", ["bare", *GUARDS, "guard_server", "break_cycles"])
@pytest.mark.parametrize("failure", ["alone", "with a cause", "a response"])
@pytest.mark.parametrize("is_clone", [False, True])
def test_what_a_failed_attempt_has_is_there_for_one_that_does_not_wait(
    is_clone: bool, failure: str, guard: str
) -> None:
    """It looks once, and answers otherwise."""

    @web.middleware
    async def retry(request: web.Request, handler: Any) -> web.StreamResponse:
        if is_clone:  # one for all attempts
            request = request.clone()
        for _ in range(2):
            with contextlib.suppress(ValueError, KeyError, web.HTTPConflict):
                return await handler(request)  # type: ignore[no-any-return]
        return await handler(request)  # type: ignore[no-any-return]

    async def main() -> int:
        pool = asyncio.Semaphore(1)

        async def fail(request: web.Request) -> web.Response:
            attempts.append(request.path)
            if pool.locked():
                raise web.HTTPServiceUnavailable
            await pool.acquire()  # which does not wait
            lent = Lent(pool)
            if len(attempts) == 3:
                return web.Response()
            if failure == "a response":
                raise web.HTTPConflict
            try:
                lent.fail()
            except ValueError as exc:
                if failure == "with a cause":
                    raise KeyError(request.path) from exc
                raise
            raise AssertionError

        attempts: List[str] = []
        app = application(retry)
        app.router.add_get("/fail", break_cycles(fail) if "break" in guard else fail)
        with no_collector():
            before = len(alive())
            async with serve_under(guard, app) as service:
                for _ in range(3):
                    assert (await service.ask("/fail"))[0] == 200
                    assert len(attempts) == 3
                    attempts.clear()
                await service.settle()
            return len(alive()) - before

    left = run(main())
    assert guard == "bare" or left == 0


@pytest.mark.parametrize("guard", ["bare", "one outside", "two outside"])
def test_what_a_failed_attempt_has_is_there_after_a_success_in_its_except_block(
    guard: str,
) -> None:
    """It is in hand when that passes, and not any more one middleware further out."""

    @web.middleware
    async def retry(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            return await handler(request)  # type: ignore[no-any-return]
        except ValueError:
            return await handler(request)  # type: ignore[no-any-return]

    async def main() -> None:
        pool = asyncio.Semaphore(1)

        async def fail_once(request: web.Request) -> web.Response:
            attempts.append(request.path)
            if len(attempts) == 1:
                await pool.acquire()  # which does not wait
                Lent(pool).fail()
            assert pool.locked()
            return web.Response()

        @web.middleware
        async def look(request: web.Request, handler: Any) -> web.StreamResponse:
            response: web.StreamResponse = await handler(request)
            were_locked.append(pool.locked())
            return response

        attempts: List[str] = []
        outside = {"bare": 0, "one outside": 1, "two outside": 2}[guard]
        app = application(look, *(cyclebreak() for _ in range(outside)), retry)
        if outside:
            app.middlewares.append(cyclebreak())
        app.router.add_get("/fail", fail_once)
        with no_collector():
            async with serve(app) as service:
                for _ in range(3):
                    assert (await service.ask("/fail"))[0] == 200
                    attempts.clear()

    were_locked: List[bool] = []
    run(main())
    assert were_locked == [False] * 3


@pytest.mark.parametrize("guard", ["bare", *GUARDS, "radar"])
def test_what_several_requests_have_swallowed_goes_while_they_go_on(
    guard: str,
) -> None:
    """Each would leave it to the other, and may wait for what it has."""
    waiting: List[asyncio.Future[Any]] = []

    async def main() -> None:
        pool = asyncio.Semaphore(0)

        async def fail(request: web.Request) -> web.Response:
            own = asyncio.get_running_loop().create_future()
            waiting.append(own)
            if len(waiting) == 2:
                try:
                    Lent(pool).fail()
                except ValueError as exc:
                    waiting.pop().set_exception(exc)
                    waiting.pop().set_exception(exc)
            try:
                await own
            finally:
                del own
            return web.Response()

        @web.middleware
        async def swallow(request: web.Request, handler: Any) -> web.StreamResponse:
            with contextlib.suppress(ValueError):
                return await handler(request)  # type: ignore[no-any-return]
            await asyncio.wait_for(pool.acquire(), TIMEOUT)
            pool.release()
            return web.Response()

        app = application(swallow)
        app.router.add_get("/fail", fail)
        if guard == "radar":
            setup(app, radar=Radar())
        elif guard != "bare":
            GUARDS[guard](app)
        with no_collector():
            async with serve(app) as service:
                asked = [service.ask("/fail") for _ in range(2)]
                answers = await asyncio.gather(*asked)
                await service.settle()
                assert guard != "radar" or stats(app).exceptions == 1
        assert [status for status, _ in answers] == [200, 200]

    run(main())


def failure() -> Exception:
    try:
        raise LookupError
    except LookupError as exc:
        return exc


@pytest.mark.parametrize("guard", ["bare", *GUARDS])
@pytest.mark.parametrize(
    "local", ["exception", "cause", "cause returned", "arguments", "group", "frame"]
)
def test_what_is_swallowed_and_in_a_cycle_goes_with_its_request(
    local: str, guard: str
) -> None:
    """It is not let go before: nothing would find the cycle any more."""
    if local == "group" and sys.version_info < (3, 11):
        pytest.skip("there are none")

    async def fail(request: web.Request) -> web.Response:
        here: Any = sys._getframe()
        if local == "cause returned":
            here = failure()  # whose frame leads to this one, which called it
            raise ValueError from here
        if local in ("arguments", "group"):
            try:
                raise ValueError
            except ValueError as exc:
                if local == "arguments":
                    here = (exc,)
                    raise ValueError(*here) from exc
                here = [exc]
            raise builtins.ExceptionGroup("", here)  # type: ignore[attr-defined]
        if local == "exception":
            here = ValueError()
            raise here
        if local == "cause":
            try:
                raise LookupError
            except LookupError as exc:
                here = exc
                raise ValueError from exc
        raise ValueError

    @web.middleware
    async def swallow(request: web.Request, handler: Any) -> web.StreamResponse:
        with contextlib.suppress(Exception):
            return await handler(request)  # type: ignore[no-any-return]
        await spin()
        return web.Response()

    async def main() -> int:
        app = application(swallow)
        app.router.add_get("/fail", fail)
        with no_collector():
            before = len(alive())
            async with serve_under(guard, app) as service:
                for _ in range(3):
                    assert (await service.ask("/fail"))[0] == 200
                await service.settle()
            return len(alive()) - before

    # What a middleware swallows is not seen outside of it.
    assert run(main()) == (3 if guard in ("bare", "outermost") else 0)


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("guard", ["bare", "setup"])
def test_what_stays_in_a_cycle_is_not_looked_at_for_each_attempt(
    guard: str, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each leaves one, as a cause, and to look at ten may take longer than to try."""
    attempts = 50
    watched: List[Any] = []
    left: List[int] = []
    looks = 0

    class Failure(Exception):  # a built-in one allows no weak reference
        pass

    async def fail(request: web.Request) -> web.Response:
        error = None
        try:
            raise Failure
        except Failure as exc:
            error = exc
            watched.append(ref(error))
        raise Failure from error

    @web.middleware
    async def retry(request: web.Request, handler: Any) -> web.StreamResponse:
        for _ in range(attempts):
            with contextlib.suppress(Failure):
                return await handler(request)  # type: ignore[no-any-return]
            if waits:
                await spin()
        left.append(sum(found() is not None for found in watched))
        return web.Response()

    look = holders.would_be_gone

    def count(*args: Any) -> Any:
        nonlocal looks
        looks += 1
        return look(*args)

    async def main() -> None:
        app = application(retry)
        app.router.add_get("/fail", fail)
        if guard != "bare":
            GUARDS[guard](app)
        async with serve(app) as service:
            assert (await service.ask("/fail"))[0] == 200
            await service.settle()

    monkeypatch.setattr(holders, "would_be_gone", count)
    with no_collector():
        run(main())
    assert left == [attempts]
    # While it is raised somebody has it still.
    assert looks <= 3 * attempts


_served: "ContextVar[str]" = ContextVar("served", default="nothing")


@pytest.mark.parametrize("guard", ["bare", *GUARDS])
@pytest.mark.parametrize("end", ["at once", "late", "swallowed late"])
def test_what_a_handler_leaves_open_is_closed_in_its_context(
    end: str, guard: str
) -> None:
    """A generator may ask for the variables of the request in its finally clause."""
    found: List[str] = []

    def rows() -> Any:
        try:
            yield
        finally:
            found.append(_served.get())

    async def stream() -> Any:
        try:
            yield
        finally:
            found.append(_served.get())

    async def fail(request: web.Request) -> web.Response:
        _served.set(request.path)
        opened, streaming = rows(), stream()
        next(opened)
        await streaming.__anext__()
        raise ValueError

    @web.middleware
    async def report(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            return await handler(request)  # type: ignore[no-any-return]
        except ValueError:
            if end != "at once":
                await spin()
            if end != "swallowed late":
                raise
        while len(found) < 2:  # until it is looked at again
            await asyncio.sleep(0.01)
        return web.Response(status=500)

    async def main() -> None:
        app = application(report)
        app.router.add_get("/fail", fail)
        with no_collector():
            async with serve_under(guard, app) as service:
                assert (await service.ask("/fail"))[0] == 500
                await service.settle()

    run(main())
    assert found == ["/fail"] * 2


def open_rows(closed: Callable[[str], None]) -> Iterator[None]:
    """Sets a variable, and tells when it is closed what that is afterwards."""
    token = _served.set("rows")
    try:
        yield
    finally:
        try:
            _served.reset(token)
        except ValueError:  # which only unraisablehook would be told of
            closed("in another context")
        else:
            closed(_served.get())


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("guard", ["bare", *GUARDS, "guard_server", "break_cycles"])
@pytest.mark.parametrize("failure", ["alone", "with a cause", "a response"])
@pytest.mark.parametrize("end", ["raised", "swallowed", "tried again"])
def test_what_a_handler_leaves_open_resets_the_variables_of_its_request(
    end: str, failure: str, guard: str, loop: str
) -> None:
    """It cannot in a copy of that context: a span would not end, for one."""
    if (end, failure) == ("raised", "a response"):
        pytest.skip("bare that is left to the collector, in the context of anybody")
    found: List[str] = []

    async def fail(request: web.Request) -> web.Response:
        _served.set(request.path)
        opened = open_rows(found.append)  # or a loop would close it
        for _ in opened:
            if failure == "a response":
                raise web.HTTPConflict
            try:
                raise ValueError
            except ValueError as exc:
                if failure == "with a cause":
                    raise KeyError(request.path) from exc
                raise
        raise AssertionError

    @web.middleware
    async def swallow(request: web.Request, handler: Any) -> web.StreamResponse:
        for attempt in (1, 2):
            try:
                return await handler(request)  # type: ignore[no-any-return]
            except (ValueError, KeyError, web.HTTPConflict):
                if end == "raised":
                    raise
            if attempt == 2 or end == "swallowed":
                break
        return web.Response(status=500)

    async def main() -> None:
        app = application(swallow)
        app.router.add_get("/fail", break_cycles(fail) if "break" in guard else fail)
        with no_collector():
            async with serve_under(guard, app) as service:
                for _ in range(2):
                    assert (await service.ask("/fail"))[0] == 500
                await service.settle()

    run(main(), loop)
    assert found == ["/fail"] * (4 if end == "tried again" else 2)


@pytest.mark.parametrize("guard", GUARDS)
def test_a_response_that_a_task_has_in_hand_later_goes_with_that(guard: str) -> None:
    """The connection has gone on in between, and keeps it until then."""
    tasks: List[Any] = []

    async def hold(response: Any, go: asyncio.Event) -> None:
        try:
            raise response
        except web.HTTPException:
            await go.wait()

    async def main(install: Guard) -> List[str]:
        go = asyncio.Event()

        async def share(request: web.Request, response: Any) -> None:
            if not tasks:
                tasks.append(asyncio.ensure_future(hold(response, go)))
                await asyncio.sleep(0)

        app = application()
        app.on_response_prepare.append(share)
        install(app)
        with no_collector():
            async with serve(app) as service:
                client = await service.connect()
                for number in range(4):
                    assert await ask(client, f"/refuse/{number}") == 400
                    await spin()
                    if number == 1:
                        go.set()
                        await tasks[0]
                        tasks[0] = None
                left = [each.path for each in alive()]
                client.close()
                await service.settle()
            tasks.clear()
        return left

    assert "/refuse/0" in run(main(lambda app: None))
    gc.collect()
    assert "/refuse/0" not in run(main(GUARDS[guard]))


def test_an_exception_that_is_shared_only_later_is_left_whole() -> None:
    """One request has it in hand; others raise the same and are done before."""
    cached: List[BaseException] = []
    done: List[asyncio.Event] = []
    reported: List[bool] = []

    async def share(request: web.Request, response: Any) -> None:
        if not cached:
            cached.append(response)
            await done[0].wait()
            reported.append(has_local(response, "refuse", "marker"))

    async def raise_cached(request: web.Request) -> web.Response:
        raise web.HTTPBadGateway from cached[0]

    async def main() -> int:
        app = application()
        app.router.add_get("/cached", raise_cached)
        app.on_response_prepare.append(share)
        setup(app)
        with no_collector():
            before = len(alive())
            async with serve(app) as service:
                done.append(asyncio.Event())
                first = await service.connect()
                await first.get("/refuse/1")
                while not cached:
                    await asyncio.sleep(0)
                # No frame that goes on tells that it is in flight.
                cached[0] = cached[0].with_traceback(
                    cached[0].__traceback__.tb_next.tb_next.tb_next  # type: ignore[union-attr]
                )
                second = await service.connect()
                for _ in range(3):
                    assert await ask(second, "/cached") == 502
                done[0].set()
                assert (await first.answer())[0] == 400
                first.close()
                second.close()
                await service.settle()
            return len(alive()) - before

    assert run(main()) == 0
    assert reported == [True]


@pytest.mark.parametrize("api", GUARDS)
def test_a_cause_that_somebody_keeps_lets_the_request_go(api: str) -> None:
    """It came through frames of another task, which the response's own do not show."""
    kept: List[Any] = []

    async def look_up(request: web.Request) -> None:
        raise LookupError("not there")

    async def fail(request: web.Request) -> web.Response:
        task = asyncio.ensure_future(look_up(request))
        await asyncio.wait([task])
        cause = task.exception()
        del task
        kept.append(cause)
        try:
            raise web.HTTPBadGateway from cause
        finally:
            del cause

    def prepare(app: web.Application) -> None:
        app.router.add_get("/fail", fail)

    assert run(left_by(prepare, "/fail", 502, lambda app: None)) == 3
    kept.clear()
    assert run(left_by(prepare, "/fail", 502, GUARDS[api])) == 0


def test_who_has_an_exception_by_two_roots_takes_it_from_no_other() -> None:
    """Both ends of setup() see it; the request that goes on reports it whole."""
    outage = LookupError("for all")
    waiting: List[asyncio.Event] = []
    reported: List[bool] = []

    @web.middleware
    async def translate(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            return await handler(request)  # type: ignore[no-any-return]
        except web.HTTPBadGateway as exc:
            if request.path == "/second":
                raise web.HTTPServiceUnavailable from exc
            waiting.append(asyncio.Event())
            await waiting[0].wait()
            reported.append(has_local(exc, "fail", "marker"))
            raise

    async def fail(request: web.Request) -> web.Response:
        marker = request.path
        try:
            raise outage
        except LookupError as exc:
            raise web.HTTPBadGateway(text=marker) from exc

    async def main() -> None:
        app = application(translate)
        app.router.add_get("/{name}", fail)
        setup(app)
        async with serve(app) as service:
            first = await service.connect()
            await first.get("/first")
            while not waiting:
                await asyncio.sleep(0)
            second = await service.connect()
            assert await ask(second, "/second") == 503
            await spin()
            waiting[0].set()
            assert (await first.answer())[0] == 502
            first.close()
            second.close()
            await service.settle()

    run(main())
    assert reported == [True]


@pytest.mark.parametrize("api", GUARDS)
def test_who_dispatches_clones_reports_each_of_them_whole(api: str) -> None:
    """A clone is no next request, and what it raises is no response yet."""
    reported: List[bool] = []

    async def fail(exc: List[BaseException], request: web.Request) -> None:
        try:
            await request.app._handle(request)
        except web.HTTPException as failed:
            exc.append(failed.with_traceback(failed.__traceback__.tb_next))  # type: ignore[union-attr]

    async def batch(request: web.Request) -> web.Response:
        failed: List[BaseException] = []
        for number in range(3):
            await fail(failed, request.clone(rel_url=f"/refuse/{number}"))
            await asyncio.sleep(0)
        reported.extend(has_local(exc, "refuse", "marker") for exc in failed)
        return web.Response(text="ok")

    async def main() -> int:
        app = application()
        app.router.add_get("/batch", batch)
        GUARDS[api](app)
        with no_collector():
            before = len(alive())
            async with serve(app) as service:
                client = await service.connect()
                assert await ask(client, "/refuse/1") == 400
                assert await ask(client, "/batch") == 200
                client.close()
                await service.settle()
            return len(alive()) - before

    assert run(main()) == 0
    assert reported == [True] * 3


@pytest.mark.parametrize("api", GUARDS)
def test_a_clone_of_an_earlier_request_ends_no_other(api: str) -> None:
    """It comes in a background task while the connection's next one is answered."""
    answering: List[asyncio.Event] = []
    tasks: List[Any] = []
    left: List[int] = []

    async def wait(request: web.Request, response: web.StreamResponse) -> None:
        if answering:
            answering[0].set()
            await answering[1].wait()

    async def dispatch(request: web.Request) -> None:
        await answering[0].wait()
        with contextlib.suppress(web.HTTPException):
            await request.app._handle(request.clone(rel_url="/refuse/1"))
        answering[1].set()

    async def start(request: web.Request) -> web.Response:
        answering[:] = [asyncio.Event(), asyncio.Event()]
        tasks.append(asyncio.ensure_future(dispatch(request)))
        raise web.HTTPBadRequest

    async def main(install: Guard) -> List[int]:
        left.clear()
        app = application()
        app.router.add_get("/start", start)
        app.on_response_prepare.append(wait)
        install(app)
        async with serve(app) as service:
            client = await service.connect()
            with no_collector():
                for _ in range(4):
                    assert await ask(client, "/start") == 400
                    answering.clear()
                    tasks.clear()
                    await spin()
                    left.append(len(alive()))
            client.close()
            await service.settle()
        return left

    bare = list(run(main(lambda app: None)))
    assert bare[-1] == bare[0] + 3
    guarded = run(main(GUARDS[api]))
    assert guarded[-1] == guarded[0]


class Facade:
    """What a middleware hands on in place of a request: what is public of it."""

    def __init__(self, request: web.Request) -> None:
        self.__dict__["of"] = request

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.of, name)


def test_a_wrapped_request_is_answered_whatever_others_do() -> None:
    """It has no private attributes; another connection's failure is pending."""

    @web.middleware
    async def wrap(request: web.Request, handler: Any) -> web.StreamResponse:
        return await handler(Facade(request))  # type: ignore[no-any-return]

    async def main() -> None:
        fails = application()
        setup(fails)
        async with serve(fails) as one, serve(application(wrap, cyclebreak())) as other:
            client = await one.connect()
            assert await ask(client, "/refuse/1") == 400
            assert holders.pending
            assert await other.ask("/") == (200, "ok")
            client.close()
            await one.settle()
            await other.settle()

    run(main())


class Odd(web.HTTPBadRequest):
    """Makes something of its own of what every exception has."""

    @property
    def __cause__(self) -> Any:  # type: ignore[override]
        raise asyncio.CancelledError

    __context__ = __traceback__ = __cause__  # type: ignore[assignment]


@pytest.mark.parametrize("api", GUARDS)
def test_an_exception_with_odd_attributes_is_answered(api: str) -> None:
    """They are not asked for, so that nothing comes out of them."""

    async def fail(request: web.Request) -> web.Response:
        raise Odd

    def prepare(app: web.Application) -> None:
        app.router.add_get("/fail", fail)

    try:
        bare = run(
            left_by(prepare, "/fail", 400, lambda app: app.middlewares.append(idle))
        )
    except ConnectionError:
        # Of old ones, contextlib does, from aiohttp's _fix_request_current_app().
        pytest.skip("with any middleware at all this aiohttp asks for them itself")
    assert bare == 3
    assert run(left_by(prepare, "/fail", 400, GUARDS[api])) == 0


async def keep_traceback(request: web.Request, response: Any) -> None:
    request["kept"] = response.__traceback__


async def keep_frames(request: web.Request, response: Any) -> None:
    request["kept"] = [frame for frame, _ in traceback.walk_tb(response.__traceback__)]


async def keep_another(request: web.Request, response: Any) -> None:
    try:
        raise LookupError("while the response is prepared")
    except LookupError as exc:
        request["kept"] = exc


class Span:
    """What a tool that follows requests makes for each."""

    entry: Any = None


SPAN: "ContextVar[Span]" = ContextVar("span")


@web.middleware
async def make_span(request: web.Request, handler: Any) -> web.StreamResponse:
    span = Span()
    SPAN.set(span)
    return await handler(request)  # type: ignore[no-any-return]


async def keep_in_span(request: web.Request, response: Any) -> None:
    """Close a cycle that leads through no exception."""
    SPAN.get().entry = response.__traceback__


@pytest.mark.parametrize("api", GUARDS)
@pytest.mark.parametrize(
    "keep", [keep_traceback, keep_frames, keep_another, keep_in_span]
)
def test_what_is_kept_of_it_later_keeps_nothing(keep: Any, api: str) -> None:
    """Nothing but the response leads to it when the middlewares are done with it."""

    def prepare(app: web.Application) -> None:
        app.middlewares.append(make_span)
        app.on_response_prepare.append(keep)

    assert run(left_by(prepare, "/refuse/1", 400, lambda app: None)) == 3
    assert run(left_by(prepare, "/refuse/1", 400, GUARDS[api])) == 0


@pytest.mark.parametrize("api", GUARDS)
def test_a_frame_outside_of_all_middlewares_keeps_nothing(
    api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tools put theirs around the application's own, as Sentry does."""
    handle: Any = web.Application._handle

    async def outside(self: Any, request: web.Request) -> web.StreamResponse:
        try:
            return await handle(self, request)  # type: ignore[no-any-return]
        except web.HTTPException as exc:
            entry = exc.__traceback__
            assert entry is not None
            raise

    def prepare(app: web.Application) -> None:
        monkeypatch.setattr(web.Application, "_handle", outside)

    assert run(left_by(prepare, "/refuse/1", 400, lambda app: None)) == 3
    assert run(left_by(prepare, "/refuse/1", 400, GUARDS[api])) == 0


@pytest.mark.parametrize("is_idle", [False, True])
@pytest.mark.parametrize("api", GUARDS)
def test_what_is_put_off_is_nobody_elses_for_long(api: str, is_idle: bool) -> None:
    """Only while it is the answer of its own request, and not of the next one."""

    async def main(install: Guard) -> List[List[str]]:
        begun = asyncio.Event()
        go_on = asyncio.Event()
        last: List[BaseException] = []

        async def remember(request: web.Request, response: Any) -> None:
            if request.path == "/refuse/1":
                last.append(response)

        async def again(request: web.Request) -> web.Response:
            try:
                raise last[0]
            except web.HTTPException as exc:
                raise web.HTTPGone from exc

        async def slow(request: web.Request) -> web.Response:
            begun.set()
            await go_on.wait()
            return web.Response()

        app = application()
        app.on_response_prepare.append(remember)
        app.router.add_get("/again", again)
        app.router.add_get("/slow", slow)
        install(app)
        async with serve(app) as service:
            busy = await service.connect()
            assert await ask(busy, "/refuse/1") == 400
            if not is_idle:
                await busy.get("/slow")
                await asyncio.wait_for(begun.wait(), TIMEOUT)
            server: Any = service.runner.server
            found = []
            for _ in range(2):
                other = await service.connect()
                assert await ask(other, "/again") == 410
                other.close()
                while len(server.connections) > 1:
                    await asyncio.sleep(0)
                await spin()
                found.append(sorted(each.path for each in alive()))
            if not is_idle:
                go_on.set()
                assert (await busy.answer())[0] == 200
            busy.close()
            await service.settle()
            found.append(sorted(each.path for each in alive()))
        last.clear()
        return found

    # Below another middleware the request's end has seen that somebody else has it.
    waits = ["/refuse/1"] if is_idle or api != "below" else []
    if not is_idle:
        waits.append("/slow")
    with no_collector():
        assert run(main(GUARDS[api])) == [waits] * 2 + [[]]
        assert run(main(lambda app: None))[-1].count("/again") == 2


@pytest.mark.parametrize("api", GUARDS)
def test_what_a_task_raises_again_when_its_connection_ends(api: str) -> None:
    """It is left until the task is done with it, and the connection is forgotten."""

    async def main(install: Guard) -> int:
        go_on = asyncio.Event()
        tasks: List[asyncio.Future[None]] = []

        async def raise_again(exc: web.HTTPException) -> None:
            try:
                raise exc
            except web.HTTPException:
                await go_on.wait()
                assert has_local(exc, "refuse", "marker")

        async def prepare(request: web.Request, response: Any) -> None:
            tasks.append(asyncio.ensure_future(raise_again(response)))

        app = application()
        app.on_response_prepare.append(prepare)
        install(app)
        with no_collector():
            before = len(alive())
            async with serve(app) as service:
                server: Any = service.runner.server
                for number in range(3):
                    client = await service.connect()
                    assert await ask(client, f"/refuse/{number}") == 400
                    client.close()
                    while server.connections:
                        await asyncio.sleep(0)
                    await spin()
                assert not connections.keeping_connections
                go_on.set()
                await asyncio.gather(*tasks)
                tasks.clear()
                for left_over in list(holders._left_over.values()):
                    left_over.look()  # as its timer does
            return len(alive()) - before

    assert run(main(lambda app: None)) == 3
    assert run(main(GUARDS[api])) == 0


@pytest.mark.parametrize("api", GUARDS)
def test_an_answer_that_fails_keeps_nothing(api: str) -> None:
    """The request has succeeded; what fails comes after all middlewares."""

    async def main(install: Guard) -> int:
        failed = asyncio.Event()

        async def fail(request: web.Request, response: web.StreamResponse) -> None:
            failed.set()
            raise LookupError("while the response is prepared")

        app = application()
        app.on_response_prepare.append(fail)
        install(app)
        with no_collector():
            before = len(alive())
            async with serve(app) as service:
                for _ in range(3):
                    client = await service.connect()
                    await client.get("/")
                    await asyncio.wait_for(failed.wait(), TIMEOUT)
                    failed.clear()
                    await spin()
                    client.close()
                    await service.settle()
            return len(alive()) - before

    assert run(main(lambda app: None)) == 3
    assert run(main(GUARDS[api])) == 0


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("api", ["appended", "setup", "guard_server"])
def test_a_handler_that_outlives_its_request_is_not_held(api: str, loop: str) -> None:
    """A middleware gave up on it; nobody outside sees what it raises in the end."""
    started: List[asyncio.Event] = []
    tasks: List[Any] = []

    @web.middleware
    async def gives_up(request: web.Request, handler: Any) -> web.StreamResponse:
        if request.path != "/late":
            return await handler(request)  # type: ignore[no-any-return]
        task = asyncio.ensure_future(handler(request))
        tasks.append(task)
        try:
            return await asyncio.wait_for(asyncio.shield(task), 0)
        except asyncio.TimeoutError:
            return web.Response(status=503)

    async def late(request: web.Request) -> web.Response:
        await started[0].wait()
        raise web.HTTPBadRequest

    async def main() -> int:
        app = application(gives_up)
        app.router.add_get("/late", late)
        if api in GUARDS:
            GUARDS[api](app)
        runner = web.AppRunner(app)
        with no_collector():
            await runner.setup()
            if api == "guard_server":
                guard_server(runner)
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            before = len(alive())
            started.append(asyncio.Event())
            client = await Client.open(runner.addresses[0][1])
            assert await ask(client, "/late") == 503
            started[0].set()
            await asyncio.wait(tasks)
            assert isinstance(tasks.pop().exception(), web.HTTPBadRequest)
            await spin()
            assert not holders.pending
            assert nothing_is_held()
            assert await ask(client, "/missing") == 404
            await spin()
            left = len(alive()) - before
            client.close()
            await runner.cleanup()
            return left

    assert run(main(), loop) <= 1


@web.middleware
async def keeps_another(request: web.Request, handler: Any) -> web.StreamResponse:
    """Keep a cycle of its own, in a frame that the first exception came through."""
    try:
        return await handler(request)  # type: ignore[no-any-return]
    except web.HTTPException:
        pass
    try:
        raise LookupError("audit")
    except LookupError as exc:
        kept = exc
    return web.Response(text=str(kept), status=500)


@web.middleware
async def stores_another(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        return await handler(request)  # type: ignore[no-any-return]
    except web.HTTPException:
        pass
    try:
        raise LookupError("audit")
    except LookupError as exc:
        request["audit"] = exc
    return web.Response(status=500)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("api", ["appended", "setup"])
@pytest.mark.parametrize("swallows", [keeps_another, stores_another])
def test_what_is_swallowed_is_followed_to_the_end(
    swallows: Any, api: str, loop: str
) -> None:
    """It is no response, and so the connection has nothing of it."""

    async def main(install: Guard) -> int:
        app = application(swallows)
        install(app)
        with no_collector():
            before = len(alive())
            async with serve(app) as service:
                for _ in range(5):
                    client = await service.connect()
                    assert await ask(client, "/refuse/1") == 500
                    await spin()
                    assert nothing_is_held()
                    assert not holders.pending
                    client.close()
                    await service.settle()
            return len(alive()) - before

    assert run(main(lambda app: None), loop) == 5
    assert run(main(GUARDS[api]), loop) == 0


@pytest.mark.parametrize("api", GUARDS)
def test_a_next_request_that_is_left_alone_keeps_no_earlier_one(api: str) -> None:
    """What was put off is that one's, and not to be kept."""

    async def main(install: Guard) -> int:
        app = application()
        app.router.add_get("/kept", keep_cycles(answer))
        install(app)
        with no_collector():
            before = len(alive())
            async with serve(app) as service:
                client = await service.connect()
                assert await ask(client, "/refuse/1") == 400
                assert await ask(client, "/kept") == 200
                await spin()
                left = len(alive()) - before
                client.close()
                await service.settle()
        return left

    assert run(main(lambda app: None)) == 2
    assert run(main(GUARDS[api])) == 1


@pytest.mark.parametrize("loop", LOOPS)
def test_a_connection_counts_the_requests_that_are_followed(loop: str) -> None:
    """Of what was swallowed too, by a middleware that is outside."""

    @web.middleware
    async def swallow_first(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            return await handler(request)  # type: ignore[no-any-return]
        except web.HTTPException as exc:
            if request.path == "/refuse/1":
                return web.Response(status=exc.status)
            raise

    async def main() -> List[int]:
        app = application(swallow_first)
        GUARDS["appended"](app)
        found = []
        async with serve(app) as service:
            client = await service.connect()
            for path in ("/refuse/1", "/refuse/2") * 2:
                assert await ask(client, path) == 400
                await spin()
                (connection,) = connections.followed_connections.values()
                found.append(connection().following)  # type: ignore[union-attr]
            client.close()
            await service.settle()
        return found

    assert run(main(), loop) == [0] * 4


async def fail_with_cycle(request: web.Request) -> None:
    """Raise, in a task, an exception that a local of its own frame has as well."""
    try:
        raise LookupError(request.path)
    except LookupError as exc:
        kept = exc
    raise kept


async def failure_of_task(request: web.Request) -> BaseException:
    """An exception that no middleware sees, and that has no context."""
    task = asyncio.ensure_future(fail_with_cycle(request))
    await asyncio.wait([task])
    error = task.exception()
    assert error is not None
    return error


async def give_cause(request: web.Request, response: Any) -> None:
    response.__cause__ = await failure_of_task(request)


async def store_failure(request: web.Request, response: Any) -> None:
    request["failure"] = await failure_of_task(request)


@pytest.mark.parametrize("api", GUARDS)
@pytest.mark.parametrize("prepare", [give_cause, store_failure])
def test_what_comes_to_a_response_while_it_is_prepared_is_severed(
    prepare: Any, api: str
) -> None:
    """It was put off before, when there was nothing but the exception itself."""

    def add(app: web.Application) -> None:
        app.on_response_prepare.append(prepare)

    assert run(left_by(add, "/refuse/1", 400, lambda app: None)) == 3
    assert run(left_by(add, "/refuse/1", 400, GUARDS[api])) == 0


@web.middleware
async def swallow(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        return await handler(request)  # type: ignore[no-any-return]
    except web.HTTPException:
        return web.Response(status=500)


@web.middleware
async def give_cause_and_swallow(
    request: web.Request, handler: Any
) -> web.StreamResponse:
    try:
        return await handler(request)  # type: ignore[no-any-return]
    except web.HTTPException as exc:
        exc.__cause__ = await failure_of_task(request)
    return web.Response(status=500)


def test_a_cause_of_what_was_swallowed_is_severed() -> None:
    """The cause has a cycle of its own, which does not go with the exception."""

    def add(app: web.Application) -> None:
        app.middlewares.append(give_cause_and_swallow)

    assert run(left_by(add, "/refuse/1", 500, lambda app: None)) == 3
    assert run(left_by(add, "/refuse/1", 500, setup)) == 0


groups = pytest.mark.skipif(sys.version_info < (3, 11), reason="has no groups")


def all_failed(members: List[BaseException]) -> web.HTTPException:
    """An HTTPException that is a group as well."""
    group: Any = getattr(builtins, "BaseExceptionGroup")  # noqa: B009

    class AllFailed(group, web.HTTPBadGateway):  # type: ignore[misc]
        def __new__(cls, members: Any) -> Any:
            return group.__new__(cls, "all failed", members)

        def __init__(self, members: Any) -> None:
            web.HTTPBadGateway.__init__(self)

    return AllFailed(members)  # type: ignore[no-any-return]


async def fail_with_members(request: web.Request) -> web.Response:
    raise all_failed([await failure_of_task(request)])


@groups
@pytest.mark.parametrize("api", GUARDS)
@pytest.mark.parametrize("status", [502, 500])
def test_a_group_is_severed_with_its_members(status: int, api: str) -> None:
    """Also if it is the response, or swallowed on its way."""

    def add(app: web.Application) -> None:
        app.router.add_get("/fail", fail_with_members)
        if status == 500:
            app.middlewares.append(swallow)

    if api == "outermost" and status == 500:
        pytest.skip("it is not seen there")
    assert run(left_by(add, "/fail", status, lambda app: None)) == 3
    assert run(left_by(add, "/fail", status, GUARDS[api])) == 0


@groups
@pytest.mark.parametrize(
    ("waits", "api"),
    [
        ("middleware", "appended"),
        ("middleware", "setup"),
        ("prepare", "appended"),
        ("prepare", "outermost"),
        ("prepare", "setup"),
    ],
)
def test_a_member_that_another_request_raises_keeps_its_locals(
    waits: str, api: str
) -> None:
    """The group is on its way still, or is being sent."""
    shared: List[BaseException] = []
    found: List[bool] = []

    async def main() -> None:
        inside, go_on = asyncio.Event(), asyncio.Event()

        async def report(request: web.Request, response: Any) -> None:
            if isinstance(response, web.HTTPBadGateway):
                inside.set()
                await go_on.wait()
                (member,) = response.exceptions  # type: ignore[attr-defined]
                found.append(has_local(member, "fail_with_cycle", "request"))

        @web.middleware
        async def report_on_its_way(
            request: web.Request, handler: Any
        ) -> web.StreamResponse:
            try:
                return await handler(request)  # type: ignore[no-any-return]
            except web.HTTPBadGateway as exc:
                await report(request, exc)
                raise

        async def first(request: web.Request) -> web.Response:
            shared.append(await failure_of_task(request))
            raise all_failed(shared)

        async def second(request: web.Request) -> web.Response:
            raise shared[0]

        app = application()
        if waits == "prepare":
            app.on_response_prepare.append(report)
        else:
            app.middlewares.append(report_on_its_way)
        app.router.add_get("/first", first)
        app.router.add_get("/second", second)
        GUARDS[api](app)
        async with serve(app) as service:
            client, other = await service.connect(), await service.connect()
            await client.get("/first")
            await inside.wait()
            assert await ask(other, "/second") == 500
            await spin()
            go_on.set()
            assert (await client.answer())[0] == 502
            client.close()
            other.close()
            await service.settle()

    run(main())
    assert found == [True]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("api", GUARDS)
def test_the_callbacks_of_a_task_find_its_locals(api: str, loop: str) -> None:
    """The next request may begin before them, if it was sent already."""
    kept: List[BaseException] = []
    found: List[bool] = []

    async def keep(request: web.Request, response: Any) -> None:
        if isinstance(response, web.HTTPException):
            kept.append(response)

    async def wait_for(task: Any) -> None:
        await task
        found.append(has_local(kept[0], "fail", "marker"))

    async def main() -> None:
        tasks: List[Any] = []

        async def fail(request: web.Request) -> web.Response:
            marker = request.path
            task: Any = asyncio.current_task()
            tasks.append(asyncio.ensure_future(wait_for(task)))
            await asyncio.sleep(0)
            task.add_done_callback(
                lambda _: found.append(has_local(kept[0], "fail", "marker"))
            )
            raise web.HTTPBadRequest(text=marker)

        app = application()
        app.router.add_get("/fail", fail)
        app.on_response_prepare.append(keep)
        GUARDS[api](app)
        async with serve(app) as service:
            client = await service.connect()
            request = b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n"
            await client.send(request % b"/fail" + request % b"/")
            assert (await client.answer())[0] == 400
            assert (await client.answer())[0] == 200
            await spin()
            client.close()
            await service.settle()

    run(main(), loop)
    assert found == [True, True]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("api", GUARDS)
def test_the_end_of_a_request_leaves_the_next_one_alone(api: str, loop: str) -> None:
    """Of two that were sent at once, the second may be at work before that."""
    reported: List[bool] = []

    async def look_later(request: web.Request, response: Any) -> None:
        # No frame that goes on tells that it is in flight.
        *_, (frame, _) = traceback.walk_tb(response.__traceback__)
        while response.__traceback__.tb_frame is not frame:
            response.__traceback__ = response.__traceback__.tb_next
        del frame
        if request.path != "/refuse/0":  # answered at once, and so is the next
            await spin()
        reported.append(has_local(response, "refuse", "marker"))

    async def main() -> int:
        app = application()
        app.on_response_prepare.append(look_later)
        GUARDS[api](app)
        with no_collector():
            before = len(alive())
            async with serve(app) as service:
                client = await service.connect()
                request = b"GET /refuse/%d HTTP/1.1\r\nHost: localhost\r\n\r\n"
                await client.send(b"".join(request % number for number in range(5)))
                for number in range(5):
                    assert await client.answer() == (400, f"/refuse/{number}")
                client.close()
                await service.settle()
            return len(alive()) - before

    assert run(main(), loop) == 0
    assert reported == [True] * 5


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("api", GUARDS)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_later_callback_finds_the_locals_of_the_response(
    method: str, api: str, loop: str
) -> None:
    """It comes after the library's own, and nobody has the response but the task."""
    if method == "POST" and AIOHTTP < (3, 10, 6):
        pytest.skip("the body has an error of its own: both are severed at once")
    found: List[bool] = []

    async def fail(request: web.Request) -> web.Response:
        marker = await request.text()
        raise web.HTTPBadRequest(text=marker)

    async def add_callback(request: web.Request, response: Any) -> None:
        task: Any = asyncio.current_task()
        task.add_done_callback(
            lambda task: found.append(has_local(task.result()[0], "fail", "marker"))
        )

    async def main() -> None:
        app = application()
        app.router.add_route("*", "/fail", fail)
        app.on_response_prepare.append(add_callback)
        GUARDS[api](app)
        async with serve(app) as service:
            client = await service.connect()
            if method == "POST":
                await client.post("/fail", b"body")
            else:
                await client.get("/fail")
            assert (await client.answer())[0] == 400
            await spin()
            client.close()
            await service.settle()

    run(main(), loop)
    assert found == [True]


class Own:
    """What an application makes of a request, and gives to its handlers."""

    def __init__(self, of: web.Request) -> None:
        self.path = of.path
        self.read = of.read


class Strict(Own):
    """Says in a way of its own that it does not have something."""

    def __getattr__(self, name: str) -> Any:
        raise KeyError(name)


@web.middleware
async def give_own(request: web.Request, handler: Any) -> web.StreamResponse:
    kind = Strict if "strict" in request.query else Own
    return await handler(kind(request))  # type: ignore[no-any-return]


@pytest.mark.parametrize("api", [*GUARDS, "guard_server"])
@pytest.mark.parametrize("query", ["", "?strict"])
def test_an_application_may_give_its_handlers_what_it_likes(
    query: str, api: str
) -> None:
    """It is answered as ever, whatever that does not have."""

    async def main() -> List[int]:
        app = application(give_own)
        async with serve_under(api, app) as service:
            client = await service.connect()
            answers = [await ask(client, path + query) for path in ("/refuse/1", "/")]
            client.close()
        return answers

    assert run(main()) == [400, 200]


class Unasked(type):
    """Its classes are not to be asked for what aiohttp does not ask them for."""

    def __getattribute__(cls, name: str) -> Any:
        if name == "__http_exception__":
            raise asyncio.CancelledError
        return super().__getattribute__(name)


class OfOddClass(
    web.HTTPBadRequest,
    metaclass=type("Meta", (Unasked, type(web.HTTPBadRequest)), {}),  # type: ignore[misc]
):
    pass


@pytest.mark.parametrize("api", GUARDS)
def test_an_exception_of_an_odd_class_is_answered(api: str) -> None:
    """Only the interpreter says what it is."""

    async def fail(request: web.Request) -> web.Response:
        raise OfOddClass

    def add(app: web.Application) -> None:
        app.router.add_get("/fail", fail)
        app.middlewares.append(idle)

    assert run(left_by(add, "/fail", 400, lambda app: None)) == 3
    assert run(left_by(add, "/fail", 400, GUARDS[api])) == 0


class LooksLikeOne(Exception):
    """No weak reference can be made to it, and it is none of aiohttp's."""

    __slots__ = ()
    __http_exception__ = True


def test_what_only_looks_like_a_response_is_noted_as_an_error() -> None:
    """Nothing is complained of."""

    async def fail(request: web.Request) -> web.Response:
        raise LooksLikeOne

    def add(app: web.Application) -> None:
        app.router.add_get("/fail", fail)
        app.middlewares.append(idle)

    before = complaints.errors()
    assert run(left_by(add, "/fail", 500, setup)) == 0
    assert complaints.errors() == before


# Each transport says of itself that it was never closed.
@pytest.mark.filterwarnings("ignore")
def test_loops_that_are_closed_too_early_leave_no_entries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A connection that never ends is collected with what it has put off."""
    # What cannot be raised when a task is thrown away: pytest's hook would hold it.
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)

    async def leave_open() -> List[Client]:
        app = application()
        setup(app)
        runner = web.AppRunner(app)
        await runner.setup()
        service = await start(runner)
        clients = [await service.connect() for _ in range(3)]
        for client in clients:
            assert await ask(client, "/") == 200
        assert len(connections.settled_connections) == 3
        for client in clients:
            assert await ask(client, "/refuse/1") == 400
        assert not connections.settled_connections
        assert len(holders.pending) == 3
        return clients

    for _ in range(3):
        loop = asyncio.new_event_loop()
        clients = loop.run_until_complete(leave_open())
        loop.close()
        for client in clients:
            client.close()
        for _ in range(3):  # finalizers make garbage of their own
            gc.collect()
        assert not holders.pending
        assert not connections.followed_connections
        assert not connections.settled_connections


def test_what_another_task_had_in_hand_goes_when_the_connection_goes_on() -> None:
    """Also if no request comes to it that has to be followed."""

    async def main() -> List[List[str]]:
        go_on = asyncio.Event()
        shared = [web.HTTPBadRequest()]
        left = []

        async def work() -> None:
            try:
                raise shared[0]
            except web.HTTPBadRequest:
                await go_on.wait()

        async def fail(request: web.Request) -> web.Response:
            raise shared[0]

        app = application()
        app.router.add_get("/shared", fail)
        setup(app)
        async with serve(app) as service:
            task = asyncio.ensure_future(work())
            client = await service.connect()
            assert await ask(client, "/shared") == 400
            await spin()
            go_on.set()
            await task
            shared.clear()
            del task
            for path in ("/", "/refuse/1"):
                await ask(client, path)
                await ask(client, "/")
                await spin()
                left.append([each.path for each in alive()])
            client.close()
            await service.settle()
        return left

    with no_collector():
        assert run(main()) == [["/"], ["/"]]


@pytest.mark.parametrize("goes_on", [False, True])
def test_what_other_tasks_had_in_hand_goes_as_its_own_request_has_it(
    goes_on: bool,
) -> None:
    """With ``clear_frames=False`` for one of them the other keeps its text."""

    async def main() -> List[Tuple[bool, bool]]:
        done = asyncio.Event()
        errors = {"/text": ValueError(), "/locals": ValueError()}

        async def work(error: Exception) -> None:
            try:
                raise error
            except ValueError:
                await done.wait()

        async def fail(request: web.Request) -> web.Response:
            raise errors[f"/{request.path.split('/')[1]}"]

        @web.middleware
        async def answer(request: web.Request, handler: Any) -> web.StreamResponse:
            try:
                return await handler(request)  # type: ignore[no-any-return]
            except ValueError:
                return web.Response(status=502)

        app = application(answer)
        for prefix, options in ("/text", {}), ("/locals", {"clear_frames": False}):
            below = application(cyclebreak(**options))
            below.router.add_get("/fail", fail)
            app.add_subapp(prefix, below)
        async with serve(app) as service:
            tasks = [asyncio.ensure_future(work(each)) for each in errors.values()]
            client = await service.connect()
            frames = []
            for prefix, error in errors.items():
                assert await ask(client, f"{prefix}/fail") == 502
                frames += [
                    frame
                    for frame, _ in traceback.walk_tb(error.__traceback__)
                    if frame.f_code.co_name == "fail"
                ]
                if goes_on:  # another one's end comes in between
                    assert await ask(client, "/text/missing") == 404
            done.set()
            await asyncio.gather(*tasks)
            client.close()
            await service.settle()
            return [
                (error.__traceback__ is not None, bool(frame.f_locals))
                for error, frame in zip(errors.values(), frames)
            ]

    with no_collector():
        assert run(main()) == [(True, False), (False, True)]


class TaskOfItsOwn:
    """All that asyncio asks of the current task; it has no coroutine to show."""

    def get_loop(self) -> Any:
        return asyncio.get_running_loop()


@web.middleware
async def in_task_of_its_own(request: web.Request, handler: Any) -> web.StreamResponse:
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    other: Any = TaskOfItsOwn()
    asyncio.tasks._leave_task(loop, task)  # type: ignore[attr-defined]
    asyncio.tasks._enter_task(loop, other)  # type: ignore[attr-defined]
    try:
        return await handler(request)  # type: ignore[no-any-return]
    finally:
        asyncio.tasks._leave_task(loop, other)  # type: ignore[attr-defined]
        asyncio.tasks._enter_task(loop, task)  # type: ignore[attr-defined]


@pytest.mark.parametrize("api", GUARDS)
def test_a_task_of_another_class_is_answered(api: str) -> None:
    """It need not have get_coro(): asyncio's documents do not ask for that."""

    async def main() -> int:
        app = application(in_task_of_its_own)
        GUARDS[api](app)
        async with serve(app) as service:
            return (await service.ask("/refuse/1"))[0]

    assert run(main()) == 400


def test_what_shares_a_frame_with_another_request_waits_for_that() -> None:
    """A frame that the other one can still look into is left as it is."""
    found: List[bool] = []

    async def main() -> None:
        error = ValueError()
        waiting, go_on = asyncio.Event(), asyncio.Event()

        async def refused(request: web.Request) -> web.Response:
            marker = request.path
            try:
                raise error
            except ValueError as exc:
                raise web.HTTPBadRequest(text=marker) from exc

        async def waits(request: web.Request) -> web.Response:
            try:
                raise error
            except ValueError as exc:
                waiting.set()
                await go_on.wait()
                found.append(has_local(exc, "refused", "marker"))
            return web.Response()

        app = application()
        app.router.add_get("/refused", refused)
        app.router.add_get("/waits", waits)
        setup(app)
        async with serve(app) as service:
            other, client = await service.connect(), await service.connect()
            await other.get("/waits")
            await waiting.wait()
            for path, status in (("/refused", 400), ("POST", 200), ("/", 200)):
                assert await ask(client, path) == status
                await spin()
            go_on.set()
            assert (await other.answer())[0] == 200
            client.close()
            other.close()
            await service.settle()

    run(main())
    assert found == [True]


class Session:
    """What an application opens for each request."""


SESSION: "ContextVar[Any]" = ContextVar("session", default=None)


@web.middleware
async def open_session(request: web.Request, handler: Any) -> web.StreamResponse:
    token = SESSION.set(Session())
    try:
        return await handler(request)  # type: ignore[no-any-return]
    finally:
        SESSION.reset(token)


async def sessions_of_idle_connections(install: Guard, path: str) -> List[int]:
    """How many there are after each of two requests of three connections."""
    app = application(open_session)
    app.router.add_get("/ok", answer)
    install(app)
    found = []
    with no_collector():
        async with serve(app) as service:
            clients = [await service.connect() for _ in range(3)]
            for _ in range(2):
                for client in clients:
                    await ask(client, path)
                for client in clients:
                    await ask(client, "/ok")
                await spin()
                found.append(len(alive(Session)))
            for client in clients:
                client.close()
            await service.settle()
    gc.collect()
    return found


@pytest.mark.parametrize("path", ["/ok", "/refuse/1", "POST"])
@pytest.mark.parametrize("guard", GUARDS)
def test_a_connection_keeps_no_context_of_a_request(guard: str, path: str) -> None:
    """It is followed by a callback, and made while its first request is handled."""
    for install in (lambda app: None, GUARDS[guard]):
        assert run(sessions_of_idle_connections(install, path)) == [0, 0]


async def refuse_with_task(request: web.Request) -> web.Response:
    task = asyncio.current_task()
    await asyncio.sleep(0)
    raise web.HTTPConflict(text=repr(task is None))


async def refuse_with_stored(request: web.Request) -> web.Response:
    request["user"] = "somebody"
    return await refuse_with_task(request)


async def refuse_after_group(request: web.Request) -> web.Response:
    async with asyncio.TaskGroup() as group:  # type: ignore[attr-defined,unused-ignore]
        group.create_task(asyncio.sleep(0))
    raise web.HTTPConflict


async def refuse_after_timeout(request: web.Request) -> web.Response:
    async with asyncio.timeout(60) as timeout:  # type: ignore[attr-defined,unused-ignore]
        await asyncio.sleep(0)
    raise web.HTTPConflict(text=repr(timeout.expired()))


async def left_by_handler(handler: Any, method: str, install: Guard) -> int:
    """As left_by(), of connections that go on with a request that succeeds."""

    async def read_first(request: web.Request) -> web.Response:
        await request.read()
        return await handler(request)  # type: ignore[no-any-return]

    app = application()
    app.router.add_route("*", "/conflict", read_first)
    install(app)
    with no_collector():
        before = len(alive())
        async with serve(app) as service:
            for _ in range(3):
                client = await service.connect()
                if method == "POST":
                    await client.post("/conflict", b"body")
                else:
                    await client.get("/conflict")
                assert (await client.answer())[0] == 409
                await spin()
                assert await ask(client, "/") == 200
                client.close()
                await service.settle()
        return len(alive()) - before


@pytest.mark.filterwarnings("ignore:It is recommended to use web.RequestKey")
@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    "handler",
    [refuse_with_task, refuse_with_stored, refuse_after_group, refuse_after_timeout],
)
def test_a_response_whose_frames_have_their_own_task(
    handler: Any, method: str, guard: str
) -> None:
    """The task is done, and its result is the response."""
    if "after" in handler.__name__ and sys.version_info < (3, 11):
        pytest.skip("asyncio has none of these before CPython 3.11")
    assert run(left_by_handler(handler, method, lambda app: None)) >= 3
    assert run(left_by_handler(handler, method, GUARDS[guard])) == 0


def give_tasks_to_their_frames() -> None:
    """Have the running loop wrap each task's coroutine, as aiomonitor's hook does."""

    async def wrapper(coroutine: Any) -> Any:
        task = asyncio.current_task()
        try:
            return await coroutine
        finally:
            assert task is not None

    def factory(loop: Any, coroutine: Any, **options: Any) -> Any:
        return asyncio.Task(wrapper(coroutine), loop=loop, **options)

    asyncio.get_running_loop().set_task_factory(factory)


async def break_off(request: web.Request) -> web.Response:
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b"begun")
    raise ValueError("fails while it streams")


async def refuse_in_vain(request: web.Request) -> web.Response:
    request["user"] = "stored"
    raise web.HTTPConflict


async def fail_to_prepare(request: web.Request, response: web.StreamResponse) -> None:
    if response.status == 409:
        reason = "no refusals today"
        raise LookupError(reason)


class Locals(logging.Handler):
    """What is in the frames of the exceptions that are logged, when they are."""

    def __init__(self) -> None:
        super().__init__()
        self.found: List[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        assert record.exc_info is not None
        for frame, _ in traceback.walk_tb(record.exc_info[2]):
            self.found.append(f"{frame.f_code.co_name} {sorted(frame.f_locals)}")


@pytest.mark.filterwarnings("ignore:It is recommended to use web.RequestKey")
@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("handler", [break_off, refuse_in_vain])
def test_what_leaves_a_task_that_is_in_its_own_frame(handler: Any, guard: str) -> None:
    """No middleware sees it, and the connection's task logs it or is silent."""

    async def served(install: Guard) -> Tuple[int, List[str]]:
        give_tasks_to_their_frames()
        app = application()
        app.router.add_get("/fails", handler)
        on_prepare: Any = app.on_response_prepare
        on_prepare.append(fail_to_prepare)
        install(app)
        reporter = Locals()
        logging.getLogger("aiohttp.server").addHandler(reporter)
        try:
            with no_collector():
                before = len(alive())
                async with serve(app) as service:
                    for _ in range(3):
                        client = await service.connect()
                        await client.get("/fails")
                        with contextlib.suppress(ConnectionError):
                            while True:
                                await client.answer()
                        client.close()
                        await service.settle()
                return len(alive()) - before, reporter.found
        finally:
            logging.getLogger("aiohttp.server").removeHandler(reporter)

    ours = ("cyclebreak_middleware", "idle", "impl")  # aiohttp has one for each of them

    def without_ours(found: List[str]) -> List[str]:
        return [each for each in found if each.split()[0] not in ours]

    kept, expected = run(served(lambda app: app.middlewares.append(idle)))
    left, found = run(served(GUARDS[guard]))
    assert expected
    assert without_ours(found) == without_ours(expected)
    assert (kept, left) == (3, 0)


async def refuse_body(request: web.Request) -> web.Response:
    raise web.HTTPConflict


@pytest.mark.parametrize("guard", GUARDS)
def test_an_upload_that_is_refused_in_a_task_in_pure_python(
    guard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nest_asyncio switches to these; frames of theirs lead to the task."""
    for module in (asyncio, asyncio.tasks):
        monkeypatch.setattr(module, "Task", asyncio.tasks._PyTask)  # type: ignore[attr-defined]

    async def left(install: Guard) -> int:
        app = application()
        app.router.add_post("/conflict", refuse_body)
        install(app)
        with no_collector():
            before = len(alive())
            async with serve(app) as service:
                for _ in range(3):
                    client = await service.connect()
                    await client.post("/conflict", b"body")
                    assert (await client.answer())[0] == 409
                    client.close()
                    await service.settle()
            return len(alive()) - before

    assert run(left(lambda app: None)) == 3
    assert run(left(GUARDS[guard])) == 0
