"""Connections that no middleware ever sees."""

from aiohttp import web

from ._leak import CLOSE_CANCEL, Affected, Kind, Leak, Remedy, Step, Visit, get

_ALL = Affected()
# It ends as headers do: aiohttp's parser in Python looks at nothing before that.
_CLIENT_HELLO = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64) + b"\r\n\r\n"
)


async def _answer(request: web.Request) -> web.Response:
    return web.Response(text="ok")


def _build(app: web.Application) -> None:
    app.router.add_get("/", _answer)


def _leak(variant: str, title: str, visit: Visit, affected: Affected = _ALL) -> Leak:
    return Leak(
        id="unseen/" + variant,
        title=title,
        kind=Kind.DELAYED,
        chain=(
            "frame of RequestHandler.data_received -> the parser's exception -> "
            "traceback -> that frame; and as close-cancel, without a request"
        ),
        affected=(affected,),
        build=_build,
        visits=(visit,),
        remedy=Remedy.SERVER,
    )


# Three are without a request, and have only what close-cancel leaves behind.
LEAKS = (
    _leak(
        "probe",
        "a probe: a connection without a request",
        (Step.ACCEPTED,),
        CLOSE_CANCEL,
    ),
    _leak(
        "probe-reset",
        "a probe that is reset",
        (Step.ACCEPTED, Step.RESET),
        CLOSE_CANCEL,
    ),
    _leak(
        "partial",
        "the client closes in the middle of the headers",
        (b"GET / HT", Step.ACCEPTED),
        CLOSE_CANCEL,
    ),
    _leak("malformed", "a malformed request line", (b"not HTTP\r\n\r\n", Step.BYTES)),
    _leak("header", "a malformed header", (get("/", "bad header"), Step.BYTES)),
    _leak("tls", "TLS spoken to a plain port", (_CLIENT_HELLO, Step.BYTES)),
    _leak("expect", "Expect: is refused", (get("/", "Expect: nonsense"), Step.ANSWER)),
)
