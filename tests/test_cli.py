"""The command line: what it prints where, and its exit codes."""

import json
import os
import platform
import re
import signal
import subprocess
import sys
from typing import Any, List, Optional, Tuple

import aiohttp
import pytest
from aiohttp import web

from aiohttp_cyclebreak import __version__, cli, cli_verify
from aiohttp_cyclebreak.cli_verify import _Result, _row, _sentence
from aiohttp_cyclebreak.leaks import CATALOGUE
from aiohttp_cyclebreak.probe import Count, measure

pytestmark = pytest.mark.processes

MODULE = ("-m", "aiohttp_cyclebreak")
WITHOUT_RICH = (
    "-c",
    "import runpy, sys; sys.modules['rich'] = None; "
    "runpy.run_module('aiohttp_cyclebreak', run_name='__main__')",
)
# Says so when Python shuts down, which it does unless the process is ended at once.
TELLS_ITS_END = (
    "-c",
    "import atexit, runpy; atexit.register(print, 'shut down'); "
    "runpy.run_module('aiohttp_cyclebreak', run_name='__main__')",
)
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals")


def environment(**more: str) -> "dict[str, str]":
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("AIOHTTP_CYCLEBREAK", "NO_COLOR", "FORCE_COLOR")
    }
    return {**env, **more}


def run(*args: str, **env: str) -> "Tuple[int, str, str]":
    """Run the command line; return its exit code, and what it wrote into pipes."""
    done = subprocess.run(
        [sys.executable, *MODULE, *args],
        env=environment(**env),
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


class Terminal:
    """The command line in a terminal."""

    def __init__(self, start: Tuple[str, ...], *args: str, columns: int = 80) -> None:
        import pty

        self._screen, terminal = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, *start, *args],
            env=environment(COLUMNS=str(columns), TERM="xterm-256color"),
            stdout=terminal,
            stderr=terminal,
            # What is run in the background by a shell ignores it, and so do its
            # children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(terminal)
        self.text = ""

    def read(self, until: str = "") -> None:
        """Read what is on the screen, up to a text or to the end."""
        while not until or until not in self.text:
            try:
                data = os.read(self._screen, 65536)
            except OSError:  # Linux's way to say that there is no more
                data = b""
            if not data:
                assert not until, self.text
                break
            self.text += data.decode()

    def end(self) -> int:
        self.read()
        os.close(self._screen)
        return self.process.wait()


@web.middleware
async def no_guard(request: web.Request, handler: Any) -> web.StreamResponse:
    response: web.StreamResponse = await handler(request)
    return response


def test_prints_a_table_and_a_sentence() -> None:
    """A row for each leak, the sentence last, no progress bar in a pipe, exit 0."""
    ids = ("http-exception/view", "no-route/method")
    code, out, err = run("verify", "--leak", ids[0], "--leak", ids[1])
    assert (code, err) == (0, "")
    lines = out.splitlines()
    for id in ids:
        (row,) = (line.split() for line in lines if line.startswith(id))
        assert row[:5] == [id, "delayed", "1.0", "->", "0"]
        assert row[6:] == ["->", "0", "stopped"]
    assert "permanent: never freed" in out
    assert re.fullmatch(
        rf"aiohttp {re.escape(aiohttp.__version__)} on \w+ [\w.+]+: "
        r"2 of 2 leaks occur here; guarded, none is left\.",
        lines[-1],
    )


def test_prints_json() -> None:
    """There is nothing on stdout but one document."""
    code, out, err = run("verify", "--json", "--requests", "2", "--leak", "no-route")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["aiohttp_cyclebreak"] == __version__
    assert report["aiohttp"] == aiohttp.__version__
    assert report["python"] == platform.python_version()
    assert {"implementation", "platform", "event_loop"} <= set(report)
    assert report["visits"] == 2
    assert [each["id"] for each in report["leaks"]] == ["no-route", "no-route/method"]
    for leak in report["leaks"]:
        assert leak["kind"] == "delayed"
        assert leak["title"]
        assert leak["requests"] == 2
        bare, guarded = leak["bare"], leak["guarded"]
        assert bare.pop("garbage") > 0
        sent = {"connections": 2, "requests": 2}
        assert bare == {**sent, "left": 2, "permanent": 0}
        assert guarded == {**sent, "left": 0, "permanent": 0, "garbage": 0}
        assert leak["occurs"] is True
        assert leak["verdict"] == "stopped"
        assert leak["error"] is None
    text = report["summary"].pop("text")
    assert text.endswith("2 of 2 leaks occur here; guarded, none is left.")
    assert report["summary"] == {
        "leaks": 2,
        "occur": 2,
        "left": [],
        "errors": [],
        "clean": True,
    }


