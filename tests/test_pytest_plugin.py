"""The pytest plugin, in test runs of its own: what fails there, and what it says."""

import asyncio
import gc
import shutil
import socket
import subprocess
import sys
import tempfile
from array import array
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any, Dict, List

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer, make_mocked_request

from aiohttp_cyclebreak import cyclebreak
from aiohttp_cyclebreak.growth import grows
from aiohttp_cyclebreak.left_behind import Watch
from aiohttp_cyclebreak.pytest_plugin import _soak, _watching

from .service import AIOHTTP, no_collector, run, serve, spin

pytestmark = pytest.mark.processes

pytest_plugins = ("pytester",)

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


@pytest.fixture(autouse=True)
def _pictures_go_with_the_test(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)  # or this process has its own


APP = """
import asyncio
import gc
from typing import Any

import pytest
from aiohttp import web

from aiohttp_cyclebreak import cyclebreak

KEPT = []
SECRET = "secret"
TASKS: Any = "tasks" if not hasattr(web, "AppKey") else web.AppKey("tasks", list)


class Meta(type):
    def fail(cls, *given):
        raise RuntimeError(SECRET)

    __module__ = __mro__ = property(fail)
    __eq__ = __hash__ = fail


class Fights(metaclass=Meta):
    pass


class Order:
    def __init__(self):
        self.fights = Fights()


async def ok(request):
    return web.Response(text="ok")


async def refuse(request):
    raise web.HTTPBadRequest(text=SECRET)


async def fail(request):
    raise ValueError(SECRET)


async def keep(request):
    KEPT.append(request)
    return web.Response()


async def keep_in_app(request):
    request.app[TASKS].append(request)
    return web.Response()


async def work(request):
    async def later(request):
        await asyncio.get_running_loop().create_future()

    request.app[TASKS].append(asyncio.ensure_future(later(request)))
    return web.Response()


async def order(request):
    order = Order()
    order.self = order
    return web.Response()


async def keep_order(request):
    KEPT.append(Order())
    return web.Response()


async def never(request):
    await asyncio.get_running_loop().create_future()


def make_app(*middlewares):
    app = web.Application(middlewares=middlewares)
    app[TASKS] = []
    handlers = ok, refuse, fail, keep, keep_in_app, work, order, keep_order, never
    for handler in handlers:
        app.router.add_get(f"/{handler.__name__}", handler)

    async def clean_up(app):
        for task in app[TASKS]:
            if isinstance(task, asyncio.Task):
                task.cancel()

    app.on_cleanup.append(clean_up)
    return app


@pytest.fixture(autouse=True)
def forget():
    yield
    KEPT.clear()
"""

CLIENT = """
from app import *  # noqa


@pytest.fixture
async def client(aiohttp_client):
    return await aiohttp_client(make_app())


async def get(client, path, times=3):
    for _ in range(times):
        response = await client.get(path)
        await response.read()
    return response
"""


