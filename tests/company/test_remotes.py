"""aiohttp-remotes: its tools refuse requests, or give the handler a clone."""

import io
import logging
from typing import Any, Dict, List, Tuple

import pytest
from aiohttp import web

from ..test_diagnostics import normalized
from .compare import (
    BARE,
    GUARDED,
    POSITIONS,
    Answer,
    Install,
    answers_and_left,
    everywhere,
)

aiohttp_remotes = pytest.importorskip(
    "aiohttp_remotes", reason="needs the extra 'company'"
)


async def refuse(request: web.Request) -> web.Response:
    raise web.HTTPBadRequest(text=f"{request.remote} {request.scheme} {request.host}")


async def fail(request: web.Request) -> web.Response:
    request["error"] = error = ValueError(request.remote)
    raise error


async def answer(request: web.Request) -> web.Response:
    return web.Response(text=f"{request.remote} {await request.text()}")


TOOLS: Dict[str, Any] = {
    "XForwardedRelaxed": aiohttp_remotes.XForwardedRelaxed,
    "XForwardedStrict": lambda: aiohttp_remotes.XForwardedStrict([["127.0.0.1"]]),
    "ForwardedRelaxed": aiohttp_remotes.ForwardedRelaxed,
    "Secure": aiohttp_remotes.Secure,
    "BasicAuth": lambda: aiohttp_remotes.BasicAuth("user", "password", "realm"),
}
CLONE = ("XForwardedRelaxed", "XForwardedStrict", "ForwardedRelaxed")
REQUESTS = ("/refuse", "/fail", "/missing", "/answer")
HEADERS = {
    "XForwardedRelaxed": ("X-Forwarded-For: 10.0.0.1", "X-Forwarded-Proto: https"),
    "XForwardedStrict": ("X-Forwarded-For: 10.0.0.1", "X-Forwarded-Proto: https"),
    "ForwardedRelaxed": ("Forwarded: for=10.0.0.1; proto=https",),
}


def served(
    tool: str, install: Install, loop: str, headers: Tuple[str, ...]
) -> Tuple[List[Answer], int, str]:
    """The answers, how many requests and clones are left, and what was logged."""

    async def make() -> web.Application:
        app = web.Application()
        await aiohttp_remotes.setup(app, TOOLS[tool]())
        for handler in (refuse, fail, answer):
            app.router.add_get(f"/{handler.__name__}", handler)
        return app

    stream = io.StringIO()
    log_handler = logging.StreamHandler(stream)
    loggers = [
        logging.getLogger(name) for name in ("aiohttp.server", "aiohttp_remotes")
    ]
    for logger in loggers:
        logger.addHandler(log_handler)
    try:
        answers, left = answers_and_left(
            make, install, *REQUESTS * 2, headers=headers, loop=loop
        )
    finally:
        for logger in loggers:
            logger.removeHandler(log_handler)
    return answers, left, normalized(stream.getvalue())


@everywhere
@pytest.mark.parametrize("tool", TOOLS)
def test_requests_and_their_clones_go(tool: str, position: str, loop: str) -> None:
    """With the middleware on either side of the one that clones."""
    headers = HEADERS.get(tool, ())
    expected, kept, expected_text = served(tool, BARE[position], loop, headers)
    answers, left, text = served(tool, GUARDED[position], loop, headers)
    if tool in CLONE:
        assert expected[0][1].startswith("10.0.0.1 https")
        assert expected_text.count("ValueError: 10.0.0.1") == 2
    else:
        assert expected[0][0].startswith(
            "HTTP/1.1 3" if tool == "Secure" else "HTTP/1.1 4"
        )
    assert (answers, text) == (expected, expected_text)
    assert kept >= (12 if tool in CLONE else 6)
    # What an outer middleware raises, one that was appended does not see.
    assert left == (kept if position == "appended" and tool not in CLONE else 0)


@pytest.mark.parametrize("position", POSITIONS)
def test_requests_that_it_refuses_go(position: str) -> None:
    """It logs why, and raises: what was appended below it sees nothing of that."""
    headers = ("X-Forwarded-For: 10.0.0.1", "X-Forwarded-For: 10.0.0.2")
    tool = "XForwardedRelaxed"
    expected, kept, expected_text = served(tool, BARE[position], "asyncio", headers)
    answers, left, text = served(tool, GUARDED[position], "asyncio", headers)
    assert {head.split()[1] for head, _ in expected} == {"400"}
    assert expected_text.count("Too many headers") == len(expected)
    assert (answers, text) == (expected, expected_text)
    assert kept == len(expected)
    assert left == (kept if position == "appended" else 0)
