"""How work grows with size: the ratio of the work for four times the size."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

FACTOR = 4  # quadratic work grows by 16, work in step with the size by 4
LEAST_SECONDS = 0.02


def growth_of_time(run: Callable[[int], object], size: int) -> float:
    """Return the ratio of the processor times for ``FACTOR * size`` and ``size``, each the best of three.

    The size is doubled until a run takes long enough to be measured.
    """
    while True:
        small = _seconds(run, size)
        if small >= LEAST_SECONDS:
            return _seconds(run, FACTOR * size) / small
        size *= 2


def _seconds(run: Callable[[int], object], size: int) -> float:
    times = []
    gc.disable()  # a collection takes as long as all objects of the test run, and only large sizes need one
    try:
        for _ in range(3):
            start = time.process_time()
            run(size)
            times.append(time.process_time() - start)
    finally:
        gc.enable()
    return min(times)
