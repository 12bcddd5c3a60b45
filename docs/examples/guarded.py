"""A service that receives images as JSON, guarded by one line."""

from aiohttp import web

from aiohttp_cyclebreak import cyclebreak


async def receive(request: web.Request) -> web.Response:
    data = await request.json()
    return web.json_response({"received": len(data["image"])})


def create_app() -> web.Application:
    app = web.Application()
    app.router.add_post("/image", receive)
    app.middlewares.append(cyclebreak())
    return app


if __name__ == "__main__":
    web.run_app(create_app(), host="127.0.0.1", port=8080)
