"""aiohttp-session, aiohttp-cors and aiohttp-jinja2: what they add is there."""

import io
import logging
import re
import weakref
from typing import Any, List, Tuple

import pytest
from aiohttp import web

from ..test_diagnostics import normalized
from .compare import (
    BARE,
    GUARDED,
    Answer,
    Install,
    answers_and_left,
    everywhere,
)

REASON = "needs the extra 'company'"


async def refuse(request: web.Request) -> web.Response:
    raise web.HTTPBadRequest(text="no")


def stored_in_session() -> web.Application:
    aiohttp_session = pytest.importorskip("aiohttp_session", reason=REASON)

    async def log_in(request: web.Request) -> web.Response:
        session = await aiohttp_session.new_session(request)
        session["user"] = request.query["name"]
        raise web.HTTPFound("/")

    async def show(request: web.Request) -> web.Response:
        session = await aiohttp_session.get_session(request)
        session["seen"] = session.get("seen", 0) + 1
        raise web.HTTPForbidden(text=f"{session['user']} {session['seen']}")

    app = web.Application()
    storage = aiohttp_session.SimpleCookieStorage(encoder=without_its_time)
    aiohttp_session.setup(app, storage)
    app.router.add_get("/log-in", log_in)
    app.router.add_get("/", show)
    return app


def without_its_time(session: Any) -> str:
    return re.sub("'", '"', str({"session": session.get("session", {})}))


def cookies(answers: List[Answer]) -> List[str]:
    return re.findall("(?m)^Set-Cookie: (.*?)\r", "".join(head for head, _ in answers))


@everywhere
def test_a_session_is_saved_by_a_response_that_is_raised(
    position: str, loop: str
) -> None:
    """Its middleware catches the exception, puts a cookie on it and raises it on."""
    headers = ('Cookie: AIOHTTP_SESSION="{\\"session\\": {\\"user\\": \\"b\\"}}"',)

    def served(install: Install) -> Tuple[List[Answer], int]:
        return answers_and_left(
            stored_in_session,
            install,
            *["/log-in?name=a", "/", "/missing"] * 2,
            headers=headers,
            loop=loop,
        )

    expected, kept = served(BARE[position])
    answers, left = served(GUARDED[position])
    assert len(cookies(expected)) == 4
    assert expected[1][1] == "b 1"
    assert answers == expected
    assert (kept, left) == (6, 0)


def shared_across_origins() -> web.Application:
    aiohttp_cors = pytest.importorskip("aiohttp_cors", reason=REASON)
    app = web.Application()
    everything = aiohttp_cors.ResourceOptions(
        allow_credentials=True, expose_headers="*", allow_headers="*"
    )
    cors = aiohttp_cors.setup(app, defaults={"http://shop.example": everything})
    cors.add(app.router.add_get("/item", refuse))
    return app


@everywhere
@pytest.mark.parametrize("origin", ["http://shop.example", "http://other.example"])
def test_the_headers_for_other_origins(origin: str, position: str, loop: str) -> None:
    """On a response that is raised, and of a preflight that is refused."""

    def served(install: Install) -> Tuple[List[Answer], int]:
        return answers_and_left(
            shared_across_origins,
            install,
            *["/item", "OPTIONS /item", "/missing"] * 2,
            headers=(f"Origin: {origin}", "Access-Control-Request-Method: GET"),
            loop=loop,
        )

    expected, kept = served(BARE[position])
    answers, left = served(GUARDED[position])
    allowed = origin == "http://shop.example"
    assert ("Access-Control-Allow-Origin" in expected[0][0]) == allowed
    assert expected[1][0].startswith("HTTP/1.1 200" if allowed else "HTTP/1.1 403")
    assert answers == expected
    assert kept >= 4
    assert left == 0


TEMPLATES = {
    "page": "{% extends 'layout' %}{% block body %}{{ broken(request) }}{% endblock %}",
    "layout": "<p>{% block body %}{% endblock %}</p>",
    "undefined": "{% for each in numbers %}{{ each.missing.attribute }}{% endfor %}",
    "syntax": "{% if %}",
    "good": "<p>{{ request.path }}</p>",
}


def rendered(name: str, *context_processors: Any) -> web.Application:
    aiohttp_jinja2 = pytest.importorskip("aiohttp_jinja2", reason=REASON)
    jinja2 = pytest.importorskip("jinja2", reason=REASON)

    def broken(request: web.Request) -> str:
        error = ValueError(request.path)  # its frame holds it, and it the frame
        raise error

    @aiohttp_jinja2.template(name)  # type: ignore[misc]
    async def show(request: web.Request) -> Any:
        return {"numbers": [1], "broken": broken, "request": request}

    app = web.Application()
    aiohttp_jinja2.setup(
        app,
        loader=jinja2.DictLoader(TEMPLATES),
        context_processors=context_processors,
    )
    app.router.add_get("/item", show)
    return app


@everywhere
@pytest.mark.parametrize("name", ["page", "undefined", "syntax", "none"])
def test_templates_that_fail(name: str, position: str, loop: str) -> None:
    """The log has jinja's rewritten traceback, with the template's own lines.

    The frames that it makes for them have globals of their own, which hold the
    exception again.
    """

    def served(install: Install) -> Tuple[List[Answer], int, str]:
        stream = io.StringIO()
        log_handler = logging.StreamHandler(stream)
        logger = logging.getLogger("aiohttp.server")
        logger.addHandler(log_handler)
        try:
            answers, left = answers_and_left(
                lambda: rendered(name), install, *["/item"] * 3, loop=loop
            )
        finally:
            logger.removeHandler(log_handler)
        return answers, left, normalized(stream.getvalue())

    expected, kept, expected_text = served(BARE[position])
    answers, left, text = served(GUARDED[position])
    assert ("in template" in expected_text or "in top-level" in expected_text) == (
        name != "none"
    )
    assert text == expected_text
    assert answers == expected
    assert kept == 3
    assert left == 0


@pytest.mark.parametrize("install", [BARE["setup"], GUARDED["setup"]])
def test_the_circle_of_request_processor_stays(install: Install) -> None:
    """It stores the request in the request, successful ones too; no frame is in it."""
    processor = pytest.importorskip("aiohttp_jinja2", reason=REASON).request_processor
    answers, left = answers_and_left(
        lambda: rendered("good", processor), install, *["/item"] * 3
    )
    assert {body for _, body in answers} == {"<p>/item</p>"}
    assert left == 3


def test_a_processor_of_ones_own_makes_no_circle() -> None:
    """A weak reference does for the templates."""

    async def processor(request: web.Request) -> Any:
        return {"request": weakref.proxy(request)}

    answers, left = answers_and_left(
        lambda: rendered("good", processor), GUARDED["setup"], *["/item"] * 3
    )
    assert {body for _, body in answers} == {"<p>/item</p>"}
    assert left == 0
