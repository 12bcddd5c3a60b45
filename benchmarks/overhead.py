"""CPU time a request, beside bare aiohttp and a middleware that does nothing.

Each way is fed the same bytes by turns, in one process and without a socket, the
collector's work included; the median of many short batches counts, each compared with
the batch of the control in the same round.  Run it with the aiohttp and the CPython
that you have: ``python benchmarks/overhead.py``.  With ``--output`` several processes
measure one after the other, and pyperf writes what they found: ``python -m pyperf
stats`` and ``compare_to`` read it.
"""

import argparse
import asyncio
import json
import platform
import random
import subprocess
import sys
import time
from typing import Any, Dict, List

import aiohttp
from compare import Taken, compared, lines
from inprocess import REQUESTS, Connection, by_turns, serve
from ways import WAYS, make_objects


async def measure(
    rounds: int, size: int, objects: int, kinds: List[str], seed: int
) -> Taken:
    others = make_objects(objects)
    # In another order in each process: what was made first lies elsewhere in memory.
    order = random.Random(seed).sample(list(WAYS), len(WAYS))
    made = {way: [Connection(await serve(way))] for way in order}
    connections = {way: made[way] for way in WAYS}
    await asyncio.sleep(0)
    taken = {
        kind: await by_turns(connections, kind, rounds, size, seed) for kind in kinds
    }
    assert len(others) == objects
    return taken


def in_processes(number: int, options: List[str]) -> List[Taken]:
    """Run this program again, and again; the values differ more between processes."""
    runs = []
    for seed in range(number):
        command = [sys.executable, __file__, "--worker", "--seed", str(seed), *options]
        output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
        runs.append(json.loads(output))
    return runs


def write_pyperf(path: str, runs: List[Taken], size: int) -> None:
    """Write the values of all processes as pyperf's benchmarks, in its format.

    pyperf's own runner measures one benchmark after the other, each in processes of
    its own: what is to be compared within a round would be minutes apart.
    """
    import pyperf

    benchmarks = []
    for kind in runs[0]:
        for way in runs[0][kind]:
            metadata = {
                "name": f"{kind}: {way}",
                "unit": "second",
                "loops": size,
                "aiohttp_version": aiohttp.__version__,
                "python_version": platform.python_version(),
                "timer": "time.process_time()",
            }
            benchmarks.append(
                pyperf.Benchmark(
                    [
                        pyperf.Run(
                            run[kind][way], metadata=metadata, collect_metadata=False
                        )
                        for run in runs
                    ]
                )
            )
    pyperf.BenchmarkSuite(benchmarks).dump(path, replace=True)


def show(rows: List[Dict[str, Any]], objects: int) -> None:
    print(
        f"aiohttp {aiohttp.__version__} on CPython {platform.python_version()}, "
        f"{platform.machine()}, {objects} other objects; CPU time a request in "
        "microseconds, how much more than with the idle middleware, how many times bare"
    )
    print("\n".join(lines(rows)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--size", type=int, default=60, help="requests a batch")
    parser.add_argument("--objects", type=int, default=0, help="others kept alive")
    parser.add_argument("--kinds", nargs="+", choices=REQUESTS, default=list(REQUESTS))
    parser.add_argument("--processes", type=int, default=0, help="0: this one only")
    parser.add_argument("--output", help="for pyperf: a file to write")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    args = parser.parse_args()
    measured = {
        "rounds": args.rounds,
        "size": args.size,
        "objects": args.objects,
        "kinds": args.kinds,
    }
    if args.processes:
        options = ["--kinds", *args.kinds]
        for name in ("rounds", "size", "objects"):
            options += [f"--{name}", str(measured[name])]
        runs = in_processes(args.processes, options)
    else:
        runs = [asyncio.run(measure(**measured, seed=args.seed))]
    if args.worker:
        print(json.dumps(runs[0]))
        return
    if args.output:
        write_pyperf(args.output, runs, args.size)
    rows = compared(runs)
    if args.json:
        versions = {
            "aiohttp": aiohttp.__version__,
            "python": platform.python_version(),
            "processes": len(runs),
        }
        print(json.dumps({**versions, **measured, "results": rows}))
    else:
        show(rows, args.objects)


if __name__ == "__main__":
    main()
