"""Who holds it: shown on cycles and holders of each kind, and on the catalogue."""

import asyncio
import contextlib
import cProfile
import dataclasses
import functools
import gc
import signal
import sys
import threading
import weakref
from types import MethodType, ModuleType, SimpleNamespace
from typing import Any, Callable, Dict, Iterator, List, Optional, Set

import pytest
from aiohttp import web

from aiohttp_cyclebreak import guard_server, naming, probe, setup
from aiohttp_cyclebreak.chains import Chain, Looking, chains, shortest_chain
from aiohttp_cyclebreak.frames import COUNTS_ARE_EXACT
from aiohttp_cyclebreak.leaks import CATALOGUE, Kind, Leak
from aiohttp_cyclebreak.probe import Floor, measure

from .service import AIOHTTP, run, serve, start

pytestmark = pytest.mark.usefixtures("few_objects")

KEPT: List[Any] = []
GLOBAL: Any = None
SECRET = "a secret value"


class Target:
    """What is looked for."""

    link: Any = None
    other: Any = None


@pytest.fixture(autouse=True)
def _no_collection() -> Iterator[None]:
    gc.unfreeze()  # what is frozen is hidden from whoever looks for holders
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    KEPT.clear()
    gc.collect()
    gc.freeze()


def found(target: object, **options: Any) -> Chain:
    # The test's variables are no holders either.
    ignore = [sys._getframe(1), *options.pop("ignore", ())]
    chain = shortest_chain(target, ignore=ignore, **options)
    assert chain is not None
    return chain


def test_nothing_holds_what_only_a_variable_has() -> None:
    """The caller's own variables are no holders, nor are those that it ignores."""
    target = Target()
    holder = [target]
    assert shortest_chain(target) is None
    assert holder


def test_a_module() -> None:
    """What a module holds is held for good."""
    target = Target()
    KEPT.append({SECRET: target})
    chain = found(target)
    assert chain.kind == "permanent"
    assert [link.type for link in chain.links] == [
        f"module {__name__}",
        "list",
        "dict",
        f"{__name__}.Target",
    ]
    assert chain.links[0].holds == "global 'KEPT'"
    assert chain.links[1].holds == "index 0"
    assert SECRET not in str(chain)


def test_an_ignored_holder() -> None:
    """What the caller says is no holder is none."""
    target = Target()
    KEPT.append(target)
    assert shortest_chain(target, ignore=[KEPT]) is None


def test_attributes_slots_and_closures_have_names() -> None:
    """Each way to hold something is called by its name."""

    class Slotted:
        __slots__ = ("slot",)

    target = Target()
    slotted: Any = Slotted()
    slotted.slot = target

    def function() -> Any:
        return slotted

    KEPT.append(functools.partial(SimpleNamespace, attribute=function))
    holds = " / ".join(link.holds for link in found(target).links)
    assert "attribute 'slot'" in holds
    assert "closure over 'slotted'" in holds
    assert "keywords" in holds


TOKEN = "token_of_a_client"


def test_names_that_no_code_has_are_not_shown() -> None:
    """They may be what a client has sent."""
    for holder in (Target(), SimpleNamespace(), Annotated()):
        target = Target()
        setattr(holder, TOKEN, target)
        KEPT.append(holder)
        chain = found(target)
        assert chain.links[-2].holds == "an attribute"
        assert TOKEN not in str(chain)
        KEPT.clear()
    target = Target()
    globals()[TOKEN] = target
    try:
        chain = found(target)
    finally:
        del globals()[TOKEN]
    assert chain.links[0].holds == "a global"
    assert TOKEN not in str(chain)


class Annotated:
    """Its attributes are named by code of some kinds."""

    annotated: Any

    def method(self) -> Any:
        return [each.in_a_lambda for each in [self] if (lambda: self.in_another)()]

    def wrapped(self) -> Any:
        return self.in_a_wrapped

    wrapped = functools.wraps(wrapped)(lambda self: None)
    of_property = property(lambda self: self.in_a_property)
    of_class = classmethod(lambda cls: cls.in_a_class_method)  # type: ignore[var-annotated]


