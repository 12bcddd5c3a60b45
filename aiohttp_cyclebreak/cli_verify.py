"""``verify``: which leaks does the installed aiohttp have, and are they stopped?"""

import argparse
import asyncio
import json
import platform
import sys
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any, Dict, List, Optional, Sequence, Tuple

import aiohttp

from . import __version__
from .cli_terminal import (
    NOT_HERE,
    draw,
    make_writer,
    quick_to_interrupt,
    say,
    show_progress,
    up_to,
    wrap,
)
from .leaks import CATALOGUE, Leak, Remedy
from .options import switched_off
from .probe import Count, measure, measure_floor, remedy

__all__ = ("add_verify",)

_HEADINGS = ("leak", "kind", "requests\nleft", "cyclic\ngarbage", "verdict")
_LEGEND = (
    "Requests left and objects of cyclic garbage: per request, bare -> guarded.\n"
    "delayed: waits for the cyclic garbage collector; permanent: never freed;\n"
    "live: a body that an idle connection keeps."
)


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
            return NOT_HERE
        if self.leak.remedy is Remedy.MIDDLEWARE:
            return "stopped"
        return f"stopped by {self.leak.remedy.value}"


def add_verify(commands: Any) -> None:
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
        type=up_to(1_000_000),
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
        known = wrap(", ".join(each.id for each in CATALOGUE))
        raise argparse.ArgumentTypeError(f"no leak {id!r}; choose from\n{known}")
    return found


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
        with quick_to_interrupt(lambda: None):
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
                say(f"{each.leak.id}: {each.error}")
        print(f"\n{_LEGEND}\n")
        say(_sentence(results))
    return 0 if _is_clean(results) else 1


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
                show_progress(2 * done, 2 * len(leaks), leak.id)
                bare = await measure(leak, floor, visits=visits)
                show_progress(2 * done + 1, 2 * len(leaks), leak.id)
                guarded = await measure(leak, floor, visits=visits, **remedy(leak))
            except (OSError, asyncio.TimeoutError) as exc:
                run = "bare" if bare is None else "guarded"
                error = f"{run}: {type(exc).__name__}: {exc}"
            results.append(_Result(leak, bare, guarded, error))
    finally:
        draw("")
    loop = type(asyncio.get_running_loop())
    return results, f"{loop.__module__}.{loop.__qualname__}"


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


def _print_table(results: Sequence[_Result]) -> None:
    headings = zip_longest(*(each.split("\n") for each in _HEADINGS), fillvalue="")
    rows = [*headings, *map(_row, results)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    write = make_writer()
    for *cells, verdict in rows:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths))
        write("  ".join([*padded, ""]), verdict)


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