def test_run(pytester: pytest.Pytester) -> None:
    """With pytest-aiohttp: cycles, live holders and clean applications are told."""
    pytester.makepyfile(app=APP)
    pytester.makepyfile(
        CLIENT
        + """
import aiohttp_cyclebreak.left_behind


async def test_clean(client, no_request_cycles):
    async with no_request_cycles():
        response = await get(client, "/ok")
    assert response.status == 200


async def wrapper(coroutine):
    return await coroutine


async def test_wrapped(aiohttp_client, no_request_cycles):
    def factory(loop, coroutine, **options):
        return asyncio.Task(wrapper(coroutine), loop=loop, **options)

    asyncio.get_running_loop().set_task_factory(factory)
    client = await aiohttp_client(make_app())
    async with no_request_cycles():
        await get(client, "/ok")


async def test_cycle(client, no_request_cycles):
    async with no_request_cycles():
        await get(client, "/refuse")


async def test_cycle_guarded(aiohttp_client, no_request_cycles):
    client = await aiohttp_client(make_app(cyclebreak()))
    async with no_request_cycles(requests=6, garbage=True):
        await get(client, "/refuse")
        await get(client, "/missing")


async def test_last_guarded(aiohttp_client, no_request_cycles):
    client = await aiohttp_client(make_app(cyclebreak()))
    async with no_request_cycles(requests=3):
        await get(client, "/refuse")


async def test_cycle_allowed(client, no_request_cycles):
    async with no_request_cycles(allow="http-exception"):
        await get(client, "/refuse")


async def test_cycle_allowed_by_function(client, no_request_cycles):
    async with no_request_cycles(allow=lambda chain: chain.kind == "delayed"):
        await get(client, "/refuse")


async def test_another_allowed(client, no_request_cycles):
    async with no_request_cycles(allow=("payload", "websocket")):
        await get(client, "/refuse")


async def test_permanent(client, no_request_cycles):
    async with no_request_cycles():
        await get(client, "/keep")


async def test_permanent_in_app(client, no_request_cycles):
    async with no_request_cycles():
        await get(client, "/keep_in_app")


async def test_four_ways(client, no_request_cycles):
    async with no_request_cycles(cls=(web.Request, Order)):
        for path in ("/keep", "/keep_in_app", "/work", "/order"):
            await get(client, path, 1)


async def test_task(client, no_request_cycles):
    async with no_request_cycles():
        await get(client, "/work")


async def test_task_allowed(client, no_request_cycles):
    async with no_request_cycles(allow=lambda chain: chain.kind == "live"):
        await get(client, "/work")


async def test_logged(client, no_request_cycles, caplog):
    async with no_request_cycles():
        await get(client, "/fail")
    assert [each.exc_info[0] for each in caplog.records if each.exc_info]


async def test_own_variable(no_request_cycles):
    from aiohttp.test_utils import make_mocked_request

    async with no_request_cycles():
        mine = [make_mocked_request("GET", "/")]
    assert mine


async def test_no_request(client, no_request_cycles):
    async with no_request_cycles():
        pass


async def test_too_few(client, no_request_cycles):
    async with no_request_cycles(requests=4):
        await get(client, "/ok")


async def test_cls(client, no_request_cycles):
    async with no_request_cycles(cls=Order):
        await get(client, "/refuse")
        await get(client, "/order")


async def test_garbage(aiohttp_client, no_request_cycles):
    client = await aiohttp_client(make_app(cyclebreak()))
    async with no_request_cycles(garbage=True):
        await get(client, "/order")


async def test_never(client, no_request_cycles, monkeypatch):
    # Here alone: all others are waited for, however long they take.
    monkeypatch.setattr(aiohttp_cyclebreak.left_behind, "_TIMEOUT", 0.2)
    asking = asyncio.ensure_future(client.get("/never"))
    try:
        async with no_request_cycles():
            while not any(type(each) is web.Request for each in gc.get_objects()):
                await asyncio.sleep(0)
    finally:
        asking.cancel()


async def test_error_in_block(client, no_request_cycles):
    async with no_request_cycles():
        await get(client, "/refuse")
        raise LookupError("its own")


def test_collector_is_on():
    assert gc.isenabled()
    assert web.BaseRequest.__init__.__module__ == "aiohttp.web_request"
    assert not hasattr(web.BaseRequest.__init__, "__wrapped__")


@pytest.mark.no_request_cycles(requests=3)
async def test_marked(client):
    await get(client, "/ok")
    await client.close()


@pytest.mark.no_request_cycles(requests=3)
async def test_marked_cycle(client):
    await get(client, "/refuse")


@pytest.mark.no_request_cycles(requests=50)
async def test_marked_too_few(client):
    await get(client, "/ok")


@pytest.mark.no_request_cycles(requests=3, allow="http-exception")
async def test_marked_close(client):
    await get(client, "/ok")


@pytest.mark.no_request_cycles(requests=0)
def test_marked_sync():
    pass


@pytest.fixture
def ends_with_garbage():
    yield
    order = Order()
    order.order = order


@pytest.mark.no_request_cycles(requests=0, garbage=True)
def test_marked_fixture(ends_with_garbage):
    pass


async def test_soak(client, soak):
    await soak(lambda: get(client, "/fail", 1))


async def test_soak_cycle(client, soak):
    await soak(lambda: get(client, "/refuse", 1))


async def test_soak_permanent(client, soak):
    await soak(lambda: get(client, "/keep", 1))


async def test_soak_objects(client, soak):
    await soak(lambda: get(client, "/keep_order", 1))
"""
    )
    result = pytester.runpytest_subprocess(
        "-q", "-rA", "-o", "asyncio_mode=auto", "-W", "ignore", "--show-capture=no"
    )
    text = result.stdout.str()
    outcomes = {
        line.split("::")[1].split(" ")[0]: line.split()[0]
        for line in text.splitlines()
        if "::" in line and line.split()[0] in ("PASSED", "FAILED", "ERROR")
    }
    # The test client closes its connections when the test is over: close-cancel.
    late = (3, 10, 6) <= AIOHTTP <= (3, 11, 13) and sys.version_info >= (3, 9)
    assert outcomes == {
        "test_clean": "PASSED",
        "test_wrapped": "PASSED",
        "test_cycle": "FAILED",
        "test_cycle_guarded": "PASSED",
        "test_last_guarded": "PASSED",
        "test_cycle_allowed": "PASSED",
        "test_cycle_allowed_by_function": "PASSED",
        "test_another_allowed": "FAILED",
        "test_permanent": "FAILED",
        "test_permanent_in_app": "FAILED",
        "test_four_ways": "FAILED",
        "test_task": "FAILED",
        "test_task_allowed": "PASSED",
        "test_logged": "PASSED",
        "test_own_variable": "PASSED",
        "test_no_request": "FAILED",
        "test_too_few": "FAILED",
        "test_cls": "FAILED",
        "test_garbage": "FAILED",
        "test_never": "FAILED",
        "test_error_in_block": "FAILED",
        "test_collector_is_on": "PASSED",
        "test_marked": "FAILED" if late else "PASSED",
        "test_marked_cycle": "FAILED",
        "test_marked_too_few": "FAILED",
        "test_marked_close": "ERROR" if late else "PASSED",
        "test_marked_sync": "PASSED",
        "test_marked_fixture": "PASSED",
        "test_soak": "PASSED",
        "test_soak_cycle": "FAILED",
        "test_soak_permanent": "FAILED",
        "test_soak_objects": "FAILED",
    }, text
    said = sections(text)
    assert "3 waiting for the garbage collector" in said["test_cycle"]
    assert "3 x GET /refuse:" in said["test_cycle"]
    assert "http-exception of the catalogue" in said["test_cycle"]
    assert "local variable 'resp'" in said["test_cycle"]
    assert "3 held for good" in said["test_permanent"]
    assert "3 x GET /keep:" in said["test_permanent"]
    assert "module app: global 'KEPT'" in said["test_permanent"]
    assert "and 1 more chain\n" in said["test_four_ways"]
    assert "3 held for good" in said["test_permanent_in_app"]
    assert "Application: attribute '_state'" in said["test_permanent_in_app"]
    assert "3 held by something that is not over" in said["test_task"]
    assert "later" in said["test_task"]
    assert "app.py" in said["test_task"]
    assert "0 requests made" in said["test_no_request"]
    assert "3 requests made, at least 4 expected" in said["test_too_few"]
    assert "attribute 'self'" in said["test_cls"]
    assert "3 Order" in said["test_garbage"]
    assert "3 Fights" in said["test_garbage"]
    assert "still being served: GET /never" in said["test_never"]
    assert "LookupError: its own" in said["test_error_in_block"]
    assert "1.00 requests alive" in said["test_soak_cycle"]
    assert "bytes" not in said["test_soak_cycle"]
    assert "aiohttp.web_request.Request" in said["test_soak_permanent"]
    assert "bytes" in said["test_soak_permanent"]
    assert "module app: global 'KEPT'" in said["test_soak_permanent"]
    assert "1.00 app.Order" in said["test_soak_objects"]
    assert "1.00 app.Fights" in said["test_soak_objects"]
    if late:
        assert "10548" in said["test_marked_close"]
    assert "secret" not in text
    assert_pictures(said["test_cycle"])


