"""What is compared: how an application is guarded, or what else is tried."""

import asyncio
import gc
import time
from typing import Any, Callable, Dict

from aiohttp import web

from aiohttp_cyclebreak import Radar, cyclebreak, guard_server, setup


@web.middleware
async def idle(request: web.Request, handler: Any) -> web.StreamResponse:
    """Only await the handler: what any middleware costs."""
    return await handler(request)  # type: ignore[no-any-return]


WAYS: Dict[str, Callable[[web.Application], Any]] = {
    "bare": lambda app: None,
    "idle middleware": lambda app: app.middlewares.append(idle),
    # setup() has two layers, and the first one of any costs aiohttp more than the next.
    "two idle ones": lambda app: app.middlewares.extend([idle, idle]),
    "cyclebreak()": lambda app: app.middlewares.append(cyclebreak()),
    "cyclebreak() below idle": lambda app: app.middlewares.extend([idle, cyclebreak()]),
    "setup()": setup,
    "setup() around idle": lambda app: (app.middlewares.append(idle), setup(app)),
    "guard_server()": lambda app: None,
    "release_body": lambda app: setup(app, release_body=True),
    "radar": lambda app: setup(app, radar=Radar()),
}


async def start_runner(app: web.Application, way: str) -> web.AppRunner:
    """Guard an application in one of the WAYS, and get it ready to be served."""
    WAYS[way](app)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    if way == "guard_server()":
        guard_server(runner)
    return runner


TIMER = 1.0  # seconds
THRESHOLD = (100, 5, 5)


class Timer:
    """Collects every second."""

    def start(self) -> None:
        self._handle = asyncio.get_running_loop().call_later(TIMER, self._collect)

    def _collect(self) -> None:
        gc.collect()
        self.start()

    def stop(self) -> None:
        self._handle.cancel()


class LowThreshold:
    """Collects more often."""

    def start(self) -> None:
        gc.set_threshold(*THRESHOLD)

    def stop(self) -> None:
        pass


class Nothing:
    """Leaves it to the collector."""

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass


# What people do about memory that grows, without any library.
WORKAROUNDS: Dict[str, Callable[[], Any]] = {
    "none": Nothing,
    "timer": Timer,
    "threshold": LowThreshold,
}


class Collector:
    """What the cyclic garbage collector does from now on."""

    def __init__(self) -> None:
        self.collections = [0, 0, 0]
        self.paused = 0.0
        self.longest = 0.0
        gc.callbacks.append(self._called)

    def _called(self, phase: str, info: Dict[str, int]) -> None:
        if phase == "start":
            self._started = time.perf_counter()
            return
        paused = time.perf_counter() - self._started
        self.collections[info["generation"]] += 1
        self.paused += paused
        self.longest = max(self.longest, paused)

    def stop(self) -> None:
        gc.callbacks.remove(self._called)


def make_objects(number: int) -> Any:
    """Make other objects that stay, and are in the oldest generation."""
    objects: Any = [[] for _ in range(number)]
    gc.collect()
    return objects
