"""Is a frame over, and how is it emptied?"""

import contextlib
import dis
import gc
import inspect
import sys
from asyncio import Future
from types import CellType, CodeType, FrameType, FunctionType
from typing import Any, Container, Dict, FrozenSet, Iterable, List, Optional
from weakref import getweakrefcount

__all__ = (
    "COUNTS_ARE_EXACT",
    "CO_RESUMABLE",
    "Emptied",
    "Severed",
    "callers_of",
    "empty",
    "empty_functions",
    "empty_with_callers",
    "executed_here",
    "goes_on",
    "is_certainly_over",
    "is_finished",
    "local_values",
    "report_futures",
    "returns_of",
)

# From CPython 3.14 on, and without a global interpreter lock, sys.getrefcount() does
# not count every reference.
COUNTS_ARE_EXACT = (
    sys.version_info < (3, 14) and getattr(sys, "_is_gil_enabled", lambda: True)()
)

_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
CO_RESUMABLE = _GENERATOR | inspect.CO_COROUTINE | inspect.CO_ITERABLE_COROUTINE


if sys.version_info >= (3, 11):

    def is_finished(frame: FrameType) -> bool:
        """Whether a frame has certainly left execution for good.

        A suspended coroutine's frame must not be cleared: before Python 3.13
        :meth:`frame.clear` closes it, and whoever awaits it waits for ever.
        """
        # A frame object owns its code and locals only once execution is over;
        # until then the thread's stack or the generator does, and frame_traverse()
        # in CPython's Objects/frameobject.c shows the collector neither.
        code = frame.f_code
        # By identity: a namespace of the frame's may refuse to be compared.
        for each in gc.get_referents(frame):  # noqa: SIM110 - a generator takes longer
            if each is code:
                return True
        return False

    def executed_here() -> Container[int]:
        """None: such a frame is not finished."""
        return ()

else:
    _YIELD_VALUE = dis.opmap["YIELD_VALUE"]
    _YIELD_FROM = dis.opmap["YIELD_FROM"]

    def is_finished(frame: FrameType) -> bool:
        """Whether a frame is certainly not suspended.

        A suspended coroutine's frame must not be cleared: before Python 3.13
        :meth:`frame.clear` closes it, and whoever awaits it waits for ever.
        That of one which executes cannot be: it raises :exc:`RuntimeError`.
        """
        code = frame.f_code
        if not code.co_flags & CO_RESUMABLE:
            return True
        # Suspended at an await, f_lasti is one instruction short of YIELD_FROM,
        # which runs again on resumption; an exception that leaves the await moves
        # it on.  A generator left by an exception thrown in at its yield looks
        # suspended: an error on the side that does no harm.
        last = frame.f_lasti
        return (
            last >= 0
            and code.co_code[last] != _YIELD_VALUE
            and code.co_code[last + 2 : last + 3] != bytes((_YIELD_FROM,))
        )

    def executed_here() -> Container[int]:
        """The ids of the frames that execute in this thread, finished or not."""
        found = set()
        frame: Optional[FrameType] = sys._getframe(1)  # noqa: SLF001
        while frame is not None:
            found.add(id(frame))
            frame = frame.f_back
        return found


def goes_on(frame: FrameType) -> bool:
    """Whether a function or a coroutine is not over; a generator does not count."""
    return not is_finished(frame) and not frame.f_code.co_flags & _GENERATOR


def returns_of(code: CodeType) -> FrozenSet[int]:
    """Where a function returns: the last instruction of a frame that has."""
    return frozenset(
        each.offset
        for each in dis.get_instructions(code)
        if each.opname in ("RETURN_VALUE", "RETURN_CONST")
    )


def local_values(frame: FrameType) -> List[Any]:
    """What a finished function has in its locals, and some of what it is made of.

    Reading ``f_locals`` would bring up to date a dict that somebody else may have.
    """
    values = gc.get_referents(frame)
    cells = [each for each in values if type(each) is CellType]
    return values + [held for each in cells for held in gc.get_referents(each)]


class Severed(Dict[int, int]):
    """In a frame, the ids of the exceptions that were severed with it.

    With each stands whether the entries of its first time begin here, and, in the first
    frame of its traceback, whether all the frames of that and behind it are empty.
    Under 0, which is no id, stands when a traceback through here was looked at.

    A frame that is over is never traced again and has no other use for ``f_trace``, and
    what stands there goes with it.  In the exception itself it would be seen.
    """

    __slots__ = ()


