"""Exceptions, options and locals that fight back, out of the handler of a server."""

import asyncio
import contextlib
import gc
import logging
import sys
import traceback
from typing import Any, Callable, Dict, List, Optional, Tuple, Type

import pytest
from aiohttp import web

from aiohttp_cyclebreak import cyclebreak, guard_server, setup
from aiohttp_cyclebreak.exceptions import frames_of
from aiohttp_cyclebreak.sever import sever

from .service import idle, run, serve, start
from .test_hostile_clients import new_objects, until
from .test_sever import Hostile

pytestmark = pytest.mark.usefixtures("few_objects")

if sys.version_info >= (3, 11):
    from builtins import BaseExceptionGroup, ExceptionGroup
else:
    from exceptiongroup import BaseExceptionGroup, ExceptionGroup

VISITS = 3
Guard = Callable[[web.Application], Any]
GUARDS: Dict[str, Guard] = {
    "appended": lambda app: app.middlewares.append(cyclebreak()),
    "setup": setup,
    "without clearing": lambda app: setup(app, clear_frames=False),
    "with on_break": lambda app: setup(app, on_break=lambda event: None),
}


def bare(app: web.Application) -> None:
    pass


# Each of these makes an exception, inside a handler that then raises it.


def hostile_chain() -> BaseException:
    exc = Hostile()
    try:
        try:
            raise Hostile
        except Hostile:
            raise exc  # noqa: B904  # its context is what is wanted
    except Hostile:
        return exc


class Frozen(Exception):
    """As a frozen dataclass is: not even the interpreter's own names can be set."""

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"cannot delete field {name!r}")


class OwnAttributes(dict):  # type: ignore[type-arg]
    """A ``__dict__`` that answers nothing to Python code."""

    def _refuse(self, *args: Any) -> Any:
        raise RuntimeError("none of your business")

    get = pop = setdefault = update = items = values = keys = _refuse
    __getitem__ = __setitem__ = __delitem__ = __contains__ = __iter__ = _refuse


def with_its_own_attributes() -> BaseException:
    exc = ValueError("its own attributes")
    exc.__dict__ = OwnAttributes()
    return exc


class Falsy(Exception):
    def __bool__(self) -> bool:
        raise RuntimeError("neither true nor false")

    def __len__(self) -> int:
        raise RuntimeError("of no length")


class Liar(Exception):
    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        raise RuntimeError("guess")


class Evasive(Exception):
    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError("nothing here")


def no_group() -> BaseException:
    exc: Any = ValueError("no group")
    exc.exceptions = [object(), Hostile()]
    return exc  # type: ignore[no-any-return]


class Hiding(BaseExceptionGroup):  # type: ignore[type-arg]
    @property
    def exceptions(self) -> Any:  # type: ignore[override]
        raise RuntimeError("no members")


def hiding_group() -> BaseException:
    return Hiding("hiding", [Hostile(), KeyError("member")])


def nested_groups() -> BaseException:
    exc: BaseException = ValueError("innermost")
    for _ in range(1000):
        exc = BaseExceptionGroup("one deeper", [exc])
    return exc


def looping_chain() -> BaseException:
    first, second, third = ValueError("1"), ValueError("2"), ValueError("3")
    first.__cause__, second.__cause__, third.__cause__ = second, third, first
    return first


def looping_group() -> BaseException:
    member = ValueError("member")
    group = ExceptionGroup("group", [member, ValueError("other")])
    member.__cause__ = group
    return group


class Custom(BaseException):
    pass


MAKERS: Dict[str, Callable[[], BaseException]] = {
    f.__name__: f
    for f in (
        Hostile,
        hostile_chain,
        Frozen,
        with_its_own_attributes,
        Falsy,
        Liar,
        Evasive,
        no_group,
        hiding_group,
        nested_groups,
        looping_chain,
        looping_group,
    )
}


