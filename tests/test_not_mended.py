"""What docs/safety.rst says is found and not mended.

Most of it is as bare, and no worse.
"""

import asyncio
import contextlib
import sys
import traceback
import weakref
from typing import Any, Callable, Dict, List, Optional, Tuple, Type

import pytest
from aiohttp import web

from aiohttp_cyclebreak import BreakEvent, keep_cycles, setup

from .service import AIOHTTP, TIMEOUT, alive, go_away, no_collector, run, serve, spin
from .test_next_request import (
    GUARDS,
    application,
    ask,
    give_own,
    left_by,
    open_rows,
    serve_under,
    store_failure,
)

pytestmark = pytest.mark.usefixtures("few_objects")

# aiohttp 3.14 wants keys of its own kind.
ERROR: Any = (
    web.RequestKey("error", Exception) if hasattr(web, "RequestKey") else "error"
)


def test_what_is_stored_in_a_success_while_it_is_prepared() -> None:
    """No middleware comes after that."""

    def add(app: web.Application) -> None:
        app.on_response_prepare.append(store_failure)

    assert run(left_by(add, "/", 200, lambda app: None)) == 3
    assert run(left_by(add, "/", 200, setup)) == 3


@pytest.mark.parametrize("error", [LookupError, web.HTTPServiceUnavailable])
@pytest.mark.parametrize(
    ("options", "is_left"),
    [
        (None, False),
        ({}, False),
        ({"keep": lambda request, exc: False}, True),
        ({"on_break": lambda event: None}, True),
        ({"clear_frames": False}, True),
    ],
    ids=["bare", "default", "keep", "on_break", "clear_frames"],
)
def test_what_is_swallowed_while_its_request_goes_on(
    options: Optional[Dict[str, Any]], is_left: bool, error: Type[Exception]
) -> None:
    """Where an option has a say it stays until then, with the locals of its frames."""
    found: List[Any] = []

    class Local:
        pass

    async def refuse(request: web.Request) -> web.Response:
        local = Local()
        found.append(weakref.ref(local))
        raise error

    @web.middleware
    async def swallow(request: web.Request, handler: Any) -> web.StreamResponse:
        with contextlib.suppress(error):
            return await handler(request)  # type: ignore[no-any-return]
        await spin()
        found.append(found[0]() is not None)
        return web.Response()

    async def main() -> None:
        app = application(swallow)
        app.router.add_get("/fail", refuse)
        if options is not None:
            setup(app, **options)
        with no_collector():
            async with serve(app) as service:
                assert (await service.ask("/fail"))[0] == 200
                await service.settle()

    run(main())
    assert found[1:] == [is_left]
    assert found[0]() is None


def _locals_where_raised(exc: BaseException) -> Any:
    (*_, (frame, _)) = traceback.walk_tb(exc.__traceback__)
    return frame.f_locals


def _keep(exc: BaseException) -> Any:
    return exc


def _read_locals(exc: BaseException) -> Any:
    """As error reporters do: before CPython 3.13 the frames keep a copy of them."""
    traceback.TracebackException.from_exception(exc, capture_locals=True)


