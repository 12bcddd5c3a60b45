"""What does it do here? The command line.

``verify`` runs the catalogue against the aiohttp that is installed, bare and guarded;
``check`` does the same with an application.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import shutil
import signal
import sys
import textwrap
from dataclasses import asdict, dataclass, replace
from io import TextIOWrapper
from itertools import zip_longest
from types import FrameType
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import aiohttp

from . import __version__, check
from .check_process import parse_target
from .check_requests import UsageError, make_request, read_body, read_requests
from .leaks import CATALOGUE, Leak, Remedy
from .options import switched_off
from .probe import Count, measure, measure_floor, remedy

__all__ = ("main",)

_INTERRUPTED = 130  # as a shell says it: 128, and the number of the signal
_BROKEN_PIPE = 141
_NOT_HERE = "not in this version"
_HEADINGS = ("leak", "kind", "requests\nleft", "cyclic\ngarbage", "verdict")
_LEGEND = (
    "Requests left and objects of cyclic garbage: per request, bare -> guarded.\n"
    "delayed: waits for the cyclic garbage collector; permanent: never freed;\n"
    "live: a body that an idle connection keeps."
)
_STYLES = {
    _NOT_HERE: "dim",
    "LEFT": "bold red",
    "ERROR": "bold red",
    "?": "bold red",
}


@dataclass(frozen=True)
class _Result:
    """What one leak left behind; a count is None where *error* came first."""

    leak: Leak
    bare: Optional[Count] = None
    guarded: Optional[Count] = None
    error: Optional[str] = None

    @property
    def occurs(self) -> bool:
        return self.bare is not None and self.bare.shows(self.leak.kind)

    @property
    def verdict(self) -> str:
        if self.bare is None or self.guarded is None:
            return "ERROR"
        if not self.guarded.is_clean:
            return "LEFT"
        if not self.occurs:
            return _NOT_HERE
        if self.leak.remedy is Remedy.MIDDLEWARE:
            return "stopped"
        return f"stopped by {self.leak.remedy.value}"


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; None: those of the process.

    Returns:
        The exit code, which is 0 if all is well, 1 if something is left or could
        not be run, 2 for wrong usage, and 130 where it was interrupted.

    Raises:
        SystemExit: wrong usage, ``--help`` or ``--version``.

    .. versionadded:: 0.1.0
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # who started the process has closed it
            nowhere = os.open(os.devnull, os.O_WRONLY)
            setattr(sys, name, os.fdopen(nowhere, "w", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # names may have any character
            stream.reconfigure(errors="backslashreplace")
    parser = _make_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe has seen enough; the interpreter flushes once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m aiohttp_cyclebreak",
        description="Lets aiohttp.web requests go without the garbage collector.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action="version", version=f"aiohttp-cyclebreak {__version__}"
    )
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", title="commands"
    )
    _add_verify(commands)
    _add_check(commands)
    return parser


def _add_verify(commands: Any) -> None:
    parser = commands.add_parser(
        "verify",
        help="see which leaks the installed aiohttp has, and that they are stopped",
        description="Run the catalogue of leaks against the installed aiohttp, bare "
        "and guarded by what stops each of them (cyclebreak(), client_cyclebreak() or "
        "guard_server()), on a server on loopback.",
        epilog="Exit code: 0, guarded nothing is left; 1, something is left, or a "
        "leak could not be run; 2, wrong usage.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--leak",
        action="append",
        type=_leaks,
        metavar="ID",
        help="only this leak and its variants: payload is also payload/json; "
        "may be repeated",
    )
    parser.add_argument(
        "--requests",
        type=_positive,
        default=20,
        metavar="N",
        help="how many times each leak is set off, which takes one request or more "
        "(default: %(default)s)",
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON, not a table")
    output.add_argument(
        "--list", action="store_true", help="describe the leaks, and run nothing"
    )
    parser.set_defaults(run=_verify)


def _leaks(id: str) -> List[Leak]:
    found = [each for each in CATALOGUE if f"{each.id}/".startswith(f"{id}/")]
    if not found:
        known = _wrap(", ".join(each.id for each in CATALOGUE))
        raise argparse.ArgumentTypeError(f"no leak {id!r}; choose from\n{known}")
    return found


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def _up_to(most: int) -> Callable[[str], int]:
    def positive(text: str) -> int:
        number = _positive(text)
        if number > most:
            raise argparse.ArgumentTypeError(f"{text} is more than {most}, the most")
        return number

    return positive


def _verify(args: argparse.Namespace) -> int:
    leaks = CATALOGUE
    if args.leak is not None:
        chosen = {each.id for found in args.leak for each in found}
        leaks = tuple(each for each in CATALOGUE if each.id in chosen)
    if args.list:
        print("\n\n".join(map(_describe, leaks)))
        return 0
    if switched_off():
        print(
            "AIOHTTP_CYCLEBREAK=off switches the guard off, so there is nothing to "
            "verify: unset it",
            file=sys.stderr,
        )
        return 2
    try:
        with _quick_to_interrupt(lambda: None):
            results, loop = asyncio.run(_measure_all(leaks, args.requests))
    except OSError as exc:
        print(f"no server can be run on loopback: {exc}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(_report(results, args.requests, loop), indent=2))
    else:
        _print_table(results)
        for each in results:
            if each.error is not None:
                _say(f"{each.leak.id}: {each.error}")
        print(f"\n{_LEGEND}\n")
        _say(_sentence(results))
    return 0 if _is_clean(results) else 1


@contextlib.contextmanager
def _quick_to_interrupt(end: Callable[[], None]) -> Iterator[None]:
    """End the process at once on Ctrl-C: there is nothing to save.

    A server that is shut down in the middle of a leak and the thread of its client
    would wait for each other, for up to a minute; and threads for a lock that an
    exception has left taken, if the signal came at that moment.

    Args:
        end: called before that, in the signal's handler: it must take no lock.
    """

    def leave(signum: int, frame: Optional[FrameType]) -> None:
        end()
        os.write(2, b"\ninterrupted\n")  # sys.stderr may be in the middle of a write
        os._exit(_INTERRUPTED)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # a background job ignores it
        yield
        return
    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _describe(leak: Leak) -> str:
    lines = [
        f"{leak.id} ({leak.kind.value})",
        f"    {leak.title}",
        f"    aiohttp: {'; '.join(map(str, leak.affected))}",
    ]
    if leak.upstream:
        lines.append(f"    {leak.upstream}")
    return "\n".join(lines)


async def _measure_all(leaks: Sequence[Leak], visits: int) -> Tuple[List[_Result], str]:
    """Run each leak bare and guarded; return as well what the event loop is."""
    results = []
    floor = await measure_floor()
    try:
        for done, leak in enumerate(leaks):
            bare = guarded = error = None
            try:
                _show_progress(2 * done, 2 * len(leaks), leak.id)
                bare = await measure(leak, floor, visits=visits)
                _show_progress(2 * done + 1, 2 * len(leaks), leak.id)
                guarded = await measure(leak, floor, visits=visits, **remedy(leak))
            except (OSError, asyncio.TimeoutError) as exc:
                run = "bare" if bare is None else "guarded"
                error = f"{run}: {type(exc).__name__}: {exc}"
            results.append(_Result(leak, bare, guarded, error))
    finally:
        _draw("")
    loop = type(asyncio.get_running_loop())
    return results, f"{loop.__module__}.{loop.__qualname__}"


# Drawn by hand, between measurements: rich's bar has a thread, and makes garbage.
def _show_progress(done: int, total: int, id: str) -> None:
    bar = ("#" * (20 * done // total)).ljust(20, ".")
    _draw(f"[{bar}] {100 * done // total:3}% {id}")


def _draw(line: str) -> None:
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        sys.stderr.write(f"\r{line[:width]:{width}}\r")
        sys.stderr.flush()


def _is_clean(results: Sequence[_Result]) -> bool:
    return not any(each.verdict in ("LEFT", "ERROR") for each in results)


def _ids(results: Sequence[_Result], verdict: str) -> List[str]:
    return [each.leak.id for each in results if each.verdict == verdict]


def _report(results: Sequence[_Result], visits: int, loop: str) -> Dict[str, Any]:
    return {
        "aiohttp_cyclebreak": __version__,
        "aiohttp": aiohttp.__version__,
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "platform": platform.platform(),
        "event_loop": loop,
        "visits": visits,
        "leaks": [
            {
                "id": each.leak.id,
                "title": each.leak.title,
                "kind": each.leak.kind.value,
                "requests": None if each.bare is None else each.bare.requests,
                "bare": None if each.bare is None else asdict(each.bare),
                "guarded": None if each.guarded is None else asdict(each.guarded),
                "occurs": None if each.bare is None else each.occurs,
                "verdict": each.verdict,
                "error": each.error,
            }
            for each in results
        ],
        "summary": {
            "leaks": len(results),
            "occur": sum(each.occurs for each in results),
            "left": _ids(results, "LEFT"),
            "errors": _ids(results, "ERROR"),
            "clean": _is_clean(results),
            "text": _sentence(results),
        },
    }


def _sentence(results: Sequence[_Result]) -> str:
    occur = sum(each.occurs for each in results)
    left, errors = _ids(results, "LEFT"), _ids(results, "ERROR")
    text = (
        f"aiohttp {aiohttp.__version__} on {platform.python_implementation()} "
        f"{platform.python_version()}: {occur} of {len(results)} leaks "
        f"{'occurs' if occur == 1 else 'occur'} here; guarded, "
    )
    if left:
        are = "is" if len(left) == 1 else "are"
        text += f"{len(left)} {are} left: {', '.join(left)}"
    else:
        text += "none is left"
    if errors:
        text += f"; {len(errors)} could not be run: {', '.join(errors)}"
    return text + "."


def _say(text: str) -> None:
    """Print a sentence, whole for a pipe and in lines for a terminal."""
    if sys.stdout.isatty():
        text = _wrap(text, shutil.get_terminal_size().columns)
    print(text)


def _wrap(text: str, width: int = 79) -> str:
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def _print_table(results: Sequence[_Result]) -> None:
    headings = zip_longest(*(each.split("\n") for each in _HEADINGS), fillvalue="")
    rows = [*headings, *map(_row, results)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    write = _make_writer()
    for *cells, verdict in rows:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths))
        write("  ".join([*padded, ""]), verdict)


def _make_writer() -> Callable[[str, str], None]:
    """Find out how a line is printed: with colours where there is rich to make them."""

    def write(cells: str, verdict: str) -> None:
        print(f"{cells}{verdict}".rstrip())

    if not sys.stdout.isatty():
        return write
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        return write
    console = Console()

    def write_in_colour(cells: str, verdict: str) -> None:
        line = Text.assemble(cells, (verdict, _STYLES.get(verdict, "green")))
        console.print(line, soft_wrap=True)  # no cell is ever cut

    return write_in_colour


def _row(result: _Result) -> Tuple[str, ...]:
    bare, guarded = result.bare, result.guarded
    own = bare.left_as(result.leak.kind) if bare else 0
    left = guarded.left if guarded else 0
    garbage = [each.garbage if each else 0 for each in (bare, guarded)]
    return (
        result.leak.id,
        result.leak.kind.value,
        f"{_mean(own, bare, 1):>3} -> {_mean(left, guarded, 1)}",
        f"{_mean(garbage[0], bare, 0):>3} -> {_mean(garbage[1], guarded, 0)}",
        result.verdict,
    )


def _mean(number: int, count: Optional[Count], digits: int) -> str:
    """A number per request, rounded; but to nothing only where it is nothing."""
    if count is None:
        return "?"
    if number == 0:
        return "0"
    smallest = 0.1**digits
    # A connection may be refused before there is a request.
    mean = number / (count.requests or count.connections)
    return f"{mean:.{digits}f}" if mean >= smallest else f"<{smallest:.{digits}f}"


def _add_check(commands: Any) -> None:
    parser = commands.add_parser(
        "check",
        help="see what your own application leaves behind, bare and guarded",
        description="Serve an application on loopback, in a process of its own, send "
        "it requests, and count what is left once they are answered: bare, and "
        "guarded by setup(app) and guard_server(runner).",
        epilog="Exit code: 0, guarded nothing is left; 1, something is left, or that "
        "cannot be told, or the application could not be run; 2, wrong usage.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "application",
        type=_target,
        metavar="MODULE:ATTRIBUTE",
        help="an Application, or a function that makes one, sync or async, with "
        "arguments or without: \"myapp:create_app('test', debug=True)\"",
    )
    parser.add_argument(
        "--arg",
        action="append",
        default=[],
        metavar="WORD",
        help="for a function that takes a list of words, as those of python -m "
        "aiohttp.web do; may be repeated; --arg=-v for a word that begins with a dash",
    )
    parser.add_argument(
        "--chdir",
        default=".",
        metavar="DIR",
        help="import the application in this folder (default: the current one)",
    )
    sent = parser.add_argument_group("what is sent")
    sent.add_argument(
        "--request",
        action="append",
        metavar='"METHOD PATH"',
        help="may be repeated (default: GET /)",
    )
    sent.add_argument("--data", metavar="TEXT|@FILE", help="the body of each --request")
    sent.add_argument(
        "--header",
        action="append",
        default=[],
        metavar='"NAME: VALUE"',
        help="a header of all requests; may be repeated",
    )
    sent.add_argument(
        "--abort-after",
        type=_not_negative,
        metavar="BYTES",
        help="each --request vanishes after so many bytes of its body",
    )
    sent.add_argument(
        "--from-file",
        metavar="FILE",
        help="an .http file of requests, as editors send them",
    )
    sent.add_argument(
        "--requests",
        type=_up_to(1_000_000),
        default=200,
        metavar="N",
        help="how often each is sent (default: %(default)s)",
    )
    sent.add_argument(
        "--concurrency",
        type=_up_to(1000),
        default=1,
        metavar="N",
        help="how many clients send at once (default: %(default)s)",
    )
    sent.add_argument(
        "--keep-alive",
        action="store_true",
        help="a client sends all through one connection, not each through its own",
    )
    sent.add_argument(
        "--timeout",
        type=_up_to(86400),
        default=60,
        metavar="SECONDS",
        help="for the start, and for each answer (default: %(default)s)",
    )
    judged = parser.add_argument_group("what is judged")
    judged.add_argument(
        "--own-guard",
        action="store_true",
        help="add no guard: the application installs its own, which is switched off "
        "in the bare run",
    )
    judged.add_argument(
        "--garbage",
        action="store_true",
        help="exit 1 for any cyclic garbage, not for requests alone",
    )
    output = parser.add_argument_group("what is shown")
    output.add_argument("--json", action="store_true", help="print JSON, not a table")
    output.add_argument(
        "--plot", metavar="FILE.svg", help="draw the memory over time; needs matplotlib"
    )
    parser.set_defaults(run=_check)


def _target(text: str) -> str:
    try:
        parse_target(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None
    return text


def _not_negative(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 up")
    return int(text)


def _check(args: argparse.Namespace) -> int:
    try:
        plan = _plan(args)
        try:
            with _quick_to_interrupt(check.end_processes):
                report = check.run(plan, progress=_show_progress)
        finally:
            _draw("")
        if args.json:
            print(json.dumps(report.as_dict(), indent=2))
        else:
            _print_check(report)
        if args.plot is not None:
            check.plot(report, args.plot)
    except UsageError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except check.CheckFailed as exc:
        for text in (
            exc.output and f"The application's output:\n{exc.output}",
            exc.traceback.rstrip(),
        ):
            if text:
                print(f"{text}\n", file=sys.stderr)
        print(f"error: {exc}\ntried: {exc.tried}", file=sys.stderr)
        return 1
    return 0 if report.is_clean else 1


def _plan(args: argparse.Namespace) -> check.Plan:
    if switched_off():
        raise UsageError(
            "AIOHTTP_CYCLEBREAK=off switches the guard off, so there is nothing to "
            "compare: unset it"
        )
    if not os.path.isdir(args.chdir):
        raise UsageError(f"--chdir {args.chdir}: there is no such folder")
    if args.plot is not None:
        if not args.plot.endswith(".svg"):
            raise UsageError(f"--plot {args.plot}: name it with .svg at the end")
        folder = os.path.dirname(args.plot) or "."
        if not os.path.isdir(folder):
            raise UsageError(f"--plot {args.plot}: there is no such folder")
        if os.path.isdir(args.plot):
            raise UsageError(f"--plot {args.plot}: that is a folder")
        written = args.plot if os.path.exists(args.plot) else folder
        if not os.access(written, os.W_OK):
            raise UsageError(f"--plot {args.plot}: {written} cannot be written")
        if not check.can_plot():
            raise UsageError(
                "--plot needs matplotlib: install it, or this package with the extra "
                "'plot'"
            )
    lines = args.request or []
    for option in ("data", "abort_after"):
        if getattr(args, option) is not None and not lines:
            name = option.replace("_", "-")
            raise UsageError(f"--{name} is for --request, and there is none")
    if not lines and args.from_file is None:
        lines = ["GET /"]
    body = b"" if args.data is None else read_body(args.data)
    requests = [
        make_request(line, args.header, body, args.abort_after) for line in lines
    ]
    if args.from_file is not None:
        headers = make_request("GET /", args.header).headers
        requests += [
            replace(each, headers=each.headers + headers)
            for each in read_requests(args.from_file)
        ]
    return check.Plan(
        target=args.application,
        requests=tuple(requests),
        words=tuple(args.arg),
        chdir=args.chdir,
        repetitions=args.requests,
        concurrency=args.concurrency,
        keep_alive=args.keep_alive,
        timeout=float(args.timeout),
        own_guard=args.own_guard,
        garbage=args.garbage,
    )


_TYPES = 8  # of cyclic garbage that the table has


def _print_check(report: check.Report) -> None:
    plan = report.plan
    _say(
        f"{plan.target.partition('(')[0]}: {report.bare.sent} requests, "
        f"{plan.concurrency} at a time, "
        f"{'kept alive' if plan.keep_alive else 'a connection each'}; "
        f"guarded: {plan.guard}."
    )
    for number, request in enumerate(plan.requests):
        bare, guarded = (
            _answers(run.answers[number]) for run in (report.bare, report.guarded)
        )
        told = bare if bare == guarded else f"{bare} bare, {guarded} guarded"
        print(f"  {request}: {told}")
    print()
    rows = [("", "bare", "guarded", ""), *_check_rows(report)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    write = _make_writer()
    for name, bare, guarded, verdict in rows:
        cells = (name.ljust(widths[0]), bare.rjust(widths[1]), guarded.rjust(widths[2]))
        write("  ".join([*cells, ""]), verdict)
    print(f"\n{_CHECK_LEGEND}\n")
    for name, run in (("bare", report.bare), ("guarded", report.guarded)):
        if run.tasks:
            _say(f"{name}: {run.tasks} tasks of the application had not ended yet.\n")
    name, run = "guarded", report.guarded
    if report.is_clean or report.doubt:
        name, run = "bare", report.bare
    for chain in run.chains:
        print(f"{name}, {chain['text']}\n")
    if report.hint:
        _say(f"{report.hint}\n")
    _say(report.sentence)


_CHECK_LEGEND = (
    "Requests left: alive once all clients had gone, the garbage collector being off;\n"
    "after a collection: those of them that a live reference holds, no cycle.\n"
    "Cyclic garbage: objects a request that only the collector frees. Memory: with\n"
    "the collector off. CPU and collections: of as many requests with it on.\n"
    "All numbers are of one run: see by a second one how much they vary."
)


def _check_rows(report: check.Report) -> Iterator[Tuple[str, str, str, str]]:
    runs = report.bare, report.guarded

    def row(
        name: str, cell: Callable[[check.Run], str], verdict: str = ""
    ) -> Tuple[str, str, str, str]:
        return (name, cell(runs[0]), cell(runs[1]), verdict)

    verdict = "LEFT"
    if not report.guarded.left:
        verdict = "stopped" if report.bare.left else "clean"
    if report.doubt:
        verdict = "?"
    yield row("requests left", lambda run: str(run.left), verdict)
    yield row("  after a collection", lambda run: str(run.held))
    yield row("cyclic garbage", lambda run: _per(sum(run.garbage.values()), run))
    types: Dict[str, int] = {}
    for run in runs:
        for name, count in run.garbage.items():
            types[name] = types.get(name, 0) + count
    for name in sorted(types, key=lambda name: -types[name])[:_TYPES]:
        yield row(f"  {name}", lambda run: _per(run.garbage.get(name, 0), run))  # noqa: B023
    if len(types) > _TYPES:
        yield f"  and {len(types) - _TYPES} other types", "", "", ""
    yield row(
        "memory, KiB a request",
        lambda run: "?" if run.growth is None else f"{run.growth / 1024:+.1f}",
    )
    yield row("CPU, ms a request", lambda run: f"{1000 * run.cpu:.2f}")
    yield row("full collections", lambda run: str(run.full_collections))
    yield row("collections", lambda run: str(sum(run.collections)))
    yield row("  ms in all", lambda run: f"{1000 * run.collector_seconds:.1f}")


def _answers(answers: Dict[str, int]) -> str:
    if len(answers) == 1:
        return next(iter(answers))
    return ", ".join(f"{count} x {status}" for status, count in answers.items())


def _per(number: int, run: check.Run) -> str:
    """A number a request, rounded; but to nothing only where it is nothing."""
    if not number:
        return "0"
    mean = number / run.sent
    return f"{mean:.1f}" if mean >= 0.1 else "<0.1"
