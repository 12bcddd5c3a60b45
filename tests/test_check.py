"""The command line's ``check``: an application of one's own, bare and guarded."""

import asyncio
import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import signal
import socket
import sys
import urllib.request
import warnings
from typing import Any, Dict, List

import pytest
from aiohttp import web

from aiohttp_cyclebreak import check, check_process, cli
from aiohttp_cyclebreak.check import CheckFailed, Plan
from aiohttp_cyclebreak.check_process import NotThere, find, parse_target
from aiohttp_cyclebreak.check_requests import (
    Request,
    UsageError,
    make_request,
    read_body,
    read_requests,
)
from aiohttp_cyclebreak.cli_check import make_plan

from .service import LOOPS, TIMEOUT, serve
from .service import run as run_loop
from .test_cli import MODULE, POSIX, TELLS_ITS_END, Terminal
from .test_cli import run as run_command

pytestmark = [
    pytest.mark.processes,
    pytest.mark.filterwarnings("ignore:It is recommended to use web.AppKey"),
]

LINUX = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="elsewhere memory is a peak"
)

APPLICATION = """
import asyncio, atexit, gc, os, sys, time

from aiohttp import web

from aiohttp_cyclebreak import cyclebreak

held = []


class Meta(type):
    def fail(cls, *given):
        raise RuntimeError("it tells nothing about its classes")

    __module__ = property(fail)
    __eq__ = __hash__ = fail


class Fights(metaclass=Meta):
    pass


class Held:
    def __init__(self):
        self.fights = Fights()


async def upload(request):
    await request.read()
    raise web.HTTPBadRequest(text="no image")


async def move(request):
    raise web.HTTPFound("http://192.0.2.1/elsewhere")


async def hold(request):
    held.append(request)
    return web.Response()


async def hold_the_first(request):
    if not held:
        held.append(request)
    return web.Response()


async def cycle(request):
    one = Held()
    one.itself = one
    return web.Response()


async def collect(request):
    gc.collect()
    return web.Response()


async def switch_on(request):
    gc.enable()
    assert [[] for _ in range(10_000)]
    return web.Response()


async def allocate(request):
    assert [[] for _ in range(10_000)]
    return web.Response()


async def hang_up(request):
    response = web.Response()
    await response.prepare(request)
    await response.write_eof()
    request.transport.close()
    return response


async def upgrade(request):
    websocket = web.WebSocketResponse()
    await websocket.prepare(request)
    async for message in websocket:
        pass
    return websocket


async def drop(request):
    request.transport.abort()
    return web.Response()


async def stream(request):
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b"secret")
        await asyncio.sleep(0.01)


async def die(request):
    print("secret" * 10_000 + 100 * "\\n")
    print("about to die")
    os._exit(3)


peers = set()
received = []
ended = []


async def visit(request):
    peer = request.transport.get_extra_info("peername")
    status = 208 if peer in peers else 200
    peers.add(peer)
    return web.Response(status=status)


async def receive(request):
    try:
        async for chunk in request.content.iter_any():
            received.append(len(chunk))
    finally:
        ended.append(request.method)


async def count(request):
    while not ended:
        await asyncio.sleep(0)
    return web.Response(text=str(sum(received)))


noted = []


async def note(request):
    headers = [f"{name.lower()}: {each}" for name, each in request.headers.items()]
    noted.append([headers, await request.text()])
    return web.Response()


async def tell_noted(request):
    return web.json_response(noted)


async def argv(request):
    return web.Response(text=str(sys.argv))


async def told(request):
    return web.Response(text=request.app["told"])


def create_app(*args, **named):
    app = web.Application(client_max_size=2**20)
    app["told"] = f"{args} {named}"
    app.router.add_post("/upload", upload)
    app.router.add_post("/receive", receive)
    app.router.add_route("*", "/note", note)
    handlers = move, hold, cycle, collect, switch_on, allocate, drop, stream, die
    others = hold_the_first, hang_up, upgrade, visit, count, tell_noted, argv, told
    for handler in (*handlers, *others):
        app.router.add_get(f"/{handler.__name__}", handler)
    return app


async def create_later(name="nobody"):
    await asyncio.sleep(0)
    return create_app(name)


def without_collector():
    gc.disable()
    return create_app()


def create_runner():
    return web.AppRunner(create_app("runner"))


def uvloop_app():
    import uvloop

    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    return create_app("uvloop")


def main(argv):
    return create_app(argv)


def main_by_itself(argv=None):
    return create_app(argv)


def from_options(**options):
    return create_app(**options)


def create_guarded():
    app = create_app()
    app.middlewares.append(cyclebreak())
    return app


def create_cleaned_up(path):
    async def clean_up(app):
        with open(path, "a") as file:
            print(os.environ["AIOHTTP_CYCLEBREAK"], file=file)

    app = create_app()
    app.on_cleanup.append(clean_up)
    return app


async def ticks():
    while True:
        await asyncio.sleep(3600)
        yield


async def follow_ticks():
    async for _ in ticks():
        pass


def create_following():
    async def follow(app):
        task = asyncio.ensure_future(follow_ticks())
        yield
        task.cancel()
        await asyncio.wait([task])

    app = create_app()
    app.cleanup_ctx.append(follow)
    return app


class Factories:
    app = create_app("in a class")


app = create_app("app")
number = 7


def fails():
    raise LookupError("there is no database")


async def fails_later():
    await asyncio.sleep(0)
    raise LookupError("there is no database")


async def fail_to_start(app):
    raise LookupError("there is no database")


def fails_at_start():
    app = create_app()
    app.on_startup.append(fail_to_start)
    return app


def leaves():
    print("usage: one argument more")
    atexit.register(time.sleep, 3600)  # nothing is flushed before it is killed
    sys.exit("wrong usage")


def hangs():
    print("connecting")
    time.sleep(3600)


def ends_if_guarded():
    if os.environ["AIOHTTP_CYCLEBREAK"] == "on":
        os._exit(3)
    return app


def gives_nothing():
    pass
"""

