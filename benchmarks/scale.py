"""Does a request cost more with many open connections, or after many requests?

In one process and without a socket, each number with a bare application and one with an
idle middleware beside it, by turns: ``python benchmarks/scale.py``.  What the library
has of its own is counted, by its types and in the containers of its modules.
"""

import argparse
import asyncio
import gc
import json
import os
import platform
import sys
from collections import deque
from collections.abc import Mapping, Set
from typing import Any, Dict, List
from weakref import WeakSet

import aiohttp
from compare import CONTROLS, beside
from inprocess import REQUESTS, Connection, by_turns, serve

WAYS = (*CONTROLS, "setup()")
KINDS = ("success", "failure")
PACKAGE = "aiohttp_cyclebreak"
CONTAINERS = (Mapping, Set, list, deque, WeakSet)


def entries() -> int:
    """How many entries there are in the containers of the library's modules."""
    containers = {  # by id, since modules share some
        id(value): value
        for name, module in list(sys.modules.items())
        if name.split(".")[0] == PACKAGE
        for key, value in vars(module).items()
        if isinstance(value, CONTAINERS) and not key.startswith("__")
    }
    return sum(map(len, containers.values()))


def there_is() -> Dict[str, int]:
    """Count what there is, after a collection."""
    gc.collect()
    tracked = gc.get_objects()
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {
        "entries": entries(),
        "ours": sum(str(type(each).__module__).startswith(PACKAGE) for each in tracked),
        "tracked": len(tracked),
        "blocks": sys.getallocatedblocks(),
        "resident": resident,
    }


async def cost(
    connections: Dict[str, List[Connection]], rounds: int, size: int
) -> Dict[str, Any]:
    """Measure all ways by turns."""
    found = {}
    for kind in KINDS:
        # A failure is severed by the connection's next request, whatever that is.
        for way in WAYS:
            for each in connections[way]:
                await each.ask(REQUESTS[kind])
        taken = await by_turns(connections, kind, rounds, size)
        found[kind] = {
            control: beside(taken["setup()"], taken[control]) for control in CONTROLS
        }
    return found


async def open_connections(numbers: List[int], rounds: int) -> List[Dict[str, Any]]:
    runners = {way: await serve(way) for way in WAYS}
    connections: Dict[str, List[Connection]] = {way: [] for way in WAYS}
    rows = []
    before = there_is()
    for number in numbers:
        # Of each there are as many: one heap, one event loop, one collector.
        for way in WAYS:
            while len(connections[way]) < number:
                connection = Connection(runners[way])
                connections[way].append(connection)
                await asyncio.sleep(0)
                await connection.ask(REQUESTS["success"])
                await connection.ask(REQUESTS["failure"])
        found = {"connections": number, **await cost(connections, rounds, 200)}
        rows.append({**found, **there_is()})
    for way in WAYS:
        for each in connections[way]:
            each.close()
    connections.clear()
    for _ in range(10):
        await asyncio.sleep(0)
    found = {"connections": 0, **there_is()}
    return [{"connections": 0, **before}, *rows, found]


async def many_requests(numbers: List[int], rounds: int) -> List[Dict[str, Any]]:
    runners = {way: await serve(way) for way in WAYS}
    guarded = Connection(runners["setup()"])
    await asyncio.sleep(0)
    rows = []
    served = 0
    for number in numbers:
        for index in range(served, number):
            # Every tenth is refused.
            await guarded.ask(REQUESTS["success" if index % 10 else "failure"])
        served = number
        # A new one each time: aiohttp 3.10 closes what is idle for 75 seconds.
        connections = {way: [Connection(runners[way])] for way in CONTROLS}
        await asyncio.sleep(0)
        costs = await cost({**connections, "setup()": [guarded]}, rounds, 50)
        found = {"requests": number, **costs}
        for (each,) in connections.values():
            each.close()
        await asyncio.sleep(0)
        rows.append({**found, **there_is()})
    return rows


async def main(most_connections: int, most_requests: int, rounds: int) -> Any:
    connections = [n for n in (1, 10, 100, 1000, 5000) if n <= most_connections]
    requests = [10**n for n in range(1, 7) if 10**n <= most_requests]
    return {
        "aiohttp": aiohttp.__version__,
        "python": platform.python_version(),
        "connections": await open_connections(connections, rounds),
        "requests": await many_requests(requests, rounds),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most-connections", type=int, default=5000)
    parser.add_argument("--most-requests", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=40)
    print(json.dumps(asyncio.run(main(**vars(parser.parse_args()))), indent=1))
