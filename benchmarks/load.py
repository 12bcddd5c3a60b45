"""What an application goes through under load: memory, CPU, collections, latency.

Each contender is a process of its own; the load comes from this one.  All of them are
measured by turns, so that each stands beside the control of the same minute.
``nox -s bench -- load`` makes the virtual environments and runs it.
"""

import asyncio
import gc
import random
import statistics
import time
from typing import Any, Dict, Iterable, List, NamedTuple, Sequence, Tuple

from clients import Load, upload
from processes import FIXED, MILLION, NEWEST, SUSPECT, Environments, Service, say
from ways import THRESHOLD, TIMER


class Contender(NamedTuple):
    """Something to do about requests that stay, or nothing."""

    name: str
    aiohttp: str
    way: str = "bare"
    workaround: str = "none"
    control: str = "3.10.11"
    returns: bool = False
    turns: int = 1  # a round


# Those to which a limit applies, and what they stand beside, come twice as often.
CONTENDERS = (
    Contender("3.10.11", SUSPECT, turns=2),
    Contender("3.10.11, setup(app)", SUSPECT, way="setup()", turns=2),
    Contender(f"3.10.11, gc.collect() every {TIMER:g} s", SUSPECT, workaround="timer"),
    Contender(f"3.10.11, gc.set_threshold{THRESHOLD}", SUSPECT, workaround="threshold"),
    Contender("3.11.18", FIXED),
    Contender("newest", NEWEST, control="newest", turns=2),
    Contender("newest, setup(app)", NEWEST, way="setup()", control="newest", turns=2),
)


# Nothing is raised, so that nothing stays: what is left is what such a load costs.
FLOORS = (
    Contender(
        "3.10.11, setup(app), 400 returned", SUSPECT, way="setup()", returns=True
    ),
    Contender("newest, 400 returned", NEWEST, control="newest", returns=True, turns=2),
)
# On kept connections, an idle one keeps its last body by a live reference as well.
KEPT = (
    *CONTENDERS[:2],
    Contender("3.10.11, setup(app, release_body=True)", SUSPECT, way="release_body"),
)


class Uploads(NamedTuple):
    """Bodies that are read, held for a while and refused: issue #10548's kind."""

    number: int = 3000
    at_a_time: int = 100
    size: int = 500_000
    hold: float = 0.3
    begin_over: float = 0.3
    keep_alive: bool = False
    rounds: int = 2

    @property
    def in_flight(self) -> int:
        return self.at_a_time * self.size

    async def warm_up(self, service: Service) -> Any:
        await upload(service.port, 20, 5, 1000, True, 0)

    async def run(self, service: Service, _: Any) -> List[float]:
        return await upload(
            service.port,
            self.number,
            self.at_a_time,
            self.size,
            self.keep_alive,
            self.begin_over,
        )


class Requests(NamedTuple):
    """Small requests at a fixed rate on kept connections; every second is refused."""

    rate: float = 800.0
    seconds: float = 2.5
    connections: int = 100
    hold: float = 0.05
    rounds: int = 4
    in_flight: int = 0

    async def warm_up(self, service: Service) -> Any:
        load = await Load.connect(service.port, self.connections)
        await load.at_rate(["success", "failure"], self.rate, 0.5)
        return load

    async def run(self, service: Service, load: Any) -> List[float]:
        return await load.at_rate(  # type: ignore[no-any-return]
            ["success", "failure"], self.rate, self.seconds
        )


