"""What holds for every graph of exceptions, whatever their tracebacks lead through.

Hypothesis makes the graphs and, when something does not hold, the smallest one.
"""

import contextlib
import functools
import gc
import os
import sys
import traceback
import types
import weakref
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from aiohttp_cyclebreak.exceptions import (
    frames_of,
    goes_by_itself,
    graph,
    leads_on,
    would_be_gone,
)
from aiohttp_cyclebreak.running import in_flight
from aiohttp_cyclebreak.sever import sever

from .test_sever import Hostile, Marker

if sys.version_info >= (3, 11):
    from builtins import BaseExceptionGroup
else:
    from exceptiongroup import BaseExceptionGroup

# The same graphs each time, and few; "nox -s soak" asks for many and for new ones.
settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=150, database=None
)
settings.register_profile(
    "soak",
    deadline=None,
    max_examples=20_000,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
PROFILE = os.environ.get("CYCLEBREAK_HYPOTHESIS", "ci")


class Custom(BaseException):
    pass


CLASSES: Dict[str, Any] = {"plain": ValueError, "hostile": Hostile, "base": Custom}

# What the traceback of an exception leads through.
FINISHED = ("call", "calls", "coroutine left", "generator left")
SUSPENDED = ("coroutine", "generator", "yield from", "async generator")
TRACEBACKS = (None, "running", "again", *FINISHED, *SUSPENDED)


@dataclass(frozen=True)
class Node:
    """One exception: its class, its traceback, and the members if it is a group."""

    kind: str
    traceback: Optional[str]
    members: Tuple[int, ...] = ()
    shares: Optional[int] = None  # whose traceback it was given, with_traceback()


@dataclass(frozen=True)
class Plan:
    """A graph, what of it is given to sever(), and how."""

    nodes: Tuple[Node, ...]
    links: Tuple[Tuple[int, str, int], ...]
    given: Tuple[int, ...]
    clear_frames: bool


@st.composite
def plans(draw: Any) -> Plan:
    size = draw(st.integers(1, 7))
    nodes = []
    for number in range(size):
        earlier = st.integers(0, number - 1) if number else st.nothing()
        members = tuple(draw(st.lists(earlier, max_size=3))) if number else ()
        nodes.append(
            Node(
                kind="group" if members else draw(st.sampled_from(sorted(CLASSES))),
                traceback=draw(st.sampled_from(TRACEBACKS)),
                members=members,
                shares=draw(st.none() | earlier),
            )
        )
    number = st.integers(0, size - 1)
    attribute = st.sampled_from(["__cause__", "__context__"])
    links = draw(st.lists(st.tuples(number, attribute, number), max_size=10))
    return Plan(
        nodes=tuple(nodes),
        links=tuple(links),
        given=tuple(draw(st.permutations(range(size)))[: draw(st.integers(1, size))]),
        clear_frames=draw(st.booleans()),
    )


@types.coroutine
def stop() -> Any:
    yield


def link_of(exc: BaseException, attribute: str) -> Optional[BaseException]:
    found: Optional[BaseException] = BaseException.__dict__[attribute].__get__(exc)
    return found


def traceback_of(exc: BaseException) -> Any:
    return BaseException.__dict__["__traceback__"].__get__(exc)


class World:
    """The exceptions of a plan, made."""

    def __init__(self, plan: Plan) -> None:
        self.exceptions: List[BaseException] = []
        self.suspended: List[Any] = []
        self.finalized: List[int] = []
        self.watched: List[weakref.ref[Marker]] = []
        for node in plan.nodes:
            self.exceptions.append(self.make(node))

    def link(self, plan: Plan) -> None:
        for source, attribute, target in plan.links:
            BaseException.__dict__[attribute].__set__(
                self.exceptions[source], self.exceptions[target]
            )

    def marker(self) -> Marker:
        marker = Marker()
        self.watched.append(weakref.ref(marker))
        return marker

    def make(self, node: Node) -> BaseException:
        exc: BaseException
        if node.members:
            members = [self.exceptions[number] for number in node.members]
            exc = BaseExceptionGroup("group", members)
        else:
            exc = CLASSES[node.kind]()
        BaseException.__dict__["__dict__"].__get__(exc)["marker"] = self.marker()
        if node.shares is not None:
            shared = traceback_of(self.exceptions[node.shares])
            BaseException.__dict__["__traceback__"].__set__(exc, shared)
        if node.traceback is not None and node.traceback != "running":
            getattr(self, node.traceback.replace(" ", "_"))(exc)
        BaseException.__dict__["__context__"].__set__(exc, None)
        return exc

    def call(self, exc: BaseException) -> None:
        def fail(kept: BaseException, marker: Marker) -> None:
            raise kept

        try:
            fail(exc, self.marker())
        except BaseException:
            pass

    def calls(self, exc: BaseException) -> None:
        def fall(kept: BaseException, marker: Marker, depth: int) -> None:
            def inner(default: Marker = marker) -> None:
                raise kept

            if depth:
                fall(kept, marker, depth - 1)
            inner()

        try:
            fall(exc, self.marker(), 5)
        except BaseException:
            pass

    def again(self, exc: BaseException) -> None:
        for _ in range(3):
            self.call(exc)
            sever([exc])

    def coroutine_left(self, exc: BaseException) -> None:
        async def inner(marker: Marker) -> None:
            await stop()
            raise exc

        async def outer(kept: BaseException, marker: Marker) -> None:
            await inner(marker)

        left = outer(exc, self.marker())
        left.send(None)
        try:
            left.send(None)
        except BaseException:
            pass

    def generator_left(self, exc: BaseException) -> None:
        # It does not hold the exception: before Python 3.11 it is left alone.
        def left(marker: Marker) -> Any:
            yield

        generator = left(self.marker())
        next(generator)
        try:
            generator.throw(exc)
        except BaseException:
            pass

    def coroutine(self, exc: BaseException) -> None:
        async def suspended(exc: BaseException, number: int, marker: Marker) -> None:
            try:
                try:
                    raise exc
                except BaseException:
                    await stop()
            finally:
                self.finalized.append(number)
                del exc

        self.suspend(suspended(exc, len(self.suspended), self.marker()))

    def generator(self, exc: BaseException) -> None:
        def suspended(exc: BaseException, number: int, marker: Marker) -> Any:
            try:
                try:
                    raise exc
                except BaseException:
                    yield
            finally:
                self.finalized.append(number)
                del exc

        self.suspend(suspended(exc, len(self.suspended), self.marker()))

    def yield_from(self, exc: BaseException) -> None:
        def suspended(exc: BaseException, number: int, marker: Marker) -> Any:
            try:
                try:
                    raise exc
                except BaseException:
                    yield from [None]
            finally:
                self.finalized.append(number)
                del exc

        self.suspend(suspended(exc, len(self.suspended), self.marker()))

    def async_generator(self, exc: BaseException) -> None:
        async def suspended(exc: BaseException, number: int, marker: Marker) -> Any:
            try:
                try:
                    raise exc
                except BaseException:
                    await stop()
                    yield
            finally:
                self.finalized.append(number)
                del exc

        async def drive(generator: Any) -> None:
            async for _ in generator:
                pass

        self.suspend(drive(suspended(exc, len(self.suspended), self.marker())))

    def suspend(self, suspended: Any) -> None:
        suspended.send(None)
        self.suspended.append(suspended)

    def resume(self) -> None:
        """Let what was suspended go on: each comes to its end, and only now."""
        assert self.finalized == []
        for number, suspended in enumerate(self.suspended):
            with pytest.raises(StopIteration):
                suspended.send(None)
            assert self.finalized[-1] == number
        assert len(self.finalized) == len(self.suspended)

    def let_go(self) -> None:
        self.exceptions.clear()
        self.suspended.clear()


def reachable(plan: Plan, start: int) -> Set[int]:
    last = {(source, attribute): target for source, attribute, target in plan.links}
    found, todo = set(), [start]
    while todo:
        number = todo.pop()
        if number not in found:
            found.add(number)
            todo += plan.nodes[number].members
            todo += [target for (source, _), target in last.items() if source == number]
    return found


def loops(world: World, numbers: Set[int]) -> bool:
    """Whether exceptions come back to themselves through one another."""
    position = {id(world.exceptions[number]): number for number in numbers}
    below: Dict[int, Set[int]] = {}
    for number in numbers:
        exc = world.exceptions[number]
        targets: List[Any] = [link_of(exc, "__cause__"), link_of(exc, "__context__")]
        if isinstance(exc, BaseExceptionGroup):
            targets += exc.exceptions
        below[number] = {position[id(t)] for t in targets if id(t) in position}
    while below:  # take out what leads nowhere; what cannot be taken out is a loop
        ends = [number for number, targets in below.items() if not targets & set(below)]
        if not ends:
            return True
        for number in ends:
            del below[number]
    return False


def state(exc: BaseException) -> Tuple[Any, ...]:
    """What must stay of an exception that was not given."""
    return (
        traceback.format_tb(traceback_of(exc)),
        id(link_of(exc, "__cause__")),
        id(link_of(exc, "__context__")),
    )


def names_of(exc: BaseException, running: Any) -> List[Tuple[int, Set[str]]]:
    frames = [frame for frame in frames_of(exc) if frame is not running]
    return [(id(frame), set(frame.f_locals)) for frame in frames]


def check(plan: Plan) -> List["weakref.ref[Marker]"]:
    world = World(plan)
    for number, node in enumerate(plan.nodes):
        if node.traceback == "running":
            try:
                raise world.exceptions[number]
            except BaseException:
                pass  # this very frame is in its traceback
            BaseException.__dict__["__context__"].__set__(
                world.exceptions[number], None
            )
    world.link(plan)
    exceptions = world.exceptions
    for number, exc in enumerate(exceptions):
        found = graph(exc)
        assert found[0] is exc
        assert len(found) == len({id(each) for each in found})
        expected = {id(exceptions[each]) for each in reachable(plan, number)}
        assert {id(each) for each in found} == expected
        del found
        for question in (in_flight, leads_on, goes_by_itself):
            assert question(exc) in (True, False)

    given = [exceptions[number] for number in plan.given]
    others = [n for n in range(len(exceptions)) if n not in plan.given]
    before = {number: state(exceptions[number]) for number in others}
    looped = loops(world, set(plan.given))
    links = {n: state(exceptions[n])[1:] for n in plan.given}
    texts = {n: state(exceptions[n])[0] for n in plan.given}
    # What else holds these frames: other tracebacks, and what goes on later.
    running = sys._getframe()
    touched = set()
    for exc in given:
        for frame in frames_of(exc):
            caller: Any = frame
            while caller is not None:
                touched.add(id(caller))
                caller = caller.f_back
    frame = caller = None
    locals_before = {number: names_of(exceptions[number], running) for number in others}

    cut = sever(given, clear_frames=plan.clear_frames)

    assert cut.exceptions == len(given)
    assert not loops(world, set(plan.given))
    # Severed again, there is no more to it.
    assert sever(given, clear_frames=plan.clear_frames).exceptions == len(given)
    for number in others:
        assert state(exceptions[number]) == before[number]
        for (key, names), (_, was) in zip(
            names_of(exceptions[number], running), locals_before[number]
        ):
            assert names == was or key in touched
    for number in plan.given:
        if plan.clear_frames:
            shares = any(node.traceback == "again" for node in plan.nodes)
            assert state(exceptions[number])[0] == texts[number] or shares
        else:
            assert traceback_of(exceptions[number]) is None
        if not looped:
            assert state(exceptions[number])[1:] == links[number]
    for number in others:
        # With one of these in hand CPython 3.8 would walk a loop for ever: bpo-25782.
        BaseException.__dict__["__context__"].__set__(exceptions[number], None)
    del exc, given, exceptions, running
    world.resume()
    # All of it, so that what is left is left by what was cut and what was not.
    if not others:
        watched = world.watched
        world.let_go()
        return watched
    world.let_go()
    return []


# Found by the long run: a loop that leads back by two ways through nested groups.
BY_TWO_WAYS = Plan(
    nodes=(
        Node("plain", None),
        Node("group", None, members=(0,)),
        Node("group", None, members=(1,)),
    ),
    links=((0, "__cause__", 1), (0, "__context__", 2)),
    given=(0, 1, 2),
    clear_frames=True,
)


@settings(settings.get_profile(PROFILE))
@example(BY_TWO_WAYS)
@given(plans())
def test_every_graph(plan: Plan) -> None:
    """It ends, raises nothing, closes nothing, leaves no loop, and no more is cut."""
    gc.disable()
    try:
        watched = check(plan)
        if plan.clear_frames:
            assert [each() for each in watched] == [None] * len(watched)
    finally:
        gc.enable()


def test_the_collector_is_needed_bare() -> None:
    """The same exceptions, not severed, wait for it: the property has teeth."""
    plan = Plan((Node("plain", "call"),), ((0, "__cause__", 0),), (0,), True)
    gc.collect()
    gc.disable()
    try:
        world = World(plan)
        world.link(plan)
        watched = world.watched
        world.let_go()
        assert [each() for each in watched] != [None] * len(watched)
        gc.collect()
        assert [each() for each in watched] == [None] * len(watched)
        assert check(plan)
    finally:
        gc.enable()


def test_the_naive_way_closes_what_is_suspended() -> None:
    """traceback.clear_frames(), before CPython 3.13: the property has teeth."""
    for kind in SUSPENDED:
        world = World(Plan((Node("plain", kind),), (), (0,), True))
        traceback.clear_frames(traceback_of(world.exceptions[0]))
        closed = bool(world.finalized)
        assert closed is (sys.version_info < (3, 13)), kind
        for suspended in world.suspended:
            suspended.close()


# --- what was swallowed ---------------------------------------------------------


class Failure(Exception):
    """One that can be watched, and keeps what it is given as an argument."""


def fail() -> None:
    raise Failure


def returned(call: Any) -> Any:
    try:
        call()
    except Exception as exc:
        return exc


def passes(call: Any) -> None:
    call()


def converts(call: Any) -> None:
    try:
        call()
    except Exception as exc:
        raise Failure(exc) from exc


def fails_while_it_handles(call: Any) -> None:
    try:
        call()
    except Exception:
        raise Failure  # noqa: B904


def keeps(call: Any) -> None:
    try:
        call()
    except Exception as exc:
        kept = exc  # noqa: F841
        raise


def keeps_arguments(call: Any) -> None:
    try:
        call()
    except Exception as exc:
        arguments = (exc,)
        raise Failure(*arguments) from exc


def raises_what_was_returned(call: Any) -> None:
    failed = returned(call)
    raise Failure from failed


def raises_what_was_returned_and_forgets(call: Any) -> None:
    failed = returned(call)
    try:
        raise Failure from failed
    finally:
        del failed


def tries_again(call: Any) -> None:
    try:
        call()
    except Exception:
        call()


@contextlib.contextmanager
def converting() -> Iterator[None]:
    try:
        yield
    except Exception as exc:
        raise Failure from exc


def converts_by_a_context_manager(call: Any) -> None:
    with converting():
        call()


def groups_a_list(call: Any) -> None:
    raise BaseExceptionGroup("", [returned(call), returned(call)])


def groups_a_tuple(call: Any) -> None:
    raise BaseExceptionGroup("", (returned(call),))


def groups_what_it_keeps(call: Any) -> None:
    failed = [returned(call)]
    raise BaseExceptionGroup("", failed)


STEPS = [
    *(passes, converts, fails_while_it_handles, keeps, keeps_arguments, tries_again),
    *(raises_what_was_returned, raises_what_was_returned_and_forgets),
    converts_by_a_context_manager,
]
if sys.version_info >= (3, 11):  # the backport's have their members elsewhere
    STEPS += [groups_a_list, groups_a_tuple, groups_what_it_keeps]


@settings(settings.get_profile(PROFILE))
@given(st.lists(st.sampled_from(STEPS), max_size=5))
def test_what_would_be_gone_goes(steps: List[Any]) -> None:
    """And what would not stays: by reference counts alone."""
    noted: List[BaseException] = []

    async def swallow() -> None:
        call: Any = fail
        for step in steps:
            call = functools.partial(step, call)
        try:
            call()
        except Exception as exc:
            noted.append(exc)
        del call
        await stop()

    coroutine = swallow()
    gc.disable()  # without a collection first: there are many examples
    try:
        coroutine.send(None)
        watched = [weakref.ref(exc) for exc in graph(noted[0])]
        if len(watched) > 20:  # nobody looks at so many
            noted.clear()
        else:
            found = would_be_gone(noted, 0, lambda exc: int(exc is noted[0]))
            noted.clear()
            assert bool(found) is not any(each() is not None for each in watched)
    finally:
        gc.enable()
    with contextlib.suppress(StopIteration):
        coroutine.send(None)
