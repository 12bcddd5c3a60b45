"""What does a test leave behind? Watches one, and says what holds what is left.

As for :mod:`.pytest_plugin`, aiohttp is imported when it is first used.
"""

import contextlib
import functools
import gc
import importlib
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from types import CoroutineType, FrameType, FunctionType
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    FrozenSet,
    Iterable,
    List,
    Optional,
    Set,
    Tuple,
    Union,
)
from weakref import ref

import pytest

from .exceptions import mro_of

if TYPE_CHECKING:
    from .chains import Chain

__all__ = (
    "RUNNERS",
    "SHOWN",
    "Watch",
    "active",
    "collect",
    "counted",
    "instances",
)

_TIMEOUT = 10.0  # seconds; only a request that is never answered takes this long
_TURNS = 20  # of the event loop, for what clients and servers have to say still
SHOWN = 3  # different chains, or types, in a report
RUNNERS = ("_pytest", "pluggy", "pytest", "pytest_aiohttp", "pytest_asyncio")
# aiohttp.pytest_plugin has it collect once its event loop is closed.
_COLLECT_AT_THE_END = ("aiohttp.test_utils",)
# Their own reference cycles are none of the application's.
_NOT_THE_APPLICATION = (
    *RUNNERS,
    "_asyncio",
    "_contextvars",
    "_thread",
    "asyncio",
    "builtins",
    "collections",
    "concurrent",
    "email",  # aiohttp 3.14 has it make a class for each Content-Type
    "functools",
    "selectors",
    "socket",
    "threading",
    "uvloop",
    "weakref",
)

Classes = Union[type, Tuple[type, ...]]
Allow = Union[str, Iterable[str], "Callable[[Chain], bool]"]


