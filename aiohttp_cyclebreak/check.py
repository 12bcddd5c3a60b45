"""Does an application keep its requests? Sends it some, bare and guarded, and counts.

Each run has a process of its own (:mod:`aiohttp_cyclebreak.check_process`), so that
neither the clients nor the other run are part of what is measured.
"""

import contextlib
import http.client
import importlib
import json
import os
import platform
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import (
    Any,
    Callable,
    Counter,
    Deque,
    Dict,
    Iterator,
    List,
    NoReturn,
    Optional,
    Sequence,
    Set,
    Tuple,
)

import aiohttp

from . import __version__
from .check_requests import LOOPBACK, Request, UsageError

__all__ = (
    "CheckFailed",
    "Plan",
    "Report",
    "Run",
    "can_plot",
    "end_processes",
    "plot",
    "run",
)

_SAMPLES = 40  # of the memory, in a run
_WARM_UP = 10  # times each request, or the concurrency if that is more
_LINES = 50  # the last ones, of what an application has printed, are shown


class CheckFailed(Exception):
    """The application did not start, ended or did not answer.

    Attributes:
        tried: what was tried.
        traceback: that of the application's own error, or nothing.
        output: the end of what the application has printed, or nothing.
    """

    def __init__(
        self, message: str, tried: str, traceback: str = "", output: str = ""
    ) -> None:
        super().__init__(message)
        self.tried = tried
        self.traceback = traceback
        self.output = output


@dataclass(frozen=True)
class Plan:
    """What to send, how often, and to which application.

    Attributes:
        target: the application, as :func:`~.check_process.parse_target` reads it.
        requests: the requests, sent in turns.
        words: arguments for a factory that takes a list of them.
        chdir: the folder where the application is imported.
        repetitions: how often each request is sent.
        concurrency: how many clients send at once.
        keep_alive: whether a client sends all its requests through one connection.
        timeout: seconds for the application's start, and for each answer.
        own_guard: whether the guarded run has no other guard than the application's.
        garbage: whether any cyclic garbage is as bad as a request.
    """

    target: str = field(repr=False)
    requests: Tuple[Request, ...] = (Request("GET", "/"),)
    words: Tuple[str, ...] = field(default=(), repr=False)
    chdir: str = "."
    repetitions: int = 200
    concurrency: int = 1
    keep_alive: bool = False
    timeout: float = 60.0
    own_guard: bool = False
    garbage: bool = False

    @property
    def application(self) -> str:
        """What is served, without its arguments: these may be secret."""
        return self.target.partition("(")[0]

    @property
    def guard(self) -> str:
        """What guards the guarded run."""
        if self.own_guard:
            return "the application's own"
        return "setup(app) and guard_server(runner)"


@dataclass(frozen=True)
class Run:
    """What one run left behind.

    Attributes:
        sent: how many requests were sent, with the collector off.
        served: how many of them the application began to serve.
        answers: for each request of the plan how many answers had each status;
            ``none`` where there was none, ``aborted`` where the client vanished.
        left: requests that were still alive once all clients had gone.
        held: those of them that a collection did not free: by a live reference.
        garbage: objects of cyclic garbage by type, without asyncio's own transports.
        tasks: tasks of the application that had not come to their end.
        memory: for each sample the seconds since the first request, the requests
            sent so far, and the bytes of memory; none where that is not known.
        growth: bytes that the memory grew by for each request.
        cpu: seconds of CPU a request, with the collector as the application has it.
        collections: automatic collections of each generation in as many requests.
        collector_seconds: the time that they took.
        chains: what holds some of what was left, as data.
        own_collections: collections that the application has run while the collector
            was off; what they freed was not counted.
    """

    sent: int
    served: int
    answers: List[Dict[str, int]]
    left: int
    held: int
    garbage: Dict[str, int]
    tasks: int
    memory: List[Tuple[float, int, int]]
    growth: Optional[float]
    cpu: float
    collections: List[int]
    collector_seconds: float
    chains: List[Dict[str, Any]]
    own_collections: int

    @property
    def full_collections(self) -> int:
        """Automatic collections of the oldest generation, and so of everything."""
        return self.collections[-1]


