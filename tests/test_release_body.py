"""An idle connection does not keep the body of its last request.

Without ``release_body=True`` only where nobody else has that request.
"""

import asyncio
import copy
import gc
import pickle
import traceback
import tracemalloc
import weakref
from contextvars import ContextVar, copy_context
from typing import Any, Callable, Dict, List, Optional

import pytest
from aiohttp import web

from aiohttp_cyclebreak import (
    BodyReleasedError,
    Radar,
    calls,
    client_cyclebreak,
    cyclebreak,
    guard_server,
    internals,
    keep_cycles,
    setup,
)

from .service import AIOHTTP, LOOPS, Service, alive, no_collector, run, serve, spin

pytestmark = pytest.mark.usefixtures("few_objects")

FORM = "application/x-www-form-urlencoded"


async def read(request: web.Request) -> web.Response:
    return web.Response(text=str(len(await request.read())))


async def parse(request: web.Request) -> web.Response:
    return web.Response(text=str(len(await request.post())))


async def ignore(request: web.Request) -> web.Response:
    return web.Response(text="ignored")


async def refuse(request: web.Request) -> web.Response:
    await request.read()
    raise web.HTTPBadRequest(text="no")


async def refuse_unread(request: web.Request) -> web.Response:
    raise web.HTTPBadRequest(text="no")


def application(handler: Any) -> web.Application:
    app = web.Application()
    app.router.add_post("/", handler)
    return app


async def held(service: Service, connections: int, body: bytes, *headers: str) -> int:
    """Bytes that so many idle connections hold after a request with this body."""
    clients = [await service.connect() for _ in range(connections)]
    for client in clients:  # a first one each, for what a connection itself takes
        await client.post("/", b"a", *headers)
        await client.answer()
    gc.collect()
    tracemalloc.start()
    for client in clients:
        await client.post("/", body, *headers)
        await client.answer()
    await spin()
    gc.collect()
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    for client in clients:
        client.close()
    await service.settle()
    return size


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("handler", "connections"), [(read, 200), (parse, 40), (refuse, 40)]
)
def test_idle_connections_hold_no_bodies(handler: Any, connections: int) -> None:
    """200 that uploaded 500 kB hold at most 1 MiB more than those with one byte."""
    limit = connections * 2**20 // 200

    async def main(guard: Any) -> int:
        app = application(handler)
        guard(app)
        async with serve(app) as service:
            headers = [f"Content-Type: {FORM}"]
            small = await held(service, connections, b"a", *headers)
            large = b"a=" + b"b" * 500_000
            return await held(service, connections, large, *headers) - small

    assert run(main(lambda app: None)) > connections * 400_000
    assert run(main(setup)) < limit
    assert run(main(lambda app: setup(app, radar=Radar()))) < limit
    assert run(main(lambda app: setup(app, release_body=True))) < limit


Install = Callable[[web.Application], Any]
GUARDS: Dict[str, Install] = {
    "bare": lambda app: None,
    "appended": lambda app: app.middlewares.append(cyclebreak()),
    "setup": setup,
}
INSTALL: Dict[str, Install] = {
    "appended": lambda app: app.middlewares.append(cyclebreak(release_body=True)),
    "setup": lambda app: setup(app, release_body=True),
    "radar": lambda app: setup(app, release_body=True, radar=Radar()),
    "server": lambda app: None,
}


def guard_of(install: str) -> Any:
    """What is done to the runner for one of INSTALL."""
    if install == "server":
        return lambda runner: guard_server(runner, release_body=True)
    return lambda runner: None


