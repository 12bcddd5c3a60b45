"""What objects are called: each kind of object, and each way to hold one."""

import asyncio
import contextlib
import functools
import sys
import threading
from types import FrameType, ModuleType, SimpleNamespace
from typing import Any, AsyncIterator, Callable, Iterator, Set

import pytest

from aiohttp_cyclebreak.naming import (
    attribute_name,
    described,
    global_name,
    how_held,
    is_dict_of,
    is_of,
    values_of,
    variables_of,
)

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


class Static:
    """Only a static method names its attribute."""

    @staticmethod
    def method(other: Any) -> Any:
        return other.named_by_a_static_method


class Loops:
    """It is found in itself."""


Loops.itself = Loops  # type: ignore[attr-defined]


class Hostile:
    """An attribute's name, for it can be the key of a dict, that is no string."""

    def __hash__(self) -> int:
        if sys._getframe(1).f_globals is not globals():
            raise RuntimeError("not mine")
        return 1


class OddDict:
    """What it has for a ``__dict__`` is none."""

    target: Any = None

    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        return [self.target]

    @property
    def computed(self) -> Any:
        raise AssertionError("the application's code has run")


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


def test_objects_that_are_odd(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the application's is asked, and no name is made up."""
    holder = Target()
    vars(holder)[Hostile()] = target  # type: ignore[index]
    assert how_held(holder, target) == "an attribute"
    odd = OddDict()
    odd.__class__.target = target
    assert how_held(odd, target) == "holds"
    assert how_held(odd, OddDict) == "holds"
    made: Any = type("Made", (), {"__module__": "odd"})()
    made.link = target
    monkeypatch.setitem(sys.modules, "odd", Slotted())
    assert how_held(made, target) == "an attribute"
    of_static: Any = Static()
    vars(of_static)["named_by_a_static_method"] = target
    assert how_held(of_static, target) == "attribute 'named_by_a_static_method'"


def test_objects_of_asyncio(target: Target) -> None:
    """They are implemented in C, and so are the descriptors of what they have."""

    async def main() -> None:
        future = asyncio.get_running_loop().create_future()
        error = Held()
        future.set_exception(error)
        assert how_held(future, error) == "_exception"
        assert future.exception() is error

    run(main())


def test_whose_dict_it_is(target: Target) -> None:
    """That of a module is where its globals are; an object may have none."""
    assert is_dict_of(vars(target), target)
    assert not is_dict_of(vars(asyncio), asyncio)
    assert not is_dict_of(None, Slotted())
    assert not is_dict_of({}, target)


SOURCE = """
class Nested:
    def method(self):
        self.by_method
        return by_class
def looks(): return by_function
looks.__wrapped__ = looks
Nested.itself = Nested
"""


def test_names_that_code_has(target: Target) -> None:
    """Any other may be a value; whose module cannot be found has names all the same."""
    namespace: Any = {"__name__": "nowhere"}
    exec(SOURCE, namespace)
    other = {**namespace, "__name__": "elsewhere"}
    for name in ("by_class", "by_function", "by_nobody"):
        namespace[name] = other[name] = target
        known = "a global" if name == "by_nobody" else f"global {name!r}"
        assert global_name(namespace, target) == known
        # A class is one of the module that it comes from.
        known = f"global {name!r}" if name == "by_function" else "a global"
        assert global_name(other, target) == known
        del namespace[name], other[name]
    namespace[Hostile()] = target
    assert global_name(namespace, target) == "a global"
    nested = namespace["Nested"]()
    nested.by_method = target
    assert attribute_name(nested, target) == "attribute 'by_method'"
    assert not is_of(None, ("aiohttp",))
    assert is_of("aiohttp.web", ("aiohttp",))


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
    assert how_held([closure[0]], closure[0]) == "index 0"


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


def test_the_frame_of_a_class_is_not_read(target: Target) -> None:
    """Its variables are the class's namespace, and are needed."""

    class Made:
        value = target
        how = how_held(function(), target)

    assert Made.how == "temporary value"
    assert Made.value is target


def test_what_a_frame_refers_to(target: Target) -> None:
    """What is not a variable's value is not among them."""

    def running(held: Any) -> FrameType:
        return function()

    frame = running(target)
    values = values_of(frame)
    assert values[-1] is target
    known = (frame.f_globals, frame.f_code, frame.f_back, frame.f_builtins)
    assert not any(each is one for each in values for one in known)


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="f_locals is no dict there")
def test_variables_that_somebody_else_has_asked_for(target: Target) -> None:
    """They share the dict, which is left to them; else nothing is left in it."""

    def asked(held: Any) -> FrameType:
        return function()

    frame = asked(target)
    count = sys.getrefcount(target)
    snapshots: Set[int] = set()
    assert variables_of(frame, False, snapshots) == [("held", target)]
    assert (sys.getrefcount(target), snapshots) == (count, set())
    shared = frame.f_locals
    assert variables_of(frame, False, snapshots) == [("held", target)]
    assert shared == {"held": target}
    assert snapshots == {id(shared)}
    assert variables_of(frame, False) == [("held", target)]


class Tracer:
    """A trace function in Python that is no function."""

    def __call__(self, *args: object) -> None: ...


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="f_locals is no dict there")
def test_variables_that_are_traced(target: Target) -> None:
    """What a trace function finds there is written back: nothing is read."""
    before = sys.gettrace()
    frame = function()
    sys.settrace(Tracer())
    try:
        found = variables_of(frame, False)
    finally:
        sys.settrace(before)
    assert found is None


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
        assert how_held(handling, target) == "temporary value"
        kept = wait_for(error)
        assert how_held(kept, error) == "local variable 'awaitable'"
        kept.close()
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
