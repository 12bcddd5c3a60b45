"""Lets aiohttp.web requests go without waiting for the garbage collector.

.. code-block:: python

    app.middlewares.append(cyclebreak())
"""

from typing import TYPE_CHECKING, Any, List

if TYPE_CHECKING:
    from .client import client_cyclebreak
    from .counts import Stats
    from .decorators import break_cycles, keep_cycles
    from .middleware import cyclebreak, setup
    from .options import BodyReleasedError, BreakEvent
    from .radar import Radar, stats
    from .server import guard_server

__all__ = (
    "BodyReleasedError",
    "BreakEvent",
    "Radar",
    "Stats",
    "break_cycles",
    "client_cyclebreak",
    "cyclebreak",
    "guard_server",
    "keep_cycles",
    "setup",
    "stats",
)

__version__ = "0.1.0"

# pytest loads its plugin from this package, in suites too that do not use aiohttp.
_HOMES = {
    "BodyReleasedError": "options",
    "BreakEvent": "options",
    "Radar": "radar",
    "Stats": "counts",
    "break_cycles": "decorators",
    "client_cyclebreak": "client",
    "cyclebreak": "middleware",
    "guard_server": "server",
    "keep_cycles": "decorators",
    "setup": "middleware",
    "stats": "radar",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> List[str]:
    return sorted({*globals(), *__all__})  # what was not asked for yet, as well
