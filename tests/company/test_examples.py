"""The documentation's examples beside other tools: what they tell, and what is kept."""

import gc
import importlib
import json
import pathlib
from typing import Any, Iterator

import pytest
from aiohttp import ClientSession, web

from ..service import alive, no_collector, run, serve

EXAMPLES = pathlib.Path(__file__).parent.parent.parent / "docs" / "examples"


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def left_by(create_app: Any) -> int:
    """Requests that are alive when three have failed, one connection each."""

    async def main() -> int:
        async with serve(create_app()) as service:
            with no_collector():
                before = len(alive(web.BaseRequest))
                for _ in range(3):
                    assert (await service.ask("/", "Connection: close"))[0] >= 400
                    await service.settle()
                return len(alive(web.BaseRequest)) - before

    left: int = run(main())
    gc.collect()
    return left


@pytest.fixture
def _unpatched() -> Iterator[None]:
    """Leave aiohttp as it was."""
    patched = [
        (web.Application, "_handle"),
        (web.UrlDispatcher, "resolve"),
        (ClientSession, "__init__"),
    ]
    originals = [(owner, name, owner.__dict__[name]) for owner, name in patched]
    yield
    for owner, name, original in originals:
        setattr(owner, name, original)


@pytest.mark.usefixtures("_unpatched")
def test_sentry(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event for each error, with the handler's local; no request is kept."""
    sentry_sdk = pytest.importorskip("sentry_sdk", reason="needs the extra 'company'")
    events = []

    class Recorder(sentry_sdk.transport.Transport):  # type: ignore[misc,name-defined]
        def capture_envelope(self, envelope: Any) -> None:
            events.extend(
                json.loads(item.get_bytes())
                for item in envelope.items
                if item.type == "event"
            )

    init = sentry_sdk.init
    monkeypatch.setattr(
        sentry_sdk, "init", lambda **options: init(**options, transport=Recorder())
    )
    monkeypatch.setenv("SENTRY_DSN", "http://key@127.0.0.1:9/1")
    try:
        assert left_by(importlib.import_module("with_sentry").create_app) == 0
    finally:
        sentry_sdk.get_global_scope().set_client(None)
    assert len(events) == 3
    for event in events:
        frames = event["exception"]["values"][0]["stacktrace"]["frames"]
        assert frames[-1]["vars"]["order"] == "42"


def test_opentelemetry() -> None:
    """A span for each request, with the traceback of the cause; no request is kept."""
    server = pytest.importorskip(
        "opentelemetry.instrumentation.aiohttp_server",
        reason="needs the extra 'company'",
    )
    with_opentelemetry = importlib.import_module("with_opentelemetry")
    from .test_opentelemetry import EXPORTER  # the provider is set once a process

    EXPORTER.clear()
    try:
        assert left_by(with_opentelemetry.create_app) == 0
    finally:
        server.AioHttpServerInstrumentor().uninstrument()
    spans = EXPORTER.get_finished_spans()
    assert len(spans) == 3
    for span in spans:
        assert span.attributes["http.status_code"] == 400
