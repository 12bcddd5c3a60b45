"""cyclebreak() and setup(): options, events, both ends, sub-applications, switch."""

import asyncio
import contextlib
import gc
import sys
import traceback
from dataclasses import FrozenInstanceError, dataclass
from typing import Any, Callable, Dict, List, get_type_hints

import pytest
from aiohttp import web

import aiohttp_cyclebreak
from aiohttp_cyclebreak import (
    BreakEvent,
    Radar,
    break_cycles,
    client_cyclebreak,
    connections,
    cyclebreak,
    guard,
    guard_server,
    holders,
    requests,
    server,
    setup,
    stats,
)

from .service import Service, alive, idle, no_collector, run, serve

pytestmark = pytest.mark.usefixtures("few_objects")

APIS: Dict[str, Callable[..., Any]] = {
    "cyclebreak": lambda app, **options: app.middlewares.append(cyclebreak(**options)),
    "setup": setup,
}


async def refuse(request: web.Request) -> web.Response:
    raise web.HTTPBadRequest(text="no")


async def answer(request: web.Request) -> web.Response:
    return web.Response(text="ok")


def application(handler: Any = refuse) -> web.Application:
    app = web.Application()
    app.router.add_get("/item/{name}", handler)
    return app


async def requests_left(app: web.Application, *paths: str) -> int:
    """How many requests are alive, the collector being off, after each was served."""
    with no_collector():
        before = len(alive())
        async with serve(app) as service:
            for path in paths:
                await service.ask(path)
            await service.settle()
            return len(alive()) - before


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("clear_frames", 1),
        ("clear_frames", None),
        ("keep", "no"),
        ("keep", ValueError),  # it would make one, which is true: all would be kept
        ("on_break", 1),
    ],
)
def test_a_wrong_option_is_named(api: str, option: str, value: Any) -> None:
    """A wrong type fails in the call, not at the first request."""
    with pytest.raises(TypeError, match=f"^{option} must be"):
        APIS[api](web.Application(), **{option: value})


class Asynchronous:
    async def __call__(self, *args: Any) -> bool:
        return True


async def asynchronous(*args: Any) -> bool:
    return True


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("option", ["keep", "on_break"])
@pytest.mark.parametrize("function", [asynchronous, Asynchronous()])
def test_a_coroutine_function_is_no_callback(
    api: str, option: str, function: Any
) -> None:
    """Nobody would await it."""
    with pytest.raises(TypeError, match=f"^{option} must be a plain function"):
        APIS[api](web.Application(), **{option: function})


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(
    ("option", "function", "message"),
    [
        ("keep", lambda exc: False, "keep is called with the request and the exc"),
        ("keep", lambda: False, "keep is called with the request and the exception"),
        ("on_break", lambda: None, "on_break is called with the event"),
        ("on_break", lambda event, *, to: None, "on_break is called with the event"),
    ],
)
def test_a_callback_takes_what_it_is_called_with(
    api: str, option: str, function: Any, message: str
) -> None:
    """A keep= that fails for every request would switch the guard off."""
    with pytest.raises(TypeError, match=f"^{message}"):
        APIS[api](web.Application(), **{option: function})


@pytest.mark.parametrize("keep", [lambda *args: False, isinstance, dict])
def test_any_callback_that_takes_it_is_one(keep: Any) -> None:
    """One in C, which does not say what it takes, as well."""
    cyclebreak(keep=keep)


def test_options_are_keywords() -> None:
    """cyclebreak(False) says nothing to a reader."""
    with pytest.raises(TypeError):
        cyclebreak(False)  # type: ignore[misc]


def test_a_middleware_tells_its_types() -> None:
    """A framework that calls middlewares with what they ask for looks at these."""
    app = web.Application()
    setup(app)
    watched = web.Application()
    setup(watched, radar=Radar())
    ours = [cyclebreak(), server.guarded_middleware, *app.middlewares]
    for middleware in [*ours, *watched.middlewares]:
        hints = get_type_hints(middleware)
        assert hints["request"] is web.Request
        assert hints["return"] is web.StreamResponse
        assert "handler" in hints


