"""sentry-sdk with its aiohttp integration: every frame and local in its events."""

import gzip
import http.server
import importlib
import json
import logging
import sys
import threading
from typing import Any, Dict, Iterator, List

import pytest
from aiohttp import ClientSession, web

from ..naive import NAIVE
from ..test_diagnostics import HANDLERS
from .compare import (
    BARE,
    EXAMPLES,
    GUARDED,
    OURS,
    POSITIONS,
    Install,
    answers_and_left,
    everywhere,
    without_what_differs,
)

sentry_sdk = pytest.importorskip("sentry_sdk", reason="needs the extra 'company'")

from sentry_sdk.integrations.aiohttp import AioHttpIntegration  # noqa: E402
from sentry_sdk.integrations.asyncio import patch_asyncio  # noqa: E402
from sentry_sdk.transport import Transport  # noqa: E402

DSN = "http://key@127.0.0.1:9/1"


@pytest.fixture(scope="module", autouse=True)
def _unpatch() -> Iterator[None]:
    """Leave aiohttp as it was: the integration patches it for the whole process."""
    patched = [
        (web.Application, "_handle"),
        (web.UrlDispatcher, "resolve"),
        (ClientSession, "__init__"),
    ]
    originals = [(owner, name, owner.__dict__[name]) for owner, name in patched]
    yield
    sentry_sdk.get_global_scope().set_client(None)
    for owner, name, original in originals:
        setattr(owner, name, original)


class Recorder(Transport):  # type: ignore[misc,valid-type]
    """Keeps what would be sent."""

    def __init__(self) -> None:
        super().__init__()
        self.events: List[Dict[str, Any]] = []

    def capture_envelope(self, envelope: Any) -> None:
        for item in envelope.items:
            if item.type in ("event", "transaction"):
                self.events.append(json.loads(item.get_bytes()))


def start(**options: Any) -> None:
    sentry_sdk.init(
        dsn=options.pop("dsn", DSN),
        integrations=[AioHttpIntegration()],
        auto_enabling_integrations=False,
        max_value_length=100_000,
        **options,
    )


def of_interest(event: Dict[str, Any]) -> Any:
    """What an event says, without what differs between any two requests."""
    exceptions = event.get("exception", {}).get("values", [])
    for each in exceptions:
        frames = each["stacktrace"]["frames"]
        each["stacktrace"]["frames"] = [
            frame for frame in frames if frame["function"] not in OURS
        ]
    headers = event["request"]["headers"]
    said = {
        "exception": exceptions,
        "level": event.get("level"),
        "message": event.get("logentry"),
        "transaction": event.get("transaction"),
        "type": event.get("type"),
        "url": event["request"]["url"].rpartition("/")[2],
        "data": event["request"].get("data"),
        "headers": {**headers, "Host": "HOST"},
        "breadcrumbs": [
            each["message"] for each in event.get("breadcrumbs", {}).get("values", [])
        ],
    }
    return json.loads(without_what_differs(json.dumps(said)))


async def fail(request: web.Request) -> web.Response:
    secret = "local of the handler"
    await request.read()
    raise ValueError(secret)


async def succeed(request: web.Request) -> web.Response:
    return web.Response()


async def log_and_refuse(request: web.Request) -> web.Response:
    try:
        {}[request.path]
    except KeyError as exc:
        logging.getLogger("shop").exception("no such item")
        raise web.HTTPBadRequest(text="no") from exc
    return web.Response()


async def unavailable(request: web.Request) -> web.Response:
    raise web.HTTPServiceUnavailable(text="later")


FAILING = {
    "one": fail,
    "cause": HANDLERS["cause"],
    "context": HANDLERS["context"],
    "logged": log_and_refuse,
    "5xx": unavailable,
}
if sys.version_info >= (3, 11):
    FAILING["group"] = HANDLERS["group"]


def reported(
    handler: Any, install: Install, loop: str = "asyncio", **options: Any
) -> Any:
    """The events and answers of three requests, and how many requests are left."""

    def make() -> web.Application:
        app = web.Application()
        app.router.add_get("/item", handler)
        return app

    recorder = Recorder()
    start(transport=recorder, **options)
    try:
        answers, left = answers_and_left(make, install, *["/item"] * 3, loop=loop)
        sentry_sdk.get_client().close()
    finally:
        sentry_sdk.get_global_scope().set_client(None)
    return [of_interest(event) for event in recorder.events], answers, left


def names_of_locals(events: List[Any]) -> List[str]:
    return [
        name
        for event in events
        for exc in event["exception"]
        for frame in exc["stacktrace"]["frames"]
        for name in frame.get("vars", ())
    ]


@everywhere
@pytest.mark.parametrize("handler", FAILING)
def test_the_events_are_the_same(handler: str, position: str, loop: str) -> None:
    """Frames, locals, chain, groups, the request: and no request is left behind."""
    *expected, kept = reported(FAILING[handler], BARE[position], loop)
    *events, left = reported(FAILING[handler], GUARDED[position], loop)
    assert len(expected[0]) == 3
    assert "request" in names_of_locals(expected[0])
    assert events == expected
    assert kept >= 3
    assert left == 0


