"""Exceptions, tracebacks and frames, without a server."""

import asyncio
import contextlib
import functools
import gc
import subprocess
import sys
import threading
import traceback
import weakref
from collections import Counter, deque
from types import FrameType, SimpleNamespace
from typing import Any, Callable, Dict, Iterator, List

import pytest

from aiohttp_cyclebreak.exceptions import (
    _LONGEST_ROW,
    _MOST_GATHERED,
    exceptions_in,
    frames_of,
    graph,
    leads_to,
)
from aiohttp_cyclebreak.frames import (
    COUNTS_ARE_EXACT,
    Emptied,
    Severed,
    is_finished,
    local_values,
    returns_of,
)
from aiohttp_cyclebreak.running import (
    _have_threads_gone_on,
    awaits_in,
    handled_by,
    in_flight,
)
from aiohttp_cyclebreak.sever import Cut, sever
from aiohttp_cyclebreak.tracebacks import _copy, drop_ended_entries

if sys.version_info >= (3, 11):
    from builtins import BaseExceptionGroup, ExceptionGroup
else:
    from exceptiongroup import BaseExceptionGroup, ExceptionGroup


def test_it_knows_nothing_of_aiohttp() -> None:
    """All of this works on exceptions, whoever raised them."""
    program = (
        "import sys, aiohttp_cyclebreak.running, aiohttp_cyclebreak.sever; "
        "sys.exit('aiohttp' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_type_has_no_bases_yet() -> None:
    """Before CPython 3.10 that of what ``async for`` awaits, in a new process."""
    program = (
        "import sys\n"
        "from aiohttp_cyclebreak.exceptions import attributes_of, is_instance, mro_of\n"
        "async def ticks():\n"
        "    yield\n"
        "step = ticks().__anext__()\n"
        "known = type.__dict__['__mro__'].__get__(type(step)) is not None\n"
        "assert known is (sys.version_info >= (3, 10))\n"
        "assert not is_instance(step, int)\n"
        "assert (object in mro_of(type(step))) is known\n"
        "attributes_of(step)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def caught(raiser: Callable[[], Any]) -> BaseException:
    try:
        raiser()
    except BaseException as exc:
        return exc
    raise AssertionError("nothing was raised")


class Marker:
    """An object whose life can be watched."""


def fail_with_local(marker: Any) -> None:
    exc = ValueError("with a local")
    local = marker  # noqa: F841
    raise exc  # the frame holds the exception, whose traceback holds the frame


@pytest.mark.parametrize("clear_frames", [True, False])
def test_a_cycle_is_cut(clear_frames: bool) -> None:
    """Bare, only the collector frees what the frame holds."""
    gc.collect()
    gc.disable()
    try:
        for guarded in (False, True):
            marker = Marker()
            watched = weakref.ref(marker)
            exc = caught(lambda marker=marker: fail_with_local(marker))
            if guarded:
                sever(graph(exc), clear_frames=clear_frames)
            del exc, marker
            assert (watched() is None) is guarded
            gc.collect()
            assert watched() is None
    finally:
        gc.enable()


def test_the_text_stays_and_the_locals_go() -> None:
    """An emptied frame still prints."""
    exc = caught(lambda: fail_with_local("secret"))
    text = traceback.format_exception(type(exc), exc, exc.__traceback__)
    cut = sever([exc])
    assert traceback.format_exception(type(exc), exc, exc.__traceback__) == text
    assert [frame.f_locals for frame in frames_of(exc)][-1] == {}
    assert cut.exceptions == 1
    assert cut.frames >= 2


def test_without_clearing_the_locals_stay_and_the_traceback_goes() -> None:
    """What a debug console holds, it holds whole."""
    exc = caught(lambda: fail_with_local("secret"))
    frames = list(frames_of(exc))
    cut = sever([exc], clear_frames=False)
    assert exc.__traceback__ is None
    assert frames[-1].f_locals["local"] == "secret"
    assert cut == Cut(exceptions=1, tracebacks=3, frames=0)


def test_spared_frames_keep_their_locals() -> None:
    """Another exception, which is kept, shares them."""
    exc = caught(lambda: fail_with_local("secret"))
    *_, innermost = frames_of(exc)
    sever([exc], spared={id(innermost)})
    assert innermost.f_locals["local"] == "secret"


def test_an_instance_raised_again_and_again_gathers_nothing() -> None:
    """Its traceback grows by every time, until it is taken off."""
    instance = LookupError("one for all")

    def fail(marker: Any) -> None:
        raise instance

    for _ in range(20):
        caught(lambda: fail("marker"))
        sever([instance])
        assert "in fail" in "".join(traceback.format_tb(instance.__traceback__))
    assert len(list(frames_of(instance))) < 10


def test_an_instance_raised_again_and_again_prints_where_it_comes_from() -> None:
    """A failure is cached; whoever logs it later finds the line that has failed."""

    def look_up() -> None:
        raise LookupError("cached")

    def fail(cached: BaseException) -> None:
        raise cached

    first = caught(look_up)
    sever([first])
    sizes = []
    for _ in range(5):
        caught(lambda: fail(first))
        assert "in look_up" in "".join(traceback.format_tb(first.__traceback__))
        sizes.append(len(list(frames_of(first))))
        sever([first])
    assert sizes[1:] == sizes[1:2] * 4


def test_what_another_thread_raises_while_it_is_severed_prints() -> None:
    """It may be one instance for all, raised by the requests of several loops."""
    outage = LookupError("one for all")

    def fail() -> None:
        raise outage

    def fail_elsewhere() -> None:
        fail()

    def raise_meanwhile(frame: FrameType, event: str, arg: object) -> None:
        if frame.f_code is _copy.__code__ and event == "return":
            sys.setprofile(None)
            thread = threading.Thread(target=caught, args=(fail_elsewhere,))
            thread.start()
            thread.join()

    for _ in range(2):
        sever([caught(fail)])
    sever_meanwhile = functools.partial(sever, [caught(fail)])
    sys.setprofile(raise_meanwhile)
    try:
        sever_meanwhile()
    finally:
        sys.setprofile(None)
    assert "fail_elsewhere" in "".join(traceback.format_tb(outage.__traceback__))
    for _ in range(2):
        sever([caught(fail)])
    text = "".join(traceback.format_tb(outage.__traceback__))
    assert "fail_elsewhere" not in text
    assert text.count("raise outage") == 2


@pytest.mark.skipif(sys.version_info < (3, 11), reason="every entry has a line there")
def test_an_instance_raised_again_by_code_without_lines_gathers_nothing() -> None:
    """As a template or a proxy that is made at runtime may have none."""
    instance = LookupError("one for all")

    def fail() -> None:
        raise instance

    code = fail.__code__
    no_lines = b"\xff" * (len(code.co_code) // 16 + 1)  # each of up to 8 instructions
    fail.__code__ = code.replace(co_linetable=no_lines)
    no_line = traceback.extract_tb(caught(fail).__traceback__)[-1].lineno
    assert no_line in (None, -1)  # the latter of early releases of CPython 3.11
    sizes = []
    for _ in range(5):
        sever([instance])
        sizes.append(len(list(frames_of(instance))))
        caught(fail)
    assert sizes[2:] == sizes[1:2] * 3
    sever([instance])
    lines = [each.lineno for each in traceback.extract_tb(instance.__traceback__)]
    assert lines[1::2] == [no_line, no_line]


def test_who_has_the_id_of_another_one_prints_where_it_comes_from() -> None:
    """Each with the traceback of a failure that is cached; the one before has gone."""

    def look_up() -> None:
        raise LookupError("cached")

    def fail(exc: BaseException) -> None:
        raise exc.with_traceback(cached.__traceback__)

    cached = caught(look_up)
    ids = set()
    for number in range(50):
        exc: Any = LookupError(number)
        ids.add(id(exc))
        caught(functools.partial(fail, exc))
        sever([exc])
        names = [each.name for each in traceback.extract_tb(exc.__traceback__)]
        assert names == ["caught", "fail", "caught", "look_up"]
        del exc
    assert len(ids) < 50


def test_who_has_the_id_of_another_one_does_not_grow() -> None:
    """What stands in the cached frames is not taken for that of its own first time."""

    def fail(exc: BaseException) -> None:
        raise exc.with_traceback(cached.__traceback__)

    def again(exc: BaseException) -> None:
        raise exc

    cached = caught(lambda: fail_with_local("cached"))
    instance = LookupError()
    for frame in frames_of(cached):  # as one that was at the same place has left them
        severed: Any = Severed()
        severed[id(instance)] = 0
        frame.f_trace = severed
    caught(lambda: fail(instance))
    sizes = []
    for _ in range(5):
        sever([instance])
        sizes.append(len(list(frames_of(instance))))
        caught(lambda: again(instance))
    assert sizes[1:] == sizes[1:2] * 4


def test_in_a_cached_traceback_not_every_exception_is_remembered() -> None:
    """Their ids would stay for as long as it is cached."""
    cached = caught(lambda: fail_with_local("secret"))
    held = [LookupError(number) for number in range(1_500)]
    for exc in held:
        sever([exc.with_traceback(cached.__traceback__)])
    for frame in frames_of(cached):
        assert not frame.f_trace or len(frame.f_trace) <= 1_000  # type: ignore[arg-type]


def test_of_very_many_entries_the_first_ones_are_forgotten() -> None:
    """A thousand requests may have had it at once."""
    instance = LookupError("one for all")

    def fail() -> None:
        raise instance

    for times in (300, 1, 1):
        for _ in range(times):
            caught(fail)
        sever([instance])
    assert len(list(frames_of(instance))) < 150


SUSPENDED = ("await", "yield", "yield from", "await in a loop")


def suspended_at(where: str, seen: List[Any]) -> Any:
    """A coroutine or generator that will stop there with an exception caught."""

    class Stop:
        def __await__(self) -> Iterator[None]:
            yield None

    async def stopped_at_await(seen: List[Any]) -> None:
        try:
            raise ValueError("suspended")
        except ValueError as exc:
            seen.append(exc)
            await Stop()

    def stopped_at_yield(seen: List[Any]) -> Iterator[None]:
        try:
            raise ValueError("suspended")
        except ValueError as exc:
            seen.append(exc)
            yield

    def stopped_at_yield_from(seen: List[Any]) -> Iterator[None]:
        try:
            raise ValueError("suspended")
        except ValueError as exc:
            seen.append(exc)
            yield from iter([None])

    async def stopped_in_loop(seen: List[Any]) -> None:
        for _ in range(3):
            try:
                raise ValueError("suspended")
            except ValueError as exc:
                seen.append(exc)
                await Stop()

    functions: Dict[str, Any] = {
        "await": stopped_at_await,
        "yield": stopped_at_yield,
        "yield from": stopped_at_yield_from,
        "await in a loop": stopped_in_loop,
    }
    return functions[where](seen)


@pytest.mark.parametrize("where", SUSPENDED)
def test_a_suspended_frame_is_never_closed(where: str) -> None:
    """frame.clear() would, before CPython 3.13."""
    seen: List[Any] = []
    suspended = suspended_at(where, seen)
    suspended.send(None)
    (exc,) = seen
    (frame,) = frames_of(exc)
    assert not is_finished(frame)
    sever([exc])
    assert "exc" in frame.f_locals
    with pytest.raises(StopIteration):
        while True:
            suspended.send(None)  # it goes on to its end
    assert is_finished(frame)


@pytest.mark.parametrize("where", ["returns", "raises", "waits"])
def test_only_a_frame_that_has_returned_stands_at_a_return(where: str) -> None:
    """Whatever else it stands at is looked at more closely, before it is cleared."""
    traced: List[Any] = []

    async def coroutine() -> Any:
        traced.append(sys._getframe())
        try:
            if where == "raises":
                raise LookupError
            if where == "waits":
                await asyncio.sleep(0)
                return where
        finally:
            await asyncio.sleep(0)

    returns = returns_of(coroutine.__code__)
    running = coroutine()
    stands_at = []
    with contextlib.suppress(StopIteration, LookupError):
        while True:
            running.send(None)
            stands_at.append(traced[0].f_lasti)
    assert len(stands_at) == (2 if where == "waits" else 1)
    assert returns.isdisjoint(stands_at)
    assert (traced[0].f_lasti in returns) is (where != "raises")


def test_a_coroutine_left_by_an_exception_is_finished() -> None:
    """Though its last instruction is the await at which it had been suspended."""

    class Fail:
        def __await__(self) -> Iterator[None]:
            yield None
            raise ValueError("out of an await")

    async def inner() -> None:
        await Fail()

    async def outer(marker: str) -> None:
        await inner()

    for resume in ("send", "throw"):
        coroutine = outer("marker")
        coroutine.send(None)
        with pytest.raises((ValueError, asyncio.CancelledError)) as raised:
            if resume == "send":
                coroutine.send(None)
            else:
                coroutine.throw(asyncio.CancelledError())
        frames = list(frames_of(raised.value))[1:]
        if sys.version_info < (3, 11):
            # A generator that an exception is thrown into at its yield cannot be
            # told from one that is suspended there: it is left alone.
            frames = frames[:-1]
        assert all(is_finished(frame) for frame in frames)
        sever([raised.value])
        assert [dict(frame.f_locals) for frame in frames] == [{}] * len(frames)


def test_an_exception_in_another_tasks_hands_is_in_flight() -> None:
    """A task has caught it, and is suspended."""

    async def main() -> None:
        shared = ValueError("shared")
        go_on = asyncio.Event()

        async def hold() -> None:
            try:
                raise shared
            except ValueError:
                await go_on.wait()

        task = asyncio.ensure_future(hold())
        await asyncio.sleep(0)
        assert in_flight(shared)
        go_on.set()
        await task
        assert not in_flight(shared)

    asyncio.run(main())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="executing is not told there")
def test_an_exception_that_a_thread_handles_is_in_flight() -> None:
    """Until the thread has handed it on, and goes on itself."""
    shared = ValueError("shared")
    caught_it, handled, go_on = (threading.Event() for _ in range(3))
    goes_on = threading.Event()

    def work() -> None:
        try:
            raise shared
        except ValueError:
            try:
                raise KeyError  # it has the other one as its context
            except KeyError:
                caught_it.set()
                go_on.wait()
        handled.set()
        goes_on.wait()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    caught_it.wait()
    assert in_flight(shared)
    go_on.set()
    handled.wait()
    assert not in_flight(shared)
    try:
        raise KeyError
    except KeyError:  # it is another one
        assert not in_flight(shared)
    goes_on.set()
    thread.join()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="executing is not told there")
def test_what_executes_and_is_in_no_thread_may_handle_it() -> None:
    """As a function of a greenlet that is suspended; a generator stands for it."""

    def suspend() -> Iterator[None]:
        yield

    greenlet: Any = suspend()
    next(greenlet)
    frames = {id(sys._getframe())}
    assert _have_threads_gone_on(frames, ValueError())
    frames.add(id(greenlet.gi_frame))
    assert not _have_threads_gone_on(frames, ValueError())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="executing is not told there")
