"""``check``: what does an application of one's own leave behind?"""

import argparse
import json
import os
import sys
from dataclasses import replace
from typing import Any, Callable, Dict, Iterator, Tuple

from . import check
from .check_process import parse_target
from .check_requests import UsageError, make_request, read_body, read_requests
from .cli_terminal import (
    draw,
    make_writer,
    quick_to_interrupt,
    say,
    show_progress,
    up_to,
)
from .options import switched_off

__all__ = ("add_check", "make_plan")

_TYPES = 8  # of cyclic garbage that the table has
_LEGEND = (
    "Requests left: alive once all clients had gone, the garbage collector being off;\n"
    "after a collection: those of them that a live reference holds, no cycle.\n"
    "Cyclic garbage: objects a request that only the collector frees. Memory: with\n"
    "the collector off. CPU and collections: of as many requests with it on.\n"
    "All numbers are of one run: a second one shows how much they vary."
)


def add_check(commands: Any) -> None:
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
        help="an Application or a runner of one, or a function that makes one, sync or "
        "async, with arguments or without: \"myapp:create_app('test', debug=True)\"",
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
        type=up_to(1_000_000),
        default=200,
        metavar="N",
        help="how often each is sent (default: %(default)s)",
    )
    sent.add_argument(
        "--concurrency",
        type=up_to(1000),
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
        type=up_to(86400),
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
        plan = make_plan(args)
        try:
            with quick_to_interrupt(check.end_processes):
                report = check.run(plan, progress=show_progress)
        finally:
            draw("")
        if args.json:
            print(json.dumps(report.as_dict(), indent=2))
        else:
            _print_table(report)
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


def make_plan(args: argparse.Namespace) -> check.Plan:
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


def _print_table(report: check.Report) -> None:
    plan = report.plan
    say(
        f"{plan.application}: {report.bare.sent} requests, "
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
    rows = [("", "bare", "guarded", ""), *_rows(report)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    write = make_writer()
    for name, bare, guarded, verdict in rows:
        cells = (name.ljust(widths[0]), bare.rjust(widths[1]), guarded.rjust(widths[2]))
        write("  ".join([*cells, ""]), verdict)
    print(f"\n{_LEGEND}\n")
    for name, run in (("bare", report.bare), ("guarded", report.guarded)):
        if run.tasks:
            say(f"{name}: {run.tasks} tasks of the application had not ended yet.\n")
    name, run = "guarded", report.guarded
    if report.is_clean or report.doubt:
        name, run = "bare", report.bare
    for chain in run.chains:
        print(f"{name}, {chain['text']}\n")
    if report.hint:
        say(f"{report.hint}\n")
    say(report.sentence)


def _rows(report: check.Report) -> Iterator[Tuple[str, str, str, str]]:
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
