"""Who holds it? The shortest chain of references to an object.

Read from an object backwards with ``gc.get_referrers()``, level by level, to what
is alive by itself; or, where there is no such thing, to a reference cycle.  Nothing
is collected, changed or kept, and no value is ever shown.
"""

import asyncio
import gc
import inspect
import sys
import threading
import time
from dataclasses import dataclass
from itertools import compress, islice
from types import (
    FrameType,
    ModuleType,
    TracebackType,
)
from typing import (
    Any,
    Collection,
    Dict,
    Generator,
    Iterable,
    Iterator,
    List,
    Optional,
    Sequence,
    Set,
    Tuple,
)

from aiohttp import web

from . import internals
from .counts import module_of
from .exceptions import is_instance
from .frames import COUNTS_ARE_EXACT
from .naming import (
    attribute_name,
    described,
    frame_name,
    frame_of,
    global_name,
    how_held,
    is_dict_of,
    is_of,
    is_resumable,
    local_name,
    values_of,
    variables_of,
)
from .patterns import advise, marks_of, recognise

__all__ = ("Chain", "Link", "chains", "shortest_chain")

# Packages whose objects and frames only run a test, by what their modules' names
# begin with.
_RUNNERS = (
    "_pytest",
    "pluggy",
    "pytest",
    "pytest_aiohttp",
    "pytest_asyncio",
    "xdist",
    "execnet",
)
# asyncio's own frames: the event loop that they run is a holder, they are not.
_MACHINERY = (*_RUNNERS, __package__, "asyncio", "uvloop", "unittest", "threading")
# A running function holds these to pass arguments, or to go through a loop.
_PASSING = (tuple, enumerate, zip, map)
_CHUNK = 64  # objects a call of gc.get_referrers(), which compares with each
_SMALL_CHUNK = 8  # takes a third of the time, for the fewer objects of one target
_SLICE = 10_000  # tasks that are looked at without a pause


@dataclass(frozen=True)
class Link:
    """One object of a chain.

    Attributes:
        type: what it is: the name of its type, or that of a module, a class or a
            function; of a frame or a coroutine, that of its function.
        holds: how it holds the next one: an attribute, a variable, an index; empty
            for the last.
        file: for a frame, a coroutine or a function, the file of its code.
        line: and the line that it is at, or where it begins.

    .. versionadded:: 0.1.0
    """

    type: str
    holds: str = ""
    file: Optional[str] = None
    line: Optional[int] = None

    def __str__(self) -> str:
        text = self.type
        if self.file is not None:
            text += f" ({self.file}:{self.line})"
        return f"{text}: {self.holds}" if self.holds else text


@dataclass(frozen=True)
class Chain:
    """What holds an object: the shortest chain of references to it.

    Attributes:
        links: from what holds the object to the object; the object alone where the
            cycle leads through it.
        kind: ``"delayed"``: a reference cycle holds it until the cyclic garbage
            collector runs; ``"live"``: something that runs, waits or is open holds
            it, and ends; ``"permanent"``: a module, a class or an application
            holds it, and nothing ends that; ``"unknown"``: not found in time, or
            hidden by ``gc.freeze()``.
        cycle: the reference cycle, for ``"delayed"``: its first object is its last, and
            the first of *links* too.
        leak: what stands before the slash in the id of the catalogue's entries whose
            pattern it is, or None.
        advice: what to do about it.

    .. versionadded:: 0.1.0
    """

    links: Tuple[Link, ...]
    kind: str
    cycle: Tuple[Link, ...] = ()
    leak: Optional[str] = None
    advice: str = ""

    def __str__(self) -> str:
        lines = [_HEADINGS[self.kind]]
        if self.cycle:
            lines += _indent(self.cycle)
            if len(self.links) > 1:
                lines += ["which leads on to it:", *_indent(self.links)]
        else:
            lines += _indent(self.links)
        return "\n".join([*lines, self.advice])