SCRIPT = f"""{APPLICATION}
web.run_app(create_later("script"))
"""


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with applications in it, which print as they do without a terminal."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    (tmp_path / "leaky.py").write_text(APPLICATION)
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "needy.py").write_text("import leaky, there_is_no_such_library")
    (tmp_path / "broken.py").write_text("def create_app(:")
    (tmp_path / "body").write_bytes(bytes(100_000))
    return str(tmp_path)


REQUESTS = """
### refused
POST /upload
X-Token: secret

secret body

### the client vanishes
# @abort-after 50000
POST /upload
Content-Type: image/png

< ./body

### led elsewhere
GET /move?token=secret
###

// there is no such page
/missing
"""


def test_a_leak_is_counted_and_stopped(folder: str) -> None:
    """Several requests of a file, by several clients: all left bare, none guarded."""
    path = pathlib.Path(folder, "requests.http")
    path.write_text(REQUESTS)
    picture = pathlib.Path(folder, "growth.svg")
    args = [f"--chdir={folder}", f"--from-file={path}", "--header=X-Other: secret"]
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        pass
    else:
        args.append(f"--plot={picture}")
    code, out, err = run_command(
        "check",
        "leaky:create_app('secret')",
        "--requests=15",
        "--concurrency=3",
        "--json",
        *args,
    )
    assert (code, err) == (0, "")
    assert "secret" not in out
    report = json.loads(out)
    assert report["summary"]["clean"] is True
    assert report["application"] == "leaky:create_app"
    assert report["guard"] == "setup(app) and guard_server(runner)"
    assert report["requests"] == [
        {"request": "POST /upload", "body": 11, "abort_after": None},
        {"request": "POST /upload", "body": 100_000, "abort_after": 50_000},
        {"request": "GET /move", "body": 0, "abort_after": None},
        {"request": "GET /missing", "body": 0, "abort_after": None},
    ]
    bare, guarded = report["bare"], report["guarded"]
    for run in (bare, guarded):
        assert (run["sent"], run["served"], run["tasks"]) == (60, 60, 0)
        statuses = ["400", "aborted", "302", "404"]
        assert run["answers"] == [{status: 15} for status in statuses]
        assert (run["held"], run["cpu"] > 0) == (0, True)
    assert bare["left"] > 0
    assert bare["garbage"]["traceback"] > 0
    assert all(chain["kind"] == "delayed" for chain in bare["chains"])
    assert bare["chains"]
    assert all("web_request.Request" in chain["text"] for chain in bare["chains"])
    assert (guarded["left"], guarded["garbage"], guarded["chains"]) == (0, {}, [])
    if "--plot" in str(args):
        drawn = picture.read_text()
        assert "secret" not in drawn
        for text in ("bare: ", "guarded: 0 of 60", "seconds", "MiB"):
            assert text in drawn


@LINUX
def test_memory_grows_by_the_bodies(folder: str) -> None:
    """By what each request carries, bare; by next to nothing, guarded."""
    body = bytes(200_000)
    request = Request("POST", "/upload", body=body)
    plan = Plan("leaky:create_app", (request,), chdir=folder, repetitions=60)
    report = check.run(plan)
    # All of them: the collector is off.
    assert (report.bare.left, report.guarded.left) == (60, 0)
    assert report.bare.growth is not None
    assert report.guarded.growth is not None
    assert report.bare.growth > len(body) / 2
    assert report.guarded.growth < len(body) / 4
    sent = [each[1] for each in report.bare.memory]
    assert (sent[0], sent[-1], sent == sorted(sent)) == (0, 60, True)
    if check.can_plot():
        check.plot(report, f"{folder}/growth.svg")
        drawn = pathlib.Path(folder, "growth.svg").read_text()
        assert max(map(float, re.findall(r">([\d.]+)</text>", drawn))) > 5  # MiB


def test_what_holds_a_request_is_shown(folder: str) -> None:
    """Exit 1, with the table, and the name of the list that holds them."""
    code, out, err = run_command(
        "check",
        "leaky:app",
        f"--chdir={folder}",
        "--request=/hold?token=secret",
        "--request=GET /missing",
        "--header=Authorization: secret",
        "--requests=12",
        "--keep-alive",
    )
    assert (code, err) == (1, "")
    assert "secret" not in out
    rows = {line[:20].strip(): line.split() for line in out.splitlines()}
    assert rows["requests left"][-2:] == ["12", "LEFT"]
    # What is held keeps the last request of its connection, where nothing is severed.
    assert rows["after a collection"][-1] == "12"
    assert float(rows["traceback"][1]) > 0
    assert all(float(each) > 0 for each in rows["CPU, ms a request"][-2:])
    if sys.platform.startswith("linux"):
        assert re.search(r"^memory, KiB a request +[-+][\d.]+ +[-+][\d.]+$", out, re.M)
    assert "  GET /hold?...: 200\n  GET /missing: 404\n" in out
    assert "guarded, held for good:" in out
    assert "global 'held'" in out
    assert "of 24 guarded, 12 are held by a live reference" in out.splitlines()[-1]