async def read_late(
    app: web.Application,
    read_again: Any,
    body: bytes,
    *headers: str,
    guard: Any = lambda runner: None,
) -> Any:
    """What a background task gets that reads the body after the response."""
    outcome: List[Any] = []
    go_on = asyncio.Event()
    tasks: List[Any] = []

    async def work(request: web.Request) -> None:
        await go_on.wait()
        try:
            outcome.append(await read_again(request))
        except Exception as exc:
            outcome.append(exc)

    @web.middleware
    async def spawn(request: web.Request, handler: Any) -> web.StreamResponse:
        tasks.append(asyncio.ensure_future(work(request)))
        return await handler(request)  # type: ignore[no-any-return]

    app.middlewares.insert(0, spawn)
    async with serve(app, guard) as service:
        client = await service.connect()
        await client.post("/", body, *headers)
        await client.answer()
        await spin()
        go_on.set()
        await tasks[0]
        client.close()
    return outcome[0]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("install", INSTALL)
@pytest.mark.parametrize("handler", [read, parse, ignore, refuse])
@pytest.mark.parametrize(
    "again",
    [
        lambda request: request.read(),
        lambda request: request.text(),
        lambda request: request.json(),
        lambda request: request.post(),
        lambda request: request.content.read(),
    ],
    ids=["read", "text", "json", "post", "content"],
)
def test_reading_it_later_is_an_error_that_names_the_option(
    again: Any, handler: Any, install: str, loop: str
) -> None:
    """Never an empty body."""
    app = application(handler)
    INSTALL[install](app)
    late = read_late(
        app, again, b"a=body", f"Content-Type: {FORM}", guard=guard_of(install)
    )
    outcome = run(late, loop)
    assert isinstance(outcome, BodyReleasedError)
    assert isinstance(outcome, web.PayloadAccessError)
    assert "release_body=True" in str(outcome)


def test_the_error_can_be_copied_and_pickled() -> None:
    """As aiohttp's own can: a pool of processes breaks if one of its answers cannot."""
    error = BodyReleasedError()
    for each in (copy.deepcopy(error), pickle.loads(pickle.dumps(error))):
        assert type(each) is BodyReleasedError
        assert str(each) == str(error)


@pytest.mark.parametrize("is_inner", [True, False])
@pytest.mark.parametrize("handler", [read, refuse])
def test_one_layer_that_releases_it_is_enough(handler: Any, is_inner: bool) -> None:
    """Whatever the other one says."""
    app = application(handler)
    layers = [cyclebreak(), cyclebreak(release_body=True)]
    app.middlewares.extend(layers if is_inner else layers[::-1])
    outcome = run(read_late(app, lambda request: request.read(), b"body"))
    assert isinstance(outcome, BodyReleasedError)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("handler", [ignore, refuse_unread])
@pytest.mark.parametrize("install", INSTALL)
def test_a_body_that_comes_after_the_answer_is_as_well(
    install: str, handler: Any, loop: str
) -> None:
    """Aiohttp has read it on, for the connection's sake."""

    async def main() -> Any:
        found: List[web.Request] = []

        @web.middleware
        async def keep(request: web.Request, handler: Any) -> web.StreamResponse:
            found.append(request)
            return await handler(request)  # type: ignore[no-any-return]

        app = application(handler)
        app.middlewares.append(keep)
        INSTALL[install](app)
        async with serve(app, guard_of(install)) as service:
            client = await service.connect()
            head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 8\r\n\r\n"
            await client.send(head + b"half")
            await client.answer()
            await client.send(b"half")
            while not found[0].content.is_eof():
                await asyncio.sleep(0)
            await spin()
            with pytest.raises(web.PayloadAccessError) as caught:
                await found[0].read()
            client.close()
            return caught.value

    outcome = run(main(), loop)
    assert isinstance(outcome, BodyReleasedError)
    assert "release_body=True" in str(outcome)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("handler", [read, refuse])
@pytest.mark.parametrize("guard", GUARDS)
def test_without_the_option_a_background_task_can_read_it_on(
    guard: str, handler: Any, loop: str
) -> None:
    """It is what aiohttp does."""
    app = application(handler)
    GUARDS[guard](app)
    assert run(read_late(app, lambda request: request.read(), b"body"), loop) == b"body"


def strongly(request: web.Request) -> Any:
    return lambda: request