_HEADINGS = {
    "delayed": "in a reference cycle, until the garbage collector runs:",
    "live": "held by something that is not over:",
    "permanent": "held for good:",
    "unknown": "held by something that was not found:",
}


def _indent(links: Iterable[Link]) -> List[str]:
    return [f"    {link}" for link in links]


def shortest_chain(
    target: object, *, ignore: Iterable[object] = (), budget: Optional[float] = None
) -> Optional[Chain]:
    """Find the shortest chain of references from what holds an object to it.

    The caller's own variables are never counted as holders, nor is what runs a test.

    Args:
        target: the object, which the garbage collector must track.
        ignore: objects that are not counted as holders; a frame stands for its
            local variables.
        budget: how long to look, in seconds; None: to the end.  It is looked at
            between steps: the longest of these is one pass over all objects.

    Returns:
        The chain; None when nothing else is seen to hold the object.  What a function
        that runs holds is not always seen before CPython 3.13.

    .. versionadded:: 0.1.0
    """
    caller = sys._getframe(1)  # noqa: SLF001
    return chains([target], ignore=[*ignore, ignore, caller], budget=budget)[0]


def chains(
    targets: Sequence[object],
    *,
    ignore: Iterable[object] = (),
    budget: Optional[float] = None,
) -> List[Optional[Chain]]:
    """Find the chain of each of several objects, in one search.

    Args:
        targets: the objects.
        ignore: as for :func:`shortest_chain`; so are the caller's variables.
        budget: as there, for all of them.

    Returns:
        What :func:`shortest_chain` gives for each, in their order.

    .. versionadded:: 0.1.0
    """
    caller = sys._getframe(1)  # noqa: SLF001
    # A target may be among what is ignored: that list would seem to hold it.
    search = _Search(targets, [*ignore, ignore, targets, caller], budget)
    try:
        search.run()
        return [search.chain_of(target) for target in targets]
    finally:
        search.forget()


class Looking:
    """The search for one object's chain, in steps between which other code may run.

    The object, and what leads to it, is held until :meth:`end`.

    Args:
        target: the object.
        most: of how many objects to know who holds them, or else to give up.
    """

    def __init__(self, target: object, *, most: int) -> None:
        self._search = _Search([target], (), None, most, is_careful=True)
        self._steps = self._search.steps()

    def step(self) -> bool:
        """Look at all objects once: not to be called from two threads.

        Returns:
            Whether there is more to look for.
        """
        return next(self._steps, self) is None

    def chain(self) -> Optional[Chain]:
        """What is known by now: as :func:`shortest_chain`."""
        return self._search.chain_of_first()

    def give_up(self) -> None:
        """Look no further."""
        self._search.give_up()

    def end(self) -> None:
        """Let go of every object."""
        self._steps.close()
        self._search.forget()


@dataclass(frozen=True)
class _Root:
    """Why an object is alive by itself.

    Attributes:
        kind: that of the chain.
        link: what comes before the object, if it is not the object itself.
    """

    kind: str
    link: Optional[Link] = None


