"""Configuration of Sphinx; nothing is fetched, except by Read the Docs."""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent / "_ext"))

from aiohttp_cyclebreak import __version__

project = "aiohttp-cyclebreak"
copyright = "the aiohttp-cyclebreak contributors"
version = release = __version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "catalogue"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["cyclebreak.css"]
html_title = f"aiohttp-cyclebreak {version}"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# Other projects' names stand as they are where their inventories are not at hand.
nitpick_ignore_regex = [
    (r"py:.*", r"(aiohttp|asyncio|collections|gc|logging|types|typing)\..*"),
    (r"py:(class|exc|meth|obj)", r"[A-Z]\w*(Error|Exit|Exception)"),
    (r"py:(class|obj)", r"(Any|Awaitable|Callable|Middleware|None|Optional|Type)"),
    (r"py:(class|obj)", r"(bool|dict|int|list|object|str|type)"),
    (r"py:(class|obj)", r".*\._[A-Z]\w*"),  # type variables
]

if "READTHEDOCS" in os.environ:
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "aiohttp": ("https://docs.aiohttp.org/en/stable/", None),
        "python": ("https://docs.python.org/3/", None),
    }