in_context: "ContextVar[Optional[web.Request]]" = ContextVar("in_context", default=None)


def keep_in_context(request: web.Request) -> Any:
    """As every timer and task does that is made from then on."""
    in_context.set(request)
    context = copy_context()
    return lambda: context[in_context]


class Typed(web.Request):
    """Has all that the request has, and not the request."""

    def __init__(self, request: web.Request) -> None:
        self.__dict__ = request.__dict__


def share_state(request: web.Request) -> Any:
    typed = Typed(request)
    return lambda: typed


@pytest.mark.parametrize("keep", [strongly, weakref.ref, keep_in_context, share_state])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("guard", GUARDS)
def test_whoever_has_the_request_can_read_it_on(
    guard: str, fails: bool, keep: Any
) -> None:
    """One reference more is enough, and so is a weak one, while it lives."""

    async def main() -> bytes:
        found: List[Any] = []

        async def handler(request: web.Request) -> web.Response:
            await request.read()
            found.append(keep(request))
            if fails:
                raise web.HTTPBadRequest
            return web.Response()

        app = application(handler)
        GUARDS[guard](app)
        async with serve(app) as service:
            client = await service.connect()
            await client.post("/", b"body")
            await client.answer()
            await spin()
            request = found[0]()
            body = await request.read()
            client.close()
            return bytes(body)

    assert run(main()) == b"body"


def test_keep_cycles_leaves_the_body_alone() -> None:
    """The route is left as it is, whole."""
    app = application(keep_cycles(read))
    setup(app, release_body=True)
    assert run(read_late(app, lambda request: request.read(), b"body")) == b"body"


async def kept_by_an_idle_connection(app: web.Application) -> List[int]:
    """The bytes of the body that each request has which is left."""
    others = alive(web.BaseRequest)  # held, so that an id stays its own
    ids = set(map(id, others))
    with no_collector():
        async with serve(app) as service:
            client = await service.connect()
            await client.post("/", b"body")
            assert (await client.answer())[0] in (200, 400)
            await spin()
            found = [
                internals.body_size(request)
                for request in alive(web.BaseRequest)
                if id(request) not in ids
            ]
            client.close()
            await service.settle()
    return found


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("keep", [True, False])
def test_keep_cycles_leaves_the_body_of_an_idle_connection(
    keep: bool, guard: str
) -> None:
    """Nobody but the connection has it."""
    app = application(keep_cycles(read) if keep else read)
    GUARDS[guard](app)
    left = 4 if keep or guard == "bare" else 0
    assert run(kept_by_an_idle_connection(app)) == [left]


@pytest.mark.parametrize("guard", GUARDS)
def test_who_refers_to_a_response_weakly_prints_its_traceback(guard: str) -> None:
    """All the same the idle connection does not keep the body."""
    found: List[Any] = []

    async def refuse(request: web.Request) -> web.Response:
        await request.read()
        try:
            raise web.HTTPBadRequest
        except web.HTTPBadRequest as exc:
            found.append(weakref.ref(exc))
            raise

    others = alive()  # held, so that an id stays its own
    ids = set(map(id, others))

    async def main() -> int:
        app = application(refuse)
        GUARDS[guard](app)
        with no_collector():
            async with serve(app) as service:
                client = await service.connect()
                await client.post("/", b"body")
                await client.answer()
                await spin()
                frames = traceback.format_tb(found[0]().__traceback__)
                assert "in refuse" in frames[-1]
                (request,) = (each for each in alive() if id(each) not in ids)
                size = internals.body_size(request)
                client.close()
                await service.settle()
        return size

    assert run(main()) == (4 if guard == "bare" else 0)


