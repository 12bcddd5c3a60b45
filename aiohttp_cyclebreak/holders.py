"""Who needs an exception still? Whoever has noted it, and whoever runs with it.

What several requests have, and what a task of the application has in hand, is severed
when the last of them is done with it.
"""

import asyncio
import contextlib
import os
import threading
from collections import deque
from contextvars import Context, copy_context
from functools import partial
from types import TracebackType
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Container,
    Deque,
    Dict,
    Iterable,
    List,
    Optional,
    Set,
    Tuple,
)
from weakref import WeakKeyDictionary, ref

from aiohttp import web

from . import internals
from .complaints import complain
from .exceptions import (
    exceptions_in,
    frames_of,
    graph,
    leads_on,
    links_of,
    traceback_of,
    would_be_gone,
)
from .frames import COUNTS_ARE_EXACT, is_finished
from .running import (
    awaiting_frames,
    awaits_in,
    handled_by,
    in_flight,
    is_of_thread,
)
from .sever import sever
from .tracebacks import drop_ended_entries

if TYPE_CHECKING:
    from .connections import Connection

__all__ = (
    "FIRST_PAUSE",
    "MOST_NOTED",
    "Holder",
    "InUse",
    "SortedOut",
    "Watching",
    "in_hand",
    "leave",
    "look_into",
    "pending",
    "somebody_has",
    "sort_out",
)

# Neither of these keeps anything alive.  By the id of an exception, who has noted it,
# and is not gone: each under the id of its reference, since thousands may have noted
# one, and each of them is taken out alone.
in_hand: "Dict[int, Dict[int, ref[Holder]]]" = {}
# Connections that have put an exception off, by its id.
pending: "Dict[int, ref[Connection]]" = {}

# When a request has noted so many exceptions, all but the last half are severed while
# it goes on: a handler can stream for ever, and its calls fail again and again.
MOST_NOTED = 100

_SOON = 1.0  # seconds

# Seconds until what was not swallowed yet is looked at again; then twice as many.
FIRST_PAUSE = 0.1

# The newest exceptions are looked at: one request may fail again and again.
_MOST_LOOKED_AT = 10

# Threads may have loops of their own, and requests with the same exceptions.  It can be
# taken again by who has it, as a weak reference's callback may come at any moment.
_changing = threading.RLock()


def _renew_lock() -> None:
    """Have another lock in a forked process: who has this one may not be there."""
    global _changing
    _changing = threading.RLock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_renew_lock)


# Who is gone without an end, and is to be taken out by who has the lock next.
_gone: "Deque[Tuple[Iterable[int], ref[Holder]]]" = deque()


def _forget_holder(keys: Iterable[int], holder: "ref[Holder]") -> None:
    """Forget who had exceptions in hand, and is gone since its loop was closed.

    A collection may call this in a thread that has a lock of the application's, or of
    logging, for which a finalizer waits in the thread that has ours.
    """
    _gone.append((keys, holder))
    lock = _changing
    if lock.acquire(blocking=False):
        try:
            _forget_gone()
        finally:
            lock.release()


def _forget_gone() -> None:
    while True:
        try:
            keys, holder = _gone.popleft()
        except IndexError:  # it is empty; a collection in between may call this too
            return
        for key in keys:
            _take_from_hand(key, holder)


def _take_from_hand(key: int, holder: "ref[Holder]") -> None:
    with _changing:
        holders = in_hand.get(key)
        if holders is not None:
            holders.pop(id(holder), None)
            if not holders:
                in_hand.pop(key, None)


if TYPE_CHECKING:
    _RequestReference = ref[web.BaseRequest]
else:  # which cannot be subscripted before Python 3.9
    _RequestReference = ref


class Watching(_RequestReference):
    """A weak reference of the library's own: nobody reads a request's body by it."""

    __slots__ = ()


