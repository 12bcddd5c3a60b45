"""Does this aiohttp have what ``internals.py`` touches?"""

import ast
import asyncio
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Set

import aiohttp

from aiohttp_cyclebreak import internals

from .service import AIOHTTP

# What its docstrings name for some versions only, and whether this is one of them.
ONLY = {
    "_CONNECTION_CLOSED_EXCEPTION": AIOHTTP >= (3, 10, 9),
    "_PAYLOAD_ACCESS_ERROR": AIOHTTP >= (3, 10, 6),
    "_build_middlewares": AIOHTTP >= (3, 10, 6),
    "_cached_build_middleware": AIOHTTP >= (3, 10, 11),
    "_data_received_cb": AIOHTTP >= (3, 14),
    "_all_tasks": sys.version_info < (3, 12),
    "_scheduled_tasks": sys.version_info >= (3, 12),
}
OWN = {"_message", "_refused"}  # of classes of the library's


def _words(package: ModuleType) -> Set[str]:
    return {
        word
        for path in Path(str(package.__file__)).parent.glob("*.py")
        for word in re.findall(r"\w+", path.read_text(encoding="utf-8"))
    }


def test_each_private_attribute_is_there() -> None:
    """One that no version has would look as if it did something."""
    tree = ast.parse(Path(internals.__file__).read_text(encoding="utf-8"))
    names = {each.attr for each in ast.walk(tree) if isinstance(each, ast.Attribute)}
    names |= {
        str(each.value) for each in ast.walk(tree) if isinstance(each, ast.Constant)
    }
    touched = {name for name in names if re.fullmatch(r"_[A-Za-z]\w+", name)}
    missing = touched - _words(aiohttp) - _words(asyncio) - {*dir(sys)} - OWN
    assert missing == {name for name, is_there in ONLY.items() if not is_there}
