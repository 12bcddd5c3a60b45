"""What does an exception lead to?"""

import builtins
import gc
import itertools
import sys
from collections import Counter, deque
from types import (
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
    Dict,
    Iterable,
    Iterator,
    List,
    Optional,
    Sequence,
    Tuple,
)

from .frames import callers_of, executed_here, is_finished

__all__ = (
    "attributes_of",
    "detach",
    "exceptions_in",
    "frames_of",
    "goes_by_itself",
    "graph",
    "is_exception",
    "is_instance",
    "leads_on",
    "leads_to",
    "links_of",
    "mro_of",
    "sequence_of_group",
    "set_traceback",
    "traceback_of",
    "unlink",
    "would_be_gone",
)

# Read and written through the descriptors of BaseException itself: a subclass may
# shadow them with properties that raise, or forbid setattr.
_TRACEBACK: Any = BaseException.__dict__["__traceback__"]
_CAUSE: Any = BaseException.__dict__["__cause__"]
_CONTEXT: Any = BaseException.__dict__["__context__"]
_SUPPRESS_CONTEXT: Any = BaseException.__dict__["__suppress_context__"]
_ARGS: Any = BaseException.__dict__["args"]
traceback_of: Callable[[BaseException], Optional[TracebackType]] = _TRACEBACK.__get__
set_traceback: Callable[[BaseException, Optional[TracebackType]], None] = (
    _TRACEBACK.__set__
)
_cause_of: Callable[[BaseException], Optional[BaseException]] = _CAUSE.__get__
_context_of: Callable[[BaseException], Optional[BaseException]] = _CONTEXT.__get__


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


def links_of(exc: BaseException) -> List[Tuple[Any, BaseException]]:
    """The exceptions that one refers to, each with the link by which it does.

    That is a descriptor for :func:`unlink`; of the members of a group there is none.
    """
    cause, context = _cause_of(exc), _context_of(exc)
    group = _group_type()
    links = [(_CAUSE, cause)] if cause is not None else []
    if context is not None:
        links.append((_CONTEXT, context))
    if issubclass(type(exc), group):
        # Again by descriptor: a subclass may shadow the attribute.
        links.extend((None, member) for member in group.exceptions.__get__(exc))
    return links


def sequence_of_group(exc: BaseException) -> Optional[Sequence[Any]]:
    """What a group was made of, if it has that beside its members; None: it is none."""
    group = _group_type()
    if not issubclass(type(exc), group):
        return None
    for each in _ARGS.__get__(exc)[1:2]:
        kind = type(each)  # which a metaclass may compare as it likes
        is_sequence = kind is list or kind is tuple
        if is_sequence and each is not group.exceptions.__get__(exc):
            return each  # type: ignore[no-any-return]
    return ()


def graph(root: BaseException) -> List[BaseException]:
    """Every exception that can be reached from one: causes, contexts, members.

    Args:
        root: where to start.

    Returns:
        The exceptions, the root first, each once, however the chain loops.
    """
    found = [root]
    links = links_of(root)
    if not links:
        return found
    seen = {id(root)}
    for exc in found:  # grows while it is walked: no recursion, however long
        for _, target in links if exc is root else links_of(exc):
            if id(target) not in seen:
                seen.add(id(target))
                found.append(target)
    return found


# Of a class, whose metaclass may lie as well.
_MRO: Callable[[type], Optional[Tuple[type, ...]]] = type.__dict__["__mro__"].__get__
_NAMESPACE: Any = type.__dict__["__dict__"]


def mro_of(cls: type) -> Tuple[type, ...]:
    """A class and its bases, whatever its metaclass says.

    Nothing where CPython has not filled them in: up to 3.9 it has not for the type of
    what ``async for`` awaits.
    """
    return _MRO(cls) or ()


def is_instance(value: object, cls: type) -> bool:
    """Whether a value is of a class, without asking either.

    Those of aiohttp's are abstract: :func:`isinstance` would ask the value's class for
    its hash, and have them remember it.
    """
    # By identity: a metaclass may compare its classes as it likes.  As mro_of()
    # does, without the call: it is asked of very many values.
    for base in _MRO(type(value)) or ():  # noqa: SIM110 - a generator takes longer
        if base is cls:
            return True
    return False


# Not of one call alone, and perhaps large.
_NOT_ENTERED = (
    *(type, ModuleType, FunctionType),
    *(list, tuple, set, frozenset, dict, deque),
)
_MOST_LOOKED_AT = 1_000


