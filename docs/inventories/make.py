"""Makes the two inventories, from those of CPython's and aiohttp's documentation.

``python make.py PYTHON.inv AIOHTTP.inv``, with sphobjinv installed; the two given are
objects.inv of https://docs.python.org/3/ and https://docs.aiohttp.org/en/stable/, or of
Debian's packages python3.11-doc and python-aiohttp-doc.  So the build needs no network.
"""

import pathlib
import re
import sys

import sphobjinv

FOLDER = pathlib.Path(__file__).parent
MODULES = (
    "asyncio|collections|contextlib|contextvars|gc|inspect|logging|signal|sys|threading|"
    "time|traceback|tracemalloc|types|typing|weakref"
)

# Where autodoc finds what is imported from aiohttp.web.
HOMES = {
    "Application": "web_app",
    "AppRunner": "web_runner",
    "BaseRequest": "web_request",
    "Request": "web_request",
    "ServerRunner": "web_runner",
    "StreamResponse": "web_response",
}


def write(inventory: sphobjinv.Inventory, name: str) -> None:
    """Write an inventory, compressed."""
    inventory.objects.sort(key=lambda each: (each.domain, each.role, each.name))
    data = sphobjinv.compress(inventory.data_file())
    (FOLDER / name).write_bytes(data)


def python(file: str) -> None:
    """Keep what is built in, and a few modules."""
    inventory = sphobjinv.Inventory(file)
    inventory.objects = [
        each
        for each in inventory.objects
        if each.domain == "py" and re.fullmatch(rf"\w+|({MODULES})(\.\w+)*", each.name)
    ]
    write(inventory, "python.inv")


def aiohttp(file: str) -> None:
    """Add the names of the modules where classes are at home."""
    inventory = sphobjinv.Inventory(file)
    for each in list(inventory.objects):
        module, _, name = each.name.rpartition(".")
        if module == "aiohttp.web" and name in HOMES:
            home = each.evolve(
                name=f"aiohttp.{HOMES[name]}.{name}", uri=each.uri_expanded
            )
            inventory.objects.append(home)
        elif each.name == "aiohttp.TraceConfig":
            home = each.evolve(
                name="aiohttp.tracing.TraceConfig", uri=each.uri_expanded
            )
            inventory.objects.append(home)
    write(inventory, "aiohttp.inv")


if __name__ == "__main__":
    python(sys.argv[1])
    aiohttp(sys.argv[2])
