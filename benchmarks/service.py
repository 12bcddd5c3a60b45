"""The process that is measured: one application or more, on sockets of loopback.

It is told what to do on standard input, and answers with lines of JSON: ``start``
and ``stop`` enclose what is measured, ``cpu`` asks for the time used so far.
"""

import argparse
import asyncio
import gc
import json
import os
import platform
import re
import sys
import time
from typing import Any, Dict, Optional

import aiohttp
from aiohttp import web
from ways import WAYS, WORKAROUNDS, Collector, make_objects, start_runner


def resident(what: str = "VmRSS") -> int:
    """Bytes of memory that this process has, or had at most: VmHWM."""
    with open("/proc/self/status") as file:
        found = re.search(rf"^{what}:\s*(\d+) kB$", file.read(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def forget_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def application(hold: float, returns: bool) -> web.Application:
    """Answer, refuse, or read a body and refuse it; after a wait, as for a database."""

    async def answer(request: web.Request) -> web.Response:
        if hold:
            await asyncio.sleep(hold)
        return web.Response(text="ok")

    async def refuse(request: web.Request) -> web.Response:
        await request.read()
        if hold:
            await asyncio.sleep(hold)
        if returns:
            refused = web.HTTPBadRequest()  # making one takes aiohttp 3.10 a while
            return web.Response(status=refused.status, text=refused.text)
        raise web.HTTPBadRequest

    app = web.Application(client_max_size=2**30)
    app.router.add_get("/ok", answer)
    app.router.add_get("/fail", refuse)
    app.router.add_post("/fail", refuse)
    return app


class Measured:
    """What happens in this process between start and stop."""

    def __init__(self, workaround: str) -> None:
        self._workaround = WORKAROUNDS[workaround]()
        self._collector: Optional[Collector] = None
        gc.collect()  # the objects that are there from the start are old ones

    def start(self) -> Dict[str, Any]:
        self._idle = resident()
        forget_peak()
        self._collector = Collector()
        self._workaround.start()
        self._cpu = time.process_time()
        return {"idle": self._idle}

    def stop(self) -> Dict[str, Any]:
        cpu = time.process_time() - self._cpu
        self._workaround.stop()
        assert self._collector is not None
        self._collector.stop()
        return {
            "cpu": cpu,
            "growth": resident("VmHWM") - self._idle,
            "collections": self._collector.collections,
            "paused": self._collector.paused,
            "longest_pause": self._collector.longest,
        }

    def cpu(self) -> Dict[str, Any]:
        # What one application leaves to the collector is not for the next to pay.
        gc.collect(1)
        return {"cpu": time.process_time()}


async def main(args: argparse.Namespace) -> None:
    objects = make_objects(args.objects)
    ports = {}
    for way in args.ways:
        runner = await start_runner(application(args.hold, args.returns), way)
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
        await site.start()
        ports[way] = runner.addresses[0][1]
    measured = Measured(args.workaround)
    commands = {
        "start": measured.start,
        "stop": measured.stop,
        "cpu": measured.cpu,
    }
    ready = {
        "ports": ports,
        "pid": os.getpid(),
        "aiohttp": aiohttp.__version__,
        "python": platform.python_version(),
        "objects": len(objects),
    }
    print(json.dumps(ready), flush=True)
    over = asyncio.get_running_loop().create_future()

    def obey() -> None:
        line = sys.stdin.readline()
        if not line:
            over.set_result(None)
            return
        print(json.dumps(commands[line.strip()]()), flush=True)

    asyncio.get_running_loop().add_reader(sys.stdin, obey)
    await over
    os._exit(0)  # connections may be open still, and objects take long to free


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["bare"])
    parser.add_argument("--workaround", choices=WORKAROUNDS, default="none")
    parser.add_argument("--hold", type=float, default=0.0, help="seconds a request")
    parser.add_argument(
        "--returns", action="store_true", help="refuse without any exception"
    )
    parser.add_argument("--objects", type=int, default=0, help="others kept alive")
    asyncio.run(main(parser.parse_args()))