@pytest.mark.parametrize("name", aiohttp_cyclebreak.__all__)
def test_the_type_hints_of_what_is_public(name: str) -> None:
    """As an injector or a generator of documents asks for them."""
    public = getattr(aiohttp_cyclebreak, name)
    own = public.__init__ if isinstance(public, type) else public
    assert set(own.__annotations__) == set(get_type_hints(own))


def test_setup_wants_an_application() -> None:
    """app.middlewares is a likely slip."""
    with pytest.raises(TypeError, match="must be an aiohttp.web.Application"):
        setup(web.Application().middlewares)  # type: ignore[arg-type]


def test_setup_twice_is_setup_once() -> None:
    """The second call changes nothing."""
    app = application()
    setup(app)
    middlewares, signals = list(app.middlewares), list(app.on_startup)
    setup(app)
    assert list(app.middlewares) == middlewares
    assert list(app.on_startup) == signals


def test_what_was_not_called_is_no_middleware() -> None:
    """It is said when the application starts, not by each request."""
    app = web.Application(middlewares=[cyclebreak])  # type: ignore[list-item]

    async def main() -> None:
        with pytest.raises(TypeError, match=r"add cyclebreak\(\), with parentheses"):
            await web.AppRunner(app).setup()

    run(main())


def test_setup_twice_with_other_options_is_an_error() -> None:
    """Or what is to be kept would not be, and nothing would say so."""

    def keep(request: web.Request, exc: BaseException) -> bool:
        return True

    app = application()
    setup(app, keep=keep)
    setup(app, keep=keep)
    setup(app)
    for other in ({"keep": lambda *args: True}, {"keep": keep, "release_body": True}):
        with pytest.raises(RuntimeError, match="before, with other options"):
            setup(app, **other)  # type: ignore[arg-type]


def test_setup_on_a_frozen_application_says_so() -> None:
    """After the start, and once it has become a sub-application."""
    app = application()
    app.freeze()
    with pytest.raises(RuntimeError, match=r"frozen.*call setup\(\) before"):
        setup(app)
    sub = application()
    application().add_subapp("/sub/", sub)
    with pytest.raises(RuntimeError, match="frozen"):
        setup(sub)


@web.middleware
async def swallow(request: web.Request, handler: Any) -> web.StreamResponse:
    error = None
    try:
        return await handler(request)  # type: ignore[no-any-return]
    except Exception as exc:
        error = exc
    return web.Response(text=str(error), status=500)


@web.middleware
async def swallow_from_a_task(request: web.Request, handler: Any) -> web.StreamResponse:
    error = None
    try:
        return await asyncio.ensure_future(handler(request))
    except Exception as exc:
        error = exc
    return web.Response(text=str(error), status=500)


@web.middleware
async def reject(request: web.Request, handler: Any) -> web.StreamResponse:
    raise web.HTTPForbidden()


def swallowing(app: web.Application) -> web.Application:
    app.middlewares.append(swallow)
    return app


def rejecting(app: web.Application) -> web.Application:
    app.middlewares.append(reject)
    return app


def nested(app: web.Application, sub: web.Application) -> web.Application:
    app.add_subapp("/sub", sub)
    return app


WITH_SETUP: Dict[str, Callable[[], web.Application]] = {
    "swallowed by an inner middleware": lambda: _set_up(swallowing(application())),
    "swallowed around a task of its own": lambda: _first(
        _set_up(application()), swallow_from_a_task
    ),
    "swallowed by one added later": lambda: swallowing(_set_up(application())),
    "raised by an outer middleware": lambda: _set_up(rejecting(application())),
    "raised by one inserted later": lambda: _first(_set_up(application()), reject),
    "raised in a sub-application": lambda: nested(
        _set_up(web.Application()), application()
    ),
    "swallowed in a sub-application": lambda: nested(
        _set_up(web.Application()), swallowing(application())
    ),
    "swallowed in one added before": lambda: _set_up(
        nested(web.Application(), swallowing(application()))
    ),
    "swallowed two deep": lambda: nested(
        _set_up(web.Application()),
        nested(web.Application(), swallowing(application())),
    ),
    "set up in the sub-application": lambda: nested(
        web.Application(), _set_up(swallowing(application()))
    ),
    "raised after the list was emptied": lambda: _emptied(_set_up(application())),
    "swallowed after the list was emptied": lambda: swallowing(
        _emptied(_set_up(application()))
    ),
    # Then its middlewares are frozen when it is known that there are no others.
    "set up alone in the sub-application": lambda: nested(
        web.Application(), _set_up(application())
    ),
}


