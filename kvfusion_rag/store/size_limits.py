"""Limits of the tiers in bytes, and totals by namespace."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import InvalidInputError


@dataclass(frozen=True, slots=True)
class Caps:
    """Limits of a tier in bytes.

    Attributes:
        max_bytes: limit on all documents together.
        namespace_bytes: limit on each namespace, or None if only ``max_bytes`` applies. With this limit, a full tier
            evicts documents of the writer's own namespace first, and those of others only if none is left.

    Raises:
        InvalidInputError: a limit is not a whole number from 1.
    """

    max_bytes: int
    namespace_bytes: int | None = None

    def __post_init__(self) -> None:
        require_bytes("max_bytes", self.max_bytes)
        if self.namespace_bytes is not None:
            require_bytes("namespace_bytes", self.namespace_bytes)

    @property
    def largest(self) -> int:
        """Bytes that documents of one namespace may take."""
        return self.max_bytes if self.namespace_bytes is None else min(self.namespace_bytes, self.max_bytes)


def require_bytes(name: str, value: object) -> None:
    """Raise InvalidInputError if ``value`` is not a whole number from 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidInputError(f"{name} is {value!r}, but it must be a whole number of bytes from 1.")


def add_up(sizes: Iterable[tuple[str, int]]) -> dict[str, tuple[int, int]]:
    """Return bytes and number of documents by namespace, from the namespace and size of each document."""
    totals: dict[str, tuple[int, int]] = {}
    for namespace, size in sizes:
        total, count = totals.get(namespace, (0, 0))
        totals[namespace] = (total + size, count + 1)
    return totals
