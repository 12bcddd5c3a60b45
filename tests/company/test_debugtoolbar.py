"""aiohttp-debugtoolbar: its console needs the locals, so ``clear_frames=False``."""

import gc
import logging
import re
import sys
from functools import partial
from typing import Any, Iterator, List, Tuple

import pytest
from aiohttp import web

from ..service import Service, alive, no_collector, run, serve
from .compare import (
    BARE,
    GUARDED,
    OURS,
    POSITIONS,
    Answer,
    Install,
    answers_and_left,
    exchange,
)

aiohttp_debugtoolbar = pytest.importorskip(
    "aiohttp_debugtoolbar", reason="needs the extra 'company'"
)


@pytest.fixture(autouse=True)
def log_handlers() -> Iterator[List[logging.Handler]]:
    """Take off the log handlers that it leaves."""
    before = list(logging.root.handlers)
    yield before
    logging.root.handlers[:] = before


async def fail(request: web.Request) -> web.Response:
    marker = "local of the handler"
    raise ValueError(marker)


async def refuse(request: web.Request) -> web.Response:
    raise web.HTTPBadRequest(text="no")


async def show(request: web.Request) -> web.Response:
    return web.Response(text="<body></body>", content_type="text/html")


def application(**options: Any) -> web.Application:
    app = web.Application()
    aiohttp_debugtoolbar.setup(app, **options)
    for handler in (fail, refuse, show):
        app.router.add_get(f"/{handler.__name__}", handler)
    return app


def shown(install: Install) -> Tuple[List[str], List[str]]:
    """The functions on an error's page, asked for later, and what its console says."""

    async def main() -> Tuple[List[str], List[str]]:
        app = application()
        install(app)
        async with serve(app) as service:
            _, page = await exchange(service, "/fail")
            await service.settle()
            found = re.search(r"exception\?token=(\w+)&(?:amp;)?tb=(\d+)", page)
            assert found is not None
            token, number = found.groups()
            page = await ask(service, f"exception?tb={number}&token={token}")
            functions = re.findall(r'class="function">(\w+)<', page)
            frame = re.findall(r'id="frame-(\d+)"', page)[-1]
            said = [
                await ask(service, f"execute?frm={frame}&token={token}&cmd={code}")
                for code in ("marker", "request.path")
            ]
            return [name for name in functions if name not in OURS], said

    async def ask(service: Service, path: str) -> str:
        _, body = await exchange(service, f"/_debugtoolbar/{path}")
        return body

    result: Tuple[List[str], List[str]] = run(main())
    return result


@pytest.mark.parametrize("position", POSITIONS)
def test_the_console_has_the_locals(position: str) -> None:
    """With ``clear_frames=False``; without it they are gone from CPython 3.13 on.

    Before that the toolbar has the very dicts of the frames, and keeps them.
    """
    functions, said = expected = shown(BARE[position])
    assert functions[-1] == "fail"
    assert "local of the handler" in said[0]
    assert "/fail" in said[1]
    assert shown(partial(GUARDED[position], clear_frames=False)) == expected
    functions, said = shown(GUARDED[position])
    assert functions == expected[0]
    # It swallows the exception: what is outside of it sees none.
    is_gone = sys.version_info >= (3, 13) and position != "first"
    assert ("NameError" in said[0]) == is_gone


@pytest.mark.parametrize("position", POSITIONS)
def test_requests_that_it_does_not_keep_go(position: str) -> None:
    """It raises an HTTPException on, and remembers nothing of it."""

    def served(install: Install) -> Tuple[List[Answer], int]:
        return answers_and_left(application, install, *["/refuse", "/missing"] * 3)

    expected, kept = served(BARE[position])
    answers, left = served(partial(GUARDED[position], clear_frames=False))
    assert [body for _, body in expected][:2] == ["no", "404: Not Found"]
    assert answers == expected
    assert (kept, left) == (6, 0)


@pytest.mark.parametrize(
    "install", [BARE["setup"], partial(GUARDED["setup"], clear_frames=False)]
)
def test_requests_that_it_keeps_stay(install: Install) -> None:
    """Its histories are live references: a hundred toolbars, and every error."""

    async def main() -> List[int]:
        app = application(max_request_history=2)
        install(app)
        left = []
        with no_collector():
            before = len(alive())
            async with serve(app) as service:
                for path in ("/fail", "/show"):
                    for _ in range(5):
                        await exchange(service, path)
                    await service.settle()
                    gc.collect()
                    left.append(len(alive()) - before)
        return left

    assert run(main()) == [5, 7]


@pytest.mark.parametrize(
    "install", [BARE["setup"], partial(GUARDED["setup"], clear_frames=False)]
)
def test_its_log_handlers_stay(
    install: Install, log_handlers: List[logging.Handler]
) -> None:
    """One for each request that raises: it is not taken off the root logger again.

    Each then keeps the records of later errors, and those the requests.
    """
    answers_and_left(application, install, *["/show", "/refuse"] * 3)
    assert len(logging.root.handlers) - len(log_handlers) == 3