def sections(text: str) -> Dict[str, str]:
    """What was said of each test."""
    found: Dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if line.startswith("___"):
            name = line.strip("_ ").rpartition(" ")[2]
        found[name] = found.get(name, "") + line + "\n"
    return found


def assert_pictures(text: str) -> None:
    """Where objgraph is there, a picture is made and its path printed."""
    pytest.importorskip("objgraph")
    path = Path(text.partition("picture: ")[2].split("\n")[0])
    begin = "<svg" if shutil.which("dot") else "digraph"
    assert begin in path.read_text()


REAL = """
from app import *  # noqa
import socket


async def ask(port, path):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n".encode())
    await reader.readuntil(b"\\r\\n\\r\\n")
    writer.close()


async def visit(path):
    runner = web.AppRunner(make_app())
    await runner.setup()
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    await web.SockSite(runner, sock).start()
    await ask(sock.getsockname()[1], path)
    return runner
"""


def test_real_server_and_strict_mode(pytester: pytest.Pytester) -> None:
    """With pytest-asyncio alone, in its strict mode, and a server of one's own."""
    pytester.makepyfile(app=APP)
    pytester.makepyfile(
        REAL
        + """
@pytest.mark.asyncio
@pytest.mark.parametrize("path", ["/fail", "/refuse", "/keep"])
async def test_block(path, no_request_cycles):
    async with no_request_cycles():
        runner = await visit(path)
    await runner.cleanup()


@pytest.mark.asyncio
@pytest.mark.no_request_cycles
@pytest.mark.parametrize("path", ["/fail", "/refuse", "/keep"])
async def test_marked(path):
    runner = await visit(path)
    await runner.cleanup()
"""
    )
    result = pytester.runpytest_subprocess(
        "-q", "-o", "asyncio_mode=strict", "-W", "ignore", "-p", "no:aiohttp"
    )
    result.assert_outcomes(passed=2, failed=4)


