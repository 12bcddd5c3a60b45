"""What has failed in the library itself, or in a callback? It is logged once."""

import logging
from typing import Dict

__all__ = ("ENDS", "complain", "errors", "logger")

logger = logging.getLogger("aiohttp_cyclebreak")

_complaints: Dict[str, int] = {}  # and how often

# What ends the process, out of a callback too; all else that one raises is logged.
# CancelledError, for one, comes out of exception() of a task that was cancelled.
ENDS = (KeyboardInterrupt, SystemExit)


def complain(about: str) -> None:
    """Log the error being handled, the first time that it happens there.

    Nothing is raised: this runs where no error may reach the application, whose log
    handler may fail too; or the memory or the stack is used up.
    """
    try:
        _complaints[about] = _complaints.get(about, 0) + 1
        if _complaints[about] == 1:
            logger.exception(
                "%s failed; the request is not affected, and this is not logged again",
                about,
            )
    except Exception:  # it is counted, if it could be
        pass


def errors() -> int:
    """How often something failed here, or in a callback, since the process began."""
    return sum(_complaints.values())
