"""aiojobs: spawn(), shield() and atomic(), whose jobs are tasks of their own."""

import asyncio
import gc
import io
import logging
from typing import Any, Dict, List, Tuple

import pytest
from aiohttp import web

from ..service import alive, no_collector, run, serve
from ..test_diagnostics import normalized
from .compare import (
    BARE,
    GUARDED,
    Answer,
    Install,
    Peer,
    everywhere,
    exchange,
    without_what_differs,
)

aiojobs = pytest.importorskip("aiojobs.aiohttp", reason="needs the extra 'company'")
JOBS = "test_aiojobs.jobs"


async def keep_itself(request: web.Request) -> None:
    error = None
    try:
        {}[request.path]
    except KeyError as exc:
        error = ValueError("from the job")
        raise error from exc


async def refuse(request: web.Request) -> web.Response:
    await asyncio.sleep(0)
    raise web.HTTPBadRequest(text="no")


@aiojobs.atomic  # type: ignore[misc]
async def atomic_refuses(request: web.Request) -> web.Response:
    return await refuse(request)


@aiojobs.atomic  # type: ignore[misc]
async def atomic_fails(request: web.Request) -> web.Response:
    await asyncio.sleep(0)
    await keep_itself(request)
    return web.Response()


async def shielded(request: web.Request) -> web.Response:
    response: web.Response = await aiojobs.shield(request, refuse(request))
    return response


async def shielded_fails(request: web.Request) -> web.Response:
    await aiojobs.shield(request, keep_itself(request))
    return web.Response()


async def spawned(request: web.Request) -> web.Response:
    """The job works with the request when that is answered."""

    async def work() -> None:
        await request.app["go on"].wait()
        assert isinstance(request["error"], ValueError)
        outcome = (request.headers["X-Test"], request.path, await request.text())
        request.app["outcomes"].append(outcome)

    await aiojobs.spawn(request, work())
    request["error"] = error = ValueError("from the handler")
    raise error


async def waited_for(request: web.Request) -> web.Response:
    """The exception of a job comes out of the handler too."""
    job = await aiojobs.spawn(request, refuse(request))
    response: web.Response = await job.wait()
    return response


HANDLERS: Dict[str, Any] = {
    handler.__name__: handler
    for handler in (
        atomic_refuses,
        atomic_fails,
        shielded,
        shielded_fails,
        spawned,
        waited_for,
    )
}


def application(handler: Any) -> web.Application:
    app = web.Application()
    aiojobs.setup(app)
    app.router.add_get("/item", handler)
    app["outcomes"] = []

    async def start(app: web.Application) -> None:
        app["go on"] = asyncio.Event()
        # The scheduler has a task of its own from its first job on.
        scheduler = aiojobs.get_scheduler_from_app(app)
        await (await scheduler.spawn(asyncio.sleep(0))).wait()

    app.on_startup.append(start)
    return app


def served(
    handler: Any, install: Install, loop: str = "asyncio", collected: bool = False
) -> Tuple[List[Answer], List[Any], str, int]:
    async def main() -> Tuple[List[Answer], List[Any], int]:
        app = application(handler)
        install(app)
        with no_collector():
            before = len(alive())
            async with serve(app) as service:
                answers = [
                    await exchange(service, "/item", "X-Test: yes") for _ in range(3)
                ]
                app["go on"].set()
                await service.settle()
                if collected:
                    gc.collect()
                return answers, app["outcomes"], len(alive()) - before

    stream = io.StringIO()
    log_handler = logging.StreamHandler(stream)
    loggers = [logging.getLogger(name) for name in ("aiohttp.server", "asyncio")]
    for logger in loggers:
        logger.addHandler(log_handler)
    try:
        answers, outcomes, left = run(main(), loop)
    finally:
        for logger in loggers:
            logger.removeHandler(log_handler)
    answers = [(without_what_differs(head), body) for head, body in answers]
    return answers, outcomes, normalized(stream.getvalue()), left


@everywhere
@pytest.mark.parametrize("handler", HANDLERS)
def test_jobs_do_what_they_did(handler: str, position: str, loop: str) -> None:
    """Answers, logs and the outcome of jobs: and no request is left behind."""
    *expected, kept = served(HANDLERS[handler], BARE[position], loop)
    *found, left = served(HANDLERS[handler], GUARDED[position], loop)
    assert {head.split()[1] for head, _ in expected[0]} <= {"400", "500"}
    if handler == "spawned":
        assert expected[1] == [("yes", "/item", "")] * 3
    assert found == expected
    assert kept == 3
    assert left == 0


@everywhere
def test_one_failing_job_for_several_requests(position: str, loop: str) -> None:
    """Its exception is in flight in all of them, and each is answered."""

    async def main(install: Install) -> Tuple[List[str], int]:
        async def job(started: asyncio.Event) -> None:
            await started.wait()
            raise web.HTTPBadRequest(text="no")

        async def wait(request: web.Request) -> web.Response:
            if "job" not in app["shared"]:
                app["shared"]["job"] = await aiojobs.spawn(request, job(app["go on"]))
            app["waiting"].append(None)
            try:
                await app["shared"]["job"].wait()
            except web.HTTPBadRequest as exc:
                await asyncio.sleep(0.001 * len(app["waiting"]))
                raise web.HTTPConflict(text="conflict") from exc
            return web.Response()

        app = application(wait)
        app["shared"], app["waiting"] = {}, []
        install(app)
        with no_collector():
            before = len(alive())
            async with serve(app) as service:
                peers = [await Peer.open(service.port) for _ in range(4)]
                for peer in peers:
                    await peer.get("/item")
                while len(app["waiting"]) < len(peers):
                    await asyncio.sleep(0.001)
                app["go on"].set()
                bodies = [(await peer.answer())[1] for peer in peers]
                for peer in peers:
                    peer.close()
                app["shared"].clear()
                await service.settle()
                return bodies, len(alive()) - before

    expected, kept = run(main(BARE[position]), loop)
    bodies, left = run(main(GUARDED[position]), loop)
    assert expected == ["conflict"] * 4
    assert bodies == expected
    assert kept == 4
    assert left == 0


@pytest.mark.parametrize("install", [BARE["setup"], GUARDED["setup"]])
def test_the_last_job_that_failed_stays_with_the_scheduler(install: Install) -> None:
    """Its own task keeps that until another one fails: a live reference."""

    async def spawn_a_failure(request: web.Request) -> web.Response:
        async def work() -> None:
            await request.app["go on"].wait()
            raise ValueError("from the job")

        await aiojobs.spawn(request, work())
        return web.Response()

    *_, left = served(spawn_a_failure, install, collected=True)
    assert left == 1
