"""opentelemetry-instrumentation-aiohttp-server: whole stack traces in its spans."""

import importlib
import re
from typing import Any, Dict, List, Tuple

import pytest
from aiohttp import web

from ..naive import NAIVE
from ..test_diagnostics import HANDLERS, normalized
from .compare import (
    BARE,
    EXAMPLES,
    GUARDED,
    POSITIONS,
    Install,
    answers_and_left,
    everywhere,
    keeps_itself,
)

pytest.importorskip(
    "opentelemetry.instrumentation.aiohttp_server", reason="needs the extra 'company'"
)

from opentelemetry import trace
from opentelemetry.instrumentation.aiohttp_server import (
    AioHttpServerInstrumentor,
)
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import (
    BatchSpanProcessor,
    SimpleSpanProcessor,
)
from opentelemetry.sdk.trace.export.in_memory_span_exporter import (
    InMemorySpanExporter,
)

EXPORTER = InMemorySpanExporter()
PROVIDER = TracerProvider()
PROVIDER.add_span_processor(SimpleSpanProcessor(EXPORTER))
trace.set_tracer_provider(PROVIDER)  # once a process


async def recorded_by_hand(request: web.Request) -> web.Response:
    """Records an exception itself, as an application does that goes on."""
    try:
        {}[request.path]
    except KeyError as exc:
        trace.get_current_span().record_exception(exc)
        raise web.HTTPServiceUnavailable(text="later") from exc
    return web.Response()


async def refuse(request: web.Request) -> web.Response:
    raise web.HTTPBadRequest(text="no")


# The requests that each leaves behind where nothing guards it.
FAILING: Dict[str, Tuple[Any, int]] = {
    "cause": (keeps_itself, 3),
    "by hand": (recorded_by_hand, 3),
}
FAILING["context"] = HANDLERS["context"], 0
FAILING["refuse"] = refuse, 3
if "group" in HANDLERS:
    FAILING["group"] = HANDLERS["group"], 3

Span = Tuple[str, str, Dict[str, Any], List[Any]]


def of_interest(span: Any) -> Span:
    attributes = {
        name: value
        for name, value in span.attributes.items()
        if not re.search("host|port|url|server", name)
    }
    events = [
        {name: normalized(str(value)) for name, value in event.attributes.items()}
        for event in span.events
    ]
    return span.name, str(span.status.status_code), attributes, events


def traced(
    handler: Any, install: Install, loop: str = "asyncio", path: str = "/item"
) -> Any:
    """The spans and answers of three requests, and how many requests are left."""

    def make() -> web.Application:
        instrumentor = AioHttpServerInstrumentor()
        instrumentor.instrument()
        try:
            app = web.Application()  # it puts its middleware first
        finally:
            instrumentor.uninstrument()
        app.router.add_get("/item", handler)
        return app

    EXPORTER.clear()
    answers, left = answers_and_left(make, install, *[path] * 3, loop=loop)
    return [of_interest(span) for span in EXPORTER.get_finished_spans()], answers, left


def stack_traces(spans: List[Span]) -> str:
    return "".join(
        event.get("exception.stacktrace", "") for span in spans for event in span[3]
    )


@everywhere
@pytest.mark.parametrize("handler", FAILING)
def test_the_spans_are_the_same(handler: str, position: str, loop: str) -> None:
    """Attributes, status and each recorded exception: and no request is left."""
    function, behind = FAILING[handler]
    *expected, kept = traced(function, BARE[position], loop)
    *found, left = traced(function, GUARDED[position], loop)
    assert len(expected[0]) == 3
    if handler != "refuse":  # not an error of the server: not recorded by all releases
        assert f"in {function.__name__}" in stack_traces(expected[0])
    assert found == expected
    assert (kept, left) == (behind, 0)


@pytest.mark.parametrize("position", POSITIONS)
def test_the_span_of_a_missing_route(position: str) -> None:
    """A 404 passes its middleware, and ours."""
    *expected, kept = traced(refuse, BARE[position], path="/missing")
    *found, left = traced(refuse, GUARDED[position], path="/missing")
    assert found == expected
    assert (kept, left) == (3, 0)


def test_spans_exported_later() -> None:
    """A processor that exports in a thread of its own has what it needs."""
    exporter = InMemorySpanExporter()
    processor = BatchSpanProcessor(exporter, schedule_delay_millis=3_600_000)
    PROVIDER.add_span_processor(processor)
    try:
        *_, left = traced(keeps_itself, GUARDED["setup"])
        at_once = [of_interest(span) for span in EXPORTER.get_finished_spans()]
        assert exporter.get_finished_spans() == ()
        processor.force_flush()
        assert [of_interest(span) for span in exporter.get_finished_spans()] == at_once
        assert left == 0
    finally:
        processor.shutdown()


def test_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the documentation: a span for each request, and nothing is left."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    create_app = importlib.import_module("with_opentelemetry").create_app
    EXPORTER.clear()
    try:
        answers, left = answers_and_left(create_app, lambda app: None, "/", "/", "/")
    finally:
        AioHttpServerInstrumentor().uninstrument()
    assert [body for _, body in answers] == ["not a number"] * 3
    assert len(EXPORTER.get_finished_spans()) == 3
    assert left == 0


def test_the_naive_way_loses_stack_traces() -> None:
    """Its middleware is the outer one: what an inner one takes off is gone."""
    raised = "{}[request.path]"  # by the cause
    expected, _, _ = traced(keeps_itself, BARE["appended"])
    found, _, _ = traced(
        keeps_itself, lambda app: app.middlewares.append(NAIVE["at once"])
    )
    assert raised in stack_traces(expected)
    assert raised not in stack_traces(found)
