"""Run the benchmarks, and write what they found into docs/performance.

``nox -s bench`` makes the virtual environments that this needs, and runs it.  Each part
can be run alone, and replaces only its own figures.
"""

import argparse
import asyncio
import datetime
import json
import os
import re
import time
from pathlib import Path
from typing import Any, Dict, List

import keepalive
import load
import report
from processes import MILLION, NEWEST, SUSPECT, Environments, run_script, say

DOCS = Path(__file__).parent.parent / "docs" / "performance"


def machine() -> Dict[str, Any]:
    """Say what this was measured on, but not which one it was."""
    cpus = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*:\s*(.+)$", cpus, re.MULTILINE)
    virtual = re.search(r"^flags\s*:.*\bhypervisor\b", cpus, re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model[1] if model else os.uname().machine,
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30),
        "system": os.uname().sysname,
        "virtual": bool(virtual),
    }


async def overhead(
    environments: Environments, pythons: List[str], quick: bool
) -> List[Any]:
    """Requests without a socket: see ``overhead.py``."""
    found = []
    pairs = list(zip(pythons, (SUSPECT, NEWEST)))
    for python in pythons:
        for aiohttp in (SUSPECT, NEWEST):
            for objects in (0, MILLION):
                if objects and (python, aiohttp) not in pairs:
                    continue
                options = ["--json", "--objects", str(objects)]
                options += ["--processes", "1" if quick else "3"]
                options += ["--rounds", "20" if quick else "60"]
                if objects:
                    options += ["--kinds", "failure", "failure with rows"]
                else:
                    path = environments.folder / f"pyperf-{python}-{aiohttp}.json"
                    options += ["--output", str(path)]
                interpreter = environments.interpreter(python, aiohttp)
                say(f"without a socket, aiohttp {aiohttp}, CPython {python}, {objects}")
                found.append(await run_script(interpreter, "overhead.py", *options))
    return found


async def scale(
    environments: Environments, pythons: List[str], quick: bool
) -> List[Any]:
    """Many connections and many requests: see ``scale.py``."""
    options = ["--most-requests", "10000", "--rounds", "6"] if quick else []
    say("many connections, many requests")
    # Each is busy with one core, and has its control beside it.
    return await asyncio.gather(
        *(
            run_script(environments.interpreter(python, aiohttp), "scale.py", *options)
            for python, aiohttp in zip(pythons, (SUSPECT, NEWEST))
        )
    )


def as_text(results: Any) -> str:
    """Give JSON with a list of numbers on one line, however long."""
    text = json.dumps(results, indent=1)
    numbers = re.compile(r"\[[\s\d.,e\[\]-]+\]")
    return numbers.sub(lambda found: "".join(found[0].split()), text) + "\n"


PARTS = {
    "load": load.main,
    "keepalive": keepalive.main,
    "overhead": overhead,
    "scale": scale,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; report: none")
    parser.add_argument("--environments", type=Path, required=True)
    parser.add_argument(
        "--python", dest="pythons", action="append", help="by default 3.11 and 3.13"
    )
    parser.add_argument("--output", type=Path, default=DOCS)
    parser.add_argument(
        "--quick", action="store_true", help="rough figures, not for the documents"
    )
    args = parser.parse_args()
    unknown = set(args.parts) - {*PARTS, "report"}
    if unknown:
        parser.error(f"there is no part {', '.join(unknown)}: {', '.join(PARTS)}")
    output = args.output
    if args.quick and output == DOCS:
        output = args.environments / "quick"
    output.mkdir(parents=True, exist_ok=True)
    path = output / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for part in args.parts or PARTS:
        if part == "report":
            continue
        start = time.monotonic()
        busy = os.getloadavg()[0]
        found = asyncio.run(
            PARTS[part](
                Environments(args.environments),
                args.pythons or ["3.11", "3.13"],
                args.quick,
            )
        )
        results[part] = {
            "command": f"nox -s bench -- {part}{' --quick' if args.quick else ''}",
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "machine": machine(),
            "load_average_before": round(busy, 1),
            "seconds": round(time.monotonic() - start),
            "found": found,
        }
        # After each part: one that fails later costs nothing of those before.
        path.write_text(as_text(results))
    report.write(results, output)
    say(f"written: {output}")


if __name__ == "__main__":
    main()