@pytest.mark.parametrize(
    "name",
    [
        "annotated",
        "in_a_lambda",
        "in_another",
        "in_a_wrapped",
        "in_a_property",
        "in_a_class_method",
        "link",  # another class of the module has it
    ],
)
def test_names_that_code_has_are_shown(name: str) -> None:
    """Of the class itself or of its module."""
    holder, target = Annotated(), Target()
    setattr(holder, name, target)
    KEPT.append(holder)
    assert found(target).links[-2].holds == f"attribute {name!r}"


def test_the_shortest_of_two() -> None:
    """A longer way is not told."""
    target = Target()
    KEPT.append([[[target]]])
    KEPT.append(target)
    assert len(found(target).links) == 3


def test_a_cycle_through_the_target() -> None:
    """Where the target refers to itself, nothing leads on from the cycle."""
    target = Target()
    target.link = {"back": target}
    reference = weakref.ref(target)
    chain = found(target)
    assert chain.kind == "delayed"
    assert chain.links == chain.cycle[-1:]
    assert "leads on" not in str(chain)
    assert [link.type for link in chain.cycle] == [
        f"{__name__}.Target",
        "dict",
        f"{__name__}.Target",
    ]
    assert chain.cycle[0].holds == "attribute 'link'"
    del target
    assert reference() is not None
    gc.collect()
    assert reference() is None


def test_a_cycle_that_leads_to_the_target() -> None:
    """The cycle nearest to the target is told, and how it leads on."""
    target = Target()
    owner = Target()
    owner.link = [owner, target]
    del owner
    chain = found(target)
    assert chain.kind == "delayed"
    assert chain.cycle[0].type == chain.cycle[-1].type
    assert chain.links[0].type == chain.cycle[0].type
    assert chain.links[-1].type == f"{__name__}.Target"
    assert "leads on to it:\n    list: index 1" in str(chain)


def make_cycle(target: Target) -> None:
    error: Optional[Exception] = None
    try:
        raise ValueError(SECRET)
    except ValueError as exc:
        error = exc
    assert error


def test_a_cycle_through_a_frame() -> None:
    """A frame is told by function, file and line, and by the variable."""
    target = Target()
    make_cycle(target)
    chain = found(target)
    assert chain.kind == "delayed"
    frame = chain.links[0]
    assert "make_cycle" in frame.type
    assert frame.holds == "local variable 'target'"
    assert frame.file == __file__
    line = make_cycle.__code__.co_firstlineno
    assert frame.line is not None
    assert line < frame.line <= line + 6
    assert any(link.holds == "local variable 'error'" for link in chain.cycle)
    assert SECRET not in str(chain)
    assert "ValueError" in str(chain)


def test_a_suspended_task() -> None:
    """A task that waits is where the chain begins, whatever wakes it."""

    async def wait(target: Target, event: asyncio.Event) -> None:
        await event.wait()

    async def main() -> Chain:
        target, event = Target(), asyncio.Event()
        KEPT.append(event)
        task = asyncio.ensure_future(wait(target, event))
        await asyncio.sleep(0)
        chain = found(target)
        event.set()
        await task
        return chain

    chain = run(main())
    assert chain.kind == "live"
    assert chain.links[0].type.endswith("Task")
    assert "wait" in chain.links[1].type
    assert chain.links[-2].holds == "local variable 'target'"


def test_a_task_that_nothing_wakes() -> None:
    """A pending task that nobody refers to is garbage like anything else."""

    async def wait(target: Target) -> None:
        await asyncio.get_running_loop().create_future()

    async def main() -> Chain:
        target = Target()
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        task = asyncio.ensure_future(wait(target))
        await asyncio.sleep(0)
        del task
        chain = found(target)
        gc.collect()  # while there is a loop that asks who destroyed it
        return chain

    assert run(main()).kind == "delayed"


def test_a_timer() -> None:
    """What the event loop is to call later is held by it."""

    async def main() -> Chain:
        target = Target()
        timer = asyncio.get_running_loop().call_later(3600, print, target)
        chain = found(target)
        timer.cancel()
        return chain

    chain = run(main())
    assert chain.kind == "live"
    assert chain.links[0].type.endswith("EventLoop")


