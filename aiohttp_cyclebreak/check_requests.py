"""What is sent to an application? Requests of the command line, and of a file."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

__all__ = (
    "LOOPBACK",
    "Request",
    "UsageError",
    "make_request",
    "read_body",
    "read_requests",
)

LOOPBACK = "127.0.0.1"  # nothing is sent anywhere else


class UsageError(Exception):
    """What was asked for cannot be done; the message says what can."""


@dataclass(frozen=True)
class Request:
    """A request to send.

    Attributes:
        method: such as ``POST``.
        path: the path and the query.
        headers: the headers beside ``Host`` and ``Content-Length``.
        body: the body, or nothing.
        abort_after: the bytes of the body after which the client vanishes.
    """

    method: str
    path: str = field(repr=False)
    headers: Tuple[Tuple[str, str], ...] = field(default=(), repr=False)
    body: bytes = field(default=b"", repr=False)
    abort_after: Optional[int] = None

    def __str__(self) -> str:
        """The method and the path, without the query: that may hold a secret."""
        path, mark, _ = self.path.partition("?")
        text = f"{self.method} {path}{mark and '?...'}"
        if self.abort_after is not None:
            text += f" aborted after {self.abort_after} of {len(self.body)} bytes"
        return text


# A token of HTTP, and a path as it stands in a request line: no host, nothing that is
# not ASCII.
_METHOD = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_PATH = re.compile(r"/[!-~]*|\*")
_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n\0]*)")


def make_request(
    line: str,
    headers: Sequence[str] = (),
    body: bytes = b"",
    abort_after: Optional[int] = None,
) -> Request:
    """Make a request of what stands on a command line or in a file.

    Args:
        line: ``METHOD PATH``; or a path alone, for ``GET``.
        headers: each ``Name: value``.
        body: the body.
        abort_after: the bytes of the body after which the client vanishes.

    Raises:
        UsageError: one of them is wrong.  The message shows no header and no query.
    """
    words = line.split()
    if len(words) == 1:
        words.insert(0, "GET")
    if len(words) == 3 and words[2].startswith("HTTP/"):
        words.pop()
    if len(words) != 2 or not _METHOD.fullmatch(words[0]):
        raise UsageError('a request is "METHOD PATH", such as "POST /image"')
    method, path = words
    if path.startswith("//") or not _PATH.fullmatch(path):
        if "//" in path.partition("?")[0] or not path.startswith("/"):
            raise UsageError(
                f"a request of {method} names a host, or its path does not begin with "
                "a /: give the path alone, such as /image; the application is served "
                f"on {LOOPBACK}, and nothing is sent anywhere else"
            )
        raise UsageError(
            f"the path of a request of {method} has a character that no URL has: "
            "write it as %XX"
        )
    pairs = []
    for number, header in enumerate(headers, 1):
        match = _HEADER.fullmatch(header)
        if match is None:
            raise UsageError(f'header {number} is not "Name: value"')
        try:
            match[2].encode("latin-1")
        except UnicodeEncodeError:
            raise UsageError(
                f"header {number} has a character that is not in Latin-1, which is "
                "what a header may have"
            ) from None
        pairs.append((match[1], match[2].strip()))
    if abort_after is not None and abort_after >= len(body):
        raise UsageError(
            f"a client cannot vanish after {abort_after} bytes of a body of "
            f"{len(body)}: give a larger body, or vanish earlier"
        )
    return Request(method, path, tuple(pairs), body, abort_after)


_ABORT = re.compile(r"(?:#|//)\s*@abort-after\s+(\d+)")
# A file, one with variables, an answer to compare with, a script, a variable: no editor
# sends such a line as it stands.
_NOT_SENT = re.compile(r"< |<@|<> |> ?\{%|.*\{\{.*\}\}")
_MULTIPART = re.compile(r"content-type:\s*multipart/", re.IGNORECASE)


def read_requests(path: str) -> List[Request]:
    """Read the requests of an ``.http`` file.

    That is the format of the HTTP clients of VS Code and of JetBrains' editors:
    requests are parted by lines that begin with ``###``; each is a line ``METHOD
    PATH``, its headers, an empty line and its body, or ``< FILE`` for one from a
    file beside it.  ``#`` and ``//`` begin a comment above the body;
    ``# @abort-after BYTES`` there says that the client vanishes.  Variables and
    scripts are not supported.

    Raises:
        UsageError: the file cannot be read, or a request in it is wrong; the message
            names the line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"{path} cannot be read: {exc}") from None
    requests = []
    block: List[str] = []
    begin = 1
    for number, line in enumerate([*text.splitlines(), "###"], 1):
        if not line.startswith("###"):
            block.append(line)
            continue
        request = _read_block(path, begin, block)
        if request is not None:
            requests.append(request)
        block, begin = [], number + 1
    if not requests:
        raise UsageError(f"{path} has no request in it")
    return requests


def _read_block(path: str, begin: int, block: List[str]) -> Optional[Request]:
    abort_after = None
    head: List[str] = []  # the request line, and the headers
    lines = iter(enumerate(block, begin))
    for number, line in lines:
        line = line.strip()
        if head and not line:
            break
        if line.startswith("@") or "{{" in line:
            raise UsageError(f"{path}, line {number}: variables are not supported")
        if line.startswith(("#", "//")):
            if "@abort-after" in line:
                match = _ABORT.fullmatch(line)
                if match is None:
                    raise UsageError(
                        f"{path}, line {number}: it is # @abort-after BYTES, such as "
                        "# @abort-after 10000"
                    )
                abort_after = int(match[1])
        elif line:
            if not head:
                begin = number
            head.append(line)
    if not head:
        return None
    rest: List[str] = []
    file = None
    for number, line in lines:
        in_place = not any(each.strip() for each in rest)
        if line.startswith("< ") and in_place:
            file = line[2:].strip()
        elif _NOT_SENT.match(line) or (file and line.strip()):
            raise UsageError(
                f"{path}, line {number}: variables, scripts and files inside of a body "
                "are not supported; all that is to be sent as it stands goes into one "
                "file, < FILE"
            )
        rest.append(line)
    while rest and not rest[-1].strip():
        rest.pop()
    is_multipart = any(_MULTIPART.match(each) for each in head[1:])
    try:
        if file is not None:
            body = read_body(f"@{Path(path).parent / file}")
        else:
            body = ("\r\n" if is_multipart else "\n").join(rest).encode()
        return make_request(head[0], head[1:], body, abort_after)
    except UsageError as exc:
        raise UsageError(f"{path}, line {begin}: {exc}") from None


def read_body(text: str) -> bytes:
    """Give the body that ``--data`` says: a text, or ``@FILE``.

    Raises:
        UsageError: the file cannot be read.
    """
    if not text.startswith("@"):
        return os.fsencode(text)  # the bytes that the shell has given
    try:
        return Path(text[1:]).read_bytes()
    except OSError as exc:
        raise UsageError(f"the body cannot be read: {exc}") from None
