"""95 % bootstrap intervals (Efron 1979) of a mean over questions, and of the paired difference of two systems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import MissingDependencyError

RESAMPLES = 2000
Values = Sequence[float] | npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with the bounds of its 95 % interval, in the unit of the values."""

    mean: float
    low: float
    high: float


class Bootstrap:
    """Percentile bootstrap over questions, drawn by ``seed``.

    If all values are equal, the interval has no width.

    Raises:
        MissingDependencyError: scipy is not installed; raised here, so that a long run does not fail at its end.
    """

    def __init__(self, seed: int = 0, resamples: int = RESAMPLES) -> None:
        try:
            from scipy.stats import bootstrap
        except ImportError as error:
            raise MissingDependencyError.of_extra("an interval", "scipy", "evaluation") from error
        self._bootstrap, self._seed, self._resamples = bootstrap, seed, resamples

    def interval(self, values: Values) -> Interval:
        """Return the mean of ``values``, one per question and at least one, with its interval."""
        array = np.asarray(values, dtype=np.float64)
        if np.ptp(array) == 0:  # the mean of a resample is rounded, so it can differ from equal values
            return Interval(*3 * (float(array[0]),))
        rng = np.random.default_rng([self._seed, len(array)])
        result = self._bootstrap((array,), np.mean, n_resamples=self._resamples, method="percentile", rng=rng)
        return Interval(float(array.mean()), *map(float, result.confidence_interval))

    def difference(self, first: Values, second: Values) -> Interval:
        """Return the mean of ``first - second`` with its interval. Both have the same questions in order."""
        return self.interval(np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64))