def test_a_finished_task() -> None:
    """What a task still has of its result is seen, though get_referrers() misses it.

    In C the type of a task asks its base class what that holds, and drops the answer.
    """
    target = Target()

    async def give() -> List[Any]:
        return [target]

    async def main() -> None:
        task = asyncio.ensure_future(give())
        await task
        KEPT.append(task)

    run(main())
    assert [link.type.rpartition(".")[2] for link in found(target).links] == [
        f"module {__name__}".rpartition(".")[2],
        "list",
        "Task",
        "list",
        "Target",
    ]


def test_an_attribute_of_a_future() -> None:
    """That is seen too, which get_referrers() misses from CPython 3.12 on."""
    target = Target()

    async def main() -> None:
        future: Any = asyncio.get_running_loop().create_future()
        future.link = target
        KEPT.append(future)

    run(main())
    chain = found(target)
    assert chain.kind == "permanent"
    assert chain.links[2].type.endswith("Future")


def test_code_of_a_module_that_runs() -> None:
    """Its variables are those of the module, and it is not over with the code."""
    module = ModuleType("module_of_a_script")
    namespace: Any = vars(module)
    namespace["shortest_chain"] = shortest_chain
    sys.modules[module.__name__] = module
    try:
        exec("target = [1]; chain = shortest_chain(target)", namespace)
    finally:
        del sys.modules[module.__name__]
    assert namespace["chain"].kind == "permanent"
    assert namespace["chain"].links[0].type == "module module_of_a_script"


@contextlib.contextmanager
def elsewhere(work: Callable[..., Any], *given: Any) -> Iterator[None]:
    """Run a function in another thread, until it waits and then to its end."""
    waits, goes_on = threading.Event(), threading.Event()

    def wait() -> None:
        waits.set()
        goes_on.wait()

    thread = threading.Thread(target=work, args=(*given, wait))
    thread.start()
    waits.wait()
    try:
        yield
    finally:
        goes_on.set()
        thread.join()


def test_a_running_thread() -> None:
    """A function that runs in another thread holds what its variables hold."""

    def work(given: List[Any], wait: Callable[[], None]) -> None:
        variable = given.pop()
        wait()
        assert variable

    target = Target()
    with elsewhere(work, [target]):
        chain = shortest_chain(target)
    assert chain is not None
    assert chain.kind == "live"
    assert "work" in chain.links[0].type
    assert chain.links[0].holds == "local variable 'variable'"


# What shares its local variables, and so must find them as it has left them.  Before
# CPython 3.13 there is one dict of them for all who ask, exec() included.
ONE_DICT = sys.version_info < (3, 13)


def test_what_runs_in_another_thread_keeps_its_locals() -> None:
    """What it has deleted does not come back, what it has added stays."""
    found_: List[Any] = []

    def deletes(target: Target, wait: Callable[[], None]) -> None:
        fields = locals()
        del fields["target"]
        wait()
        found_.append("target" in fields)

    def adds(target: Target, wait: Callable[[], None]) -> None:
        exec("added = 42")
        wait()
        found_.append(eval("added"))

    target = Target()
    KEPT.append(target)
    for work in (deletes, adds) if ONE_DICT else (deletes,):
        with elsewhere(work, target):
            assert found(target).kind in ("live", "permanent")
    assert found_ == ([False, 42] if ONE_DICT else [False])


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_what_is_profiled_keeps_its_variables(where: str) -> None:
    """They are written back into it from its locals, after each call that is told."""
    found_: List[Any] = []

    def work(target: Target, wait: Callable[[], None]) -> None:
        variable, asked = "kept", False

        def profile(frame: Any, event: str, argument: Any) -> None:
            nonlocal asked
            if not asked and frame.f_code is work.__code__:
                asked = True
                wait()

        sys.setprofile(profile)
        try:
            len(variable)
        finally:
            sys.setprofile(None)
        found_.append((variable, type(target)))

    def look() -> None:
        assert found(target).kind in ("live", "permanent")

    target = Target()
    KEPT.append(target)
    if where == "here":
        work(target, look)
    else:
        with elsewhere(work, target):
            look()
    assert found_ == [("kept", Target)]


