"""Tables and charts out of what was measured: nothing in them is written by hand."""

import csv
import io
from pathlib import Path
from typing import Any, Dict, Iterable, List, Sequence

MILLION = 1_000_000

Row = Sequence[Any]


def table(title: str, head: Row, rows: Iterable[Row], widths: str = "auto") -> str:
    lines = [f".. csv-table:: {title}", f"   :widths: {widths}", "   :header-rows: 1"]
    lines += ["   :class: performance", ""]
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


def load_table(found: List[Dict[str, Any]], title: str) -> str:
    head = ["aiohttp", "CPython"]
    memory = "growth_in_flight" in found[0]["results"][0]
    if memory:
        head += ["memory grows, times what is in flight"]
    head += [
        "CPU a request, µs",
        "times its control",
        "full collections",
        "paused, ms",
        "longest, ms",
        "p50, ms",
        "p99, ms",
        "p99.9, ms",
    ]
    rows = []
    for group in found:
        for result in group["results"]:
            row: List[Any] = [f"``{named(result)}``", group["python"]]
            if memory:
                row.append(f"{result['growth_in_flight']:.1f}")
            row += [f"{result['cpu_us']:.0f}", f"{result['cpu_times']:.2f}"]
            row += [result["full_collections"], f"{result['paused_ms']:.0f}"]
            row += [f"{result['longest_pause_ms']:.0f}"]
            row += [f"{each:.1f}" for each in result["latency_ms"].values()]
            rows.append(row)
    return table(title, head, rows)


# --- one process ----------------------------------------------------------------


def spread(row: Dict[str, Any], key: str, form: str) -> str:
    low, high = row[f"{key} range"]
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
            absolute = row["way"] == "bare"
            cells.append(f"{row['us']:.0f} µs" if absolute else spread(row, key, form))
        name = first["way"]
        rows.append(
            [f"{kind}, {what}", name if name.islower() else f"``{name}``", *cells]
        )
    return table(title, head, rows)


# --- scale ----------------------------------------------------------------------


def scale_table(found: Dict[str, Any], what: str) -> str:
    head = [
        what,
        "success, µs more",
        "times bare",
        "failure, µs more",
        "times bare",
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
                else [f"{cost['more_us']:+.1f}", f"{cost['times']:.2f}"]
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
COLOURED = (
    "text.color",
    "axes.edgecolor",
    "axes.labelcolor",
    "axes.titlecolor",
    "xtick.color",
    "ytick.color",
)
# Of each contender, in order: a colour for either theme, a style, a width.
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
    figure, axes = _figure(theme, 2.6 * len(groups) + 1.6, len(groups))
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
        handles, labels, loc="outside lower left", frameon=False, fontsize=9, ncols=1
    )
    _save(figure, path)


def _heading(group: Dict[str, Any]) -> str:
    others = "a million" if group["others"] == MILLION else "no"
    return f"CPython {group['python']}, {others} other objects"


def latency_chart(groups: List[Dict[str, Any]], theme: str, path: Path) -> None:
    figure, axes = _figure(theme, 3.9 * len(groups) + 0.4, len(groups))
    marks = {"p50": "o", "p99": "D", "p99.9": "s"}
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
        axis.xaxis.set_major_formatter("{x:g}")
    axes[-1, 0].set_xlabel(
        "milliseconds more than the handler waits:\n"
        "○ half, ◆ 99 %, ■ 99.9 % of the requests were faster"
    )
    _save(figure, path)


# --- what was to be reached -----------------------------------------------------


def targets(results: Dict[str, Any]) -> str:
    """Put the figures beside the limits that the project has set itself."""
    rows: List[Row] = []

    def row(what: str, limit: float, value: float, form: str, where: str) -> None:
        met = "yes" if value <= limit else "no"
        rows.append([what, f"{limit:{form}}", f"{value:{form}}", met, where])

    for part, where in (("overhead", "no socket"), ("keepalive", "sockets")):
        for each in results.get(part, {}).get("found", ()):
            ways = {(one["kind"], one["way"]): one for one in each["results"]}
            on = f"{each['aiohttp']}, CPython {each['python']}, {where}"
            millions = each.get("objects") == MILLION
            if not millions:
                own = ways["success", "cyclebreak()"]["more_us idle middleware"]
                row("success, ``cyclebreak()``: µs more than idle", 1.0, own, ".1f", on)
                idle = ways["success", "idle middleware"]["more_us bare"]
                both = ways["success", "setup()"]["more_us idle middleware"]
                limit = 1.5 + idle
                row("success, ``setup()``: µs more than idle", limit, both, ".1f", on)
            for way in ("cyclebreak()", "setup()"):
                value = ways["failure", way]["times bare"]
                what = f"failure, ``{way}``: times bare"
                if millions:
                    what += ", a million other objects"
                row(what, 1.0 if millions else 1.08, value, ".2f", on)
    for group in results.get("load", {}).get("found", ()):
        uploads = group["load"] == "uploads"
        if group["parameters"].get("keep_alive"):
            continue  # which is another load than that of the limit
        for result in group["results"]:
            if "setup" not in result["contender"]:
                continue
            on = f"{result['aiohttp']}, {_heading(group)}, {group['load']}"
            if uploads:
                row(
                    "memory, times in flight",
                    1.5,
                    result["growth_in_flight"],
                    ".2f",
                    on,
                )
            elif group["others"]:
                row("CPU a request, times bare", 1.0, result["cpu_times"], ".2f", on)
            row("full collections", 0, result["full_collections"], ".0f", on)
            more = result["p99.9_more_ms"]
            row("p99.9 latency, ms more than bare", 0.0, more, "+.1f", on)
    return table("", ["", "at most", "measured", "met", "where"], rows)


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
        (folder / f"{part}_origin.inc").write_text(origin(results[part]))
    found = results.get("load", {}).get("found", ())
    for name, groups in _by_load(found).items():
        what = name.replace("_", " ").replace("million", "with a million other objects")
        (folder / f"{name}.inc").write_text(load_table(groups, what.capitalize()))
    loads = _by_load(found)
    for theme in THEMES if found else ():
        memory_chart(loads["uploads"], theme, folder / f"memory-{theme}.svg")
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