def _set_up(app: web.Application) -> web.Application:
    setup(app)
    return app


def _emptied(app: web.Application) -> web.Application:
    app.middlewares.clear()
    return app


def _first(app: web.Application, middleware: Any) -> web.Application:
    app.middlewares.insert(0, middleware)
    return app


@pytest.mark.parametrize("case", WITH_SETUP)
def test_setup_misses_nothing_between_its_ends(case: str) -> None:
    """Whatever is added to the application, and when."""
    depth = "/sub" * (2 if "two deep" in case else 1 if "sub-app" in case else 0)
    if "in one added before" in case:
        depth = "/sub"
    app = WITH_SETUP[case]()
    assert run(requests_left(app, *[f"{depth}/item/a"] * 5)) == 0


@dataclass
class Around:
    """A middleware that is no function: a dataclass has no hash."""

    error: Any = None
    __middleware_version__ = 1

    async def __call__(self, request: web.Request, handler: Any) -> web.StreamResponse:
        return await swallow(request, handler)


class Strange(Around):
    """Compared with another one it raises."""

    def __eq__(self, other: object) -> bool:
        raise ValueError("no comparison")


@pytest.mark.parametrize("kind", [Around, Strange])
def test_setup_beside_any_middleware(kind: Any) -> None:
    """As aiohttp takes it: before setup() and after it."""
    app = application()
    app.middlewares.append(kind())
    setup(app, radar=Radar())
    setup(app)
    app.middlewares.insert(0, kind())
    assert stats(app).alive == 0
    assert run(requests_left(app, *["/item/a"] * 5)) == 0


def test_the_same_applications_leak_without_setup() -> None:
    """Or the test above would say nothing."""
    assert run(requests_left(swallowing(application()), *["/item/a"] * 5)) == 5
    app = _first(application(), swallow_from_a_task)
    assert run(requests_left(app, *["/item/a"] * 5)) == 5
    app = nested(web.Application(), swallowing(application()))
    assert run(requests_left(app, *["/sub/item/a"] * 5)) == 5
    assert run(requests_left(rejecting(application()), *["/item/a"] * 5)) == 5


def test_a_router_error_below_a_middleware_that_answers_itself() -> None:
    """A 404 for which no handler is ever called."""

    @web.middleware
    async def authorize(request: web.Request, handler: Any) -> web.StreamResponse:
        return web.Response(status=401)

    app = application()
    app.middlewares.append(authorize)
    setup(app)

    async def main() -> int:
        with no_collector():
            async with serve(app) as service:
                await service.ask("/missing")
                await service.settle()
                gc.collect()
                await service.ask("/missing")
                await service.settle()
                from aiohttp.web_urldispatcher import SystemRoute

                return len(alive(SystemRoute))

    assert run(main()) == 0


@pytest.mark.parametrize("api", APIS)
def test_on_break_tells_what_was_cut_and_nothing_private(api: str) -> None:
    """The event names the canonical route, never a path, a query or a body."""
    events: List[BreakEvent] = []

    async def main() -> None:
        app = application()
        APIS[api](app, on_break=events.append)
        async with serve(app) as service:
            await service.ask("/item/secret?token=secret")
            await service.settle()

    run(main())
    (event,) = events
    assert (event.method, event.route) == ("GET", "/item/{name}")
    assert event.exception is web.HTTPBadRequest
    assert event.exceptions == 1
    assert event.tracebacks >= event.frames - 10
    assert event.frames >= 2
    assert "secret" not in repr(event)
    with pytest.raises(FrozenInstanceError):
        event.frames = 0  # type: ignore[misc]