class Watch:
    """Looks for requests that are made while it watches, and left behind."""

    def __init__(
        self,
        *,
        requests: int = 1,
        cls: Optional[Classes] = None,
        garbage: bool = False,
        allow: Allow = (),
    ) -> None:
        if type(requests) is not int:
            raise TypeError(f"requests={requests!r} is no int, a number of requests")
        if requests < 0:
            raise ValueError(f"requests={requests!r} is not a number of requests")
        for each in cls if isinstance(cls, tuple) else (cls,):
            if cls is not None and not isinstance(each, type):
                raise TypeError(f"cls={cls!r} is neither a class nor a tuple of them")
        if isinstance(cls, tuple) and not cls:
            raise ValueError("cls=() has no class in it: nothing would be looked for")
        if not isinstance(garbage, bool):
            raise TypeError(f"garbage={garbage!r} is neither True nor False")
        self._expected = requests
        self._cls = cls
        self._garbage = garbage
        self._allows = _tolerance(allow)
        self._old: Dict[int, Any] = {}
        self.has_begun = False
        self.made = 0
        self.collections: Counter[str] = Counter()  # those of others, by their origin

    def begin(self) -> None:
        """Watch; the garbage collector is switched off meanwhile."""
        self.has_begun = True
        if not active:
            collect()
            if gc.isenabled():
                _undo.append(gc.enable)
        gc.disable()
        self._old = {id(each): _reference(each) for each in self._instances()}
        _count(self)

    def end(self) -> None:
        """Watch no more."""
        if self in active:
            _count_no_more(self)
            self._old = {}

    @property
    def _classes(self) -> Classes:
        from aiohttp import web

        return web.BaseRequest if self._cls is None else self._cls

    def _instances(self) -> List[Any]:
        from aiohttp import web

        own = self._classes
        both = (web.BaseRequest, *(own if isinstance(own, tuple) else (own,)))
        return instances(both)

    def _new(self) -> List[Any]:
        return [
            each
            for each in self._instances()
            if self._old.get(id(each), _nothing)() is not each
        ]

    async def settle(self) -> None:
        """Wait until every request is answered and closed connections are gone."""
        import asyncio

        from aiohttp import web

        deadline = time.monotonic() + _TIMEOUT
        await _turn()
        while True:
            # No instances of other classes: a connection has its last response too.
            requests = [
                each for each in self._new() if id(web.BaseRequest) in _bases(each)
            ]
            busy = list(map(_route, _busy(requests)))
            if not busy:
                break
            if time.monotonic() > deadline:
                pytest.fail(
                    f"after {_TIMEOUT:.0f} seconds these are still being served: "
                    f"{_several(busy)}; end them (close the websocket, read the whole "
                    "stream) where they are watched",
                    pytrace=False,
                )
            await asyncio.sleep(0.001)
        await _turn()

    def check(self, closed: bool = False) -> None:
        """Fail if something is left.

        Args:
            closed: whether that is the second look, after the fixtures' teardown.
        """
        if self not in active:
            return
        if self.made < self._expected and not closed:
            pytest.fail(
                f"{counted(self.made, 'request')} made, at least {self._expected} "
                "expected (requests=...): this shows nothing",
                pytrace=False,
            )
        text = self.report()
        if text is None and self._garbage and not closed:
            text = _report_garbage()
        if text is None:
            text = self.doubt()
        if text is not None:
            if closed:
                text += "\n(seen when the test's fixtures were closed)"
            pytest.fail(text, pytrace=False)

    def doubt(self) -> Optional[str]:
        """Say why it shows nothing that nothing is left; None if it does."""
        if not self.collections:
            return None
        times = counted(sum(self.collections.values()), "time")
        origins = _several(self.collections.elements())
        return (
            f"the garbage collector ran {times} meanwhile ({origins}): nobody knows "
            "what it has freed that was left behind; have it neither called nor "
            "switched on while the test is watched"
        )

    def left(self) -> List[Any]:
        """What was made meanwhile and is alive."""
        own = self._classes
        wanted = _ids(own if isinstance(own, tuple) else (own,))
        return [each for each in self._new() if not wanted.isdisjoint(_bases(each))]

    def report(self) -> Optional[str]:
        """Say what is left and why; None if nothing is, that is to blame."""
        left = self.left()
        if not left:
            return None
        from .chains import chains

        gc.unfreeze()  # what is frozen would not be seen to hold anything
        ignored: List[Any] = [left, *_own_frames()]
        ignored += [each for task in _server_tasks() for each in task]
        ignored += [getattr(each, "protocol", None) for each in left]
        ignored += _put_off()
        found = chains(left, ignore=ignored)
        blamed = [
            (chain, each)
            for chain, each in zip(found, left)
            if chain is not None and not self._allows(chain)
        ]
        if not blamed:
            return None
        kinds = Counter(chain.kind for chain, _ in blamed)
        lines = [
            f"{counted(len(blamed), _name(left))} left behind, "
            f"of {counted(self.made, 'request')} made: "
            + ", ".join(f"{kinds[kind]} {_KINDS[kind]}" for kind in sorted(kinds))
        ]
        groups: Dict[str, List[Any]] = {}
        texts: Dict[str, str] = {}
        for chain, each in blamed:
            # One of many in a list is as good as another.
            alike = re.sub(r"index \d+", "index", str(chain))
            texts.setdefault(alike, str(chain))
            groups.setdefault(alike, []).append(each)
        for alike, members in list(groups.items())[:SHOWN]:
            lines += ["", f"{_several(map(_route, members))}:", texts[alike]]
        if len(groups) > SHOWN:
            lines += ["", f"and {counted(len(groups) - SHOWN, 'more chain')}"]
        picture = _draw(blamed[0][1], ignored)
        if picture is not None:
            lines += ["", f"picture: {picture}"]
        return "\n".join(lines)


_KINDS = {
    "delayed": "waiting for the garbage collector (in a reference cycle)",
    "live": "held by something that is not over",
    "permanent": "held for good (by a live reference)",
    "unknown": "held by something that was not found",
}


def _ids(classes: Iterable[type]) -> FrozenSet[int]:
    return frozenset(map(id, classes))  # a metaclass may refuse to be compared


def _bases(each: Any) -> Iterable[int]:
    # Not issubclass(): a request's class is an abstract one, which would remember the
    # type of everything it is asked about, and CPython 3.8 does not survive some.
    return map(id, mro_of(type(each)))


def instances(classes: Iterable[type]) -> List[Any]:
    """All objects of some classes that the collector knows."""
    wanted = _ids(classes)
    return [each for each in gc.get_objects() if not wanted.isdisjoint(_bases(each))]