def test_an_exception_that_who_runs_the_loop_handles_is_in_flight() -> None:
    """As in another thread.  To look makes no cycle through the frame of the look."""
    gc.collect()
    shared = ValueError("shared")
    try:
        raise shared
    except ValueError:
        assert in_flight(shared)
    assert not in_flight(shared)
    shared.__traceback__ = None
    assert gc.collect() == 0


def test_a_coroutine_is_found_by_a_frame_that_it_awaits_in() -> None:
    """Others of the same code are not."""

    async def inner() -> None:
        await asyncio.sleep(0)

    async def outer() -> None:
        await inner()

    coroutines = [outer() for _ in range(3)]
    for each in coroutines:
        each.send(None)
    frame = coroutines[1].cr_await.cr_frame
    known = {id(frame)}, {id(frame.f_code)}
    assert [awaits_in(each, *known) for each in coroutines] == [False, True, False]
    for each in coroutines:
        each.close()


@pytest.mark.parametrize("shares", [False, True])
def test_what_a_task_has_in_a_variable_is_found(shares: bool) -> None:
    """In one that a nested function uses as well."""
    failure = ValueError("in a variable")

    async def has_it() -> None:
        local = failure
        await asyncio.sleep(0)
        del local

    async def shares_it() -> None:
        shared = failure

        def use() -> BaseException:
            return shared

        await asyncio.sleep(0)
        use()

    coroutine = shares_it() if shares else has_it()
    coroutine.send(None)
    assert failure in handled_by(coroutine)
    coroutine.close()