@pytest.fixture
def _not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither bare nor guarded can logging format most of these."""
    monkeypatch.setattr(logging, "raiseExceptions", False)


async def ask_and_count(
    handler: Any, guard_app: Guard, *headers: str
) -> Tuple[List[Any], int]:
    """Ask for it; say what was answered, and how many requests are left."""
    app = web.Application()
    app.router.add_get("/", handler)
    app.router.add_get("/ok", ok)
    guard_app(app)
    answers: List[Any] = []
    async with serve(app) as service:
        other = await service.connect()
        with new_objects() as count:
            for _ in range(VISITS):
                try:
                    answers.append(await service.ask("/", *headers))
                except ConnectionError as exc:
                    answers.append(str(exc))
                await other.get("/ok")
                assert await other.answer() == (200, "ok")
            other.close()
            await service.settle()
            left = count()[web.BaseRequest]
    return answers, left


async def ok(request: web.Request) -> web.Response:
    return web.Response(text="ok")


def raising(make: Callable[[], BaseException], translated: bool) -> Any:
    """A handler that keeps what it raises, or raises an answer from it."""

    async def handler(request: web.Request) -> web.Response:
        kept = make()
        if translated:
            try:
                raise kept
            except BaseException as exc:
                raise web.HTTPBadGateway(text="translated") from exc
        raise kept

    return handler


@pytest.mark.usefixtures("_not_printed")
@pytest.mark.parametrize("translated", [False, True])
@pytest.mark.parametrize("make", MAKERS)
def test_an_exception_that_fights_back(make: str, translated: bool) -> None:
    """It is answered as it is bare, and severed all the same."""
    handler = raising(MAKERS[make], translated)
    answers, left = run(ask_and_count(handler, bare))
    assert left >= VISITS
    # Under any middleware aiohttp 3.8 answers where it hangs up without one.
    below, _ = run(ask_and_count(handler, lambda app: app.middlewares.append(idle)))
    for name, guard_app in GUARDS.items():
        guarded, left = run(ask_and_count(handler, guard_app))
        assert guarded in (answers, below)
        # Without clearing, the local and what it leads to keep each other.
        assert left == 0 or name == "without clearing"


@pytest.mark.usefixtures("_not_printed")
@pytest.mark.parametrize("guard_app", ["appended", "setup"])
@pytest.mark.parametrize("connection", ["keep-alive", "close"])
def test_an_answer_that_the_handler_holds(connection: str, guard_app: str) -> None:
    """Whether aiohttp's connection still has it or not: references are counted."""

    async def handler(request: web.Request) -> web.Response:
        kept = web.HTTPConflict(text="held")
        raise kept

    header = f"Connection: {connection}"
    answers, left = run(ask_and_count(handler, bare, header))
    assert answers == [(409, "held")] * VISITS
    assert left >= VISITS
    assert run(ask_and_count(handler, GUARDS[guard_app], header)) == (answers, 0)


@pytest.mark.parametrize("length", [1_000, 20_000])
def test_a_chain_of_20_000_links_out_of_a_handler(length: int) -> None:
    """No recursion, on the way of a request either."""
    chains: List[List[BaseException]] = []

    async def handler(request: web.Request) -> web.Response:
        chain: List[BaseException] = [ValueError(number) for number in range(length)]
        for exc, following in zip(chain, chain[1:]):
            exc.__cause__ = following
        chains.append(chain)  # CPython frees a long chain by recursion
        raise web.HTTPBadGateway(text="long") from chain[0]

    answers, left = run(ask_and_count(handler, setup))
    assert (answers, left) == ([(502, "long")] * VISITS, 0)
    for chain in chains:
        while chain:
            chain.pop()


def test_a_traceback_900_frames_deep_out_of_a_handler() -> None:
    """All of it can be printed by who holds the exception; nothing is left."""
    held: List[BaseException] = []

    def fall(depth: int) -> None:
        if depth:
            fall(depth - 1)
        raise ValueError("at the bottom")

    async def handler(request: web.Request) -> web.Response:
        try:
            fall(900)
        except ValueError as exc:
            held.append(exc)
            raise
        return web.Response()

    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + 1000)
    try:
        answers, left = run(ask_and_count(handler, setup))
    finally:
        sys.setrecursionlimit(limit)
    assert [status for status, _ in answers] == [500] * VISITS
    assert left == 0
    names = [each.name for each in traceback.extract_tb(held[0].__traceback__)]
    assert names.count("fall") == 901


@pytest.mark.parametrize("guard_app", GUARDS)
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("error", [Custom, asyncio.CancelledError])
def test_a_base_exception_out_of_a_handler(
    error: Type[BaseException], kept: bool, guard_app: str
) -> None:
    """Aiohttp answers nothing; the connection ends, bare as guarded."""

    async def handler(request: web.Request) -> web.Response:
        exc = error("out")
        if kept:
            request["error"] = exc
        raise exc

    answers, left = run(ask_and_count(handler, bare))
    assert left >= VISITS
    guarded, left = run(ask_and_count(handler, GUARDS[guard_app]))
    assert guarded == answers
    if guard_app != "without clearing":
        assert left == 0