def test_the_guard_of_the_application_itself(folder: str) -> None:
    """It is off in the bare run, and the only one in the guarded run."""
    upload = Request("POST", "/upload", body=b"x")
    own = Plan("leaky:create_guarded", (upload,), (), folder, 10, own_guard=True)
    report = check.run(own)
    assert (report.bare.left > 0, report.guarded.left) == (True, 0)
    assert report.is_clean
    assert not report.hint
    assert own.guard == "the application's own"
    assert report.sentence.endswith("of 10 guarded, none is left.")

    none = dataclasses.replace(own, target="leaky:create_app")
    report = check.run(none)
    assert report.guarded.left > 0
    assert not report.is_clean
    assert {chain["kind"] for chain in report.guarded.chains} == {"delayed"}
    assert report.sentence.endswith("10 wait for the garbage collector.")
    assert "keep_cycles" in report.hint
    for told in {"left": 0}, {"chains": []}:
        run = dataclasses.replace(report.guarded, **told)  # type: ignore[arg-type]
        assert not dataclasses.replace(report, guarded=run).hint
    assert not dataclasses.replace(
        report, plan=dataclasses.replace(none, own_guard=False)
    ).hint


def test_other_garbage_counts_if_asked_for(folder: str) -> None:
    """An application's own cycles are told by type; they are no requests."""
    plan = Plan(
        "leaky:create_app",
        (Request("GET", "/cycle"),),
        chdir=folder,
        repetitions=10,
        garbage=True,
    )
    report = check.run(plan)
    assert report.guarded.left == 0
    assert report.guarded.garbage["leaky.Held"] == 10
    assert report.guarded.garbage["leaky.Fights"] == 10
    assert "leaky.Held" in report.guarded.chains[0]["text"]
    assert not report.is_clean
    assert "garbage are" in report.sentence
    run = dataclasses.replace(report.guarded, left=1)
    assert "garbage are" not in dataclasses.replace(report, guarded=run).sentence
    run = dataclasses.replace(report.guarded, garbage={})
    clean = dataclasses.replace(report, guarded=run)
    assert clean.is_clean
    assert "garbage are" not in clean.sentence
    plan = dataclasses.replace(plan, garbage=False)
    assert dataclasses.replace(report, plan=plan).is_clean


def test_only_a_transport_itself_is_asyncios() -> None:
    """And not what is the application's and hangs on it, as its protocol does."""

    class Transport(asyncio.Transport):
        pass

    class Protocol(asyncio.Protocol):
        pass

    protocol, transport = Protocol(), Transport()
    own, other, parts = transport.close, protocol.eof_received, [protocol]
    vars(transport).update(own=own, other=other, parts=parts)
    garbage = [protocol, transport, vars(transport), own, other, parts]
    of_asyncio = [transport, vars(transport), own, parts]
    assert check_process._of_asyncio(garbage) == set(map(id, of_asyncio))


def test_the_growth_is_that_of_one_request() -> None:
    assert check._slope([(0.0, 0, 1000), (0.1, 10, 3000), (0.2, 20, 5000)]) == 200
    assert check._slope([]) is None


@pytest.mark.parametrize(
    ("target", "runs"), [("leaky:app", True), ("leaky:without_collector", False)]
)
def test_the_collector_is_as_the_application_has_it(
    target: str, runs: bool, folder: str
) -> None:
    """But only in the second run, in which nothing is counted that it may free."""
    plan = Plan(target, (Request("GET", "/allocate"),), (), folder, 10)
    report = check.run(plan)
    for run in (report.bare, report.guarded):
        assert (sum(run.collections) > 0, run.own_collections) == (runs, 0)


