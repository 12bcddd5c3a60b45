"""How does one route opt in or out? ``break_cycles`` and ``keep_cycles``."""

import asyncio
import functools
import inspect
import sys
from typing import Any, Awaitable, Callable, Generator, Optional, TypeVar

from aiohttp import web
from aiohttp.abc import AbstractView

from .guard import begin, leave_alone, note, passed
from .options import Options, is_off

__all__ = ("break_cycles", "keep_cycles")

_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])
_Around = Callable[[web.Request, Callable[[], Awaitable[Any]]], Awaitable[Any]]

_OPTIONS = Options()
_NOTHING = "decorators change nothing"


def break_cycles(handler: _Decorated) -> _Decorated:
    """Guard one route, with no middleware in the application.

    It does for this route what :func:`cyclebreak` does for all, with the default
    options; what the application's middlewares raise is not seen.  Below the
    middleware it changes nothing, unless :func:`keep_cycles` is around it: of the
    two, the one nearer to the code counts.  Write it below the decorator of an
    :class:`aiohttp.web.RouteTableDef`: that registers what it is given, and knows
    nothing of what is around it.  With ``AIOHTTP_CYCLEBREAK=off`` it changes nothing,
    which is logged.

    Args:
        handler: a coroutine function that is given the request, a
            :class:`aiohttp.web.View` class, or a coroutine method of one.

    Returns:
        A handler of the same name, signature and docstring; a class is changed in
        place and returned.

    Raises:
        TypeError: *handler* is something else.

    .. versionadded:: 0.1.0
    """
    return _decorate("break_cycles", handler, _break)


def keep_cycles(handler: _Decorated) -> _Decorated:
    """Leave the exceptions of one route exactly as they are, under the middleware.

    It stands where :func:`break_cycles` would.

    Args:
        handler: as for :func:`break_cycles`.

    Returns:
        As :func:`break_cycles`.

    Raises:
        TypeError: *handler* is something else.

    .. versionadded:: 0.1.0
    """
    return _decorate("keep_cycles", handler, _keep)


async def _break(request: web.Request, call: Callable[[], Awaitable[Any]]) -> Any:
    leave_alone(request, False)
    begin(request, _OPTIONS)
    try:
        response = await call()
    except BaseException as exc:
        note(request, exc, _OPTIONS)
        raise
    passed(request, response, _OPTIONS)
    return response


async def _keep(request: web.Request, call: Callable[[], Awaitable[Any]]) -> Any:
    leave_alone(request, True)
    return await call()


def _decorate(name: str, handler: _Decorated, around: _Around) -> _Decorated:
    if inspect.isclass(handler):
        if not issubclass(handler, AbstractView):
            raise TypeError(f"@{name}: {handler!r} is a class, but no aiohttp.web.View")
        if handler.__module__.partition(".")[0] == "aiohttp":
            raise TypeError(
                f"@{name} would change {handler!r} for all who use it: decorate a "
                "subclass of yours"
            )
        if not is_off(_NOTHING):
            _wrap_view(handler, around)
        return handler
    if not _is_coroutine_function(handler):
        raise TypeError(
            f"@{name} takes a coroutine function (async def), a web.View class or a "
            f"method of one, not {handler!r}"
        )
    if not _takes_request(handler):
        raise TypeError(f"@{name}: {handler!r} takes no request")
    if is_off(_NOTHING):
        return handler
    wrapper: _Decorated = _wrap_function(handler, around)
    return wrapper


def _is_coroutine_function(handler: Any) -> bool:
    # As aiohttp asks: before Python 3.9 inspect knows of none that is compiled, as by
    # Cython, and such have asyncio's mark.
    return inspect.iscoroutinefunction(handler) or (
        sys.version_info < (3, 14) and asyncio.iscoroutinefunction(handler)
    )


def _takes_request(handler: Any) -> bool:
    function = handler
    while not inspect.isfunction(function):
        inner = getattr(function, "__func__", None) or getattr(function, "func", None)
        if inner is None:  # compiled; for one by mypyc inspect finds no parameters
            return True
        function = inner
    try:
        inspect.signature(handler).bind_partial(None)
    except TypeError:
        return False
    return True


def _wrap_function(handler: Callable[..., Any], around: _Around) -> Any:
    @functools.wraps(handler)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        request = _find_request(args, kwargs)
        if request is None:
            return await handler(*args, **kwargs)
        return await around(request, functools.partial(handler, *args, **kwargs))

    return wrapper


def _find_request(args: Any, kwargs: Any) -> Optional[web.Request]:
    # A function is given the request, a View's method the View, and a method of
    # any other object that object first.
    for arg in args[:2]:
        if isinstance(arg, AbstractView):
            return arg.request
        if isinstance(arg, web.BaseRequest):
            return arg  # type: ignore[return-value]
    # aiohttp gives it by position, a decorator around this one perhaps by its name.
    for arg in kwargs.values():
        if isinstance(arg, web.BaseRequest):
            return arg  # type: ignore[return-value]
    return None


def _wrap_view(view: Any, around: _Around) -> None:
    await_view = view.__await__

    @functools.wraps(await_view)
    def __await__(self: AbstractView) -> Generator[Any, None, Any]:
        call = functools.partial(_View, await_view, self)
        return around(self.request, call).__await__()

    view.__await__ = __await__


class _View:
    """A view, awaited as it would be without the decorator."""

    def __init__(
        self,
        await_view: Callable[[Any], Generator[Any, None, Any]],
        view: AbstractView,
    ) -> None:
        self._await_view = await_view
        self._view = view

    def __await__(self) -> Generator[Any, None, Any]:
        return self._await_view(self._view)