def leads_to(exc: BaseException, target: object) -> bool:
    """Whether a local of an exception's finished frames is an object, or leads to it.

    It does by its attributes, and theirs.  No container is entered, nor what a function
    closes over.  Some frames behind the traceback count too: from CPython 3.12 on it
    leads to the coroutines that awaited those in it, and with tasks in pure Python to
    the event loop's.
    """
    found: List[Any] = []
    frames = list(frames_of(exc))
    frames += callers_of(frames)
    for frame in frames:
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
    for base in mro_of(type(value)):
        own = _NAMESPACE.__get__(base).get("__dict__")
        if type(own) in (GetSetDescriptorType, MemberDescriptorType):
            namespace = own.__get__(value)
            if issubclass(type(namespace), dict):
                values = dict.values(namespace)
                attributes += itertools.islice(values, _MOST_LOOKED_AT)
            break
    return attributes


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


_LONGEST_CHAIN = 20
# One instance that many requests raise has the entries of all.
_MOST_ENTRIES = 200
_MOST_HELD = 100


def would_be_gone(
    exceptions: List[BaseException], index: int, noted: Callable[[BaseException], int]
) -> Optional[bool]:
    """Whether an exception and its causes would be gone, if nobody had noted them.

    That is so if nobody else has one of these, of their tracebacks or of the finished
    frames there, and none leads back to itself.

    Args:
        exceptions: a list of who has noted it.
        index: where it is: who calls may have no reference of its own.
        noted: gives how many such lists an exception is in.

    Returns:
        That; None: it would not be, and never will, for nobody else has one of these
        and could change that one leads back to itself.
    """
    # References: those lists, the argument.  Most often somebody has it still.
    if sys.getrefcount(exceptions[index]) != noted(exceptions[index]) + 1:
        return False
    found = graph(exceptions[index])
    entries = itertools.chain.from_iterable(map(frames_of, found))
    if (
        len(found) > _LONGEST_CHAIN
        or next(itertools.islice(entries, _MOST_ENTRIES, None), None) is not None
    ):
        return False
    known = Counter({id(exc): noted(exc) for exc in found})
    parts = _parts_of(found)
    del found, entries
    leads = _leads_of(parts)
    known.update(itertools.chain.from_iterable(leads.values()))
    for each in parts.values():
        # References: those that are known, the dict, the variable, the argument.
        if sys.getrefcount(each) != known[id(each)] + 3:
            return False
    return None if _leads_back(leads) else True


def _parts_of(exceptions: List[BaseException]) -> Dict[int, Any]:
    """What exceptions are made of, by id.

    Those are themselves, their tracebacks, the finished frames there, and what holds
    attributes, arguments and the members of groups, if one of those has some of these:
    many have their cause there a second time.
    """
    parts: Dict[int, Any] = {id(exc): exc for exc in exceptions}
    executing = executed_here()
    for exc in exceptions:
        entry = traceback_of(exc)
        while entry is not None:
            parts[id(entry)] = entry
            # A frame that goes on is that of who has swallowed the exception.
            frame = entry.tb_frame
            if is_finished(frame) and id(frame) not in executing:
                parts[id(frame)] = frame
            entry = entry.tb_next
    outer = list(filter(_is_container, gc.get_referents(*exceptions)))
    inner = list(filter(_is_container, gc.get_referents(*outer)))  # what makes a group
    for value in inner + outer:
        if any(id(each) in parts for each in gc.get_referents(value)):
            parts[id(value)] = value
    return parts


def _is_container(value: object) -> bool:
    kind = type(value)  # which a metaclass may compare as it likes
    return (kind is dict or kind is tuple or kind is list) and len(value) <= _MOST_HELD  # type: ignore[arg-type]


def _leads_of(parts: Dict[int, Any]) -> Dict[int, List[int]]:
    """To which others each of some objects leads, by id."""
    return {
        key: [id(own) for own in gc.get_referents(parts[key]) if id(own) in parts]
        for key in parts
    }


def _leads_back(leads: Dict[int, List[int]]) -> bool:
    """Whether one of some objects leads to itself, given what each leads to."""
    led_to = Counter(itertools.chain.from_iterable(leads.values()))
    outside = [key for key in leads if key not in led_to]
    for key in outside:  # grows while it is walked
        for each in leads[key]:
            led_to[each] -= 1
            if not led_to[each]:
                outside.append(each)
    return len(outside) < len(leads)


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
        kind = type(value)  # which a metaclass may compare as it likes
        if is_exception(value):
            found.append(value)
        elif lists and (kind is list or kind is tuple or kind is dict):
            if len(value) > _MOST_GATHERED:
                continue
            # Copied in one step: another thread may change it.
            for each in list(value.values() if kind is dict else value):
                if is_exception(each):
                    found.append(each)
                elif type(each) is tuple and len(each) <= _LONGEST_ROW:
                    found += filter(is_exception, each)
    return found


def detach(exc: BaseException) -> None:
    """Take the traceback off an exception."""
    set_traceback(exc, None)


def unlink(exc: BaseException, link: Any) -> None:
    """Cut one of the links that :func:`links_of` gives."""
    suppress = _SUPPRESS_CONTEXT.__get__(exc)
    link.__set__(exc, None)
    _SUPPRESS_CONTEXT.__set__(exc, suppress)  # setting __cause__ changes it
