"""Directives that show the catalogue, the matrix and the pictures.

All of it is read from ``aiohttp_cyclebreak.leaks``, ``docs/matrix.json`` and
``docs/pictures/``, so that no page says anything else.
"""

import json
import pathlib
import re
from collections import Counter
from typing import Any, Dict, Iterable, List, Sequence, Tuple

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

from aiohttp_cyclebreak.leaks import CATALOGUE, Leak, Remedy

DOCS = pathlib.Path(__file__).parent.parent
MATRIX = DOCS / "matrix.json"
PICTURES = DOCS / "pictures"

_REMEDIES = {
    Remedy.MIDDLEWARE: ":func:`~aiohttp_cyclebreak.cyclebreak`",
    Remedy.CLIENT: ":func:`~aiohttp_cyclebreak.client_cyclebreak`, beside a guard",
    Remedy.SERVER: ":func:`~aiohttp_cyclebreak.guard_server`",
}


def _leaks(groups: Iterable[str]) -> List[Leak]:
    """The leaks of these groups, which are what stands before the slash in an id."""
    found = []
    for group in groups:
        leaks = [leak for leak in CATALOGUE if leak.id.partition("/")[0] == group]
        if not leaks:
            raise ExtensionError(f"there is no leak {group!r} in the catalogue")
        found += leaks
    return found


def _ranges(leak: Leak) -> str:
    return "; ".join(map(str, leak.affected))


def _upstream(url: str) -> str:
    kind, _, name = url.rpartition("/")
    if kind.endswith(("/issues", "/pull")):
        name = f"aiohttp #{name}"
    return f"`{name} <{url}>`__"


class _Directive(SphinxDirective):
    has_content = False

    def parse(self, lines: Sequence[str]) -> List[nodes.Node]:
        node = nodes.Element()
        self.state.nested_parse(StringList(list(lines), "catalogue"), 0, node)
        return node.children

    def depend_on(self, *files: pathlib.Path) -> None:
        for file in files:
            self.env.note_dependency(str(file))


class LeakGroup(_Directive):
    """``.. leaks:: close-cancel none-response``: what the catalogue says of them."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> List[nodes.Node]:
        groups = self.arguments[0].split()
        leaks = _leaks(groups)
        shown = self.env.metadata[self.env.docname].setdefault("leaks", "")
        names = " ".join([shown, *groups]).strip()
        self.env.metadata[self.env.docname]["leaks"] = names
        facts = []
        for name, values in (
            ("Kind", [leak.kind.value for leak in leaks]),
            ("What holds what", [leak.chain.replace("->", "→") for leak in leaks]),
            ("Upstream", [_upstream(leak.upstream) for leak in leaks if leak.upstream]),
            ("Stopped by", [_REMEDIES[leak.remedy] for leak in leaks]),
            ("See it", [f"``verify --leak {group}``" for group in groups]),
        ):
            different = list(dict.fromkeys(values)) or ["no thread that we know of"]
            facts.append(f":{name}: " + "; ".join(different))
        lines = [
            ".. list-table::",
            "   :header-rows: 1",
            "   :widths: 30 45 25",
            "   :class: leaks",
            "",
            "   * - Id",
            "     - What sets it off",
            "     - aiohttp",
        ]
        for leak in leaks:
            lines += [
                f"   * - ``{leak.id}``",
                f"     - {leak.title}",
                f"     - {_ranges(leak)}",
            ]
        container = nodes.container(classes=["facts"])
        container += self.parse(facts)
        return [container, *self.parse(lines)]


class Picture(_Directive):
    """``.. cycle:: close-cancel``: the picture of a leak, before and after."""

    required_arguments = 1

    def run(self) -> List[nodes.Node]:
        id = self.arguments[0]
        name = id.replace("/", "-")
        files = [PICTURES / f"{name}-{end}.svg" for end in ("before", "after")]
        index = PICTURES / "index.json"
        self.depend_on(*files, index)
        drawn = json.loads(index.read_text("utf-8"))[id]
        before, after = (_inline(file.read_text("utf-8")) for file in files)
        if drawn["request"]:
            end = "The request is alive, without its body."
        elif drawn["kind"] == "permanent":
            end = "What it hung on for good is there still; the request is gone."
        elif drawn["exception"]:
            end = (
                "The exception is held on purpose, as an error reporter would hold it: "
                "its traceback stays, its locals and the request are gone."
            )
        else:
            end = "Nothing of it is left."
        what = f"{id}, aiohttp {drawn['aiohttp']} on CPython {drawn['python']}"
        # Two beside each other where three quarters of their size are enough.
        width = float(re.search(r'width="(\d+)pt"', before).group(1)) * 4 / 3
        figure = f'<figure style="flex-basis: {width * 0.75:.0f}px">'
        text = (
            f'<div class="cycle" role="group" aria-label="{what}">'
            f"{figure}{before}<figcaption>Bare: <code>{id}</code> on aiohttp "
            f"{drawn['aiohttp']}, CPython {drawn['python']}.</figcaption></figure>"
            f"{figure}{after}<figcaption>Guarded. {end}</figcaption></figure></div>"
        )
        return [nodes.raw("", text, format="html")]


class Drawing(_Directive):
    """``.. drawing:: request.svg``: a picture that was made by hand."""

    required_arguments = 1

    def run(self) -> List[nodes.Node]:
        file = PICTURES / self.arguments[0]
        self.depend_on(file)
        text = f'<div class="drawing">{_inline(file.read_text("utf-8"))}</div>'
        return [nodes.raw("", text, format="html")]


def _inline(svg: str) -> str:
    """A picture takes the page's own colours only where it is part of the page."""
    return "\n".join(line for line in svg.splitlines() if line).strip()


