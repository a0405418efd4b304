"""Which cluster does the work, and how its workers are sized."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from ..errors import InvalidInputError

AUTO = "auto"
MAX_REPLICAS = 10_000
_REPLICAS = re.compile(r"\d{1,9}(:\d{1,9})?", re.ASCII)
_ADDRESS = re.compile(r"[\w.-]+:\d{1,5}|\[[\da-fA-F:]+\]:\d{1,5}", re.ASCII)


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """A Ray cluster and its workers, which are processes with a model each.

    Attributes:
        address: HOST:PORT of the cluster. "auto" is the cluster of this machine, or a new one that ends with the work.
        workers: number of workers. Default: as many as the cluster has CPUs (or GPUs) for.
        threads: torch threads of each worker, which takes as many CPUs.
        gpus: GPUs of each worker. A fraction lets workers share one.

    Raises:
        InvalidInputError: a value is not allowed.
    """

    address: str = AUTO
    workers: int | None = None
    threads: int = 1
    gpus: float = 0.0

    def __post_init__(self) -> None:
        require_address(self.address)
        for name, number in (("workers", self.workers), ("threads", self.threads)):
            if number is not None and number < 1:
                raise InvalidInputError(f"{name} is {number}, but it must be at least 1.")
        if not 0 <= self.gpus < float("inf"):
            raise InvalidInputError(f"gpus is {self.gpus}, but it must be a number from 0.")


@dataclass(frozen=True, slots=True)
class Replicas:
    """How many replicas serve.

    Attributes:
        least: number that always runs.
        most: number that Ray Serve may start while requests wait. It stops them again when they are idle.

    Raises:
        InvalidInputError: a number is not allowed.
    """

    least: int
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most <= MAX_REPLICAS:
            raise InvalidInputError(
                f"replicas are {self.least}:{self.most}, but they must be LEAST:MOST from 1 to {MAX_REPLICAS:,}."
            )

    @classmethod
    def read(cls, text: str) -> Self:
        """Return the replicas of a text such as "2" or "1:8".

        Raises:
            InvalidInputError: the text has another form, or a number is not allowed.
        """
        if not _REPLICAS.fullmatch(text):
            raise InvalidInputError(
                f"replicas are {text!r:.100}, but they must be a number or LEAST:MOST, such as 1:8."
            )
        least, _, most = text.partition(":")
        return cls(int(least), int(most or least))


def require_address(address: str) -> None:
    """Raise InvalidInputError if ``address`` cannot be that of a cluster."""
    if address != AUTO and not _ADDRESS.fullmatch(address):
        raise InvalidInputError(
            f"the cluster's address is {address!r:.100}, but it must be auto or HOST:PORT, such as 10.0.0.1:6379."
        )
