"""Configuration of Sphinx; nothing is fetched."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent / "_ext"))

from aiohttp_cyclebreak import __version__

project = "aiohttp-cyclebreak"
copyright = "the aiohttp-cyclebreak contributors"
version = release = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "catalogue",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["cyclebreak.css"]
html_title = f"aiohttp-cyclebreak {version}"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# What no inventory has.
nitpick_ignore = [
    ("py:attr", "aiohttp.web.Application.middlewares"),
    ("py:class", "Middleware"),
]
nitpick_ignore_regex = [
    (r"py:.*", r"prometheus_client\..*"),
    (r"py:(class|obj)", r".*\._[A-Z]\w*"),  # type variables
]

# Those of the inventories in the repository, so that the build needs no network.
intersphinx_mapping = {
    "aiohttp": ("https://docs.aiohttp.org/en/stable/", "inventories/aiohttp.inv"),
    "python": ("https://docs.python.org/3/", "inventories/python.inv"),
}
