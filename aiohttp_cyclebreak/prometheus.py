"""How does Prometheus get the numbers? ``export()``; needs ``prometheus_client``."""

from dataclasses import replace
from typing import List, Set, Tuple, Union
from weakref import WeakKeyDictionary

from aiohttp import web
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, values

from .counts import Stats
from .radar import Watch, find_watch

__all__ = ("export",)

_PREFIX = "aiohttp_cyclebreak_"


def export(app: web.Application, *, registry: CollectorRegistry = REGISTRY) -> None:
    """Export the numbers of an application as metrics of ``prometheus_client``.

    They are brought up to date whenever the radar looks, every ``interval`` of its, and
    several applications of a process are added up.  It takes ``setup(app,
    radar=Radar())``, then ``export(app)``, and whatever serves the registry.

    These are the client's own counters and gauges, not a collector, and so they work
    in its multiprocess mode too, where the gauges are of the processes that live, and
    where all that is exported is added up, in whichever registry.

    Args:
        app: an application, for which ``setup(app, radar=Radar())`` was called.
        registry: where to register the metrics.

    Raises:
        TypeError: *app* is no application, or *registry* no registry.
        LookupError: the application is not watched by a radar.
        ValueError: the registry has another metric of such a name; none was registered.

    See `the client's documentation
    <https://prometheus.github.io/client_python/multiprocess/>`_ of that mode.

    .. versionadded:: 0.1.0
    """
    if not isinstance(registry, CollectorRegistry):
        raise TypeError(f"registry must be a CollectorRegistry, not {registry!r}")
    watch = find_watch(app)
    metrics = _exported.get(registry)
    if metrics is None:
        metrics = _of_process[0] if _of_process else _Metrics()
        metrics.register(registry)
        _exported[registry] = metrics
        if getattr(values.ValueClass, "_multiprocess", False):
            _of_process[:] = [metrics]
    if watch is not None and metrics.show not in watch.on_look:
        watch.on_look.append(metrics.show)
        watch.on_stop.append(metrics.forget)


class _Metrics:
    """The metrics in one registry, and what each application has added to them."""

    def __init__(self) -> None:
        self.alive = Gauge(
            _PREFIX + "requests_alive",
            "Guarded requests that are alive, those being served included.",
            multiprocess_mode="livesum",
            registry=None,
        )
        self.outlived = Gauge(
            _PREFIX + "requests_outlived",
            "Guarded requests that are alive after their response.",
            multiprocess_mode="livesum",
            registry=None,
        )
        self.overdue = Gauge(
            _PREFIX + "requests_overdue",
            "Guarded requests that are alive longer than max_age after their response.",
            ["route"],
            multiprocess_mode="livesum",
            registry=None,
        )
        self.oldest = Gauge(
            _PREFIX + "oldest_overdue_request_age_seconds",
            "How long ago the response of the oldest overdue request was.",
            ["route"],
            multiprocess_mode="livemax",
            registry=None,
        )
        self.severed = Counter(
            _PREFIX + "severed",
            "Exceptions that requests have met and that were severed.",
            ["route", "exception"],
            registry=None,
        )
        self.exceptions = Counter(
            _PREFIX + "exceptions_cut",
            "Exceptions that were severed, causes, contexts and members included.",
            registry=None,
        )
        self.frames = Counter(
            _PREFIX + "frames_cut",
            "Frames that were cleared of their locals, or went with an exception.",
            registry=None,
        )
        self.reports = Counter(
            _PREFIX + "reports",
            "Reports of the radar.",
            registry=None,
        )
        self.errors = Counter(
            _PREFIX + "errors",
            "Failures of aiohttp-cyclebreak itself, or in a callback given to it.",
            registry=None,
        )
        self._all: Tuple[Union[Gauge, Counter], ...] = (
            self.alive,
            self.outlived,
            self.overdue,
            self.oldest,
            self.severed,
            self.exceptions,
            self.frames,
            self.reports,
            self.errors,
        )
        self._errors = 0  # they are of the process
        self._routes: Set[str] = set()
        self._parts: WeakKeyDictionary[Watch, Stats] = WeakKeyDictionary()

    def register(self, registry: CollectorRegistry) -> None:
        """Register all of them, or none."""
        registered: List[Union[Gauge, Counter]] = []
        try:
            for each in self._all:
                registry.register(each)
                registered.append(each)
        except ValueError:
            for each in registered:
                registry.unregister(each)
            raise

    def show(self, watch: Watch, found: Stats) -> None:
        """Show what has changed for one application."""
        before = self._parts.get(watch, Stats())
        self._parts[watch] = found
        for key, times in found.severed.items():
            self.severed.labels(*key).inc(times - before.severed.get(key, 0))
        self.exceptions.inc(found.exceptions - before.exceptions)
        self.frames.inc(found.frames - before.frames)
        self.reports.inc(found.reports - before.reports)
        self.errors.inc(max(0, found.errors - self._errors))
        self._errors = found.errors
        self._show_what_is_alive()

    def forget(self, watch: Watch) -> None:
        """Show no requests of an application that has stopped."""
        found = self._parts.get(watch)
        if found is not None:
            gone = replace(found, alive=0, outlived=0, overdue={}, oldest={})
            self._parts[watch] = gone
            self._show_what_is_alive()

    def _show_what_is_alive(self) -> None:
        parts = list(self._parts.values())
        self.alive.set(sum(each.alive for each in parts))
        self.outlived.set(sum(each.outlived for each in parts))
        overdue = dict.fromkeys(self._routes, 0)  # those that have none any more too
        oldest = dict.fromkeys(self._routes, 0.0)
        for each in parts:
            for route, number in each.overdue.items():
                overdue[route] = overdue.get(route, 0) + number
                oldest[route] = max(oldest.get(route, 0.0), each.oldest[route])
        self._routes.update(overdue)
        for route in overdue:
            self.overdue.labels(route).set(overdue[route])
            self.oldest.labels(route).set(oldest[route])


_exported: "WeakKeyDictionary[CollectorRegistry, _Metrics]" = WeakKeyDictionary()
# In multiprocess mode: a value is in one file there, whichever registry it is in.
_of_process: List[_Metrics] = []
