"""The files that the documentation shows, and what it says of them."""

import asyncio
import contextlib
import gc
import importlib
import json
import pathlib
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
import weakref
from typing import Any, Iterator, Sequence, Tuple

import pytest
from aiohttp import web

from aiohttp_cyclebreak.leaks.gateway import Upstream

from .service import alive, no_collector, run, serve

pytestmark = pytest.mark.processes

EXAMPLES = pathlib.Path(__file__).parent.parent / "docs" / "examples"


@contextlib.contextmanager
def process(
    *arguments: str, inherited: Sequence[int] = ()
) -> Iterator["subprocess.Popen[str]"]:
    """A process in the folder of the examples, ended when it is left."""
    started = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=EXAMPLES,
        pass_fds=inherited,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield started
    finally:
        started.kill()
        started.wait()
        assert started.stdout is not None
        started.stdout.close()


@contextlib.contextmanager
def gunicorn(*arguments: str) -> Iterator[Tuple["subprocess.Popen[str]", int]]:
    """The master, and the port of a socket that it inherits.

    Nobody else can take that port, and a connection waits until there is a worker.
    """
    with contextlib.ExitStack() as stack:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            sock.listen(128)
            port = sock.getsockname()[1]
            fd = sock.fileno()
            command = ("-m", "gunicorn", *arguments, f"--bind=fd://{fd}")
            master = stack.enter_context(process(*command, inherited=[fd]))
        # Closed here, it ends with the master, and so do connections that wait for it.
        yield master, port


def ask(port: int, path: str) -> Any:
    url = f"http://127.0.0.1:{port}{path}"
    try:
        with urllib.request.urlopen(url, timeout=120) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