@pytest.mark.parametrize("guard_app", ["appended", "setup"])
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_the_end_of_the_process_out_of_a_handler(
    error: Type[BaseException], guard_app: str
) -> None:
    """It comes out of the event loop as bare; what runs after it cleans up as ever."""
    raised = end_the_process(error, error, bare)
    # Out of a task that was started eagerly, from CPython 3.12 on, it comes in the
    # middle of the connection's own, and 3.12 loses it there.
    assert raised is error or sys.version_info >= (3, 12)
    assert end_the_process(error, error, GUARDS[guard_app]) is raised


@pytest.mark.parametrize("option", ["keep", "on_break"])
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_the_end_of_the_process_out_of_a_callback(
    error: Type[BaseException], option: str
) -> None:
    """It is no failure to be logged: it comes out of the event loop as well."""
    ended: List[bool] = []

    def end(*args: Any) -> bool:
        if ended:
            return False
        ended.append(True)
        raise error

    def guard_app(app: web.Application) -> None:
        options: Any = {option: end}
        setup(app, **options)

    assert end_the_process(error, ValueError, guard_app) is error


def end_the_process(
    error: Type[BaseException], raised_there: Type[BaseException], guard_app: Any
) -> Optional[type]:
    async def handler(request: web.Request) -> web.Response:
        exc = raised_there("out")
        raise exc

    app = web.Application()
    app.router.add_get("/", handler)
    guard_app(app)
    service: Any = None
    client: Any = None
    stack: Any = serve(app)

    async def start() -> None:
        nonlocal service, client
        service = await stack.__aenter__()
        client = await service.connect()

    async def ask() -> None:
        await client.get("/")
        await client.answer()

    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(start())
        asking = loop.create_task(ask())
        raised = None
        try:
            loop.run_until_complete(asking)
        except BaseException as exc:
            raised = type(exc)
        asking.cancel()
        client.close()
        for _ in range(2):  # the connection's task may raise it once more
            with contextlib.suppress(error):
                loop.run_until_complete(
                    until(lambda: not service.runner.server.connections)
                )
        loop.run_until_complete(stack.__aexit__(None, None, None))
    finally:
        asyncio.set_event_loop(None)
        loop.close()
    return raised


# Locals of a handler, and frames that are no function's.


class Unhashable(type):
    def __hash__(cls) -> int:
        raise RuntimeError("no hash")

    def __eq__(cls, other: object) -> bool:
        raise RuntimeError("no equal")


class Strange(metaclass=Unhashable):
    """Not even its class can be compared."""


class Unequal:
    """As an array is: comparing it gives no truth."""

    def __eq__(self, other: object) -> bool:
        raise ValueError("the truth value is ambiguous")

    __hash__ = None  # type: ignore[assignment]


class Namespace(dict):  # type: ignore[type-arg]
    """Where a class body or ``exec()`` puts its names."""

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no equal")

    def __delitem__(self, key: Any) -> None:
        raise RuntimeError("no deletion")

    def values(self) -> Any:
        raise RuntimeError("no values")

    __hash__ = None  # type: ignore[assignment]


class Prepared(type):
    @classmethod
    def __prepare__(cls, *args: Any) -> Any:
        return Namespace()


def fail_in_class_body(request: web.Request) -> None:
    class Body(metaclass=Prepared):
        here = request

        def method(self) -> Any:
            return __class__  # type: ignore[name-defined]

        raise ValueError("in a class body")


def fail_in_exec(request: web.Request) -> None:
    exec("here = request\nraise ValueError", {"request": request}, Namespace())


def fail_in_module(request: web.Request) -> None:
    exec(compile("raise ValueError", "<module>", "exec"), {"request": request})


def fail_beside_strange_locals(request: web.Request) -> None:
    strange, unequal = Strange(), Unequal()
    raise ValueError((strange, unequal))


def fail_with_strange_finalizer(request: web.Request) -> None:
    class Finalized:
        def __del__(self) -> None:
            gc.collect()
            raise RuntimeError("in a finalizer")

    local = Finalized()
    raise ValueError(local is request)


