"""How do the commands talk to who calls them? Numbers, sentences, progress, Ctrl-C."""

import argparse
import contextlib
import os
import shutil
import signal
import sys
import textwrap
from types import FrameType
from typing import Callable, Iterator, Optional

__all__ = (
    "INTERRUPTED",
    "NOT_HERE",
    "draw",
    "make_writer",
    "quick_to_interrupt",
    "say",
    "show_progress",
    "up_to",
    "wrap",
)

INTERRUPTED = 130  # as a shell says it: 128, and the number of the signal
NOT_HERE = "not in this version"
_STYLES = {
    NOT_HERE: "dim",
    "LEFT": "bold red",
    "ERROR": "bold red",
    "?": "bold red",
}


def up_to(most: int) -> Callable[[str], int]:
    def limited(text: str) -> int:
        number = int(text) if text.isdecimal() else 0
        if number == 0:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number from 1 up"
            )
        if number > most:
            raise argparse.ArgumentTypeError(f"{text} is more than {most}, the most")
        return number

    return limited


@contextlib.contextmanager
def quick_to_interrupt(end: Callable[[], None]) -> Iterator[None]:
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
        os._exit(INTERRUPTED)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # a background job ignores it
        yield
        return
    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# Drawn by hand, between measurements: rich's bar has a thread, and makes garbage.
def show_progress(done: int, total: int, id: str) -> None:
    bar = ("#" * (20 * done // total)).ljust(20, ".")
    draw(f"[{bar}] {100 * done // total:3}% {id}")


def draw(line: str) -> None:
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        sys.stderr.write(f"\r{line[:width].ljust(width)}\r")
        sys.stderr.flush()


def say(text: str) -> None:
    """Print a sentence, whole for a pipe and in lines for a terminal."""
    if sys.stdout.isatty():
        text = wrap(text, shutil.get_terminal_size().columns)
    print(text)


def wrap(text: str, width: int = 79) -> str:
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def make_writer() -> Callable[[str, str], None]:
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
