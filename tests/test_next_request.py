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
@pytest.mark.parametrize("guard", ["appended", "setup"])
@pytest.mark.parametrize("swallows", [keeps_another, stores_another])
def test_what_is_swallowed_is_followed_to_the_end(
    swallows: Any, guard: str, loop: str
) -> None:
    """It is no response, and so the connection has nothing of it."""

    async def main(guard: Guard) -> int:
        app = application(swallows)
        guard(app)
        with no_collector():
            before = len(alive())
            async with serve(app) as service:
                for _ in range(5):
                    assert (await service.ask("/refuse/1"))[0] == 500
                    await service.settle()
            return len(alive()) - before

    assert run(main(lambda app: None), loop) == 5
    assert run(main(GUARDS[guard]), loop) == 0