@dataclass(frozen=True)
class Report:
    """What both runs of a plan left behind."""

    plan: Plan
    bare: Run
    guarded: Run
    event_loop: str
    memory_is: str

    @property
    def is_clean(self) -> bool:
        """Whether the guarded run left nothing, and could have shown it."""
        return not (self._left_something or self.doubt)

    @property
    def _left_something(self) -> bool:
        garbage = self.plan.garbage and self.guarded.garbage
        return bool(self.guarded.left or garbage)

    @property
    def doubt(self) -> str:
        """Why it shows nothing that nothing is left; empty where it does."""
        if self._left_something:
            return ""
        run = self.guarded
        if not run.served:
            return "This shows nothing: no request was served."
        for request, answers in zip(self.plan.requests, run.answers):
            if set(answers) == {"none"}:
                return f"This shows nothing: {request} got no answer at all."
        if run.own_collections:
            return (
                f"This shows nothing: the application has run {run.own_collections} "
                "collections itself, by gc.collect() or gc.enable(), and what they "
                "freed is not known. Leave that out for the check."
            )
        return ""

    @property
    def sentence(self) -> str:
        """The result in words."""
        text = (
            f"aiohttp {aiohttp.__version__} on {platform.python_implementation()} "
            f"{platform.python_version()}: of {self.bare.served} requests bare, "
            f"{_left(self.bare)}; of {self.guarded.served} guarded, "
            f"{_left(self.guarded)}"
        )
        garbage = sum(self.guarded.garbage.values())
        if garbage and not self.guarded.left:
            text += f", but {garbage} objects of other cyclic garbage are"
        return f"{text}. {self.doubt}".rstrip()

    @property
    def hint(self) -> str:
        """What to look at: a guard that let a known leak pass, or what cannot leak."""
        known = any(chain["leak"] for chain in self.guarded.chains)
        if not self.is_clean and self.plan.own_guard and known:
            return (
                "Is there a guard? If so, it did not see this. keep_cycles and keep= "
                "leave requests alone; what a middleware outside of cyclebreak() "
                "raises needs setup(app); what no middleware sees needs "
                "guard_server(runner)."
            )
        for request, answers in zip(self.plan.requests, self.guarded.answers):
            if set(answers) == {"500"}:
                return (
                    f"{request} was always answered by 500. Most exceptions that "
                    "nobody catches leave nothing, bare either: if the application "
                    "lacks what it needs, give it that."
                )
        return ""

    def as_dict(self) -> Dict[str, Any]:
        """The report as JSON has it; without a header, a query or a body."""
        plan = self.plan
        return {
            "aiohttp_cyclebreak": __version__,
            "aiohttp": aiohttp.__version__,
            "python": platform.python_version(),
            "implementation": platform.python_implementation(),
            "platform": platform.platform(),
            "event_loop": self.event_loop,
            "application": plan.application,
            "guard": plan.guard,
            "requests": [
                {
                    "request": f"{each.method} {each.path.partition('?')[0]}",
                    "body": len(each.body),
                    "abort_after": each.abort_after,
                }
                for each in plan.requests
            ],
            "repetitions": plan.repetitions,
            "concurrency": plan.concurrency,
            "keep_alive": plan.keep_alive,
            "memory_is": self.memory_is,
            "bare": asdict(self.bare),
            "guarded": asdict(self.guarded),
            "summary": {"clean": self.is_clean, "text": self.sentence},
        }


def _left(run: Run) -> str:
    if not run.left:
        return "none is left"
    parts = []
    delayed = run.left - run.held
    if delayed > 0:
        wait = "waits" if delayed == 1 else "wait"
        parts.append(f"{delayed} {wait} for the garbage collector")
    if run.held:
        are = "is" if run.held == 1 else "are"
        parts.append(f"{run.held} {are} held by a live reference")
    return " and ".join(parts)


_Answers = Counter[Tuple[Request, str]]  # by request and status

_processes: "Set[subprocess.Popen[bytes]]" = set()  # those that were not closed


def end_processes() -> None:
    """End all applications that are served, from the handler of a signal too."""
    for process in list(_processes):
        process.kill()
        for _ in range(100):  # wait() may be waited for by what was interrupted
            if process.poll() is not None:
                break
            time.sleep(0.01)


