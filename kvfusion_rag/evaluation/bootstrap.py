"""95 % intervals by the bootstrap (Efron 1979): of a mean over rows, and of the paired difference of two systems.

Rows are drawn with replacement; a difference is taken row by row first, so both systems meet the same draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with the borders of its 95 % interval, all in the unit of the values."""

    mean: float
    low: float
    high: float


class Bootstrap:
    """Percentile bootstrap over rows; the same seed and number of rows give the same draws.

    Where all rows have the same value the interval has no width: the rows then tell nothing about their spread.
    """

    def __init__(self, seed: int = 0, resamples: int = RESAMPLES) -> None:
        self._seed = seed
        self._resamples = resamples
        self._draws: dict[int, npt.NDArray[np.float64]] = {}

    def interval(self, values: Sequence[float] | npt.NDArray[np.float64]) -> Interval:
        """Mean of ``values`` (one a row, at least one) with its interval."""
        array = np.asarray(values, dtype=np.float64)
        mean = float(array.mean())
        low, high = np.percentile(self._counts(len(array)) @ array / len(array), [2.5, 97.5])
        return Interval(mean, min(float(low), mean), max(float(high), mean))  # rounding may part equal values

    def difference(
        self, first: Sequence[float] | npt.NDArray[np.float64], second: Sequence[float] | npt.NDArray[np.float64]
    ) -> Interval:
        """Mean of ``first - second`` with its interval; both hold the same rows in the same order."""
        return self.interval(np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64))

    def _counts(self, rows: int) -> npt.NDArray[np.float64]:
        """(resamples, rows): how often each row is in each resample; whole numbers, so that equal rows sum exactly."""
        if rows not in self._draws:
            generator = np.random.default_rng([self._seed, rows])
            drawn = generator.multinomial(rows, np.full(rows, 1 / rows), size=self._resamples)
            self._draws = {
                rows: drawn.astype(np.float64)
            }  # one size at a time: it is the largest array of an evaluation
        return self._draws[rows]