def test_own_plugin_of_aiohttp(pytester: pytest.Pytester) -> None:
    """With the plugin that is part of aiohttp, and no other."""
    pytest.importorskip("aiohttp.pytest_plugin")
    pytester.makepyfile(app=APP)
    pytester.makepyfile(
        CLIENT.replace("async def client", "def client", 1)
        .replace(
            "return await aiohttp_client(make_app())",
            "return asyncio.get_event_loop().run_until_complete("
            "aiohttp_client(make_app()))",
        )
        .replace("def client(aiohttp_client)", "def client(loop, aiohttp_client)")
        + """
async def test_clean(client, no_request_cycles):
    async with no_request_cycles():
        await get(client, "/fail")


async def test_cycle(client, no_request_cycles):
    async with no_request_cycles():
        await get(client, "/refuse")


@pytest.mark.no_request_cycles(requests=3)
async def test_marked(client):
    await get(client, "/refuse")
"""
    )
    result = pytester.runpytest_subprocess(
        *("-q", "-p", "aiohttp.pytest_plugin", "-p", "no:aiohttp"),
        *("-p", "no:asyncio", "-W", "ignore"),
    )
    result.assert_outcomes(passed=1, failed=2)


COLLECTS = """
import gc

from app import *  # noqa


def load():
    \"\"\"As many libraries do around unpickling.\"\"\"
    gc.disable()
    try:
        return []
    finally:
        gc.enable()


async def call(request):
    asyncio.get_running_loop().call_soon(collect)
    return await cycle(request)


def collect():
    gc.collect(0)


async def switch_on(request):
    load()
    assert [[] for _ in range(10_000)]
    return await ok(request)


async def cycle(request):
    node = Order()
    node.node = node
    node.request = request
    return web.Response()


@pytest.fixture
async def client(aiohttp_client):
    app = make_app()
    for handler in (call, switch_on, cycle):
        app.router.add_get(f"/{handler.__name__}", handler)
    return await aiohttp_client(app)


async def get(client, path):
    async with client.get(path, headers={"Connection": "close"}) as response:
        await response.read()


@pytest.mark.parametrize("path", ["/call", "/switch_on", "/keep", "/cycle"])
async def test_block(client, no_request_cycles, path):
    async with no_request_cycles():
        await get(client, path)


@pytest.mark.no_request_cycles
@pytest.mark.parametrize("path", ["/call", "/switch_on"])
async def test_marked(client, path):
    await get(client, path)


@pytest.fixture
def collects_at_the_end():
    yield
    gc.collect()


@pytest.mark.no_request_cycles
async def test_teardown(collects_at_the_end, client):
    await get(client, "/ok")


async def test_soak(client, soak):
    await soak(lambda: get(client, "/call"))


async def test_at_once(client, no_request_cycles):
    async def one():
        async with no_request_cycles(garbage=True):
            await get(client, "/ok")

    async with no_request_cycles():
        await one()
        assert not gc.isenabled()
        await asyncio.gather(one(), one())
        assert not gc.isenabled()
    assert gc.isenabled()


async def test_over(client, no_request_cycles):
    async with no_request_cycles():
        await get(client, "/ok")
    assert not [each for each in gc.callbacks if "aiohttp" in each.__module__]
"""


def test_somebody_collects(pytester: pytest.Pytester) -> None:
    """Nothing is left because somebody runs the collector meanwhile: it is said."""
    pytester.makepyfile(app=APP)
    path = pytester.makepyfile(COLLECTS)
    result = pytester.runpytest_subprocess(
        "-q", "-o", "asyncio_mode=auto", "-W", "ignore", "--show-capture=no", path
    )
    said = sections(result.stdout.str())
    result.assert_outcomes(passed=3, failed=7, errors=1)
    for name in ("test_block[/call]", "test_marked[/call]"):
        assert "collector ran 1 time meanwhile (called by collect (" in said[name]
    assert "240 x called by collect (" in said["test_soak"]
    for name in ("test_block[/switch_on]", "test_marked[/switch_on]"):
        assert "switched on by somebody" in said[name]
    assert "called by collects_at_the_end" in said["test_teardown"]
    # What is left all the same is blamed.
    assert "1 held for good" in said["test_block[/keep]"]
    assert "1 waiting for the garbage collector" in said["test_block[/cycle]"]