def test_a_task_that_has_itself_in_a_variable_is_looked_into_once() -> None:
    """Or the look would have no end."""
    coroutines: List[Any] = []

    async def has_itself() -> None:
        own = coroutines[0]
        await asyncio.sleep(0)
        del own

    coroutines.append(has_itself())
    coroutines[0].send(None)
    assert handled_by(coroutines[0]) == []
    coroutines.pop().close()


def test_what_is_very_long_is_not_gone_through() -> None:
    """It is data, and no result of a few calls."""
    failure = ValueError("in a list")
    long = [failure] * (_MOST_GATHERED + 1)
    assert exceptions_in([long], lists=True) == []
    assert exceptions_in([long[1:]], lists=True) == long[1:]
    row = (failure, *range(_LONGEST_ROW))
    assert exceptions_in([[row]], lists=True) == []
    assert exceptions_in([[row[:-1]]], lists=True) == [failure]


def test_a_running_frame_is_left_alone() -> None:
    """It is this one."""
    local = "still here"
    try:
        raise ValueError
    except ValueError as exc:
        sever([exc])
    assert local == "still here"


class Hostile(Exception):
    """It fights back wherever it can."""

    @property
    def __traceback__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("no traceback")

    @property
    def __context__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("no context")

    @property
    def __cause__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("no cause")

    @property
    def exceptions(self) -> Any:
        raise RuntimeError("no group")

    def __setattr__(self, name: str, value: Any) -> None:
        raise RuntimeError("frozen")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no equal")

    def __hash__(self) -> int:
        raise RuntimeError("no hash")

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def test_an_exception_that_fights_back_is_severed() -> None:
    """Its attributes are read as BaseException has them."""

    def fail(marker: Any) -> None:
        try:
            raise Hostile
        except Hostile as exc:
            raise Hostile from exc

    marker = Marker()
    watched = weakref.ref(marker)
    exc = caught(lambda marker=marker: fail(marker))
    cut = sever(graph(exc))
    assert cut.exceptions == 2
    del marker
    gc.disable()
    try:
        assert watched() is None
    finally:
        gc.enable()


