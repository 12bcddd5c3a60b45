"""Any sequence of requests on one server: right answers, and nothing is left.

Hypothesis makes the sequences and, when one goes wrong, the shortest.  What belongs
together (an exception that several requests share) may overlap with anything else.
"""

import asyncio
import gc
import os
import traceback
from typing import Any, Callable, Dict, List, Optional, Tuple

import pytest
from aiohttp import web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiohttp_cyclebreak import connections, holders, setup

from .service import LOOPS, TIMEOUT, Client, run, serve, spin
from .test_hostile_clients import TEXT_FRAME, UPGRADE, new_objects, until

settings.register_profile(
    "ci-servers", derandomize=True, deadline=None, max_examples=20, database=None
)
settings.register_profile(
    "soak-servers",
    deadline=None,
    max_examples=1_000,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
PROFILE = os.environ.get("CYCLEBREAK_HYPOTHESIS", "ci") + "-servers"


class Application:
    """Handlers for each kind of request; those that wait are let go by the driver."""

    def __init__(self) -> None:
        self.shared = LookupError("one for all")
        self.begun = 0
        self.ended = 0
        self.release = asyncio.Event()

    def make(self) -> web.Application:
        app = web.Application(middlewares=[self.translate])
        for handler in (
            self.succeed,
            self.redirect,
            self.fail,
            self.hold,
            self.chain,
            self.share,
            self.wait,
            self.shared_wait,
            self.late,
        ):
            app.router.add_get(f"/{handler.__name__}", self.counted(handler))
        app.router.add_post("/upload", self.counted(self.upload))
        app.router.add_post("/refuse", self.counted(self.refuse))
        app.router.add_get("/websocket", self.counted(self.websocket))
        return app

    def counted(self, handler: Any) -> Any:
        async def counting(request: web.Request) -> web.StreamResponse:
            self.begun += 1
            try:
                return await handler(request)  # type: ignore[no-any-return]
            finally:
                self.ended += 1

        return counting

    @web.middleware
    async def translate(self, request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            return await handler(request)  # type: ignore[no-any-return]
        except LookupError as exc:
            # It is in hand for some turns of the loop, and must be whole till then.
            name = request.path[1:]
            await spin()
            own = [
                frame.f_code.co_name
                for frame, _ in traceback.walk_tb(exc.__traceback__)
                if frame.f_locals.get("request") is request
            ]
            assert name in own  # and not only frames of others, or emptied ones
            return web.Response(status=502, text=str(exc))

    async def succeed(self, request: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def redirect(self, request: web.Request) -> web.Response:
        raise web.HTTPFound("/succeed")

    async def fail(self, request: web.Request) -> web.Response:
        raise ValueError("failed")

    async def hold(self, request: web.Request) -> web.Response:
        kept = web.HTTPConflict(text="held")
        raise kept

    async def chain(self, request: web.Request) -> web.Response:
        try:
            try:
                raise KeyError("key")
            except KeyError as exc:
                request["error"] = exc
                raise ValueError from exc
        except ValueError as exc:
            raise web.HTTPBadGateway(text="chained") from exc

    async def share(self, request: web.Request) -> web.Response:
        raise self.shared

    async def wait(self, request: web.Request) -> web.Response:
        await self.release.wait()
        kept = web.HTTPGone(text="waited")
        raise kept

    async def shared_wait(self, request: web.Request) -> web.Response:
        await self.release.wait()
        raise self.shared

    async def late(self, request: web.Request) -> web.Response:
        async def read() -> None:
            await spin()
            await request.read()

        task = asyncio.ensure_future(read())
        task.add_done_callback(lambda task: task.exception())
        return web.Response(text="early")

    async def upload(self, request: web.Request) -> web.Response:
        try:
            return web.Response(text=str(len(await request.read())))
        except Exception as exc:
            kept = exc  # noqa: F841
            raise

    async def refuse(self, request: web.Request) -> web.Response:
        raise web.HTTPRequestEntityTooLarge(max_size=1, actual_size=2, text="too large")

    async def websocket(self, request: web.Request) -> web.StreamResponse:
        response = web.WebSocketResponse()
        await response.prepare(request)
        async for message in response:
            if message.data == "fail":
                raise ValueError("in a websocket")
            await response.send_str(message.data)
        return response


# What a request is to be answered with: the status, and the text where it is ours.
ANSWERS: Dict[str, Tuple[int, Optional[str]]] = {
    "succeed": (200, "ok"),
    "redirect": (302, None),
    "fail": (500, None),
    "hold": (409, "held"),
    "chain": (502, "chained"),
    "share": (502, "one for all"),
    "late": (200, "early"),
    "missing": (404, None),
    "upload": (200, "70000"),
    "refuse": (413, "too large"),
    "wait": (410, "waited"),
    "shared_wait": (502, "one for all"),
}
AT_ONCE = ("succeed", "redirect", "fail", "hold", "chain", "share", "late", "missing")
BODIES = ("upload", "refuse")
WAITING = ("wait", "shared_wait")

STEPS = st.one_of(
    st.tuples(st.just("ask"), st.sampled_from(AT_ONCE), st.booleans()),
    st.tuples(st.just("post"), st.sampled_from(BODIES), st.booleans()),
    st.tuples(st.just("pipeline"), st.sampled_from(AT_ONCE), st.sampled_from(AT_ONCE)),
    st.tuples(st.just("begin"), st.sampled_from(WAITING)),
    st.tuples(st.just("drop"), st.booleans()),
    st.tuples(st.just("drop upload"), st.booleans()),
    st.tuples(st.just("finish")),
    st.tuples(st.just("websocket"), st.sampled_from(["close", "reset", "fail"])),
)


class Driver:
    """The clients, and what each of them is still to be answered."""

    def __init__(self, application: Application, service: Any) -> None:
        self.application = application
        self.service = service
        self.waiting: List[Tuple[Client, str]] = []
        self.kept_alive: Optional[Client] = None

    async def do(self, step: Tuple[Any, ...]) -> None:
        name, *arguments = step
        await getattr(self, name.replace(" ", "_"))(*arguments)

    async def expect(self, client: Client, name: str) -> None:
        status, text = await client.answer()
        expected, expected_text = ANSWERS[name]
        assert status == expected, name
        assert expected_text is None or text == expected_text

    async def client(self, again: bool) -> Client:
        """A connection: a new one, or one that has been used before."""
        if not again:
            return await self.service.connect()  # type: ignore[no-any-return]
        if self.kept_alive is None:
            self.kept_alive = await self.service.connect()
        return self.kept_alive

    def done_with(self, client: Client, name: str, again: bool) -> None:
        if not again or name == "fail":  # which closes the connection
            client.close()
            if again:
                self.kept_alive = None

    async def ask(self, name: str, again: bool) -> None:
        client = await self.client(again)
        await client.get(f"/{name}")
        await self.expect(client, name)
        self.done_with(client, name, again)

    async def post(self, name: str, again: bool) -> None:
        client = await self.client(again)
        await client.post(f"/{name}", b"x" * 70_000)
        await self.expect(client, name)
        self.done_with(client, name, again)

    async def pipeline(self, first: str, second: str) -> None:
        client = await self.service.connect()
        requests = [f"GET /{n} HTTP/1.1\r\nHost: a\r\n\r\n" for n in (first, second)]
        await client.send("".join(requests).encode())
        await self.expect(client, first)
        if first != "fail":
            await self.expect(client, second)
        client.close()

    async def begin(self, name: str) -> None:
        begun = self.application.begun
        client = await self.service.connect()
        await client.get(f"/{name}")
        await until(lambda: self.application.begun > begun)
        self.waiting.append((client, name))

    async def drop(self, reset: bool) -> None:
        if self.waiting:
            client, _ = self.waiting.pop()
            (client.reset if reset else client.close)()

    async def drop_upload(self, reset: bool) -> None:
        begun = self.application.begun
        client = await self.service.connect()
        await client.send(
            b"POST /upload HTTP/1.1\r\nHost: a\r\nContent-Length: 70000\r\n\r\nhalf"
        )
        await until(lambda: self.application.begun > begun)
        (client.reset if reset else client.close)()

    async def websocket(self, how: str) -> None:
        client = await self.service.connect()
        await client.send(UPGRADE)
        assert (await client.answer())[0] == 101
        await client.send(TEXT_FRAME)
        if how == "fail":
            await client.send(b"\x81\x84\0\0\0\0fail")
            await self.until_closed(client)
        (client.reset if how == "reset" else client.close)()

    async def until_closed(self, client: Client) -> None:
        loop = asyncio.get_running_loop()
        while await asyncio.wait_for(loop.sock_recv(client.sock, 65536), TIMEOUT):
            pass

    async def finish(self) -> None:
        """Everybody who waits is answered, and whoever went away is done as well."""
        self.application.release.set()
        while self.waiting:
            client, name = self.waiting.pop(0)
            await self.expect(client, name)
            client.close()
        await until(lambda: self.application.ended == self.application.begun)
        self.application.release.clear()

    async def end(self) -> None:
        await self.finish()
        if self.kept_alive is not None:
            self.kept_alive.close()
            self.kept_alive = None
        await self.service.settle()


async def interleave(
    steps: List[Tuple[Any, ...]],
    guard_app: Callable[[web.Application], Any],
) -> Dict[type, int]:
    """Take the steps; say what is left when all clients have gone."""
    application = Application()
    app = application.make()
    guard_app(app)
    held = len(connections.followed_connections), len(holders.in_hand)
    async with serve(app) as service:
        driver = Driver(application, service)
        await driver.ask("succeed", False)  # fills the caches
        await service.settle()
        with new_objects() as count:
            for step in steps:
                await driver.do(step)
            await driver.end()
            left = count()
            assert (len(connections.followed_connections), len(holders.in_hand)) == held
    return left


@pytest.mark.parametrize("loop", LOOPS)
def test_every_interleaving(loop: str) -> None:
    """After each, every answer was right, and no request or response is left."""

    @settings(settings.get_profile(PROFILE))
    @given(st.lists(STEPS, min_size=1, max_size=12))
    def every(steps: List[Tuple[Any, ...]]) -> None:
        left = run(interleave(steps, setup), loop)
        assert left[web.BaseRequest] == 0
        assert left[web.StreamResponse] == 0

    every()


def test_the_same_bare() -> None:
    """One interleaving that leaves requests behind: the property has teeth."""
    steps = [("ask", "hold", False), ("begin", "wait"), ("drop", True), ("finish",)]
    assert run(interleave(steps, lambda app: None))[web.BaseRequest] >= 2
    assert run(interleave(steps[:1], setup))[web.BaseRequest] == 0
    gc.collect()
