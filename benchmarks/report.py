"""Tables and charts out of what was measured: nothing in them is written by hand."""

import csv
import io
from pathlib import Path
from typing import Any, Dict, Iterable, List, Sequence

from processes import MILLION

Row = Sequence[Any]


def table(title: str, head: Row, rows: Iterable[Row]) -> str:
    lines = [
        f".. csv-table:: {title}".rstrip(),
        "   :widths: auto",
        "   :header-rows: 1",
        "   :class: performance",
        "",
    ]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    lines += [f"   {line}" for line in text.getvalue().splitlines()]
    return "\n".join([*lines, ""])


def origin(part: Dict[str, Any]) -> str:
    """Say where, when and by which command."""
    machine = part["machine"]
    kind = "a virtual machine" if machine["virtual"] else "a machine"
    return (
        f"Measured on {part['date']} by ``{part['command']}``, in {part['seconds']} s, "
        f"on {kind} with {machine['cores']} cores ({machine['cpu']}), "
        f"{machine['memory_gib']} GiB of memory, {machine['system']}; the load average "
        f"was {part['load_average_before']} before it started.\n"
    )


def versions(found: Iterable[Dict[str, Any]]) -> str:
    pairs = {(each["python"], each["aiohttp"]) for each in found}
    return ", ".join(f"aiohttp {a} on CPython {p}" for p, a in sorted(pairs))


def named(result: Dict[str, Any]) -> str:
    """The newest aiohttp by its number."""
    return str(result["contender"]).replace("newest", result["aiohttp"])


# --- under load -----------------------------------------------------------------


def load_tables(groups: List[Dict[str, Any]]) -> str:
    return "\n".join(map(load_table, groups))


def load_table(group: Dict[str, Any]) -> str:
    memory = "growth_in_flight" in group["results"][0]
    head = ["aiohttp"]
    if memory:
        head += ["memory, times in flight"]
    head += [
        "CPU a request, µs (times its control)",
        "full collections",
        "paused, ms (longest)",
        "latency, ms: 50 / 99 / 99.9 %",
    ]
    rows = []
    for result in group["results"]:
        row: List[Any] = [named(result)]
        if memory:
            row.append(f"{result['growth_in_flight']:.1f}")
        row += [
            f"{result['cpu_us']:.0f} ({result['cpu_times']:.2f})",
            result["full_collections"],
            f"{result['paused_ms']:.0f} ({result['longest_pause_ms']:.0f})",
            "\xa0/\xa0".join(_short(each) for each in result["latency_ms"].values()),
        ]
        rows.append(row)
    return table(_heading(group), head, rows)


def _short(milliseconds: float) -> str:
    return f"{milliseconds:.{0 if milliseconds >= 100 else 1}f}"


_MEASURED_TWICE = (
    "to aiohttp 3.10.11 and to the newest, bare and with ``setup(app)`` alone"
)


def load_origin(part: Dict[str, Any], load: str) -> str:
    """Say what the load was, beside where it was measured."""
    group = next(each for each in part["found"] if each["load"] == load)
    of = group["parameters"]
    if load == "uploads":
        text = (
            f"{of['number']:,} POSTs of {of['size'] // 1000} kB, {of['at_a_time']} at "
            f"a time, each read, held for {of['hold']} s and refused with "
            f"``web.HTTPBadRequest``: {of['at_a_time'] * of['size'] // 10**6} MB are "
            f"in flight. They come {of['rounds']} times, to a new process each; twice "
            f"as often {_MEASURED_TWICE}, and to the newest that returns a 400. "
        )
        if of.get("begin_over"):
            text += f"They begin one after the other, over {of['begin_over']} s. "
    else:
        text = (
            f"{of['rate']:.0f} small requests a second on {of['connections']} kept "
            f"connections, each of which waits {of['hold'] * 1e3:.0f} ms, as for a "
            "database; every second one is refused with ``web.HTTPBadRequest``. They "
            f"come in {of['rounds']} turns of {of['seconds']:g} s each, to a new "
            f"process each; in twice as many {_MEASURED_TWICE}. "
        )
    return text + origin(part)


