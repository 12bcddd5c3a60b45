"""Which leak a chain is said to be, and what is advised against it."""

import asyncio
from types import FrameType
from typing import Any, Optional, Set

import pytest
from aiohttp import web

from aiohttp_cyclebreak.patterns import advise, marks_of, recognise

from .service import run

HERE = __name__
KEPT = {"a frame of the application", "traceback"}


async def waits(until: Any) -> None:
    await until


def frame_of_module(name: Optional[str]) -> FrameType:
    namespace: Any = {} if name is None else {"__name__": name}
    code = "import sys\ndef function(): return sys._getframe()"
    exec(code, namespace)
    frame: FrameType = namespace["function"]()
    return frame


@pytest.mark.parametrize(
    ("each", "marks"),
    [
        (object(), {"object"}),
        (ValueError(), {"ValueError", "an error"}),
        (
            web.HTTPNotFound(),
            {"aiohttp.web_exceptions.HTTPNotFound", "an error"}
            | {"an error that is a response"},
        ),
        (web.Response(), {"aiohttp.web_response.Response"}),
        (
            frame_of_module("service"),
            {"frame", "service:function", "a frame of the application"},
        ),
        (
            frame_of_module(None),
            {"frame", "None:function", "a frame of the application"},
        ),
        (frame_of_module("aiohttp.web"), {"frame", "aiohttp.web:function"}),
        (frame_of_module("asyncio.tasks"), {"frame", "asyncio.tasks:function"}),
    ],
    ids=lambda each: None if isinstance(each, set) else type(each).__name__,
)
def test_marks(each: object, marks: Set[str]) -> None:
    """An object has those that are true of it, and no other."""
    assert set(marks_of(each)) == marks


def test_marks_of_tasks_and_coroutines() -> None:
    """A coroutine is told by its function."""

    async def main() -> None:
        coroutine = waits(asyncio.sleep(0))
        assert set(marks_of(coroutine)) == {"coroutine", "waits"}
        task = asyncio.ensure_future(coroutine)
        assert set(marks_of(task)) == {"_asyncio.Task", "a task"}
        await task

    run(main())


def test_a_leak_has_all_its_marks() -> None:
    """One of them that is missing, and it is another one, or none that is known."""
    assert recognise("delayed", KEPT) == "kept-local"
    assert recognise("permanent", KEPT) is None
    assert recognise("delayed", {"a frame of the application"}) is None
    singleton = {"an error", "traceback", "a frame of the application"}
    assert recognise("permanent", singleton) == "singleton"
    of_a_client = {*singleton, "global '_CONNECTION_CLOSED_EXCEPTION'"}
    assert recognise("permanent", of_a_client) == "gateway/released"
    stored = {*singleton, "attribute '_state'"}
    assert recognise("delayed", stored) == "stash"


def test_advice() -> None:
    """What stops a leak of the catalogue; else where to cut, by the kind of chain."""
    kept = advise("delayed", "kept-local", KEPT)
    assert kept.startswith("cyclebreak() among the application's middlewares")
    assert "; kept-local of the catalogue: " in kept
    assert kept.endswith(
        "store the exception in the request, or raise another one from it."
    )
    gateway = advise("delayed", "gateway", set())
    assert gateway.startswith("client_cyclebreak() among the trace_configs")
    assert "; gateway of the catalogue: " in gateway
    assert "No middleware sees" not in gateway
    released = advise("permanent", "gateway/released", set())
    assert released.startswith("client_cyclebreak() among the trace_configs")
    assert "; gateway/released of the catalogue: the handler reads a " in released
    idle = advise("live", "idle-body", set())
    assert "; idle-body of the catalogue: " in idle
    raised = advise("delayed", None, {"traceback"})
    assert raised.startswith("Cut one of these references")
    assert raised.endswith("for exceptions that leave a handler.")
    assert advise("delayed", None, {"object"}) == raised.partition(" cyclebreak()")[0]
    for kind, says in [
        ("live", "It is let go when"),
        ("permanent", "Remove it from"),
        ("unknown", "Look again with a larger budget"),
    ]:
        advice = advise(kind, None, {"an error", "traceback"})
        assert advice.startswith(says)
        assert "cyclebreak()" not in advice
