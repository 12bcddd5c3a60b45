"""A pytest plugin for aiohttp's own tests: all that they make is guarded.

``GUARDED=cyclebreak`` appends the middleware to each application.  With
``GUARDED=everything`` each is given to ``setup()`` instead, each runner to
``guard_server()``, and each client session has a ``client_cyclebreak()``.
"""

import functools
import os
from typing import Any, Callable

import aiohttp
from aiohttp import web

from aiohttp_cyclebreak import client_cyclebreak, cyclebreak, guard_server, setup


def _append(app: web.Application) -> None:
    app.middlewares.append(cyclebreak())


def _guard_each(kind: Any, guard: Callable[[Any], None]) -> None:
    init = kind.__init__

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        guard(self)

    kind.__init__ = __init__


def _guard_servers(kind: Any) -> None:
    set_up = kind.setup

    @functools.wraps(set_up)
    async def set_up_guarded(self: Any) -> None:
        await set_up(self)
        guard_server(self)

    kind.setup = set_up_guarded


def _guard_sessions() -> None:
    init = aiohttp.ClientSession.__init__

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs["trace_configs"] = [
            *(kwargs.get("trace_configs") or ()),
            client_cyclebreak(),
        ]
        init(self, *args, **kwargs)

    aiohttp.ClientSession.__init__ = __init__  # type: ignore[method-assign]


_WANTED = os.environ["GUARDED"]
if _WANTED == "cyclebreak":
    _guard_each(web.Application, _append)
elif _WANTED == "everything":
    _guard_each(web.Application, setup)
    _guard_servers(web.AppRunner)
    _guard_servers(web.ServerRunner)
    _guard_sessions()
else:
    raise ValueError(f"GUARDED must be cyclebreak or everything, not {_WANTED!r}")
