"""Real processes: gunicorn reloads under load, ``run_app()`` is told to end."""

import concurrent.futures
import contextlib
import importlib.util
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from typing import Any, Callable, Dict, Iterable, Iterator, List, Tuple

import pytest

from ..service import AIOHTTP, TIMEOUT
from .compare import POSITIONS

# The whole matrix has no time for all of it.
COMPANY = importlib.util.find_spec("sentry_sdk") is not None
ROOT = pathlib.Path(__file__).parent.parent.parent
HELD = 8  # requests that are in flight when the signal comes
AFTERWARDS = 200  # those that the new workers get
CLIENTS = 2  # that go on meanwhile
UNANSWERED = "no answer"

if sys.platform == "win32":
    pytest.skip("there are no such signals", allow_module_level=True)


def ask(port: int, path: str) -> Tuple[int, str]:
    """Send one request on a connection of its own; a wrong answer is an error."""
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as sock:
        head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        sock.sendall(head.encode())
        received = b""
        while True:
            chunk = sock.recv(65536)
            if not chunk:
                break
            received += chunk
    if not received:
        raise ConnectionError("closed without an answer")
    head, separator, body = received.decode().partition("\r\n\r\n")
    length = head.lower().partition("content-length: ")[2].partition("\r\n")[0]
    assert separator
    assert int(length) == len(body)
    return int(head.split()[1]), body


class Ended(Exception):
    """A process ended that had to go on; with what it printed."""


def wait_for(condition: Callable[[], Any], process: "subprocess.Popen[str]") -> Any:
    for _ in range(int(TIMEOUT * 100)):
        with contextlib.suppress(OSError):
            found = condition()
            if found:
                return found
        if process.poll() is not None:
            raise Ended(process.communicate()[0])
        time.sleep(0.01)
    raise TimeoutError(condition)


@contextlib.contextmanager
def served(
    *command: str, folder: pathlib.Path, guarded: bool, position: str = "setup"
) -> Iterator[Tuple["subprocess.Popen[str]", int]]:
    """A process that inherits a listening socket, as ``FD`` in the command."""
    folder.mkdir()
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(128)
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                *(each.replace("FD", str(sock.fileno())) for each in command),
            ],
            cwd=ROOT,
            env={
                **os.environ,
                "AIOHTTP_CYCLEBREAK": "on" if guarded else "off",
                "SERVED_FOLDER": str(folder),
                "SERVED_POSITION": position,
            },
            pass_fds=[sock.fileno()],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        port = sock.getsockname()[1]
    try:
        yield process, port
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def held_requests(
    pool: concurrent.futures.Executor, port: int
) -> "List[concurrent.futures.Future[Tuple[int, str]]]":
    paths = ("/hold/refuse", "/hold/fail")
    return [pool.submit(ask, port, paths[number % 2]) for number in range(HELD)]


def noted(folder: pathlib.Path, name: str) -> List[int]:
    """The processes that noted something, each time that they did."""
    return [int(line) for line in (folder / name).read_text().splitlines()]


def outcome(future: "concurrent.futures.Future[Tuple[int, str]]") -> Any:
    try:
        status, body = future.result(timeout=TIMEOUT)
    except OSError as exc:
        return type(exc).__name__
    return status, body if status == 409 else body[:25]


def stopped(folder: pathlib.Path, guarded: bool, position: str) -> Tuple[Any, ...]:
    """What clients get of a service that is told to end, its log, what it leaves."""
    command = ("tests.company.served", "FD")
    with served(*command, folder=folder, guarded=guarded, position=position) as (
        process,
        port,
    ), concurrent.futures.ThreadPoolExecutor(HELD) as pool:
        answers = Counter(ask(port, "/") for _ in range(20))
        futures = held_requests(pool, port)
        wait_for(lambda: len(noted(folder, "held")) == HELD, process)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: noted(folder, "stopping"), process)
        (folder / "go").touch()
        held = Counter(map(outcome, futures))
        output, _ = process.communicate(timeout=TIMEOUT)
        log, _, left = output.rstrip().rpartition("\n")
        logged = log.count("Error handling request"), log.count("ValueError: after")
        return process.returncode, answers, held, logged, int(left)