@pytest.mark.parametrize("guard", GUARDS)
def test_a_response_that_is_finalized_prints_its_traceback(guard: str) -> None:
    """All the same the idle connection does not keep the body."""
    printed: List[str] = []

    class Refused(web.HTTPBadRequest):
        def __del__(self) -> None:
            printed.extend(traceback.format_tb(self.__traceback__))

    async def refuse(request: web.Request) -> web.Response:
        await request.read()
        raise Refused

    app = application(refuse)
    GUARDS[guard](app)
    assert run(kept_by_an_idle_connection(app)) == [4 if guard == "bare" else 0]
    gc.collect()
    assert "in refuse" in printed[-1]


def setup_and_append(app: web.Application) -> None:
    setup(app)
    app.middlewares.append(cyclebreak())


def append_twice(app: web.Application) -> None:
    app.middlewares.extend([cyclebreak(), cyclebreak()])


async def store_time(request: web.Request, response: web.StreamResponse) -> None:
    request["elapsed"] = 1.0


@pytest.mark.parametrize("handler", [read, refuse])
@pytest.mark.parametrize("stores", [True, False])
@pytest.mark.parametrize(
    "install",
    [*GUARDS.values(), setup_and_append, append_twice],
    ids=[*GUARDS, "setup and appended", "appended twice"],
)
@pytest.mark.filterwarnings("ignore:It is recommended to use web.RequestKey")
def test_whoever_else_guards_it_or_stores_something(
    install: Install, stores: bool, handler: Any
) -> None:
    """Several layers look at one request; none of them counts as another holder."""
    app = application(handler)
    if stores:
        app.on_response_prepare.append(store_time)
    install(app)
    left = 4 if install is GUARDS["bare"] else 0
    assert run(kept_by_an_idle_connection(app)) == [left]


@pytest.mark.skipif(
    AIOHTTP < (3, 10, 6),
    reason="the body has an error of its own: both are severed at once",
)
@pytest.mark.parametrize("guard", GUARDS)
def test_who_has_the_task_of_a_request_finds_what_it_has_raised(guard: str) -> None:
    """With its locals, by the response, and long after that was sent."""
    tasks: List[Any] = []

    @web.middleware
    async def track(request: web.Request, handler: Any) -> web.StreamResponse:
        tasks.append(asyncio.current_task())
        return await handler(request)  # type: ignore[no-any-return]

    async def refuse_with_marker(request: web.Request) -> web.Response:
        marker = await request.text()
        raise web.HTTPBadRequest(text=marker)

    async def main() -> None:
        app = application(refuse_with_marker)
        app.middlewares.append(track)
        GUARDS[guard](app)
        async with serve(app) as service:
            client = await service.connect()
            await client.post("/", b"body")
            assert await client.answer() == (400, "body")
            await spin()
            response: Any = tasks.pop().result()[0]
            frames = [frame for frame, _ in traceback.walk_tb(response.__traceback__)]
            assert "marker" in frames[-1].f_locals
            frames.clear()
            client.close()
            await service.settle()

    run(main())


@pytest.mark.filterwarnings("ignore:It is recommended to use web.RequestKey")
def test_an_outer_layer_is_asked_what_to_keep() -> None:
    """Of what is stored when the inner one has seen a success."""
    asked: List[BaseException] = []

    def keep(request: web.Request, exc: BaseException) -> bool:
        asked.append(exc)
        return True

    @web.middleware
    async def store_error(request: web.Request, handler: Any) -> web.StreamResponse:
        response: web.StreamResponse = await handler(request)
        try:
            marker = "audit"
            raise LookupError(marker)
        except LookupError as exc:
            request["error"] = exc
        return response

    async def main() -> None:
        app = application(read)
        app.middlewares.extend([cyclebreak(keep=keep), store_error, cyclebreak()])
        async with serve(app) as service:
            client = await service.connect()
            await client.post("/", b"body")
            assert (await client.answer())[0] == 200
            client.close()
            await service.settle()
        # Before aiohttp 3.10.6 there is the body's own as well.
        (error,) = [exc for exc in asked if isinstance(exc, LookupError)]
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        assert "marker" in frames[-1].f_locals

    run(main())


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_what_is_kept_stays_whole_when_it_is_looked_at_again(method: str) -> None:
    """Its frame has the request's own task, and the request has a body."""
    kept: List[BaseException] = []

    async def fail(request: web.Request) -> web.Response:
        await request.read()
        task = asyncio.current_task()
        error = web.HTTPConflict(text=repr(task is None))
        kept.append(error)
        raise error

    async def main() -> None:
        app = web.Application()
        app.router.add_route("*", "/", fail)
        setup(app, keep=lambda request, exc: True)
        async with serve(app) as service:
            client = await service.connect()
            await (client.post("/", b"body") if method == "POST" else client.get("/"))
            assert (await client.answer())[0] == 409
            await spin()
            client.close()
            await service.settle()

    run(main())
    frames = [frame for frame, _ in traceback.walk_tb(kept.pop().__traceback__)]
    assert "task" in frames[-1].f_locals


