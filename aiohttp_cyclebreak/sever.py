"""How are references cut? Exceptions, tracebacks and frames; nothing of aiohttp.

The cut that does it is emptying frames.  A traceback whose frames are empty
still prints in full (file, line and function live in code objects), so whoever
holds the exception for longer than the request loses no line of it.
"""

import builtins
import contextlib
import dis
import gc
import inspect
import itertools
import sys
import threading
from asyncio import Future
from collections import deque
from dataclasses import dataclass
from types import (
    CellType,
    CodeType,
    FrameType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    ModuleType,
    TracebackType,
)
from typing import (
    Any,
    Callable,
    Container,
    Dict,
    FrozenSet,
    Iterable,
    Iterator,
    List,
    Optional,
    Set,
    Tuple,
)
from weakref import getweakrefcount

__all__ = (
    "COUNTS_ARE_EXACT",
    "Cut",
    "Emptied",
    "attributes_of",
    "awaiting_frames",
    "awaits_in",
    "detach",
    "drop_ended_entries",
    "empty",
    "empty_with_callers",
    "exceptions_in",
    "frames_of",
    "goes_by_itself",
    "graph",
    "handled_by",
    "in_flight",
    "is_exception",
    "is_finished",
    "leads_on",
    "leads_to",
    "local_values",
    "returns_of",
    "sever",
    "traceback_of",
    "wrapped_coroutine",
)

# Read and written through the descriptors of BaseException itself: a subclass may
# shadow them with properties that raise, or forbid setattr.
_TRACEBACK: Any = BaseException.__dict__["__traceback__"]
_CAUSE: Any = BaseException.__dict__["__cause__"]
_CONTEXT: Any = BaseException.__dict__["__context__"]
_SUPPRESS_CONTEXT: Any = BaseException.__dict__["__suppress_context__"]
traceback_of: Callable[[BaseException], Optional[TracebackType]] = _TRACEBACK.__get__
_cause_of: Callable[[BaseException], Optional[BaseException]] = _CAUSE.__get__
_context_of: Callable[[BaseException], Optional[BaseException]] = _CONTEXT.__get__

# From CPython 3.14 on, and without a global interpreter lock, sys.getrefcount() does
# not count every reference.
COUNTS_ARE_EXACT = (
    sys.version_info < (3, 14) and getattr(sys, "_is_gil_enabled", lambda: True)()
)

_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_RESUMABLE = _GENERATOR | inspect.CO_COROUTINE | inspect.CO_ITERABLE_COROUTINE


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

    def _was_looked_at(frame: FrameType) -> bool:
        """Whether somebody has read ``f_locals`` of a frame, as Sentry does.

        It left a dict of them in the frame, which ``clear()`` forgets: asking for it
        again brings it up to date.  Of a frame that is cleared it is the only dict.
        """
        for each in gc.get_referents(frame):  # noqa: SIM110 - as above
            if type(each) is dict:
                return True
        return False

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
        if not code.co_flags & _RESUMABLE:
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

    def _was_looked_at(frame: FrameType) -> bool:
        """As from 3.11 on; here the frame does not tell."""
        return True


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


def is_exception(value: Any) -> bool:
    """Whether a value is an exception, without asking it: it may be a lazy proxy."""
    return issubclass(type(value), BaseException)


def frames_of(exc: BaseException) -> Iterator[FrameType]:
    """The frames in the exception's traceback, outermost first."""
    traceback = traceback_of(exc)
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


# Before CPython 3.11 it is of a backport, which who uses it has imported.
_Group: Any = getattr(builtins, "BaseExceptionGroup", None)


def _group_type() -> Any:
    if _Group is not None:
        return _Group
    return getattr(sys.modules.get("exceptiongroup"), "BaseExceptionGroup", ())


def leads_on(exc: BaseException) -> bool:
    """Whether an exception has a cause, a context or members."""
    return (
        _cause_of(exc) is not None
        or _context_of(exc) is not None
        # What it says of itself may be a lie: its type is asked.
        or issubclass(type(exc), _Group or _group_type())
    )