def test_an_attribute_called_exceptions_makes_no_group() -> None:
    """What it holds was not given to us."""

    class Errors(Exception):
        exceptions: List[Any]

    other = caught(lambda: fail_with_local("untouched"))
    exc = Errors()
    exc.exceptions = [other, "no exception"]
    assert graph(exc) == [exc]
    sever(graph(exc))
    assert list(frames_of(other))[-1].f_locals["local"] == "untouched"


def test_the_members_of_a_group_are_reached() -> None:
    """Nested ones too, and those of a subclass that hides them."""

    class Hiding(BaseExceptionGroup):  # type: ignore[type-arg]
        @property
        def exceptions(self) -> Any:  # type: ignore[override]
            return ()

    inner = ValueError("inner")
    group = Hiding("outer", [ExceptionGroup("nested", [inner]), KeyError("other")])
    found = graph(group)
    assert len(found) == 4
    assert inner in found


@pytest.mark.parametrize("length", [1, 2, 3, 20_000])
@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("attribute", ["__cause__", "__context__"])
def test_a_chain_of_any_length_is_walked_and_opened(
    attribute: str, closed: bool, length: int
) -> None:
    """No recursion, and no loop afterwards."""
    chain = [ValueError(number) for number in range(length)]
    for exc, following in zip(chain, chain[1:]):
        setattr(exc, attribute, following)
    if closed:
        setattr(chain[-1], attribute, chain[0])
    assert len(graph(chain[0])) == length
    sever(graph(chain[0]))
    assert getattr(chain[-1], attribute) is None
    following = chain[0]
    for exc in chain[1:]:
        following = getattr(following, attribute)
        assert following is exc
    while chain:  # CPython frees a long chain by recursion
        chain.pop()