class Run:
    """One contender under one load, in one turn a round or more."""

    def __init__(self, contender: Contender, load: Any) -> None:
        self.contender = contender
        self.load = load
        self.latencies: List[float] = []
        self.turns: List[Dict[str, Any]] = []
        self.memory: List[Any] = []  # seconds, bytes more than when idle

    async def start(self, environments: Environments, python: str, others: int) -> None:
        contender = self.contender
        self.service = await Service.start(
            environments.interpreter(python, contender.aiohttp),
            *("--ways", contender.way),
            *("--workaround", contender.workaround),
            *("--hold", str(self.load.hold)),
            *("--objects", str(others)),
            *(("--returns",) if contender.returns else ()),
        )
        self.connected = await self.load.warm_up(self.service)

    async def turn(self) -> None:
        idle = (await self.service.tell("start"))["idle"]
        self.memory = []  # the chart shows the last turn
        watching = asyncio.ensure_future(self._watch(idle))
        try:
            latencies = await self.load.run(self.service, self.connected)
        finally:
            watching.cancel()
        turn = await self.service.tell("stop")
        turn["requests"] = len(latencies)
        turn["p99.9"] = self._at(99.9, latencies)
        self.turns.append(turn)
        self.latencies += latencies

    def _at(self, percent: float, latencies: List[float]) -> float:
        """A percentile, in milliseconds, of what clients wait beyond the handler."""
        index = min(len(latencies) - 1, int(len(latencies) * percent / 100))
        return 1e3 * (sorted(latencies)[index] - self.load.hold)

    async def _watch(self, idle: int) -> None:
        start = time.perf_counter()
        while True:
            seconds = round(time.perf_counter() - start, 2)
            self.memory.append((seconds, self.service.resident() - idle))
            await asyncio.sleep(0.2)

    async def stop(self) -> None:
        await self.service.stop()
        if self.connected is not None:
            self.connected.close()

    def result(self) -> Dict[str, Any]:
        requests = sum(turn["requests"] for turn in self.turns)
        at = {
            f"p{percent:g}": self._at(percent, self.latencies)
            for percent in (50, 99, 99.9)
        }
        result = {
            "contender": self.contender.name,
            "control": self.contender.control,
            "aiohttp": self.service.aiohttp,
            "requests": requests,
            "cpu_us": 1e6 * sum(turn["cpu"] for turn in self.turns) / requests,
            "cpu_turns_us": [
                1e6 * turn["cpu"] / turn["requests"] for turn in self.turns
            ],
            "growth": max(turn["growth"] for turn in self.turns),
            "full_collections": sum(turn["collections"][2] for turn in self.turns),
            "paused_ms": 1e3 * sum(turn["paused"] for turn in self.turns),
            "longest_pause_ms": 1e3 * max(turn["longest_pause"] for turn in self.turns),
            "latency_ms": at,
            "p99.9_turns_ms": [turn["p99.9"] for turn in self.turns],
        }
        if self.load.in_flight:
            result["growth_in_flight"] = result["growth"] / self.load.in_flight
            result["memory"] = [
                (seconds, round(more / 2**20, 1)) for seconds, more in self.memory
            ]
        return result


def _pairs(mine: List[float], other: List[float]) -> Iterable[Tuple[float, float]]:
    """Turns of the same round: a control may have come more often in each."""
    return zip(mine, other[:: len(other) // len(mine)])


def beside_control(results: List[Dict[str, Any]]) -> None:
    """Add what is had by comparison, turn by turn."""
    by_name = {result["contender"]: result for result in results}
    for result in results:
        control = by_name[result["control"]]
        cpu = _pairs(result["cpu_turns_us"], control["cpu_turns_us"])
        ratios = [mine / other for mine, other in cpu]
        result["cpu_times"] = statistics.median(ratios)
        result["cpu_times_range"] = [min(ratios), max(ratios)]
        slowest = _pairs(result["p99.9_turns_ms"], control["p99.9_turns_ms"])
        more = [mine - other for mine, other in slowest]
        result["p99.9_more_ms"] = statistics.median(more)
        result["p99.9_more_ms_range"] = [min(more), max(more)]


async def compare(
    environments: Environments,
    python: str,
    load: Any,
    others: int,
    contenders: Sequence[Contender] = CONTENDERS,
) -> Dict[str, Any]:
    """Put every contender under one load, by turns."""
    runs = [Run(contender, load) for contender in contenders]
    order = random.Random(0)
    gc.collect()
    gc.freeze()
    gc.disable()  # what this process does must not be seen in the latencies
    try:
        for _ in range(load.rounds):
            turns = [run for run in runs for _ in range(run.contender.turns)]
            order.shuffle(turns)
            for run in turns:
                # A new process each: some take a third more CPU than others.
                await run.start(environments, python, others)
                await run.turn()
                await run.stop()
                gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()
    results = [run.result() for run in runs]
    beside_control(results)
    for result in results:
        memory = result.get("growth_in_flight")
        latencies = [f"{each:.1f}" for each in result["latency_ms"].values()]
        say(
            f"  {result['contender']:32} {result['cpu_us']:7.0f} us"
            f" x{result['cpu_times']:.3f}"
            f"  full {result['full_collections']:3}"
            f"  paused {result['paused_ms']:6.0f} ms"
            f"  p50/99/99.9 {'/'.join(latencies)} ms"
            + ("" if memory is None else f"  grows {memory:.2f} x in flight")
        )
    return {
        "load": type(load).__name__.lower(),
        "parameters": load._asdict(),
        "python": runs[0].service.python,
        "others": others,
        "results": results,
    }


async def main(
    environments: Environments, pythons: Sequence[str], quick: bool
) -> List[Dict[str, Any]]:
    uploads, requests = Uploads(), Requests()
    if quick:
        uploads = uploads._replace(number=600, rounds=1)
        requests = requests._replace(seconds=0.5, rounds=2)
    found = []
    for python in pythons:
        # Small requests only where they have to share with what else is alive.
        for load, others in ((uploads, 0), (uploads, MILLION), (requests, MILLION)):
            say(f"{type(load).__name__}, CPython {python}, {others} other objects")
            contenders = CONTENDERS
            if load is uploads and not others:
                contenders += FLOORS
            found.append(await compare(environments, python, load, others, contenders))
    say(f"Uploads on kept connections, CPython {pythons[0]}")
    kept = uploads._replace(keep_alive=True)
    found.append(await compare(environments, pythons[0], kept, 0, KEPT))
    return found