def test_the_event_of_a_missing_route_has_none() -> None:
    """There is no canonical path to tell."""
    events: List[BreakEvent] = []

    async def main() -> None:
        app = application()
        setup(app, on_break=events.append)
        async with serve(app) as service:
            await service.ask("/missing")
            await service.settle()

    run(main())
    assert [(event.route, event.exception) for event in events] == [
        (None, web.HTTPNotFound)
    ]


def test_a_chain_is_one_event_that_counts_all_of_it() -> None:
    """However many layers see which of its exceptions."""
    events: List[BreakEvent] = []

    async def chained(request: web.Request) -> web.Response:
        try:
            {}["missing"]
        except KeyError as exc:
            raise ValueError("translated") from exc
        return web.Response()

    @web.middleware
    async def translate(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            return await handler(request)  # type: ignore[no-any-return]
        except ValueError as exc:
            raise web.HTTPBadGateway() from exc

    async def main() -> None:
        app = application(chained)
        app.middlewares.append(translate)
        setup(app, on_break=events.append)
        async with serve(app) as service:
            await service.ask("/item/a")
            await service.settle()

    run(main())
    assert [(event.exception, event.exceptions) for event in events] == [
        (web.HTTPBadGateway, 3)
    ]


def test_a_success_is_no_event() -> None:
    """Nothing was cut."""
    events: List[BreakEvent] = []

    async def main() -> None:
        app = application(answer)
        setup(app, on_break=events.append)
        async with serve(app) as service:
            await service.ask("/item/a")
            await service.settle()

    run(main())
    assert events == []


class Kept(Exception):
    pass


async def serve_and_hold(
    app: web.Application, held: List[BaseException], *paths: str
) -> None:
    @web.middleware
    async def hold(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            return await handler(request)  # type: ignore[no-any-return]
        except Exception as exc:
            held.append(exc)
            raise

    app.middlewares.append(hold)
    async with serve(app) as service:
        for path in paths:
            await service.ask(path)
        await service.settle()


def handler_locals(exc: BaseException) -> Dict[str, Any]:
    for frame, _ in traceback.walk_tb(exc.__traceback__):
        if frame.f_code.co_name == "fail":
            return dict(frame.f_locals)
    raise AssertionError("the handler's frame is not in the traceback")


def test_what_keep_wants_is_left_exactly_as_it_was() -> None:
    """Its traceback, the locals of its frames, its cause; others are severed."""
    held: List[BaseException] = []
    asked: List[Any] = []

    async def fail(request: web.Request) -> web.Response:
        secret = request.match_info["name"]
        try:
            raise LookupError(secret)
        except LookupError as exc:
            if secret == "kept":
                raise Kept(secret) from exc
            raise ValueError(secret) from exc

    def keep(request: web.Request, exc: BaseException) -> bool:
        asked.append((request.path, type(exc)))
        return isinstance(exc, Kept)

    async def main() -> None:
        app = application(fail)
        setup(app, keep=keep)
        await serve_and_hold(app, held, "/item/kept", "/item/cut")

    run(main())
    kept, cut = held
    assert handler_locals(kept)["secret"] == "kept"
    assert kept.__cause__ is not None
    assert handler_locals(kept.__cause__)["secret"] == "kept"
    assert handler_locals(cut) == {}
    assert ("/item/kept", Kept) in asked
    assert ("/item/cut", ValueError) in asked


def test_a_cause_that_is_kept_keeps_its_frames() -> None:
    """They may be those of the exception that is not kept."""
    held: List[BaseException] = []

    async def fail(request: web.Request) -> web.Response:
        secret = "local"
        try:
            raise Kept(secret)
        except Kept as exc:
            raise web.HTTPBadRequest() from exc

    async def main() -> None:
        app = application(fail)
        setup(app, keep=lambda request, exc: isinstance(exc, Kept))
        await serve_and_hold(app, held, "/item/a")

    run(main())
    assert held[0].__cause__ is not None
    assert handler_locals(held[0].__cause__)["secret"] == "local"


def test_without_clearing_locals_stay_and_tracebacks_go() -> None:
    """A debug console has the frames already."""
    frames: List[Any] = []
    held: List[BaseException] = []

    async def fail(request: web.Request) -> web.Response:
        secret = "local"
        raise ValueError(secret)

    @web.middleware
    async def console(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            return await handler(request)  # type: ignore[no-any-return]
        except Exception as exc:
            frames.extend(frame for frame, _ in traceback.walk_tb(exc.__traceback__))
            raise

    async def main() -> None:
        app = application(fail)
        app.middlewares.append(console)
        setup(app, clear_frames=False)
        await serve_and_hold(app, held, "/item/a")

    run(main())
    assert frames[-1].f_locals["secret"] == "local"
    assert held[0].__traceback__ is None


@pytest.mark.expects_complaint
@pytest.mark.parametrize("option", ["keep", "on_break"])
def test_an_error_in_a_callback_is_logged_once(option: str, log: List[str]) -> None:
    """And swallowed: every request is answered."""

    def broken(*args: Any) -> bool:
        raise ZeroDivisionError("in the callback")

    async def main() -> List[Any]:
        app = application()
        setup(app, **{option: broken})
        async with serve(app) as service:
            answers = [await service.ask("/item/a") for _ in range(3)]
            await service.settle()
            return answers

    assert run(main()) == [(400, "no")] * 3
    (line,) = log
    assert option in line
    assert "ZeroDivisionError: in the callback" in line


@pytest.mark.expects_complaint
def test_after_an_error_in_keep_the_exception_is_kept() -> None:
    """A leak is better than a traceback lost."""
    held: List[BaseException] = []

    async def fail(request: web.Request) -> web.Response:
        secret = request.match_info["name"]
        raise ValueError(secret)

    def keep(request: web.Request, exc: BaseException) -> bool:
        raise ZeroDivisionError

    async def main() -> None:
        app = application(fail)
        setup(app, keep=keep)
        await serve_and_hold(app, held, "/item/kept")

    run(main())
    assert handler_locals(held[0])["secret"] == "kept"


@pytest.mark.expects_complaint
@pytest.mark.parametrize(
    ("module", "function", "options"),
    [
        (guard, "connection_of_response", {}),
        (connections, "_RETURNS", {}),
        (holders, "graph", {"keep": lambda request, exc: False}),
    ],
    ids=["noted", "severed", "severed when the task is done"],
)
def test_an_error_of_our_own_is_logged_once(
    module: Any,
    function: str,
    options: Any,
    monkeypatch: pytest.MonkeyPatch,
    log: List[str],
) -> None:
    """It never reaches the client: while an exception is noted, or severed."""

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("in the library")

    monkeypatch.setattr(module, function, broken)

    async def main() -> List[Any]:
        app = application()
        setup(app, **options)
        async with serve(app) as service:
            answers = [await service.ask("/item/a") for _ in range(3)]
            await service.settle()
            return answers

    assert run(main()) == [(400, "no")] * 3
    assert log
    assert len(log) == len({line.splitlines()[0] for line in log})


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="aiohttp asks no task factory")
@pytest.mark.expects_complaint
def test_a_request_that_cannot_be_followed_is_not_held() -> None:
    """Nobody may note an exception for one whose end is not told.

    The inner end of setup() fails to follow it, and the outer one tries again.
    """
    failed: List[Any] = []

    class Task(asyncio.Task):  # type: ignore[type-arg]
        def add_done_callback(self, callback: Any, **options: Any) -> None:
            if (
                getattr(callback, "__module__", None) == requests.__name__
                and not failed
            ):
                failed.append(True)
                raise MemoryError
            super().add_done_callback(callback, **options)

    async def fail(request: web.Request) -> web.Response:
        raise ValueError

    async def main() -> int:
        asyncio.get_running_loop().set_task_factory(
            lambda loop, coroutine, **options: Task(coroutine, loop=loop, **options)
        )
        app = application(fail)
        app.middlewares.append(idle)
        setup(app)
        return await requests_left(app, "/item/a")

    assert run(main()) == 0
    assert failed
    assert not holders.in_hand


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("value", ["off", " OFF "])
def test_the_switch_makes_it_a_pass_through(
    api: str, value: str, monkeypatch: pytest.MonkeyPatch, log: List[str]
) -> None:
    """AIOHTTP_CYCLEBREAK=off: it leaks as it did, and the log says why."""
    monkeypatch.setenv("AIOHTTP_CYCLEBREAK", value)
    app = application()
    APIS[api](app)
    assert run(requests_left(app, *["/item/a"] * 5)) == 5
    (line,) = log
    assert "AIOHTTP_CYCLEBREAK=off" in line


def test_the_switch_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, log: List[str]
) -> None:
    """Each part says it once in a process, also in a handler that makes sessions."""
    monkeypatch.setenv("AIOHTTP_CYCLEBREAK", "off")

    async def main() -> None:
        runner = web.AppRunner(application())
        await runner.setup()
        for _ in range(3):
            setup(application())
            cyclebreak()
            break_cycles(refuse)
            client_cyclebreak()
            guard_server(runner)
        await runner.cleanup()

    run(main())
    assert log == [
        "AIOHTTP_CYCLEBREAK=off: requests are not guarded",
        "AIOHTTP_CYCLEBREAK=off: decorators change nothing",
        "AIOHTTP_CYCLEBREAK=off: outgoing calls are not followed",
        "AIOHTTP_CYCLEBREAK=off: the server is not guarded",
    ]


def test_the_switch_does_not_hide_a_wrong_option(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or it would show when the switch is turned on again."""
    monkeypatch.setenv("AIOHTTP_CYCLEBREAK", "off")
    with pytest.raises(TypeError, match="^keep must be"):
        cyclebreak(keep="no")  # type: ignore[arg-type]


def test_a_switch_in_no_known_position_is_reported(
    monkeypatch: pytest.MonkeyPatch, log: List[str]
) -> None:
    """Whoever is on call may have mistyped it."""
    monkeypatch.setenv("AIOHTTP_CYCLEBREAK", "of")
    app = application()
    setup(app)
    assert run(requests_left(app, "/item/a")) == 0
    assert "AIOHTTP_CYCLEBREAK=of is not understood" in log[0]


def test_several_guards_agree_on_the_most_careful() -> None:
    """Each tells once, be it the same function, and whoever wants to keep, keeps."""
    events: List[BreakEvent] = []
    tell = events.append
    held: List[BaseException] = []

    async def fail(request: web.Request) -> web.Response:
        secret = request.match_info["name"]
        raise (Kept if secret == "kept" else ValueError)(secret)

    async def main() -> None:
        app = application(fail)
        app.middlewares.append(cyclebreak(on_break=tell))
        setup(
            app,
            on_break=tell,
            keep=lambda request, exc: isinstance(exc, Kept),
        )
        await serve_and_hold(app, held, "/item/kept", "/item/cut")

    run(main())
    assert handler_locals(held[0])["secret"] == "kept"
    assert [event.exception for event in events] == [ValueError, ValueError]


@pytest.mark.parametrize("is_inner", [True, False])
@pytest.mark.parametrize("error", [ValueError, web.HTTPBadRequest])
def test_one_layer_with_an_option_is_asked_and_told(error: Any, is_inner: bool) -> None:
    """Though the other one has none, and would take the quick way."""
    asked: List[type] = []
    events: List[BreakEvent] = []

    async def fail(request: web.Request) -> web.Response:
        raise error

    def keep(request: web.Request, exc: BaseException) -> bool:
        asked.append(type(exc))
        return False

    async def main() -> None:
        app = application(fail)
        layers = [cyclebreak(), cyclebreak(keep=keep, on_break=events.append)]
        app.middlewares.extend(layers if is_inner else layers[::-1])
        async with serve(app) as service:
            await service.ask("/item/a")
            await service.settle()

    run(main())
    assert asked == [error]
    assert [event.exception for event in events] == [error]


@pytest.mark.parametrize("is_guarded", [False, True])
@pytest.mark.parametrize("option", ["keep", "clear_frames", "on_break"])
def test_the_options_of_a_clone_are_asked_of_its_original(
    option: str, is_guarded: bool
) -> None:
    """What an outer guard has seen is severed as an inner one is to, too."""
    events: List[BreakEvent] = []
    error = ValueError()
    options: Dict[str, Any] = {
        "keep": lambda request, exc: exc is error,
        "clear_frames": False,
        "on_break": events.append,
    }

    async def fail(request: web.Request) -> web.Response:
        secret = "is here"
        raise error if secret else AssertionError

    @web.middleware
    async def clone(request: web.Request, handler: Any) -> web.StreamResponse:
        return await handler(request.clone())  # type: ignore[no-any-return]

    async def main() -> None:
        app = application(fail)
        inner = cyclebreak(**{option: options[option]})
        layers = [cyclebreak(), clone, inner] if is_guarded else [clone]
        app.middlewares.extend(layers)
        async with serve(app) as service:
            assert (await service.ask("/item/a"))[0] == 500
            await service.settle()

    with no_collector():
        run(main())
    has_text = error.__traceback__ is not None
    assert has_text is (not is_guarded or option != "clear_frames")
    has_locals = has_text and "secret" in handler_locals(error)
    assert has_locals is (not is_guarded or option == "keep")
    told = [each.exception for each in events]
    assert told == [ValueError] * (is_guarded and option == "on_break")


@pytest.mark.parametrize("own", [{}, {"clear_frames": False}])
def test_what_one_clone_asks_for_is_no_matter_of_another(own: Dict[str, Any]) -> None:
    """Each is handled by an application's part that has options of its own."""
    errors = [ValueError(), ValueError()]

    async def fail(request: web.Request) -> web.Response:
        raise errors[int(request.headers["number"])]

    async def main() -> None:
        parts = [cyclebreak(**own), cyclebreak()]

        async def each(request: web.Request) -> web.Response:
            for number, part in enumerate(parts):
                clone = request.clone(headers={"number": str(number)})
                with contextlib.suppress(ValueError):
                    await part(clone, fail)
            raise web.HTTPBadGateway

        app = application(each)
        setup(app)
        async with serve(app) as service:
            assert (await service.ask("/item/a"))[0] == 502
            await service.settle()

    run(main())
    assert [each.__traceback__ is not None for each in errors] == [not own, True]


def test_nothing_of_ours_outlives_the_connections() -> None:
    """Also when the loop is closed under open connections."""

    async def main(close: bool) -> None:
        app = application()
        app.router.add_get("/ok", answer)
        setup(app)
        async with serve(app) as service:
            client = await service.connect()
            await client.get("/item/a")
            await client.answer()
            await client.get("/ok")
            await client.answer()
            if close:
                client.close()
                await service.settle()

    async def abandon() -> Any:
        app = application()
        setup(app)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        service = Service(runner, runner.addresses[0][1])
        client = await service.connect()
        await client.get("/item/a")
        await client.answer()
        return client

    run(main(close=True))
    run(main(close=False))
    loop = asyncio.new_event_loop()
    loop.run_until_complete(abandon()).close()
    loop.close()
    del loop
    gc.collect()
    assert not connections.followed_connections
    assert not holders.in_hand


def test_middlewares_work_with_mocked_requests() -> None:
    """Unit tests of applications call handlers without a server."""
    from aiohttp.test_utils import make_mocked_request

    middleware = cyclebreak()

    async def main() -> Any:
        with pytest.raises(web.HTTPBadRequest):
            await middleware(make_mocked_request("GET", "/"), refuse)
        return await middleware(make_mocked_request("GET", "/"), answer)

    assert run(main()).text == "ok"


def test_the_inner_end_is_there_only_for_what_lies_between() -> None:
    """Alone, the outer end sees all that the inner one would."""

    @web.middleware
    async def between(request: web.Request, handler: Any) -> web.StreamResponse:
        return await handler(request)  # type: ignore[no-any-return]

    async def layers(*middlewares: Any) -> int:
        app = web.Application()
        setup(app)
        app.middlewares.extend(middlewares)
        async with serve(app):
            return len(app.middlewares) - len(middlewares)

    assert run(layers()) == 1
    assert run(layers(between)) == 2
