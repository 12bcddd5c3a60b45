"""Does a test leave requests behind? Fixtures and a marker for pytest.

aiohttp, and whatever else takes time to import, is imported when it is first used.
"""

import contextlib
import functools
import gc
import inspect
import logging
import sys
from typing import (
    Any,
    AsyncIterator,
    Callable,
    Coroutine,
    Iterator,
    List,
    Mapping,
    Optional,
    Tuple,
)
from weakref import WeakKeyDictionary

import pytest

from .growth import SAMPLES, Samples
from .left_behind import RUNNERS, Watch, active, instances

__all__ = ("no_request_cycles", "soak")

_NAME = "no_request_cycles"


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
    _end_all()  # an earlier run of this very test, of which nobody tells the end
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
    test = item.obj
    case = getattr(test, "__self__", None)  # pytest 6 has no item.instance of a case
    item.obj = _watched(test, watch)
    if isinstance(case, TestCase):  # it finds a coroutine function by itself
        setattr(case, item.name, item.obj)
    yield
    item.obj = test  # it may be run once more: pytest-rerunfailures does that
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
    _end_all()


@pytest.fixture
def no_request_cycles() -> Callable[..., Any]:
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


def _end_all() -> None:
    for watch in list(active):
        watch.end()


def _watching(*args: Any, **options: Any) -> Any:
    return _block(_make_watch(args, options))


def _make_watch(args: Tuple[Any, ...], options: Mapping[str, Any]) -> Watch:
    if args:
        raise TypeError("it takes keyword arguments only")
    for name in options:
        if name not in inspect.signature(Watch).parameters:
            raise TypeError(f"unexpected keyword argument {name!r}")
    return Watch(**options)


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
async def _block(watch: Watch) -> AsyncIterator[None]:
    watch.begin()
    try:
        yield
        await watch.settle()
        watch.check()
    finally:
        watch.end()


def _watched(test: Callable[..., Any], watch: Watch) -> Callable[..., Any]:
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


# Not in item.stash, and pytest.Config is only named in annotations: pytest 6 has
# neither, and loads this wherever it is installed.
_watches: "WeakKeyDictionary[pytest.Item, Watch]" = WeakKeyDictionary()


@contextlib.contextmanager
def _not_logged() -> Iterator[None]:
    """Keep pytest from storing the records, with their exceptions, of every call."""
    root = logging.getLogger()
    instead = logging.NullHandler()
    handlers = [
        each
        for each in root.handlers
        if type(each).__module__.partition(".")[0] in RUNNERS
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
    return [] if test_utils is None else instances([test_utils.TestClient])


def _forget_closed(clients: List[Any]) -> None:
    """Let aiohttp's test clients go of what they would keep to the end.

    That is each response and each websocket that they were given.
    """
    from aiohttp import ClientResponse, ClientWebSocketResponse

    given = ClientResponse, ClientWebSocketResponse
    for client in clients:
        for kept in vars(client).values():
            if type(kept) is list:
                kept[:] = [
                    each
                    for each in kept
                    if not (isinstance(each, given) and each.closed)
                ]


@pytest.fixture
def soak() -> Callable[..., Any]:
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
        TypeError: *call* is no function, or *times* no number; when it is awaited.
        ValueError: *times* is less than 240; when it is awaited.

    .. versionadded:: 0.1.0
    """
    return _soak


async def _soak(call: Callable[[], Any], times: int = 20 * SAMPLES) -> None:
    if not callable(call):
        if isinstance(call, Coroutine):
            call.close()  # nobody awaits it, which Python would complain about
        raise TypeError(
            f"{call!r} is no function, which could be called again and again: write "
            "lambda: before it"
        )
    if type(times) is not int:
        raise TypeError(f"times={times!r} is no int, a number of calls")
    if times < 20 * SAMPLES:
        raise ValueError(
            f"times={times!r} is not a number of at least {20 * SAMPLES}: asyncio "
            "drops timers that were cancelled by the hundred, which looks like growth"
        )
    import tracemalloc

    watch = Watch()
    samples = Samples(times)
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
        for sample in range(SAMPLES):
            for _ in range(times // SAMPLES):
                await _call(call)
            await watch.settle()
            _forget_closed(clients)
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