class _Search:
    """The objects that lead to the targets, and why they live.

    Objects are held by one list alone and are known by their index in it elsewhere, so
    that the search meets nothing of itself.
    """

    def __init__(
        self,
        targets: Sequence[object],
        ignore: Iterable[object],
        budget: Optional[float],
        most: int = sys.maxsize,
        is_careful: bool = False,
    ) -> None:
        self._most = most  # of the objects that may be met
        # With what runs in other threads of a service: see variables_of().
        self._is_careful = is_careful and sys.version_info < (3, 13)
        self._pauses = False
        self._deadline = None if budget is None else time.monotonic() + budget
        self._late = False
        self._objects: List[Any] = []
        self._index: Dict[int, int] = {}
        self._holders: List[List[int]] = []  # who holds it
        self._held: List[List[int]] = []  # what it holds, of these objects
        self._counted: List[int] = []  # the references that were met
        self._asked: Set[int] = set()  # of whom the holders are known
        self._live: Dict[int, _Root] = {}  # roots, and those that they hold
        self._roots: Dict[int, _Root] = {}
        self._modules = {
            id(vars(module)): name
            for name, module in list(sys.modules.items())
            if type(module) is ModuleType
        }
        self._ignored: Set[int] = set()
        # The collector sees what a task holds, but gc.get_referrers() does not: in C,
        # its base class is asked and the answer dropped (TaskObj_traverse()).  From
        # CPython 3.12 on so it is with the attributes of any future.
        self._futures: List[Any] = []
        self._of_futures: Dict[int, List[int]] = {}
        self._never = {id(self._objects), id(self._futures), id(gc.garbage)}
        self._never.update(id(each) for each in ignore)
        self._frames: Dict[int, _Root] = {}  # by the id of a variable's value
        self._running: Set[int] = set()
        self._references: Dict[int, int] = {}  # those of the variables that run
        self._look_at_frames()
        for target in targets:
            self._add(target)
        self._targets = len(self._objects)

    def forget(self) -> None:
        """Let go of every object."""
        self._objects.clear()
        self._futures.clear()

    # What runs.

    def _look_at_frames(self) -> None:
        self._ignored = set(self._never)
        self._frames.clear()
        self._running.clear()
        self._references.clear()
        frames = list(sys._current_frames().items())  # noqa: SLF001
        while frames:  # popped, since one that held itself would be a reference cycle
            thread, frame = frames.pop()
            self._look_at(frame, thread != threading.get_ident())
            if frame.f_back is not None:
                frames.append((thread, frame.f_back))
            del frame

    def _look_at(self, frame: FrameType, elsewhere: bool) -> None:
        self._running.add(id(frame))
        if _belongs_to(frame.f_globals, _MACHINERY):
            self._ignored.add(id(frame))
        if not frame.f_code.co_flags & inspect.CO_OPTIMIZED:
            return  # its variables are those of a module or a class
        variables = None
        if not (elsewhere and self._is_careful):
            variables = variables_of(frame, elsewhere, self._ignored)
        if variables is None:
            variables = [("", value) for value in values_of(frame)]
        for name, value in variables:
            self._references[id(value)] = self._references.get(id(value), 0) + 1
            if id(frame) not in self._ignored:
                link = _frame_link(frame, local_name(name))
                self._frames.setdefault(id(value), _Root("live", link))

    # Who leads where.

    def _add(self, each: Any) -> int:
        index = self._index.get(id(each))
        if index is None:
            index = self._index[id(each)] = len(self._objects)
            self._objects.append(each)
            self._holders.append([])
            self._held.append([])
            self._counted.append(0)
        return index

    def run(self) -> None:
        """Look at the holders, and theirs, until it is known who is alive."""
        self._futures += [
            each for each in gc.get_objects() if issubclass(type(each), asyncio.Future)
        ]
        self._look_at_futures(0, len(self._futures))
        for _ in self._look_from_targets(_CHUNK):
            pass
        if not self._late:
            self._look_outside()

    def steps(self) -> "Generator[None, None, None]":
        """Do as :meth:`run` does, with a pause after each pass over all objects.

        Of futures only tasks are asked: those are known without a list of all objects.
        """
        self._pauses = True
        self._futures += internals.all_tasks()
        for start in range(0, len(self._futures), _SLICE):
            self._look_at_futures(start, start + _SLICE)
            yield
            self._look_at_frames()
        for _ in self._look_from_targets(_SMALL_CHUNK):
            yield
            self._look_at_frames()

    def give_up(self) -> None:
        """Look no further; what is not known by now is unknown."""
        self._late = True
        self._spread()

    def _look_at_futures(self, start: int, end: int) -> None:
        for position, future in enumerate(self._futures[start:end], start):
            for each in gc.get_referents(future):
                self._of_futures.setdefault(id(each), []).append(position)

    def _look_from_targets(self, chunk: int) -> Iterator[None]:
        for index in range(self._targets):
            self._look_for_root(index)
        while not self._late:
            # Among them what was not needed when it was found, but is by now.
            frontier = sorted(self._needed() - self._asked, key=self._order)
            if not frontier:
                break
            for start in range(0, len(frontier), chunk):
                if self._is_late():
                    break
                self._look_behind(frontier[start : start + chunk])
                yield
            self._spread()

    def _is_late(self) -> bool:
        if self._deadline is not None and time.monotonic() > self._deadline:
            self._late = True
        if len(self._objects) > self._most:
            self._late = True
        return self._late

    def _needed(self) -> Set[int]:
        """What leads to a target of which it is not known that it lives."""
        needed = {each for each in range(self._targets) if each not in self._live}
        walk = list(needed)
        for each in walk:
            for holder in self._holders[each]:
                if holder not in needed and holder not in self._live:
                    needed.add(holder)
                    walk.append(holder)
        return needed

    def _look_behind(self, frontier: List[int]) -> None:
        self._asked.update(frontier)
        holders = {
            id(self._futures[position]): self._futures[position]
            for each in frontier
            for position in self._of_futures.get(id(self._objects[each]), ())
        }
        self._ignored.add(id(holders))
        asked = tuple([self._objects[each] for each in frontier])
        for holder in self._some(gc.get_referrers(*asked)):
            if holder is not asked:
                holders[id(holder)] = holder
        self._note(holders.values(), frontier)

    def _some(self, holders: List[Any]) -> List[Any]:
        """Those of many that end the search, and as many others as may be met."""
        if len(holders) <= self._most:
            return holders
        # Each would take its time in Python.
        roots = self._modules.keys() | self._frames.keys() | self._running
        are_roots = map(roots.__contains__, map(id, holders))
        first = islice(compress(holders, are_roots), self._most)
        return [*first, *islice(holders, self._most)]

    def _note(self, holders: Iterable[Any], frontier: Iterable[int]) -> None:
        """Note who holds what."""
        ids = {id(self._objects[each]): each for each in frontier}
        known = len(self._objects)
        for holder in holders:
            held: Dict[int, int] = {}
            for each in filter(ids.__contains__, map(id, _referents(holder))):
                held[ids[each]] = held.get(ids[each], 0) + 1
            for index, references in held.items():
                self._counted[index] += references
            if not held or self._is_ignored(holder):
                continue
            index = self._add(holder)
            self._held[index] += held
            for noted in held:
                self._holders[noted].append(index)
        for index in range(known, len(self._objects)):
            self._look_for_root(index)

    def _is_ignored(self, holder: Any) -> bool:
        kind = type(holder)
        if id(holder) in self._ignored:
            return True
        if kind is FrameType:
            return _belongs_to(holder.f_globals, _RUNNERS)
        if is_resumable(holder):
            frame = frame_of(holder)
            return frame is not None and (
                id(frame) in self._ignored or _belongs_to(frame.f_globals, _RUNNERS)
            )
        return is_of(module_of(kind), _RUNNERS)

    def _look_for_root(self, index: int) -> None:
        each = self._objects[index]
        root = None
        if id(each) in self._modules or type(each) is ModuleType:
            root = _Root("permanent")
        elif id(each) in self._frames:
            root = self._frames[id(each)]
        elif id(each) in self._running or _is_open_loop(each):
            root = _Root("live")
        if root is not None:
            self._roots[index] = self._live[index] = root

    def _spread(self) -> None:
        """What a live object holds is alive."""
        walk = list(self._live)
        for index in walk:
            for held in self._held[index]:
                if held not in self._live:
                    self._live[held] = self._live[index]
                    walk.append(held)

    def _look_outside(self) -> None:
        """See who is held by what ``gc.get_referrers()`` does not show."""
        if not COUNTS_ARE_EXACT or _is_frozen():
            return
        for index in self._missing():
            self._roots[index] = self._live[index] = _Root("live", _OUTSIDE)
        self._spread()

    def _missing(self) -> List[int]:
        """The objects to which there are more references than were met."""
        return [
            index
            for index in sorted(self._needed())
            if index >= self._targets
            and not self._is_passing(index)
            # The argument of the call is a reference too.
            and sys.getrefcount(self._objects[index]) - 1
            > self._counted[index] + self._references.get(id(self._objects[index]), 0)
        ]

    def _is_passing(self, index: int) -> bool:
        kind = type(self._objects[index])
        is_one = any(kind is each for each in _PASSING)
        return is_one and not self._holders[index]

    def _order(self, index: int) -> Tuple[str, ...]:
        return described(self._objects[index], self._modules)[0], str(index).zfill(9)

    # From the root, or the cycle, to the target.

    def chain_of_first(self) -> Optional[Chain]:
        """Put the chain of the first target into words; who asks need not have it."""
        return self.chain_of(self._objects[0])

    def chain_of(self, each: object) -> Optional[Chain]:
        """Put the chain of one target into words."""
        target = self._index[id(each)]
        if target in self._live:
            return self._live_chain(target)
        if self._late or _is_frozen():
            return self._unknown(target)
        cycle = self._cycle(target)
        if cycle is None:
            return None
        path = self._path([cycle[0]], target)
        if is_dict_of(self._objects[cycle[0]], self._objects[cycle[-2]]):
            cycle = [cycle[-2], *cycle[:-1]]  # begin with the owner
            path = [cycle[0], *path]
        if not self._still_leads([*cycle, *path[1:]]):
            return self._unknown(target)
        return self._describe("delayed", path, cycle)

    def _path(self, starts: Collection[int], end: int) -> List[int]:
        """The shortest way from one of several objects to another."""
        came_from: Dict[int, int] = dict.fromkeys(starts, -1)
        walk = list(starts)
        for each in walk:
            if each == end:
                break
            for held in self._held[each]:
                if held not in came_from:
                    came_from[held] = each
                    walk.append(held)
        path = [end]
        while came_from[path[-1]] >= 0:
            path.append(came_from[path[-1]])
        return path[::-1]

    def _live_chain(self, target: int) -> Chain:
        roots = [each for each in self._behind(target) if each in self._roots]
        way = min(
            (self._path([root], target) for root in roots),
            key=lambda way: (
                len(way),
                self._roots[way[0]].kind != "permanent",
                [self._order(each)[0] for each in way],
            ),
        )
        if not self._still_leads(way):
            return self._unknown(target)
        return self._describe(self._roots[way[0]].kind, way)

    def _still_leads(self, path: List[int]) -> bool:
        """Whether each of these still holds the next, after what ran in the pauses."""
        # To tell another chain may have moved attributes from an object into its dict.
        return not self._pauses or all(
            id(self._objects[held]) in map(id, _referents(self._objects[holder]))
            for holder, held in zip(path, path[1:])
        )

    def _behind(self, target: int) -> List[int]:
        walk = [target]
        seen = {target}
        for each in walk:
            for holder in self._holders[each]:
                if holder not in seen:
                    seen.add(holder)
                    walk.append(holder)
        return walk

    def _cycle(self, target: int) -> Optional[List[int]]:
        """The shortest cycle nearest to the target: its first is also its last."""
        distance = {target: 0}
        walk = [target]
        for each in walk:
            for holder in self._holders[each]:
                if holder not in distance:
                    distance[holder] = distance[each] + 1
                    walk.append(holder)
        best: Optional[List[int]] = None
        for each in walk:
            if best is not None and distance[each] > distance[best[0]]:
                break
            cycle = self._way_back(each)
            if cycle is not None and (best is None or len(cycle) < len(best)):
                best = cycle
        return best

    def _way_back(self, start: int) -> Optional[List[int]]:
        came_from: Dict[int, int] = {}
        walk = [start]
        for each in walk:
            for held in self._held[each]:
                if held == start:
                    way = [start, each]
                    while way[-1] != start:
                        way.append(came_from[way[-1]])
                    return way[::-1]
                if held not in came_from:
                    came_from[held] = each
                    walk.append(held)
        return None

    def _unknown(self, target: int) -> Chain:
        farthest = self._behind(target)[-1]
        return self._describe("unknown", self._path([farthest], target))

    # In words.

    def _describe(
        self, kind: str, path: List[int], cycle: Optional[List[int]] = None
    ) -> Chain:
        objects = [self._objects[each] for each in path]
        root = self._roots.get(path[0]) if cycle is None else None
        leading = None if root is None else root.link
        start = _start(objects)
        if start is not None and cycle is None and kind != "unknown":
            objects = objects[start:]
            leading = None
            kind = "permanent" if is_instance(objects[0], web.Application) else "live"
        looped = [self._objects[each] for each in cycle or ()]
        whole = [*looped, *objects[1:]] if looped else objects
        links, loop = self._links(objects), self._links(looped)
        if leading is not None:
            links = (leading, *links)
        marks = {mark for each in whole for mark in marks_of(each)}
        marks.update(link.holds for link in (*loop, *links))
        leak = recognise(kind, marks)
        return Chain(links, kind, loop, leak, advise(kind, leak, marks))

    def _links(self, objects: List[Any]) -> Tuple[Link, ...]:
        links: List[Link] = []
        for position, each in enumerate(objects):
            following = objects[position + 1 : position + 2]
            before = objects[position - 1] if position else None
            if following and before is not None and is_dict_of(each, before):
                continue  # said by its owner
            if following and type(each) is type(following[0]) is TracebackType:
                continue  # it is a list of them
            holds = ""
            if following:
                holds = how_held(each, following[0])
                if is_dict_of(following[0], each) and objects[position + 2 :]:
                    holds = attribute_name(each, objects[position + 2])
            what, file, line = described(each, self._modules)
            if id(each) in self._modules:
                holds = global_name(each, following[0]) if following else ""
            links.append(Link(what, holds, file, line))
        return tuple(links)