def test_a_file_that_is_in_use_is_left_as_it_was() -> None:
    """A background task has it from the form; only the form itself is let go.

    aiohttp closes the files of a form after the response, but for the oldest.
    """
    outcome: List[Any] = []
    body = (
        b"--limit\r\n"
        b'Content-Disposition: form-data; name="image"; filename="a.png"\r\n'
        b"Content-Type: image/png\r\n\r\n"
        b"pixels\r\n"
        b"--limit--\r\n"
    )

    async def main(release: bool) -> None:
        go_on = asyncio.Event()
        tasks: List[Any] = []

        async def work(file: Any) -> None:
            await go_on.wait()
            outcome.append("closed" if file.closed else file.read())
            file.close()

        async def keep_file(request: web.Request) -> web.Response:
            form = await request.post()
            field: Any = form["image"]
            tasks.append(asyncio.ensure_future(work(field.file)))
            return web.Response()

        app = application(keep_file)
        setup(app, release_body=release)
        async with serve(app) as service:
            client = await service.connect()
            await client.post(
                "/", body, "Content-Type: multipart/form-data; boundary=limit"
            )
            await client.answer()
            await spin()
            go_on.set()
            await tasks[0]
            client.close()

    run(main(release=False))
    run(main(release=True))
    assert outcome[0] == outcome[1]
    assert outcome[0] in ("closed", b"pixels")


def test_the_connection_goes_on() -> None:
    """The next request on it, with a body and without, is served as ever."""

    async def main() -> List[Any]:
        app = application(read)
        setup(app, release_body=True)
        async with serve(app) as service:
            client = await service.connect()
            answers = []
            for size in (3, 100_000, 0, 5):
                await client.post("/", b"b" * size)
                answers.append(await client.answer())
            client.close()
            return answers

    assert run(main()) == [(200, "3"), (200, "100000"), (200, "0"), (200, "5")]


def test_an_unread_body_does_not_keep_its_request() -> None:
    """The client has sent the rest, and the connection has gone on."""

    async def main() -> List[str]:
        app = application(ignore)
        app.router.add_route("*", "/unread", ignore)
        setup(app)
        async with serve(app) as service:
            client = await service.connect()
            head = b"POST /unread HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"
            await client.send(head % 100_000)
            await client.answer()
            await spin()
            await client.send(bytes(100_000))
            for _ in range(2):
                await client.get("/unread")
                await client.answer()
                await spin()
            methods = [each.method for each in alive() if each.path == "/unread"]
            client.close()
            await service.settle()
            return methods

    with no_collector():
        assert run(main()) == ["GET"]


