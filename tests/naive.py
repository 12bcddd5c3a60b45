"""What a first attempt looks like: the tests of safety must catch it."""

import asyncio
import traceback
from typing import Any

from aiohttp import web


def _clear_chain(exc: Any) -> None:
    while exc is not None:
        traceback.clear_frames(exc.__traceback__)
        exc.__traceback__ = None
        exc = exc.__cause__ or exc.__context__


@web.middleware
async def at_once(request: web.Request, handler: Any) -> web.StreamResponse:
    """Clear every frame of the chain where it is caught."""
    try:
        return await handler(request)  # type: ignore[no-any-return]
    except BaseException as exc:
        _clear_chain(exc)
        raise


@web.middleware
async def when_the_task_is_done(
    request: web.Request, handler: Any
) -> web.StreamResponse:
    """Clear every frame of the chain when the request's task is done."""
    try:
        return await handler(request)  # type: ignore[no-any-return]
    except BaseException as exc:
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda _, exc=exc: _clear_chain(exc))
        raise


NAIVE = {"at once": at_once, "when the task is done": when_the_task_is_done}