def test_a_profiler_in_c_hides_no_name() -> None:
    """It is given no locals, as coverage's tracer in C is not."""

    def generate(variable: Any) -> Iterator[None]:
        yield

    target = Target()
    generator = generate(target)
    next(generator)
    KEPT.append(generator)
    profile = cProfile.Profile()
    profile.enable()
    try:
        chain = found(target)
    finally:
        profile.disable()
    assert chain.links[-2].holds == "local variable 'variable'"


def test_what_is_suspended_keeps_its_locals() -> None:
    """It is told that it holds something, and not always by which variable."""

    async def deletes(target: Target, event: asyncio.Event) -> bool:
        fields = locals()
        del fields["target"]
        await event.wait()
        return "target" in fields

    async def adds(target: Target, event: asyncio.Event) -> int:
        exec("added = 42")
        await event.wait()
        return int(eval("added"))

    async def main() -> List[Any]:
        event = asyncio.Event()
        KEPT.append(event)
        tasks: List[Any] = []
        for each in (deletes, adds) if ONE_DICT else (deletes,):
            target = Target()
            tasks.append(asyncio.ensure_future(each(target, event)))
            await asyncio.sleep(0)
            chain = found(target)
            assert chain.kind == "live"
            assert each.__qualname__ in chain.links[1].type
            assert chain.links[-2].holds.startswith("local variable")
        event.set()
        return await asyncio.gather(*tasks)

    assert run(main()) == ([False, 42] if ONE_DICT else [False])


def test_what_is_over_keeps_its_locals() -> None:
    """A frame of a traceback, whose locals somebody has."""

    def fails(target: Target, extra: str) -> None:
        fields = locals()
        del fields["extra"]
        raise KeyError(fields)

    target = Target()
    error: Any = None
    try:
        fails(target, "x")
    except KeyError as exc:
        error = exc
    KEPT.append(error.__traceback__.tb_next)
    fields = error.args[0]
    error = None
    chain = found(target, ignore=[fields])
    assert chain.links[-2].holds.startswith("local variable")
    assert set(fields) == {"target"}


@pytest.mark.skipif(not COUNTS_ARE_EXACT, reason="nothing tells of such a holder")
@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no such signal")
def test_a_holder_that_the_collector_does_not_show() -> None:
    """What C code holds is alive, and is not mistaken for a cycle."""
    target = Target()
    target.link = [target]
    before = signal.signal(signal.SIGUSR1, functools.partial(print, target))
    try:
        chain = found(target)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert chain.kind == "live"
    assert chain.links[0].type.startswith("something in C")
    assert chain.links[1].type == "functools.partial"


class Meta(type):
    """Of classes that tell nothing about themselves."""

    def fail(cls, *given: Any) -> Any:
        raise RuntimeError(SECRET)

    __module__ = __mro__ = __flags__ = property(fail)  # type: ignore[assignment]
    __eq__ = __hash__ = fail


class Fights(metaclass=Meta):
    """Nor do its objects, and it can be called."""

    __dict__: Any = property(Meta.fail)
    __slots__ = ("held",)

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(SECRET)

    def __call__(self, *given: Any) -> None:
        pass