# --- one process ----------------------------------------------------------------


def spread(row: Dict[str, Any], key: str, form: str) -> str:
    low, high = row[f"{key} range"]
    if low == high:
        return f"{row[key]:{form}}"
    return f"{row[key]:{form}} ({low:{form}} to {high:{form}})"


def ways_table(found: List[Dict[str, Any]], title: str) -> str:
    """Ways as rows: more than an idle middleware, or how many times bare."""
    head = ["", ""]
    head += [f"{each['aiohttp']}, CPython {each['python']}" for each in found]
    rows = []
    for index, first in enumerate(found[0]["results"]):
        kind = first["kind"]
        if kind == "success":
            key, form, what = "more_us idle middleware", "+.1f", "µs more than idle"
        else:
            key, form, what = "times bare", ".2f", "times bare"
        cells = []
        for each in found:
            row = each["results"][index]
            absolute = row["way"] == "bare" or row[key] == 0
            cells.append(f"{row['us']:.0f} µs" if absolute else spread(row, key, form))
        rows.append([f"{kind}, {what}", first["way"], *cells])
    return table(title, head, rows)


# --- scale ----------------------------------------------------------------------


def scale_table(found: Dict[str, Any], what: str) -> str:
    head = [
        what,
        "success, times bare",
        "µs more than idle",
        "failure, times bare",
        "µs more than idle",
        "objects of the library",
        "entries in its containers",
        "all objects",
        "memory, MiB",
    ]
    rows = []
    for each in found[what]:
        row: List[Any] = [f"{each[what]:,}"]
        for kind in ("success", "failure"):
            cost = each.get(kind)
            row += (
                ["", ""]
                if cost is None
                else [
                    f"{cost['bare']['times']:.2f}",
                    f"{cost['idle middleware']['more_us']:+.1f}",
                ]
            )
        row += [each["ours"], each["entries"], f"{each['tracked']:,}"]
        row.append(f"{each['resident'] / 2**20:.0f}")
        rows.append(row)
    title = f"aiohttp {found['aiohttp']}, CPython {found['python']}"
    return table(title, head, rows)


# --- charts ---------------------------------------------------------------------

THEMES = {
    "light": {"text": "#2a2a2a", "grid": "#d4d4d4"},
    "dark": {"text": "#d6d6d6", "grid": "#3c3f43"},
}
TICKS = [step * 10**power for power in range(-1, 5) for step in (1, 2, 5)]
COLOURED = (
    "text.color",
    "axes.edgecolor",
    "axes.labelcolor",
    "axes.titlecolor",
    "xtick.color",
    "ytick.color",
)
# Of each contender that is drawn: a colour for either theme, a style, a width.
STYLES = (
    ("#d1440c", "#ff7a45", "-", 1.6),
    ("#0b62c4", "#5aa9ff", "-", 2.6),
    ("#9a6b00", "#e0a92e", (0, (4, 1.5)), 1.4),
    ("#8e3fa8", "#d48bea", (0, (1.5, 1.5)), 1.4),
    ("#6b6b6b", "#9c9c9c", "-", 1.6),
    ("#0f7d4f", "#3fc98a", "-", 1.6),
    ("#007b8f", "#35c4d7", (0, (6, 1.5)), 2.6),
)


def _figure(theme: str, height: float, panels: int) -> Any:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    colours = THEMES[theme]
    plt.rcParams.update(
        {
            "font.size": 10,
            "axes.titlesize": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "svg.hashsalt": "aiohttp-cyclebreak",
            **dict.fromkeys(COLOURED, colours["text"]),
            "grid.color": colours["grid"],
        }
    )
    # Narrow: a phone shows it at two thirds of its size.
    return plt.subplots(
        panels, 1, figsize=(5.2, height), squeeze=False, layout="constrained"
    )


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = path.read_text()
    path.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n")


