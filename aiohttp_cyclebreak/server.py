"""How is what lies below the middleware guarded? ``guard_server()``."""

from typing import TYPE_CHECKING, Any, Awaitable, Callable, Optional, Union

import aiohttp
from aiohttp import web

from . import internals
from .connections import (
    follow_connection,
    note_parser_error,
    undecided_connections,
)
from .guard import begin, begin_again, note, note_http_exception, passed
from .holders import in_hand
from .options import BreakEvent, Options, is_off, make_options

if TYPE_CHECKING:
    from aiohttp.typedefs import Handler
else:  # as in middleware
    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

__all__ = ("guard_server",)


def guard_server(
    runner: Union[web.AppRunner, web.ServerRunner],
    *,
    clear_frames: bool = True,
    keep: Optional[Callable[[web.Request, BaseException], bool]] = None,
    on_break: Optional[Callable[[BreakEvent], Any]] = None,
    release_body: bool = False,
) -> None:
    """Guard every connection of one runner, also those that never carry a request.

    A port scanner, a load balancer's probe, a malformed request and a refused
    ``Expect:`` leave reference cycles behind before any middleware runs, and a client
    that goes away while something large is sent to it after all of them.  Call this
    between ``await runner.setup()`` and the start of the first site.  It needs no
    middleware beside it: what handlers and middlewares raise is noted as well, by a
    middleware that it adds at the inner end of the application and its
    sub-applications, and around all of them.  Only this runner is affected.

    It relies on more of aiohttp's internals than the middleware does.

    Args:
        runner: what serves an application or a low-level server.
        clear_frames: as for :func:`cyclebreak`.
        keep: as for :func:`cyclebreak`.
        on_break: as for :func:`cyclebreak`.
        release_body: as for :func:`cyclebreak`.

    Of a malformed request, which has nothing to give to *keep* and *on_break*, neither
    is asked or told.

    Called twice for one runner, it does nothing the second time, be it with the same
    options or without any.  With ``AIOHTTP_CYCLEBREAK=off`` it does nothing at all,
    which is logged.

    Raises:
        TypeError: *runner* is no runner, or an option is of the wrong type.
        RuntimeError: the runner is not set up yet, a site of it has been started
            already, options are given the second time that are others than those of
            the first, or this aiohttp has other internals than those known.

    See `aiohttp issue #10548 <https://github.com/aio-libs/aiohttp/issues/10548>`_: a
    connection without a request has that as well.

    .. versionadded:: 0.1.0
    """
    if not isinstance(runner, (web.AppRunner, web.ServerRunner)):
        raise TypeError(
            f"runner must be an aiohttp.web.AppRunner or ServerRunner, not {runner!r}"
        )
    options = make_options(clear_frames, keep, on_break, release_body)
    if is_off("the server is not guarded"):
        return
    server = runner.server
    if server is None:
        raise RuntimeError(
            f"{runner!r} has no server yet: await runner.setup() before guard_server()"
        )
    if runner.sites:
        raise RuntimeError(
            f"a site of {runner!r} has been started, and its connections would go "
            "unguarded: call guard_server() before the first site.start()"
        )
    before = internals.options_of_server(server)
    if before is not None:
        if options not in (Options(), before):
            raise RuntimeError(
                f"guard_server() was called for {runner!r} before, with other options: "
                "call it once, with all of them"
            )
        return
    lacking = internals.lacks()
    if lacking:
        raise RuntimeError(
            f"guard_server() does not know aiohttp {aiohttp.__version__}, which has "
            f"no {', '.join(lacking)}: install a newer aiohttp-cyclebreak, or use "
            "setup(app) alone"
        )
    internals.guard_connections(
        server,
        options,
        connected=follow_connection,
        refused=lambda task, exc: note_parser_error(task, exc, clear_frames),
        lost=lambda request, exc: note(request, exc, options),
        around=lambda handler: _guarded(handler, options),
    )
    if isinstance(runner, web.AppRunner):
        _guard_inside(runner.app)


def _guarded(
    handler: Callable[[Any], Awaitable[web.StreamResponse]], options: Options
) -> Callable[[Any], Awaitable[web.StreamResponse]]:
    async def guarded(request: Any) -> web.StreamResponse:
        begin(request, options)
        try:
            response = await handler(request)
        except web.HTTPException as exc:
            note_http_exception(request, exc, options, None)
            raise
        except BaseException as exc:
            note(request, exc, options)
            raise
        passed(request, response, options)
        return response

    return guarded


@web.middleware
async def guarded_middleware(
    request: web.Request, handler: "Handler"
) -> web.StreamResponse:
    """See what handlers raise before a middleware of the application swallows it.

    It is one for all applications, so that each has it once, however many runners
    serve it: the options are those of the one that serves the request.
    """
    if in_hand or undecided_connections:
        options = internals.guard_options(request)
        if options is not None:
            begin_again(request, options)
    try:
        return await handler(request)
    except web.HTTPException as exc:
        options = internals.guard_options(request)
        if options is not None:
            note_http_exception(request, exc, options, None, True)
        raise
    except BaseException as exc:
        options = internals.guard_options(request)
        if options is not None:
            note(request, exc, options)
        raise


def _guard_inside(app: web.Application) -> None:
    if not internals.has_middlewares(app):
        return
    for each in (app, *internals.subapps(app)):
        internals.make_innermost(each, guarded_middleware)
