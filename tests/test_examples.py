"""The files that the documentation shows, and what it says of them."""

import contextlib
import gc
import importlib
import json
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any, Iterator

import pytest
from aiohttp import web

from aiohttp_cyclebreak.leaks.gateway import Upstream

from .service import alive, no_collector, run, serve

pytestmark = pytest.mark.processes

EXAMPLES = pathlib.Path(__file__).parent.parent / "docs" / "examples"


@contextlib.contextmanager
def process(*arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """A process in the folder of the examples, ended when it is left."""
    started = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=EXAMPLES,
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


def ask(port: int, path: str) -> Any:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as answer:
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
def test_gunicorn_workers_are_guarded(worker: str) -> None:
    """Two real workers, their collectors off: no request is left in either."""
    pytest.importorskip("gunicorn")
    if "UVLoop" in worker:
        pytest.importorskip("uvloop")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with process(
        "-m",
        "gunicorn",
        "gunicorn_app:create_runner",
        "--worker-class",
        f"aiohttp.{worker}",
        "--workers=2",
        f"--bind=127.0.0.1:{port}",
    ) as master:
        for _ in range(600):
            with contextlib.suppress(OSError):
                ask(port, "/count")
                break
            if master.poll() is not None:
                assert master.stdout is not None
                output = master.stdout.read()
                assert "There is no current event loop" in output
                pytest.skip(
                    "this aiohttp's uvloop worker does not start with this uvloop"
                )
            time.sleep(0.05)
        for _ in range(100):
            assert ask(port, "/") == 400
        counts = [ask(port, "/count") for _ in range(20)]
        # The one that counts; another may be on its way out.
        assert max(count["alive"] for count in counts) <= 2
        master.send_signal(signal.SIGTERM)
        output, _ = master.communicate(timeout=60)
        assert "Traceback" not in output
