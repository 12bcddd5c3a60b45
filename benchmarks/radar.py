"""What the radar costs: a request, and the event loop while it looks and reports.

``python benchmarks/radar.py`` serves nothing: it watches requests that were made for
it, in a process with as many objects as asked for.  CPU time is measured, so that other
work of the machine matters little.
"""

import argparse
import asyncio
import gc
import logging
import platform
import statistics
import time
from typing import Any, List

import aiohttp
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from aiohttp_cyclebreak import Radar
from aiohttp_cyclebreak.radar import Watch


class Node:
    """An object with attributes, as an application has many."""

    def __init__(self, before: Any) -> None:
        self.before = before
        self.children: List[Any] = []


def make_objects(number: int) -> List[Node]:
    nodes: List[Node] = []
    while len(gc.get_objects()) < number:
        for _ in range(10_000):
            nodes.append(Node(nodes[-1] if nodes else None))
    return nodes


def make_request() -> web.BaseRequest:
    """A request whose connection has gone, without the mock's many objects."""
    request = web.Request.__new__(web.Request)
    vars(request).update(vars(MOCKED), _task=None, _protocol=None, _state={})
    return request


MOCKED = make_mocked_request("GET", "/")


class Stand:
    """What can be referred to weakly, as a request can."""


def cost_of_a_request() -> float:
    """Nanoseconds, those for what is forgotten under load included."""
    number = 100_000

    def batch(add: Any) -> float:
        began = time.process_time()
        for _ in range(number):
            add(Stand())
        return time.process_time() - began

    def ignore(request: Any) -> None:
        pass

    differences = []
    for _ in range(15):
        nothing = batch(ignore)
        differences.append(batch(Watch(Radar()).add) - nothing)
    return statistics.median(differences) / number * 1e9


async def longest_pause(watch: Watch, later: float) -> float:
    """Milliseconds of CPU time for which a look keeps the event loop busy."""
    look = asyncio.ensure_future(watch.look(time.monotonic() + later))
    longest, before = 0.0, time.process_time()
    while not look.done():
        await asyncio.sleep(0)
        now = time.process_time()
        longest, before = max(longest, now - before), now
    await look
    return longest * 1000


async def look_and_report(requests: int) -> None:
    watch = Watch(Radar(budget=60_000, max_pause=60_000))
    kept = [make_request() for _ in range(requests)]
    for request in kept:
        watch.add(request)
    first = await longest_pause(watch, 0.0)
    again = max([await longest_pause(watch, 10.0) for _ in range(3)])
    report = await longest_pause(watch, 31.0)
    print(f"  {requests} requests kept: longest pause of the event loop, ms")
    print(f"    first look {first:.1f}, later ones {again:.1f}, a report {report:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--objects", type=int, default=1_000_000)
    parser.add_argument("--requests", type=int, nargs="*", default=[1, 1000, 10_000])
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    print(f"CPython {platform.python_version()}, aiohttp {aiohttp.__version__}")
    print(f"  a request: {cost_of_a_request():.0f} ns")
    nodes = make_objects(arguments.objects)
    gc.collect()
    gc.disable()
    for requests in arguments.requests:
        asyncio.run(look_and_report(requests))
    began = time.process_time()
    objects = gc.get_objects()
    seconds = time.process_time() - began
    print(f"  {len(objects)} objects, gc.get_objects() {seconds * 1000:.1f} ms")
    began = time.process_time()
    gc.collect()
    print(f"    gc.collect() {(time.process_time() - began) * 1000:.1f} ms")
    del nodes


if __name__ == "__main__":
    main()
