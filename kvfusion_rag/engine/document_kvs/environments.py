"""Whether KVs that other environments have computed agree with this one's.

An environment is whatever changes the rounding of a KV but not its meaning: the processor, its threads, the precision
of matrix products, and the versions of libraries. Exact keys contain it. Portable keys do not: each file names its
environment, and each environment keeps the KV of one probe text in the store. A file is used if the probe of its
environment agrees with the probe computed here, within the tolerance of the model's dtype.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import threading
from collections.abc import Callable, Mapping

import torch

from ...model.kv import DocumentKV
from ...model.tolerance import tolerance_of

logger = logging.getLogger(__name__)

PROBE_TOKENS = 32
PROBE_NAMESPACE = "kvfusion probes"  # of its own, so that it is not removed with a tenant's documents
COMPRESSED_TOLERANCE = 2 / 127  # of codec "v8", whose values may be rounded to the next step


def environment_digest(facts: Mapping[str, object]) -> str:
    """Return 16 hex digits that name an environment."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def probe_ids(vocabulary_size: int) -> tuple[int, ...]:
    """Return the token ids of the probe text, the same in every environment."""
    draw = random.Random(0)
    return tuple(draw.randrange(vocabulary_size) for _ in range(PROBE_TOKENS))


def relative_error(found: DocumentKV, expected: DocumentKV) -> float:
    """Return the largest difference of keys or values in any layer, relative to the largest number in that layer."""
    errors: list[float] = []
    for ours, theirs in ((expected.keys, found.keys), (expected.values, found.values)):
        ours, theirs = ours.float().cpu().flatten(1), theirs.float().cpu().flatten(1)
        scale = ours.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        errors.append(((theirs - ours).abs().amax(dim=1) / scale).max().item())
    return max(errors)


class Environments:
    """The environments that have written to a store, as seen from this one.

    Args:
        own: digest of this environment.
        probe: KV of the probe text, computed here.
        stored_probe: returns the probe of another environment from the store, or None if it is not there.
        is_compressed: whether stored values are rounded to 8 bits.
    """

    def __init__(
        self, own: str, probe: DocumentKV, stored_probe: Callable[[str], DocumentKV | None], *, is_compressed: bool
    ) -> None:
        self.own = own
        self._probe, self._stored_probe = probe, stored_probe
        tolerance = tolerance_of(probe.keys.dtype)
        self._tolerance = max(tolerance, COMPRESSED_TOLERANCE) if is_compressed else tolerance
        self._errors: dict[str, float] = {}  # relative error by digest
        self._lock = threading.Lock()

    def accepts(self, digest: str) -> bool:
        """Return whether KVs of the environment ``digest`` may be used here. Measured once for each."""
        if digest == self.own:
            return True
        with self._lock:
            error = self._errors.get(digest)
            if error is None:
                error = self._measure(digest)
        return error is not None and error <= self._tolerance

    def _measure(self, digest: str) -> float | None:
        probe = self._stored_probe(digest)
        if probe is None:  # evicted, or not uploaded yet, so it is asked for again
            return None
        self._errors[digest] = error = relative_error(probe, self._probe)
        if error <= self._tolerance:
            logger.info("KVs of environment %s agree with this one's: relative error %.1e", digest, error)
        else:
            logger.warning(
                "KVs of environment %s differ from this one's by %.1e, but at most %.1e is rounding; its documents "
                "are computed again",
                digest, error, self._tolerance,
            )  # fmt: skip
        return error