def test_full_collections_are_counted(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that the application has run itself in the second run are among them."""
    ends = []
    ask = check._Process.ask

    def listen(process: check._Process, do: str, **arguments: Any) -> Any:
        answer = ask(process, do, **arguments)
        if do == "end" and arguments["collector"]:
            ends.append(answer)
        return answer

    monkeypatch.setattr(check._Process, "ask", listen)
    plan = Plan("leaky:app", (Request("GET", "/collect"),), (), folder, 10)
    report = check.run(plan)
    for run, end in zip((report.bare, report.guarded), ends):
        assert run.full_collections >= 10
        assert run.collector_seconds > 0
        assert run.cpu == end["cpu"] / 10


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/collect", "has run 10 collections itself"),
        ("/switch_on", "collections itself"),
        ("/drop", "GET /drop got no answer at all"),
    ],
)
def test_it_shows_nothing(path: str, told: str, folder: str) -> None:
    """Exit 1 where nothing is left because nothing was to be seen."""
    code, out, err = run_command(
        "check", "leaky:app", f"--chdir={folder}", f"--request={path}", "--requests=10"
    )
    assert (code, err) == (1, "")
    rows = {line[:20].strip(): line.split() for line in out.splitlines()}
    assert rows["requests left"][-2:] == ["0", "?"]
    if path == "/collect":
        assert all(int(each) >= 10 for each in rows["full collections"][-2:])
    assert "This shows nothing: " in out.splitlines()[-1]
    assert told in out.splitlines()[-1]


def test_nothing_is_served(folder: str) -> None:
    """That is no clean run; and one that left requests is none in any case."""
    plan = Plan("leaky:app", (Request("GET", "/told"),), (), folder, 3)
    report = check.run(plan)
    assert (report.is_clean, report.doubt) == (True, "")
    assert (report.bare.own_collections, report.guarded.own_collections) == (0, 0)
    served = dataclasses.replace(report.guarded, served=0)
    report = dataclasses.replace(report, guarded=served)
    assert not report.is_clean
    assert report.sentence.endswith("This shows nothing: no request was served.")
    left = dataclasses.replace(served, left=1, own_collections=1)
    report = dataclasses.replace(report, guarded=left)
    assert (report.is_clean, report.doubt) == (False, "")
    assert "guarded, 1 waits for the garbage collector" in report.sentence
    report = dataclasses.replace(report, guarded=dataclasses.replace(left, held=1))
    assert "guarded, 1 is held by a live reference" in report.sentence
    assert not report.hint
    failed = dataclasses.replace(report.guarded, answers=[{"500": 3}])
    report = dataclasses.replace(report, guarded=failed)
    assert report.hint.startswith("GET /told was always answered by 500. Most ")


def test_what_is_made_once_is_no_leak(folder: str) -> None:
    """What the first request leaves, when something is set up, is not counted."""
    plan = Plan("leaky:app", (Request("GET", "/hold_the_first"),), (), folder, 1)
    report = check.run(plan)
    assert (report.bare.served, report.bare.held) == (1, 0)
    assert (report.guarded.served, report.guarded.left) == (1, 0)


def test_a_task_waits_for_an_asynchronous_generator(folder: str) -> None:
    """Before CPython 3.10 the type of what it awaits has no bases."""
    request = Request("POST", "/upload")
    report = check.run(Plan("leaky:create_following", (request,), (), folder, 5))
    assert report.bare.left == report.bare.served == 5
    assert (report.guarded.left, report.guarded.served) == (0, 5)


def test_a_lasting_task_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that the first request starts for good; it is counted each time."""
    lasting: List[Any] = []

    async def start(request: web.Request) -> web.Response:
        if not lasting:
            lasting.append(asyncio.ensure_future(asyncio.Event().wait()))
        return web.Response()

    async def take_its_turns() -> None:
        for _ in range(500):
            await asyncio.sleep(0)

    async def main() -> None:
        app = web.Application()
        app.router.add_get("/", start)
        async with serve(app) as service:
            server = check_process._Server(service.runner)
            assert (await service.ask("/"))[0] == 200
            monkeypatch.setattr(check_process, "_SETTLES", 0.0)
            await server.begin(collector=False)
            monkeypatch.setattr(check_process, "_SETTLES", 1e6)
            assert (await service.ask("/"))[0] == 200
            me: Any = asyncio.current_task()
            hangs = asyncio.get_running_loop().call_later(TIMEOUT, me.cancel)
            ended = await server.end(collector=False)
            assert (ended["busy"], ended["served"]) == (1, 1)
            # Another one is waited for.
            other = asyncio.ensure_future(take_its_turns())
            await server.begin(collector=False)
            assert other.done()
            await server.end(collector=False)
            hangs.cancel()
            lasting.pop().cancel()

    run_loop(main())


@pytest.fixture
def importable(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The applications can be imported here."""
    monkeypatch.syspath_prepend(folder)
    for name in ("leaky", "script"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize(
    ("target", "words", "told"),
    [
        ("leaky:app", [], "('app',) {}"),
        ("leaky:Factories.app", [], "('in a class',) {}"),
        ("leaky:create_app", [], "() {}"),
        ("leaky:create_app(1, debug=True)", [], "(1,) {'debug': True}"),
        ("leaky:create_app( [None], x={'y': -1} )", [], "([None],) {'x': {'y': -1}}"),
        ("leaky:create_app", ["-x", "y"], "(['-x', 'y'],) {}"),
        ("leaky:main", [], "([],) {}"),
        ("leaky:main", ["-x", "y"], "(['-x', 'y'],) {}"),
        ("leaky:main_by_itself", [], "(None,) {}"),
        ("leaky:from_options", [], "() {}"),
        ("script:create_app('imported')", [], "('imported',) {}"),
    ],
)
def test_an_application_is_found(target: str, words: List[str], told: str) -> None:
    """As it is, or made with its arguments; a script's own server is not started."""
    run_app = web.run_app
    with warnings.catch_warnings(record=True) as complaints:
        app = find(parse_target(target), words, lambda trying: None)
    # Of aiohttp's, and none of a script's coroutine that nobody awaited.
    assert not [each for each in complaints if each.category is RuntimeWarning]
    assert app["told"] == told
    assert web.run_app is run_app


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("leaky:create_later('me')", "('me',) {}"),
        ("leaky:create_runner", "('runner',) {}"),
    ],
)
def test_an_application_is_served(target: str, told: str, folder: str) -> None:
    """Also that of a coroutine function, and that of a runner."""
    with check._started(Plan(target, chdir=folder), False) as (_, answer):
        url = f"http://127.0.0.1:{answer['port']}/told"
        with urllib.request.urlopen(url) as response:
            assert response.read().decode() == told