# Those of the frame, of the list, of the loop's variable and of the call's argument.
_OF_LOCALS = 4


def _has_own_locals(frame: FrameType) -> bool:
    """Whether a frame that is cleared has a dict of its locals that nobody else has.

    Somebody has read ``f_locals``, as Sentry does, and ``clear()`` forgets that dict.
    But before CPython 3.13 it is the one that ``locals()`` gives, too, and who has that
    need not know of any exception: a task or a queue that was given it.
    """
    for each in gc.get_referents(frame):
        # Before CPython 3.11 the frame holds these itself.
        if (
            type(each) is dict
            and each is not frame.f_globals
            and each is not frame.f_builtins
        ):
            # fields = locals(); copied in one step: another thread may change it.
            own = sum(value is each for value in list(each.values()))
            return sys.getrefcount(each) == _OF_LOCALS + own
    return False


def empty(frame: FrameType) -> bool:
    """Drop what a finished frame's locals hold.

    Returns:
        Whether the frame was finished; if not, nothing was done.
    """
    if not is_finished(frame):
        return False
    severed: Any = frame.f_trace
    try:
        frame.clear()
    except RuntimeError:  # it executes, in this thread or in another
        return False
    if type(severed) is Severed:  # which clear() forgets
        frame.f_trace = severed  # type: ignore[assignment]
    if sys.version_info < (3, 13) and _has_own_locals(frame):
        try:
            frame.f_locals  # noqa: B018 - which brings it up to date
        except Exception:  # a namespace that is no plain dict
            pass
    # Jinja makes a frame for each line of a template; its globals hold the exception.
    dict.pop(frame.f_globals, "__jinja_exception__", None)
    return True


def empty_with_callers(frame: FrameType) -> None:
    """Empty a frame and, behind it, the finished frames that called it."""
    Emptied().empty([frame], ())


# Nobody asks for the variables of these, and their functions are called by each task.
_MACHINERY = ("aiohttp", "asyncio", "uvloop")


class Emptied:
    """The frames that several severings, one after the other, have emptied."""

    __slots__ = ("_callers", "frames", "leaves_functions")

    def __init__(self) -> None:
        # By id, and held, so that it stays their own.
        self.frames: Dict[int, FrameType] = {}
        # Whether something else has functions that were made in those.
        self.leaves_functions = False
        # The frames behind those, and how many of those they have called.
        self._callers: Dict[int, List[Any]] = {}

    def empty(
        self, frames: Iterable[FrameType], spared: Container[int]
    ) -> List[FrameType]:
        """Empty frames, and the finished ones behind them.

        A traceback ends where the exception was caught, but its frames go on by
        ``f_back``: from Python 3.11 up to the event loop's ``Handle``, which holds
        the task, which holds the result.  Behind it, a frame of the application's that
        something else refers to is left alone: it may be in the traceback of another
        exception, which is needed still.

        Args:
            frames: those in tracebacks.
            spared: the ids of frames that are not to be emptied.

        Returns:
            Those that were emptied now.
        """
        emptied: List[FrameType] = []
        found = list(frames)
        while found:
            callers: Dict[int, List[Any]] = {}
            for each in found:
                if id(each) in self.frames or id(each) in spared:
                    continue
                if empty(each):
                    self.frames[id(each)] = each
                    emptied.append(each)
                    self._count(each.f_back, callers)
            found = _pop_unshared(callers)
            found += [each for each, _ in callers.values() if _is_machinery(each)]
            self._callers.update(callers)
        return emptied

    def leaves_callers(self) -> bool:
        """Whether behind those frames are others, which may have to be emptied later.

        Those of the event loop do not count: it goes on.
        """
        return any(
            key not in self.frames
            and (each.f_code.co_flags & CO_RESUMABLE or not _is_machinery(each))
            for key, (each, _) in self._callers.items()
        )

    def _count(
        self, caller: Optional[FrameType], callers: Dict[int, List[Any]]
    ) -> None:
        if caller is None or id(caller) in self.frames:
            return
        key = id(caller)
        if key not in callers:
            known = self._callers.pop(key, None)
            if known is None:  # it may have itself in a local
                own = sum(each is caller for each in gc.get_referents(caller))
                known = [caller, own]
            callers[key] = known
        callers[key][1] += 1