def test_opening_a_loop_does_not_change_what_prints() -> None:
    """The link that is cut leads to an exception printed already."""
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__context__ = second, first
    second.__suppress_context__ = False

    def text() -> List[str]:
        return traceback.format_exception(type(first), first, None)

    before = text()
    sever(graph(first))
    assert text() == before
    assert first.__suppress_context__


def test_what_prints_in_place_of_a_cause_that_is_cut_prints_on() -> None:
    """A context does where the cause was printed before, if it is not suppressed."""
    first, second, context = ValueError("first"), ValueError("second"), KeyError()
    first.__cause__, second.__cause__ = second, first
    second.__context__ = context
    second.__suppress_context__ = False

    def text() -> List[str]:
        return traceback.format_exception(type(first), first, None)

    before = text()
    assert any("KeyError" in line for line in before)
    sever(graph(first))
    assert second.__cause__ is None
    assert text() == before


def test_a_loop_through_a_group_is_opened() -> None:
    """A group's members cannot be taken out, so another link is cut."""
    member = ValueError("member")
    group = ExceptionGroup("group", [member])
    member.__context__ = group
    sever(graph(member))
    assert member.__context__ is None
    member.__context__ = group
    sever(graph(group))
    assert member.__context__ is None


def test_what_leads_to_an_opened_loop_through_a_group_is_left_alone() -> None:
    """It is no loop itself, whichever way the loop was found."""
    member, first = ValueError("member"), ValueError("first")
    group = ExceptionGroup("group", [member])
    member.__context__ = group
    first.__cause__, first.__context__ = member, group
    sever(graph(first))
    assert member.__context__ is None
    assert first.__cause__ is member
    assert first.__context__ is group


