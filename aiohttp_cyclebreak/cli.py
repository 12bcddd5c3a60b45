"""What does it do here? The command line.

``verify`` runs the catalogue against the aiohttp that is installed, bare and guarded;
``check`` does the same with an application.
"""

import argparse
import os
import sys
from io import TextIOWrapper
from typing import Optional, Sequence

from . import __version__
from .cli_check import add_check
from .cli_terminal import INTERRUPTED
from .cli_verify import add_verify

__all__ = ("main", "make_parser")

_BROKEN_PIPE = 141


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; None: those of the process.

    Returns:
        The exit code, which is 0 if all is well, 1 if something is left or could
        not be run, 2 for wrong usage, 130 where it was interrupted, and 141 where the
        reader of its output has gone.

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
    parser = make_parser()
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
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe has seen enough; the interpreter flushes once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE


def make_parser() -> argparse.ArgumentParser:
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
    add_verify(commands)
    add_check(commands)
    return parser