class Lazy(ModuleType):
    """It would load whatever it stands for."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(SECRET)


class Loop(asyncio.AbstractEventLoop):
    """What only looks like one."""

    is_closed = Meta.fail


def test_holders_that_fight_back() -> None:
    """What they are is read past their own code."""
    fights: Any = Fights()
    for holder in (fights, MethodType(fights, fights), Lazy("lazy"), Loop()):
        target = Target()
        if type(holder) is MethodType:
            holder = MethodType(fights, target)
        else:
            object.__setattr__(holder, "held", target)
        KEPT.append(holder)
        chain = found(target)
        assert chain.kind == "permanent"
        assert SECRET not in str(chain)
        KEPT.clear()


WALKING = {each.__name__ for each in (naming._items, naming._key, naming._how_dict)}


@pytest.mark.parametrize("by", ["trace", "collector"])
def test_what_is_changed_while_it_is_told(by: str) -> None:
    """As by another thread; here by a trace function, or by what is collected."""

    def change() -> None:
        for each in (vars(owner), cache, globals()):
            each[f"new_{len(each)}"] = None

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if frame.f_globals["__name__"] != naming.__name__:
            return None
        if frame.f_code.co_name in WALKING:
            change()
        return trace

    def collected(phase: str, _: Any) -> None:
        caller: Any = sys._getframe(1)
        if caller.f_code.co_name in WALKING:
            change()

    target, owner = Target(), Target()
    cache: Any = dict.fromkeys(range(5000))  # more than there are tuples in reserve
    before = set(globals())
    owner.other, owner.link = None, target
    cache["owner"] = owner
    KEPT.append(cache)
    thresholds = gc.get_threshold()
    if by == "trace":
        sys.settrace(trace)
    else:
        gc.callbacks.append(collected)
        gc.set_threshold(1, 10**6, 10**6)
        gc.enable()
    try:
        told = found(target)
    finally:
        sys.settrace(None)
        gc.disable()
        gc.set_threshold(*thresholds)
        gc.callbacks[:] = [each for each in gc.callbacks if each is not collected]
        for each in set(globals()) - before:
            del globals()[each]
    assert len(cache) > 5001
    assert told.kind == "permanent"
    assert [link.holds for link in told.links[:-1]] == [
        "global 'KEPT'",
        "index 0",
        "value of a key of type str",
        "attribute 'link'",
    ]


def test_applications_come_first() -> None:
    """How an application is held is not told, only what it holds."""
    key: Any = "kept" if AIOHTTP < (3, 9) else web.AppKey("kept", list)

    async def keep(request: web.Request) -> web.Response:
        request.app[key].append(request)
        return web.Response()

    async def main() -> Chain:
        app = web.Application()
        app[key] = []
        app.router.add_get("/", keep)
        async with serve(app) as service:
            await service.ask()
            await service.settle()
            return found(app[key][0])

    chain = run(main())
    assert chain.kind == "permanent"
    assert chain.links[0].type.endswith("Application")
    assert chain.links[-1].type.endswith("Request")
    assert "localhost" not in str(chain)


def test_an_application_that_is_garbage() -> None:
    """It is in reference cycles of its own, and holds nothing for good."""
    key: Any = "kept" if AIOHTTP < (3, 9) else web.AppKey("kept", list)
    target, app = Target(), web.Application()
    app[key] = [target]
    del app
    chain = found(target)
    assert chain.kind == "delayed"
    assert chain.links[0].type.endswith("Application")


def test_out_of_time() -> None:
    """What was found so far is told, and that it was not enough."""
    target = Target()
    KEPT.append([target])
    chain = found(target, budget=0.0)
    assert chain.kind == "unknown"
    assert [link.type for link in chain.links] == [f"{__name__}.Target"]
    assert found(target, budget=60.0).kind == "permanent"


def test_out_of_time_behind_an_application() -> None:
    """It may be garbage, as here: that it holds something for good is not known yet."""
    key: Any = "kept" if AIOHTTP < (3, 9) else web.AppKey("kept", list)
    app = web.Application()
    app[key] = [Target()]
    looking = Looking(app[key][0], most=1000)
    del app
    while not any(type(each) is web.Application for each in looking._search._objects):
        assert looking.step()
    looking.give_up()
    chain = looking.chain()
    looking.end()
    assert chain is not None
    assert chain.kind == "unknown"
    assert any(link.type.endswith("Application") for link in chain.links)


def test_a_popular_holder() -> None:
    """Of those that hold it too, only some are looked at, and all that end it."""
    many, most = 10_000, 50
    lines: List[int] = []

    def count(frame: Any, event: str, argument: Any) -> Any:
        lines[-1] += event == "line"
        return count

    KEPT.append([Target()])
    KEPT.append([(KEPT, number) for number in range(many)])
    looking = Looking(KEPT[0][0], most=most)
    sys.settrace(count)
    try:
        while len(looking._search._objects) <= most:
            lines.append(0)
            assert looking.step()
    finally:
        sys.settrace(None)
    looking.give_up()
    chain = looking.chain()
    looking.end()
    assert chain is not None
    assert chain.kind == "permanent"
    assert [link.type for link in chain.links] == [
        f"module {__name__}",
        "list",
        "list",
        f"{__name__}.Target",
    ]
    assert max(lines) < many


def owned(kind: str, owners: "List[weakref.ref[Target]]") -> Target:
    owner = Target()
    owner.other = Target()
    owners.append(weakref.ref(owner))
    if kind == "delayed":
        owner.link = owner
    else:
        KEPT.append(owner)
    return owner.other  # type: ignore[no-any-return]


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("kind", ["permanent", "delayed"])
def test_what_ends_while_it_is_looked_for(kind: str, ends: bool) -> None:
    """In the pauses of a search: what was seen to hold it does so no more."""
    owners: List[weakref.ref[Target]] = []
    looking = Looking(owned(kind, owners), most=1000)
    while looking.step():
        pass
    owner: Any = owners[0]()
    if ends:
        owner.other = None
    chain = looking.chain()
    looking.end()
    assert chain is not None
    assert chain.kind == ("unknown" if ends else kind)


def test_frozen() -> None:
    """What gc.freeze() hides may be a holder: no verdict is given without it."""
    target = Target()
    target.link = target
    gc.freeze()
    try:
        fresh = Target()
        fresh.link = [fresh]
        assert found(fresh).kind == "unknown"
        held = Target()
        KEPT.append([held])
        assert found(held).kind == "unknown"
    finally:
        gc.unfreeze()
    assert found(fresh).kind == "delayed"
    target.link = None


def test_it_leaves_nothing_behind() -> None:
    """The search itself makes no cycles and keeps nothing."""
    target = Target()
    target.link = [target]
    KEPT.append(target)
    gc.collect()
    for _ in range(3):
        found(target)
    assert gc.collect() == 0
    KEPT.clear()
    target.link = None
    reference = weakref.ref(target)
    del target
    assert reference() is None


def test_the_same_each_time() -> None:
    """Two searches tell the same."""
    target = Target()
    KEPT.extend([target, {1: target}, [target]])
    assert len({str(found(target)) for _ in range(5)}) == 1


def test_several_at_once() -> None:
    """Each target has a chain of its own, in their order, or none."""
    kept, cyclic, free = Target(), Target(), Target()
    KEPT.append(kept)
    cyclic.link = cyclic
    found_ = chains([free, kept, cyclic, kept])
    assert [chain and chain.kind for chain in found_] == [
        None,
        "permanent",
        "delayed",
        "permanent",
    ]
    cyclic.link = None


def test_one_that_holds_another() -> None:
    """The chain of the other leads through it, and begins where that of both does."""
    first, second = Target(), Target()
    first.link = second
    KEPT.append(first)
    one, other = chains([first, second], ignore=[sys._getframe()])
    assert one is not None
    assert other is not None
    assert [link.type for link in other.links[:2]] == [
        link.type for link in one.links[:2]
    ]
    assert other.links[-2].holds == "attribute 'link'"


def test_one_holder_of_two() -> None:
    """It is needed no more once the one is known to live, and then for the other."""
    global GLOBAL
    GLOBAL, other = Target(), Target()
    between = [other]
    holder = [GLOBAL, between]
    KEPT.append([holder])
    del between, holder
    told = chains([GLOBAL, other], ignore=[sys._getframe()])
    GLOBAL = None
    assert [len(chain.links) for chain in told if chain] == [2, 6]


# What the catalogue's leaks come down to, where that is not the leak itself: the
# shortest chain of a websocket's handler that raises is that of any that raises.
HTTP = {"http-exception"}
SAME: Dict[str, Set[str]] = {
    "image-upload": HTTP,
    "gather": HTTP,
    "task-group": HTTP,
    "generator": HTTP,
    "none-response": {"close-cancel", "started", "kept-local"},
    "websocket": {"websocket", "started", *HTTP},
    "unseen": HTTP,
    "kept-local": {"kept-local", *HTTP},
}
ON_MANY = {"close-cancel"}  # beside whatever else a request is held by
NO_FLOOR = Floor(**{field.name: 0 for field in dataclasses.fields(Floor)})
# One of each family, and those that are held in ways of their own.
KEPT_OTHERWISE = {
    "websocket/stored",
    "stash/answered",
    "gateway/refused/swallow",
    "gateway/cut/swallow",
    "gateway/half/swallow",
    "gateway/half/gather",
    "client-gone/response",
    "client-gone/stream",
}
SHOWN = [
    leak
    for leak in CATALOGUE
    if ("/" not in leak.id or leak.id in KEPT_OTHERWISE)
    and leak.kind is not Kind.LIVE
    and leak.is_on(AIOHTTP, sys.version_info)
]


@pytest.mark.thorough
@pytest.mark.parametrize("leak", SHOWN, ids=lambda leak: leak.id)
def test_the_catalogue(leak: Leak, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each leak is of the kind that a collection shows, and its family is named."""
    told: List[Any] = []
    collect = probe._collect

    def look_first() -> int:
        gc.unfreeze()
        requests = probe.requests_alive()
        told[:] = zip(map(weakref.ref, requests), chains(requests))
        del requests
        return collect()

    monkeypatch.setattr(probe, "_collect", look_first)
    before = {id(each) for each in probe.requests_alive()}
    count = run(measure(leak, NO_FLOOR, visits=2))
    if not count.left:
        pytest.skip("it leaves no request behind, only garbage")
    new = [(ref, chain) for ref, chain in told if id(ref()) not in before]
    assert new
    families = SAME.get(leak.id.partition("/")[0], {leak.id.partition("/")[0]})
    for reference, chain in new:
        assert chain is not None
        assert chain.kind == ("delayed" if reference() is None else "permanent")
        assert chain.leak in families | ON_MANY
        assert chain.advice
    gone: Any = [chain for reference, chain in new if reference() is None]
    assert bool(gone) is (leak.kind is Kind.DELAYED)