class Incomparable(type):
    def __eq__(cls, other: object) -> bool:
        raise RuntimeError("no equal")

    __hash__ = type.__hash__


class Members(List[Exception], metaclass=Incomparable):
    """Not even its class can be compared."""


def test_a_loop_through_a_group_of_a_sequence_that_fights_back_is_opened() -> None:
    """A group may be made of any sequence, and keeps that."""
    member = ValueError("member")
    group = ExceptionGroup("group", Members([member]))
    member.__context__ = group
    known = Counter({id(member): 100, id(group): 100})  # so that nobody else has one
    sever(graph(member), references=lambda: known)
    assert member.__context__ is None


def test_a_group_nested_a_thousand_deep() -> None:
    """No recursion."""
    exc: Any = ValueError("innermost")
    for _ in range(1000):
        exc = ExceptionGroup("one deeper", [exc])
    assert len(graph(exc)) == 1001
    sever(graph(exc))


def test_a_traceback_900_frames_deep() -> None:
    """All of them are emptied."""

    def fall(depth: int) -> None:
        if depth:
            fall(depth - 1)
        raise ValueError("at the bottom")

    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + 1000)
    try:
        exc = caught(lambda: fall(900))
    finally:
        sys.setrecursionlimit(limit)
    assert sever([exc]).frames >= 901