UNITTEST = """
from app import KEPT, cyclebreak, make_app, pytest
import unittest
import weakref

from aiohttp.test_utils import AioHTTPTestCase, TestClient, TestServer


class TestAiohttp(AioHTTPTestCase):
    async def get_application(self):
        return make_app(cyclebreak())

    async def get(self, path):
        async with self.client.get(path) as response:
            await response.read()

    @pytest.mark.no_request_cycles(requests=2)
    async def test_clean(self):
        await self.get("/refuse")
        await self.get("/ok")

    @pytest.mark.no_request_cycles(requests=50)
    async def test_too_few(self):
        await self.get("/ok")

    @pytest.mark.no_request_cycles
    async def test_permanent(self):
        await self.get("/keep")
        self.addCleanup(KEPT.clear)

    @pytest.mark.no_request_cycles
    @unittest.skip("not now")
    async def test_skipped(self):
        pass


class TestBare(unittest.IsolatedAsyncioTestCase):
    async def asyncSetUp(self):
        self.client = TestClient(TestServer(make_app()))
        await self.client.start_server()

    async def asyncTearDown(self):
        await self.client.close()

    @pytest.mark.no_request_cycles
    async def test_cycle(self):
        async with self.client.get("/refuse") as response:
            await response.read()


    @pytest.mark.no_request_cycles(requests=0)
    async def test_instance(self):
        KEPT.append(weakref.ref(self))


def test_instance_is_gone():
    assert KEPT.pop()() is None


class TestNotSetUp(unittest.IsolatedAsyncioTestCase):
    async def asyncSetUp(self):
        raise LookupError("there is no database")

    @pytest.mark.no_request_cycles
    async def test_broken(self):
        pass


class TestSync(unittest.TestCase):
    @pytest.mark.no_request_cycles
    def test_sync(self):
        pass
"""


PYTEST_6 = """
import sys
from _pytest.unittest import TestCaseFunction

instance = TestCaseFunction.instance.fget


def instance_of_pytest_6(item):
    asked_by = sys._getframe(1).f_globals["__name__"]
    return None if asked_by == "aiohttp_cyclebreak.pytest_plugin" else instance(item)


TestCaseFunction.instance = property(instance_of_pytest_6)
"""


@pytest.mark.parametrize("more", ["", PYTEST_6], ids=["", "pytest6"])
def test_unittest(pytester: pytest.Pytester, more: str) -> None:
    """Coroutine methods of test cases, which unittest finds and runs by itself."""
    pytester.makepyfile(app=APP)
    path = pytester.makepyfile(UNITTEST)
    # Nothing but the plugin collects.
    pytester.makeconftest(f"import gc\ngc.disable()\n{more}")
    result = pytester.runpytest_subprocess(
        "-q", "-rA", "-W", "ignore", "--show-capture=no", path
    )
    text = result.stdout.str()
    result.assert_outcomes(passed=3, failed=5, skipped=1)
    said = sections(text)
    assert "1 request made, at least 50 expected" in said["TestAiohttp.test_too_few"]
    assert "1 held for good" in said["TestAiohttp.test_permanent"]
    assert "1 waiting for the garbage collector" in said["TestBare.test_cycle"]
    assert "there is no database" in said["TestNotSetUp.test_broken"]
    assert "0 requests made" in said["TestSync.test_sync"]


def test_not_watched(pytester: pytest.Pytester) -> None:
    """A marked test does not pass where what runs it goes round the watch."""
    pytester.makeconftest(
        """
import pytest


class Item(pytest.Function):
    def runtest(self):
        self.parent.obj.test_it()


class Other(pytest.Item):
    def runtest(self):
        pass


def pytest_pycollect_makeitem(collector, name, obj):
    if name == "test_it":
        item = Item.from_parent(collector, name=name)
        other = Other.from_parent(collector, name="other")
        other.add_marker("no_request_cycles")
        return [item, other]
"""
    )
    pytester.makepyfile(
        """
import pytest


@pytest.mark.no_request_cycles(requests=0)
def test_it():
    pass


@pytest.mark.no_request_cycles(requests=0)
def test_watched():
    pass
"""
    )
    result = pytester.runpytest_subprocess("-q")
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(["*does not let it be watched*"] * 2)


RUN_AGAIN = """
import pytest
from _pytest.runner import runtestprotocol


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    \"""As pytest-rerunfailures does, and others of its kind.\"""
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runtestprotocol(item, log=False, nextitem=nextitem)
    if any(each.failed for each in reports):
        item._initrequest()
        reports = runtestprotocol(item, log=False, nextitem=nextitem)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True
"""


def test_run_again(pytester: pytest.Pytester) -> None:
    """What another plugin runs again is watched anew, and no longer the first time."""
    pytester.makeconftest(RUN_AGAIN)
    pytester.makepyfile(app=APP)
    pytester.makepyfile(
        """
from app import *  # noqa

RUNS = []


@pytest.fixture
async def client(aiohttp_client):
    RUNS.append("")
    yield await aiohttp_client(make_app(cyclebreak()))
    if RUNS == [""]:
        order = Order()
        order.order = order
        raise LookupError("the first time")


@pytest.fixture(autouse=True)
def forget_runs():
    yield
    if len(RUNS) == 2:
        RUNS.clear()


async def get(client, path):
    async with client.get(path) as response:
        await response.read()


@pytest.mark.no_request_cycles(garbage=True)
async def test_fixture(client):
    await get(client, "/refuse")


@pytest.mark.no_request_cycles
async def test_itself(aiohttp_client):
    RUNS.append("")
    await get(await aiohttp_client(make_app(cyclebreak())), "/refuse")
    assert len(RUNS) == 2


@pytest.mark.no_request_cycles(requests=2)
async def test_too_few(aiohttp_client):
    RUNS.append("")
    await get(await aiohttp_client(make_app(cyclebreak())), "/refuse")
    assert len(RUNS) == 2
"""
    )
    result = pytester.runpytest_subprocess(
        "-q", "-o", "asyncio_mode=auto", "-W", "ignore", "--show-capture=no"
    )
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines("1 request made, at least 2 expected*")