def test_the_advice_for_what_a_handler_swallows() -> None:
    """Its service is guarded already: to guard it is no advice."""

    async def answer(request: web.Request) -> web.Response:
        try:
            raise ValueError
        except ValueError as exc:
            kept = exc
        return web.Response(text=repr(kept))

    async def main() -> List[Optional[Chain]]:
        app = web.Application()
        app.router.add_get("/", answer)
        setup(app)
        before = set(map(id, probe.requests_alive()))  # of leaks for good
        async with serve(app) as service:
            await service.ask()
            await service.settle()
            left = [each for each in probe.requests_alive() if id(each) not in before]
            return chains(left)

    (chain,) = run(main())
    assert chain.leak == "kept-local"
    assert "store the exception in the request" in chain.advice


@pytest.mark.skipif(
    (3, 9) <= sys.version_info < (3, 11), reason="the chain ends in C code of asyncio's"
)
def test_the_advice_for_a_low_level_server() -> None:
    """It has no application, and so no middlewares that one could add to."""

    async def refuse(request: web.BaseRequest) -> web.Response:
        raise web.HTTPBadRequest

    async def main(guarded: bool) -> List[Optional[Chain]]:
        before = set(map(id, probe.requests_alive()))  # of leaks for good
        runner = web.ServerRunner(web.Server(refuse))
        await runner.setup()
        if guarded:
            guard_server(runner)
        try:
            service = await start(runner)
            await service.ask()
            await service.settle()
            left = [each for each in probe.requests_alive() if id(each) not in before]
            return chains(left)
        finally:
            await runner.cleanup()

    (chain,) = run(main(guarded=False))
    assert chain.leak in {"http-exception", "close-cancel"}  # it may have both
    assert chain.advice.startswith("guard_server(runner) stops this; ")
    assert run(main(guarded=True)) == []
