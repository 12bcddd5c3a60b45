"""tenacity, graphql-core, anyio, python-socketio: failures that leave no handler.

Each keeps its exceptions in reference cycles of its own, and no middleware sees what a
handler swallows; one that it stores in its request is seen.
"""

import asyncio
import socket
import sys
from typing import Any, Callable, Dict, List, Tuple

import aiohttp
import pytest
from aiohttp import ClientSession, TCPConnector, web

from aiohttp_cyclebreak import client_cyclebreak

from ..service import alive, no_collector, run, serve
from .compare import BARE, GUARDED, POSITIONS, Install, answers_and_left

REASON = "needs the extra 'company'"

Handle = Callable[[web.Request, BaseException], web.Response]


def swallow(request: web.Request, exc: BaseException) -> web.Response:
    return web.Response(text=type(exc).__name__)


def store(request: web.Request, exc: BaseException) -> web.Response:
    request["error"] = exc
    return web.Response(text=type(exc).__name__)


def refuse(request: web.Request, exc: BaseException) -> web.Response:
    raise web.HTTPBadGateway(text=type(exc).__name__) from exc


LEFT: Dict[Handle, int] = {swallow: 3, store: 0, refuse: 0}  # of three, guarded


def gateway(how: str, handle: Handle, **options: Any) -> web.Application:
    """An application whose handler tries to call another service, twice."""
    tenacity = pytest.importorskip("tenacity", reason=REASON)
    sock = socket.socket()  # bound, and nobody listens
    sock.bind(("127.0.0.1", 0))

    @tenacity.retry(stop=tenacity.stop_after_attempt(2), **options)  # type: ignore[misc]
    async def call(session: ClientSession, port: int) -> None:
        url = f"http://127.0.0.1:{port}/fail"
        async with session.get(url, raise_for_status=how == "told") as response:
            response.raise_for_status()

    sessions: List[ClientSession] = []

    async def take_part(app: web.Application) -> Any:
        connector = TCPConnector(force_close=True)  # /fail is on the same server
        traces = [client_cyclebreak()]
        async with ClientSession(connector=connector, trace_configs=traces) as session:
            sessions.append(session)
            yield
            sessions.clear()
        sock.close()

    async def fail(request: web.Request) -> web.Response:
        return web.Response(status=503)

    async def show(request: web.Request) -> web.Response:
        address = sock.getsockname()
        if how != "refused":
            address = request.get_extra_info("sockname")
        try:
            await call(sessions[0], address[1])
        except (aiohttp.ClientError, tenacity.RetryError) as exc:
            return handle(request, exc)
        return web.Response()

    app = web.Application()
    app.cleanup_ctx.append(take_part)
    app.router.add_get("/fail", fail)
    app.router.add_get("/", show)
    return app


def tried(
    how: str, handle: Handle, install: Install, **options: Any
) -> Tuple[List[str], int]:
    """What comes of three requests, and how many are left, those to /fail included."""
    answers, left = answers_and_left(
        lambda: gateway(how, handle, **options), install, *["/"] * 3
    )
    return [text for _, text in answers], left


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("handle", LEFT)
@pytest.mark.parametrize("how", ["refused", "status"])
def test_a_retry_error(how: str, handle: Handle, position: str) -> None:
    """Tenacity's future has the failure, and its traceback leads to the future."""
    texts, kept = tried(how, handle, BARE[position])
    assert texts == ["RetryError"] * 3
    assert kept >= 3
    assert tried(how, handle, GUARDED[position]) == (texts, LEFT[handle])


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("handle", LEFT)
@pytest.mark.parametrize(
    ("how", "name"),
    [
        ("refused", "ClientConnectorError"),
        ("status", "ClientResponseError"),
        ("told", "ClientResponseError"),  # by the call itself
    ],
)
def test_a_failure_that_is_raised_again(
    how: str, name: str, handle: Handle, position: str
) -> None:
    """The session tells of a call that fails, and not of what its response raises."""
    left = LEFT[handle] if how == "status" else 0
    texts, kept = tried(how, handle, BARE[position], reraise=True)
    assert texts == [name] * 3
    assert kept >= 3 or how != "status"  # not every version keeps the others
    assert tried(how, handle, GUARDED[position], reraise=True) == (texts, left)


