"""The catalogue: every known leak as data, run alike by tests and ``verify``."""

from typing import Tuple

from . import (
    client_gone,
    close_cancel,
    concurrent,
    gateway,
    http_exception,
    idle_body,
    image_upload,
    kept,
    no_route,
    payload,
    started,
    unseen,
    websocket,
)
from ._leak import Affected, Kind, Leak, Remedy, Step, Visit
from .gateway import gateway_of

__all__ = (
    "CATALOGUE",
    "Affected",
    "Kind",
    "Leak",
    "Remedy",
    "Step",
    "Visit",
    "gateway_of",
)

CATALOGUE: Tuple[Leak, ...] = (
    *close_cancel.LEAKS,
    *image_upload.LEAKS,
    *http_exception.LEAKS,
    *no_route.LEAKS,
    *payload.LEAKS,
    *started.LEAKS,
    *websocket.LEAKS,
    *kept.LEAKS,
    *concurrent.LEAKS,
    *gateway.LEAKS,
    *client_gone.LEAKS,
    *unseen.LEAKS,
    *idle_body.LEAKS,
)
