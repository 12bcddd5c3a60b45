"""One application with the library and without it, where both have as many middlewares.

A tool that shows frames and their locals shows the middlewares too, so a control has
one that does nothing wherever the other has ours.
"""

import inspect
import pathlib
import re
from typing import Any, Callable, Dict, List, Tuple

import pytest
from aiohttp import web

from aiohttp_cyclebreak import cyclebreak, setup

from ..service import LOOPS, Client, Service, alive, idle, no_collector, run, serve

EXAMPLES = pathlib.Path(__file__).parent.parent.parent / "docs" / "examples"

Install = Callable[..., Any]


def _append(app: web.Application) -> None:
    app.middlewares.append(idle)


def _insert(app: web.Application) -> None:
    app.middlewares.insert(0, idle)


def _at_both_ends(app: web.Application) -> None:
    """As setup(): there is no second end where nothing lies between the two."""
    _insert(app)

    async def reach_the_other_end(app: web.Application) -> None:
        if len(app.middlewares) > 1:
            _append(app)

    on_startup: Any = app.on_startup
    on_startup.append(reach_the_other_end)


BARE: Dict[str, Install] = {
    "appended": _append,
    "first": _insert,
    "setup": _at_both_ends,
}
GUARDED: Dict[str, Install] = {
    "appended": lambda app, **options: app.middlewares.append(cyclebreak(**options)),
    "first": lambda app, **options: app.middlewares.insert(0, cyclebreak(**options)),
    "setup": setup,
}
POSITIONS = tuple(BARE)

# Each position on asyncio's own event loop, and one of them on the others.
everywhere = pytest.mark.parametrize(
    ("position", "loop"),
    [(each, "asyncio") for each in POSITIONS]
    + [("setup", loop) for loop in LOOPS if loop != "asyncio"],
)

OURS = ("idle", "cyclebreak_middleware")  # names of functions in tracebacks

Answer = Tuple[str, str]


class Peer(Client):
    """A client that gives what the server sent, headers included."""

    async def whole_answer(self) -> Answer:
        while b"\r\n\r\n" not in self._received:
            await self._more()
        head = self._received.partition(b"\r\n\r\n")[0].decode()
        return head, (await self.answer())[1]


async def exchange(service: Service, path: str, *headers: str) -> Answer:
    """Send one request on a connection of its own.

    Returns:
        The head and the body that come back, or "closed" if the server does not answer.
    """
    method, _, target = path.rpartition(" ")
    peer = await Peer.open(service.port)
    try:
        lines = [f"{method or 'GET'} {target} HTTP/1.1", "Host: localhost", *headers]
        await peer.send("\r\n".join([*lines, "", ""]).encode())
        return await peer.whole_answer()
    except ConnectionError:
        return "closed", ""
    finally:
        peer.close()


async def _exchange_all(
    app: web.Application, requests: Tuple[str, ...], headers: Tuple[str, ...]
) -> Tuple[List[Answer], int]:
    answers = []
    with no_collector():
        before = len(alive())
        async with serve(app) as service:
            for path in requests:
                answers.append(await exchange(service, path, *headers))
            await service.settle()
            return answers, len(alive()) - before


def answers_and_left(
    make: Callable[[], Any],
    install: Install,
    *requests: str,
    headers: Tuple[str, ...] = (),
    loop: str = "asyncio",
) -> Tuple[List[Answer], int]:
    """Serve an application: its answers, and the requests that are still alive.

    The collector is off meanwhile.

    Args:
        make: makes the application; it may be a coroutine function.
        install: one of :data:`BARE` or :data:`GUARDED`.
        *requests: paths, with a method before it where that is not GET.
        headers: lines that each request carries.
        loop: the event loop.
    """

    async def main() -> Tuple[List[Answer], int]:
        app = make()
        if inspect.isawaitable(app):
            app = await app
        install(app)
        return await _exchange_all(app, requests, headers)

    answers, left = run(main(), loop)
    return [(without_what_differs(head), body) for head, body in answers], left


def without_what_differs(text: str) -> str:
    """A text without addresses, ports, the time and the names of the middlewares."""
    text = re.sub(r"(?m)^Date: .*$", "Date: DATE", text)
    text = re.sub(
        r"<function [\w.<>]*(idle|cyclebreak_middleware) at", "<ours at", text
    )
    text = re.sub(r"127\.0\.0\.1:\d+|\('127\.0\.0\.1', \d+\)", "PEER", text)
    return re.sub(r"0x[0-9a-fA-F]+", "ADDRESS", text)


async def keeps_itself(request: web.Request) -> web.Response:
    """Fail with an exception that one of its own frames holds: a reference cycle."""
    error = None
    try:
        {}[request.path]
    except KeyError as exc:
        error = ValueError("from the handler")
        raise error from exc
    return web.Response()
