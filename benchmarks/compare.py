"""Comparing ways measured by turns: each value with that of the same round."""

import statistics
from typing import Any, Dict, List

Taken = Dict[str, Dict[str, List[float]]]  # of a kind and a way, seconds a request

CONTROLS = ("bare", "idle middleware")


def beside(values: List[float], control: List[float]) -> Dict[str, float]:
    """Compare a way with a control."""
    return {
        "us": 1e6 * statistics.median(values),
        "more_us": 1e6 * statistics.median(a - b for a, b in zip(values, control)),
        "times": statistics.median(a / b for a, b in zip(values, control)),
    }


def compared(runs: List[Taken]) -> List[Dict[str, Any]]:
    """Compare every way with both controls, in each process and over all of them.

    Returns:
        A row for each kind and way: medians over the processes, and their ranges.
    """
    rows = []
    for kind in runs[0]:
        for way in runs[0][kind]:
            row: Dict[str, Any] = {"kind": kind, "way": way}
            for control in CONTROLS:
                each = [beside(run[kind][way], run[kind][control]) for run in runs]
                for what in each[0]:
                    values = [one[what] for one in each]
                    key = "us" if what == "us" else f"{what} {control}"
                    row[key] = statistics.median(values)
                    row[f"{key} range"] = [min(values), max(values)]
            rows.append(row)
    return rows


def lines(rows: List[Dict[str, Any]]) -> List[str]:
    """Show rows as text."""
    return [
        f"{row['kind']:8} {row['way']:16} {row['us']:7.1f}"
        f"  {row['more_us idle middleware']:+6.2f}  {row['times bare']:5.3f}"
        for row in rows
    ]