class _Process:
    """The process of an application."""

    def __init__(self, plan: Plan, guarded: bool) -> None:
        self._plan = plan
        self._guarded = guarded
        self._tried = "start a process"
        self._has_started = False
        self._lock = threading.Lock()  # one command at a time
        self._failing = threading.Lock()
        self._failure: Optional[CheckFailed] = None
        self._answers: queue.Queue[Optional[bytes]] = queue.Queue()
        self._output: Deque[bytes] = deque(maxlen=_LINES)
        environment = dict(os.environ)
        # Bare is bare, also where the application brings its own guard.
        environment["AIOHTTP_CYCLEBREAK"] = "on" if guarded else "off"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "aiohttp_cyclebreak.check_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )
        _processes.add(self._process)
        self._readers = [
            threading.Thread(target=target, daemon=True)
            for target in (self._read_answers, self._read_output)
        ]
        for reader in self._readers:
            reader.start()

    def _read_answers(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stdout:
            for line in stdout:
                self._answers.put(line)
        self._answers.put(None)

    def _read_output(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stderr:
            self._output.extend(stderr)

    def start(self) -> Dict[str, Any]:
        """Start the application; return where it listens."""
        plan = self._plan
        answer = self._ask(
            {
                "target": plan.target,
                "words": plan.words,
                "chdir": plan.chdir,
                "guarded": self._guarded and not plan.own_guard,
                "timeout": plan.timeout,
            }
        )
        self._has_started = True
        return answer

    def ask(self, do: str, **arguments: Any) -> Dict[str, Any]:
        """Give a command, and wait for its answer."""
        with self._lock:
            return self._ask({"do": do, **arguments})

    def _ask(self, what: Dict[str, Any]) -> Dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(what).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has ended, which is read next
        # It has a deadline of its own to start, and shows then where it hangs.
        timeout = self._plan.timeout
        patience = timeout + 30
        begun = time.monotonic()
        deadline = begun + patience
        while True:
            try:
                line = self._answers.get(timeout=max(0, deadline - time.monotonic()))
            except queue.Empty:
                self.fail(f"the application's process is silent for {patience:g} s")
            if line is None:
                self._answers.put(None)  # for other threads that ask
                code = self._process.wait()
                if not (self._has_started or time.monotonic() < begun + timeout):
                    self.fail(
                        f"the application did not start in {timeout:g} s: if it is "
                        "only slow, raise --timeout"
                    )
                self.fail(f"the application's process ended with code {code}")
            answer: Dict[str, Any] = json.loads(line)
            if "trying" in answer:
                self._tried = answer["trying"]
            elif "not_there" in answer:
                raise UsageError(answer["not_there"])
            elif "failed" in answer:
                self.fail(answer["failed"], answer["traceback"])
            else:
                return answer

    def fail(self, message: str, traceback: str = "") -> NoReturn:
        """Say what was tried, and what the application has printed."""
        with self._failing:
            if self._failure is None:
                self.stop()
                output = b"".join(self._output).decode(errors="replace").strip()
                self._failure = CheckFailed(message, self.tried, traceback, output)
        # Other clients only see that there is no application any more.
        raise self._failure

    @property
    def tried(self) -> str:
        """What is being tried, and in which of the runs."""
        how = f"guarded by {self._plan.guard}" if self._guarded else "bare"
        return f"{self._tried} ({how})"

    @tried.setter
    def tried(self, what: str) -> None:
        self._tried = what

    def stop(self, patience: float = 0.0) -> None:
        """End the process, after some seconds by force."""
        try:
            if patience:
                assert self._process.stdin is not None
                with contextlib.suppress(OSError):
                    self._process.stdin.write(b'{"do": "stop"}\n')
                    self._process.stdin.flush()
                self._process.wait(patience)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._process.kill()
            self._process.wait()
            for reader in self._readers:
                reader.join(10)  # a process of the application's own may go on

    def close(self) -> None:
        """Close what is open once it has ended."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        _processes.discard(self._process)


class _Client:
    """A client on loopback; one thread of its own uses it."""

    def __init__(self, plan: Plan, process: _Process, port: int) -> None:
        self._plan = plan
        self._process = process
        self._port = port
        self._connection: Optional[http.client.HTTPConnection] = None

    def send(self, requests: Sequence[Request]) -> _Answers:
        """Send requests, one after another; count the answers by status."""
        answers: _Answers = Counter()
        for request in requests:
            answers[request, self._send(request)] += 1
            if not self._plan.keep_alive:
                self.close()
        return answers

    def close(self) -> None:
        """Hang up."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _send(self, request: Request) -> str:
        idle = self._connection is not None
        if self._connection is None:
            self._connection = http.client.HTTPConnection(
                LOOPBACK, self._port, timeout=self._plan.timeout
            )
        connection = self._connection
        try:
            return self._exchange(connection, request)
        except (OSError, http.client.HTTPException) as exc:
            self.close()
            # Before CPython 3.10 that of a socket is no TimeoutError.
            if isinstance(exc, TimeoutError) or "timed out" in str(exc):
                self._process.tried = f"{request}"
                self._process.fail(
                    f"there is no whole answer in {self._plan.timeout:g} s: if it is "
                    "only slow, raise --timeout; what is left of an endless one, a "
                    "stream, cannot be told"
                )
            if idle and isinstance(exc, ConnectionError):
                return self._send(request)  # the server had hung up meanwhile
            return "none"

    def _exchange(
        self, connection: http.client.HTTPConnection, request: Request
    ) -> str:
        deadline = time.monotonic() + self._plan.timeout
        names = {name.lower() for name, _ in request.headers}
        connection.putrequest(
            request.method,
            request.path,
            skip_host="host" in names,
            skip_accept_encoding=True,
        )
        for name, value in request.headers:
            connection.putheader(name, value)
        if (
            request.body or request.method in ("POST", "PUT", "PATCH")
        ) and not names & {"content-length", "transfer-encoding"}:
            connection.putheader("Content-Length", str(len(request.body)))
        connection.endheaders()
        if request.abort_after is not None:
            if request.abort_after:
                connection.send(request.body[: request.abort_after])
            # The application has begun with it when it has answered this.
            self._process.ask("spin")
            self.close()
            return "aborted"
        try:
            if request.body:
                connection.send(request.body)
        except ConnectionError:
            pass  # it may have answered before it had it all
        with connection.getresponse() as response:
            while response.read1(65536):
                if time.monotonic() > deadline:
                    raise TimeoutError
            if response.will_close or response.status == 101:
                self.close()
            return str(response.status)


def run(
    plan: Plan, progress: Callable[[int, int, str], Any] = lambda *_: None
) -> Report:
    """Serve an application, bare and guarded, and count what each run leaves.

    Args:
        plan: what to do.
        progress: called with the number of requests sent, of all, and the run.

    Returns:
        What was left.

    Raises:
        UsageError: there is no such application.
        CheckFailed: it did not start, ended or did not answer.
    """
    once = plan.repetitions * len(plan.requests)
    done = 0
    runs = []
    event_loop = memory_is = ""
    for guarded in (False, True):
        name = "guarded" if guarded else "bare"

        def tell(sent: int) -> None:
            progress(done + sent, 4 * once, name)  # noqa: B023

        tell(0)
        with _started(plan, guarded) as (process, answer):
            event_loop, memory_is = answer["event_loop"], answer["memory"]
            runs.append(_run(plan, process, answer["port"], tell))
        done += 2 * once
    return Report(plan, runs[0], runs[1], event_loop, memory_is)


@contextlib.contextmanager
def _started(plan: Plan, guarded: bool) -> Iterator[Tuple[_Process, Dict[str, Any]]]:
    process = _Process(plan, guarded)
    try:
        yield process, process.start()
        process.stop(patience=10.0)
    finally:
        process.stop()
        process.close()


def _run(plan: Plan, process: _Process, port: int, tell: Callable[[int], Any]) -> Run:
    clients = [_Client(plan, process, port) for _ in range(plan.concurrency)]
    with ThreadPoolExecutor(plan.concurrency) as threads:

        def send(requests: Sequence[Request]) -> _Answers:
            answers: _Answers = Counter()
            shares = [requests[i :: len(clients)] for i in range(len(clients))]
            process.tried = "send requests, and count what is left"
            for each in threads.map(_Client.send, clients, shares):
                answers += each
            return answers

        def hang_up() -> None:
            for client in clients:
                client.close()

        try:
            send(plan.requests * max(_WARM_UP, plan.concurrency))
            hang_up()
            first = process.ask("begin", collector=False)
            todo = plan.requests * plan.repetitions
            batch = max(plan.concurrency, -(-len(todo) // _SAMPLES))
            answers: _Answers = Counter()
            memory = [(first["seconds"], 0, first["bytes"])]
            for sent in range(0, len(todo), batch):
                answers += send(todo[sent : sent + batch])
                so_far = min(sent + batch, len(todo))
                sample = process.ask("sample")
                memory.append((sample["seconds"], so_far, sample["bytes"]))
                tell(so_far)
            hang_up()
            counted = process.ask("end", collector=False)
            process.ask("begin", collector=True)
            for sent in range(0, len(todo), batch):
                send(todo[sent : sent + batch])
                tell(len(todo) + min(sent + batch, len(todo)))
            hang_up()
            collected = process.ask("end", collector=True)
            chains = []
            if counted["left"] or (plan.garbage and counted["garbage"]):
                process.ask("begin", collector=False)
                send(plan.requests * max(_WARM_UP, plan.concurrency))
                hang_up()
                process.tried = "look for what holds what is left"
                chains = process.ask("explain", garbage=plan.garbage)["chains"]
        except BaseException:
            process.stop()  # so that no client waits for it any more
            raise
    if first["bytes"] is None:
        memory = []
    sorted_answers = sorted(answers.items(), key=lambda each: each[0][1])
    return Run(
        sent=len(todo),
        served=counted["served"],
        answers=[
            {status: n for (to, status), n in sorted_answers if to == request}
            for request in plan.requests
        ],
        left=counted["left"],
        held=counted["held"],
        garbage=counted["garbage"],
        tasks=counted["busy"],
        memory=memory,
        growth=_slope(memory),
        cpu=collected["cpu"] / len(todo),
        collections=collected["collections"],
        collector_seconds=collected["collector_seconds"],
        chains=chains,
        own_collections=sum(counted["collections"]),
    )


def _slope(memory: Sequence[Tuple[float, int, int]]) -> Optional[float]:
    """Bytes a request, by least squares: one sample alone says little."""
    if not memory:
        return None
    sent = [each[1] for each in memory]
    size = [each[2] for each in memory]
    mean_sent, mean_size = sum(sent) / len(sent), sum(size) / len(size)
    above = sum((x - mean_sent) * (y - mean_size) for x, y in zip(sent, size))
    return above / sum((x - mean_sent) ** 2 for x in sent)


def can_plot() -> bool:
    """Whether there is matplotlib to draw with."""
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError:
        return False
    return True


def plot(report: Report, path: str) -> None:
    """Draw the memory over time, bare and guarded.

    Args:
        report: what to draw.
        path: the SVG file.

    Raises:
        UsageError: it cannot be written, or there is nothing to draw.
    """
    if not (report.bare.memory and report.guarded.memory):
        raise UsageError("--plot: the memory of a process is not known here")
    # By name: type checkers would want it installed.
    matplotlib: Any = importlib.import_module("matplotlib")
    figure: Any = importlib.import_module("matplotlib.figure")
    plan = report.plan
    # Text stays text; the background is white also where the page is dark.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "growth"}):
        drawing = figure.Figure(figsize=(8, 4.5), facecolor="white", tight_layout=True)
        axes = drawing.add_subplot()
        for run, name, colour, style in (
            (report.bare, "bare", "#b34700", "--"),
            (report.guarded, "guarded", "#00588f", "-"),
        ):
            first = run.memory[0][2]
            seconds = [each[0] for each in run.memory]
            growth = [(each[2] - first) / 2**20 for each in run.memory]
            label = f"{name}: {run.left} of {run.served} requests left"
            axes.plot(seconds, growth, style, color=colour, linewidth=2, label=label)
        axes.set_xlabel("seconds since the first request")
        axes.set_ylabel(f"MiB above the start\n({report.memory_is})")
        axes.set_title(
            f"{plan.application}, aiohttp {aiohttp.__version__}: "
            f"{report.bare.sent} requests, {plan.concurrency} at a time,\n"
            "with the cyclic garbage collector off",
            fontsize="medium",
        )
        axes.grid(color="#dddddd")
        axes.legend()
        try:
            drawing.savefig(path, format="svg", metadata={"Date": None})
        except OSError as exc:
            raise UsageError(f"--plot {path}: {exc}") from None