def test_an_application_is_cleaned_up(folder: str) -> None:
    """It may have to give back something that outlives its process."""
    path = pathlib.Path(folder, "cleaned_up")
    plan = Plan(f"leaky:create_cleaned_up({str(path)!r})", (), (), folder)
    for guarded in (False, True):
        with check._started(plan, guarded):
            pass
    assert path.read_text() == "off\non\n"


@pytest.mark.parametrize(
    ("keep_alive", "answers"),
    [(False, {"200": 12}), (True, {"200": 3, "208": 9})],
)
def test_as_many_clients_as_are_asked_for(
    keep_alive: bool, answers: Dict[str, int], folder: str
) -> None:
    """Each has a connection of its own, for one request or for all of them."""
    plan = Plan(
        "leaky:app",
        (Request("GET", "/visit"),),
        chdir=folder,
        repetitions=12,
        concurrency=3,
        keep_alive=keep_alive,
    )
    report = check.run(plan)
    assert report.bare.answers == report.guarded.answers == [answers]


def test_a_server_that_hangs_up_is_called_again(folder: str) -> None:
    """It need not say so in its answer, and no request is lost."""
    plan = Plan(
        *("leaky:app", (Request("GET", "/hang_up"),), (), folder, 5), keep_alive=True
    )
    report = check.run(plan)
    for run in (report.bare, report.guarded):
        assert (run.answers, run.served) == ([{"200": 5}], 5)


def test_no_request_is_sent_twice(folder: str) -> None:
    """Its connection is a new one, where the server has said that it hangs up."""
    last = Request("GET", "/told", (("Connection", "close"),))
    requests = (last, Request("GET", "/drop"))
    plan = Plan("leaky:app", requests, (), folder, 5, keep_alive=True)
    report = check.run(plan)
    for run in (report.bare, report.guarded):
        assert (run.answers, run.served) == ([{"200": 5}, {"none": 5}], 10)


def test_a_websocket_has_its_connection_to_itself(folder: str) -> None:
    """No other request is sent through it."""
    headers = (
        *(("Upgrade", "websocket"), ("Connection", "upgrade")),
        *(("Sec-WebSocket-Version", "13"), ("Sec-WebSocket-Key", "A" * 22 + "==")),
    )
    request = Request("GET", "/upgrade", headers)
    plan = Plan("leaky:app", (request,), (), folder, 5, keep_alive=True)
    report = check.run(plan)
    for run in (report.bare, report.guarded):
        assert (run.answers, run.served) == ([{"101": 5}], 5)


@pytest.mark.parametrize(
    ("request_", "headers"),
    [
        (Request("GET", "/note"), ["host: 127.0.0.1:{}"]),
        (Request("GET", "/note", (("host", "a"),)), ["host: a"]),
        (Request("POST", "/note"), ["host: 127.0.0.1:{}", "content-length: 0"]),
        (
            Request("DELETE", "/note", (), b"body"),
            ["host: 127.0.0.1:{}", "content-length: 4"],
        ),
        (
            Request("PUT", "/note", (("content-length", "4"),), b"body"),
            ["host: 127.0.0.1:{}", "content-length: 4"],
        ),
    ],
    ids=lambda each: each.method if isinstance(each, Request) else "",
)
def test_no_header_is_added_but_what_is_needed(
    request_: Request, headers: List[str], folder: str
) -> None:
    """What an application does may depend on any of them."""
    plan = Plan("leaky:app", chdir=folder)
    with check._started(plan, False) as (process, answer):
        port = answer["port"]
        client = check._Client(plan, process, port)
        assert client.send([request_]) == {(request_, "200"): 1}
        url = f"http://127.0.0.1:{port}/tell_noted"
        with urllib.request.urlopen(url) as response:
            told = json.load(response)
    sent = [each.format(port) for each in headers]
    assert told == [[sent, request_.body.decode()]]


def test_the_client_vanishes_after_so_many_bytes(folder: str) -> None:
    plan = Plan("leaky:app", chdir=folder, keep_alive=True)
    request = Request("POST", "/receive", (), bytes(100_000), 12_345)
    with check._started(plan, False) as (process, answer):
        client = check._Client(plan, process, answer["port"])
        assert client.send([request]) == {(request, "aborted"): 1}
        other = Request("GET", "/told")
        assert client.send([other]) == {(other, "200"): 1}
        client.close()
        url = f"http://127.0.0.1:{answer['port']}/count"
        with urllib.request.urlopen(url) as response:
            assert response.read() == b"12345"


def test_the_application_has_its_own_arguments(folder: str) -> None:
    plan = Plan("leaky:create_app", words=("-x", "y"), chdir=folder)
    with check._started(plan, False) as (_, answer):
        url = f"http://127.0.0.1:{answer['port']}/argv"
        with urllib.request.urlopen(url) as response:
            assert response.read() == b"['leaky:create_app', '-x', 'y']"


def test_the_words_of_the_page_on_it() -> None:
    """As they are printed there."""
    page = pathlib.Path(__file__).parent.parent / "docs" / "check.rst"
    words = re.findall(r"``(--arg.*)``", page.read_text())
    args = cli.make_parser().parse_args(["check", "leaky:main", *words[0].split()])
    assert make_plan(args).words == ("--verbose", "test")