_OUTSIDE = Link("something in C, or a temporary value", "holds")


# CPython 3.12 counts what is immortal as frozen, some hundred objects; a program that
# freezes does so when it has imported what it needs, and those are many thousand.
_IMMORTAL = 10_000


def _is_frozen() -> bool:
    return gc.get_freeze_count() > _IMMORTAL


def _referents(each: Any) -> List[Any]:
    """What an object refers to."""
    if issubclass(type(each), ModuleType):
        # In CPython 3.12 asyncio's own, in C, also gives the objects of its free list,
        # which die a second time when they are let go.
        return [object.__getattribute__(each, "__dict__")]  # a lazy one would load
    return gc.get_referents(each)


def _belongs_to(namespace: Dict[str, Any], packages: Sequence[str]) -> bool:
    return is_of(dict.get(namespace, "__name__"), packages)


def _is_open_loop(each: Any) -> bool:
    if not issubclass(type(each), asyncio.AbstractEventLoop):
        return False
    try:
        return not each.is_closed()
    except Exception:  # it is no loop, it only inherits from one
        return False


def _frame_link(frame: FrameType, holds: str) -> Link:
    return Link(frame_name(frame), holds, frame.f_code.co_filename, frame.f_lineno)


def _start(objects: Sequence[Any]) -> Optional[int]:
    """Where to begin to tell: how one of these is held is no news."""
    for index in range(len(objects) - 2, -1, -1):
        each = objects[index]
        if is_instance(each, web.Application) or _is_open_loop(each):
            return index
        if issubclass(type(each), asyncio.Task) and not each.done():
            return index
    return None
