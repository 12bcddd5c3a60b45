"""What a request that succeeds pays: no callback, and nothing that outlives it.

Counts, no times: those are in ``benchmarks/``.  A first sketch registered a callback on
the task of every request, which cost more than all the rest; here it, and one that
remembers every request, are the things that have to be noticed.
"""

import asyncio
import contextlib
import gc
import sys
import tracemalloc
from array import array
from collections import deque
from collections.abc import Mapping, Set
from itertools import cycle, islice
from pathlib import Path
from typing import Any, AsyncIterator, Callable, Dict, List, Sequence
from weakref import WeakSet

import pytest
from aiohttp import web

import aiohttp_cyclebreak
from aiohttp_cyclebreak import connections, cyclebreak, guard_server, requests, setup

from .service import AIOHTTP, Client, Service, idle, no_collector, run, spin

pytestmark = pytest.mark.usefixtures("few_objects")

PACKAGE = aiohttp_cyclebreak.__name__
HERE = Path(__file__)
OURS = Path(aiohttp_cyclebreak.__file__).parent
CONTAINERS = (Mapping, Set, list, deque, WeakSet)

_remembered: Dict[int, List[Any]] = {}


@web.middleware
async def swallows(request: web.Request, handler: Any) -> web.StreamResponse:
    """Make a page of an error, as many an application does."""
    try:
        return await handler(request)
    except web.HTTPException as exc:
        return web.Response(status=exc.status)


@web.middleware
async def calls_back(request: web.Request, handler: Any) -> web.StreamResponse:
    """Follow every request to the end of its task, as the first sketch did."""
    task = asyncio.current_task()
    assert task is not None
    task.add_done_callback(lambda _: None)
    return await handler(request)


@web.middleware
async def remembers(request: web.Request, handler: Any) -> web.StreamResponse:
    """Keep a note of every request, which nobody takes away."""
    _remembered[len(_remembered)] = [request.path]
    return await handler(request)


def middlewares(*which: Any) -> Callable[[web.Application], None]:
    return lambda app: app.middlewares.extend(which)


GUARDS: Dict[str, Callable[[web.Application], Any]] = {
    "cyclebreak()": lambda app: app.middlewares.append(cyclebreak()),
    "setup()": setup,
    "guard_server()": lambda app: None,
}
AROUND: Dict[str, Callable[[web.Application], Any]] = {
    "setup() around idle": lambda app: (middlewares(idle)(app), setup(app)),
    "guard_server() around idle": middlewares(idle),
    "setup() around one that swallows": (
        lambda app: (middlewares(swallows)(app), setup(app))
    ),
}
BELOW: Dict[str, Callable[[web.Application], Any]] = {
    "cyclebreak() below idle": lambda app: middlewares(idle, cyclebreak())(app),
    "two below idle": lambda app: middlewares(idle, cyclebreak(), cyclebreak())(app),
}
WAYS = {
    **AROUND,
    "bare": middlewares(),
    "idle": middlewares(idle),
    "calls back": middlewares(calls_back),
    "remembers": middlewares(remembers),
    **BELOW,
    **GUARDS,
}


class Callbacks:
    """How many there are when the handler and every middleware have ended."""

    def __init__(self) -> None:
        self.of_requests: List[int] = []
        self.of_connections: List[int] = []

    async def count(self, request: web.Request, response: web.StreamResponse) -> None:
        task: Any = asyncio.current_task()
        connection: Any = request.task
        assert task is not connection
        self.of_requests.append(len(task._callbacks or ()))
        self.of_connections.append(len(connection._callbacks or ()))


