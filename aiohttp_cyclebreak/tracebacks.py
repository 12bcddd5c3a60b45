"""Which entries of a traceback stay?"""

from types import FrameType, TracebackType
from typing import Any, Container, List, Optional, Set

from .exceptions import frames_of, set_traceback, traceback_of
from .frames import Severed, goes_on, is_certainly_over

__all__ = (
    "drop_ended_entries",
    "drop_older_entries",
    "is_all_empty",
    "looked_at",
    "mark_all_empty",
    "mark_looked_at",
)

_FIRST_TIME = 1
_ALL_EMPTY = 2

# Ids in one frame: each exception that is raised with a traceback out of a cache leaves
# its own there.  Of one that is forgotten there no entries are cut off.
_MOST_SEVERED = 1_000

# Entries of the first time that stay: it may be that of a thousand requests at once.
_MOST_OF_FIRST_TIME = 100


def drop_older_entries(exc: BaseException, emptied: Container[int]) -> None:
    """Cut off the part of a traceback that was there when it was severed before.

    One instance that is raised again and again puts the entries of each time before
    those of the last, and would gather them for good.  Those of the first time stay:
    the last of them are where the exception comes from, be it a failure that is cached,
    and whoever logs it the next time needs these.

    Args:
        exc: the exception.
        emptied: the ids of the frames that are empty: what runs on is in the entries
            of all times.
    """
    key = id(exc)
    entries: List[TracebackType] = []
    newer = 0  # how many entries there are up to the last one of this time
    new: Set[int] = set()  # it may go through a frame twice, caught and raised again
    is_first_time = True
    # What stands in the frames is of another one, which had the same id and has gone:
    # both were raised with a traceback out of a cache.
    is_another = False
    entry = traceback_of(exc)
    while entry is not None:
        frame = entry.tb_frame
        if id(frame) in emptied:
            severed: Any = frame.f_trace
            if type(severed) is not Severed:
                severed = frame.f_trace = Severed()  # type: ignore[assignment]
            is_older = key in severed and id(frame) not in new and not is_another
            if is_older and newer:
                head = _of_first_time(entry, key)
                if head is entry:  # there is nothing to cut off
                    return
                if head is not None:
                    _replace(exc, entries[0], _copy(entries[:newer], head))
                    return
                is_another = True
            if is_another or not is_older:
                newer = len(entries) + 1
                new.add(id(frame))
                if len(severed) >= _MOST_SEVERED:
                    severed.clear()
                severed[key] = 0
            else:
                is_first_time = False
        entries.append(entry)
        entry = entry.tb_next
    if is_first_time:
        for each in entries[-_MOST_OF_FIRST_TIME:]:
            if id(each.tb_frame) in new:
                severed = each.tb_frame.f_trace
                severed[key] |= _FIRST_TIME
                break


def _copy(
    entries: List[TracebackType], rest: Optional[TracebackType]
) -> Optional[TracebackType]:
    """Put copies of entries before others: another exception may share these."""
    for each in reversed(entries):
        line: Optional[int] = each.tb_lineno
        if line is None:  # its code was made without any
            line = -1
        rest = TracebackType(rest, each.tb_frame, each.tb_lasti, line)
    return rest


def _replace(
    exc: BaseException, first: TracebackType, shortened: Optional[TracebackType]
) -> None:
    """Give an exception a shorter traceback, if it still has the one that was read.

    Another thread, with a loop and requests of its own, may have raised the same
    instance meanwhile: it would lose its lines.

    Args:
        exc: the exception.
        first: the first entry of what was read.
        shortened: what takes its place.
    """
    if traceback_of(exc) is first:
        set_traceback(exc, shortened)


# So many entries stay of the newest, of those from each function on that goes on, and
# of the oldest.  No single raise is cut that is within the limit of recursion, which is
# a thousand unless the program sets another.
_MOST_OF_EACH = 250


def drop_ended_entries(exc: BaseException) -> None:
    """Shorten the traceback of an exception that a task has in hand for long.

    Each request that raises the same instance puts its entries before all others, and
    while a worker waits with it in hand nothing of it is severed.  So what would stay
    are the requests, and each of them would go through the entries of all.
    """
    entries: List[TracebackType] = []
    entry = traceback_of(exc)
    while entry is not None:
        entries.append(entry)
        entry = entry.tb_next
    kept: List[TracebackType] = []
    seen: Set[int] = set()
    to_keep = _MOST_OF_EACH
    for entry in entries[:-_MOST_OF_EACH]:
        frame = entry.tb_frame
        if id(frame) not in seen and goes_on(frame):
            seen.add(id(frame))
            to_keep = _MOST_OF_EACH
        if to_keep:
            kept.append(entry)
            to_keep -= 1
    # Not for a few, or the entries that stay would be copied for each request.
    if len(entries) > 2 * (len(kept) + _MOST_OF_EACH):
        _replace(exc, entries[0], _copy(kept, entries[-_MOST_OF_EACH]))


def _of_first_time(entry: Optional[TracebackType], key: int) -> Optional[TracebackType]:
    """Where the entries of the first time begin, of those from one on."""
    while entry is not None:
        severed: Any = entry.tb_frame.f_trace
        if type(severed) is Severed and severed.get(key, 0) & _FIRST_TIME:
            return entry
        entry = entry.tb_next
    return None


def mark_all_empty(exc: BaseException) -> None:
    """Note in the first frame of a traceback that it holds nothing any more."""
    entry = traceback_of(exc)
    severed: Any = None if entry is None else entry.tb_frame.f_trace
    if type(severed) is Severed and id(exc) in severed:
        severed[id(exc)] |= _ALL_EMPTY


def is_all_empty(exc: BaseException) -> bool:
    """Whether all of an exception's traceback was emptied, and it was not raised since.

    One instance that many requests have kept has the frames of all of them there, and
    the end of each would go through them all.
    """
    entry = traceback_of(exc)
    severed: Any = None if entry is None else entry.tb_frame.f_trace
    return type(severed) is Severed and bool(severed.get(id(exc), 0) & _ALL_EMPTY)


_LOOKED_AT = 0


def mark_looked_at(exc: BaseException, number: int) -> None:
    """Note in a traceback that it was looked at, so that later ones need not."""
    frame = _latest_over(exc)
    if frame is not None:
        severed: Any = frame.f_trace
        if type(severed) is not Severed:
            severed = frame.f_trace = Severed()  # type: ignore[assignment]
        severed[_LOOKED_AT] = number


def looked_at(exc: BaseException) -> int:
    """The last number that was noted, if the exception was not raised since; or 0."""
    frame = _latest_over(exc)
    severed: Any = None if frame is None else frame.f_trace
    return severed.get(_LOOKED_AT, 0) if type(severed) is Severed else 0


def _latest_over(exc: BaseException) -> Optional[FrameType]:
    # Each raise puts new entries before the others, of which the first may be that of a
    # worker which goes on; the last is over, since it has raised.
    return next(filter(is_certainly_over, frames_of(exc)), None)