def _is_machinery(frame: FrameType) -> bool:
    module = dict.get(frame.f_globals, "__name__")
    return str(module).partition(".")[0] in _MACHINERY


def callers_of(frames: List[FrameType]) -> List[FrameType]:
    """The frames behind others of coroutines, of aiohttp's and of the event loop's.

    One instance that is raised again and again has the frames of each time in its
    traceback, and each of these may have callers of its own.
    """
    found: List[FrameType] = []
    seen = set(map(id, frames))
    for frame in frames:
        caller = frame.f_back
        while caller is not None and id(caller) not in seen:
            seen.add(id(caller))
            if caller.f_code.co_flags & CO_RESUMABLE or _is_machinery(caller):
                found.append(caller)
            caller = caller.f_back
    return found


# Those of the dict's entry, of the loop's variable and of the call's argument.
_OWN_REFERENCES = 3


def _pop_unshared(objects: Dict[int, List[Any]]) -> List[Any]:
    """Take out the objects that have only the holders counted with them."""
    if not COUNTS_ARE_EXACT:
        return []
    unshared = [
        key
        for key, (each, holders) in objects.items()
        if sys.getrefcount(each) == holders + _OWN_REFERENCES
    ]
    return [objects.pop(key)[0] for key in unshared]


def report_futures(frames: Iterable[FrameType]) -> None:
    """Have asyncio report the futures that go with the locals of frames.

    A function that lets others wait for its result, as a cache does, gives its
    exception to a future.  If nobody has waited, asyncio logs that when the future
    goes, and whoever reports the log looks into the frames.  So asyncio is told to log
    it now, while these have their locals.

    Args:
        frames: those that are to be emptied, or to be taken off the exceptions.
    """
    futures: Dict[int, List[Any]] = {}
    for frame in frames:
        for each in gc.get_referents(frame):
            if type(each) is Future and is_certainly_over(frame):
                futures.setdefault(id(each), [each, 0])[1] += 1
    each = None  # or it would be one more reference to the last one
    for future in _pop_unshared(futures) if futures else ():
        future.__del__()  # which does nothing a second time


def is_certainly_over(frame: FrameType) -> bool:
    """Whether a frame is finished, and does not execute either."""
    # Before CPython 3.11 is_finished() is true of a function that executes.
    is_function = not frame.f_code.co_flags & CO_RESUMABLE
    return is_finished(frame) and not (sys.version_info < (3, 11) and is_function)


if (3, 11) <= sys.version_info < (3, 14):

    def empty_functions(frames: List[FrameType]) -> bool:
        """Drop what a function closes over if only emptied frames still hold it.

        From CPython 3.11 on a frame holds its function, which ``clear()`` does not
        let go, and a function that is made in a handler closes over the request.

        Returns:
            Whether something else has one that was made in these frames.
        """
        functions: Dict[int, List[Any]] = {}
        for frame in frames:
            if frame.f_code.co_flags & inspect.CO_NESTED:
                for each in gc.get_referents(frame):
                    if type(each) is FunctionType and each.__code__ is frame.f_code:
                        functions.setdefault(id(each), [each, 0])[1] += 1
        each = None
        left: List[CodeType] = []
        cells: Dict[int, List[Any]] = {}
        while COUNTS_ARE_EXACT:
            for function in _pop_unshared(functions):
                if getweakrefcount(function):  # who has one calls it while it is there
                    left.append(function.__code__)
                    continue
                function.__defaults__ = function.__kwdefaults__ = None
                closure = function.__closure__
                # The function, the variable, the argument: a copy shares it whole.
                if closure is None or sys.getrefcount(closure) != 3:
                    continue
                for cell in closure:
                    cells.setdefault(id(cell), [cell, 0])[1] += 1
            function = closure = cell = None
            unshared = _pop_unshared(cells)
            for cell in unshared:
                with contextlib.suppress(ValueError):  # it is empty
                    del cell.cell_contents
            if not unshared:  # or another function may have lost its last holder
                break
        left += [each.__code__ for each, _ in functions.values()]
        # Most that are left, such as middlewares, were made by none of these.
        made = {id(const) for frame in frames for const in frame.f_code.co_consts}
        return any(id(code) in made for code in left)

else:

    def empty_functions(frames: List[FrameType]) -> bool:
        """Nothing: a frame holds no function yet, or its holders cannot be counted."""
        return False
