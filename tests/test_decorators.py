"""break_cycles and keep_cycles: on functions, View classes and methods of one."""

import asyncio
import contextlib
import functools
import inspect
import traceback
from types import MethodType
from typing import Any, Dict, List

import pytest
from aiohttp import web
from aiohttp.abc import AbstractView

from aiohttp_cyclebreak import BreakEvent, break_cycles, keep_cycles, setup
from aiohttp_cyclebreak.holders import MOST_NOTED

from .service import alive, no_collector, run, serve

pytestmark = pytest.mark.usefixtures("few_objects")


async def refuse(request: web.Request) -> web.Response:
    """Refuse."""
    raise web.HTTPBadRequest(text="no")


class Refuse(web.View):
    """Refuse, as a class."""

    async def get(self) -> web.Response:
        """Refuse, as a method."""
        raise web.HTTPBadRequest(text="no")


class Handlers:
    async def refuse(self, request: web.Request) -> web.Response:
        raise web.HTTPBadRequest(text="no")


async def refuse_for(name: str, request: web.Request) -> web.Response:
    raise web.HTTPBadRequest(text=name)


async def nothing() -> None:
    pass


class Compiled:
    """What inspect sees of a function that mypyc or, before CPython 3.9, Cython made.

    It has a type and a mark of its own, and its code tells nothing true.
    """

    _is_coroutine = vars(asyncio.coroutines)["_is_coroutine"]
    __code__ = nothing.__code__
    __defaults__ = __kwdefaults__ = None
    __annotations__: Dict[str, Any] = {}

    def __init__(self, function: Any) -> None:
        self.__name__ = function.__name__
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


def by_name(handler: Any) -> Any:
    """As a decorator around ours may call it."""

    async def call(request: web.Request) -> web.StreamResponse:
        return await handler(request=request)  # type: ignore[no-any-return]

    return call


def targets(decorate: Any) -> Dict[str, Any]:
    """The same refusal, decorated in every way there is."""

    @decorate
    async def function(request: web.Request) -> web.Response:
        raise web.HTTPBadRequest(text="no")

    @decorate
    class View(Refuse):
        pass

    class WithMethod(web.View):
        @decorate
        async def get(self) -> web.Response:
            raise web.HTTPBadRequest(text="no")

    class WithHandler:
        @decorate
        async def refuse(self, request: web.Request) -> web.Response:
            raise web.HTTPBadRequest(text="no")

    return {
        "function": function,
        "View": View,
        "method of a View": WithMethod,
        "method of an object": WithHandler().refuse,
        "bound method": decorate(Handlers().refuse),
        "compiled": decorate(Compiled(refuse)),
        "compiled, bound": decorate(MethodType(Compiled(refuse_for), "no")),
        "partial": decorate(functools.partial(refuse_for, "no")),
        "request by name": by_name(decorate(refuse)),
    }


TARGETS = tuple(targets(lambda handler: handler))


async def requests_left(app: web.Application, handler: Any, requests: int = 5) -> int:
    app.router.add_route("*", "/", handler)
    with no_collector():
        before = len(alive())
        async with serve(app) as service:
            for _ in range(requests):
                assert await service.ask() == (400, "no")
            await service.settle()
            return len(alive()) - before


@pytest.mark.parametrize("target", TARGETS)
def test_undecorated_it_leaks(target: str) -> None:
    """Or the tests below would say nothing."""
    handler = targets(lambda handler: handler)[target]
    assert run(requests_left(web.Application(), handler)) == 5


@pytest.mark.parametrize("target", TARGETS)
def test_break_cycles_needs_no_middleware(target: str) -> None:
    """One route is guarded by its decorator alone."""
    assert run(requests_left(web.Application(), targets(break_cycles)[target])) == 0