def test_a_function_that_a_handler_decorates() -> None:
    """What tenacity makes of it refers to itself, and it to the request."""
    tenacity = pytest.importorskip("tenacity", reason=REASON)

    async def show(request: web.Request) -> web.Response:
        @tenacity.retry  # type: ignore[misc]
        async def path() -> str:
            return request.path

        return web.Response(text=await path())

    def make() -> web.Application:
        app = web.Application()
        app.router.add_get("/", show)
        return app

    answers, left = answers_and_left(make, GUARDED["setup"], *["/"] * 3)
    assert [text for _, text in answers] == ["/"] * 3
    assert left == 3


SCHEMA = "type Query { fine: String soon: String later: String }"


class Resolvers:
    def fine(self, info: Any) -> str:
        return "fine"

    def soon(self, info: Any) -> str:
        raise ValueError(info.context["request"].path)

    async def later(self, info: Any) -> str:
        await asyncio.sleep(0)
        raise ValueError(info.context["request"].path)


def executed(
    field: str, handle: Handle, install: Install
) -> Tuple[List[str], int, bool]:
    """What comes of three operations, how many requests are left, and must be.

    From graphql-core 3.3 on its executor is a circle of its own, without a frame.
    """
    graphql = pytest.importorskip("graphql", reason=REASON)
    schema = graphql.build_schema(SCHEMA)

    async def show(request: web.Request) -> web.Response:
        result = await graphql.graphql(
            schema,
            f"{{ {field} }}",
            Resolvers(),
            context_value={"request": request},
        )
        for error in result.errors or ():
            return handle(request, error)
        return web.json_response(result.data)

    def make() -> web.Application:
        app = web.Application()
        app.router.add_get("/", show)
        return app

    answers, left = answers_and_left(make, install, *["/"] * 3)
    return [text for _, text in answers], left, graphql.version_info >= (3, 3)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("handle", LEFT)
@pytest.mark.parametrize("field", ["soon", "later"])
def test_a_resolver_that_fails(field: str, handle: Handle, position: str) -> None:
    """Its error is a part of the result, and in what executes the operation."""
    texts, kept, _ = executed(field, handle, BARE[position])
    assert texts == ["GraphQLError"] * 3
    assert kept == 3
    guarded, left, is_circle = executed(field, handle, GUARDED[position])
    assert guarded == texts
    assert left == (3 if is_circle else LEFT[handle])


def test_an_operation_that_succeeds() -> None:
    texts, left, is_circle = executed("fine", swallow, GUARDED["setup"])
    assert texts == ['{"fine": "fine"}'] * 3
    assert left == (3 if is_circle else 0)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="no task group, or no circle")
@pytest.mark.parametrize("group", ["anyio", "asyncio"])
def test_a_child_that_its_task_group_cancels(group: str) -> None:
    """The one of anyio asks for its end, in a frame that then has that in a local."""
    anyio = pytest.importorskip("anyio", reason=REASON)

    async def wait(request: web.Request) -> None:
        await asyncio.Event().wait()

    async def show(request: web.Request) -> web.Response:
        if group == "anyio":
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait, request)
                await asyncio.sleep(0)
                tasks.cancel_scope.cancel()
        else:
            async with asyncio.TaskGroup() as tasks:
                child = tasks.create_task(wait(request))
                await asyncio.sleep(0)
                child.cancel()
        raise web.HTTPConflict(text="done")

    def make() -> web.Application:
        app = web.Application()
        app.router.add_get("/", show)
        return app

    bare, kept = answers_and_left(make, BARE["setup"], *["/"] * 3)
    guarded, left = answers_and_left(make, GUARDED["setup"], *["/"] * 3)
    assert guarded == bare
    assert [text for _, text in guarded] == ["done"] * 3
    if group == "anyio":
        assert kept == left == 3
    else:
        assert left == 0


def test_a_websocket_of_socket_io() -> None:
    """Its end is an exception that is swallowed, in a frame that has the request."""
    socketio = pytest.importorskip("socketio", reason=REASON)

    async def main(install: Install) -> int:
        server = socketio.AsyncServer(
            async_mode="aiohttp",
            monitor_clients=False,
            ping_interval=0.05,  # a task waits for as long, and the test for the task
        )
        app = web.Application()
        server.attach(app)
        install(app)
        with no_collector():
            before = len(alive())
            async with serve(app) as service, ClientSession() as session:
                for _ in range(3):
                    async with session.ws_connect(
                        f"http://127.0.0.1:{service.port}/socket.io/"
                        "?EIO=4&transport=websocket"
                    ) as websocket:
                        assert "sid" in (await websocket.receive()).data
                await service.settle()
                return len(alive()) - before

    assert run(main(BARE["setup"])) == 3
    assert run(main(GUARDED["setup"])) == 3
