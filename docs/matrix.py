"""Fills in docs/matrix.json: what ``verify --json`` says, one column a run.

``nox -s matrix`` runs this for each pair of CPython and aiohttp, and the pages' tables
are made from the file.  ``tests/test_leaks.py`` compares it with what it measures.
"""

import json
import pathlib
import re
import subprocess
import sys
from typing import Any, Dict, List, Tuple, Union

from aiohttp_cyclebreak.leaks import CATALOGUE, Kind
from aiohttp_cyclebreak.probe import Count

FILE = pathlib.Path(__file__).with_name("matrix.json")
GARBAGE = "garbage"

Cell = Union[float, str]  # requests left for each that was made, or GARBAGE
Matrix = Dict[str, Any]


def cell(count: Count, kind: Kind) -> Cell:
    """Say what a leak of this kind left: requests, or garbage without any, or 0."""
    if count.left_as(kind):
        return round(count.left_as(kind) / count.requests, 3)
    return GARBAGE if count.shows(kind) else 0


def read() -> Matrix:
    """Give the columns, and of each leak the cells (bare, guarded) in their order."""
    matrix: Matrix = {"columns": [], "leaks": {}}
    if FILE.exists():
        matrix = json.loads(FILE.read_text("utf-8"))
    return matrix


def key(column: Dict[str, str]) -> Tuple[List[int], List[int]]:
    """Order the columns by aiohttp, then by CPython."""
    aiohttp, python = (
        [int(part) for part in re.findall(r"\d+", column[name])]
        for name in ("aiohttp", "python")
    )
    return aiohttp, python


def _pair(column: Dict[str, str]) -> Tuple[str, ...]:
    """What a later run takes the place of: its CPython may be of another release."""
    return (column["aiohttp"], *column["python"].split(".")[:2])


def add(report: Dict[str, Any], matrix: Matrix) -> Matrix:
    """Put in what one run of ``verify --json`` has said, in place of an older one."""
    new = {"aiohttp": report["aiohttp"], "python": report["python"]}
    columns = [each for each in matrix["columns"] if _pair(each) != _pair(new)]
    columns = sorted([*columns, new], key=key)
    said = {each["id"]: each for each in report["leaks"]}
    leaks = {}
    for leak in CATALOGUE:
        before = matrix["leaks"].get(leak.id, [])
        cells = dict(zip(map(str, matrix["columns"]), before))
        cells[str(new)] = [
            cell(Count(**said[leak.id][run]), leak.kind) for run in ("bare", "guarded")
        ]
        leaks[leak.id] = [cells.get(str(column)) for column in columns]
    return {"columns": columns, "leaks": leaks}


def write(matrix: Matrix) -> None:
    """One leak a line, so that a change can be read."""
    columns = ",\n".join(json.dumps(each) for each in matrix["columns"])
    leaks = ",\n".join(
        f"{json.dumps(name)}: {json.dumps(cells, separators=(',', ':'))}"
        for name, cells in matrix["leaks"].items()
    )
    text = f'{{\n"columns": [\n{columns}\n],\n"leaks": {{\n{leaks}\n}}\n}}\n'
    FILE.write_text(text, "utf-8")


if __name__ == "__main__":
    verify = [sys.executable, "-m", "aiohttp_cyclebreak", "verify", "--json"]
    said = subprocess.run(verify, stdout=subprocess.PIPE, check=True).stdout
    write(add(json.loads(said), read()))