async def report_named(request: web.Request) -> web.Response:
    try:
        return await fail(request)
    except ValueError as exc:
        sentry_sdk.capture_exception(exc)
        return web.Response(status=500)


async def report(request: web.Request) -> web.Response:
    try:
        return await fail(request)
    except ValueError:
        sentry_sdk.capture_exception()
        return web.Response(status=500)


async def report_and_store(request: web.Request) -> web.Response:
    try:
        return await fail(request)
    except ValueError as exc:
        sentry_sdk.capture_exception(exc)
        request["error"] = exc
        return web.Response(status=500)


async def report_and_raise(request: web.Request) -> web.Response:
    try:
        return await fail(request)
    except ValueError as exc:
        sentry_sdk.capture_exception(exc)
        raise web.HTTPInternalServerError from exc


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize(
    ("handler", "left"),
    [
        # Before, a frame whose locals were read keeps a copy of them, names that an
        # except block has deleted since included.
        (report_named, 0 if sys.version_info >= (3, 13) else 3),
        (report, 0),
        (report_and_store, 0),
        (report_and_raise, 0),
    ],
)
def test_what_a_handler_reports_and_answers(
    handler: Any, left: int, position: str
) -> None:
    """No middleware sees that; what it stores in the request is seen, or raises."""
    *expected, kept = reported(handler, BARE[position])
    assert len(expected[0]) >= 3
    assert kept >= left
    assert reported(handler, GUARDED[position]) == (*expected, left)


@pytest.mark.parametrize("position", POSITIONS)
def test_transactions_are_the_same(position: str) -> None:
    """With tracing on, each request makes an event of that kind too."""
    *expected, kept = reported(fail, BARE[position], traces_sample_rate=1.0)
    *events, left = reported(fail, GUARDED[position], traces_sample_rate=1.0)
    assert [event["type"] for event in expected[0]] == [None, "transaction"] * 3
    assert events == expected
    assert (kept, left) == (3, 0)


@pytest.mark.parametrize("position", POSITIONS)
def test_with_the_integration_of_asyncio(position: str) -> None:
    """It has every task of the loop run a coroutine of Sentry's: connections too."""

    def answered(install: Install) -> Any:
        async def make() -> web.Application:
            patch_asyncio()
            app = web.Application()
            app.router.add_get("/item", fail)
            app.router.add_get("/ok", succeed)
            return app

        recorder = Recorder()
        start(transport=recorder)
        try:
            answers, left = answers_and_left(make, install, *["/item", "/ok"] * 3)
            sentry_sdk.get_client().close()
        finally:
            sentry_sdk.get_global_scope().set_client(None)
        return [of_interest(event) for event in recorder.events], answers, left

    *expected, kept = answered(BARE[position])
    *events, left = answered(GUARDED[position])
    assert "request" in names_of_locals(expected[0])
    assert events == expected
    assert kept >= 3
    assert left == 0


def test_the_naive_way_loses_locals() -> None:
    """Cleared where they are caught, frames have nothing to report."""
    expected, _, _ = reported(fail, BARE["appended"])
    events, _, _ = reported(fail, lambda app: app.middlewares.append(NAIVE["at once"]))
    assert "secret" in names_of_locals(expected)
    assert "secret" not in names_of_locals(events)


def test_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the documentation: the handler's local is told, and nothing is left."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("SENTRY_DSN", DSN)
    recorder = Recorder()
    init = sentry_sdk.init
    monkeypatch.setattr(
        sentry_sdk, "init", lambda **options: init(**options, transport=recorder)
    )
    create_app = importlib.import_module("with_sentry").create_app
    try:
        _, left = answers_and_left(create_app, lambda app: None, "/", "/", "/")
    finally:
        sentry_sdk.get_global_scope().set_client(None)
    assert len(recorder.events) == 3
    for event in recorder.events:
        frames = event["exception"]["values"][0]["stacktrace"]["frames"]
        assert frames[-1]["vars"]["order"] == "42"
    assert left == 0


class Receiver(http.server.BaseHTTPRequestHandler):
    """What Sentry's own server does with an envelope: unpack it and say 200."""

    received: List[Dict[str, Any]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        lines = body.split(b"\n")
        for head, payload in zip(lines[1::2], lines[2::2]):
            if json.loads(head)["type"] == "event":
                self.received.append(json.loads(payload))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.mark.parametrize("position", POSITIONS)
def test_events_sent_over_http(position: str) -> None:
    """By the SDK's own thread, long after the requests are over."""

    def sent(install: Install) -> Any:
        Receiver.received = []
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()

        def make() -> web.Application:
            app = web.Application()
            app.router.add_get("/item", HANDLERS["cause"])
            return app

        try:
            start(dsn=f"http://key@127.0.0.1:{server.server_port}/1")
            _, left = answers_and_left(make, install, *["/item"] * 3)
            sentry_sdk.get_client().close(timeout=30)
        finally:
            sentry_sdk.get_global_scope().set_client(None)
            server.shutdown()
            thread.join()
            server.server_close()
        return [of_interest(event) for event in Receiver.received], left

    expected, kept = sent(BARE[position])
    events, left = sent(GUARDED[position])
    assert len(expected) == 3
    assert events == expected
    assert (kept, left) == (3, 0)
