"""Owns how sure a figure of a sample is: 95 % intervals, by Wilson and by bootstrap. Knows no metric.

N rows, K statistics of a row, B resamples.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

RESAMPLES: Final = 1000
CONFIDENCE: Final = 0.95

_Z: Final = 1.959964  # of the standard normal, two-sided at 0.95
_TAIL_PERCENT: Final = 100 * (1 - CONFIDENCE) / 2
_CHUNK: Final = 100  # resamples at a time: their counts are B × N


@dataclass(frozen=True, slots=True)
class Interval:
    """From `low` to `high`; NaN where no resample had anything to measure."""

    low: float
    high: float


def wilson(hits: float, total: float) -> Interval:
    """Of a rate.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927. Unlike
    a bootstrap it is honest about 0 of 10 and 10 of 10.
    """
    rate, z2 = hits / total, _Z**2
    centre = (rate + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z / (1 + z2 / total) * math.sqrt(rate * (1 - rate) / total + z2 / (4 * total**2))
    return Interval(
        max(0.0, centre - half) if hits else 0.0, min(1.0, centre + half) if hits < total else 1.0
    )


def percentiles(values_B: Array) -> Interval:
    """The middle 95 % of what the resamples gave."""
    known_B = values_B[np.isfinite(values_B)]
    if not known_B.size:
        return Interval(math.nan, math.nan)
    low, high = np.percentile(known_B, [_TAIL_PERCENT, 100 - _TAIL_PERCENT])
    return Interval(float(low), float(high))


class Resampling:
    """The same random selections of rows, with replacement, for whatever is measured: so pairs stay pairs."""

    def __init__(self, rows: int, seed: int = 0) -> None:
        self._rows, self._seed = rows, seed

    def sums(self, stats_NK: NDArray[Any]) -> Array:
        """[B, K]: the statistics of each selection, summed."""
        return np.concatenate([counts_BN @ stats_NK for counts_BN in self._counts()])

    def _counts(self) -> Iterator[Array]:
        random = np.random.default_rng(self._seed)
        shares_N = np.full(self._rows, 1 / self._rows)
        for _ in range(RESAMPLES // _CHUNK):
            yield random.multinomial(self._rows, shares_N, size=_CHUNK).astype(np.float64)
