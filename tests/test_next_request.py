"""Exceptions that are left to the connection: to its next request, or its end."""

import asyncio
import traceback
from typing import Any, Callable, Dict, List

import pytest
from aiohttp import web

from aiohttp_cyclebreak import cyclebreak, guard_server, setup

from .service import LOOPS, Client, alive, no_collector, run, serve, spin

pytestmark = pytest.mark.usefixtures("few_objects")

Guard = Callable[[web.Application], Any]
GUARDS: Dict[str, Guard] = {
    "appended": lambda app: app.middlewares.append(cyclebreak()),
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


async def ask(client: Client, path: str) -> int:
    if path == "POST":
        await client.post("/", b"body")
    else:
        await client.get(path)
    status, _ = await client.answer()
    return status


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

    async def main(guard: Guard) -> List[int]:
        left = []
        app = application()
        guard(app)
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
            client.close()
            await service.settle()
        return left

    bare = run(main(lambda app: None), loop)
    assert bare[-1] >= bare[0] + 3
    guarded = run(main(GUARDS[guard]), loop)
    assert guarded[-1] <= guarded[0] <= 2


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


@pytest.mark.parametrize(
    "guard", ["appended", "setup"]
)  # one that is outside sees none
@pytest.mark.parametrize("held", [1, 2, 3])
@pytest.mark.parametrize("swallowed", [True, False])
def test_who_holds_the_exception_prints_all_of_it(
    swallowed: bool, held: int, guard: str
) -> None:
    """Also where the references are as many as those that aiohttp has itself."""
    kept: List[BaseException] = []

    @web.middleware
    async def keep(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            return await handler(request)  # type: ignore[no-any-return]
        except web.HTTPException as exc:
            kept.extend([exc] * held)
            if swallowed:
                return web.Response(status=400)
            raise

    def line_is_there() -> bool:
        return "in refuse" in "".join(traceback.format_tb(kept[0].__traceback__))

    async def main() -> None:
        app = application(keep)
        GUARDS[guard](app)
        async with serve(app) as service:
            client = await service.connect()
            for path in ("/refuse/1", "/", "/"):
                await ask(client, path)
                await spin()
                assert line_is_there()
            client.close()
            await service.settle()

    with no_collector():
        before = len(alive())
        run(main())
        assert line_is_there()
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


@web.middleware
async def translate(request: web.Request, handler: Any) -> web.StreamResponse:
    """No frame that goes on is in the traceback of what was raised first."""
    try:
        return await handler(request)  # type: ignore[no-any-return]
    except web.HTTPBadRequest as exc:
        raise web.HTTPConflict from exc


@pytest.mark.parametrize("guard", ["appended", "setup"])  # it has noted it by then
def test_an_exception_that_is_shared_only_later_is_left_whole(guard: str) -> None:
    """One request has it in hand; others raise the same and are done before."""
    cached: List[BaseException] = []
    done: List[asyncio.Event] = []
    reported: List[bool] = []

    @web.middleware
    async def cache(request: web.Request, handler: Any) -> web.StreamResponse:
        if cached:
            raise web.HTTPBadGateway from cached[0]
        try:
            return await handler(request)  # type: ignore[no-any-return]
        except web.HTTPConflict as exc:
            assert exc.__cause__ is not None
            cached.append(exc.__cause__)
            await done[0].wait()
            reported.append(has_local(cached[0], "refuse", "marker"))
            raise

    async def main() -> int:
        app = application(cache, translate)
        GUARDS[guard](app)
        with no_collector():
            before = len(alive())
            async with serve(app) as service:
                done.append(asyncio.Event())
                first = await service.connect()
                await first.get("/refuse/1")
                while not cached:
                    await asyncio.sleep(0)
                second = await service.connect()
                for _ in range(3):
                    assert await ask(second, "/refuse/2") == 502
                done[0].set()
                assert (await first.answer())[0] == 409
                first.close()
                second.close()
                await service.settle()
            return len(alive()) - before

    left = run(main())
    assert reported == [True]
    if guard != "appended":  # that one does not see what another middleware raises
        assert left == 0


@pytest.mark.parametrize("guard", GUARDS)
def test_a_task_that_outlives_its_request_disturbs_no_later_one(guard: str) -> None:
    """It calls the handler once more while the next request reports a failure."""
    reported: List[bool] = []
    calls: List[Callable[[], Any]] = []

    @web.middleware
    async def report(request: web.Request, handler: Any) -> web.StreamResponse:
        calls.append(lambda: handler(request))
        try:
            return await handler(request)  # type: ignore[no-any-return]
        except web.HTTPConflict as exc:
            if request.path == "/refuse/2":
                for call in calls[:2]:
                    task = asyncio.ensure_future(call())
                    await asyncio.wait([task])
                    task.exception()
                assert exc.__cause__ is not None
                reported.append(has_local(exc.__cause__, "refuse", "marker"))
            raise

    async def main() -> None:
        app = application(report, translate)
        GUARDS[guard](app)
        async with serve(app) as service:
            client = await service.connect()
            for path, status in (("/refuse/1", 409), ("/", 200), ("/refuse/2", 409)):
                assert await ask(client, path) == status
            client.close()
            await service.settle()

    run(main())
    assert reported == [True]
