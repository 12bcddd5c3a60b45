"""When is it safe? Not while a request is in flight: here what goes by is noted.

Nothing about an exception changes before the request's own task is done, which is after
the response, aiohttp's log lines and the access log: see :mod:`.requests`.  Where only
aiohttp can have it, it is left to the connection, without a callback: see
:mod:`.connections`.
"""

import asyncio
import sys
from sys import getrefcount
from typing import Any, Callable, Optional

from aiohttp import web

from . import calls, internals
from .calls import Serving
from .complaints import complain
from .connections import (
    Connection,
    follow_connection,
    followed_connections,
    keeping_connections,
    settled_connections,
    undecided_connections,
)
from .exceptions import leads_on
from .frames import COUNTS_ARE_EXACT
from .holders import MOST_NOTED, in_hand, pending
from .internals import connection_of_response, connection_task
from .options import Options
from .requests import FOLLOWED, Asked, FollowedRequest

__all__ = (
    "begin",
    "begin_again",
    "follow",
    "leave_alone",
    "note",
    "note_http_exception",
    "passed",
)


def begin(request: web.BaseRequest, options: Options) -> None:
    """Take up a request: the one before it on the connection is done for certain.

    Its outgoing calls, here and in child tasks, are followed as the request's.
    """
    try:
        if keeping_connections:
            found = keeping_connections.get(id(connection_task(request)))
            connection = None if found is None else found()
            if connection is not None:
                connection.sever_later_ones()
        if in_hand or undecided_connections:
            begin_again(request, options)
        if not calls.are_followed or not internals.is_request(request):
            return
        serving = calls.current.get()
        if serving is None or serving.request() is not request:
            followed = request.__dict__.get(FOLLOWED)
            if followed is None or not followed.calls:
                calls.current.set(Serving(request, options))
                return
            # Not one for each message of a websocket that a task of others handles.
            serving = followed.calls[0]
            calls.current.set(serving)
        if not any(each is options for each in serving.options):
            serving.options.append(options)
    except Exception:
        complain("taking up a request")


def begin_again(request: web.BaseRequest, options: Options) -> None:
    """Let go of what an earlier attempt at a request has raised, if it was swallowed.

    The next one may look for what that gives back, and not wait for it.  Without an
    exception in hand, or a connection that is undecided, there was none.
    """
    try:
        found = followed_connections.get(id(connection_task(request)))
        connection = None if found is None else found()
        if connection is None or not internals.is_request(request):
            return
        raised_by = connection.raised_by
        if raised_by is not None and internals.is_same(raised_by, request):
            # Who has swallowed it is in its traceback, and goes on.
            follow(raised_by, options)
        if connection.following:
            _let_go_of_swallowed(request)
            original = internals.original_of(request)
            if original is not request:  # as which very many clones are followed
                _let_go_of_swallowed(original)
    except Exception:
        complain("taking up a request again")


def _let_go_of_swallowed(request: web.BaseRequest) -> None:
    followed: Optional[FollowedRequest] = request.__dict__.get(FOLLOWED)
    if followed is not None:
        followed.let_go_of_swallowed()


def follow(
    request: web.BaseRequest, options: Optional[Options]
) -> Optional[FollowedRequest]:
    """Follow a request to the end of its task, if it is not followed yet."""
    if not internals.is_request(request):
        return None
    followed: Optional[FollowedRequest] = request.__dict__.get(FOLLOWED)
    if followed is None:
        task = internals.request_task(request)
        if task is None:
            return None
        connection = follow_connection(request.task)
        if connection is None:
            return None
        if connection.following >= MOST_NOTED:
            # Each is held until the task is done, and that may be of a websocket which
            # dispatches a clone of its request for every message, for days.
            original = internals.original_of(request)
            if original is not request:
                return follow(original, options)
        followed = FollowedRequest(request, connection, task)
        # In its context, not in a copy of that: a finalizer may reset its variables.
        task.add_done_callback(followed.done, context=internals.context_of(task))
        connection.following += 1
        settled_connections.discard(connection.key)
        # Last: if one of these fails, nothing may be noted there, for no end comes.
        request.__dict__[FOLLOWED] = followed
        if connection.put_off is not None:
            exc = connection.take_back_of(request)
            if exc is not None:
                followed.note(exc)
            else:
                connection.sever_put_off(request)
    if options is not None:
        followed.add_options(options)
    if calls.are_followed:
        serving = calls.serving_of(request)
        if serving is not None:
            followed.add_calls(serving)
    return followed


