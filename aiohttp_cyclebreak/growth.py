"""Does it grow? Numbers that are taken again and again."""

import gc
import sys
from array import array
from collections import Counter
from typing import Dict, Optional

from .left_behind import SHOWN, Watch, collect, counted

__all__ = ("SAMPLES", "Samples")

SAMPLES = 12  # of a soak: three times four


class Samples:
    """Numbers that may grow; what they take themselves does not."""

    def __init__(self, times: int) -> None:
        self._times = times
        self._series: Dict[str, array[int]] = {}
        self._collected = 0

    def take(self, sample: int, watch: Watch) -> None:
        """Note what there is, before and after a collection."""
        import tracemalloc

        from .counts import type_name

        before = len(watch.left())
        collect()
        after = len(watch.left())
        # As many as there were if nothing had been collected since the beginning.
        self._collected += before - after
        self._note(sample, _REQUESTS, self._collected + after)
        # It keeps the names of attributes that str.format() looks up, as aiohttp does
        # for each 500: a cache that fills, to 4096 of them.
        sys._clear_type_cache()  # noqa: SLF001
        self._note(sample, _BYTES, tracemalloc.get_traced_memory()[0])
        kinds = Counter(type_name(type(each)) for each in gc.get_objects())
        for name, number in kinds.items():
            self._note(sample, name, number)

    def _note(self, sample: int, name: str, number: int) -> None:
        if name not in self._series:
            self._series[name] = array("q", bytes(8 * SAMPLES))
        self._series[name][sample] = number

    def report(self) -> Optional[str]:
        growing = {
            name: _slope(series) * SAMPLES / self._times
            for name, series in self._series.items()
            if grows(series)
        }
        if not growing:
            return None
        first = [name for name in (_REQUESTS, _BYTES) if name in growing]
        others = sorted(set(growing) - set(first), key=lambda name: -growing[name])
        lines = [f"growing over {self._times} calls, each time by about"]
        for name in [*first, *others[: 3 * SHOWN]]:
            lines.append(f"    {growing[name]:10.2f} {name}")
        if len(others) > 3 * SHOWN:
            more = counted(len(others) - 3 * SHOWN, "more type")
            lines.append(f"    and objects of {more}")
        return "\n".join(lines)


_REQUESTS = "requests alive, were there no collections"
_BYTES = "bytes, after a collection"


def grows(series: "array[int]") -> bool:
    """Whether it grew throughout, at about one rate.

    A cache that fills grows less and less; what is collected now and then, as the
    timers that asyncio's event loop has cancelled, comes down between the thirds; and
    what is made once, a regular expression for instance, is one or two large steps.
    """
    steps = sorted(right - left for left, right in zip(series, series[1:]))
    if 2 * sum(steps[-2:]) > series[-1] - series[0]:
        return False
    size = len(series) // 3
    thirds = [series[start : start + size] for start in range(0, 3 * size, size)]
    separate = all(max(one) < min(next) for one, next in zip(thirds, thirds[1:]))
    return separate and all(2 * _slope(each) >= _slope(series) for each in thirds)


def _slope(series: "array[int]") -> float:
    """The median of the slopes between any two samples (Theil and Sen)."""
    import statistics

    slopes = [
        (series[right] - series[left]) / (right - left)
        for left in range(len(series))
        for right in range(left + 1, len(series))
    ]
    return statistics.median(slopes)