# Of a class, whose metaclass may lie as well.
_MRO: Any = type.__dict__["__mro__"]
_NAMESPACE: Any = type.__dict__["__dict__"]

# Not of one call alone, and perhaps large.
_NOT_ENTERED = (
    *(type, ModuleType, FunctionType),
    *(list, tuple, set, frozenset, dict, deque),
)
_MOST_LOOKED_AT = 1_000


def leads_to(exc: BaseException, target: object) -> bool:
    """Whether a local of an exception's finished frames is an object, or leads to it.

    It does by its attributes, and theirs.  No container is entered, nor what a function
    closes over.
    """
    found: List[Any] = []
    for frame in frames_of(exc):
        if is_finished(frame):
            others = (frame.f_code, frame.f_globals, frame.f_builtins, frame.f_back)
            values = gc.get_referents(frame)  # the last ones are those of its closure
            own = values[: len(values) - len(frame.f_code.co_freevars)]
            found += [each for each in own if not any(each is one for one in others)]
    for _ in range(2):  # a local, perhaps in a cell, and its attributes
        if any(each is target for each in found):
            return True
        entered, found = found, []
        for each in entered:
            if len(found) < _MOST_LOOKED_AT:
                found += attributes_of(each)
    return any(each is target for each in found)


def attributes_of(value: Any) -> List[Any]:
    """What an object has in its attributes, slots included; of very many, the first.

    Of a class, a module or a function nothing is given, nor what a container holds.
    """
    # What an object says of itself may be a lie, or raise: its type is asked.
    if issubclass(type(value), _NOT_ENTERED):
        return []
    attributes = gc.get_referents(value)  # without those in a __dict__
    for base in _MRO.__get__(type(value)):
        own = _NAMESPACE.__get__(base).get("__dict__")
        if type(own) in (GetSetDescriptorType, MemberDescriptorType):
            namespace = own.__get__(value)
            if issubclass(type(namespace), dict):
                values = dict.values(namespace)
                attributes += itertools.islice(values, _MOST_LOOKED_AT)
            break
    return attributes


def _links(exc: BaseException) -> List[Tuple[Any, BaseException]]:
    cause, context = _cause_of(exc), _context_of(exc)
    group = _group_type()
    is_group = issubclass(type(exc), group)
    links = [(_CAUSE, cause)] if cause is not None else []
    if context is not None:
        links.append((_CONTEXT, context))
    if is_group:
        # Again by descriptor: a subclass may shadow the attribute.
        links.extend((None, member) for member in group.exceptions.__get__(exc))
    return links


def graph(root: BaseException) -> List[BaseException]:
    """Every exception that can be reached from one: causes, contexts, members.

    Args:
        root: where to start.

    Returns:
        The exceptions, the root first, each once, however the chain loops.
    """
    found = [root]
    links = _links(root)
    if not links:
        return found
    seen = {id(root)}
    for exc in found:  # grows while it is walked: no recursion, however long
        for _, target in links if exc is root else _links(exc):
            if id(target) not in seen:
                seen.add(id(target))
                found.append(target)
    return found


def _goes_on(frame: FrameType) -> bool:
    return not is_finished(frame) and not frame.f_code.co_flags & _GENERATOR


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
    if _is_all_empty(exc):
        return False
    executing: Set[int] = set()
    traceback = traceback_of(exc)
    while traceback is not None:
        frame = traceback.tb_frame
        if _goes_on(frame):
            if id(frame) not in running:
                if frame.f_code.co_flags & _RESUMABLE:
                    return True
                executing.add(id(frame))
        traceback = traceback.tb_next
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


_MOST_GATHERED = 10_000
_LONGEST_ROW = 10  # a pair of a URL and what has come of it, say


def exceptions_in(values: Iterable[Any], lists: bool) -> List[BaseException]:
    """The exceptions among values.

    Args:
        values: those.
        lists: whether those in a list, a tuple or a dict among the values count too,
            also as one of a pair, but if it has very many.
    """
    found: List[BaseException] = []
    for value in values:
        if is_exception(value):
            found.append(value)
        elif lists and type(value) in (list, tuple, dict):
            if len(value) > _MOST_GATHERED:
                continue
            # Copied in one step: another thread may change it.
            for each in list(value.values() if type(value) is dict else value):
                if is_exception(each):
                    found.append(each)
                elif type(each) is tuple and len(each) <= _LONGEST_ROW:
                    found += filter(is_exception, each)
    return found