def test_following_outgoing_calls_keeps_no_body(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has a weak reference to each request; that reads no body."""
    monkeypatch.setattr(calls, "are_followed", False)
    client_cyclebreak()
    assert calls.are_followed

    async def main() -> bool:
        app = application(read)
        app.router.add_post("/followed", read)
        setup(app)
        async with serve(app) as service:
            client = await service.connect()
            await client.post("/followed", b"body")
            await client.answer()
            await spin()
            (request,) = [each for each in alive() if each.path == "/followed"]
            client.close()
            return internals.has_read_body(request)

    assert not run(main())


async def read_too_late(uploads: int, install: Install) -> int:
    """How many requests are left for good of bodies that came after the answer."""
    late: List[Any] = []
    go_on = asyncio.Event()

    async def read_later(request: web.Request) -> None:
        await go_on.wait()
        with pytest.raises(web.PayloadAccessError):
            await request.content.read()

    async def answer_at_once(request: web.Request) -> web.Response:
        late.append(asyncio.ensure_future(read_later(request)))
        return web.Response()

    app = application(answer_at_once)
    app.router.add_get("/", ignore)
    install(app)
    gc.collect()
    before = len(alive(web.BaseRequest))
    async with serve(app) as service:
        client = await service.connect()
        for _ in range(uploads):
            await client.send(
                b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\n"
            )
            assert (await client.answer())[0] == 200
            await spin()
            await client.send(b"body")
            await client.get()  # which is answered when the body has come
            assert (await client.answer())[0] == 200
        go_on.set()
        await asyncio.gather(*late)
        late.clear()
        client.close()
        await service.settle()
    with no_collector():  # which collects first
        return len(alive(web.BaseRequest)) - before


@pytest.mark.parametrize("uploads", [1, 3])
def test_a_body_that_comes_after_the_answer_and_is_read_too_late(uploads: int) -> None:
    """On a connection that goes on, all share aiohttp's one error from 3.10.6 on."""
    shared: Any = internals._PAYLOAD_ACCESS_ERROR or web.PayloadAccessError()
    shared.__traceback__ = None  # the leaks of the catalogue have left it
    assert run(read_too_late(uploads, GUARDS["setup"])) == 0
    assert shared.__traceback__ is None
    if internals._PAYLOAD_ACCESS_ERROR is None:
        pytest.skip("each body has an error of its own")
    assert run(read_too_late(uploads, GUARDS["bare"])) >= uploads
    shared.__traceback__ = None


async def look_away(request: web.Request) -> web.Response:
    return web.Response()


async def refuse_it(request: web.Request) -> web.Response:
    raise web.HTTPRequestEntityTooLarge(max_size=1, actual_size=2)


async def read_a_little(request: web.Request) -> web.Response:
    await request.content.read(4)
    raise web.HTTPBadRequest


# None of these lets it go on: see docs/server.rst.
LEAVES_IT: Dict[str, Install] = {"bare": GUARDS["bare"], "keep_cycles": setup}
LETS_GO_ON: Dict[str, Install] = {**GUARDS, **INSTALL}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("handle", [look_away, refuse_it, read_a_little])
@pytest.mark.parametrize("guard", {**LETS_GO_ON, **LEAVES_IT})
def test_a_body_that_nobody_reads_does_not_stop_a_connection(
    guard: str, handle: Any, loop: str
) -> None:
    """It reads the next request, and sees its client go away (aiohttp #10169)."""

    async def main() -> bool:
        async def handler(request: web.Request) -> web.StreamResponse:
            while not request.content.is_eof():
                await asyncio.sleep(0)
            return await handle(request)  # type: ignore[no-any-return]

        app = application(keep_cycles(handler) if guard == "keep_cycles" else handler)
        app.router.add_get("/", look_away)
        {**LETS_GO_ON, **LEAVES_IT}[guard](app)
        guard_runner = guard_server if guard == "server" else id
        async with serve(app, guard_runner) as service:
            client = await service.connect()
            await client.post("/", bytes(2**17 + 1))  # reading stops at the last byte
            await client.answer()
            await spin()
            server: Any = service.runner.server
            (connection,) = server.connections
            goes_on: bool = connection.transport.is_reading()
            if goes_on:
                await client.get()
                assert (await client.answer())[0] == 200
            else:
                connection.force_close()
            client.close()
            await service.settle()
            return goes_on

    assert run(main(), loop) is (guard not in LEAVES_IT or AIOHTTP >= (3, 11, 11))