def test_tells_leaks_apart_by_kind() -> None:
    """Of two leaks with one scenario, the one of the wrong kind does not occur."""
    code, out, _ = run("verify", "--json", "--requests", "2", "--leak", "late-read")
    assert code == 0
    verdicts = [each["verdict"] for each in json.loads(out)["leaks"]]
    assert sorted(verdicts) == ["not in this version", "stopped"]


def test_lists_the_catalogue() -> None:
    """Each leak with its kind, its title, its versions and its link; none is run."""
    code, out, err = run("verify", "--list")
    assert (code, err) == (0, "")
    entries = out.rstrip("\n").split("\n\n")
    assert len(entries) == len(CATALOGUE)
    for leak, entry in zip(CATALOGUE, entries):
        head, *lines = entry.split("\n")
        assert head == f"{leak.id} ({leak.kind.value})"
        assert lines[0].strip() == leak.title
        assert lines[1].strip().startswith("aiohttp: ")
        assert all(str(each) in lines[1] for each in leak.affected)
        assert leak.upstream in entry


@pytest.mark.parametrize(
    ("chosen", "ids"),
    [
        (["payload/json"], ["payload/json"]),
        (["no-route", "stash", "no-route/method"], ["no-route*", "stash*"]),
        (["late-read"], ["late-read*"]),
    ],
)
def test_an_id_is_its_variants_too(chosen: List[str], ids: List[str]) -> None:
    """Each leak once, in the order of the catalogue."""
    expected = [
        leak.id
        for leak in CATALOGUE
        if leak.id in ids or f"{leak.id.partition('/')[0]}*" in ids
    ]
    options = [word for id in chosen for word in ("--leak", id)]
    code, out, _ = run("verify", "--list", *options)
    assert code == 0
    assert re.findall(r"^(\S+) \(", out, re.MULTILINE) == expected


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["verify", "--leak", "no"], [leak.id for leak in CATALOGUE]),
        (["verify", "--leak", "payload/"], ["payload/json"]),
        (["verify", "--leak", ""], ["payload/json"]),
        (["verify", "--requests", "0"], ["'0'", "whole number from 1 up"]),
        (["verify", "--requests", "-1"], ["'-1'", "whole number from 1 up"]),
        (["verify", "--requests", "few"], ["'few'", "whole number from 1 up"]),
        (["verify", "--requests", "1000001"], ["more than 1000000"]),
        (["verify", "--list", "--json"], ["not allowed with"]),
        (["verify", "--lea", "payload"], ["--lea"]),
        (["certify"], ["verify"]),
        ([], ["usage:", "verify"]),
    ],
)
def test_wrong_usage(args: List[str], told: List[str]) -> None:
    """Exit 2, and the message says what would be right."""
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert all(each in err for each in told)
    assert "Traceback" not in err


def test_help_and_version() -> None:
    code, out, _ = run("--help")
    assert (code, "verify" in out) == (0, True)
    code, out, _ = run("verify", "--help")
    assert (code, "--leak ID" in out) == (0, True)
    assert run("--version") == (0, f"aiohttp-cyclebreak {__version__}\n", "")


def test_the_guard_is_switched_off() -> None:
    """There is nothing to verify, which is said; the catalogue is shown."""
    code, out, err = run("verify", "--requests", "1", AIOHTTP_CYCLEBREAK="off")
    assert (code, out) == (2, "")
    assert "AIOHTTP_CYCLEBREAK=off" in err
    assert "unset" in err
    assert run("verify", "--list", AIOHTTP_CYCLEBREAK="off")[0] == 0