def test_run_app_is_told_to_end_amid_failing_requests(tmp_path: pathlib.Path) -> None:
    """They are answered, or not, as without the library; and are gone at the end."""
    *expected, kept = stopped(tmp_path / "bare", False, "setup")
    assert expected[:2] == [0, {(400, "no"): 20}]
    assert sum(expected[2].values()) == HELD
    if AIOHTTP >= (3, 9):  # those before cancel what is in flight
        assert expected[2][(409, "held")] == HELD / 2
        assert expected[3] == (HELD / 2, HELD / 2)
    assert kept >= 20
    for position in POSITIONS if COMPANY else POSITIONS[-1:]:  # each takes a second
        *found, left = stopped(tmp_path / position, True, position)
        assert found == expected
        assert left == 0


class Load:
    """Clients in threads that ask for a refusal, again and again."""

    def __init__(self, port: int) -> None:
        self.answers: Counter[Any] = Counter()
        self._port = port
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run) for _ in range(CLIENTS)]

    def _run(self) -> None:
        while not self._ended.wait(0.002):  # a load for workers, not for processors
            try:
                answer: Any = ask(self._port, "/")
            except OSError:
                answer = UNANSWERED
            with self._lock:
                self.answers[answer] += 1

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()


def two_workers(
    pool: concurrent.futures.Executor, port: int, others: Iterable[int] = ()
) -> Dict[int, int]:
    """How many requests each of two workers has, others having stopped to answer.

    Asked one after the other, the same worker may answer every time.
    """
    answers = pool.map(ask, [port] * HELD, ["/count"] * HELD)
    counts = [json.loads(body) for _, body in answers]
    found: Dict[int, int] = {}
    for count in counts:
        alive = found.get(count["worker"], count["alive"])
        found[count["worker"]] = min(alive, count["alive"])
    return found if len(found) == 2 and not set(found) & set(others) else {}


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def reloaded(worker: str, folder: pathlib.Path, guarded: bool) -> Tuple[Any, ...]:
    """What clients get while two others replace two workers, and what is left."""
    command = (
        "gunicorn",
        "tests.company.served:create_app",
        f"--worker-class=aiohttp.{worker}",
        "--workers=2",
        "--bind=fd://FD",
        "--graceful-timeout=4",
    )
    with served(*command, folder=folder, guarded=guarded) as (
        master,
        port,
    ), concurrent.futures.ThreadPoolExecutor(HELD) as pool:
        old = wait_for(lambda: two_workers(pool, port), master)
        futures = held_requests(pool, port)
        wait_for(lambda: len(noted(folder, "held")) == HELD, master)
        with Load(port) as load:
            master.send_signal(signal.SIGHUP)
            wait_for(lambda: set(old) <= set(noted(folder, "stopping")), master)
            (folder / "go").touch()
            held = Counter(map(outcome, futures))
        wait_for(lambda: not any(map(is_running, old)), master)
        new = wait_for(lambda: two_workers(pool, port, old), master)
        afterwards = Counter(ask(port, "/") for _ in range(AFTERWARDS))
        left = wait_for(lambda: two_workers(pool, port, old), master)
        assert set(left) == set(new)
        master.send_signal(signal.SIGTERM)
        output, _ = master.communicate(timeout=TIMEOUT)
        logged = output.count("Error handling"), output.count("ValueError: after")
        same = master.returncode, held, logged, afterwards
        return (*same, load.answers, sum(left.values()))


@pytest.mark.skipif(not COMPANY, reason="slow: runs beside the extra 'company'")
@pytest.mark.parametrize("worker", ["GunicornWebWorker", "GunicornUVLoopWebWorker"])
def test_gunicorn_reloads_under_load(worker: str, tmp_path: pathlib.Path) -> None:
    """Requests in flight are answered by the old workers, those after by the new ones.

    A worker that ends may close a connection that it has accepted and read nothing
    of: once a client and worker at most, with the library and without it.
    """
    pytest.importorskip("gunicorn")
    if "UVLoop" in worker:
        pytest.importorskip("uvloop")
    try:
        *expected, load, kept = reloaded(worker, tmp_path / "bare", False)
    except Ended as exc:
        assert "There is no current event loop" in str(exc)
        pytest.skip("aiohttp 3.10 and its like start no such worker on uvloop 0.22")
    assert expected == [
        0,
        {(409, "held"): HELD / 2, (500, "500 Internal Server Error"): HELD / 2},
        (HELD / 2, HELD / 2),
        {(400, "no"): AFTERWARDS},
    ]
    assert set(load) <= {(400, "no"), UNANSWERED}
    assert kept >= AFTERWARDS
    *found, load, left = reloaded(worker, tmp_path / "guarded", True)
    assert found == expected
    assert set(load) <= {(400, "no"), UNANSWERED}
    assert load[UNANSWERED] <= CLIENTS * 2
    assert left <= HELD * 2  # those that count, and the last of those before