def _kept(guard: str, handler: Any, use: Callable[[BaseException], Any]) -> Any:
    """What a middleware has made of what a handler raised, and looks at afterwards."""
    kept: List[Any] = []

    @web.middleware
    async def keep(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            return await handler(request)  # type: ignore[no-any-return]
        except Exception as exc:
            kept.append(use(exc))
            raise

    async def main() -> None:
        app = application(keep)
        app.router.add_get("/fail", handler)
        async with serve_under(guard, app) as service:
            assert (await service.ask("/fail"))[0] == 500
            await service.settle()

    run(main())
    return kept.pop()  # it leads to the application, which has the list


@pytest.mark.parametrize("guard", ["bare", *GUARDS])
def test_locals_that_somebody_keeps_to_evaluate_an_expression(guard: str) -> None:
    """From CPython 3.13 on they are a view of the frame, which is emptied."""

    async def fail(request: web.Request) -> web.Response:
        answer = 42  # noqa: F841
        raise ValueError

    names = set(_kept(guard, fail, _locals_where_raised))
    is_empty = guard != "bare" and sys.version_info >= (3, 13)
    assert ("answer" not in names) is is_empty


@pytest.mark.parametrize("guard", ["bare", "keep", "keep_cycles"])
def test_what_another_request_is_to_keep(guard: str) -> None:
    """One that keeps nothing has raised the same instance, and ends after it."""
    failure = ValueError()

    async def fail(request: web.Request) -> web.Response:
        raise failure

    async def main() -> List[bool]:
        app = application()
        app.router.add_get("/kept", keep_cycles(fail) if "cycles" in guard else fail)
        app.router.add_get("/other", fail)
        if guard == "keep":
            setup(app, keep=lambda request, exc: request.path == "/kept")
        elif guard == "keep_cycles":
            setup(app)
        has_locals = []
        async with serve(app) as service:
            for path in ("/kept", "/other"):
                assert (await service.ask(path))[0] == 500
                await service.settle()
                has_locals.append("request" in _locals_where_raised(failure))
        return has_locals

    assert run(main()) == [True, guard == "bare"]


@pytest.mark.parametrize("clear_frames", [None, True, False])
def test_the_traceback_that_another_request_would_leave(
    clear_frames: Optional[bool],
) -> None:
    """One with other options has raised the same instance, and ends after it."""
    failure = ValueError()

    async def fail(request: web.Request) -> web.Response:
        raise failure

    async def main() -> List[bool]:
        app = application()
        for prefix, clears in ("/text", True), ("/other", clear_frames):
            below = web.Application()
            below.router.add_get("/", fail)
            if clear_frames is not None:
                setup(below, clear_frames=bool(clears))
            app.add_subapp(prefix, below)
        has_text = []
        async with serve(app) as service:
            for path in ("/text/", "/other/"):
                assert (await service.ask(path))[0] == 500
                await service.settle()
                has_text.append(failure.__traceback__ is not None)
        return has_text

    assert run(main()) == [True, clear_frames is not False]


@pytest.mark.parametrize("guard", ["bare", *GUARDS])
def test_the_hint_of_a_name_error_that_is_formatted_late(guard: str) -> None:
    """From CPython 3.12 on it is looked for then, among the locals."""

    async def fail(request: web.Request) -> web.Response:
        message = request.path  # noqa: F841
        return web.Response(text=messages)  # type: ignore[name-defined] # noqa: F821

    exc = _kept(guard, fail, _keep)
    lines = traceback.format_exception(NameError, exc, exc.__traceback__)
    assert "in fail" in "".join(lines)
    has_hint = "Did you mean: 'message'?" in lines[-1]
    if guard == "bare" and not has_hint and sys.version_info < (3, 12):
        pytest.skip("there is none before, but for that of the exceptiongroup backport")
    assert has_hint is (guard == "bare")


@pytest.mark.parametrize("guard", ["bare", *GUARDS])
@pytest.mark.parametrize("goes_on", [False, True])
def test_the_task_and_the_context_that_a_finalizer_runs_in(
    goes_on: bool, guard: str
) -> None:
    """It has no task; while its request goes on, a copy of the context too."""
    found: List[Tuple[bool, str]] = []

    def closed(variable: str) -> None:
        found.append((asyncio.current_task() is not None, variable))

    async def fail(request: web.Request) -> web.Response:
        opened = open_rows(closed)
        next(opened)
        raise ValueError

    @web.middleware
    async def swallow(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            return await handler(request)  # type: ignore[no-any-return]
        except ValueError:
            if not goes_on:
                raise
        await spin()
        return web.Response(status=500)

    async def main() -> None:
        app = application(swallow)
        app.router.add_get("/fail", fail)
        with no_collector():
            async with serve_under(guard, app) as service:
                assert (await service.ask("/fail"))[0] == 500
                await service.settle()

    run(main())
    if guard == "bare" or (goes_on and guard == "outermost"):  # which does not see it
        assert found == [(True, "nothing")]
    else:
        assert found == [(False, "in another context" if goes_on else "nothing")]


@pytest.mark.parametrize("use", [_keep, _read_locals])
def test_what_a_handler_swallows(use: Callable[[BaseException], Any]) -> None:
    """No middleware sees it, unless it is stored in the request."""

    async def answer(request: web.Request) -> web.Response:
        kept = None
        try:
            raise ValueError
        except ValueError as exc:
            kept = use(exc)
            if request.path == "/stored":
                request[ERROR] = exc
        return web.Response(text=repr(kept))

    def add(app: web.Application) -> None:
        app.router.add_get("/swallowed", answer)
        app.router.add_get("/stored", answer)

    is_kept = use is _keep or sys.version_info < (3, 13)
    assert run(left_by(add, "/swallowed", 200, setup)) == (3 if is_kept else 0)
    assert run(left_by(add, "/stored", 200, setup)) == 0


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("guard", ["bare", *GUARDS])
def test_what_one_middleware_raises_and_another_swallows(
    guard: str, stored: bool
) -> None:
    """It comes to none of ours, unless it is stored and one is outside of both."""

    @web.middleware
    async def swallow(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            return await handler(request)  # type: ignore[no-any-return]
        except LookupError as exc:
            if stored:
                request[ERROR] = exc
            return web.Response()

    @web.middleware
    async def fail(request: web.Request, handler: Any) -> web.StreamResponse:
        error = LookupError()
        raise error

    def add(app: web.Application) -> None:
        app.middlewares.extend([swallow, fail])

    left = 0 if stored and guard in ("outermost", "setup") else 3
    assert run(left_by(add, "/", 200, GUARDS.get(guard, lambda app: None))) == left


def test_a_callback_of_the_connections_task() -> None:
    """It is called when the connection ends; until then it keeps its request."""

    async def answer(request: web.Request) -> web.Response:
        task: Any = request.task
        task.add_done_callback(lambda task: request)
        return web.Response()

    async def main(guard: Any) -> List[int]:
        app = web.Application()
        app.router.add_get("/", answer)
        guard(app)
        async with serve(app) as service:
            with no_collector():
                client = await service.connect()
                for _ in range(3):
                    await client.get("/")
                    await client.answer()
                await spin()
                held = len(alive())
                client.close()
                await service.settle()
                return [held, len(alive())]

    assert run(main(lambda app: None))[0] == 3
    assert run(main(setup)) == [3, 0]


@pytest.mark.parametrize(("api", "left"), [("appended", 3), ("setup", 0)])
def test_what_handlers_raise_that_get_no_request(api: str, left: int) -> None:
    """The outer end gets the request, and sees what comes out."""

    def add(app: web.Application) -> None:
        app.middlewares.append(give_own)

    assert run(left_by(add, "/refuse/1", 400, lambda app: None)) == 3
    assert run(left_by(add, "/refuse/1", 400, GUARDS[api])) == left


def test_what_a_task_has_in_hand_is_severed_without_an_event() -> None:
    """It goes when the connection does, and that is all."""
    events: List[BreakEvent] = []

    async def main() -> List[int]:
        go_on = asyncio.Event()

        async def handle(failures: List[Exception]) -> None:
            try:
                raise failures.pop()
            except ValueError:
                await go_on.wait()

        async def fail(request: web.Request) -> web.Response:
            try:
                raise ValueError
            except ValueError as exc:
                tasks.append(asyncio.ensure_future(handle([exc])))
                await asyncio.sleep(0)
                raise exc  # not of an earlier traceback, as a bare one before 3.11

        tasks: List[Any] = []
        app = web.Application()
        app.router.add_get("/", fail)
        setup(app, on_break=events.append)
        async with serve(app) as service:
            with no_collector():
                client = await service.connect()
                await client.get("/")
                assert (await client.answer())[0] == 500
                held = len(alive())
                go_on.set()
                await tasks.pop()
                client.close()
                await service.settle()
                return [held, len(alive())]

    assert run(main()) == [1, 0]
    assert events == []


def test_the_last_request_before_those_that_reach_no_middleware() -> None:
    """There is one a connection, and it goes with that."""

    async def main() -> List[List[str]]:
        app = application()
        setup(app)
        async with serve(app) as service:
            client = await service.connect()
            for number in range(3):
                assert await ask(client, f"/refuse/{number}") == 400
            head = b"GET / HTTP/1.1\r\nHost: localhost\r\nExpect: nothing\r\n\r\n"
            await client.send(head)
            assert (await client.answer())[0] == 417
            await spin()
            refused = [each.path for each in alive() if each.path != "/"]
            client.close()
            await service.settle()
            return [refused, [each.path for each in alive() if each.path != "/"]]

    with no_collector():
        assert run(main()) == [["/refuse/2"], []]


@pytest.mark.parametrize("swallowed", [False, True])
@pytest.mark.parametrize("api", GUARDS)
def test_the_last_request_before_one_that_takes_its_time(
    api: str, swallowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its response is held by aiohttp until then; bare, all before wait as well.

    Swallowed outside of all middlewares, it is held by the library alone, unless the
    request's task is asked in the end.
    """
    handle: Any = web.Application._handle

    async def swallow(self: Any, request: web.Request) -> web.StreamResponse:
        try:
            return await handle(self, request)  # type: ignore[no-any-return]
        except web.HTTPException as exc:
            return web.Response(status=exc.status)

    if swallowed:
        monkeypatch.setattr(web.Application, "_handle", swallow)

    async def main(guard: Any) -> List[List[str]]:
        begun = asyncio.Event()
        go_on = asyncio.Event()

        async def slow(request: web.Request) -> web.Response:
            begun.set()
            await go_on.wait()
            return web.Response()

        app = application()
        app.router.add_get("/slow", slow)
        guard(app)
        async with serve(app) as service:
            client = await service.connect()
            for number in range(3):
                assert await ask(client, f"/refuse/{number}") == 400
            await client.get("/slow")
            await asyncio.wait_for(begun.wait(), TIMEOUT)
            await spin()
            found = [sorted(each.path for each in alive())]
            go_on.set()
            assert (await client.answer())[0] == 200
            await spin()
            found.append(sorted(each.path for each in alive()))
            client.close()
            await service.settle()
        return found

    refused = [f"/refuse/{number}" for number in range(3) if not swallowed]
    last = [] if swallowed and api == "below" else ["/refuse/2"]
    with no_collector():
        assert run(main(GUARDS[api])) == [[*last, "/slow"], ["/slow"]]
        assert run(main(lambda app: None)) == [[*refused, "/slow"]] * 2


@pytest.mark.skipif(AIOHTTP < (3, 8, 2), reason="it cancels the handler")
def test_a_client_that_goes_away_while_a_large_response_is_sent() -> None:
    """What aiohttp catches outside of all middlewares only guard_server() sees."""

    async def large(request: web.Request) -> web.Response:
        return web.Response(body=bytes(50_000_000))

    async def main(guard: Any) -> int:
        app = application()
        app.router.add_get("/large", large)
        guard(app)
        with no_collector():
            before = len(alive())
            async with serve(app) as service:
                for _ in range(3):
                    await go_away(service, "/large")
            return len(alive()) - before

    assert run(main(lambda app: None)) == run(main(setup)) == 3


def test_a_client_that_goes_away_while_aiohttp_waits_for_its_body() -> None:
    """For the rest of it, after a refusal: for ``lingering_time``."""

    async def refuse(request: web.Request) -> web.Response:
        return web.Response(status=413)

    async def main(guard: Any) -> int:
        app = web.Application()
        app.router.add_post("/", refuse)
        guard(app)
        with no_collector():
            async with serve(app, lingering_time=3600) as service:
                client = await service.connect()
                head = (
                    b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 8\r\n\r\n"
                )
                await client.send(head + b"half")
                assert (await client.answer())[0] == 413
                client.reset()
                server: Any = service.runner.server
                while any(each.transport for each in server.connections):
                    await asyncio.sleep(0)
                await spin()
                return len(alive())

    expected = int(AIOHTTP >= (3, 8, 2))
    assert run(main(lambda app: None)) == run(main(setup)) == expected


@pytest.mark.skipif(sys.version_info < (3, 12), reason="no task is started eagerly")
@pytest.mark.skipif(AIOHTTP < (3, 10), reason="aiohttp serves in none")
@pytest.mark.parametrize("failing", [1, 2])
def test_what_gather_does_not_raise_of_tasks_that_are_started_eagerly(
    failing: int,
) -> None:
    """Each that fails at once has itself in a frame of its traceback, gh-128552."""
    eagerly: Any = vars(asyncio).get("eager_task_factory")

    async def fail(request: web.Request) -> None:
        raise LookupError

    async def gather(request: web.Request) -> web.Response:
        await asyncio.gather(*(fail(request) for _ in range(failing)))
        return web.Response()

    async def is_in_a_cycle() -> bool:
        task = asyncio.create_task(fail(web.Request.__new__(web.Request)))
        assert task.exception() is not None
        found = weakref.ref(task)
        del task
        return found() is not None

    async def left(guard: Callable[[web.Application], Any]) -> Tuple[bool, int]:
        asyncio.get_running_loop().set_task_factory(eagerly)
        app = web.Application()
        app.router.add_get("/", gather)
        guard(app)
        with no_collector():
            is_cyclic = await is_in_a_cycle()
            before = len(alive())
            async with serve(app) as service:
                for _ in range(3):
                    assert (await service.ask())[0] == 500
                await service.settle()
                return is_cyclic, len(alive()) - before

    is_cyclic, kept = run(left(lambda app: None))
    if not is_cyclic:
        pytest.skip("this release of CPython makes no such cycle")
    assert kept == 3
    assert run(left(setup))[1] == (3 if failing > 1 else 0)