def test_in_parallel(pytester: pytest.Pytester) -> None:
    """Under pytest-xdist, where each process looks after its own requests."""
    pytester.makepyfile(app=APP)
    pytester.makepyfile(
        CLIENT
        + """
@pytest.mark.parametrize("number", range(4))
async def test_clean(client, no_request_cycles, number):
    async with no_request_cycles():
        await get(client, "/ok")


@pytest.mark.parametrize("number", range(4))
async def test_cycle(client, no_request_cycles, number):
    async with no_request_cycles():
        await get(client, "/refuse")
"""
    )
    result = pytester.runpytest_subprocess(
        "-q", "-n2", "-o", "asyncio_mode=auto", "-W", "ignore"
    )
    result.assert_outcomes(passed=4, failed=4)


def test_example(pytester: pytest.Pytester) -> None:
    """The example of the documentation passes, and fails without the guard."""
    text = (EXAMPLES / "pytest_upload.py").read_text()
    bare = text.replace("middlewares=[cyclebreak()]", "")
    assert bare != text
    pytester.makepyfile(test_guarded=text, test_bare=bare)
    result = pytester.runpytest_subprocess(
        "-q", "-o", "asyncio_mode=auto", "-W", "ignore"
    )
    # Bare, a request without a route fails; and where the client's closing leaves the
    # last request behind, so do the others.
    late = (3, 10, 6) <= AIOHTTP <= (3, 11, 13) and sys.version_info >= (3, 9)
    result.assert_outcomes(passed=5, failed=1, errors=int(late))


WRONG = {
    "requests='5'": "requests='5' is no int",
    "requests=-1": "requests=-1 is not a number of requests",
    "cls='Order'": "cls='Order' is neither a class nor a tuple of them",
    "cls=()": "cls=() has no class in it",
    "garbage=1": "garbage=1 is neither True nor False",
    "allow='no-such-leak'": "the catalogue knows no no-such-leak, only",
    "allow=5": "allow=5 is neither a leak's id, nor several, nor a function",
    "allow=lambda: True": "allow is called with the chain, which",
    "allow=__import__('asyncio').sleep": "allow must be a plain function",
    "request=50": "unexpected keyword argument 'request'",
    "50": "it takes keyword arguments only",
}


@pytest.mark.parametrize("options", WRONG)
def test_wrong_options(pytester: pytest.Pytester, options: str) -> None:
    """A marker that is wrong is told before anything runs."""
    path = pytester.makepyfile(
        "import pytest\n\n"
        f"@pytest.mark.no_request_cycles({options})\ndef test_it():\n    pass\n"
    )
    result = pytester.runpytest_inprocess("-q", path)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(f"*::test_it: no_request_cycles: *{WRONG[options]}*")


@pytest.mark.parametrize("options", WRONG)
def test_wrong_options_in_parallel(pytester: pytest.Pytester, options: str) -> None:
    """There it is a failure of the one test, with the message and no traceback."""
    path = pytester.makepyfile(
        "import pytest\n\n"
        f"@pytest.mark.no_request_cycles({options})\ndef test_it():\n    pass\n\n"
        "def test_other():\n    pass\n"
    )
    result = pytester.runpytest_subprocess("-q", "-n1", path)
    result.assert_outcomes(passed=1, errors=1)
    text = result.stdout.str()
    assert "::test_it: no_request_cycles: " in text
    assert WRONG[options] in text
    assert "Watch" not in text
    assert "pytest_plugin.py" not in text


def test_wrong_options_of_a_deselected_test(pytester: pytest.Pytester) -> None:
    """What is not run may be wrong."""
    path = pytester.makepyfile(
        "import pytest\n\n@pytest.mark.no_request_cycles(5)\ndef test_it():\n"
        "    pass\n\ndef test_other():\n    pass\n"
    )
    result = pytester.runpytest_inprocess("-q", "-k", "other", path)
    result.assert_outcomes(passed=1, deselected=1)


@pytest.mark.parametrize("options", WRONG)
def test_wrong_options_of_a_block(options: str) -> None:
    """They are refused by the call, and not only when it is entered."""
    with pytest.raises((TypeError, ValueError)) as caught:
        eval(f"watching({options})", {"watching": _watching})
    assert WRONG[options] in str(caught.value)
    assert "Watch" not in str(caught.value)