def test_something_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A guard that does not work is exit 1, and the leaks are named."""
    monkeypatch.delenv("AIOHTTP_CYCLEBREAK", raising=False)
    no_remedy = {"guard": lambda app: app.middlewares.append(no_guard)}
    monkeypatch.setattr(cli_verify, "remedy", lambda leak: no_remedy)
    args = ["verify", "--requests", "2", "--leak", "singleton"]
    assert cli.main(args) == 1
    out, _ = capsys.readouterr()
    assert [line.split()[-1] for line in out.splitlines()[2:4]] == ["LEFT", "LEFT"]
    assert out.endswith("guarded, 2 are left: singleton, singleton/cause.\n")

    assert cli.main([*args, "--json"]) == 1
    summary = json.loads(capsys.readouterr()[0])["summary"]
    assert summary["left"] == ["singleton", "singleton/cause"]
    assert summary["clean"] is False


@pytest.mark.parametrize("error", [TimeoutError("busy"), ConnectionError("closed")])
def test_a_leak_cannot_be_run(
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is a row of its own, the others are run, and it is exit 1."""

    async def fail(leak: Any, *args: Any, **options: Any) -> Any:
        if leak.id == "no-route":
            raise error
        return await measure(leak, *args, **options)

    monkeypatch.delenv("AIOHTTP_CYCLEBREAK", raising=False)
    monkeypatch.setattr(cli_verify, "measure", fail)
    args = ["verify", "--requests", "2", "--leak", "no-route"]
    assert cli.main(args) == 1
    out, _ = capsys.readouterr()
    rows = [line.split() for line in out.splitlines()]
    assert rows[2] == ["no-route", "delayed", "?", "->", "?", "?", "->", "?", "ERROR"]
    assert rows[3][0] == "no-route/method"
    assert rows[3][-1] == "stopped"
    assert f"no-route: bare: {type(error).__name__}: {error}" in out
    assert out.endswith("none is left; 1 could not be run: no-route.\n")

    assert cli.main([*args, "--json"]) == 1
    report = json.loads(capsys.readouterr()[0])
    assert report["summary"]["errors"] == ["no-route"]
    assert report["summary"]["clean"] is False
    assert report["leaks"][0]["verdict"] == "ERROR"
    assert report["leaks"][0]["bare"] is None


LEAKS = {each.id: each for each in CATALOGUE}
KEPT, CLEAN = Count(4, 4, 4, 0, 100), Count(4, 4, 0, 0, 0)
LITTLE = Count(40, 40, 1, 0, 1)
NO_REQUEST = Count(4, 0, 0, 0, 1)
HELD = Count(4, 4, 4, 4, 100)
SERVER, CLIENT = "stopped by guard_server", "stopped by client_cyclebreak"


@pytest.mark.parametrize(
    ("leak", "bare", "guarded", "cells"),
    [
        ("no-route", KEPT, CLEAN, ["1.0 -> 0", " 25 -> 0", "stopped"]),
        ("gateway/refused/swallow", KEPT, CLEAN, ["1.0 -> 0", " 25 -> 0", CLIENT]),
        ("no-route", CLEAN, CLEAN, ["  0 -> 0", "  0 -> 0", "not in this version"]),
        # What is held is another leak's, and so is the garbage beside it.
        ("no-route", HELD, CLEAN, ["  0 -> 0", " 25 -> 0", "not in this version"]),
        ("unseen/probe-reset", NO_REQUEST, CLEAN, ["  0 -> 0", " <1 -> 0", SERVER]),
        ("no-route", KEPT, NO_REQUEST, ["1.0 -> 0", " 25 -> <1", "LEFT"]),
        ("no-route", KEPT, LITTLE, ["1.0 -> <0.1", " 25 -> <1", "LEFT"]),
        ("no-route", KEPT, None, ["1.0 -> ?", " 25 -> ?", "ERROR"]),
        ("no-route", None, None, ["  ? -> ?", "  ? -> ?", "ERROR"]),
    ],
)
def test_rows(
    leak: str, bare: Optional[Count], guarded: Optional[Count], cells: List[str]
) -> None:
    """Numbers are per request; only nothing is rounded to nothing."""
    found = LEAKS[leak]
    row = _row(_Result(found, bare, guarded))
    assert list(row) == [leak, found.kind.value, *cells]