def note(request: web.BaseRequest, exc: BaseException, options: Options) -> None:
    """Remember that an exception went by; nothing about it changes yet."""
    if type(exc) is GeneratorExit:  # the coroutine is thrown away, not the request
        return
    try:
        followed = follow(request, options)
        if followed is not None:
            followed.note_here(exc)
        if not options.are_silent:  # outer layers see what a clone was made of
            original = internals.original_of(request)
            if original is not request:
                follow(original, options)
    except Exception:
        try:
            complain("noting an exception")
        except RecursionError:  # not even for the call is there any stack left
            pass


def _count_references(exc: BaseException) -> int:
    return getrefcount(exc)


async def _raise() -> None:
    raise Exception


async def _count_when_caught() -> int:
    try:
        await _raise()
    except BaseException as exc:
        return _count_references(exc)
    raise AssertionError


# How many references to an exception note_http_exception() counts if nobody else has
# any: as many as in this imitation of a middleware.  What traces the program may have
# some.
_UNSHARED = -1
if COUNTS_ARE_EXACT and sys.gettrace() is None:
    try:
        _count_when_caught().send(None)
    except StopIteration as stop:
        _UNSHARED = stop.value


def note_http_exception(
    request: web.BaseRequest,
    exc: web.HTTPException,
    options: Options,
    middleware: Optional[Callable[..., Any]],
    is_innermost: bool = False,
) -> None:
    """As :func:`note`, for an exception that is most likely the response.

    Most often only aiohttp holds it, and following the request to its end would cost
    more than all the rest.  So its severing is put off: until the connection's next
    request, or, if the request has a body or another middleware may still swallow the
    exception, until the request's task is done.

    Args:
        request: as for :func:`note`.
        exc: as for :func:`note`.
        options: as for :func:`note`.
        middleware: ours that may be the outermost of all; then nobody swallows the
            exception after it.  None: one of ours is for certain.
        is_innermost: whether there is that one and others between, which may.
    """
    try:
        if (
            options.are_silent
            and not calls.are_followed
            # In a task of its own, the outermost may be through with the request.
            and not (is_innermost and internals.own_task(request) is None)
        ):
            task = connection_of_response(request)
            has_body = task is None and not options.release_body
            if has_body:
                task = internals.connection_of_upload(request)
            # As follow_connection() does, without the call.
            found = followed_connections.get(id(task))
            connection = follow_connection(task) if found is None else found()
            if connection is not None and not connection.following:
                is_put_off = connection.put_off is exc  # by a layer further inside
                if not is_put_off and connection.put_off is not None:
                    connection.sever_put_off(request)  # if it is of an earlier one
                if (
                    (is_put_off or connection.put_off is None)
                    and getrefcount(exc) == _UNSHARED + is_put_off  # the attribute
                    and not leads_on(exc)
                    and (
                        is_put_off
                        or (
                            not has_body
                            and (
                                middleware is None
                                or internals.is_outermost(request, middleware)
                            )
                        )
                        or _ask_in_the_end(request, connection)
                    )
                ):
                    connection.put_off = exc
                    connection.raised_by = request
                    pending[id(exc)] = connection.reference
                    settled_connections.discard(connection.key)
                    if not is_put_off and (
                        is_innermost
                        or (
                            connection.asked is request
                            and middleware is not None
                            and not internals.is_outermost(request, middleware)
                        )
                    ):
                        _look_soon(request, connection, options)
                    return
    except Exception:
        try:
            complain("putting off an exception")
        except RecursionError:  # as in note()
            return
    note(request, exc, options)


