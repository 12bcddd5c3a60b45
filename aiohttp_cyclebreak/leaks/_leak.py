"""What a leak of the catalogue is made of."""

import enum
from dataclasses import dataclass
from typing import Callable, Optional, Tuple, Union

from aiohttp import web

__all__ = (
    "CLOSE_CANCEL",
    "NOT_CANCELLED",
    "Affected",
    "Kind",
    "Leak",
    "Remedy",
    "Step",
    "Visit",
    "get",
    "post",
)


class Kind(enum.Enum):
    """Why requests stay alive."""

    DELAYED = "delayed"
    """A reference cycle; they wait for the cyclic garbage collector."""

    PERMANENT = "permanent"
    """A live reference; no collection ever frees them."""

    LIVE = "live"
    """A live reference that ends with the connection, and keeps a body until then."""


class Remedy(enum.Enum):
    """What stops a leak, as it is written in an application."""

    MIDDLEWARE = "cyclebreak"
    CLIENT = "client_cyclebreak"
    SERVER = "guard_server"


class Step(enum.Enum):
    """What a client does beside sending bytes."""

    ANSWER = "read one whole response"
    ACCEPTED = "wait until the server has the connection"
    BEGUN = "wait until the server has begun to handle what was sent"
    BYTES = "wait for the first bytes of an answer, or for its end"
    UNREAD = "wait until the server waits for the client to read"
    RESET = "reset the connection"
    STAY = "leave the connection open and idle, until everything is counted"
    LEAVE = "close the connection, which the server may not notice until then"


Visit = Tuple[Union[bytes, Step], ...]


@dataclass(frozen=True)
class Affected:
    """The versions that have a leak.

    Attributes:
        since: first aiohttp release that has it; None: all that are supported.
        until: last aiohttp release that has it; None: not fixed.
        python: first CPython that has it.
    """

    since: Optional[Tuple[int, ...]] = None
    until: Optional[Tuple[int, ...]] = None
    python: Tuple[int, int] = (3, 8)

    def on(self, aiohttp: Tuple[int, ...], python: Tuple[int, ...]) -> bool:
        """Whether these versions of aiohttp and CPython have the leak."""
        return (
            (self.since is None or self.since <= aiohttp)
            and (self.until is None or aiohttp <= self.until)
            and self.python <= python[:2]
        )

    def __str__(self) -> str:
        def version(parts: Tuple[int, ...]) -> str:
            return ".".join(map(str, parts))

        if self.since is None and self.until is None:
            text = "all"
        elif self.until is None:
            text = f"from {version(self.since or ())}"
        elif self.since is None:
            text = f"to {version(self.until)}"
        else:
            text = f"{version(self.since)} to {version(self.until)}"
        if self.python > (3, 8):
            text += f", CPython from {version(self.python)}"
        return text


# The task of a connection that its client closes keeps the exception that ends it.
CLOSE_CANCEL = Affected(since=(3, 10, 6), until=(3, 11, 13), python=(3, 9))
# Up to aiohttp 3.8.1 a client that goes away has its handler cancelled at once.
NOT_CANCELLED = Affected(since=(3, 8, 2))


@dataclass(frozen=True)
class Leak:
    """One way in which a request outlives its response, with what it takes to see it.

    Attributes:
        id: its name on the command line; variants of one leak share what stands
            before the slash.
        title: one line: what sets it off.
        kind: delayed, permanent or live.
        chain: what holds what, from the holder to the request.
        build: adds handlers and middlewares to an application.
        visits: what clients do: one tuple a connection; bytes are sent, a
            :class:`Step` is taken, and at the end the connection is closed.
        affected: the versions that have it: those of any of these.
        upstream: where aiohttp's maintainers speak of it, or an empty string.
        remedy: what stops it.
    """

    id: str
    title: str
    kind: Kind
    chain: str
    build: Callable[[web.Application], None]
    visits: Tuple[Visit, ...]
    affected: Tuple[Affected, ...] = (Affected(),)
    upstream: str = ""
    remedy: Remedy = Remedy.MIDDLEWARE

    def is_on(self, aiohttp: Tuple[int, ...], python: Tuple[int, ...]) -> bool:
        """Whether these versions of aiohttp and CPython have the leak."""
        return any(each.on(aiohttp, python) for each in self.affected)


def get(path: str = "/", *headers: str) -> bytes:
    """The bytes of a GET request."""
    lines = [f"GET {path} HTTP/1.1", "Host: localhost", *headers, "", ""]
    return "\r\n".join(lines).encode()


def post(
    body: bytes,
    *headers: str,
    path: str = "/",
    length: Optional[int] = None,
    type: str = "application/octet-stream",
) -> bytes:
    """The bytes of a POST request; *length* promises more than *body* holds."""
    size = len(body) if length is None else length
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        f"Content-Type: {type}",
        f"Content-Length: {size}",
        *headers,
        "",
        "",
    ]
    return "\r\n".join(lines).encode() + body