class Holder:
    """Who has exceptions in hand, and is to be done with them."""

    __slots__ = (
        "exceptions",
        "frame_ids",
        "is_looked_at",
        "leading_to",
        "noted",
        "pause",
        "reference",
        "staying",
        "task",
        "timer",
        "__weakref__",
    )

    def __init__(self, task: "asyncio.Future[Any]") -> None:
        self.task: ref[Any] = ref(task)
        # Whether the event loop is to look for what was swallowed, and the timer that
        # has it look again for what was not yet.
        self.is_looked_at = False
        self.timer: Optional[asyncio.TimerHandle] = None
        self.pause = FIRST_PAUSE
        self.exceptions: List[BaseException] = []
        # By the id of each of those, the ids of it and of what it leads to; and by each
        # of these, how many lead to it.
        self.noted: Dict[int, List[int]] = {}
        self.leading_to: Dict[int, int] = {}
        # The ids of those that were swallowed and are in a cycle, which stay: who tries
        # again and again leaves one each time, and is not to have them all looked at.
        self.staying: Set[int] = set()
        # By the id of an exception, its traceback, if that is long, and the ids of the
        # frames there.
        self.frame_ids: Dict[int, Tuple[Optional[TracebackType], Set[int]]] = {}
        self.reference: Optional[ref[Holder]] = None

    def note(self, root: BaseException) -> None:
        if id(root) in self.noted:
            return
        self.exceptions.append(root)
        own = self.reference
        if own is None:
            forget = partial(_forget_holder, self.leading_to)
            own = self.reference = ref(self, forget)
        found = graph(root) if leads_on(root) else [root]
        self.noted[id(root)] = list(map(id, found))
        for key in self.noted[id(root)]:
            number = self.leading_to[key] = self.leading_to.get(key, 0) + 1
            if number > 1:
                continue
            with _changing:
                if _gone:
                    _forget_gone()
                holders = None
                # A collection in between may call the function above.
                while holders is None or in_hand.get(key) is not holders:
                    holders = in_hand.setdefault(key, {})
                    holders[id(own)] = own
        if len(found) > MOST_NOTED:
            # Where each failure leads to all before it, the last one is enough.
            self._take_out(found[1:])

    def look_soon(self) -> None:
        """Look for what was swallowed as soon as the task waits for something."""
        self.pause = FIRST_PAUSE
        task = self.task()
        if self.is_looked_at or task is None or not COUNTS_ARE_EXACT:
            return
        loop = task.get_loop()
        if loop is asyncio.get_running_loop():  # not so in a thread with its own
            self.is_looked_at = True
            # In the context of the task: finalizers may ask for its variables.
            loop.call_soon(self.forget_swallowed)

    def let_go_of_swallowed(self) -> bool:
        """Let go of what would be gone without us, since somebody has swallowed it.

        Who tries again, or does something else instead, may need what the locals of the
        failed attempt have and give back with them: a lock, a connection of a pool.

        Returns:
            Whether it was looked for.
        """
        if not COUNTS_ARE_EXACT or not self._can_forget():
            return False
        noted = self.exceptions
        swallowed: List[BaseException] = []
        for index in range(max(0, len(noted) - _MOST_LOOKED_AT), len(noted)):
            key = id(noted[index])
            if key in self.staying:
                continue
            is_gone = would_be_gone(noted, index, _times_noted)
            if is_gone:
                swallowed.append(noted[index])
            elif is_gone is None:
                self.staying.add(key)
        if swallowed:
            # With its causes, which may have been noted before it.
            self._take_out([exc for root in swallowed for exc in graph(root)])
            self._tell_of_dropped(swallowed)
        return True

    def forget_swallowed(self) -> None:
        """Let go of what was swallowed, and look for it again while there is more."""
        try:
            self.is_looked_at = False
            task = self.task()
            # Most often it is done: all is looked at next.
            if task is None or task.done() or not self.let_go_of_swallowed():
                return
            self._stop_timer()
            if self.exceptions:
                # It is in an ``except`` block that waits, for one.  The timer does not
                # hold this, which may have ended by then.
                look = partial(_forget_swallowed, ref(self), copy_context())
                self.timer = task.get_loop().call_later(
                    self.pause, look, context=Context()
                )
                self.pause *= 2
        except Exception:
            complain("looking for what was swallowed")

    def _can_forget(self) -> bool:
        """Whether nothing but the count of references is to be asked."""
        return True

    def _tell_of_dropped(self, roots: List[BaseException]) -> None:
        """Have what goes by itself counted as severed."""

    def _stop_timer(self) -> None:
        """Have nothing wait any more, and hold the context of what has ended."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _let_go(self) -> None:
        own = self.reference
        if own is not None:
            for key in list(self.leading_to):
                _take_from_hand(key, own)
            self.leading_to = {}
            self.noted = {}
            self.staying = set()
            self.frame_ids = {}
            self.reference = None

    def _take_out(self, exceptions: List[BaseException]) -> None:
        """Let go of some exceptions, and keep the others in hand."""
        out = {id(exc) for exc in exceptions if id(exc) in self.noted}
        newer: List[BaseException] = []
        # Most often those are the newest: of thousands not all are gone through.
        while out and self.exceptions:
            exc = self.exceptions.pop()
            if id(exc) not in out:
                newer.append(exc)
                continue
            out.remove(id(exc))
            self._forget(id(exc))
        self.exceptions += reversed(newer)

    def _forget(self, root: int) -> None:
        self.staying.discard(root)
        for key in self.noted.pop(root):
            # Another thread may note something meanwhile: no number is relied on.
            number = self.leading_to.pop(key, 1) - 1
            if number:
                self.leading_to[key] = number
                continue
            self.frame_ids.pop(key, None)
            if self.reference is not None:
                _take_from_hand(key, self.reference)


def _times_noted(exc: BaseException) -> int:
    """How many have noted an exception itself; of very many, none."""
    holders = list(in_hand.get(id(exc), {}).values())  # another thread may change it
    if len(holders) > _MOST_LOOKED_AT:
        return 0
    times = 0
    for found in holders:
        holder = found()
        if holder is not None and id(exc) in holder.noted:
            times += 1
    return times


def _forget_swallowed(reference: "ref[Holder]", context: Context) -> None:
    holder = reference()
    if holder is not None:
        context.run(holder.forget_swallowed)


def somebody_has(exc: BaseException) -> bool:
    """Whether somebody who is not done with an exception has noted it."""
    if id(exc) in in_hand:
        return True
    found = pending.get(id(exc))
    connection = None if found is None else found()
    return connection is not None and connection.needs(exc)


class InUse:
    """What tasks that are suspended need: their frames, and what they have in hand."""

    __slots__ = ("exceptions", "frames")

    def __init__(self) -> None:
        self.frames: Set[int] = set()  # by id
        self.exceptions: Dict[int, BaseException] = {}


def look_into(tasks: "Iterable[asyncio.Task[Any]]", lists: bool = False) -> InUse:
    """Look, from a callback of the event loop, at what its tasks need.

    Args:
        tasks: those; one that is done needs its outcome, which may still be asked for.
        lists: whether exceptions in lists count too, as ``gather()`` gives them, and
            in what is made of these.
    """
    in_use = InUse()
    for task in tasks:
        if task.done():
            found = exceptions_in([internals.outcome_of(task)], lists)
        else:
            coroutine = task.get_coro()
            in_use.frames |= awaiting_frames(coroutine)
            found = handled_by(coroutine, lists)
        for exc in found:
            in_use.exceptions.update((id(below), below) for below in graph(exc))
    return in_use


# With so many frames in a traceback their ids are remembered.
_MANY_FRAMES = 100


class Spared:
    """The ids of the frames in the tracebacks of exceptions that are needed.

    They are looked up only when something is severed: most often nothing is.
    """

    __slots__ = ("_ids", "exceptions")

    def __init__(self) -> None:
        self.exceptions: List[BaseException] = []  # held, so that an id stays its own
        self._ids: List[Set[int]] = []

    def __contains__(self, key: object) -> bool:
        if not self._ids:
            few: Set[int] = set()
            self._ids.append(few)
            for exc in self.exceptions:
                ids = _frame_ids_of(exc)
                if len(ids) < _MANY_FRAMES:
                    few |= ids
                else:
                    self._ids.append(ids)
        return any(key in ids for ids in self._ids)


def _frame_ids_of(exc: BaseException) -> Set[int]:
    # One instance that thousands of requests raise has the frames of all in its
    # traceback, and the end of each asks for them.  Who has noted it last remembers
    # them, since it most likely ends last.
    holders = in_hand.get(id(exc), {})
    newest: Optional[ref[Holder]] = None
    with contextlib.suppress(RuntimeError):  # another thread changes it
        newest = next(reversed(holders.values()), None)
    last = None if newest is None else newest()
    if last is not None and id(exc) in last.frame_ids:
        known, ids = last.frame_ids[id(exc)]
        if known is traceback_of(exc):
            return ids
    ids = {id(frame) for frame in frames_of(exc)}
    if last is not None and len(ids) >= _MANY_FRAMES:
        last.frame_ids[id(exc)] = traceback_of(exc), ids
    return ids


class SortedOut:
    """What of some exceptions is to be severed, and what of them is needed."""

    __slots__ = ("in_flight", "kept", "ready", "spared")

    def __init__(self) -> None:
        self.kept: Set[int] = set()  # the ids of those to be left alone for good
        self.ready: List[Tuple[BaseException, List[BaseException]]] = []
        self.in_flight: List[BaseException] = []
        self.spared = Spared()


def sort_out(
    roots: List[BaseException],
    in_use: Optional[InUse] = None,
    is_kept: Optional[Callable[[BaseException], bool]] = None,
) -> SortedOut:
    """Find out what of some exceptions, and of all that they lead to, nobody needs.

    Args:
        roots: what was noted.
        in_use: what tasks need that go on; None: nothing.
        is_kept: asked of each exception whether it is to be left alone for good; None:
            none is.
    """
    if in_use is None:
        in_use = InUse()
    sorted_out = SortedOut()
    covered: Set[int] = set()
    kept: Dict[int, BaseException] = {}
    sorted_out.spared.exceptions += in_use.exceptions.values()
    # Latest first, so that the whole of a chain comes before its parts.
    for root in reversed(roots):
        exceptions = [exc for exc in graph(root) if id(exc) not in covered]
        covered.update(map(id, exceptions))
        if is_kept is not None:
            for exc in exceptions:
                if id(exc) not in kept and is_kept(exc):
                    kept.update((id(below), below) for below in graph(exc))
        own = []
        for exc in exceptions:
            if id(exc) in kept or somebody_has(exc):
                sorted_out.spared.exceptions.append(exc)
            elif id(exc) in in_use.exceptions or in_flight(exc, in_use.frames):
                if id(exc) not in in_use.exceptions:  # those may be reported whole
                    drop_ended_entries(exc)
                sorted_out.spared.exceptions.append(exc)
                sorted_out.in_flight.append(exc)
            else:
                own.append(exc)
        if own:
            sorted_out.ready.append((root, own))
    sorted_out.kept.update(kept)
    if sorted_out.in_flight:
        _spare_causes(sorted_out)
    running = {id(frame) for exc in sorted_out.in_flight for frame in frames_of(exc)}
    if running:  # what shares a frame with one of those is to be looked at again too
        for _, own in sorted_out.ready:
            sorted_out.in_flight += [
                exc for exc in own if any(id(f) in running for f in frames_of(exc))
            ]
    return sorted_out


def _spare_causes(sorted_out: SortedOut) -> None:
    """Leave what somebody runs with its causes, to be looked at again as that is.

    The traceback of a cause ends where it was caught, which may be in a function that
    is over, while who runs with what was raised from it still reports both.
    """
    needed: Set[int] = set()
    found = list(sorted_out.in_flight)
    while found:
        exc = found.pop()
        if id(exc) not in needed:
            needed.add(id(exc))
            found += [target for _, target in links_of(exc)]
    ready, sorted_out.ready = sorted_out.ready, []
    for root, exceptions in ready:
        own = [exc for exc in exceptions if id(exc) not in needed]
        if len(own) < len(exceptions):
            causes = [exc for exc in exceptions if id(exc) in needed]
            sorted_out.spared.exceptions += causes
            # First: of very many a connection keeps the last, which lead to them.
            sorted_out.in_flight[:0] = causes
        if own:
            sorted_out.ready.append((root, own))


class _LeftOver:
    """Exceptions that tasks or threads have in hand, and nobody who has noted them.

    Nobody tells when one of those is done with one, so they are looked at again when
    more have come, and soon.  One is held weakly; if its class does not allow that, as
    built-in ones do not, it is held until one look: to hold it for longer could keep
    what nobody else does.  That of a thread is held for a while: most often the thread
    has handed it on from its ``except`` block, and is in there for an instant more.
    """

    __slots__ = ("exceptions", "has_timer", "held", "is_scheduled", "limit")

    def __init__(self) -> None:
        self.exceptions: Dict[int, Tuple[Callable[[], Any], bool, Container[int]]] = {}
        # With the time of the loop until which each is.
        self.held: Dict[int, Tuple[BaseException, bool, Container[int], float]] = {}
        self.has_timer = False  # one for all of them
        # Each look goes through all that is held and all tasks: with many of those it
        # waits for more.
        self.limit = 1
        self.is_scheduled = False

    def add(self, exc: BaseException, clear_frames: bool, kept: Container[int]) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + _SOON
        try:
            self.exceptions[id(exc)] = ref(exc), clear_frames, kept
        except TypeError:
            self.held[id(exc)] = exc, clear_frames, kept, end
        if not self.has_timer:
            self._look_at(end)
        if (
            len(self.exceptions) + len(self.held) >= self.limit
            and not self.is_scheduled
        ):
            self.is_scheduled = True
            loop.call_soon(self.look, context=Context())

    def _look_at(self, end: float) -> None:
        self.has_timer = True
        loop = asyncio.get_running_loop()
        loop.call_at(end, self.look_in_the_end, context=Context())

    def look_in_the_end(self) -> None:
        self.has_timer = False
        self.look()
        if self.held:  # what has come later than the first
            self._look_at(min(end for *_, end in self.held.values()))

    def look(self) -> None:
        try:
            self.is_scheduled = False
            held, self.held = self.held, {}
            left = {key: each[:3] for key, each in held.items()}
            for key, (found, clear_frames, kept) in list(self.exceptions.items()):
                exc = found()
                if exc is None:
                    del self.exceptions[key]
                else:
                    left[key] = exc, clear_frames, kept
            tasks = asyncio.all_tasks() if left else set()
            exceptions = [exc for exc, _, _ in left.values()]
            in_use = look_into(_tasks_behind(exceptions, tasks))
            now = asyncio.get_running_loop().time()
            for key, (exc, clear_frames, kept) in left.items():
                sorted_out = sort_out([exc], in_use, partial(_is_among, kept))
                for _, own in sorted_out.ready:
                    sever(own, clear_frames=clear_frames, spared=sorted_out.spared)
                if not sorted_out.in_flight:
                    self.exceptions.pop(key, None)
                elif (
                    key in held
                    and held[key][3] > now
                    and any(map(is_of_thread, sorted_out.in_flight))
                ):
                    self.held[key] = held[key]
            while len(self.exceptions) > MOST_NOTED + len(tasks):
                del self.exceptions[next(iter(self.exceptions))]
            while len(self.held) > MOST_NOTED:
                del self.held[next(iter(self.held))]
            left_over = len(self.exceptions) + len(self.held)
            self.limit = left_over + max(1, len(self.held) // 2, len(tasks) // 8)
        except Exception:
            complain("looking for what is left over")


def _is_among(ids: Container[int], exc: BaseException) -> bool:
    return id(exc) in ids


def _tasks_behind(
    exceptions: List[BaseException], tasks: "Iterable[asyncio.Task[Any]]"
) -> "List[asyncio.Task[Any]]":
    """Those tasks whose frames are in the tracebacks of exceptions."""
    suspended = {
        id(frame): frame.f_code
        for exc in exceptions
        for below in graph(exc)
        for frame in frames_of(below)
        if not is_finished(frame)
    }
    if not suspended:
        return []
    codes = set(map(id, suspended.values()))
    return [task for task in tasks if awaits_in(task.get_coro(), suspended, codes)]


_left_over: "WeakKeyDictionary[asyncio.AbstractEventLoop, _LeftOver]" = (
    WeakKeyDictionary()
)


def leave(
    exceptions: Iterable[BaseException],
    clear_frames: bool = True,
    kept: Container[int] = (),
) -> None:
    """Leave what tasks have in hand, to be severed when they are done with it.

    Args:
        exceptions: what they have.
        clear_frames: as for :func:`sever`.
        kept: the ids of those among what these lead to that are left alone for good.
    """
    for exc in exceptions:
        loop = asyncio.get_running_loop()
        if loop not in _left_over:
            _left_over[loop] = _LeftOver()
        _left_over[loop].add(exc, clear_frames, kept)
