"""No aiohttp.web request waits for the garbage collector any more.

.. code-block:: python

    app.middlewares.append(cyclebreak())
"""

from .client import client_cyclebreak
from .decorators import break_cycles, keep_cycles
from .middleware import cyclebreak, setup
from .options import BodyReleasedError, BreakEvent
from .server import guard_server

__all__ = (
    "BodyReleasedError",
    "BreakEvent",
    "break_cycles",
    "client_cyclebreak",
    "cyclebreak",
    "guard_server",
    "keep_cycles",
    "setup",
)

__version__ = "0.1.0"
