"""What the processes of test_processes.py serve: requests that fail when they are told.

``python -m tests.company.served FD`` serves on a listening socket with ``run_app()``.
"""

import asyncio
import gc
import os
import pathlib
import socket
import sys

from aiohttp import web

from .compare import GUARDED

FOLDER = pathlib.Path(os.environ.get("SERVED_FOLDER", "."))
INSTALL = GUARDED[os.environ.get("SERVED_POSITION", "setup")]


def alive() -> int:
    return sum(isinstance(each, web.BaseRequest) for each in gc.get_objects())


def _note(name: str) -> None:
    with (FOLDER / name).open("a") as file:
        file.write(f"{os.getpid()}\n")


async def refuse(request: web.Request) -> web.Response:
    raise web.HTTPBadRequest(text="no")


async def hold(request: web.Request) -> web.Response:
    """Fail in one of two ways, but only when the file ``go`` is there."""
    _note("held")
    while not (FOLDER / "go").exists():
        await asyncio.sleep(0.005)
    error = ValueError("after it was held")
    if request.match_info["how"] == "refuse":
        raise web.HTTPConflict(text="held") from error
    raise error


async def count(request: web.Request) -> web.Response:
    """How many requests this worker has in memory, this one included."""
    return web.json_response({"worker": os.getpid(), "alive": alive()})


async def tell_stopping(app: web.Application) -> None:
    _note("stopping")


async def create_app() -> web.Application:
    gc.disable()  # reference counts alone have to free what is counted
    app = web.Application()
    app.router.add_get("/", refuse)
    app.router.add_get("/hold/{how}", hold)
    app.router.add_get("/count", count)
    app.on_shutdown.append(tell_stopping)
    INSTALL(app)
    return app


if __name__ == "__main__":
    web.run_app(create_app(), sock=socket.socket(fileno=int(sys.argv[1])), print=None)
    print(alive())