def _cut_link_cycles(exceptions: List[BaseException]) -> None:
    """Cut the links by which exceptions come back to themselves.

    A printed traceback skips an exception that it has met already, so the text
    stays as it was.
    """
    if not any(map(_links, exceptions)):
        return
    given = {id(exc) for exc in exceptions}
    done: Set[int] = set()
    for root in exceptions:
        if id(root) in done:
            continue
        # Depth first, without recursion: each step is the exception, the link
        # that led to it, and what is still to be looked at from there.
        path = [(root, None, iter(_links(root)))]
        position = {id(root): 0}
        while path:
            exc, _, links = path[-1]
            for link, target in links:
                if id(target) in done or id(target) not in given:
                    continue
                if id(target) not in position:
                    position[id(target)] = len(path)
                    path.append((target, link, iter(_links(target))))
                    break
                if link is not None:
                    _unlink(exc, link)
                    continue
                # A group's members cannot be taken out: cut on the way to it.
                step = len(path) - 1
                while path[step][1] is None:
                    step -= 1
                _unlink(path[step - 1][0], path[step][1])
                # What is below leads back still, by whatever way it is come to.
                for below, _, _ in path[step:]:
                    del position[id(below)]
                del path[step:]
                break
            else:
                path.pop()
                del position[id(exc)]
                done.add(id(exc))


def _unlink(exc: BaseException, link: Any) -> None:
    suppress = _SUPPRESS_CONTEXT.__get__(exc)
    link.__set__(exc, None)
    _SUPPRESS_CONTEXT.__set__(exc, suppress)  # setting __cause__ changes it


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
    if type(severed) is _Severed:  # which clear() forgets
        frame.f_trace = severed  # type: ignore[assignment]
    if sys.version_info < (3, 13) and _was_looked_at(frame):
        try:
            frame.f_locals  # noqa: B018
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
            and (each.f_code.co_flags & _RESUMABLE or not _is_machinery(each))
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


def _report_futures(frames: Iterable[FrameType]) -> None:
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
            if type(each) is Future and _is_certainly_over(frame):
                futures.setdefault(id(each), [each, 0])[1] += 1
    each = None  # or it would be one more reference to the last one
    for future in _pop_unshared(futures) if futures else ():
        future.__del__()  # which does nothing a second time


def _is_certainly_over(frame: FrameType) -> bool:
    # Before CPython 3.11 is_finished() is true of a function that executes.
    is_function = not frame.f_code.co_flags & _RESUMABLE
    return is_finished(frame) and not (sys.version_info < (3, 11) and is_function)


if (3, 11) <= sys.version_info < (3, 14):

    def _empty_functions(frames: List[FrameType]) -> bool:
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

    def _empty_functions(frames: List[FrameType]) -> bool:
        """Before CPython 3.11 a frame does not hold its function."""
        return False


def goes_by_itself(exc: BaseException) -> bool:
    """Whether an exception leads to no other, and its frames go with its traceback.

    If something else refers to one of them, another exception that was caught there
    or a generator that is suspended, taking the traceback off frees nothing.
    """
    if leads_on(exc):
        return False
    traceback = traceback_of(exc)
    count = sys.getrefcount
    inner = outer = None
    while traceback is not None:
        # References: the exception or the entry before, the variable, the argument.
        if count(traceback) != 3:
            return False
        inner = traceback.tb_frame
        if outer is not None:
            # Its entry, the variable, the argument; perhaps that of what it called.
            references = count(outer)
            if references != 3 and (references != 4 or inner.f_back is not outer):
                return False
        outer = inner
        traceback = traceback.tb_next
    return inner is None or count(inner) == 4  # of two variables


def detach(exc: BaseException) -> None:
    """Take the traceback off an exception."""
    _TRACEBACK.__set__(exc, None)