def _ask_in_the_end(request: web.BaseRequest, connection: Connection) -> bool:
    """Have a request's task asked, once it is done, what became of the request.

    Returns:
        Whether it will be: only the current one is.
    """
    if connection.asked is request:  # by another layer
        return True
    task = internals.own_task(request)
    if task is None:
        return False
    connection.asked = request
    context = internals.context_of(task)  # as in follow()
    task.add_done_callback(Asked(request, connection).done, context=context)
    return True


def _look_soon(
    request: web.BaseRequest, connection: Connection, options: Options
) -> None:
    """Look for a response that was swallowed as soon as its request waits."""
    task = asyncio.current_task()  # its own, or the exception is not put off
    loop = asyncio.get_running_loop()
    undecided_connections.add(connection.key)
    loop.call_soon(_follow_swallowed, request, task, connection, options)


def _follow_swallowed(
    request: web.BaseRequest,
    task: "Optional[asyncio.Task[Any]]",
    connection: Connection,
    options: Options,
) -> None:
    """Follow a request that goes on after it has raised what was put off.

    What other middlewares do next may wait for what the exception's frames have: see
    :meth:`FollowedRequest.forget_swallowed`.
    """
    try:
        undecided_connections.discard(connection.key)
        # Most often it has been answered meanwhile.
        if task is None or task.done() or connection.raised_by is not request:
            return
        followed = follow(request, options)
        if followed is not None:
            followed.forget_swallowed()
    except Exception:
        complain("looking for what was swallowed")


def leave_alone(request: web.BaseRequest, left_alone: bool) -> None:
    """Leave the exceptions of a request alone, or no longer.

    If they are, then those of the one that it is a clone of as well: that is what outer
    layers see.
    """
    try:
        original = internals.original_of(request) if left_alone else request
        for each in [request] if original is request else [request, original]:
            followed = follow(each, None)
            # One of very many clones is followed as its original.
            if followed is not None and followed.request is each:
                followed.left_alone = left_alone
    except Exception:
        complain("opting out")


def passed(
    request: web.Request, response: web.StreamResponse, options: Options
) -> None:
    """Follow a request that raised nothing, if it may keep something all the same.

    This runs for every request that succeeds, and most keep nothing: no body that
    could be read too late, nothing that the application stored, a route, and a
    response that is no websocket.  A connection is followed from its first request.
    """
    try:
        if type(response) is web.Response and _keeps_only_body(request, options):
            return
        if not internals.is_request(request):
            return
        connection = follow_connection(request.task)
        if connection is not None and connection.following:
            _let_go_of_swallowed(request)
        if not internals.keeps_nothing(request):
            follow(request, options)
        elif connection is not None and connection.put_off is not None:
            connection.sever_put_off(request)  # if it is of an earlier one
            if not connection.forget_swallowed():
                follow(request, options)
        if (
            connection is not None
            and connection.put_off is None
            and not connection.following  # what was swallowed may still be in hand
        ):
            settled_connections.add(connection.key)
        # isinstance() is asked last: the class is abstract, which makes it slow.
        if type(response) is not web.Response:
            error: Any = response  # an HTTPException that was caught and returned
            if isinstance(response, web.WebSocketResponse):
                follow(request, options)
                error = internals.error_of_websocket(response)
            if isinstance(error, BaseException):
                note(request, error, options)
        if calls.are_followed:
            _look_at_calls(request, options)
    except Exception:
        complain("looking at a request")


def _keeps_only_body(request: web.Request, options: Options) -> bool:
    """Whether a request keeps only its body; if so, its task is asked in the end."""
    if not options.are_silent or options.release_body or calls.are_followed:
        return False
    connection = follow_connection(internals.connection_of_upload(request))
    if connection is None or connection.following:
        return False
    if connection.put_off is not None:
        connection.sever_put_off(request)  # if it is of an earlier one
    return _ask_in_the_end(request, connection)


def _look_at_calls(request: web.Request, options: Options) -> None:
    serving = calls.serving_of(request)
    if serving is None:
        return
    for error in serving.errors():
        note(request, error, options)
    if serving.unread():
        follow(request, options)  # perhaps it is read to be the answer's own body
    if FOLLOWED not in request.__dict__:
        serving.over = True  # nobody will look when the request ends
