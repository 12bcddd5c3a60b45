"""Applications of others: what fails here is what they leave behind.

They are served bare, or guarded if the environment variable ``GUARDED`` is set.  They
need ``aiohttp-devtools``, ``aiohttp-tus``, ``pytest-aiohttp`` and, in this folder,
``examples`` of aiohttp's source archive.
"""

import base64
import os
import runpy

import pytest
from aiohttp import ClientConnectionError, FormData, web

from aiohttp_cyclebreak import setup

TUS = {"Tus-Resumable": "1.0.0"}


@pytest.fixture
def serve(aiohttp_client):
    """Serve an application and make a client for it."""

    async def serve(app):
        if "GUARDED" in os.environ:
            setup(app)
        return await aiohttp_client(app)

    return serve


@pytest.fixture
async def views(serve, monkeypatch):
    """A page of class-based views, from aiohttp's examples."""
    monkeypatch.setattr(web, "run_app", lambda app: None)
    module = runpy.run_path("examples/web_classview.py")
    return await serve(module["init"]())


@pytest.fixture
async def static(serve, tmp_path):
    """A server of static files with live reload, of aiohttp-devtools."""
    from aiohttp_devtools.runserver.serve import create_auxiliary_app

    (tmp_path / "index.html").write_text("<html><body></body></html>")
    return await serve(create_auxiliary_app(static_path=str(tmp_path)))


@pytest.fixture
async def uploads(serve, tmp_path):
    """Resumable uploads, by aiohttp-tus."""
    from aiohttp_tus import setup_tus

    return await serve(setup_tus(web.Application(), upload_path=tmp_path))


async def ask(client, method, path, **options):
    """Send ten requests, and read what comes."""
    for _ in range(10):
        async with client.session.request(
            method, client.make_url(path), **options
        ) as response:
            await response.read()


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/get"), ("POST", "/get"), ("GET", "/missing")]
)
@pytest.mark.no_request_cycles(requests=10)
async def test_views(views, method, path):
    """Found, wrong method, not found."""
    await ask(views, method, path)


@pytest.mark.no_request_cycles(requests=10)
async def test_views_abandoned(views):
    """An upload is not finished: the client goes away in the middle."""

    async def part():
        yield b"x" * 70_000
        raise ClientConnectionError("gone")

    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    for _ in range(10):
        with pytest.raises(ClientConnectionError):
            await views.session.post(
                views.make_url("/post"), data=part(), headers=headers
            )


@pytest.mark.no_request_cycles(requests=10)
async def test_views_form(views):
    """An upload is finished."""
    for _ in range(10):
        form = FormData({"name": "value"})
        response = await views.post("/post", data=form)
        await response.read()


@pytest.mark.parametrize("path", ["/index.html", "/missing.html"])
@pytest.mark.no_request_cycles(requests=10)
async def test_static(static, path):
    """Found; not found, which is an error 500 there."""
    await ask(static, "GET", path)


@pytest.mark.no_request_cycles(requests=10)
async def test_live_reload(static):
    """Browsers say hello, and close the websocket."""
    hello = {
        "command": "hello",
        "protocols": ["http://livereload.com/protocols/official-7"],
    }
    for _ in range(10):
        async with static.ws_connect("/livereload") as websocket:
            await websocket.send_json(hello)
            await websocket.receive()


@pytest.mark.no_request_cycles(requests=10)
async def test_tus_created(uploads):
    """Ten uploads are announced."""
    for number in range(10):
        name = base64.b64encode(f"{number}.png".encode()).decode()
        headers = {"Upload-Length": "5", "Upload-Metadata": f"filename {name}"}
        response = await uploads.post("/uploads", headers={**TUS, **headers})
        assert response.status == 201


@pytest.mark.no_request_cycles(requests=10)
async def test_tus_refused(uploads):
    """Uploads that nobody announced are asked for."""
    await ask(uploads, "HEAD", "/uploads/missing", headers=TUS)