def _nothing() -> None:
    return None


def _reference(each: Any) -> Callable[[], Any]:
    try:
        return ref(each)
    except TypeError:  # held meanwhile, so that its id stays its own
        return functools.partial(_itself, each)


def _itself(each: Any) -> Any:
    return each


def _tolerance(allow: Allow) -> "Callable[[Chain], bool]":
    if callable(allow):
        from .options import check_function

        check_function("allow", allow, ("chain",))
        return allow
    try:
        leaks = {allow} if isinstance(allow, str) else set(allow)
    except TypeError:
        raise TypeError(
            f"allow={allow!r} is neither a leak's id, nor several, nor a function"
        ) from None
    if leaks:
        from .leaks import CATALOGUE

        known = {leak.id.partition("/")[0] for leak in CATALOGUE}
        if not leaks <= known:
            raise ValueError(
                f"allow={allow!r}: the catalogue knows no "
                f"{', '.join(sorted(map(str, leaks - known)))}, only "
                f"{', '.join(sorted(known))}"
            )
    return lambda chain: chain.leak in leaks


# Those that watch; while there is one, requests are counted as they are made.
active: List[Watch] = []
_undo: List[Callable[[], None]] = []


def _count(watch: Watch) -> None:
    active.append(watch)
    if len(active) > 1:
        return
    from aiohttp import web

    make = web.BaseRequest.__init__

    @functools.wraps(make)
    def count(self: Any, *args: Any, **kwargs: Any) -> None:
        for each in active:
            each.made += 1
        make(self, *args, **kwargs)

    web.BaseRequest.__init__ = count  # type: ignore[method-assign]
    _undo.append(functools.partial(setattr, web.BaseRequest, "__init__", make))
    gc.callbacks.append(_note_collection)
    _undo.append(functools.partial(gc.callbacks.remove, _note_collection))


def _count_no_more(watch: Watch) -> None:
    active.remove(watch)
    while _undo and not active:
        _undo.pop()()


def collect() -> None:
    """Collect, in a function of its own: the collections of others are counted."""
    gc.collect()


def _note_collection(phase: str, info: Dict[str, int]) -> None:
    """Note that somebody else collects, of whatever generation."""
    frame = sys._getframe().f_back  # noqa: SLF001
    if phase != "start" or frame is None or frame.f_code is collect.__code__:
        return
    module = str(frame.f_globals.get("__name__"))
    if gc.isenabled():
        origin = "switched on by somebody"
    elif module in _COLLECT_AT_THE_END or module.partition(".")[0] in RUNNERS:
        return
    else:
        code = frame.f_code
        origin = f"called by {code.co_name} ({code.co_filename}:{frame.f_lineno})"
    for each in active:
        each.collections[origin] += 1


async def _turn() -> None:
    """Let the loop do what it has been given, and what that gives it."""
    import asyncio

    for _ in range(_TURNS):
        await asyncio.sleep(0)


def _busy(requests: List[Any]) -> List[Any]:
    """The requests that are being served, or whose connections are about to end."""
    from aiohttp import web

    served: Set[int] = set()
    last: Set[int] = set()
    for _, coroutine, frame in _server_tasks():
        is_connection = coroutine.cr_code is web.RequestHandler.start.__code__
        # Before CPython 3.11 the frame holds the variables, then the coroutine does.
        for held in (*gc.get_referents(coroutine), *gc.get_referents(frame)):
            (last if is_connection else served).add(id(held))
    return [
        each
        for each in requests
        if id(each) in served
        or (id(each) in last and (not each.transport or each.transport.is_closing()))
    ]


def _server_tasks() -> List[List[Any]]:
    """The unfinished tasks of requests and connections, with coroutine and frame.

    That of a connection holds its last request for as long as it is open, which is no
    leak: there is one for each connection.
    """
    import asyncio

    from aiohttp import web

    tasks = []
    for task in instances([asyncio.Task]):
        coroutine = None if task.done() else task.get_coro()
        while coroutine is not None:  # a task factory may wrap that of the server
            frame = getattr(coroutine, "cr_frame", None)
            if frame is not None:
                if frame.f_globals.get("__name__") == web.RequestHandler.__module__:
                    tasks.append([task, coroutine, frame])
                    break
            coroutine = getattr(coroutine, "cr_await", None)
    return tasks


