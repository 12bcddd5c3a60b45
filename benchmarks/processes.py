"""Starting what is measured, and asking it: one interpreter and aiohttp a process."""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any, Dict, NamedTuple

HERE = Path(__file__).parent

# CPython and aiohttp; each pair has a virtual environment of its own.
SUSPECT, FIXED, NEWEST = "3.10.11", "3.11.18", "newest"

MILLION = 1_000_000  # other objects in a process


class Environments(NamedTuple):
    """Where the interpreters are: ``<CPython>-<aiohttp>`` is a folder of each."""

    folder: Path

    def interpreter(self, python: str, aiohttp: str) -> str:
        path = self.folder / f"{python}-{aiohttp}" / "bin" / "python"
        if not path.exists():
            raise SystemExit(f"there is no {path}: `nox -s bench` makes it")
        return str(path)


class Service:
    """A running ``service.py``."""

    def __init__(self, process: Any, ready: Dict[str, Any]) -> None:
        self._process = process
        self.ports: Dict[str, int] = ready["ports"]
        self.pid: int = ready["pid"]
        self.python: str = ready["python"]
        self.aiohttp: str = ready["aiohttp"]

    @classmethod
    async def start(cls, interpreter: str, *options: str) -> "Service":
        process = await asyncio.create_subprocess_exec(
            interpreter,
            str(HERE / "service.py"),
            *options,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        line = await process.stdout.readline()
        if not line:
            raise RuntimeError(f"{interpreter} service.py {options} has not started")
        return cls(process, json.loads(line))

    @property
    def port(self) -> int:
        """Where it listens, if it serves one application only."""
        (port,) = self.ports.values()
        return port

    async def tell(self, command: str) -> Dict[str, Any]:
        self._process.stdin.write(command.encode() + b"\n")
        line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the service ended before its answer to {command!r}")
        return json.loads(line)  # type: ignore[no-any-return]

    def resident(self) -> int:
        """Bytes of memory that it has now."""
        with open(f"/proc/{self.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    async def stop(self) -> None:
        if self._process.returncode is None:
            self._process.stdin.close()
            await self._process.wait()


def run_script(interpreter: str, script: str, *options: str) -> Any:
    """Run a benchmark to its end: a coroutine that gives the JSON it printed."""

    async def run() -> Any:
        process = await asyncio.create_subprocess_exec(
            interpreter,
            str(HERE / script),
            *options,
            stdout=asyncio.subprocess.PIPE,
        )
        output, _ = await process.communicate()
        if process.returncode:
            raise RuntimeError(f"{script} {options} ended with {process.returncode}")
        return json.loads(output)

    return run()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
