"""Log handlers that come to a record later: in a thread, or when they are asked."""

import io
import logging
import logging.handlers
import queue
import traceback
from functools import partial
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import pytest
from aiohttp import web

from ..naive import NAIVE
from ..service import alive, no_collector, run, serve
from ..test_diagnostics import HANDLERS, normalized
from .compare import (
    BARE,
    GUARDED,
    POSITIONS,
    Install,
    answers_and_left,
    exchange,
    keeps_itself,
)

LOGGER = logging.getLogger("aiohttp.server")

FAILING = {name: HANDLERS[name] for name in HANDLERS if name in ("group", "nothing")}
FAILING["cause"] = keeps_itself


class LaterHandler(logging.handlers.QueueHandler):
    """Hands over the record as it is, so that the listener's thread formats it."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record


def logged(handler: Any, install: Install, queue_handler: Any) -> Tuple[str, int]:
    """What a listener's thread writes, started after the requests; requests left."""

    def make() -> web.Application:
        app = web.Application()
        app.router.add_get("/item", handler)
        return app

    stream = io.StringIO()
    records: Any = queue.Queue()
    log_handler = queue_handler(records)
    LOGGER.addHandler(log_handler)
    try:
        _, left = answers_and_left(make, install, *["/item"] * 3)
    finally:
        LOGGER.removeHandler(log_handler)
    listener = logging.handlers.QueueListener(records, logging.StreamHandler(stream))
    listener.start()
    listener.stop()
    return normalized(stream.getvalue()), left


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("queue_handler", [logging.handlers.QueueHandler, LaterHandler])
@pytest.mark.parametrize("handler", FAILING)
def test_a_queue_listener_writes_the_same_text(
    handler: str, queue_handler: Any, position: str
) -> None:
    """Formatted at once, or in the other thread: and no request is left behind."""
    function = FAILING[handler]
    expected, kept = logged(function, BARE[position], queue_handler)
    text, left = logged(function, GUARDED[position], queue_handler)
    assert expected.count("Traceback") >= 3 or handler == "nothing"
    assert text == expected
    assert kept == 3 or (queue_handler, handler) != (LaterHandler, "cause")
    if (queue_handler, handler) != (LaterHandler, "nothing"):  # for which see below
        assert left == 0


def test_the_naive_way_loses_text() -> None:
    """The records are formatted when it has taken the tracebacks off."""
    expected, _ = logged(keeps_itself, BARE["first"], LaterHandler)
    text, _ = logged(
        keeps_itself,
        lambda app: app.middlewares.insert(0, NAIVE["at once"]),
        LaterHandler,
    )
    assert "{}[request.path]" in expected
    assert "{}[request.path]" not in text


class Keeper(logging.Handler):
    """Keeps every record, with its ``exc_info``."""

    def __init__(self) -> None:
        super().__init__()
        self.records: List[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class Kept(NamedTuple):
    """What a handler that keeps records has of them after the requests."""

    text: str
    locals_of_error: bool  # those of the handler's frame, in the logged traceback
    traceback_of_cause: bool
    locals_of_cause: bool
    alive: int  # requests, while the records are there
    alive_afterwards: int


def has_request(found: Any) -> Tuple[bool, bool]:
    """Whether there is a frame of the handler, and whether it has its locals."""
    frames = [
        frame
        for frame, _ in traceback.walk_tb(found)
        if frame.f_code is keeps_itself.__code__
    ]
    return bool(frames), any("request" in frame.f_locals for frame in frames)


def test_what_aiohttp_raises_itself_is_the_handlers_to_drop() -> None:
    """The error of a handler that returns nothing passes no middleware.

    A record keeps the request, by a live reference and only for as long as it is there.
    """

    async def main(install: Install) -> Tuple[int, int, int]:
        keeper = Keeper()
        LOGGER.addHandler(keeper)
        app = web.Application()
        app.router.add_get("/item", HANDLERS["nothing"])
        install(app)
        try:
            with no_collector():
                before = len(alive())
                async with serve(app) as service:
                    for _ in range(3):
                        await exchange(service, "/item")
                    await service.settle()
                    # Old releases log the message alone.
                    errors = sum(bool(record.exc_info) for record in keeper.records)
                    while_kept = len(alive()) - before
                    keeper.records.clear()
                    return errors, while_kept, len(alive()) - before
        finally:
            LOGGER.removeHandler(keeper)

    errors, while_kept, _ = run(main(BARE["setup"]))
    assert while_kept >= errors
    assert run(main(GUARDED["setup"])) == (errors, errors, 0)


def kept_by_a_handler(install: Install) -> Kept:
    async def main() -> Kept:
        keeper = Keeper()
        LOGGER.addHandler(keeper)
        app = web.Application()
        app.router.add_get("/item", keeps_itself)
        install(app)
        try:
            with no_collector():
                before = len(alive())
                async with serve(app) as service:
                    for _ in range(3):
                        await exchange(service, "/item")
                    await service.settle()
                    while_kept = len(alive()) - before
                    record = keeper.records[-1]
                    text = logging.Formatter().format(record)
                    assert record.exc_info is not None
                    error, found = record.exc_info[1:]
                    assert error is not None
                    assert error.__cause__ is not None
                    _, of_error = has_request(found)
                    has, of_cause = has_request(error.__cause__.__traceback__)
                    keeper.records.clear()
                    record = error = found = None
                    afterwards = len(alive()) - before
        finally:
            LOGGER.removeHandler(keeper)
        return Kept(normalized(text), of_error, has, of_cause, while_kept, afterwards)

    kept: Kept = run(main())
    return kept


def always(request: web.Request, exc: BaseException) -> bool:
    return True


# What docs/safety.rst says of the options.
OPTIONS: Dict[str, Tuple[Dict[str, Any], Callable[[str], Kept]]] = {
    "default": ({}, lambda text: Kept(text, False, True, False, 0, 0)),
    "keep": (
        {"keep": always},
        lambda text: Kept(text, True, True, True, 3, 3),
    ),
    "clear_frames=False": (
        {"clear_frames": False},
        lambda text: Kept(text.partition("\n")[0], True, False, False, 3, 0),
    ),
}


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("options", OPTIONS)
def test_what_a_handler_that_keeps_records_gets(options: str, position: str) -> None:
    """By default the whole text and no locals; those need an option."""
    bare = kept_by_a_handler(BARE[position])
    assert bare[1:] == (True, True, True, 3, 3)
    assert bare.text.count("Traceback") == 2
    given, expected = OPTIONS[options]
    kept = kept_by_a_handler(partial(GUARDED[position], **given))
    if options == "clear_frames=False":
        assert kept.text.count("Traceback") == 1  # that of the record itself
        assert "in keeps_itself" in kept.text
        kept = kept._replace(text=kept.text.partition("\n")[0])
    assert kept == expected(bare.text)
