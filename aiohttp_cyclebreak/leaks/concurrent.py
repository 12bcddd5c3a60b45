"""The exception comes out of several tasks, of a group, or of a generator."""

import asyncio
from typing import AsyncIterator

from aiohttp import web

from ._leak import Affected, Kind, Leak, Step, get

_ALL = Affected()


async def _fail(request: web.Request) -> None:
    await asyncio.sleep(0)
    raise web.HTTPBadRequest(text=request.path)


async def _gather(request: web.Request) -> web.Response:
    await asyncio.gather(_fail(request), _fail(request))
    return web.Response()


async def _group(request: web.Request) -> web.Response:
    if not hasattr(asyncio, "TaskGroup"):  # before CPython 3.11
        return web.Response()
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(_fail(request))
            group.create_task(_fail(request))
    except BaseException as exc:
        raise web.HTTPBadRequest(text="all failed") from exc
    return web.Response()


async def _generate(request: web.Request) -> AsyncIterator[int]:
    try:
        yield 1
        raise ValueError(request.path)
    except ValueError as exc:
        yield 2
        raise web.HTTPBadRequest(text="generated") from exc


async def _iterate(request: web.Request) -> web.Response:
    async for _ in _generate(request):
        pass
    return web.Response()


async def _abandon(request: web.Request) -> web.Response:
    numbers = _generate(request)
    async for number in numbers:
        if number == 2:  # the generator is suspended with its exception in hand
            raise web.HTTPBadRequest(text="abandoned")
    return web.Response()


def _build(app: web.Application) -> None:
    app.router.add_get("/gather", _gather)
    app.router.add_get("/group", _group)
    app.router.add_get("/generator", _iterate)
    app.router.add_get("/abandoned", _abandon)


def _leak(id: str, title: str, path: str, affected: Affected = _ALL) -> Leak:
    return Leak(
        id=id,
        title=title,
        kind=Kind.DELAYED,
        chain="as http-exception, and through the frames of the other tasks",
        affected=(affected,),
        build=_build,
        visits=((get(path, "Connection: close"), Step.ANSWER),),
    )


LEAKS = (
    _leak("gather", "asyncio.gather() raises", "/gather"),
    _leak(
        "task-group",
        "asyncio.TaskGroup raises an exception group",
        "/group",
        Affected(python=(3, 11)),
    ),
    _leak("generator", "an asynchronous generator raises", "/generator"),
    _leak(
        "generator/abandoned",
        "an asynchronous generator is abandoned",
        "/abandoned",
    ),
)
