"""Tests that keep a leak from coming back, with pytest and pytest-aiohttp."""

import pytest
from aiohttp import web

from aiohttp_cyclebreak import cyclebreak


async def receive(request):
    """Store an image, which is sent as JSON."""
    data = await request.json()
    return web.json_response({"received": len(data["image"])})


def create_app():
    """Make the application, guarded."""
    app = web.Application(middlewares=[cyclebreak()])
    app.router.add_post("/image", receive)
    return app


@pytest.fixture
async def client(aiohttp_client):
    """Serve it."""
    return await aiohttp_client(create_app())


async def test_no_image(client, no_request_cycles):
    """One block of a test: what is no JSON is not kept."""
    async with no_request_cycles():
        response = await client.post("/image", data=b"no image")
    assert response.status == 500


@pytest.mark.no_request_cycles(requests=50)
async def test_many(client):
    """A whole test, with the closing of its client; it makes at least 50 requests."""
    for size in range(50):
        response = await client.post("/image", json={"image": "A" * size})
        assert await response.json() == {"received": size}


async def test_soak(client, soak):
    """The same call again and again: nothing grows."""

    async def upload():
        response = await client.post("/missing", data=b"no image")
        assert response.status == 404

    await soak(upload)
