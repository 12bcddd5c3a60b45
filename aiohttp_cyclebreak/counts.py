"""What has it done, and what is left? The numbers of one application, with names."""

from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Mapping, Optional, Set, Tuple

from aiohttp import web

from . import internals
from .options import BreakEvent

__all__ = ("UNMATCHED", "Counts", "Stats", "canonical_path", "module_of", "type_name")

UNMATCHED = "unmatched"  # the route of a request for which there is none
_OTHER = "other"  # what there are too many of to name each

# An application has so many routes that go wrong, and so many kinds of error; but it
# may make a class for each request, and a resource that names itself after each.
_MOST_NAMES = 200
_MOST_PAIRS = 1000  # of a route and a type

_MODULE: Callable[[type], Any] = type.__dict__["__module__"].__get__
_NAME: Callable[[type], Any] = type.__dict__["__qualname__"].__get__


@dataclass(frozen=True)
class Stats:
    """What :func:`stats` gives: the numbers of one application at one moment.

    A route is a canonical path, such as ``/users/{name}``, never that of a request;
    ``"unmatched"`` where there was none.  An exception is the name of its type with
    that of its module.  The first 200 routes and the first 200 types are named, all
    others are ``"other"``; so are both where there are 1000 pairs already.

    Attributes:
        alive: guarded requests that are alive, those being served included.
        outlived: how many of them are alive after their response, although their
            connection has gone on or ended: what holds them is a background task,
            a reference cycle or a leak.  Counted every ``interval``.
        overdue: how many of those are so for longer than ``max_age``, by route.
        oldest: for how long the oldest of those is, in seconds, by route.
        severed: the exceptions that requests have met and that were severed, each
            with all it leads to, by route and type.
        exceptions: how many exceptions that makes, causes, contexts and members of
            groups included.
        frames: how many frames were cleared of their locals, or went with an exception
            that nobody else held.
        reports: how often the radar has reported.
        errors: how often something failed in this library, or in a *keep* or
            *on_break*, in the whole process.  Each is logged the first time.

    .. versionadded:: 0.1.0
    """

    alive: int = 0
    outlived: int = 0
    overdue: Mapping[str, int] = field(default_factory=dict)
    oldest: Mapping[str, float] = field(default_factory=dict)
    severed: Mapping[Tuple[str, str], int] = field(default_factory=dict)
    exceptions: int = 0
    frames: int = 0
    reports: int = 0
    errors: int = 0


class _Names:
    """The names that are told apart: the first that come, and one for all others."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: Set[str] = set()

    def __call__(self, name: str) -> str:
        if len(self._known) < _MOST_NAMES:
            self._known.add(name)
        return name if name in self._known else _OTHER


class Counts:
    """What was severed for the requests of one application."""

    __slots__ = ("_types", "exceptions", "frames", "routes", "severed")

    def __init__(self) -> None:
        self.routes = _Names()
        self._types = _Names()
        self.severed: Dict[Tuple[str, str], int] = {}
        self.exceptions = 0
        self.frames = 0

    def count(self, event: BreakEvent) -> None:
        """Count one severing, whose exception's class is not kept."""
        route = self.routes(event.route or UNMATCHED)
        key = route, self._types(type_name(event.exception))
        if key not in self.severed and len(self.severed) >= _MOST_PAIRS:
            key = _OTHER, _OTHER
        self.severed[key] = self.severed.get(key, 0) + 1
        self.exceptions += event.exceptions
        self.frames += event.frames


def canonical_path(request: web.BaseRequest) -> Optional[str]:
    """The canonical path of a request's route; None where none matched."""
    resource = getattr(internals.route_of(request), "resource", None)
    canonical: Any = getattr(resource, "canonical", None)
    return canonical if isinstance(canonical, str) else None


def module_of(kind: type) -> Optional[str]:
    """The name of a class's module, whatever its metaclass says."""
    try:
        module = _MODULE(kind)
    except AttributeError:  # it was deleted
        return None
    return module if type(module) is str else None


def type_name(kind: type) -> str:
    """The name of a class with that of its module, whatever its metaclass says."""
    module, name = module_of(kind), str(_NAME(kind))
    return name if module in (None, "builtins") else f"{module}.{name}"