FAILURES = {
    f.__name__: f
    for f in (
        fail_in_class_body,
        fail_in_exec,
        fail_in_module,
        fail_beside_strange_locals,
        fail_with_strange_finalizer,
    )
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("upgrade", [False, True])
@pytest.mark.parametrize("failure", FAILURES)
def test_frames_and_locals_that_fight_back(
    failure: str, upgrade: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any client can send the header by which a websocket's handler is known."""
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)

    async def handler(request: web.Request) -> web.Response:
        try:
            FAILURES[failure](request)
        except ValueError as exc:
            kept = exc  # noqa: F841
            raise
        return web.Response()

    headers = ["Upgrade: h2c"] if upgrade else []
    answers, left = run(ask_and_count(handler, bare, *headers))
    assert left >= VISITS
    assert [status for status, _ in answers] == [500] * VISITS
    assert run(ask_and_count(handler, setup, *headers)) == (answers, 0)


# Options whose objects fight back, and callbacks that raise what is no Exception.


class Incomparable:
    def __call__(self, *args: Any) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no equal")

    __hash__ = None  # type: ignore[assignment]


class Failing:
    def __init__(self, error: Type[BaseException]) -> None:
        self.error = error

    def __call__(self, *args: Any) -> bool:
        raise self.error


class Unprintable(Failing):
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


async def keep_local(request: web.Request) -> web.Response:
    kept = web.HTTPBadRequest(text="no")
    raise kept


@pytest.mark.parametrize("option", ["keep", "on_break"])
def test_options_are_not_compared(option: str) -> None:
    """Two layers of the middleware, with options of different objects."""

    def guard_app(app: web.Application) -> None:
        options: Dict[str, Any] = {option: Incomparable()}
        app.middlewares.append(cyclebreak(**options))
        app.middlewares.append(cyclebreak())

    assert run(ask_and_count(keep_local, guard_app))[1] == 0


@pytest.mark.expects_complaint
@pytest.mark.parametrize("error", [ValueError, asyncio.CancelledError, Custom])
@pytest.mark.parametrize("option", ["keep", "on_break"])
@pytest.mark.parametrize("callback", [Failing, Unprintable])
def test_a_callback_that_raises(
    callback: Type[Failing], option: str, error: Type[BaseException]
) -> None:
    """It is logged once that *it* failed; with on_break nothing is left all the same.

    ``task.exception()`` of a task that was cancelled raises CancelledError.
    """
    logged: List[str] = []
    logger = logging.getLogger("aiohttp_cyclebreak")
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    options: Dict[str, Any] = {option: callback(error)}
    try:
        answers, left = run(
            ask_and_count(keep_local, lambda app: setup(app, **options))
        )
    finally:
        logger.removeHandler(handler)
    assert answers == [(400, "no")] * VISITS
    assert len(logged) == 1
    assert logged[0].startswith(option)
    if option == "on_break":
        assert left == 0


@pytest.mark.expects_complaint
@pytest.mark.parametrize("option", ["keep", "on_break"])
def test_a_log_handler_that_raises(option: str) -> None:
    """It fails when the library logs; the event loop has nothing to log for that."""
    unhandled: List[Any] = []
    logger = logging.getLogger("aiohttp_cyclebreak")
    handler = logging.Handler()
    handler.emit = Failing(OSError)  # type: ignore[method-assign, assignment]
    options: Dict[str, Any] = {option: Failing(ValueError)}

    async def main() -> Tuple[List[Any], int]:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: unhandled.append(context))
        return await ask_and_count(
            keep_local, lambda app: app.middlewares.append(cyclebreak(**options))
        )

    logger.addHandler(handler)
    logger.propagate = False
    try:
        answers, left = run(main())
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
    assert answers == [(400, "no")] * VISITS
    assert not unhandled
    assert left == (VISITS if option == "keep" else 0)  # one that fails keeps


