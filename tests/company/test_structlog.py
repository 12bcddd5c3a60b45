"""structlog writing JSON: the same objects, frames and locals included."""

import io
import json
import logging
from typing import Any, List, Tuple

import pytest
from aiohttp import web

from ..naive import NAIVE
from ..test_diagnostics import HANDLERS
from .compare import (
    BARE,
    GUARDED,
    OURS,
    Install,
    answers_and_left,
    everywhere,
    keeps_itself,
    without_what_differs,
)

structlog = pytest.importorskip("structlog", reason="needs the extra 'company'")


async def log_and_refuse(request: web.Request) -> web.Response:
    try:
        {}[request.path]
    except KeyError as exc:
        structlog.get_logger("shop").exception("no such item", path=request.path)
        raise web.HTTPBadRequest(text="no") from exc
    return web.Response()


FAILING = {
    "cause": keeps_itself,
    "context": HANDLERS["context"],
    "logged": log_and_refuse,
}
if "group" in HANDLERS:
    FAILING["group"] = HANDLERS["group"]


def logged(
    handler: Any, install: Install, loop: str = "asyncio"
) -> Tuple[List[Any], int]:
    """The objects of three requests, and how many requests are left."""

    def make() -> web.Application:
        app = web.Application()
        app.router.add_get("/item", handler)
        return app

    stream = io.StringIO()
    shared = [structlog.stdlib.add_log_level, structlog.stdlib.add_logger_name]
    log_handler = logging.StreamHandler(stream)
    log_handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.dict_tracebacks,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    loggers = [logging.getLogger(name) for name in ("aiohttp.server", "shop")]
    for logger in loggers:
        logger.addHandler(log_handler)
    try:
        _, left = answers_and_left(make, install, *["/item"] * 3, loop=loop)
    finally:
        for logger in loggers:
            logger.removeHandler(log_handler)
        structlog.reset_defaults()
    objects = [
        json.loads(without_what_differs(line))
        for line in stream.getvalue().splitlines()
    ]
    for each in objects:
        leave_ours_out(each["exception"])
    return objects, left


def leave_ours_out(exceptions: List[Any]) -> None:
    for exc in exceptions:
        exc["frames"] = [each for each in exc["frames"] if each["name"] not in OURS]
        for frame in exc["frames"]:
            frame["locals"].pop("start_time", None)  # a time, in a frame of aiohttp's
        for member in exc.get("exceptions", ()):
            leave_ours_out(member)


def names_of_locals(objects: List[Any]) -> List[str]:
    return [
        name
        for each in objects
        for exc in each["exception"]
        for frame in exc["frames"]
        for name in frame["locals"]
    ]


@everywhere
@pytest.mark.parametrize("handler", FAILING)
def test_the_objects_are_the_same(handler: str, position: str, loop: str) -> None:
    """Whoever logs, aiohttp or the handler: and no request is left behind."""
    expected, kept = logged(FAILING[handler], BARE[position], loop)
    objects, left = logged(FAILING[handler], GUARDED[position], loop)
    assert len(expected) == 3
    assert "request" in names_of_locals(expected)
    assert objects == expected
    assert kept in (0, 3)
    assert kept == 3 or handler == "context"
    assert left == 0


def test_the_naive_way_loses_objects() -> None:
    """Cleared where they are caught, frames have no locals."""
    expected, _ = logged(keeps_itself, BARE["appended"])
    objects, _ = logged(
        keeps_itself, lambda app: app.middlewares.append(NAIVE["at once"])
    )
    assert "error" in names_of_locals(expected)
    assert "error" not in names_of_locals(objects)
