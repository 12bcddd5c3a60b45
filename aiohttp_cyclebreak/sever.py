"""How are references cut? Exceptions, tracebacks and frames; nothing of aiohttp.

The cut that does it is emptying frames.  A traceback whose frames are empty
still prints in full (file, line and function live in code objects), so whoever
holds the exception for longer than the request loses no line of it.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from types import FrameType
from typing import Callable, Container, List, Optional, Set, Tuple

from .exceptions import detach, frames_of, links_of, sequence_of_group, unlink
from .frames import COUNTS_ARE_EXACT, Emptied, empty_functions, report_futures
from .tracebacks import drop_older_entries, is_all_empty, mark_all_empty

__all__ = ("Cut", "sever")


@dataclass(frozen=True)
class Cut:
    """What one severing took apart.

    Attributes:
        exceptions: exceptions that were severed.
        tracebacks: entries of their tracebacks that hold nothing any more,
            because their frame was emptied or they were taken off.
        frames: frames whose locals were cleared.
    """

    exceptions: int = 0
    tracebacks: int = 0
    frames: int = 0


def sever(
    exceptions: List[BaseException],
    *,
    clear_frames: bool = True,
    spared: Container[int] = (),
    emptied: Optional[Emptied] = None,
    references: "Optional[Callable[[], Counter[int]]]" = None,
) -> Cut:
    """Cut the reference cycles that lead through exceptions.

    Args:
        exceptions: what to sever, as :func:`graph` gives it: the root first.
        clear_frames: empty the finished frames of each traceback; a frame that
            may be suspended or executes is left alone.  Otherwise the tracebacks
            are taken off the exceptions, locals and all.
        spared: the ids of frames that something else still needs.
        emptied: by earlier severings, of exceptions that may share frames with these;
            None: there were none.
        references: gives, by the id of each exception, how many of the references to it
            are of nobody who prints it, that of the list not counted; None: nobody is
            taken to print any.

    Returns:
        What was cut.
    """
    emptied = Emptied() if emptied is None else emptied
    tracebacks, frames = _cut_tracebacks(exceptions, clear_frames, spared, emptied)
    _cut_link_cycles(exceptions, references)
    return Cut(len(exceptions), tracebacks, frames)


def _cut_tracebacks(
    exceptions: List[BaseException],
    clear_frames: bool,
    spared: Container[int],
    emptied: Emptied,
) -> Tuple[int, int]:
    """Empty the frames of tracebacks, or take those off.

    Returns:
        How many entries of tracebacks hold nothing any more, and how many frames were
        emptied.
    """
    tracebacks = 0
    new: List[FrameType] = []
    full = exceptions
    if clear_frames:
        full = [exc for exc in exceptions if not is_all_empty(exc)]
    frames = {
        id(frame): frame
        for exc in full
        for frame in frames_of(exc)
        if id(frame) not in spared
    }
    report_futures(frames.values())
    if clear_frames:
        new = emptied.empty(frames.values(), spared)
        if empty_functions(new):
            emptied.leaves_functions = True
        is_all = not emptied.leaves_functions and not emptied.leaves_callers()
        for exc in full:
            are_empty = [id(frame) in emptied.frames for frame in frames_of(exc)]
            tracebacks += sum(are_empty)
            drop_older_entries(exc, emptied.frames)
            if all(are_empty) and is_all:
                mark_all_empty(exc)
    else:
        for exc in exceptions:
            tracebacks += sum(1 for _ in frames_of(exc))
            detach(exc)
    return tracebacks, len(new)


def _held_elsewhere(
    exceptions: List[BaseException],
    references: "Optional[Callable[[], Counter[int]]]",
) -> Set[int]:
    """The ids of exceptions that others hold than each other, where that is asked.

    What a traceback's frames have is not counted: they are empty by now.
    """
    held: Set[int] = set()
    groups = [each for each in map(sequence_of_group, exceptions) if each is not None]
    if references is None or not groups or not COUNTS_ARE_EXACT:
        return held
    known = references()
    known.update(id(target) for exc in exceptions for _, target in links_of(exc))
    known.update(id(member) for sequence in groups for member in sequence)
    for exc in exceptions:
        # References: the list, the variable, the argument.
        if sys.getrefcount(exc) > known[id(exc)] + 3:
            held.add(id(exc))
    return held


def _cut_link_cycles(
    exceptions: List[BaseException],
    references: "Optional[Callable[[], Counter[int]]]",
) -> None:
    """Cut the links by which exceptions come back to themselves.

    A printed traceback skips an exception that it has met already, so the text
    stays as it was.  Not so where the way back is through a group: that is skipped
    only once it was printed.  Who still has one of those, such as ``raise
    group.exceptions[0]``, prints the others of the group too, so it is left whole, and
    to the collector; what is left are exceptions and empty frames.
    """
    if not any(map(links_of, exceptions)):
        return
    held = _held_elsewhere(exceptions, references)
    given = {id(exc) for exc in exceptions}
    done: Set[int] = set()
    for root in exceptions:
        if id(root) in done:
            continue
        # Depth first, without recursion: each step is the exception, the link
        # that led to it, and what is still to be looked at from there.
        path = [(root, None, iter(links_of(root)))]
        position = {id(root): 0}
        while path:
            exc, _, links = path[-1]
            for link, target in links:
                if id(target) in done or id(target) not in given:
                    continue
                if id(target) not in position:
                    position[id(target)] = len(path)
                    path.append((target, link, iter(links_of(target))))
                    break
                if link is not None:
                    unlink(exc, link)
                    continue
                if any(id(each) in held for each, _, _ in path[position[id(target)] :]):
                    continue
                # A group's members cannot be taken out: cut on the way to it.
                step = len(path) - 1
                while path[step][1] is None:
                    step -= 1
                unlink(path[step - 1][0], path[step][1])
                # What is below leads back still, by whatever way it is come to.
                for below, _, _ in path[step:]:
                    del position[id(below)]
                del path[step:]
                break
            else:
                path.pop()
                del position[id(exc)]
                done.add(id(exc))
