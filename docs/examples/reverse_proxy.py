"""A reverse proxy: its upstream refuses, cuts and times out, and nothing is kept."""

import asyncio
import os
from typing import AsyncIterator

import aiohttp
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from aiohttp_cyclebreak import client_cyclebreak, setup

HOP_BY_HOP = {"connection", "content-length", "host", "keep-alive", "transfer-encoding"}


class Proxy:
    """Sends each request on to one upstream, and its response back, both whole."""

    def __init__(self, upstream: str, timeout: float) -> None:
        self.upstream = upstream
        self.timeout = aiohttp.ClientTimeout(total=timeout)
        self.session: aiohttp.ClientSession

    async def run(self, app: web.Application) -> AsyncIterator[None]:
        self.session = aiohttp.ClientSession(
            timeout=self.timeout,
            trace_configs=[client_cyclebreak()],
            auto_decompress=False,
        )
        yield
        await self.session.close()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        try:
            async with self.session.request(
                request.method,
                self.upstream + request.path_qs,
                headers=passed_on(request.headers),
                data=await request.read(),
                allow_redirects=False,
            ) as answer:
                return web.Response(
                    status=answer.status,
                    headers=passed_on(answer.headers),
                    body=await answer.read(),
                )
        except asyncio.TimeoutError:
            return web.Response(status=504, text="the upstream takes too long")
        except aiohttp.ClientError as exc:
            reason = type(exc).__name__  # its text may name hosts and addresses
            raise web.HTTPBadGateway(text=f"the upstream failed: {reason}") from exc


def passed_on(headers: "CIMultiDictProxy[str]") -> "CIMultiDict[str]":
    return CIMultiDict(
        (name, value)
        for name, value in headers.items()
        if name.lower() not in HOP_BY_HOP
    )


def create_app(upstream: str, timeout: float = 30.0) -> web.Application:
    proxy = Proxy(upstream, timeout)
    app = web.Application()
    setup(app)
    app.cleanup_ctx.append(proxy.run)
    app.router.add_route("*", "/{path:.*}", proxy.handle)
    return app


if __name__ == "__main__":
    web.run_app(create_app(os.environ["UPSTREAM"]), host="127.0.0.1", port=8080)
