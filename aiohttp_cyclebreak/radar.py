"""What still leaks? Watches requests by weak reference, and reports who holds them."""

import asyncio
import importlib
import sys
import time
from collections import deque
from dataclasses import dataclass, fields
from typing import (
    TYPE_CHECKING,
    Any,
    AsyncIterator,
    Callable,
    Deque,
    Dict,
    Iterator,
    List,
    Optional,
    Set,
)
from weakref import WeakKeyDictionary, ref

from aiohttp import web

from . import internals
from .complaints import complain, errors, logger
from .connections import kept_requests
from .counts import UNMATCHED, Counts, Stats, canonical_path, type_name
from .holders import Watching
from .options import switched_off

if TYPE_CHECKING:
    from aiohttp.typedefs import Middleware

    from .chains import Looking

__all__ = ("Radar", "Watch", "find_watch", "stats", "watch_application", "watch_of")

_SLICE = 500  # requests that are looked at without a pause
_MANY = 10_000  # requests to remember before those that are gone are forgotten
_MOST = 5_000  # objects that a search may come across
_MOST_ROUTES = 10  # in a report

# Seconds that one pass over all objects takes for each block of allocated memory:
# twice what it takes on a slow machine.  Used until one was measured.
_PASS = 20e-9


@dataclass(frozen=True)
class Radar:
    """Look for requests that are alive long after their response, and say who has them.

    ``setup(app, radar=Radar())`` watches every request of the application by a weak
    reference.  One that is alive *max_age* after its response, although its connection
    has gone on or ended, is reported on the logger ``aiohttp_cyclebreak``, as a
    warning: how many by route, their age, and for one of them the shortest chain of
    references that holds it, with names, files and lines, never a value.

    Not reported: a request that is being served, a stream or a websocket that is
    open included; the last one of an idle keep-alive connection; and one whose
    exception another request has in flight.

    It starts and stops with the application.  One object may be given to several
    applications, each of which is then watched, and reported, by itself.

    Args:
        max_age: how long after its response a request may be alive, in seconds.
        interval: how often to look at the requests that are alive, in seconds; ages
            are measured by this, and so is the end of a response.
        report_every: at most one report in so many seconds; none as long as each
            request that is overdue was counted in an earlier one, and a chain was shown
            for each of their routes.
        budget: how long the search for a chain may keep the event loop from its work,
            all its steps together, in milliseconds.
        max_pause: how long one of these steps may, in milliseconds.  One is a pass
            over all objects of the process, and cannot be interrupted: a search that
            would take longer steps is not made, and the report says so.

    Raises:
        TypeError: an option is not a number.
        ValueError: an option is not positive and finite.

    .. versionadded:: 0.1.0
    """

    max_age: float = 30.0
    interval: float = 5.0
    report_every: float = 60.0
    budget: float = 500.0
    max_pause: float = 100.0

    def __post_init__(self) -> None:
        for each in fields(self):
            value: Any = getattr(self, each.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{each.name} must be a number, not {value!r}")
            if not 0 < value < float("inf"):
                raise ValueError(
                    f"{each.name} must be a positive number and finite, not {value!r}"
                )


class _Cohort:
    """Requests of one route that were first seen alive after their response together.

    Attributes:
        route: their route.
        since: when that was.
        requests: weak references to them.
        overdue: whether that is longer ago than allowed.
        reported: whether a report has counted them.
    """

    __slots__ = ("overdue", "reported", "requests", "route", "since")

    def __init__(self, route: str, since: float) -> None:
        self.route = route
        self.since = since
        self.requests: List[ref[web.BaseRequest]] = []
        self.overdue = False
        self.reported = False


class Watch:
    """The requests of one application.

    Nothing here keeps a request alive: it has weak references, and no function that
    waits has another one.
    """

    def __init__(self, radar: Radar) -> None:
        self.radar = radar
        self.counts = Counts()
        # Called after each look, and when the application has stopped.
        self.on_look: List[Callable[[Watch, Stats], None]] = []
        self.on_stop: List[Callable[[Watch], None]] = []
        # Each request is in one of these: in the first until its response is over.
        self._unsettled: Deque[ref[web.BaseRequest]] = deque()
        self._cohorts: List[_Cohort] = []
        self._many = _MANY
        self._explained: Dict[str, int] = {}  # by route, how often
        self._last_report = float("-inf")
        self._reports = 0
        self._running = 0
        self._task: Optional[asyncio.Task[None]] = None

    def add(self, request: web.BaseRequest) -> None:
        """Watch a request; this runs for every one."""
        try:
            self._unsettled.append(Watching(request))
            if len(self._unsettled) > self._many:
                self._forget_dead()
        except Exception:
            complain("watching a request")

    def _forget_dead(self) -> None:
        unsettled = self._unsettled
        for _ in range(len(unsettled)):
            reference = unsettled.popleft()
            if reference() is not None:
                unsettled.append(reference)
        self._many = max(_MANY, 2 * len(unsettled))

    # With the application.

    async def run(self, app: web.Application) -> AsyncIterator[None]:
        """Look from time to time, from the start of an application to its end."""
        importlib.import_module(".chains", __package__)  # not when it is needed
        loop = asyncio.get_running_loop()
        self._running += 1  # several runners may serve it
        task = self._task
        if task is None or task.done() or task.get_loop() is not loop:
            self._running = 1
            self._task = loop.create_task(self._look_from_time_to_time())
        yield
        self._running -= 1
        task = self._task
        if self._running == 0 and task is not None:
            task.cancel()
            await asyncio.wait([task])
            self._task = None
            self._tell(time.monotonic())
            for stopped in self.on_stop:
                try:
                    stopped(self)
                except Exception:
                    complain("exporting that an application has stopped")

    async def _look_from_time_to_time(self) -> None:
        while True:
            try:
                await self.look(time.monotonic())
            except Exception:
                complain("the radar")
            await asyncio.sleep(self.radar.interval)

    async def look(self, now: float) -> None:
        """Look at the requests that are alive, and report if there is news."""
        for _ in self._sweep(now):
            await asyncio.sleep(0)
        if self._is_report_due(now):
            await self._report(now)
        self._tell(now)

    def _tell(self, now: float) -> None:
        found = self.stats(now)
        for tell in self.on_look:
            try:
                tell(self, found)
            except Exception:
                complain("exporting what the radar has found")

    # Who is alive.

    def _sweep(self, now: float) -> Iterator[None]:
        new: Dict[str, _Cohort] = {}
        unsettled = self._unsettled
        for number in range(1, len(unsettled) + 1):
            if not unsettled:  # the dead were forgotten meanwhile
                break
            try:
                self._settle(unsettled.popleft(), new, now)
            except Exception:  # of a resource, say, that fails to tell its path
                complain("looking at a request that is alive")
            if number % _SLICE == 0:
                yield
        self._many = max(_MANY, 2 * len(unsettled))
        looked_at = 0
        kept: Optional[Set[int]] = None  # by many connections, perhaps
        for cohort in list(self._cohorts):
            cohort.requests = [each for each in cohort.requests if each() is not None]
            if not cohort.overdue and now - cohort.since >= self.radar.max_age:
                if kept is None:
                    kept = kept_requests()
                    yield
                self._find_overdue(cohort, kept)
            looked_at += 1 + len(cohort.requests)
            if looked_at > 10 * _SLICE:  # which takes as long
                looked_at = 0
                yield
        self._cohorts = [cohort for cohort in self._cohorts if cohort.requests]

    def _settle(
        self, reference: "ref[web.BaseRequest]", new: Dict[str, _Cohort], now: float
    ) -> None:
        request = reference()
        if request is None:
            return
        if internals.has_request(request):
            self._unsettled.append(reference)
            return
        route = self.counts.routes(canonical_path(request) or UNMATCHED)
        cohort = new.get(route)
        if cohort is None or len(cohort.requests) >= _SLICE:
            cohort = new[route] = _Cohort(route, now)
            self._cohorts.append(cohort)
        cohort.requests.append(reference)

    def _find_overdue(self, cohort: _Cohort, kept: Set[int]) -> None:
        cohort.overdue = True
        if kept:
            for each in cohort.requests:
                if id(each()) in kept:
                    self._unsettled.append(each)
            cohort.requests = [
                each for each in cohort.requests if id(each()) not in kept
            ]

    def _overdue(self) -> List[_Cohort]:
        return [each for each in self._cohorts if each.overdue]

    def stats(self, now: float) -> Stats:
        """The numbers, as they are now."""
        overdue: Dict[str, int] = {}
        oldest: Dict[str, float] = {}
        for cohort in self._overdue():
            route, number = cohort.route, len(cohort.requests)
            overdue[route] = overdue.get(route, 0) + number
            oldest[route] = max(oldest.get(route, 0.0), now - cohort.since)
        outlived = sum(len(cohort.requests) for cohort in self._cohorts)
        return Stats(
            alive=outlived + sum(each() is not None for each in list(self._unsettled)),
            outlived=outlived,
            overdue=overdue,
            oldest=oldest,
            severed=dict(self.counts.severed),
            exceptions=self.counts.exceptions,
            frames=self.counts.frames,
            reports=self._reports,
            errors=errors(),
        )

    # What is reported.

    def _is_report_due(self, now: float) -> bool:
        if now - self._last_report < self.radar.report_every:
            return False
        return any(
            not cohort.reported or cohort.route not in self._explained
            for cohort in self._overdue()
        )

    async def _report(self, now: float) -> None:
        self._last_report = now
        self._reports += 1
        text = self._numbers(now)
        overdue = self._overdue()
        for each in overdue:
            each.reported = True
        # A route of which least was said; the oldest request of that.
        chosen = min(
            overdue, key=lambda each: (self._explained.get(each.route, 0), each.since)
        )
        self._explained[chosen.route] = self._explained.get(chosen.route, 0) + 1
        text += f"\nOne of {chosen.route} is "
        try:
            text += await self._explain(chosen.requests[0])
        except Exception as exc:  # of the application's own objects, say
            # Its traceback and its message may show values.
            text += f"held, but the chain could not be told: {type_name(type(exc))}"
        logger.warning("%s", text)

    def _numbers(self, now: float) -> str:
        found = self.stats(now)
        new = sum(len(each.requests) for each in self._overdue() if not each.reported)
        lines = [
            f"requests alive more than {self.radar.max_age:g} s after their response: "
            f"{sum(found.overdue.values())}, {new} of them not reported yet"
        ]
        routes = sorted(found.overdue, key=lambda route: -found.overdue[route])
        lines += [
            f"    {route}: {found.overdue[route]}, the oldest for "
            f"{found.oldest[route]:.0f} s"
            for route in routes[:_MOST_ROUTES]
        ]
        if len(routes) > _MOST_ROUTES:
            lines.append(f"    and {len(routes) - _MOST_ROUTES} more routes")
        return "\n".join(lines)

    async def _explain(self, reference: "ref[web.BaseRequest]") -> str:
        """Say what holds a request, in steps between which the loop goes on."""
        looking = _look_at(reference)
        if looking is None:
            return "gone by now."
        try:
            reason = await self._search(looking)
            chain = looking.chain()
        finally:
            looking.end()
        if chain is None:
            return "held by nothing that the garbage collector knows of any more."
        if chain.kind == "unknown" and reason:
            return f"held by something that was not found: {reason}"
        return str(chain)

    async def _search(self, looking: "Looking") -> str:
        """Look for a chain.

        Returns:
            Why it was given up, or nothing.
        """
        spent = 0.0
        step = sys.getallocatedblocks() * _PASS  # how long it takes, in seconds
        while True:
            if step * 1000 > self.radar.max_pause:
                looking.give_up()
                return (
                    f"one pass over this process's objects takes about "
                    f"{step * 1000:.0f} ms, and max_pause is {self.radar.max_pause:g}."
                )
            if (spent + step) * 1000 > self.radar.budget:
                looking.give_up()
                return (
                    f"it would take longer than {self.radar.budget:g} ms, the budget."
                )
            started = time.perf_counter()
            goes_on = looking.step()
            took = time.perf_counter() - started
            if not goes_on:
                return ""
            spent += took
            step = took
            await asyncio.sleep(0)


def _look_at(reference: "ref[web.BaseRequest]") -> "Optional[Looking]":
    from .chains import Looking  # with the catalogue, which nothing else needs here

    request = reference()
    return None if request is None else Looking(request, most=_MOST)


# By the outermost middleware that setup() made for it.
_watches: "WeakKeyDictionary[Middleware, Watch]" = WeakKeyDictionary()


def watch_application(
    app: web.Application, outermost: "Middleware", watch: Watch
) -> None:
    """Start and stop watching with an application."""
    _watches[outermost] = watch
    app.cleanup_ctx.append(watch.run)


def watch_of(app: web.Application) -> Optional[Watch]:
    """What watches an application, if ``setup()`` was given a radar for it."""
    for middleware in internals.functions_among_middlewares(app):
        if middleware in _watches:
            return _watches[middleware]
    return None


def stats(app: web.Application) -> Stats:
    """Give the numbers of one application, as they are now.

    This counts the requests that are alive: the more there are, the longer it takes.

    Args:
        app: an application, for which ``setup(app, radar=Radar())`` was called.

    Returns:
        A snapshot that does not change.  Where ``AIOHTTP_CYCLEBREAK=off`` all is zero.

    Raises:
        TypeError: *app* is no application.
        LookupError: the application is not watched by a radar.

    .. versionadded:: 0.1.0
    """
    watch = find_watch(app)
    return Stats() if watch is None else watch.stats(time.monotonic())


def find_watch(app: web.Application) -> Optional[Watch]:
    """What watches an application; None where the kill switch says that nothing does.

    Raises:
        TypeError: *app* is no application.
        LookupError: it is not watched by a radar.
    """
    if not isinstance(app, web.Application):
        raise TypeError(f"app must be an aiohttp.web.Application, not {app!r}")
    watch = watch_of(app)
    if watch is None and not switched_off():
        raise LookupError(
            f"{app!r} is not watched: call setup(app, radar=Radar()) for it first"
        )
    return watch