class Matrix(_Directive):
    """``.. leak-matrix:: GROUP...``: requests left, for each pair of versions."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> List[nodes.Node]:
        self.depend_on(MATRIX)
        matrix = json.loads(MATRIX.read_text("utf-8"))
        head = ["leak"]
        for column in matrix["columns"]:
            head.append(f"{column['aiohttp']}\npy {column['python']}")
        rows = [
            [leak.id, *map(_cell, matrix["leaks"][leak.id])]
            for leak in _leaks(self.arguments[0].split())
        ]
        return [_table(head, rows, "matrix")]


def _cell(cell: Any) -> str:
    if cell is None:
        return "?"
    bare, guarded = ("g" if each == "garbage" else f"{each:.2g}" for each in cell)
    return "·" if (bare, guarded) == ("0", "0") else f"{bare} → {guarded}"


class Summary(_Directive):
    """``.. leak-summary::``: how many leaks of each kind each version has."""

    def run(self) -> List[nodes.Node]:
        self.depend_on(MATRIX)
        matrix = json.loads(MATRIX.read_text("utf-8"))
        head = ["aiohttp", "CPython", "delayed", "permanent", "live", "guarded"]
        rows = []
        for number, column in enumerate(matrix["columns"]):
            kinds: Counter = Counter()
            left = 0
            for leak in CATALOGUE:
                cell = matrix["leaks"][leak.id][number]
                if cell is not None:
                    kinds[leak.kind.value] += cell[0] != 0
                    left += cell[1] != 0
            counts = [str(kinds[kind]) for kind in head[2:5]]
            rows.append([column["aiohttp"], column["python"], *counts, str(left)])
        return [_table(head, rows, "summary")]


class Releases(_Directive):
    """``.. leak-releases::``: after which release of aiohttp a leak is gone, or new."""

    def run(self) -> List[nodes.Node]:
        changes: Dict[Tuple[Tuple[int, ...], str], List[str]] = {}
        for leak in CATALOGUE:
            for each in leak.affected:
                if each.until is not None:
                    changes.setdefault((each.until, "last with"), []).append(leak.id)
                if each.since is not None:
                    changes.setdefault((each.since, "first with"), []).append(leak.id)
        lines = [".. list-table::", "   :widths: 14 14 72", "", "   * - Release"]
        lines.insert(1, "   :header-rows: 1")
        lines += ["     - is the", "     - leaks"]
        for (version, what), ids in sorted(changes.items()):
            lines += [
                f"   * - {'.'.join(map(str, version))}",
                f"     - {what}",
                "     - " + ", ".join(f"``{id}``" for id in dict.fromkeys(ids)),
            ]
        return self.parse(lines)


def _table(head: List[str], rows: List[List[str]], css: str) -> nodes.table:
    table = nodes.table(classes=[css])
    group = nodes.tgroup(cols=len(head))
    table += group
    for _ in head:
        group += nodes.colspec(colwidth=1)
    heading = nodes.thead()
    heading += _row([_lines(each) for each in head])
    body = nodes.tbody()
    for first, *others in rows:
        cells = [nodes.paragraph("", "", nodes.literal(first, first))]
        body += _row([*cells, *map(_lines, others)])
    group += heading
    group += body
    return table


def _lines(text: str) -> nodes.Node:
    block = nodes.line_block()
    for line in text.split("\n"):
        block += nodes.line(line, line)
    return block if "\n" in text else nodes.paragraph(text, text)


def _row(cells: Iterable[nodes.Node]) -> nodes.row:
    row = nodes.row()
    for cell in cells:
        row += nodes.entry("", cell)
    return row


def _check(app: Sphinx, env: BuildEnvironment) -> None:
    """Fail where a leak of the catalogue is on no page."""
    shown = {
        group
        for metadata in env.metadata.values()
        for group in metadata.get("leaks", "").split()
    }
    missing = {leak.id.partition("/")[0] for leak in CATALOGUE} - shown
    if missing:
        raise ExtensionError(f"no page shows {', '.join(sorted(missing))}")


def setup(app: Sphinx) -> Dict[str, Any]:
    """Add the directives."""
    app.add_directive("leaks", LeakGroup)
    app.add_directive("cycle", Picture)
    app.add_directive("drawing", Drawing)
    app.add_directive("leak-matrix", Matrix)
    app.add_directive("leak-summary", Summary)
    app.add_directive("leak-releases", Releases)
    app.connect("env-check-consistency", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