@pytest.mark.parametrize("is_told", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_keep_cycles_opts_out_under_the_middleware(target: str, is_told: bool) -> None:
    """The route's exceptions are left as they are: its requests wait again."""
    app = web.Application()
    events: List[BreakEvent] = []
    setup(app, on_break=events.append if is_told else None)
    assert run(requests_left(app, targets(keep_cycles)[target])) == 5
    assert events == []


@pytest.mark.parametrize("target", TARGETS)
def test_break_cycles_under_the_middleware_does_the_work_once(target: str) -> None:
    """One event a request."""
    app = web.Application()
    events: List[BreakEvent] = []
    setup(app, on_break=events.append)
    assert run(requests_left(app, targets(break_cycles)[target], requests=3)) == 0
    assert len(events) == 3


def test_the_decorator_nearer_to_the_code_counts() -> None:
    """A View that opts out, but for one method."""

    @keep_cycles
    class View(web.View):
        @break_cycles
        async def get(self) -> web.Response:
            raise web.HTTPBadRequest(text="no")

    app = web.Application()
    setup(app)
    assert run(requests_left(app, View)) == 0


@pytest.mark.parametrize("decorate", [break_cycles, keep_cycles])
def test_name_signature_and_docstring_survive(decorate: Any) -> None:
    """For documentation, for routers that look at them, and for readers of logs."""
    decorated = decorate(refuse)
    assert decorated.__name__ == "refuse"
    assert decorated.__doc__ == "Refuse."
    assert inspect.signature(decorated) == inspect.signature(refuse)
    assert inspect.iscoroutinefunction(decorated)

    class View(Refuse):
        """A class of its own."""

    assert decorate(View) is View
    assert View.__doc__ == "A class of its own."
    assert View.__await__.__name__ == "__await__"
    method = decorate(Refuse.get)
    assert (method.__name__, method.__doc__) == ("get", "Refuse, as a method.")


def plain(request: web.Request) -> web.Response:
    return web.Response()


async def generator(request: web.Request) -> Any:
    yield web.Response()


@pytest.mark.parametrize("decorate", [break_cycles, keep_cycles])
@pytest.mark.parametrize(
    "wrong", [plain, generator, Handlers, Handlers(), None, "handler", refuse_for]
)
def test_anything_else_is_a_type_error_at_import(decorate: Any, wrong: Any) -> None:
    """The message names the decorator and what it was put on."""
    if wrong is refuse_for:
        wrong = staticmethod(refuse)  # a descriptor, not a function
        if callable(wrong) and inspect.iscoroutinefunction(wrong):
            pytest.skip("staticmethod objects are functions on this Python")
    with pytest.raises(TypeError, match=f"^@{decorate.__name__}"):
        decorate(wrong)


def test_a_decorated_function_can_be_called_without_a_request() -> None:
    """It is not always called by aiohttp."""

    @break_cycles
    async def add(one: int, other: int) -> int:
        return one + other

    async def main() -> int:
        return await add(1, 2)

    assert run(main()) == 3


def test_a_decorated_function_that_fails_in_the_loop_of_another_thread() -> None:
    """Nothing is asked of the request's loop from there: in debug mode that raises."""

    @break_cycles
    async def fail(request: web.Request) -> None:
        raise ValueError

    async def handle(request: web.Request) -> web.Response:
        loop = asyncio.get_running_loop()
        loop.set_debug(True)
        with contextlib.suppress(ValueError):
            await fail(request)
        await asyncio.sleep(0)
        with contextlib.suppress(ValueError):
            await loop.run_in_executor(None, asyncio.run, fail(request))
        return web.Response(text="ok")

    async def main() -> None:
        app = web.Application()
        app.router.add_get("/", handle)
        async with serve(app) as service:
            assert await service.ask() == (200, "ok")

    run(main())


@pytest.mark.parametrize("decorate", [break_cycles, keep_cycles])
def test_the_switch_leaves_handlers_as_they_are(
    decorate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AIOHTTP_CYCLEBREAK=off: nothing is wrapped, wrong use still fails."""
    monkeypatch.setenv("AIOHTTP_CYCLEBREAK", "off")
    assert decorate(refuse) is refuse

    @decorate
    class View(Refuse):
        pass

    assert View.__await__ is Refuse.__await__
    with pytest.raises(TypeError):
        decorate(plain)


async def without_request(*, name: str = "") -> web.Response:
    return web.Response()


@pytest.mark.parametrize("decorate", [break_cycles, keep_cycles])
@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (web.View, "for all who use it"),
        (AbstractView, "for all who use it"),
        (without_request, "takes no request"),
    ],
)
def test_what_is_not_ones_own_handler(
    decorate: Any, handler: Any, message: str
) -> None:
    """It would do nothing, or to every view of the process."""
    with pytest.raises(TypeError, match=message):
        decorate(handler)


@web.middleware
async def clone(request: web.Request, handler: Any) -> web.StreamResponse:
    """Hand on a copy, as aiohttp-remotes does."""
    return await handler(request.clone())  # type: ignore[no-any-return]


async def answer_500(handler: Any, *middlewares: Any) -> None:
    app = web.Application(middlewares=middlewares)
    app.router.add_get("/", handler)
    setup(app)
    async with serve(app) as service:
        assert (await service.ask())[0] == 500
        await service.settle()


def test_break_cycles_is_of_the_clone_alone() -> None:
    """A handler that is left alone calls one that is not, with a clone."""
    kept: List[BaseException] = []

    @break_cycles
    async def inner(request: web.Request) -> web.Response:
        return web.Response()

    @keep_cycles
    async def outer(request: web.Request) -> web.Response:
        marker = "audit"
        await inner(request.clone())
        kept.append(LookupError(marker))
        raise kept[-1]

    run(answer_500(outer))
    frames = [frame for frame, _ in traceback.walk_tb(kept.pop().__traceback__)]
    assert any("marker" in frame.f_locals for frame in frames)


@pytest.mark.parametrize("keeps", [True, False])
def test_very_many_clones_that_opt_in_are_followed_as_one_that_opts_out(
    keeps: bool,
) -> None:
    """It is left alone still."""
    kept: List[BaseException] = []

    @break_cycles
    async def inner(request: web.Request) -> web.Response:
        return web.Response()

    async def outer(request: web.Request) -> web.Response:
        marker = "audit"
        for _ in range(MOST_NOTED + 1):
            await inner(request.clone())
        kept.append(LookupError(marker))
        raise kept[-1]

    run(answer_500(keep_cycles(outer) if keeps else outer))
    frames = [frame for frame, _ in traceback.walk_tb(kept.pop().__traceback__)]
    assert ("marker" in frames[-1].f_locals) is keeps


@pytest.mark.parametrize("keeps", [True, False])
def test_keep_cycles_is_of_the_request_that_was_cloned_too(keeps: bool) -> None:
    """The outer layers see that one, and would sever what its handler raised."""
    kept: List[BaseException] = []

    async def fail(request: web.Request) -> web.Response:
        marker = "audit"
        raise LookupError(marker)

    @web.middleware
    async def report(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            return await handler(request)  # type: ignore[no-any-return]
        except LookupError as exc:
            kept.append(exc)
            raise

    run(answer_500(keep_cycles(fail) if keeps else fail, report, clone))
    frames = [frame for frame, _ in traceback.walk_tb(kept.pop().__traceback__)]
    assert ("marker" in frames[-1].f_locals) is keeps


def test_keep_cycles_is_of_no_later_request() -> None:
    """A task hands an earlier one to such a handler while the next one is served."""
    caught: List[BaseException] = []
    tasks: List[Any] = []

    @keep_cycles
    async def audit(request: web.Request) -> web.Response:
        return web.Response()

    async def main() -> None:
        go = asyncio.Event()

        async def work(request: web.Request) -> None:
            await go.wait()
            await audit(request)

        async def begin(request: web.Request) -> web.Response:
            tasks.append(asyncio.ensure_future(work(request)))
            return web.Response()

        async def fail(request: web.Request) -> web.Response:
            marker = "local"
            go.set()
            await tasks[0]
            caught.append(LookupError(marker))
            raise caught[0]

        app = web.Application()
        app.router.add_get("/", begin)
        app.router.add_get("/fail", fail)
        setup(app)
        async with serve(app) as service:
            client = await service.connect()
            for path, status in (("/", 200), ("/fail", 500)):
                await client.get(path)
                assert (await client.answer())[0] == status
            client.close()
            await service.settle()

    run(main())
    frames = [frame for frame, _ in traceback.walk_tb(caught[0].__traceback__)]
    assert "marker" not in frames[-1].f_locals