def test_each_option_is_heeded(folder: str) -> None:
    """None of the command line is lost on its way to the plan."""
    arguments = [
        *("leaky:main", "--arg=word", f"--chdir={folder}", "--request=POST /a"),
        *("--data=body", "--header=X-Own: one", "--abort-after=2", "--requests=7"),
        *("--concurrency=3", "--keep-alive", "--timeout=9", "--own-guard", "--garbage"),
    ]
    assert make_plan(cli.make_parser().parse_args(["check", *arguments])) == Plan(
        target="leaky:main",
        requests=(Request("POST", "/a", (("X-Own", "one"),), b"body", 2),),
        words=("word",),
        chdir=folder,
        repetitions=7,
        concurrency=3,
        keep_alive=True,
        timeout=9.0,
        own_guard=True,
        garbage=True,
    )


@LINUX
def test_nobody_else_reaches_the_application(folder: str) -> None:
    """It listens on one address of loopback, and on no other."""
    with check._started(Plan("leaky:app", chdir=folder), False) as (_, answer):
        socket.create_connection(("127.0.0.1", answer["port"])).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", answer["port"]))


def test_the_server_is_guarded_as_well(folder: str) -> None:
    """What is refused before it comes to a middleware is the server's."""
    request = Request("GET", "/told", (("Expect", "something"),))
    report = check.run(Plan("leaky:app", (request,), (), folder, 10))
    assert report.guarded.answers == [{"417": 10}]
    assert (report.bare.left, report.guarded.left) == (10, 0)