def test_a_soak_is_too_short() -> None:
    with pytest.raises(ValueError, match="at least 240"):
        run(_soak(lambda: None, times=100))
    with pytest.raises(TypeError, match="'240' is no int"):
        run(_soak(lambda: None, times="240"))  # type: ignore[arg-type]


def test_a_soak_calls_a_function() -> None:
    async def upload() -> None:
        pass

    with pytest.raises(TypeError, match="is no function.*: write lambda: before it"):
        run(_soak(upload()))  # type: ignore[arg-type]


def test_costs_nothing_unless_it_is_used(pytester: pytest.Pytester) -> None:
    """A suite that does not use it does not import aiohttp."""
    pytester.makepyfile(
        """
import sys
import tempfile


def test_it(request):
    assert "aiohttp_cyclebreak.pytest_plugin" in sys.modules
    assert "aiohttp" not in sys.modules
"""
    )
    result = pytester.runpytest_subprocess("-q", "-p", "no:aiohttp", "-p", "no:asyncio")
    result.assert_outcomes(passed=1)


def test_an_old_pytest_loads_it() -> None:
    """It would end each run of pytest where it is installed, if it could not be."""
    code = (
        "import pytest; del pytest.Config, pytest.StashKey; "  # pytest 6 has neither
        "import aiohttp_cyclebreak.pytest_plugin"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class NoReferences:
    """Of which there are no weak references."""

    __slots__ = ("itself",)

    def __init__(self) -> None:
        self.itself = self


def test_what_was_there_before_is_not_blamed() -> None:
    """And a collector that was off stays off."""
    old = NoReferences()

    async def main(new: bool) -> None:
        async with _watching(requests=0, cls=NoReferences):
            if new:
                NoReferences()

    with no_collector():
        run(main(False))
        assert not gc.isenabled()
        with pytest.raises(pytest.fail.Exception, match="1 object left behind"):
            run(main(True))
        assert not gc.isenabled()
    assert old.itself is old


def test_what_was_there_before_is_let_go_of() -> None:
    """The watch of a marked test is kept to the end of the session."""
    old = NoReferences()
    references = sys.getrefcount(old)
    watch = Watch(cls=NoReferences)
    watch.begin()
    watch.end()
    assert sys.getrefcount(old) == references


def test_another_one_begins_meanwhile() -> None:
    """It frees nothing that the first one is to see."""

    async def main() -> None:
        async with _watching(requests=0, cls=NoReferences):
            NoReferences()
            async with _watching(requests=0):
                pass

    with pytest.raises(pytest.fail.Exception, match="1 object left behind"):
        run(main())


@pytest.mark.parametrize(
    ("module", "is_told"),
    [
        ("_pytest.unraisableexception", False),
        ("aiohttp.test_utils", False),
        ("aiohttp.web", True),
        ("app", True),
    ],
)
def test_who_may_collect(module: str, is_told: bool) -> None:
    """What runs the tests does, once all is over."""
    code = "import gc\n\ndef collect():\n    gc.collect()\n\ncollect()"

    async def main() -> None:
        async with _watching(requests=0):
            exec(code, {"__name__": module})

    told = "collector ran 1 time meanwhile .called by collect ."
    with pytest.raises(pytest.fail.Exception, match=told) if is_told else nullcontext():
        run(main())


@pytest.mark.parametrize(
    ("number", "more"), [(1, []), (3, []), (4, ["and 1 more chain"])]
)
def test_what_is_held_is_told_before_other_garbage(
    number: int, more: List[str]
) -> None:
    """By a few chains that differ, and how many more there are."""
    kept: List[Any] = []

    async def main() -> None:
        async with _watching(requests=0, cls=NoReferences, garbage=True):
            for depth in range(number):
                kept.append(NoReferences())
                for _ in range(depth):
                    kept[-1] = [kept[-1]]

    with pytest.raises(pytest.fail.Exception, match=f"^{number} object.*held") as told:
        run(main())
    lines = str(told.value).splitlines()
    assert [line for line in lines if "more chain" in line] == more


@pytest.mark.parametrize("cls", [web.StreamResponse, web.HTTPBadRequest])
def test_responses_may_be_asked_for(cls: Any) -> None:
    """A connection that is still open has its last one, as it has its last request."""

    async def refuse(request: web.Request) -> web.Response:
        raise web.HTTPBadRequest

    async def main(*middlewares: Any) -> None:
        app = web.Application(middlewares=middlewares)
        app.router.add_get("/", refuse)
        async with serve(app) as service:
            client = await service.connect()
            async with _watching(requests=2, cls=cls):
                for _ in range(2):
                    await client.get()
                    assert (await client.answer())[0] == 400
            client.close()

    run(main(cyclebreak()))
    with pytest.raises(pytest.fail.Exception, match="2 objects left behind"):
        run(main())


def test_a_mocked_request_has_no_route() -> None:
    """Its path would be a mock, which tells its id: no two of them would be alike."""
    kept: List[Any] = []

    async def main() -> None:
        async with _watching():
            kept.extend(make_mocked_request("GET", "/secret") for _ in range(2))

    with pytest.raises(pytest.fail.Exception, match="2 x GET without a route:"):
        run(main())


def test_what_is_being_served_is_not_blamed() -> None:
    """A test that is no coroutine function cannot wait for its end."""

    async def main() -> None:
        begun, end = asyncio.Event(), asyncio.Event()

        async def wait(request: web.Request) -> web.Response:
            begun.set()
            await end.wait()
            return web.Response()

        app = web.Application()
        app.router.add_get("/", wait)
        async with serve(app) as service:
            watch = Watch()
            watch.begin()
            try:
                client = await service.connect()
                await client.get()
                await begun.wait()
                watch.check()
            finally:
                watch.end()
                end.set()
            assert await client.answer() == (200, "")
            client.close()

    run(main())


def test_connections_that_are_closing_are_waited_for() -> None:
    """Here until the client reads, which it does only when nothing else goes on."""

    async def main() -> None:
        sent: List[asyncio.Transport] = []

        async def large(request: web.Request) -> web.Response:
            transport = request.transport
            assert transport is not None
            sent.append(transport)
            # So that the handler does not wait for the client to read.
            transport.set_write_buffer_limits(high=2**30)
            return web.Response(body=bytes(2**24))

        async def read_at_last(client: socket.socket) -> None:
            for _ in range(500):
                await asyncio.sleep(0)
            loop = asyncio.get_running_loop()
            while await loop.sock_recv(client, 2**20):
                pass

        app = web.Application()
        app.router.add_get("/", large)
        async with serve(app) as service:
            assert service.runner.server is not None
            client = await service.connect()
            async with _watching(allow=lambda chain: True):
                await client.get()
                while not sent:
                    await asyncio.sleep(0)
                (transport,) = sent
                while not transport.get_write_buffer_size():
                    await asyncio.sleep(0)
                await spin()
                client.sock.shutdown(socket.SHUT_WR)
                while not transport.is_closing():
                    await asyncio.sleep(0)
                sent.clear()
                reading = asyncio.ensure_future(read_at_last(client.sock))
            assert not service.runner.server.connections
            await reading
            client.close()

    run(main())


def test_a_soak_looks_at_what_is_new() -> None:
    """What was there before, mostly much more, is left out of each collection."""
    old: List[Any] = [[]]
    old.append(old)
    seen = []

    async def call() -> None:
        if not seen:
            seen.append(any(each is old for each in gc.get_objects()))

    run(_soak(call))
    assert seen == [False]
    assert any(each is old for each in gc.get_objects())


def test_a_soak_counts_classes_of_one_name_together() -> None:
    """Those of one that does not grow hide nothing."""

    def make() -> Any:
        class Same:
            pass

        return Same

    growing, steady = make(), make()
    kept, last = [], []

    def call() -> None:
        kept.append(growing())
        last[:] = [steady()]

    with pytest.raises(pytest.fail.Exception, match=r"1\.00 .*Same"):
        run(_soak(call))


def test_a_soak_of_websockets() -> None:
    """Aiohttp's test client has each that it has opened, as it has each response."""

    async def echo(request: web.Request) -> web.WebSocketResponse:
        websocket = web.WebSocketResponse()
        await websocket.prepare(request)
        async for message in websocket:
            await websocket.send_str(message.data)
        return websocket

    async def main() -> None:
        app = web.Application(middlewares=[cyclebreak()])
        app.router.add_get("/", echo)
        async with TestClient(TestServer(app)) as client:

            async def call() -> None:
                async with client.ws_connect("/") as websocket:
                    await websocket.send_str("hello")
                    assert await websocket.receive_str() == "hello"

            await _soak(call)

    run(main())


def test_nobody_else_patches_requests() -> None:
    """Nothing is changed in aiohttp unless a test is watched."""
    assert web.BaseRequest.__init__.__qualname__ == "BaseRequest.__init__"
    assert not hasattr(web.BaseRequest.__init__, "__wrapped__")


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([400] * 11, True),
        ([400, 300, 500, 900, 300, 400, 500, 300, 600, 400, 300], True),
        # Noise, and what is made once while there is some.
        ([8150, 350, 50, 100, 100, 100, 50, 150, 50, 50, 50], False),
        ([100, 350, 50, 100, 50, 350, 100, 50, 2100, 350, 6350], False),
    ],
)
def test_what_is_made_once_is_no_growth(steps: List[int], expected: bool) -> None:
    series = array("q", accumulate([15000, *steps]))
    assert grows(series) is expected