@contextlib.asynccontextmanager
async def serving(way: str, callbacks: Any = None) -> AsyncIterator[Service]:
    async def succeed(request: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def fail(request: web.Request) -> web.Response:
        raise web.HTTPBadRequest

    async def receive(request: web.Request) -> web.Response:
        return web.Response(text=await request.text())

    async def receive_and_fail(request: web.Request) -> web.Response:
        raise web.HTTPBadRequest(text=await request.text())

    app = web.Application()
    app.router.add_get("/", succeed)
    app.router.add_get("/fail", fail)
    app.router.add_post("/", receive)
    app.router.add_post("/fail", receive_and_fail)
    if callbacks is not None:
        app.on_response_prepare.append(callbacks.count)
    WAYS[way](app)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    if way.startswith("guard_server()"):
        guard_server(runner)
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield Service(runner, runner.addresses[0][1])
    finally:
        await runner.cleanup()


async def ask(client: Client, number: int, path: str = "/") -> None:
    method, _, path = path.rpartition(" ")
    for _ in range(number):
        await (client.post(path, b"body") if method == "POST" else client.get(path))
        status, _ = await client.answer()
        assert status == (200 if path == "/" else 400)
    await spin()


# --- callbacks ------------------------------------------------------------------


def callbacks_of(way: str, paths: Sequence[str] = ("/",)) -> Callbacks:
    callbacks = Callbacks()
    number = 20

    async def main() -> None:
        async with serving(way, callbacks) as service:
            client = await service.connect()
            for path in islice(cycle(paths), number):
                await ask(client, 1, path)
            client.close()
            await service.settle()

    run(main())
    assert len(callbacks.of_requests) == number
    return callbacks


def test_a_callback_on_every_request_is_seen():
    """What the first sketch did is noticed."""
    bare, naive = callbacks_of("bare"), callbacks_of("calls back")
    assert naive.of_requests == [number + 1 for number in bare.of_requests]


@pytest.mark.parametrize("way", GUARDS)
def test_a_successful_request_gets_no_callback(way):
    """A task whose handler returned has the callbacks that it has without us."""
    assert callbacks_of(way).of_requests == callbacks_of("bare").of_requests


@pytest.mark.parametrize("way", [*GUARDS, *AROUND])
@pytest.mark.parametrize("paths", [["/fail"], ["/fail", "/"]], ids=" ".join)
def test_a_plain_failure_gets_no_callback(way, paths, monkeypatch):
    """Nor does the success after it, nor is it walked through: only aiohttp has it."""
    walked = []
    monkeypatch.setattr(requests, "sort_out", walked.append)
    monkeypatch.setattr(connections, "sort_out", walked.append)
    bare = callbacks_of("bare", paths)
    assert callbacks_of(way, paths).of_requests == bare.of_requests
    assert not walked


def note_what_is_followed(monkeypatch):
    followed = []

    def note(self, *args):
        followed.append(args)

    monkeypatch.setattr(requests.FollowedRequest, "__init__", note)
    monkeypatch.setattr(connections, "sort_out", followed.append)
    return followed


@pytest.mark.parametrize("way", BELOW)
@pytest.mark.parametrize("paths", [["/fail"], ["/fail", "/"]], ids=" ".join)
def test_a_plain_failure_below_another_middleware_gets_one_callback(
    way, paths, monkeypatch
):
    """That one may swallow it: its end is asked for no more than what became of it."""
    followed = note_what_is_followed(monkeypatch)
    bare = callbacks_of("bare", paths).of_requests
    asked = [path == "/fail" for path in islice(cycle(paths), len(bare))]
    found = callbacks_of(way, paths).of_requests
    assert found == [number + more for number, more in zip(bare, asked)]
    assert not followed


@pytest.mark.skipif(
    AIOHTTP < (3, 10, 6), reason="each body has an exception of its own"
)
@pytest.mark.parametrize("way", [*GUARDS, *list(AROUND)[:2], "cyclebreak() below idle"])
@pytest.mark.parametrize(
    "paths",
    [["POST /"], ["POST /fail"], ["/fail", "POST /", "POST /fail"]],
    ids=" ".join,
)
def test_a_plain_upload_gets_one_callback(way, paths, monkeypatch):
    """Its end is asked for, to let go of the body; nothing else of it is followed."""
    followed = note_what_is_followed(monkeypatch)
    bare = callbacks_of("bare", paths).of_requests
    below = ["/fail"] if "below" in way else []
    asked = [path in ("POST /", "POST /fail", *below) for path in paths]
    asked = list(islice(cycle(asked), len(bare)))
    found = callbacks_of(way, paths).of_requests
    assert found == [number + more for number, more in zip(bare, asked)]
    assert not followed


@pytest.mark.parametrize("way", GUARDS)
def test_a_connection_gets_no_more_callbacks_than_one(way):
    """However many requests it carries, it is followed once."""
    bare, guarded = callbacks_of("bare"), callbacks_of(way)
    more = [a - b for a, b in zip(guarded.of_connections, bare.of_connections)]
    assert len(set(more)) == 1
    assert more[0] <= 1


# --- what outlives a request ----------------------------------------------------

NUMBER = 100
WINDOWS = 8  # free lists and caches fill for a while


def kept(count: Callable[[], int], way: str) -> int:
    """How many more there are after every so many requests on one connection.

    The fewest of several times: what is kept of each request is there every time,
    and a cache that is filled is not.
    """
    # A list would keep each number, which is counted too.
    found = array("q", [0] * WINDOWS)

    async def main() -> None:
        async with serving(way) as service:
            client = await service.connect()
            await ask(client, 50)
            for window in range(WINDOWS):
                found[window] = count()
                await ask(client, NUMBER)
            client.close()
            await service.settle()

    _remembered.clear()
    with no_collector():
        run(main())
    return min(after - before for before, after in zip(found, found[1:]))


def allocated() -> int:
    """How many blocks there are that were allocated in the library, or here."""
    snapshot = tracemalloc.take_snapshot().filter_traces(
        [
            tracemalloc.Filter(True, str(OURS / "*")),
            tracemalloc.Filter(True, str(HERE)),
        ]
    )
    return len(snapshot.traces)


@pytest.fixture
def _tracing():
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.thorough
@pytest.mark.usefixtures("_tracing")
def test_what_is_kept_of_every_request_is_seen():
    """A note of every request is noticed, by both counts."""
    assert kept(allocated, "remembers") >= NUMBER
    assert kept(sys.getallocatedblocks, "remembers") >= NUMBER


@pytest.mark.thorough
@pytest.mark.usefixtures("_tracing")
@pytest.mark.parametrize("way", GUARDS)
def test_nothing_of_ours_outlives_a_successful_request(way):
    """There is not one block more that the library has allocated."""
    assert kept(allocated, way) <= 0


@pytest.mark.parametrize("way", ["bare", *GUARDS])
def test_no_block_outlives_a_successful_request(way):
    """Nor is there one a request that somebody else allocated."""
    assert kept(sys.getallocatedblocks, way) < NUMBER / 10


# --- what grows -----------------------------------------------------------------


def ours() -> Dict[str, int]:
    """The entries of the library's containers, and its objects, by name."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != PACKAGE:
            continue
        for key, value in vars(module).items():
            if isinstance(value, CONTAINERS) and not key.startswith("__"):
                found[f"{name}.{key}"] = len(value)
    for each in gc.get_objects():
        name = f"{type(each).__module__}.{type(each).__qualname__}"
        if name.split(".")[0] == PACKAGE:
            found[name] = found.get(name, 0) + 1
    return found


def test_what_is_ours_is_found():
    """There is something of ours where a connection is followed."""
    found = []

    async def main() -> None:
        async with serving("cyclebreak()") as service:
            before = ours()
            client = await service.connect()
            await ask(client, 1, "/fail")
            found.extend([before, ours()])
            client.close()
            await service.settle()

    run(main())
    before, after = found
    assert after != before


@pytest.mark.parametrize("way", GUARDS)
def test_nothing_of_ours_grows_with_requests(way):
    """After 11 requests and after 500 there is the same, refused ones included."""
    found = []

    async def main() -> None:
        async with serving(way) as service:
            client = await service.connect()
            for number in (5, 244):
                await ask(client, number)
                await ask(client, number, "/fail")
                await ask(client, 1)
                found.append(ours())
            client.close()
            await service.settle()

    with no_collector():
        run(main())
    assert found[0] == found[1]


@pytest.mark.parametrize("way", GUARDS)
def test_nothing_of_ours_outlives_a_connection(way):
    """What there is for 50 open connections is gone with them."""
    found = []

    async def main() -> None:
        async with serving(way) as service:
            found.append(ours())
            for _ in range(2):
                clients = [await service.connect() for _ in range(50)]
                for client in clients:
                    await ask(client, 1)
                    await ask(client, 1, "/fail")
                found.append(ours())
                for client in clients:
                    client.close()
                await service.settle()
                found.append(ours())

    with no_collector():
        run(main())
    before, first, between, second, after = found
    assert first != before  # there is something
    assert first == second
    assert before == between == after