def _put_off() -> List[Any]:
    """What guarded connections sever when they go on to another request, or end."""
    from .connections import followed_connections

    connections = [found() for found in list(followed_connections.values())]
    return [
        each
        for connection in connections
        if connection is not None
        for each in (connection, connection.put_off)
    ]


def _own_frames() -> List[FrameType]:
    """The test's, which lets go of its variables when it ends, and what runs it."""
    frames = []
    frame: Optional[FrameType] = sys._getframe(1)  # noqa: SLF001
    while frame is not None:
        # Not ours: one of them would hold itself, in a reference cycle.
        if frame.f_globals.get("__package__") != __package__:
            frames.append(frame)
        frame = frame.f_back
    return frames


def _route(each: Any) -> str:
    """What a request was for, without any value of it."""
    from .counts import canonical_path

    if getattr(each, "match_info", None) is None:
        return type(each).__qualname__
    path = canonical_path(each)  # None also for a mocked request, whose path is a mock
    return f"{each.method} {'without a route' if path is None else path or '/'}"


def _several(names: Iterable[str]) -> str:
    return ", ".join(
        name if times == 1 else f"{times} x {name}"
        for name, times in Counter(names).most_common(SHOWN)
    )


def _name(left: List[Any]) -> str:
    names = {type(each).__qualname__ for each in left}
    return names.pop().lower() if names == {"Request"} else "object"


def counted(number: int, noun: str) -> str:
    """A number of things, in words."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _draw(each: Any, ignored: List[Any]) -> Optional[str]:
    """Draw what leads to an object, where objgraph is installed."""
    try:
        objgraph = importlib.import_module("objgraph")
    except ImportError:
        return None
    suffix = ".svg" if shutil.which("dot") else ".dot"
    path = tempfile.mkdtemp(prefix="cyclebreak-") + "/request" + suffix
    own = {id(ignored), *map(id, ignored)}
    with contextlib.redirect_stdout(None):
        objgraph.show_backrefs(
            [each], max_depth=7, too_many=8, extra_ignore=own, filename=path
        )
    return path


def _report_garbage() -> Optional[str]:
    """Say what cyclic garbage there is, apart from that of asyncio and the test."""
    flags = gc.get_debug()
    before = len(gc.garbage)
    gc.set_debug(flags | gc.DEBUG_SAVEALL)
    try:
        collect()
        garbage = gc.garbage[before:]
        del gc.garbage[before:]
    finally:
        gc.set_debug(flags)
    blamed: Counter[str] = Counter()
    for cluster in _clusters(garbage):
        if any(map(_is_of_the_application, cluster)):
            blamed.update(map(_kind, cluster))
    if not blamed:
        return None
    return f"cyclic garbage: {counted(sum(blamed.values()), 'object')}: " + ", ".join(
        f"{number} {name}" for name, number in blamed.most_common(10)
    )


def _kind(each: Any) -> str:
    from .counts import type_name

    if issubclass(type(each), type):
        return f"class {type_name(each)}"
    return type(each).__qualname__


def _clusters(objects: List[Any]) -> List[List[Any]]:
    """Put together what refers to each other."""
    leader = {id(each): id(each) for each in objects}

    def lead(key: int) -> int:
        while leader[key] != key:
            leader[key] = key = leader[leader[key]]
        return key

    for each in objects:
        for held in gc.get_referents(each):
            if id(held) in leader:
                leader[lead(id(held))] = lead(id(each))
    clusters: Dict[int, List[Any]] = {}
    for each in objects:
        clusters.setdefault(lead(id(each)), []).append(each)
    return list(clusters.values())


def _is_of_the_application(each: Any) -> bool:
    from .counts import module_of

    module = module_of(type(each))
    if type(each) is FrameType:
        module = each.f_globals.get("__name__")
    elif type(each) is FunctionType:
        module = each.__module__
    elif issubclass(type(each), type):
        module = module_of(each)
    elif type(each) is CoroutineType and each.cr_frame is not None:
        module = each.cr_frame.f_globals.get("__name__")
    return str(module).partition(".")[0] not in _NOT_THE_APPLICATION
