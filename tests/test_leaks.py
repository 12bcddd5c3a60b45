"""Every leak of the catalogue: it occurs without us, and not with us."""

import asyncio
import gc
import pathlib
import runpy
import selectors
import sys
from typing import Any, Dict, List, Optional, Set, Tuple

import aiohttp
import pytest
from aiohttp import web
from aiohttp.web_urldispatcher import SystemRoute

from aiohttp_cyclebreak import client_cyclebreak, cyclebreak, guard_server, setup
from aiohttp_cyclebreak.leaks import CATALOGUE, Leak, Remedy, gateway_of
from aiohttp_cyclebreak.probe import Count, Floor, measure, measure_floor

from .service import AIOHTTP, LOOPS, alive, run, serve

# docs/matrix.py: what the documentation's tables are made from, and how.
MATRIX = runpy.run_path(
    str(pathlib.Path(__file__).parent.parent / "docs" / "matrix.py")
)

pytestmark = pytest.mark.usefixtures("few_objects")


def guard_calls(app: web.Application) -> None:
    gateway = gateway_of(app)
    assert gateway is not None
    gateway.trace_configs.append(client_cyclebreak())


def guard_all(app: web.Application) -> None:
    guard_calls(app)
    app.middlewares.append(cyclebreak())


# Each way to install it, and what it is to stop.
GUARDS: Dict[str, Tuple[Set[Remedy], Dict[str, Any]]] = {
    "appended": (
        {Remedy.MIDDLEWARE},
        {"guard": lambda app: app.middlewares.append(cyclebreak())},
    ),
    "setup": ({Remedy.MIDDLEWARE}, {"guard": setup}),
    "without clearing": (
        {Remedy.MIDDLEWARE},
        {"guard": lambda app: setup(app, clear_frames=False)},
    ),
    "server": ({Remedy.MIDDLEWARE, Remedy.SERVER}, {"guard_runner": guard_server}),
    "calls": ({Remedy.CLIENT}, {"guard": guard_all}),
    "calls, server": (
        {Remedy.CLIENT},
        {"guard": guard_calls, "guard_runner": guard_server},
    ),
}
VISITS = 10
HELD_BY_LOCALS = ("kept-local/another", "kept-local/traceback")
CASES = [
    pytest.param(
        leak,
        guard,
        loop,
        id=f"{leak.id}-{guard}-{loop}",
        # What differs between versions of aiohttp shows in the other ways as well.
        marks=[pytest.mark.thorough] * (guard in ("without clearing", "calls, server")),
    )
    for leak in CATALOGUE
    for guard, (stops, _) in GUARDS.items()
    for loop in LOOPS
    if leak.remedy in stops
    # What differs between event loops does not differ between these two.
    and (
        loop == "asyncio" or guard not in ("setup", "without clearing", "calls, server")
    )
]
_floors: Dict[str, Floor] = {}
_bare: Dict[Tuple[str, str], Count] = {}


def floor(loop: str) -> Floor:
    if loop not in _floors:
        _floors[loop] = run(measure_floor(), loop)
    return _floors[loop]


def bare(leak: Leak, loop: str) -> Count:
    if (leak.id, loop) not in _bare:
        _bare[leak.id, loop] = run(measure(leak, floor(loop), visits=VISITS), loop)
    return _bare[leak.id, loop]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("leak", CATALOGUE, ids=lambda leak: leak.id)
def test_occurs_bare_where_the_catalogue_says(leak: Leak, loop: str) -> None:
    """Each leak is there on the versions that it is said to be on, and no other."""
    assert bare(leak, loop).shows(leak.kind) is leak.is_on(AIOHTTP, sys.version_info)


@pytest.mark.parametrize(("leak", "guard", "loop"), CASES)
def test_leaves_nothing_guarded(leak: Leak, guard: str, loop: str) -> None:
    """No request, and no cyclic garbage above asyncio's own, is left."""
    if not bare(leak, loop).shows(leak.kind):
        pytest.skip(
            f"aiohttp {aiohttp.__version__} on CPython {sys.version.split()[0]} "
            f"does not have {leak.id}: {', '.join(map(str, leak.affected))}"
        )
    if guard == "without clearing" and leak.id in HELD_BY_LOCALS:
        pytest.skip("locals are left alone, and one of them is what holds it")
    _, arguments = GUARDS[guard]
    count = run(measure(leak, floor(loop), visits=VISITS, **arguments), loop)
    assert count.is_clean, count