def test_what_was_not_given_is_left_alone() -> None:
    """The cause of an exception, when only the exception is given."""
    cause = caught(lambda: fail_with_local("untouched"))
    exc = ValueError()
    exc.__cause__ = cause
    sever([exc])
    assert exc.__cause__ is cause
    assert list(frames_of(cause))[-1].f_locals["local"] == "untouched"


def test_what_a_function_closes_over_is_let_go_with_it() -> None:
    """A frame holds its function from CPython 3.11 on."""

    def fail_in_closure(marker: Any, other: Any) -> None:
        def inner(defaulted: Any = other) -> None:
            raise ValueError(type(marker))

        def outer() -> None:
            try:
                inner()
            finally:
                assert marker is not None

        outer()

    gc.collect()
    gc.disable()
    try:
        marker, other = Marker(), Marker()
        watched = [weakref.ref(marker), weakref.ref(other)]
        exc = caught(functools.partial(fail_in_closure, marker, other))
        del marker, other
        text = traceback.format_exception(type(exc), exc, exc.__traceback__)
        sever([exc])
        assert [each() for each in watched] == [None, None]
        assert traceback.format_exception(type(exc), exc, exc.__traceback__) == text
    finally:
        gc.enable()


def test_what_a_living_function_closes_over_stays() -> None:
    """It is called again, or shares the cell with one that is."""

    def make() -> Any:
        value = "closed over"

        def dead() -> None:
            raise ValueError(value)

        def living() -> str:
            return value

        return caught(dead), living

    exc, living = make()
    sever([exc])
    assert living() == "closed over"

    def again(default: str = "default") -> str:
        raise ValueError(living() + default)

    for _ in range(2):
        exc = caught(again)
        sever([exc])
        assert exc.args == ("closed overdefault",)


def catch_into(found: List[BaseException]) -> None:
    """Have an exception whose traceback does not lead to the caller, but by f_back."""
    try:
        raise ValueError
    except ValueError as exc:
        found.append(exc)


def lose_marker(call: Callable[[Any], None]) -> "weakref.ref[Marker]":
    """Hand a marker to a function, whose frame alone has it then."""
    marker = Marker()
    call(marker)
    return weakref.ref(marker)


def test_the_callers_behind_a_traceback_are_emptied_too() -> None:
    """A traceback ends where the exception was caught; f_back goes on."""
    held: List[BaseException] = []

    def call(marker: Any) -> None:
        itself = sys._getframe()  # noqa: F841  # a cycle of its own
        catch_into(held)

    gc.disable()
    try:
        watched = lose_marker(call)
        assert watched() is not None
        sever(held)
        assert watched() is None
    finally:
        gc.enable()


def test_reading_locals_changes_nothing() -> None:
    """Somebody may have the dict of them, without what was deleted from it."""
    kept: List[Dict[str, Any]] = []

    def fail(first: Any, second: Any) -> None:
        fields = locals()
        del fields["first"]
        kept.append(fields)
        raise ValueError((lambda: second)())

    first, second = Marker(), Marker()
    exc = caught(lambda: fail(first, second))
    values = [value for frame in frames_of(exc) for value in local_values(frame)]
    for marker in (first, second):  # the second is in a cell
        assert any(value is marker for value in values)
    assert "first" not in kept[0]


@pytest.mark.skipif(not COUNTS_ARE_EXACT, reason="they tell what is shared")
@pytest.mark.parametrize("together", [False, True])
def test_the_caller_of_several_is_emptied_with_the_last_of_them(together: bool) -> None:
    """One after the other with what has been emptied, or another needs it still."""
    found: List[BaseException] = []

    def call(marker: Any) -> None:
        catch_into(found)
        catch_into(found)

    watched = lose_marker(call)
    emptied = Emptied()
    sever(found[:1], emptied=emptied if together else None)
    assert watched() is not None
    sever(found[1:], emptied=emptied if together else None)
    assert (watched() is None) is together


