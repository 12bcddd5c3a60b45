"""A service that runs its own runner, in place of web.run_app()."""

import asyncio
import signal

from aiohttp import web

from aiohttp_cyclebreak import guard_server


async def refuse(request: web.Request) -> web.Response:
    raise web.HTTPBadRequest(text="no")


def create_app() -> web.Application:
    app = web.Application()
    app.router.add_get("/", refuse)
    return app


async def main(host: str, port: int) -> None:
    runner = web.AppRunner(create_app())
    await runner.setup()
    guard_server(runner, release_body=True)
    await web.TCPSite(runner, host, port).start()
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    print("serving on", *runner.addresses, flush=True)
    try:
        await stopped.wait()
    finally:
        await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(main("127.0.0.1", 0))
