"""Does a test leave requests behind? Fixtures and a marker for pytest.

aiohttp, and whatever else takes time to import, is imported when it is first used.
"""

import contextlib
import functools
import gc
import importlib
import inspect
import logging
import re
import shutil
import sys
import tempfile
import time
from array import array
from collections import Counter
from types import CoroutineType, FrameType, FunctionType
from typing import (
    TYPE_CHECKING,
    Any,
    AsyncIterator,
    Callable,
    Coroutine,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    Optional,
    Set,
    Tuple,
    Union,
)
from weakref import WeakKeyDictionary, ref

import pytest

if TYPE_CHECKING:
    from .chains import Chain

__all__ = ("no_request_cycles", "soak")

_NAME = "no_request_cycles"
_TIMEOUT = 10.0  # seconds; only a request that is never answered takes this long
_TURNS = 20  # of the event loop, for what clients and servers have to say still
_SHOWN = 3  # different chains, or types, in a report
_SAMPLES = 12  # of a soak: three times four
_RUNNERS = ("_pytest", "pluggy", "pytest", "pytest_aiohttp", "pytest_asyncio")
# aiohttp.pytest_plugin has it collect once its event loop is closed.
_COLLECT_AT_THE_END = ("aiohttp.test_utils",)
# Their own reference cycles are none of the application's.
_NOT_THE_APPLICATION = (
    *_RUNNERS,
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


def pytest_configure(config: "pytest.Config") -> None:
    """Make the marker known."""
    config.addinivalue_line(
        "markers",
        f"{_NAME}(requests=1, cls=None, garbage=False, allow=()): fail if the test "
        "leaves a request of aiohttp.web to the garbage collector or alive for good; "
        "it has to make at least that many requests",
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(
    config: "pytest.Config", items: List[pytest.Item]
) -> None:
    """Say what is wrong with a marker before anything runs."""
    if hasattr(config, "workerinput"):  # nobody would see it from pytest-xdist's
        return
    for wrong in filter(None, map(_wrong, items)):
        raise pytest.UsageError(wrong)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fail a test whose marker is wrong."""
    wrong = _wrong(item)
    if wrong is not None:
        pytest.fail(wrong, pytrace=False)


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Watch a test that is marked."""
    marker = item.get_closest_marker(_NAME)
    if marker is None or not isinstance(item, pytest.Function):
        yield
        return
    from unittest import TestCase

    watch = _make_watch(marker.args, marker.kwargs)
    _watches[item] = watch
    case = item.instance
    item.obj = _watched(item.obj, watch)
    if isinstance(case, TestCase):  # it finds a coroutine function by itself
        setattr(case, item.name, item.obj)
    yield
    if isinstance(case, TestCase):
        vars(case).pop(item.name, None)  # by which it holds itself


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Let no marked test pass that was not watched."""
    outcome: Any = yield
    report = outcome.get_result()
    if report.when != "call" or not report.passed:
        return
    watch = _watches.get(item)
    if item.get_closest_marker(_NAME) and not (watch and watch.has_begun):
        report.outcome = "failed"
        report.longrepr = f"{_NAME}: what runs this test does not let it be watched"


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Look again when the client and the server of a marked test are closed."""
    watch = _watches.get(item)
    if watch is not None:
        watch.check(closed=True)


def pytest_runtest_logfinish() -> None:
    """Whatever became of a test, nothing is watched between two of them."""
    for watch in list(_active):
        watch.end()


@pytest.fixture
def no_request_cycles() -> "Callable[..., Any]":
    """Fail a test that leaves requests behind.

    .. code-block:: python

        async def test_upload(client, no_request_cycles):
            async with no_request_cycles():
                await client.post("/image", data=b"...")

    What it gives is called with these, all by name and all optional:

    - *requests*: how many requests are made inside, at least; 1 unless given, since a
      block that makes none shows nothing.
    - *cls*: a class, or a tuple of them, whose instances must not be left behind,
      instead of :class:`aiohttp.web.BaseRequest`.
    - *garbage*: whether other cyclic garbage of the application is an error too.
    - *allow*: leaks of the catalogue that are tolerated: what stands before the slash
      in their ids, one or several; or a function that is given a
      :class:`~aiohttp_cyclebreak.chains.Chain` and says whether it is tolerated.

    Returns:
        A function that gives an asynchronous context manager.

    Raises:
        TypeError: what is given is of the wrong type, or not one of these; when it is
            called.
        ValueError: *requests* is negative, *cls* has no class in it, or *allow* names
            no leak of the catalogue.

    .. versionadded:: 0.1.0
    """
    return _watching


def _watching(*args: Any, **options: Any) -> Any:
    return _block(_make_watch(args, options))


def _make_watch(args: Tuple[Any, ...], options: Mapping[str, Any]) -> "_Watch":
    if args:
        raise TypeError("it takes keyword arguments only")
    for name in options:
        if name not in inspect.signature(_Watch).parameters:
            raise TypeError(f"unexpected keyword argument {name!r}")
    return _Watch(**options)


def _wrong(item: pytest.Item) -> Optional[str]:
    """Say what is wrong with the marker of a test; None if nothing is."""
    marker = item.get_closest_marker(_NAME)
    if marker is not None:
        try:
            _make_watch(marker.args, marker.kwargs)
        except (TypeError, ValueError) as exc:
            return f"{item.nodeid}: {_NAME}: {exc}"
    return None


@contextlib.asynccontextmanager
async def _block(watch: "_Watch") -> AsyncIterator[None]:
    watch.begin()
    try:
        yield
        await watch.settle()
        watch.check()
    finally:
        watch.end()


def _watched(test: Callable[..., Any], watch: "_Watch") -> Callable[..., Any]:
    """A test that is looked after; the watch is ended by the teardown."""
    if inspect.iscoroutinefunction(test):

        @functools.wraps(test)
        async def watched(*args: Any, **kwargs: Any) -> None:
            watch.begin()
            try:
                await test(*args, **kwargs)
                await watch.settle()
                watch.check()
            except BaseException:
                watch.end()
                raise

    else:

        @functools.wraps(test)
        def watched(*args: Any, **kwargs: Any) -> None:
            watch.begin()
            try:
                test(*args, **kwargs)
                watch.check()
            except BaseException:
                watch.end()
                raise

    return watched


class _Watch:
    """Looks for requests that are made while it watches, and left behind."""

    def __init__(
        self,
        *,
        requests: int = 1,
        cls: Optional[Classes] = None,
        garbage: bool = False,
        allow: Allow = (),
    ) -> None:
        if type(requests) is not int or requests < 0:
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
        if not _active:
            _collect()
            if gc.isenabled():
                _undo.append(gc.enable)
        gc.disable()
        self._old = {id(each): _reference(each) for each in self._instances()}
        self.made = 0
        self.collections.clear()
        _count(self)

    def end(self) -> None:
        """Watch no more."""
        if self in _active:
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
        return _instances(both)

    def _new(self) -> List[Any]:
        return [
            each
            for each in self._instances()
            if self._old.get(id(each), _nothing)() is not each
        ]

    async def settle(self) -> None:
        """Wait until every request is answered and closed connections are gone."""
        import asyncio

        deadline = time.monotonic() + _TIMEOUT
        await _turn()
        while True:
            busy = list(map(_route, _busy(self._new())))
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
        if self not in _active:
            return
        if self.made < self._expected and not closed:
            pytest.fail(
                f"{_number(self.made, 'request')} made, at least {self._expected} "
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
        times = _number(sum(self.collections.values()), "time")
        origins = _several(self.collections.elements())
        return (
            f"the garbage collector ran {times} meanwhile ({origins}): nobody knows "
            "what it has freed that was left behind; have it neither called nor "
            "switched on while the test is watched"
        )

    def left(self) -> List[Any]:
        """What was made meanwhile and is alive."""
        own = self._classes
        wanted = frozenset(own if isinstance(own, tuple) else (own,))
        return [each for each in self._new() if not wanted.isdisjoint(_mro(each))]

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
            f"{_number(len(blamed), _name(left))} left behind, "
            f"of {_number(self.made, 'request')} made: "
            + ", ".join(f"{kinds[kind]} {_KINDS[kind]}" for kind in sorted(kinds))
        ]
        groups: Dict[str, List[Any]] = {}
        texts: Dict[str, str] = {}
        for chain, each in blamed:
            # One of many in a list is as good as another.
            alike = re.sub(r"index \d+", "index", str(chain))
            texts.setdefault(alike, str(chain))
            groups.setdefault(alike, []).append(each)
        for alike, members in list(groups.items())[:_SHOWN]:
            lines += ["", f"{_several(map(_route, members))}:", texts[alike]]
        if len(groups) > _SHOWN:
            lines += ["", f"and {_number(len(groups) - _SHOWN, 'more chain')}"]
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


def _mro(each: Any) -> Tuple[type, ...]:
    # Not issubclass(): a request's class is an abstract one, which would remember the
    # type of everything it is asked about, and CPython 3.8 does not survive some.
    return type(each).__mro__ or ()


def _instances(classes: Iterable[type]) -> List[Any]:
    wanted = frozenset(classes)
    return [each for each in gc.get_objects() if not wanted.isdisjoint(_mro(each))]


# Not in item.stash, and pytest.Config is only named in annotations: pytest 6 has
# neither, and loads this wherever it is installed.
_watches: "WeakKeyDictionary[pytest.Item, _Watch]" = WeakKeyDictionary()


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
_active: List[_Watch] = []
_undo: List[Callable[[], None]] = []


def _count(watch: _Watch) -> None:
    _active.append(watch)
    if len(_active) > 1:
        return
    from aiohttp import web

    make = web.BaseRequest.__init__

    @functools.wraps(make)
    def count(self: Any, *args: Any, **kwargs: Any) -> None:
        for each in _active:
            each.made += 1
        make(self, *args, **kwargs)

    web.BaseRequest.__init__ = count  # type: ignore[method-assign]
    _undo.append(functools.partial(setattr, web.BaseRequest, "__init__", make))
    gc.callbacks.append(_note_collection)
    _undo.append(functools.partial(gc.callbacks.remove, _note_collection))


def _count_no_more(watch: _Watch) -> None:
    _active.remove(watch)
    while _undo and not _active:
        _undo.pop()()


def _collect() -> None:
    """Collect, in a function of its own: the collections of others are counted."""
    gc.collect()


def _note_collection(phase: str, info: Dict[str, int]) -> None:
    """Note that somebody else collects, of whatever generation."""
    frame = sys._getframe().f_back  # noqa: SLF001
    if phase != "start" or frame is None or frame.f_code is _collect.__code__:
        return
    module = str(frame.f_globals.get("__name__"))
    if gc.isenabled():
        origin = "switched on by somebody"
    elif module in _COLLECT_AT_THE_END or module.partition(".")[0] in _RUNNERS:
        return
    else:
        code = frame.f_code
        origin = f"called by {code.co_name} ({code.co_filename}:{frame.f_lineno})"
    for each in _active:
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
    for task in _instances([asyncio.Task]):
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
        if frame.f_globals is not globals():
            frames.append(frame)
        frame = frame.f_back
    return frames


def _route(each: Any) -> str:
    """What a request was for, without any value of it."""
    match_info = getattr(each, "match_info", None)
    if match_info is None:
        return type(each).__qualname__
    resource = match_info.route.resource
    if resource is None:
        return f"{each.method} without a route"
    return f"{each.method} {resource.canonical or '/'}"


def _several(names: Iterable[str]) -> str:
    return ", ".join(
        name if times == 1 else f"{times} x {name}"
        for name, times in Counter(names).most_common(_SHOWN)
    )


def _name(left: List[Any]) -> str:
    names = {type(each).__qualname__ for each in left}
    return names.pop().lower() if names == {"Request"} else "object"


def _number(number: int, noun: str) -> str:
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
        _collect()
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
    return f"cyclic garbage: {_number(sum(blamed.values()), 'object')}: " + ", ".join(
        f"{number} {name}" for name, number in blamed.most_common(10)
    )


def _kind(each: Any) -> str:
    if isinstance(each, type):
        return f"class {each.__module__}.{each.__qualname__}"
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
    module = getattr(type(each), "__module__", None)
    if type(each) is FrameType:
        module = each.f_globals.get("__name__")
    elif type(each) is FunctionType or issubclass(type(each), type):
        module = each.__module__
    elif type(each) is CoroutineType and each.cr_frame is not None:
        module = each.cr_frame.f_globals.get("__name__")
    return str(module).partition(".")[0] not in _NOT_THE_APPLICATION


@contextlib.contextmanager
def _not_logged() -> Iterator[None]:
    """Keep pytest from storing the records, with their exceptions, of every call."""
    root = logging.getLogger()
    instead = logging.NullHandler()
    handlers = [
        each
        for each in root.handlers
        if type(each).__module__.partition(".")[0] in _RUNNERS
    ]
    for each in handlers:
        root.removeHandler(each)
    root.addHandler(instead)
    try:
        yield
    finally:
        root.removeHandler(instead)
        for each in handlers:
            root.addHandler(each)


def _test_clients() -> List[Any]:
    test_utils: Any = sys.modules.get("aiohttp.test_utils")
    return [] if test_utils is None else _instances([test_utils.TestClient])


def _forget_responses(clients: List[Any]) -> None:
    """Let aiohttp's test clients go of responses that they would keep to the end."""
    from aiohttp import ClientResponse

    for client in clients:
        for kept in vars(client).values():
            if type(kept) is list:
                kept[:] = [
                    each
                    for each in kept
                    if not (isinstance(each, ClientResponse) and each.closed)
                ]


@pytest.fixture
def soak() -> "Callable[..., Any]":
    """Repeat what a client does, and fail if anything grows with it.

    .. code-block:: python

        async def test_upload_soak(client, soak):
            async def upload():
                await client.post("/image", data=b"no image")

            await soak(upload, times=240)

    What it gives is called with:

    - *call*: a function without arguments, mostly a coroutine function.
    - *times*: how often it is called, 240 unless given: 12 samples are taken after as
      many parts of it, and none of these three may grow from each third of the samples
      to the next: requests alive before a collection; objects of any type after one;
      bytes that Python has allocated after one (:mod:`tracemalloc`).

    That is a question of the slope, not of how much it is.  The collector is switched
    off between the samples, and pytest stores no log records of the calls.

    Returns:
        A coroutine function.

    Raises:
        TypeError: *call* is no function; when it is awaited.
        ValueError: *times* is less than 240; when it is awaited.

    .. versionadded:: 0.1.0
    """
    return _soak


async def _soak(call: Callable[[], Any], times: int = 20 * _SAMPLES) -> None:
    if not callable(call):
        if isinstance(call, Coroutine):
            call.close()  # nobody awaits it, which Python would complain about
        raise TypeError(
            f"{call!r} is no function, which could be called again and again: write "
            "lambda: before it"
        )
    if type(times) is not int or times < 20 * _SAMPLES:
        raise ValueError(
            f"times={times!r} is not a number of at least {20 * _SAMPLES}: asyncio "
            "drops timers that were cancelled by the hundred, which looks like growth"
        )
    import tracemalloc

    watch = _Watch()
    samples = _Samples(times)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_not_logged())
        watch.begin()
        stack.callback(watch.end)
        if not tracemalloc.is_tracing():
            tracemalloc.start()
            stack.callback(tracemalloc.stop)
        clients = _test_clients()
        gc.freeze()  # so that only what is new is looked at
        stack.callback(gc.unfreeze)
        for sample in range(_SAMPLES):
            for _ in range(times // _SAMPLES):
                await _call(call)
            await watch.settle()
            _forget_responses(clients)
            samples.take(sample, watch)
        report = samples.report()
        if report is not None:
            await _call(call)
            await watch.settle()
            pytest.fail("\n".join([report, watch.report() or ""]), pytrace=False)
        doubt = watch.doubt()
        if doubt is not None:
            pytest.fail(doubt, pytrace=False)


async def _call(call: Callable[[], Any]) -> None:
    result = call()
    if inspect.isawaitable(result):
        await result


class _Samples:
    """Numbers that may grow; what they take themselves does not."""

    def __init__(self, times: int) -> None:
        self._times = times
        self._series: Dict[str, array[int]] = {}
        self._collected = 0

    def take(self, sample: int, watch: _Watch) -> None:
        """Note what there is, before and after a collection."""
        import tracemalloc

        before = len(watch.left())
        _collect()
        after = len(watch.left())
        # As many as there were if nothing had been collected since the beginning.
        self._collected += before - after
        self._note(sample, _REQUESTS, self._collected + after)
        # It keeps the names of attributes that str.format() looks up, as aiohttp does
        # for each 500: a cache that fills, to 4096 of them.
        sys._clear_type_cache()  # noqa: SLF001
        self._note(sample, _BYTES, tracemalloc.get_traced_memory()[0])
        for kind, number in Counter(map(type, gc.get_objects())).items():
            self._note(sample, f"{kind.__module__}.{kind.__qualname__}", number)

    def _note(self, sample: int, name: str, number: int) -> None:
        if name not in self._series:
            self._series[name] = array("q", bytes(8 * _SAMPLES))
        self._series[name][sample] = number

    def report(self) -> Optional[str]:
        growing = {
            name: _slope(series) * _SAMPLES / self._times
            for name, series in self._series.items()
            if _grows(series)
        }
        if not growing:
            return None
        first = [name for name in (_REQUESTS, _BYTES) if name in growing]
        others = sorted(set(growing) - set(first), key=lambda name: -growing[name])
        lines = [f"growing over {self._times} calls, each time by about"]
        for name in [*first, *others[: 3 * _SHOWN]]:
            lines.append(f"    {growing[name]:10.2f} {name}")
        if len(others) > 3 * _SHOWN:
            more = _number(len(others) - 3 * _SHOWN, "more type")
            lines.append(f"    and objects of {more}")
        return "\n".join(lines)


_REQUESTS = "requests alive, were there no collections"
_BYTES = "bytes, after a collection"


def _grows(series: "array[int]") -> bool:
    """Whether it grew throughout, at about one rate.

    A cache that fills grows less and less; what is collected now and then, as the
    timers that asyncio's event loop has cancelled, comes down between the thirds; and
    what is made once, a regular expression for instance, is one or two large steps.
    """
    steps = sorted(right - left for left, right in zip(series, series[1:]))
    if 2 * sum(steps[-2:]) > series[-1] - series[0]:
        return False
    size = len(series) // 3
    thirds = [series[start : start + size] for start in range(0, 3 * size, size)]
    separate = all(max(one) < min(next) for one, next in zip(thirds, thirds[1:]))
    return separate and all(2 * _slope(each) >= _slope(series) for each in thirds)


def _slope(series: "array[int]") -> float:
    """The median of the slopes between any two samples (Theil and Sen)."""
    import statistics

    slopes = [
        (series[right] - series[left]) / (right - left)
        for left in range(len(series))
        for right in range(left + 1, len(series))
    ]
    return statistics.median(slopes)
