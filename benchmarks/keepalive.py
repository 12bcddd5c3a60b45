"""CPU time of a real request: sockets, and the load from another process.

One process serves an application in each way, on a port of its own, and this one sends
requests to them by turns, on kept connections.  What is compared is the CPU time of the
process that serves; each value with that of the control in the same round.
``nox -s bench -- keepalive`` runs it.
"""

import random
from typing import Any, Dict, List, Sequence

from clients import Load
from compare import Taken, compared, lines
from processes import NEWEST, SUSPECT, Environments, Service, say

WAYS = (
    "bare",
    "idle middleware",
    "two idle ones",
    "cyclebreak()",
    "setup()",
    "setup() around idle",
    "guard_server()",
)
KINDS = ("success", "failure")


async def measure(
    interpreter: str, rounds: int, size: int, connections: int, seed: int
) -> Any:
    """Measure one process: what it runs, and seconds a request."""
    order = random.Random(seed)
    # In another order in each process: what was made first lies elsewhere in memory.
    ways = order.sample(WAYS, len(WAYS))
    service = await Service.start(interpreter, "--ways", *ways)
    taken: Taken = {kind: {way: [] for way in WAYS} for kind in KINDS}
    try:
        loads = {
            way: await Load.connect(service.ports[way], connections) for way in WAYS
        }
        # All of one kind first: a failure is severed by the connection's next request.
        for kind in KINDS:
            for number in range(rounds + 1):
                for way in order.sample(WAYS, len(WAYS)):
                    before = (await service.tell("cpu"))["cpu"]
                    await loads[way].batch(kind, size)
                    after = (await service.tell("cpu"))["cpu"]
                    if number:  # the first one warms up
                        taken[kind][way].append((after - before) / size)
        for load in loads.values():
            load.close()
    finally:
        await service.stop()
    return service, taken


async def main(
    environments: Environments, pythons: Sequence[str], quick: bool
) -> List[Dict[str, Any]]:
    """Compare the ways on each CPython, with the two releases of aiohttp."""
    processes, rounds, size, connections = (1, 20, 60, 10) if quick else (5, 60, 60, 10)
    found = []
    for python in pythons:
        for aiohttp in (SUSPECT, NEWEST):
            interpreter = environments.interpreter(python, aiohttp)
            runs = []
            for seed in range(processes):
                service, taken = await measure(
                    interpreter, rounds, size, connections, seed
                )
                runs.append(taken)
            rows = compared(runs)
            say(f"kept connections, aiohttp {service.aiohttp}, CPython {python}")
            say("\n".join(lines(rows)))
            found.append(
                {
                    "aiohttp": service.aiohttp,
                    "python": service.python,
                    "processes": processes,
                    "rounds": rounds,
                    "size": size,
                    "connections": connections,
                    "results": rows,
                }
            )
    return found