def memory_chart(groups: List[Dict[str, Any]], theme: str, path: Path) -> None:
    figure, axes = _figure(theme, 2.1 * len(groups) + 1.6, len(groups))
    for axis, group in zip(axes[:, 0], groups):
        in_flight = group["parameters"]["at_a_time"] * group["parameters"]["size"]
        for result, style in zip(group["results"], STYLES):
            seconds = [point[0] for point in result["memory"]]
            times = [point[1] * 2**20 / in_flight for point in result["memory"]]
            axis.plot(
                seconds,
                times,
                color=style[theme == "dark"],
                linestyle=style[2],
                linewidth=style[3],
                label=named(result),
            )
        axis.set_title(_heading(group), loc="left")
        axis.set_ylabel("times the bytes in flight")
        axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
        axis.grid(axis="y", linewidth=0.7)
    axes[-1, 0].set_xlabel("seconds")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper left", frameon=False, fontsize=9, ncols=1
    )
    _save(figure, path)


def _heading(group: Dict[str, Any]) -> str:
    others = "a million" if group["others"] == MILLION else "no"
    kept = ", kept connections" if group["parameters"].get("keep_alive") else ""
    return f"CPython {group['python']}, {others} other objects{kept}"


def latency_chart(groups: List[Dict[str, Any]], theme: str, path: Path) -> None:
    figure, axes = _figure(theme, 3.9 * len(groups) + 0.4, len(groups))
    marks = {"p50": "o", "p99": "D", "p99.9": "s"}
    every = [
        milliseconds
        for group in groups
        for result in group["results"]
        for milliseconds in result["latency_ms"].values()
    ]
    lowest, highest = max(min(every), 0.1), max(every)
    for axis, group in zip(axes[:, 0], groups):
        for line, (result, style) in enumerate(zip(group["results"], STYLES)):
            colour = style[theme == "dark"]
            at = result["latency_ms"]
            axis.plot(list(at.values()), [line] * 3, color=colour, linewidth=1.2)
            for percentile, mark in marks.items():
                axis.plot(
                    at[percentile],
                    line,
                    mark,
                    color=colour,
                    markersize=6,
                    fillstyle="none" if percentile == "p50" else "full",
                )
            axis.text(
                0.0,
                line - 0.3,
                named(result),
                transform=axis.get_yaxis_transform(),
                fontsize=9,
                va="bottom",
            )
        axis.set_title(_heading(group), loc="left")
        axis.set_xscale("log")
        axis.set_ylim(len(group["results"]) - 0.4, -0.9)
        axis.set_yticks([])
        axis.spines["left"].set_visible(False)
        axis.grid(axis="x", linewidth=0.7)
        axis.set_xlim(lowest / 1.2, highest * 1.2)
        axis.set_xticks(
            [each for each in TICKS if lowest / 1.2 <= each <= highest * 1.2]
        )
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
    axes[-1, 0].set_xlabel(
        "milliseconds more than the handler waits:\n"
        "○ half, ◆ 99 %, ■ 99.9 % of the requests were faster"
    )
    _save(figure, path)


# --- what was to be reached -----------------------------------------------------