@pytest.mark.parametrize(
    ("answers", "status"),
    [
        ((), 502),
        ((b"",), 502),
        ((b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf",), 502),
        ((b"220 mail.example ESMTP\r\n\r\n",), 502),
        ((None,), 504),
        ((b"HTTP/1.1 201 Created\r\nContent-Length: 2\r\nX: y\r\n\r\nok",), 201),
    ],
    ids=["refused", "cut", "half", "not HTTP", "timeout", "success"],
)
@pytest.mark.parametrize("guarded", [True, False])
def test_a_reverse_proxy_keeps_no_request(
    answers: Any, status: int, guarded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Switched off it does, where the catalogue says so."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("AIOHTTP_CYCLEBREAK", "on" if guarded else "off")
    reverse_proxy = importlib.import_module("reverse_proxy")

    async def main() -> int:
        upstream = Upstream(answers)
        upstream.start()
        app = reverse_proxy.create_app(upstream.url.rstrip("/"), timeout=0.1)
        if status != 504:
            app = reverse_proxy.create_app(upstream.url.rstrip("/"))
        try:
            async with serve(app) as service:
                with no_collector():
                    before = len(alive(web.BaseRequest))
                    for _ in range(3):
                        assert (await service.ask("/some/path?a=b"))[0] == status
                        await service.settle()
                    return len(alive(web.BaseRequest)) - before
        finally:
            upstream.stop()

    left = run(main())
    gc.collect()
    if guarded:
        assert left == 0
    elif status == 502 and answers != (b"",):
        assert left == 3  # raised from the client's exception: on every version


def test_a_runner_of_its_own_serves_and_stops() -> None:
    """It prints its address, refuses, and ends cleanly on SIGTERM."""
    with process("own_runner.py") as service:
        assert service.stdout is not None
        port = int(service.stdout.readline().rpartition(",")[2].strip(" )\n"))
        assert ask(port, "/") == 400
        service.send_signal(signal.SIGTERM)
        rest, _ = service.communicate(timeout=60)
        assert (service.returncode, rest) == (0, "")


@pytest.mark.parametrize("worker", ["GunicornWebWorker", "GunicornUVLoopWebWorker"])
def test_gunicorn_workers_are_guarded(worker: str, tmp_path: pathlib.Path) -> None:
    """Two real workers, their collectors off: no request is left in either."""
    pytest.importorskip("gunicorn")
    if "UVLoop" in worker:
        pytest.importorskip("uvloop")
    config = tmp_path / "without_collector.py"
    config.write_text("import gc\n\ndef post_worker_init(worker):\n    gc.disable()\n")
    with gunicorn(
        "gunicorn_app:create_runner",
        f"--config={config}",
        *("--worker-class", f"aiohttp.{worker}"),
        "--workers=2",
    ) as (master, port):
        try:
            ask(port, "/count")
        except OSError:
            output, _ = master.communicate(timeout=60)
            assert "There is no current event loop" in output
            pytest.skip("this aiohttp's uvloop worker does not start with this uvloop")
        for _ in range(100):
            assert ask(port, "/") == 400
        counts = [ask(port, "/count") for _ in range(20)]
        # The one that counts; another may be on its way out.
        assert max(count["alive"] for count in counts) <= 2
        master.send_signal(signal.SIGTERM)
        output, _ = master.communicate(timeout=60)
        assert "Traceback" not in output


def test_an_application_made_before_the_workers_is_guarded(
    tmp_path: pathlib.Path,
) -> None:
    """By ``gunicorn --preload``: what the library remembers is forked with it."""
    pytest.importorskip("gunicorn")
    (tmp_path / "preloaded.py").write_text(
        "import gc, os\n"
        "from aiohttp import web\n"
        "from aiohttp_cyclebreak import setup\n"
        "from gunicorn_app import count, refuse\n"
        "gc.disable()\n"
        "def create_app(guarded):\n"
        "    app = web.Application()\n"
        "    app.router.add_get('/', refuse)\n"
        "    app.router.add_get('/count', count)\n"
        "    if guarded:\n"
        "        setup(app)\n"
        "    return app\n"
    )
    for guarded in (False, True):
        with gunicorn(
            f"preloaded:create_app({guarded})",
            "--preload",
            f"--pythonpath={tmp_path},{EXAMPLES}",
            "--worker-class=aiohttp.GunicornWebWorker",
        ) as (_, port):
            for _ in range(20):
                assert ask(port, "/") == 400
            assert (ask(port, "/count")["alive"] <= 2) is guarded


def left_by(create_app: Any, path: str, requests: int = 3) -> int:
    """Requests that are alive when all are answered, and collected after that."""

    async def main() -> int:
        async with serve(create_app()) as service:
            with no_collector():
                before = len(alive(web.BaseRequest))
                for _ in range(requests):
                    await service.ask(path, "Connection: close")
                    await service.settle()
                return len(alive(web.BaseRequest)) - before

    left: int = run(main())
    gc.collect()
    return left


@pytest.mark.parametrize(
    ("name", "factory", "path"),
    [
        ("one_route", "create_app", "/refuse"),
        ("one_route", "create_app", "/item"),
        ("sub_applications", "create_app", "/orders/1"),
        ("guarded", "create_app", "/no/such/path"),
    ],
)
def test_an_example_keeps_no_request(
    name: str, factory: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Imported while it is switched off, it keeps each of them."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for switch, left in (("off", 3), ("on", 0)):
        monkeypatch.setenv("AIOHTTP_CYCLEBREAK", switch)
        monkeypatch.delitem(sys.modules, name, raising=False)
        create_app = getattr(importlib.import_module(name), factory)
        assert left_by(create_app, path) == left


def test_one_route_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its requests wait for the collector, as they would without the middleware."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "one_route", raising=False)
    one_route = importlib.import_module("one_route")
    assert left_by(one_route.create_guarded_app, "/debug") == 3


def test_a_process_is_asked_for_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that wait are there before the collection, and not after it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    requests_alive = importlib.import_module("requests_alive")

    async def refuse(request: web.Request) -> web.Response:
        raise web.HTTPBadRequest

    async def main() -> Any:
        app = web.Application()
        app.router.add_get("/refuse", refuse)
        app.router.add_get("/count", requests_alive.count)
        async with serve(app) as service:
            with no_collector():
                for _ in range(5):
                    await service.ask("/refuse")
                    await service.settle()
                return json.loads((await service.ask("/count"))[1])

    counts = run(main())
    assert counts["before"] - counts["after"] == 5


@pytest.mark.parametrize("module", ["gunicorn_app", "requests_alive"])
def test_requests_are_counted_among_dead_proxies(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of ``weakref.proxy()``, as some libraries have, answer nothing."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    count = importlib.import_module(module).count

    class Referent:
        pass

    proxy = weakref.proxy(Referent())
    with pytest.raises(ReferenceError):
        isinstance(proxy, web.BaseRequest)
    request: Any = None
    assert asyncio.run(count(request)).status == 200


def test_a_cycle_delays() -> None:
    """It outlives the function, and no collection."""
    with process("cycle.py") as script:
        output, _ = script.communicate(timeout=60)
    assert output.splitlines() == [
        "after the function has returned: alive",
        "after a collection: gone",
    ]


def test_the_check_of_the_first_page_is_clean() -> None:
    """Its exit code is 0, and bare there is something to stop."""
    with process(
        "-m",
        "aiohttp_cyclebreak",
        "check",
        "guarded:create_app",
        "--own-guard",
        "--request=POST /image",
        '--data={"image": "A"}',
        "--request=GET /missing",
        "--requests=20",
        "--json",
    ) as check:
        output, _ = check.communicate(timeout=120)
    report = json.loads(output)
    assert (check.returncode, report["guarded"]["left"]) == (0, 0)
    # What nobody catches, a 500, would leave nothing anyhow.
    assert report["bare"]["answers"] == [{"200": 20}, {"404": 20}]
    assert report["bare"]["left"] >= 20
