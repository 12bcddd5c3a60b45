"""What the library tells of a request: never what its client or application said."""

import io
import logging
from typing import Any, List

import pytest
from aiohttp import web

from aiohttp_cyclebreak import BreakEvent

from ..service import Client, no_collector, run, serve
from .compare import GUARDED, POSITIONS

SECRET = "s3cr3t"


class Failure(Exception):
    """Says what it should not."""


async def fail(request: web.Request) -> web.Response:
    secret = (await request.text(), request.query["q"], request.headers["X-Key"])
    request["stored"] = secret
    raise Failure(secret) from ValueError(secret)


def unwilling(*args: Any) -> bool:
    raise RuntimeError("this callback fails")


@pytest.mark.expects_complaint
@pytest.mark.parametrize("position", POSITIONS)
def test_no_event_log_or_repr_has_private_data(position: str) -> None:
    """Not the body, the query, a header, the path, a local, a message of an error."""
    told: List[str] = []

    @web.middleware
    async def look(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            return await handler(request)  # type: ignore[no-any-return]
        finally:
            for value in list(vars(request).values()):
                if type(value).__module__.startswith("aiohttp_cyclebreak"):
                    told.append(f"of the request: {value!r} {value!s}")

    def tell(event: BreakEvent) -> None:
        told.append(f"event: {event!r} {event!s}")

    async def main() -> None:
        for options in (
            {"on_break": tell},
            {"on_break": unwilling},
            {"keep": unwilling},
        ):
            app = web.Application(middlewares=[look])
            app.router.add_post("/item/{name}", fail)
            GUARDED[position](app, **options)
            with no_collector():
                async with serve(app) as service:
                    client: Client = await service.connect()
                    path = f"/item/{SECRET}?q={SECRET}"
                    key = f"X-Key: {SECRET}"
                    await client.post(path, SECRET.encode(), key, f"Cookie: c={SECRET}")
                    assert (await client.answer())[0] == 500
                    client.close()
                    await service.settle()

    stream = io.StringIO()
    log_handler = logging.StreamHandler(stream)
    logger = logging.getLogger("aiohttp_cyclebreak")
    logger.addHandler(log_handler)
    logger.setLevel(logging.DEBUG)
    try:
        run(main())
    finally:
        logger.removeHandler(log_handler)
        logger.setLevel(logging.NOTSET)
    log = stream.getvalue()
    assert log.count("\nRuntimeError: this callback fails") == 2
    events = [text for text in told if text.startswith("event")]
    assert any("Failure" in text for text in events)
    assert all("/item/{name}" in text for text in events)
    if position != "first":  # which follows a request only once it has failed
        assert len(told) > len(events)
    assert SECRET not in "".join([log, *told])