def targets(results: Dict[str, Any]) -> str:
    """Put the figures beside the limits that the project has set itself."""
    measured: Dict[str, Dict[str, str]] = {}  # of what, and on what
    limits: Dict[str, str] = {}

    def put(
        on: Dict[str, Any],
        what: str,
        limit: float,
        value: float,
        form: str,
        turns: Sequence[float] = (),  # the lowest and the highest
    ) -> None:
        cell = f"{value:{form}}"
        if value > limit:
            cell = f"**{cell}**"
        if turns:
            cell += " ({} to {})".format(*(f"{each:{form}}" for each in turns))
        column = f"{on['aiohttp']}, CPython {on['python']}"
        measured.setdefault(what, {})[column] = cell
        limits[what] = f"{limit:g}"

    for part, where in (("overhead", "no socket"), ("keepalive", "sockets")):
        for each in results.get(part, {}).get("found", ()):
            ways = {(one["kind"], one["way"]): one for one in each["results"]}
            if each.get("objects"):
                for kind in ("failure", "failure with rows"):
                    for way in ("cyclebreak()", "setup()"):
                        value = ways[kind, way]["times bare"]
                        what = f"{kind}, {way}, {where}, a million others: times bare"
                        put(each, what, 1.0, value, ".2f")
                continue
            own = ways["success", "cyclebreak()"]["more_us idle middleware"]
            what = f"success, cyclebreak(), {where}: µs more than idle"
            put(each, what, 1.0, own, "+.1f")
            two = ways.get(("success", "two idle ones"))
            if two is not None:
                both = ways["success", "setup()"]["more_us idle middleware"]
                more = both - two["more_us idle middleware"]
                what = f"success, setup(), {where}: µs more than two idle ones"
                put(each, what, 1.5, more, "+.1f")
            for kind in ("failure", "failure with rows"):
                for way in ("cyclebreak()", "setup()"):
                    if (kind, way) in ways:
                        value = ways[kind, way]["times bare"]
                        what = f"{kind}, {way}, {where}: times bare"
                        put(each, what, 1.08, value, ".2f")
    for name, groups in _by_load(results.get("load", {}).get("found", ())).items():
        if "kept" in name:
            continue  # which is another load than that of the limits
        for group in groups:
            for result in group["results"]:
                if not result["contender"].endswith("setup(app)"):
                    continue
                on = {"aiohttp": result["aiohttp"], "python": group["python"]}
                where = name.replace("_million", ", a million others")
                if "growth_in_flight" in result:
                    value = result["growth_in_flight"]
                    put(on, f"{where}: memory, times in flight", 1.5, value, ".2f")
                else:
                    value, turns = result["cpu_times"], result["cpu_times_range"]
                    put(on, f"{where}: CPU, times bare", 1.0, value, ".2f", turns)
                value = result["full_collections"]
                put(on, f"{where}: full collections", 0, value, ".0f")
                value = result["p99.9_more_ms"]
                turns = result["p99.9_more_ms_range"]
                what = f"{where}: p99.9, ms more than bare"
                put(on, what, 0, value, "+.1f", turns)
    columns = list(dict.fromkeys(key for cells in measured.values() for key in cells))
    rows = [
        [what, limits[what], *(cells.get(column, "") for column in columns)]
        for what, cells in measured.items()
    ]
    return table("", ["", "at most", *columns], rows)


def _by_load(found: Iterable[Dict[str, Any]]) -> Dict[str, List[Dict[str, Any]]]:
    groups: Dict[str, List[Dict[str, Any]]] = {}
    for group in found:
        kept = "_kept" if group["parameters"].get("keep_alive") else ""
        others = "_million" if group["others"] else ""
        groups.setdefault(f"{group['load']}{kept}{others}", []).append(group)
    return groups


def write(results: Dict[str, Any], folder: Path) -> None:
    """Write all tables and charts for which there are figures."""
    for part in results:
        if part != "load":
            (folder / f"{part}_origin.inc").write_text(origin(results[part]))
    found = results.get("load", {}).get("found", ())
    for name, groups in _by_load(found).items():
        (folder / f"{name}.inc").write_text(load_tables(groups))
    for load in {each["load"] for each in found}:
        text = load_origin(results["load"], load)
        (folder / f"{load}_origin.inc").write_text(text)
    loads = _by_load(found)
    for theme in THEMES if found else ():
        groups = loads["uploads"] + loads["uploads_million"]
        memory_chart(groups, theme, folder / f"memory-{theme}.svg")
        latency_chart(loads["requests_million"], theme, folder / f"latency-{theme}.svg")
    for part, title in (
        ("overhead", "Without a socket"),
        ("keepalive", "Kept connections, real sockets"),
    ):
        found = results.get(part, {}).get("found", ())
        for objects, name in ((0, part), (MILLION, f"{part}_million")):
            groups = [g for g in found if g.get("objects", 0) == objects]
            if groups:
                more = ", a million other objects" if objects else ""
                (folder / f"{name}.inc").write_text(ways_table(groups, title + more))
    found = results.get("scale", {}).get("found", ())
    for what in ("connections", "requests"):
        text = "\n".join(scale_table(each, what) for each in found)
        if text:
            (folder / f"scale_{what}.inc").write_text(text)
    (folder / "targets.inc").write_text(targets(results))