@pytest.mark.skipif(not COUNTS_ARE_EXACT, reason="they tell what is shared")
def test_a_caller_that_was_needed_before_is_emptied_the_next_time() -> None:
    """The traceback was empty then, but not what is behind it."""
    found: List[BaseException] = []
    needed: List[Any] = []

    def call(marker: Any) -> None:
        needed.append(sys._getframe())
        catch_into(found)

    watched = lose_marker(call)
    sever(found)
    assert watched() is not None
    needed.clear()
    sever(found)
    assert watched() is None


def test_the_traceback_of_many_raises_is_shortened_and_of_a_single_one_is_not() -> None:
    """The newest entries stay and the oldest, and none is there twice."""
    instance = ValueError("one for all")

    def fail(depth: int) -> None:
        if depth:
            fail(depth - 1)
        raise instance

    caught(lambda: fail(800))
    single = instance.__traceback__
    drop_ended_entries(instance)
    assert instance.__traceback__ is single
    for _ in range(40):
        caught(lambda: fail(20))
    every = list(map(id, frames_of(instance)))
    drop_ended_entries(instance)
    assert list(map(id, frames_of(instance))) == every[:250] + every[-250:]
    caught(lambda: fail(20))
    grown = instance.__traceback__
    drop_ended_entries(instance)
    assert instance.__traceback__ is grown  # not copied for so few more


def test_exceptions_that_went_through_one_frame_are_whole_one_by_one() -> None:
    """That a frame was emptied for one does not make it an older time of the other."""
    found: List[BaseException] = []

    def fail() -> None:
        raise ValueError("inner")

    def swallow_and_raise() -> None:
        try:
            fail()
        except ValueError as exc:
            found.append(exc)
        raise LookupError("outer")

    try:
        swallow_and_raise()
    except LookupError as exc:
        found.append(exc)
    texts = [
        [entry.name for entry in traceback.extract_tb(e.__traceback__)] for e in found
    ]
    for exc in found:
        sever([exc])
    assert texts == [
        [entry.name for entry in traceback.extract_tb(e.__traceback__)] for e in found
    ]


class WithSlots:
    __slots__ = ("task",)

    def __init__(self, task: Any) -> None:
        self.task = task


def failing_with(target: Any, holder: Any) -> BaseException:
    """An exception of a frame that has the target by a local, and by its closure."""

    def fail() -> None:
        local = holder(target)
        raise LookupError(str(local is None))

    try:
        fail()
    except LookupError as exc:
        return exc.with_traceback(exc.__traceback__.tb_next)  # type: ignore[union-attr]
    raise AssertionError


def failing_with_cell(target: Any) -> BaseException:
    """An exception of a frame with a variable that an inner function has as well."""

    def fail() -> None:
        scope = SimpleNamespace(task=target)
        raise LookupError(str([lambda: scope]))

    try:
        fail()
    except LookupError as exc:
        return exc.with_traceback(exc.__traceback__.tb_next)  # type: ignore[union-attr]
    raise AssertionError


@pytest.mark.parametrize(
    ("holder", "leads"),
    [
        (lambda target: target, True),
        (lambda target: SimpleNamespace(task=target), True),
        (WithSlots, True),
        (lambda target: {"task": target}, False),
        (lambda target: SimpleNamespace(tasks={"first": target}), False),
        (lambda target: deque([target]), False),
        (lambda target: [target], False),  # a registry
        (lambda target: SimpleNamespace(tasks={target}), False),
        (lambda target: None, False),  # its closure has it
    ],
)
def test_a_frame_leads_to_what_its_locals_have(holder: Any, leads: bool) -> None:
    class Target:
        pass

    target = Target()
    assert leads_to(failing_with(target, holder), target) is leads


def test_a_frame_leads_to_what_a_cell_of_its_own_has() -> None:
    target = object()
    assert leads_to(failing_with_cell(target), target)
