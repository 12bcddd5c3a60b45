"""How does an application install it? ``cyclebreak()`` and ``setup()``."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Awaitable, Callable, Optional
from weakref import WeakSet

from aiohttp import web

from . import calls, internals
from .connections import (
    keeping_connections,
    settled_connections,
    undecided_connections,
)
from .guard import begin, begin_again, note, note_http_exception, passed
from .holders import in_hand
from .internals import connection_of_plain
from .options import BreakEvent, Options, is_off, make_options
from .radar import Radar, Watch, watch_application, watch_of

__all__ = ("cyclebreak", "setup")

if TYPE_CHECKING:  # these have moved between the supported versions
    from aiohttp.typedefs import Handler, Middleware
else:  # a framework may ask each middleware for its type hints, or what makes one
    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
    Middleware = Callable[[web.Request, Handler], Awaitable[web.StreamResponse]]

# What setup() made, to know it again.  Each has in an attribute what setup() was asked
# for: a keep= may lead to the application, and would keep it if it were held here.
_ends: "WeakSet[Middleware]" = WeakSet()
_ASKED = "asked"

HTTPException = web.HTTPException  # looked up for every request
_NOT_GUARDED = "requests are not guarded"


def cyclebreak(
    *,
    clear_frames: bool = True,
    keep: Optional[Callable[[web.Request, BaseException], bool]] = None,
    on_break: Optional[Callable[[BreakEvent], Any]] = None,
    release_body: bool = False,
) -> "Middleware":
    """Make the middleware that lets requests go as soon as they are answered.

    ``app.middlewares.append(cyclebreak())`` is all there is to write.  Exceptions
    that pass are noted, and severed once the request's own task is done: after the
    response, aiohttp's "Error handling request" and the access log.  If no middleware
    is outside of this one, an exception that nobody else has may wait until the
    connection's next request has been handled, or the connection ends: aiohttp itself
    keeps it for as long, as the last response.  Appended last, the middleware is the
    innermost, and sees what handlers raise before another one of the application
    swallows it; for what outer middlewares raise, see :func:`setup`.

    Args:
        clear_frames: empty the frames in the tracebacks of what was severed.  The
            tracebacks stay, and print in full.  With False it is the other way
            round: frames keep their locals, and exceptions lose their tracebacks;
            an exception that one of those locals keeps then stays with its frame.
        keep: called with the request and an exception, each cause, context and
            member of a group too, before it is severed; where it returns true, the
            exception and all that it leads to are left exactly as they were.  Another
            request that has raised the same instance is asked for itself.
        on_break: called with a :class:`BreakEvent` after each severing at the end of
            a request, once for each guard of the request that it was given to.  What a
            task still has in hand then is severed later, and nobody is told of that.
        release_body: let go of a request's body, read or not, and of its parsed form
            once the response is sent, whoever has the request.  Whoever reads it then
            gets a :class:`BodyReleasedError`.  With False only a body that was read is
            let go, and only if nobody but the connection has the request.

    An error in *keep* or *on_break* is logged once, on the logger
    ``aiohttp_cyclebreak``, and swallowed.  After one in *keep* the exception is kept;
    *on_break* is called after the cut, which stands.

    The environment variable ``AIOHTTP_CYCLEBREAK=off`` makes it a middleware that
    does nothing, which is logged.

    Returns:
        A middleware for :attr:`aiohttp.web.Application.middlewares`.

    Raises:
        TypeError: an option is of the wrong type.  An application that has
            ``cyclebreak`` itself among its middlewares raises it as it starts.

    See `aiohttp issue #10548 <https://github.com/aio-libs/aiohttp/issues/10548>`_.

    .. versionadded:: 0.1.0
    """
    options = make_options(clear_frames, keep, on_break, release_body)
    if is_off(_NOT_GUARDED):
        return _pass_through
    return _make_layer(options)


internals.refuse_as_middleware(
    cyclebreak,
    "cyclebreak is no middleware, it makes one: add cyclebreak(), with parentheses, to "
    "the middlewares",
)


def setup(
    app: web.Application,
    *,
    clear_frames: bool = True,
    keep: Optional[Callable[[web.Request, BaseException], bool]] = None,
    on_break: Optional[Callable[[BreakEvent], Any]] = None,
    release_body: bool = False,
    radar: Optional[Radar] = None,
) -> None:
    """Install the middleware at both ends of an application's chain.

    The outermost end sees all that a middleware raises.  The innermost ends, one in the
    application and one in each of its sub-applications, see what a handler raises
    before a middleware swallows it.  What is added to the application later, up to its
    start, is between the ends as well, and an end that was taken off is put back.
    Called twice for one application, it does nothing the second time, be it with the
    same options or without any.

    Args:
        app: the application, not started yet.
        clear_frames: as for :func:`cyclebreak`.
        keep: as for :func:`cyclebreak`.
        on_break: as for :func:`cyclebreak`.
        release_body: as for :func:`cyclebreak`.
        radar: watch the requests of this application, and report those that are
            still alive long after their response; :func:`stats` then gives numbers.

    With ``AIOHTTP_CYCLEBREAK=off`` it does nothing, which is logged.

    Raises:
        TypeError: *app* is no application, or an option is of the wrong type.
        RuntimeError: the application is frozen, or options are given the second time
            that are others than those of the first.

    .. versionadded:: 0.1.0
    """
    if not isinstance(app, web.Application):
        raise TypeError(f"app must be an aiohttp.web.Application, not {app!r}")
    options = make_options(clear_frames, keep, on_break, release_body)
    if radar is not None and not isinstance(radar, Radar):
        raise TypeError(f"radar must be a Radar or None, not {radar!r}")
    if app.middlewares.frozen:
        raise RuntimeError(
            f"{app!r} is frozen, it takes no middleware any more: call setup() "
            "before the application is started or added to another one"
        )
    if is_off(_NOT_GUARDED) or _is_set_up(app, options, radar):
        return
    asked = options
    if radar is None:
        outermost = _make_layer(options)
    else:
        watch = Watch(radar)
        options = replace(options, listener=watch.counts.count)
        outermost = _make_watching_layer(options, watch.add)
        watch_application(app, outermost, watch)
    innermost = _make_inner_layer(options, outermost)
    _ends.add(outermost)
    vars(outermost)[_ASKED] = asked
    app.middlewares.insert(0, outermost)
    app.middlewares.append(innermost)

    async def reach_the_ends(app: web.Application) -> None:
        # Only now is it known what came after setup(), and what was taken off.
        if not app.middlewares.frozen:
            internals.take_off(app, outermost)
            app.middlewares.insert(0, outermost)
        if not internals.has_middlewares(app, outermost, innermost):
            # Nobody swallows what it would see.
            if not app.middlewares.frozen:
                internals.take_off(app, innermost)
            return
        for each in (app, *internals.subapps(app)):
            internals.make_innermost(each, innermost)

    on_startup: Any = app.on_startup  # aiohttp 3.10 declares its functions wrongly
    on_startup.append(reach_the_ends)


def _is_set_up(app: web.Application, options: Options, radar: Optional[Radar]) -> bool:
    """Whether :func:`setup` was called for an application before.

    Raises:
        RuntimeError: it was, and with other options than these.
    """
    for middleware in internals.functions_among_middlewares(app):
        if middleware not in _ends:
            continue
        if options not in (Options(), vars(middleware)[_ASKED]):
            raise RuntimeError(
                f"setup() was called for {app!r} before, with other options: call it "
                "once, with all of them"
            )
        watch = watch_of(app)
        if radar is not None and (watch is None or watch.radar != radar):
            raise RuntimeError(
                f"setup() was called for {app!r} before, and not with {radar!r}: call "
                "it once, with all its options"
            )
        return True
    return False


@web.middleware
async def _pass_through(request: web.Request, handler: "Handler") -> web.StreamResponse:
    return await handler(request)


def _make_layer(options: Options) -> "Middleware":
    @web.middleware
    async def cyclebreak_middleware(
        request: web.Request, handler: "Handler"
    ) -> web.StreamResponse:
        if (
            keeping_connections
            or in_hand
            or undecided_connections
            or calls.are_followed
        ):
            begin(request, options)
        try:
            response = await handler(request)
        except HTTPException as exc:
            note_http_exception(request, exc, options, cyclebreak_middleware)
            raise
        except BaseException as exc:
            note(request, exc, options)
            raise
        # Most keep nothing, on a connection that is followed already and has nothing of
        # an earlier one: this is all that they pay for.
        if (
            id(connection_of_plain(request, response)) not in settled_connections
            or calls.are_followed
        ):
            passed(request, response, options)
        return response

    return cyclebreak_middleware


def _make_watching_layer(
    options: Options, add: Callable[[web.Request], None]
) -> "Middleware":
    @web.middleware
    async def cyclebreak_middleware(
        request: web.Request, handler: "Handler"
    ) -> web.StreamResponse:
        add(request)
        begin(request, options)
        try:
            response = await handler(request)
        except BaseException as exc:
            note(request, exc, options)
            raise
        passed(request, response, options)
        return response

    return cyclebreak_middleware


def _make_inner_layer(options: Options, outermost: "Middleware") -> "Middleware":
    # What is returned is looked at by the outermost layer alone.
    @web.middleware
    async def cyclebreak_middleware(
        request: web.Request, handler: "Handler"
    ) -> web.StreamResponse:
        if in_hand or undecided_connections:
            begin_again(request, options)
        try:
            return await handler(request)
        except HTTPException as exc:
            note_http_exception(request, exc, options, outermost, True)
            raise
        except BaseException as exc:
            note(request, exc, options)
            raise

    return cyclebreak_middleware