@pytest.mark.parametrize("loop", LOOPS)
def test_the_floor_is_what_a_connection_of_aiohttp_leaves(loop: str) -> None:
    """Or what is left of a request would pass for asyncio's own."""
    (leak,) = (each for each in CATALOGUE if each.id == "unseen/probe-reset")
    _, arguments = GUARDS["server"]
    count = run(measure(leak, Floor(0, 0, 0), visits=VISITS, **arguments), loop)
    assert count.garbage == floor(loop).of(leak.visits, VISITS, 0)


class LateSelector(selectors.DefaultSelector):
    """Tells what has come to a socket many turns of the loop after it could.

    As a kernel may, whose threads that deliver are not scheduled.  But for what it was
    given first: by that the loop is told what other threads have done.
    """

    def __init__(self) -> None:
        super().__init__()
        self._first: Any = None
        self._turns: Dict[int, int] = {}

    def register(self, fileobj: Any, *args: Any) -> Any:
        self._first = self._first or fileobj
        return super().register(fileobj, *args)

    def select(self, timeout: Optional[float] = None) -> List[Any]:
        told = []
        for key, events in super().select(timeout):
            turns = self._turns.pop(key.fd, 0)
            # Who connects is told first: the other end may take its time.
            late = 30 if events & selectors.EVENT_WRITE else 600
            if key.fileobj is self._first or turns == late:
                told.append((key, events))
            else:
                self._turns[key.fd] = turns + 1
        return told


@pytest.mark.parametrize(
    ("id", "guard"),
    [("idle-body/unread", "setup"), ("unseen/partial", "server")],
)
def test_a_connection_that_is_noticed_late(
    id: str, guard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is waited for: nothing is counted before it has come and gone."""
    monkeypatch.setitem(
        LOOPS, "late", lambda: asyncio.SelectorEventLoop(LateSelector())
    )
    assert run(measure_floor(), "late") == floor("asyncio")
    (leak,) = (each for each in CATALOGUE if each.id == id)
    _, arguments = GUARDS[guard]
    count = run(measure(leak, floor("asyncio"), visits=VISITS, **arguments), "late")
    assert count.is_clean, count


def column() -> Optional[int]:
    """The documentation's column for what runs; the newest for what is newer.

    Of CPython it has to be the same release: later ones of one minor version have
    mended some of asyncio's own cycles.
    """
    versions = [MATRIX["key"](each) for each in MATRIX["read"]()["columns"]]
    python = list(sys.version_info[:3])
    if list(AIOHTTP) > max(aiohttp for aiohttp, _ in versions):
        newest = max((each for each in versions if each[1] == python), default=None)
        return None if newest is None else versions.index(newest)
    wanted = (list(AIOHTTP), python)
    return versions.index(wanted) if wanted in versions else None


@pytest.mark.parametrize("leak", CATALOGUE, ids=lambda leak: leak.id)
def test_documentation_has_what_is_measured(leak: Leak) -> None:
    """The matrix says of each leak how many requests it leaves, bare and guarded."""
    cells = MATRIX["read"]()["leaks"]
    assert leak.id in cells, "docs/matrix.json does not have it: nox -s matrix"
    number = column()
    if number is None:
        pytest.skip("the documentation has no column for these versions")
    measured = MATRIX["cell"](bare(leak, "asyncio"), leak.kind)
    # That guarded nothing is left is what the test above is for.
    assert cells[leak.id][number] == [measured, 0], "other than docs/matrix.json"


def test_no_leak_is_listed_twice() -> None:
    """An id names one leak."""
    ids = [leak.id for leak in CATALOGUE]
    assert len(ids) == len(set(ids))


def test_missing_routes_are_not_cached_because_of_us() -> None:
    """CVE-2024-52303: a middleware makes aiohttp 3.10.6 to 3.10.10 keep them all."""

    async def main() -> int:
        app = web.Application()
        app.middlewares.append(cyclebreak())
        async with serve(app) as service:
            client = await service.connect()
            for number in range(400):
                await client.get(f"/missing/{number}")
                assert (await client.answer())[0] == 404
            client.close()
            await service.settle()
            await asyncio.sleep(0)
            gc.collect()
            return len(alive(SystemRoute))

    assert run(main()) == 0