def sever(
    exceptions: List[BaseException],
    *,
    clear_frames: bool = True,
    spared: Container[int] = (),
    emptied: Optional[Emptied] = None,
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

    Returns:
        What was cut.
    """
    emptied = Emptied() if emptied is None else emptied
    tracebacks = 0
    new: List[FrameType] = []
    full = exceptions
    if clear_frames:
        full = [exc for exc in exceptions if not _is_all_empty(exc)]
    frames = {
        id(frame): frame
        for exc in full
        for frame in frames_of(exc)
        if id(frame) not in spared
    }
    _report_futures(frames.values())
    if clear_frames:
        new = emptied.empty(frames.values(), spared)
        if _empty_functions(new):
            emptied.leaves_functions = True
        is_all = not emptied.leaves_functions and not emptied.leaves_callers()
        for exc in full:
            are_empty = [id(frame) in emptied.frames for frame in frames_of(exc)]
            tracebacks += sum(are_empty)
            _drop_older_entries(exc, emptied.frames)
            if all(are_empty) and is_all:
                _mark_all_empty(exc)
    else:
        for exc in exceptions:
            tracebacks += sum(1 for _ in frames_of(exc))
            detach(exc)
    _cut_link_cycles(exceptions)
    return Cut(len(exceptions), tracebacks, len(new))


class _Severed(Dict[int, int]):
    """In a frame, the ids of the exceptions that were severed with it.

    With each stands whether the entries of its first time begin here, and, in the first
    frame of its traceback, whether all the frames of that and behind it are empty.

    A frame that is over is never traced again and has no other use for ``f_trace``, and
    what stands there goes with it.  In the exception itself it would be seen.
    """

    __slots__ = ()


_FIRST_TIME = 1
_ALL_EMPTY = 2

# Ids in one frame: each exception that is raised with a traceback out of a cache leaves
# its own there.  Of one that is forgotten there no entries are cut off.
_MOST_SEVERED = 1_000

# Entries of the first time that stay: it may be that of a thousand requests at once.
_MOST_OF_FIRST_TIME = 100


def _drop_older_entries(exc: BaseException, emptied: Container[int]) -> None:
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
            if type(severed) is not _Severed:
                severed = frame.f_trace = _Severed()  # type: ignore[assignment]
            is_older = key in severed and id(frame) not in new and not is_another
            if is_older and newer:
                head = _of_first_time(entry, key)
                if head is entry:
                    return
                if head is not None:
                    _TRACEBACK.__set__(exc, _copy(entries[:newer], head))
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
        if id(frame) not in seen and _goes_on(frame):
            seen.add(id(frame))
            to_keep = _MOST_OF_EACH
        if to_keep:
            kept.append(entry)
            to_keep -= 1
    # Not for a few, or the entries that stay would be copied for each request.
    if len(entries) > 2 * (len(kept) + _MOST_OF_EACH):
        shortened = _copy(kept, entries[-_MOST_OF_EACH])
        if traceback_of(exc) is entries[0]:  # or a thread has raised it meanwhile
            _TRACEBACK.__set__(exc, shortened)


def _of_first_time(entry: Optional[TracebackType], key: int) -> Optional[TracebackType]:
    """Where the entries of the first time begin, of those from one on."""
    while entry is not None:
        severed: Any = entry.tb_frame.f_trace
        if type(severed) is _Severed and severed.get(key, 0) & _FIRST_TIME:
            return entry
        entry = entry.tb_next
    return None


def _mark_all_empty(exc: BaseException) -> None:
    """Note in the first frame of a traceback that it holds nothing any more."""
    entry = traceback_of(exc)
    severed: Any = None if entry is None else entry.tb_frame.f_trace
    if type(severed) is _Severed and id(exc) in severed:
        severed[id(exc)] |= _ALL_EMPTY


def _is_all_empty(exc: BaseException) -> bool:
    """Whether all of an exception's traceback was emptied, and it was not raised since.

    One instance that many requests have kept has the frames of all of them there, and
    the end of each would go through them all.
    """
    entry = traceback_of(exc)
    severed: Any = None if entry is None else entry.tb_frame.f_trace
    return type(severed) is _Severed and bool(severed.get(id(exc), 0) & _ALL_EMPTY)
