"""How does a client session take part? ``client_cyclebreak()``."""

from types import SimpleNamespace
from typing import Any

import aiohttp

from . import calls, internals
from .callers import (
    note_call,
    note_failed_call,
    note_last_attempt,
    note_successful_call,
    note_upload,
)
from .options import is_off

__all__ = ("client_cyclebreak",)


def client_cyclebreak() -> aiohttp.TraceConfig:
    """Make the tracing that lets a request go although a call that it made failed.

    ``ClientSession(trace_configs=[client_cyclebreak()])`` is all there is to write.
    aiohttp's client keeps the exception of a failed call, in its protocol, stream or
    response.  Its traceback leads to the frame of the handler that called, and so to
    the incoming request, also where the handler catches the exception and answers
    502: a reference cycle, which only the cyclic garbage collector frees.

    Nothing about an exception changes while it may be needed.  It is severed, which
    is to say that the finished frames in its traceback are emptied and the traceback
    still prints in full:

    - made by a guarded request, or by a child task of one: when that request's own
      task is done, by its options (``keep``, ``on_break``, ``clear_frames``,
      :func:`keep_cycles`).  Of a request that goes on for ever, all but the last 50 are
      severed after 100 failed calls;
    - outside any guarded request, in a background worker: when the task that called is
      done, or when its next call has ended and it waits for something; what breaks off
      in the middle of a body within its next 32 calls.

    What one of these tasks has in hand, in an ``except`` block or in a variable, is
    left for later.  So a worker's log lines have every line of the traceback, however
    late; what is gone are the locals of functions that have ended.

    For longer than the request or the task an exception is held only weakly, or for a
    second if its class allows no weak reference, as built-in ones do not.  Responses
    are followed by weak references.  A session that opens a websocket makes it of a
    subclass of its ``ws_response_class``; no class is changed.

    With ``AIOHTTP_CYCLEBREAK=off`` it traces nothing, which is logged.

    Returns:
        What :class:`aiohttp.ClientSession` takes in *trace_configs*.  One may be
        given to several sessions.

    See `aiohttp issue #10535 <https://github.com/aio-libs/aiohttp/issues/10535>`_.

    .. versionadded:: 0.1.0
    """
    trace_config = aiohttp.TraceConfig()
    if is_off("outgoing calls are not followed"):
        return trace_config
    calls.follow()
    signals: Any = trace_config  # aiohttp 3.10 declares its functions wrongly
    if internals.KEEPS_FIRST_ATTEMPTS:
        signals.on_connection_queued_start.append(_queued)
        signals.on_connection_create_start.append(_attempted)
        signals.on_connection_reuseconn.append(_attempted)
    signals.on_request_end.append(_ended)
    signals.on_request_exception.append(_failed)
    return trace_config


async def _attempted(
    session: aiohttp.ClientSession, context: SimpleNamespace, params: object
) -> None:
    if hasattr(context, "attempted"):  # there is one context a call
        note_last_attempt()
    context.attempted = True


async def _queued(
    session: aiohttp.ClientSession, context: SimpleNamespace, params: object
) -> None:
    if hasattr(context, "attempted"):  # and it may wait in vain
        note_last_attempt()


async def _ended(
    session: aiohttp.ClientSession,
    context: SimpleNamespace,
    params: aiohttp.TraceRequestEndParams,
) -> None:
    response = params.response
    if response.status == 101:
        internals.follow_websockets(session, note_call)
    else:
        upload = internals.upload_of(response)
        if upload is not None:  # even if all of the answer has come
            note_upload(*upload)
        try:
            is_over = response.content.is_eof()
        except AttributeError:  # a class of the application's, without a stream
            is_over = False
        # Then no error can come to it any more, but for that of one that is released.
        if is_over and internals.RELEASED_HAVE_ONE_ERROR:
            note_successful_call()
            return
    note_call(response)


async def _failed(
    session: aiohttp.ClientSession,
    context: SimpleNamespace,
    params: aiohttp.TraceRequestExceptionParams,
) -> None:
    note_failed_call(params.exception)