# Before, a recursion that is too deep in the middle of another one ends the process.
@pytest.mark.skipif(sys.version_info < (3, 11), reason="it may be fatal")
@pytest.mark.expects_complaint
def test_an_answer_at_the_edge_of_the_stack() -> None:
    """Where bare the answer is given, there is not enough left to follow the request.

    The first middleware has more.
    """
    limit = sys.getrecursionlimit()

    @web.middleware
    async def resets(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            return await handler(request)  # type: ignore[no-any-return]
        finally:
            sys.setrecursionlimit(limit)

    async def refuse(request: web.Request) -> web.Response:
        answer = web.HTTPBadRequest()
        frame, depth = sys._getframe(), 0
        while frame.f_back is not None:
            frame, depth = frame.f_back, depth + 1
        sys.setrecursionlimit(depth + int(request.match_info["left"]))
        raise answer

    async def main(middleware: Any) -> List[int]:
        app = web.Application(middlewares=[resets, middleware])
        app.router.add_get("/{left}", refuse)
        async with serve(app) as service:
            paths = [f"/{left}" for left in range(2, 30)]
            # From CPython 3.12 on what has run a few times takes less of the stack.
            return [(await service.ask(path))[0] for path in 5 * paths]

    bare = run(main(idle))
    assert 400 in bare
    guarded = run(main(cyclebreak()))
    assert (400, 500) not in zip(bare, guarded)


@pytest.mark.parametrize("on_break", [None, lambda event: None])
def test_a_router_that_raises(on_break: Any) -> None:
    """Then a request has no match info, and a server that is guarded copes."""

    class Broken(web.PlainResource):
        async def resolve(self, request: web.Request) -> Any:
            raise ValueError("while routing")

    async def main() -> Tuple[List[int], int]:
        app = web.Application()
        app.router.register_resource(Broken("/broken"))
        runner = web.AppRunner(app)
        await runner.setup()
        guard_server(runner, on_break=on_break)
        service = await start(runner)
        with new_objects() as count:
            statuses = [(await service.ask("/broken"))[0] for _ in range(VISITS)]
            await service.settle()
            left = count()[web.BaseRequest]
        await runner.cleanup()
        return statuses, left

    assert run(main()) == ([500] * VISITS, 0)


# One instance, raised again and again.


def test_what_an_exception_says_of_itself_stays() -> None:
    """An application that answers with its attributes answers the same each time."""

    class ApplicationError(Exception):
        pass

    instance: Any = ApplicationError()
    instance.code = 17

    @web.middleware
    async def describe(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            return await handler(request)  # type: ignore[no-any-return]
        except ApplicationError as exc:
            return web.json_response(vars(exc))

    async def handler(request: web.Request) -> web.Response:
        raise instance

    def guard_app(app: web.Application) -> None:
        app.middlewares.append(describe)
        setup(app)

    answers, left = run(ask_and_count(handler, guard_app))
    assert answers == [(200, '{"code": 17}')] * VISITS
    assert left == 0


def test_an_instance_raised_again_says_where_it_was_raised_first() -> None:
    """A circuit breaker raises the failure again that opened it; each is logged."""
    failure: List[OSError] = []
    logged: List[List[str]] = []

    def call_upstream() -> None:
        raise OSError("down")

    @web.middleware
    async def log(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            return await handler(request)  # type: ignore[no-any-return]
        except OSError as exc:
            entries = traceback.extract_tb(exc.__traceback__)
            logged.append([entry.name for entry in entries])
            raise

    async def handler(request: web.Request) -> web.Response:
        if failure:
            raise failure[0]
        try:
            call_upstream()
        except OSError as exc:
            failure.append(exc)
            raise
        return web.Response()

    def guard_app(app: web.Application) -> None:
        app.middlewares.append(log)
        setup(app)

    for _ in range(2):
        assert run(ask_and_count(handler, guard_app))[1] == 0
    assert len(logged) == 2 * VISITS
    assert {names[-1] for names in logged} == {"call_upstream"}
    # That of its first time, of its last, and of this one.
    assert max(names.count("handler") for names in logged) == 3


def test_an_instance_raised_without_its_old_traceback_keeps_all_of_the_new() -> None:
    """Old entries are known by what they are, not by where in memory they were."""
    instance = LookupError("one for all")

    def fall(depth: int) -> None:
        if depth:
            fall(depth - 1)
        else:
            raise instance.with_traceback(None)

    lost = 0
    for number in range(500):
        depth = number * 7 % 6
        try:
            fall(depth)
        except LookupError:
            pass
        sever([instance])
        names = [each.name for each in traceback.extract_tb(instance.__traceback__)]
        lost += names.count("fall") != depth + 1
    assert lost == 0


def test_a_kept_exception_that_shares_a_traceback_keeps_it() -> None:
    """``raise Other().with_traceback(exc.__traceback__)``, and only the other kept."""
    instance = LookupError("one for all")

    class Kept(Exception):
        pass

    held: List[Kept] = []
    texts: List[List[str]] = []

    async def handler(request: web.Request) -> web.Response:
        try:
            raise instance
        except LookupError as exc:
            kept = Kept().with_traceback(exc.__traceback__)
        held.append(kept)
        texts.append(traceback.format_tb(kept.__traceback__))
        request["kept"] = kept
        raise instance

    def keep(request: web.Request, exc: BaseException) -> bool:
        return isinstance(exc, Kept)

    run(ask_and_count(handler, lambda app: setup(app, keep=keep)))
    assert [traceback.format_tb(kept.__traceback__) for kept in held] == texts
    for kept in held:
        (frame, *_) = frames_of(kept)
        assert "request" in frame.f_locals