def test_one_and_many() -> None:
    """The sentence is one in either case."""
    left = _Result(LEAKS["no-route"], KEPT, KEPT)
    gone = _Result(LEAKS["no-route"], CLEAN, CLEAN)
    assert _sentence([left]).endswith(
        "1 of 1 leaks occurs here; guarded, 1 is left: no-route."
    )
    assert _sentence([left, left]).endswith(
        "2 of 2 leaks occur here; guarded, 2 are left: no-route, no-route."
    )
    assert _sentence([gone]).endswith("0 of 1 leaks occur here; guarded, none is left.")


def test_no_server_can_be_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is no loopback, for one: it says so, and is exit 1."""

    async def fail() -> Any:
        raise PermissionError("not allowed")

    monkeypatch.delenv("AIOHTTP_CYCLEBREAK", raising=False)
    monkeypatch.setattr(cli_verify, "measure_floor", fail)
    assert cli.main(["verify"]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", "no server can be run on loopback: not allowed\n")


@POSIX
@pytest.mark.parametrize("columns", [30, 80])
@pytest.mark.parametrize("start", [MODULE, WITHOUT_RICH], ids=["rich", "plain"])
def test_in_a_terminal(start: Tuple[str, ...], columns: int) -> None:
    """There is a progress bar, and colours if there is rich; no id is ever cut."""
    if start is MODULE:
        pytest.importorskip("rich")
    terminal = Terminal(
        start, "verify", "--requests", "2", "--leak", "http-exception", columns=columns
    )
    assert terminal.end() == 0
    bar, _, table = terminal.text.partition("leak ")
    assert "[....................]   0%" in bar
    assert ("\x1b[32mstopped" in table) is (start is MODULE)
    shown = {line.split(" ")[0] for line in table.splitlines()}
    assert shown >= {
        leak.id for leak in CATALOGUE if leak.id.startswith("http-exception")
    }
    if columns == 80:
        plain = re.sub("\x1b\\[[0-9;]*m", "", table)
        assert max(map(len, plain.splitlines())) <= 80


@POSIX
def test_in_a_terminal_of_one_column() -> None:
    """No bar fits into it."""
    arguments = ("verify", "--requests", "2", "--leak", "none-response")
    terminal = Terminal(MODULE, *arguments, columns=1)
    assert terminal.end() == 0, terminal.text
    assert "none-response" in terminal.text


@POSIX
@pytest.mark.parametrize("start", [MODULE, WITHOUT_RICH], ids=["rich", "plain"])
def test_is_interrupted(start: Tuple[str, ...]) -> None:
    """Ctrl-C is exit 130, with no traceback."""
    terminal = Terminal(start, "verify", "--requests", "1000000")
    terminal.read("0% ")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 130
    assert "interrupted" in terminal.text
    assert "Traceback" not in terminal.text


@POSIX
def test_the_reader_of_a_pipe_leaves() -> None:
    """No traceback, as when ``head`` has seen enough."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, *MODULE, "verify", "--list"],
        env=environment(),
        stdout=writer,
        stderr=subprocess.PIPE,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@POSIX
@pytest.mark.parametrize(
    ("args", "closed", "code"),
    [
        ("verify --leak none-response --requests 2", ">&-", 0),
        ("verify --leak none-response --requests 2", "2>&-", 0),
        ("check no_such_module:app", "2>&-", 2),
    ],
)
def test_a_stream_is_closed(args: str, closed: str, code: int) -> None:
    """The exit code is what it would be: who starts it may look at nothing else."""
    done = subprocess.run(
        [
            "sh",
            "-c",
            f'exec "$0" "$@" {closed}',
            sys.executable,
            *MODULE,
            *args.split(),
        ],
        env=environment(),
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (code, b"")


def test_names_are_shown_before_they_are_imported() -> None:
    """To help(), and to whoever presses tab in a shell."""
    program = "import aiohttp_cyclebreak as a; print(set(a.__all__) <= set(dir(a)))"
    shown = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert shown.stdout.split() == [b"True"]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_verify_fits_into_a_small_pod() -> None:
    """Large responses that stay bare are one body, not one each."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from aiohttp_cyclebreak.cli import main\n"
            "code = main(['verify', '--leak', 'client-gone'])\n"
            "print(code, open('/proc/self/status').read())",
        ],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    peak = re.search(r"^0 (?:.*\n)+VmHWM:\s+(\d+) kB$", done.stdout, re.MULTILINE)
    assert peak is not None
    assert int(peak[1]) < 250_000