@pytest.mark.skipif("uvloop" not in LOOPS, reason="uvloop is not installed")
@pytest.mark.parametrize("target", ["leaky:uvloop_app", "fast:app"])
def test_the_loop_is_that_of_the_policy(target: str, folder: str) -> None:
    """Which a factory, or a module when it is imported, may set."""
    pathlib.Path(folder, "fast.py").write_text(
        "import leaky\n\napp = leaky.uvloop_app()\n"
    )
    with check._started(Plan(target, chdir=folder), False) as (_, answer):
        assert answer["event_loop"].startswith("uvloop")


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize(
    ("target", "words", "told"),
    [
        ("leaky:nothing", [], "leaky has no 'nothing'"),
        ("leaky.app:app", [], "no module 'leaky.app'"),
        ("leaky:number", [], "neither an .* nor a function .*, but int"),
        ("leaky:app", ["x"], "is no factory, and takes no --arg"),
    ],
)
def test_there_is_no_such_application(target: str, words: List[str], told: str) -> None:
    with pytest.raises(NotThere, match=told):
        find(parse_target(target), words, lambda trying: None)


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("nowhere:app", ["no module 'nowhere'", "--chdir"]),
        ("leaky:gives_nothing", ["makes no", "NoneType"]),
        ("leaky:os.fsencode('secret')", ["leaky:os.fsencode makes no", "bytes"]),
    ],
)
def test_the_wrong_application_is_named(
    target: str, told: List[str], folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 2, and the message says what is there."""
    assert cli.main(["check", target, "--chdir", folder]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert all(each in err for each in told)
    assert "Traceback" not in err
    assert "secret" not in err


LOST = "LookupError: there is no database"


@pytest.mark.parametrize(
    ("target", "told", "tried"),
    [
        ("needy:app", ["'there_is_no_such_library'", "needy.py"], "import needy"),
        ("broken:app", ["broken.py", "SyntaxError"], "import broken"),
        ("leaky:fails_later", [LOST, "in fails_later"], "await leaky:fails_later()"),
        ("leaky:fails_at_start", [LOST, "in fail_to_start"], "on_startup"),
        ("leaky:leaves", ["wrong usage", "usage: one argument more"], "leaky:leaves()"),
        (
            "leaky:hangs",
            ["connecting", "in hangs", "did not start in 4 s", "raise --timeout"],
            "call leaky:hangs()",
        ),
    ],
)
def test_an_application_does_not_start(
    target: str,
    told: List[str],
    tried: str,
    folder: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit 1; its own error is shown as it is, without our frames; what was tried."""
    timeout = "4" if target == "leaky:hangs" else "60"
    assert cli.main(["check", target, "--chdir", folder, "--timeout", timeout]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert all(each in err for each in told), err
    (line,) = (line for line in err.splitlines() if line.startswith("tried: "))
    assert tried in line
    assert line.endswith("(bare)")
    if target != "leaky:hangs":
        assert "check_process.py" not in err


def test_an_application_dies(folder: str) -> None:
    """What it has printed is shown, and the code that it ended with."""
    plan = Plan("leaky:app", (Request("GET", "/die"),), chdir=folder, concurrency=3)
    with pytest.raises(CheckFailed) as caught:
        check.run(plan)
    assert str(caught.value) == "the application's process ended with code 3"
    assert caught.value.output == "about to die"
    assert caught.value.tried.startswith("send requests")


def test_an_application_dies_where_it_is_guarded(folder: str) -> None:
    """Before it serves: that is not called a slow start."""
    plan = Plan("leaky:ends_if_guarded", (Request("GET", "/move"),), chdir=folder)
    with pytest.raises(CheckFailed) as caught:
        check.run(plan)
    assert str(caught.value) == "the application's process ended with code 3"
    assert caught.value.tried == (
        "call leaky:ends_if_guarded() (guarded by setup(app) and guard_server(runner))"
    )


def test_an_answer_has_no_end(folder: str) -> None:
    """It is given up, and the request is named."""
    plan = Plan(
        "leaky:app", (Request("GET", "/stream?x=secret"),), chdir=folder, timeout=0.5
    )
    # The application has more time to start.
    with check._started(dataclasses.replace(plan, timeout=60), False) as started:
        process, answer = started
        told = r"no whole answer in 0\.5 s: .* raise --timeout"
        with pytest.raises(CheckFailed, match=told) as caught:
            check._run(plan, process, answer["port"], lambda sent: None)
    assert caught.value.tried == "GET /stream?... (bare)"
    assert "secret" not in f"{caught.value} {caught.value.output}"


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([], ["MODULE:ATTRIBUTE"]),
        (["myapp"], ["'myapp' is not MODULE:ATTRIBUTE", "myapp:create_app"]),
        (["my-app:app"], ["'my-app:app' is not MODULE:ATTRIBUTE"]),
        (["m:app("], ["neither a name nor a call"]),
        (["m:create(open('x'))"], ["with literals"]),
        (["m:create(**{})"], ["with literals"]),
        (["m:app[0]"], ["neither a name nor a call"]),
        (["m:create(secret)"], ["after m: comes", "with literals"]),
        (["m.create('secret')"], ["'m.create' is not MODULE:ATTRIBUTE"]),
        (["m:a", "--request=GET http://localhost/"], ["names a host", "127.0.0.1"]),
        (["m:a", "--request=GET //example.com/x"], ["names a host"]),
        (["m:a", "--request=GET example.com/x"], ["does not begin with a /"]),
        (["m:a", "--request=CONNECT example.com:443"], ["does not begin with a /"]),
        (["m:a", "--request=GET /b\xe9"], ["%XX"]),
        (["m:a", "--request=GET / x"], ['"METHOD PATH"']),
        (["m:a", "--request=G\xc9T /"], ['"METHOD PATH"']),
        (["m:a", "--request="], ['"METHOD PATH"']),
        (["m:a", "--request=GET /", "--header=secret"], ["header 1 is not"]),
        (["m:a", "--header=X: secret\r\nY: z"], ["header 1 is not"]),
        (["m:a", "--header=X: \u20ac"], ["Latin-1"]),
        (["m:a", "--data=secret"], ["--data is for --request"]),
        (["m:a", "--abort-after=3"], ["--abort-after is for --request"]),
        (["m:a", "--request=POST /", "--data=@there/is/none"], ["there/is/none"]),
        (
            ["m:a", "--request=POST /", "--data=secret", "--abort-after=6"],
            ["after 6 bytes of a body of 6"],
        ),
        (["m:a", "--requests=0"], ["whole number from 1 up"]),
        (["m:a", "--requests=99999999999999999999"], ["more than 1000000"]),
        (["m:a", "--concurrency=1001"], ["more than 1000"]),
        (["m:a", "--timeout=10000000000"], ["more than 86400"]),
        (["m:a", "--abort-after=-1"], ["whole number from 0 up"]),
        (["m:a", "--from-file=there/is/none"], ["there/is/none"]),
        (["m:a", "--chdir=there/is/none"], ["no such folder"]),
        (["m:a", "--plot=there/is/none.svg"], ["no such folder"]),
        (["m:a", "--plot=growth.bmp"], [".svg"]),
    ],
)
def test_wrong_usage(
    args: List[str], told: List[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 2 before anything is started, and no secret is shown."""
    try:
        code = cli.main(["check", *args])
    except SystemExit as exit:
        code = exit.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert all(each in err for each in told), err
    assert "secret" not in err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "has no request in it"),
        ("# only a comment\n\n###\n", "has no request in it"),
        ("GET {{host}}/x", "line 1: variables are not supported"),
        ("\n@host = localhost\nGET /", "line 2: variables are not supported"),
        ("GET /\n###\n\nGET http://example.com/\n", "line 4: .* names a host"),
        ("POST /\nno header\n", "line 1: header 1 is not"),
        ("POST /\n\n< missing", "line 1: the body cannot be read"),
        ("GET /\nX-Token: {{token}}\n", "line 2: variables are not supported"),
        ("POST /\n\n[\n{{item}}]", "line 4: variables, .* < FILE"),
        ("POST /\n\n<@ body", "line 3: variables, .* < FILE"),
        ("GET /\n\n> {% client.log() %}", "line 3: .* scripts .* < FILE"),
        ("POST /\n\n--b\n\n< body\n--b--", "line 5: .* files inside .* < FILE"),
        ("POST /\n\n< body\n--b--", "line 4: .* files inside .* < FILE"),
        ("# @abort-after=1\nPOST /\n\nbody", "line 1: .* # @abort-after BYTES"),
    ],
)
def test_a_file_of_requests_is_wrong(
    text: str, told: str, tmp_path: pathlib.Path
) -> None:
    """The message names the file and the line."""
    path = tmp_path / "requests.http"
    path.write_text(text)
    with pytest.raises(UsageError, match=told) as caught:
        read_requests(str(path))
    assert str(caught.value).startswith(str(path))


def test_a_file_of_requests(tmp_path: pathlib.Path) -> None:
    """As the clients of editors write it."""
    (tmp_path / "body").write_bytes(b"\0\r\n")
    path = tmp_path / "requests.http"
    path.write_text(
        "GET /a?b=c HTTP/1.1\nAccept: */*\nX-Empty:\n\n\n"
        "### a name\n// why\nPUT /b\n\none\n\ntwo\n\n"
        "###\n# @abort-after 1\nPOST /c\n\n< body\n"
        "###\nPOST /d\nX-A: 1\n# why\n# @abort-after 2\nX-B: 2\n\n# {{}\n"
        "###\nPOST /e\ncontent-type: multipart/form-data; boundary=b\n\n--b\n\n--b--\n"
        "###\nPOST /f\n\n\n< body\n"
    )
    assert read_requests(str(path)) == [
        Request("GET", "/a?b=c", (("Accept", "*/*"), ("X-Empty", ""))),
        Request("PUT", "/b", (), b"one\n\ntwo"),
        Request("POST", "/c", (), b"\0\r\n", 1),
        Request("POST", "/d", (("X-A", "1"), ("X-B", "2")), b"# {{}", 2),
        Request(
            "POST",
            "/e",
            (("content-type", "multipart/form-data; boundary=b"),),
            b"--b\r\n\r\n--b--",
        ),
        Request("POST", "/f", (), b"\0\r\n"),
    ]


def test_a_header_of_all_requests(tmp_path: pathlib.Path) -> None:
    """Those of a file have it beside their own."""
    path = tmp_path / "some.http"
    path.write_text("GET /told\nX-Own: one\n")
    arguments = ["--request=/told", f"--from-file={path}", "--header=X-Other: two"]
    args = cli.make_parser().parse_args(["check", "leaky:app", *arguments])
    assert [each.headers for each in make_plan(args).requests] == [
        (("X-Other", "two"),),
        (("X-Own", "one"), ("X-Other", "two")),
    ]


def test_a_file_with_a_byte_order_mark(tmp_path: pathlib.Path) -> None:
    """As some editors of Windows write it."""
    path = tmp_path / "requests.http"
    path.write_text("GET /a\n", encoding="utf-8-sig")
    assert read_requests(str(path)) == [Request("GET", "/a")]


@POSIX
def test_a_body_of_any_bytes() -> None:
    """What is no text is sent as the shell has given it."""
    assert read_body(os.fsdecode(b"\xff\0x")) == b"\xff\0x"
    assert read_body("\u00e4") == os.fsencode("\u00e4")


def test_any_name_can_be_printed(folder: str) -> None:
    """Also where the output cannot have its characters."""
    text = re.sub(r"\bheld\b", "\u043e\u0447", APPLICATION)
    pathlib.Path(folder, "named.py").write_text(text, encoding="utf-8")
    code, out, err = run_command(
        *("check", "named:app", f"--chdir={folder}", "--request=/hold"),
        "--requests=2",
        PYTHONIOENCODING="ascii",
    )
    assert (code, err) == (1, "")
    assert "global '\\u043e\\u0447" in out
    assert out.splitlines()[-1].endswith("2 are held by a live reference.")


def test_a_request_shows_no_secret() -> None:
    """Neither as text nor in a traceback."""
    request = make_request("GET /a?token=secret", ["X: secret"], b"secret")
    assert str(request) == "GET /a?..."
    assert "secret" not in repr(request)
    gone = make_request("POST /", body=b"secret", abort_after=3)
    assert str(gone) == "POST / aborted after 3 of 6 bytes"
    assert "secret" not in repr(gone)
    plan = Plan("m:create_app('secret')", (request,), words=("--secret",))
    assert "secret" not in repr(plan)
    assert "secret" not in repr(parse_target(plan.target))


def test_the_guard_is_switched_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is nothing to compare, which is said."""
    monkeypatch.setenv("AIOHTTP_CYCLEBREAK", "off")
    assert cli.main(["check", "m:app"]) == 2
    assert "unset" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "told"),
    [("", "that is a folder"), ("beside.svg", "cannot be written")],
)
def test_the_picture_cannot_be_written(
    path: str,
    told: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """That is said before anything is run, and nothing is left where it would be."""
    picture = tmp_path / "growth.svg"
    picture.mkdir()
    # To the superuser all can be written.
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    plot = f"--plot={picture if not path else tmp_path / path}"
    assert cli.main(["check", "m:app", plot]) == 2
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [picture]


def test_there_is_no_matplotlib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The extra that brings it is named, before anything is run."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["check", "m:app", "--plot", "growth.svg"]) == 2
    assert "extra 'plot'" in capsys.readouterr().err


@POSIX
def test_in_a_terminal(folder: str) -> None:
    """There is a progress bar, and colours where there is rich."""
    args = ["check", "leaky:app", "--chdir", folder, "--requests", "2"]
    terminal = Terminal(MODULE, *args)
    assert terminal.end() == 0
    bar, _, table = terminal.text.partition("GET /: 404")
    assert "[....................]   0% bare" in bar
    assert "guarded" in bar
    assert "requests left" in table
    has_rich = importlib.util.find_spec("rich") is not None
    assert ("\x1b[" in table) is has_rich


@POSIX
def test_is_interrupted(folder: str) -> None:
    """Ctrl-C is exit 130 at once, and the application's process is ended."""
    args = ["check", "leaky:app", "--chdir", folder, "--requests", "2000"]
    terminal = Terminal(TELLS_ITS_END, *args)
    terminal.read("  1% bare")
    children = pathlib.Path(f"/proc/{terminal.process.pid}/task")
    pids = [
        int(pid)
        for task in (children.iterdir() if children.exists() else ())
        for pid in (task / "children").read_text().split()
    ]
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 130
    assert "interrupted" in terminal.text
    assert "Traceback" not in terminal.text
    assert "shut down" not in terminal.text  # nothing is waited for
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
