"""What objects are called: each kind of object, and each way to hold one."""

import asyncio
import contextlib
import functools
import sys
import threading
from types import FrameType, ModuleType, SimpleNamespace
from typing import Any, AsyncIterator, Callable, Iterator

import pytest

from aiohttp_cyclebreak.naming import described, how_held

from .service import run

HERE = __name__


class Target:
    """What is held."""

    link: Any = None

    def method(self) -> Any:
        return self.link


class Slotted:
    """It has no dict, and one of its slots is empty."""

    __slots__ = ("empty", "full")


class Held(Exception):
    """What is handled."""


def function() -> FrameType:
    return sys._getframe(1)


def over(target: Target) -> Callable[[], Target]:
    return lambda: target


def generator(target: Any) -> Iterator[Any]:
    yield target


async def wait_for(awaitable: Any) -> Any:
    return await awaitable


async def handle(error: Exception, until: "asyncio.Future[None]") -> None:
    with contextlib.suppress(Held):
        try:
            raise error
        except Held:
            del error
            await until


@pytest.fixture
def target() -> Target:
    return Target()


def test_containers(target: Target) -> None:
    """A place in a row has its index, one in a dict never its key."""
    assert how_held([None, target], target) == "index 1"
    assert how_held((target,), target) == "index 0"
    assert how_held({"secret": target}, target) == "value of a key of type str"
    assert how_held({target: "secret"}, target) == "key"
    assert how_held({}, target) == "holds"
    assert how_held({target}, target) == "holds"


def test_objects(target: Target) -> None:
    """An attribute has its name, wherever the object has it."""
    holder = Target()
    holder.link = target
    assert how_held(holder, target) == "attribute 'link'"
    assert how_held(holder, vars(holder)) == "attributes"
    slotted = Slotted()
    slotted.full = target
    assert how_held(slotted, target) == "attribute 'full'"
    assert how_held(slotted, holder) == "holds"
    assert how_held(target.method, target) == "__self__"
    assert how_held(target.method, Target.method) == "__func__"
    assert how_held(functools.partial(function), target) == "holds"


def test_functions(target: Target) -> None:
    """What a function holds beside what its variables do."""

    def keeps(first: Any = target, *, second: Any = target) -> None: ...

    assert how_held(keeps, keeps.__defaults__) == "__defaults__"
    assert how_held(keeps, keeps.__kwdefaults__) == "__kwdefaults__"
    assert how_held(keeps, keeps.__globals__) == "__globals__"
    wrapper = functools.wraps(keeps)(lambda: None)
    assert how_held(wrapper, keeps) == "__wrapped__"
    assert how_held(keeps, target) == "holds"
    inner = over(target)
    closure: Any = inner.__closure__
    assert how_held(inner, closure) == "closure over 'target'"
    assert how_held(closure, closure[0]) == "closure"
    assert how_held(closure[0], target) == "closure cell"


def test_frames(target: Target) -> None:
    """A variable has its name, be it in a cell; there may be none to tell."""
    frame = function()
    assert how_held(frame, target) == "local variable 'target'"
    # Not in the assertion: pytest would give both a variable.
    found = map(functools.partial(how_held, frame), (frame.f_back, Target()))
    assert list(found) == ["f_back", "temporary value"]

    def closes(value: Any) -> Any:
        def inner() -> Any:
            return value, later

        own = function()
        cells: Any = inner.__closure__
        found = set(map(functools.partial(how_held, own), cells))
        del own
        later = None
        return found

    assert closes(target) == {"local variable 'value'", "temporary value"}


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="f_locals is no dict there")
def test_a_frame_of_another_thread_is_not_read(target: Target) -> None:
    """Whether that thread is traced is not known."""
    frames, begun, over = [], threading.Event(), threading.Event()

    def work(held: Any) -> None:
        frames.append(function())
        begun.set()
        over.wait()

    thread = threading.Thread(target=work, args=(target,))
    thread.start()
    begun.wait()
    try:
        assert how_held(frames[0], target) == "local variable"
    finally:
        over.set()
        thread.join()
    assert how_held(frames.pop(), target) == "local variable 'held'"


def test_what_is_suspended(target: Target) -> None:
    """A coroutine holds what it awaits and handles, and its variables."""

    async def main() -> None:
        until = asyncio.get_running_loop().create_future()
        error = Held()
        handling = handle(error, until)
        waiting = wait_for(handling)
        task = asyncio.ensure_future(waiting)
        await asyncio.sleep(0)
        assert how_held(waiting, waiting.cr_frame) == "frame"
        assert how_held(waiting, handling) == "awaits"
        assert how_held(handling, error) == "exception in hand"
        until.set_result(None)
        await task
        assert how_held(waiting, target) == "exception in hand"

    run(main())
    generated = generator(target)
    assert how_held(generated, target) == "local variable 'target'"


def test_kinds_of_objects(target: Target) -> None:
    """What has code says where, and nothing says a value."""
    assert described(target, {}) == (f"{HERE}.Target", None, None)
    assert described(Target, {}) == (f"class {HERE}.Target", None, None)
    assert described(ModuleType("secret"), {})[0] == "module"
    assert described(target, {id(target): HERE}) == (f"module {HERE}", None, None)
    assert described("secret", {}) == ("str", None, None)
    assert described(SimpleNamespace(a=1), {})[0] == "types.SimpleNamespace"
    assert described(target.method, {}) == ("method Target.method", None, None)
    of_c: Any = MethodOfPartial
    assert described(of_c, {}) == ("method functools.partial", None, None)
    line = function.__code__.co_firstlineno
    assert described(function, {}) == ("function function", __file__, line)
    try:
        raise Held
    except Held as exc:
        assert described(exc.__traceback__, {}) == ("traceback", None, None)
    frame = function()
    name, file, at = described(frame, {})
    assert (name.endswith("test_kinds_of_objects"), file) == (True, __file__)
    assert at is not None
    assert at > frame.f_code.co_firstlineno


MethodOfPartial = type(Target().method)(functools.partial(function), Target())


def test_kinds_of_what_is_suspended() -> None:
    """It says where it waits, and where its function is once it is over."""
    generated = generator(None)
    first = generator.__code__.co_firstlineno
    assert next(generated) is None
    assert described(generated, {}) == ("generator generator", __file__, first + 1)
    assert next(generated, SimpleNamespace) is SimpleNamespace
    assert described(generated, {}) == ("generator generator", __file__, first)

    async def stream() -> AsyncIterator[None]:
        yield

    name, file, _ = described(stream(), {})
    assert name.startswith("async_generator test_kinds")
    assert file == __file__
    coroutine = wait_for(None)
    assert described(coroutine, {})[0] == "coroutine wait_for"
    coroutine.close()
