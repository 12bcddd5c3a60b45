"""Who runs with an exception in hand?"""

import gc
import sys
import threading
from types import CellType, CodeType, FrameType
from typing import Any, Container, Iterator, List, Optional, Set, Tuple

from .exceptions import exceptions_in, frames_of, graph
from .frames import CO_RESUMABLE, goes_on
from .tracebacks import is_all_empty

__all__ = (
    "awaiting_frames",
    "awaits_in",
    "handled_by",
    "in_flight",
    "is_of_thread",
    "wrapped_coroutine",
)


def in_flight(exc: BaseException, running: Container[int] = ()) -> bool:
    """Whether somebody else still runs with the exception in hand.

    That is so when its traceback leads through a coroutine that is suspended:
    one exception can be raised in several tasks at once (a failed shared future,
    a module's one instance).  Suspended generators do not count; they are mostly
    the request's own, left behind by the exception.  Nor does a function that runs on
    in a thread which does not handle the exception any more: it has handed it on.

    Args:
        exc: the exception.
        running: the ids of frames that do not count: their tasks are known not to
            have it in hand.
    """
    if is_all_empty(exc):
        return False
    executing: Set[int] = set()
    for frame in frames_of(exc):
        if id(frame) not in running and goes_on(frame):
            if frame.f_code.co_flags & CO_RESUMABLE:
                return True
            executing.add(id(frame))
    return bool(executing) and not _have_threads_gone_on(executing, exc)


def _have_threads_gone_on(executing: Set[int], exc: BaseException) -> bool:
    """Whether functions that execute are those of threads, and none handles it.

    One of them is this thread, in which a function may run the event loop.

    Before CPython 3.11 nobody asks: there nothing tells that a function executes.

    Args:
        executing: the ids of their frames.
        exc: the exception.
    """
    elsewhere = set(executing)  # such as in a greenlet that is suspended
    tops = sys._current_frames()  # noqa: SLF001
    # Its own frame, in a variable of this function's, would lead to itself.
    tops[threading.get_ident()] = sys._getframe(1)  # noqa: SLF001
    for top in tops.values():
        frame: Optional[FrameType] = top
        while frame is not None and elsewhere:
            elsewhere.discard(id(frame))
            frame = frame.f_back
    if elsewhere:
        return False
    handled: Any
    for handled in sys._current_exceptions().values():  # noqa: SLF001
        if type(handled) is tuple:  # before CPython 3.12
            handled = handled[1]
        if handled is not None and any(each is exc for each in graph(handled)):
            return False
    return True


def is_of_thread(exc: BaseException) -> bool:
    """Whether a traceback leads through a function that executes, as in a thread."""
    return any(
        goes_on(frame) and not frame.f_code.co_flags & CO_RESUMABLE
        for frame in frames_of(exc)
    )


def awaiting_frames(coroutine: Any) -> Set[int]:
    """The ids of the frames of a suspended coroutine and those that it awaits."""
    ids = set()
    while coroutine is not None:
        ids.add(id(getattr(coroutine, "cr_frame", None)))
        coroutine = getattr(coroutine, "cr_await", None)
    return ids


def awaits_in(coroutine: Any, frames: Container[int], codes: Container[int]) -> bool:
    """Whether a suspended coroutine, or one that it awaits, is in one of some frames.

    Of thousands that are asked most are not.  From CPython 3.11 on a coroutine that is
    asked for its frame has an object made for it, and keeps that.

    Args:
        coroutine: that of a task.
        frames: the ids of the frames.
        codes: the ids of their code, which is asked for first.
    """
    while coroutine is not None:
        if (
            id(getattr(coroutine, "cr_code", None)) in codes
            and id(coroutine.cr_frame) in frames
        ):
            return True
        coroutine = getattr(coroutine, "cr_await", None)
    return False


# Among what a coroutine holds, the types of what it may wait for.
_AWAITED = {
    "anext_awaitable",
    "async_generator",
    "async_generator_asend",
    "async_generator_athrow",
    "coroutine",
    "coroutine_wrapper",
    "generator",
}


def handled_by(coroutine: Any, lists: bool = False) -> List[BaseException]:
    """What a suspended task handles, or has in its locals, however deep it awaits.

    Args:
        coroutine: that of the task.
        lists: as for :func:`exceptions_in`.
    """
    found: List[BaseException] = []
    for _, referents in _awaited_by(coroutine):
        found += exceptions_in(referents, lists)
    return found


def _awaited_by(coroutine: Any) -> Iterator[Tuple[Any, List[Any]]]:
    """A suspended coroutine and all that it may wait for, with what each refers to."""
    seen: Set[int] = set()
    todo = [coroutine]
    while todo:
        each = todo.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        referents = gc.get_referents(each)
        frame = getattr(each, "cr_frame", None) or getattr(each, "ag_frame", None)
        if frame is not None and sys.version_info < (3, 11):
            referents += gc.get_referents(frame)  # then it holds the locals itself
        # What a nested function has too, or before CPython 3.12 a comprehension.
        cells = [value for value in referents if type(value) is CellType]
        referents += gc.get_referents(*cells)
        yield each, referents
        todo += [value for value in referents if type(value).__name__ in _AWAITED]


def wrapped_coroutine(coroutine: Any, code: Optional[CodeType]) -> Any:
    """The coroutine of a function that another one awaits, perhaps in others.

    Args:
        coroutine: that of a task, suspended or not begun.  What it is to await then is
            among its locals.
        code: that of the function.

    Returns:
        The function's; if there is none, the task's.
    """
    if code is None or getattr(coroutine, "cr_code", None) is code:
        return coroutine
    for each, _ in _awaited_by(coroutine):
        if getattr(each, "cr_code", None) is code:
            return each
    return coroutine
