"""What was asked for? The options, checked when they are given, and the kill switch."""

import inspect
import os
from dataclasses import dataclass, field
from typing import Any, Callable, Optional, Set, Tuple, Type

from aiohttp import web

from .complaints import logger

__all__ = (
    "BodyReleasedError",
    "BreakEvent",
    "Options",
    "check_function",
    "is_off",
    "make_options",
    "switched_off",
)

_VARIABLE = "AIOHTTP_CYCLEBREAK"
# What has been logged of the switch: once in a process, however often it is asked.
_logged: Set[str] = set()


@dataclass(frozen=True)
class BreakEvent:
    """What was cut for one exception of one request, given to ``on_break``.

    It never holds a path, a query, a header or a body.

    Attributes:
        method: the request's method.
        route: the canonical path of its route, such as ``/users/{name}``; None
            where no route matched.
        exception: the type of the exception that the request met.
        exceptions: how many exceptions were severed: itself, its causes and
            contexts, the members of groups.
        tracebacks: how many entries of their tracebacks hold nothing any more.
        frames: how many frames were cleared of their locals.

    .. versionadded:: 0.1.0
    """

    method: str
    route: Optional[str]
    exception: Type[BaseException]
    exceptions: int
    tracebacks: int
    frames: int


class BodyReleasedError(web.PayloadAccessError):
    """A request's body is read after it was let go.

    Raised by ``await request.read()`` and its like, in a background task that
    outlives the response, where ``release_body=True`` was asked for.  Read the body
    before the response, and hand over what was read.

    .. versionadded:: 0.1.0
    """

    def __init__(self) -> None:
        super().__init__(
            "the body was let go after the response, as release_body=True of "
            "aiohttp_cyclebreak says: read it before, and keep what was read"
        )

    def __reduce__(self) -> Tuple[Any, ...]:
        return type(self), ()  # not the message: it takes none when it is unpickled


@dataclass(frozen=True)
class Options:
    """What one ``cyclebreak()``, ``setup()`` or decorator was asked for."""

    clear_frames: bool = True
    keep: Optional[Callable[[web.Request, BaseException], bool]] = None
    on_break: Optional[Callable[[BreakEvent], Any]] = None
    release_body: bool = False
    # As on_break, for the library itself: told after the quick way to sever too.
    listener: Optional[Callable[[BreakEvent], None]] = None

    are_default: bool = field(init=False, compare=False)
    are_silent: bool = field(init=False, compare=False)

    def __post_init__(self) -> None:
        # Found out once for all requests: whether no option rules out the quick ways to
        # sever, and whether there is nobody, either, who would be told of it.
        default = self.clear_frames and self.keep is None and self.on_break is None
        object.__setattr__(self, "are_default", default)
        object.__setattr__(self, "are_silent", default and self.listener is None)


def make_options(
    clear_frames: Any, keep: Any, on_break: Any, release_body: Any
) -> Options:
    """Check the options of a call.

    Raises:
        TypeError: an option is of the wrong type; the message names it.
    """
    for name, value in (("clear_frames", clear_frames), ("release_body", release_body)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, not {value!r}")
    for name, function, arguments in (
        ("keep", keep, ("request", "exception")),
        ("on_break", on_break, ("event",)),
    ):
        if function is None:
            continue
        if not callable(function):
            raise TypeError(f"{name} must be a function or None, not {function!r}")
        # It would make one of each exception, which is true, and so keep them all.
        if (
            name == "keep"
            and isinstance(function, type)
            and issubclass(function, BaseException)
        ):
            raise TypeError(
                f"{name} must be a function, not the class {function!r}, such as "
                f"lambda request, exc: isinstance(exc, {function.__name__})"
            )
        check_function(name, function, arguments)
    return Options(clear_frames, keep, on_break, release_body)


def check_function(
    name: str, function: Callable[..., Any], arguments: Tuple[str, ...]
) -> None:
    """Check a function that an option is.

    Args:
        name: the option.
        function: what it is.
        arguments: what it is called with, in words.

    Raises:
        TypeError: it is a coroutine function, or does not take so many arguments.
    """
    # Nobody would await it, and what it returns is always true.
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004
    ):
        raise TypeError(
            f"{name} must be a plain function, not the coroutine function {function!r}"
        )
    # It would fail whenever it is called, and a keep= that fails keeps.
    try:
        signature = inspect.signature(function)
    except Exception:  # of a function in C, or an object that says nothing
        return
    try:
        signature.bind(*arguments)
    except TypeError as exc:
        raise TypeError(
            f"{name} is called with {' and '.join(f'the {each}' for each in arguments)}"
            f", which {function!r} does not take: {exc}"
        ) from None


def switched_off() -> bool:
    """Whether the environment variable ``AIOHTTP_CYCLEBREAK`` says ``off``."""
    value = os.environ.get(_VARIABLE, "").strip().lower()
    if value not in ("", "on", "off"):
        _log_once(
            f"{_VARIABLE}={value} is not understood and changes nothing: set it to off "
            "or on"
        )
    return value == "off"


def is_off(what: str) -> bool:
    """As :func:`switched_off`; if so, it is logged.

    Args:
        what: what does nothing then, in words.
    """
    if not switched_off():
        return False
    _log_once(f"{_VARIABLE}=off: {what}")
    return True


def _log_once(text: str) -> None:
    if text not in _logged:
        _logged.add(text)
        logger.warning("%s", text)
