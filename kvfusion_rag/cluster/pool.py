"""Runs batches on the workers of a cluster, or in this process, and returns the results in order.

Ray Data gives the batches to a pool of actors. It restarts an actor that died, and repeats its unfinished batches.
Batches and results travel as JSON, because columns of Arrow cannot hold rows with different fields.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from ..errors import ClusterError, KVFusionError
from .connection import connected, require_shared_store, workers_of
from .options import ClusterOptions
from .spec import WorkerCache

MAX_BLOCKS = 1000  # per dataset; a worker that dies repeats at most one block for each of its tasks

T = TypeVar("T")
R = TypeVar("R")


class Work(Protocol):
    """The work of one process, with its model."""

    def __call__(self, batch: list[Any]) -> list[Any]:
        """Return one result per item of a batch of plain data."""
        ...

    def close(self) -> None:
        """Finish uploads to the store, and release its files."""
        ...


class Task(Protocol):
    """Plain data that says what a worker does with a batch."""

    @property
    def store(self) -> str | None:
        """Folder or URL of the store that the work uses."""
        ...

    def start(self, cache: Path | None) -> Work:
        """Load the model. ``cache`` is the folder of its local disk tier, if it is not the usual one."""
        ...


def run_batches(task: Task, items: Sequence[Any], size: int, cluster: ClusterOptions | None) -> Iterator[Any]:
    """Yield one result per item, in order.

    Args:
        task: what to do with a batch.
        items: plain data, as JSON knows it.
        size: items per batch. Batches do not depend on the workers, so results do not either.
        cluster: where to work; None is this process.

    Raises:
        ClusterError: the cluster or a worker cannot be used.
        InvalidInputError: the store is a folder, which only one machine can use, but the cluster has several.
    """
    batches = [list(items[start : start + size]) for start in range(0, len(items), size)]
    if cluster is None:
        with closing(task.start(None)) as work:
            for batch in batches:
                yield from work(batch)
    elif batches:
        yield from _run_on_cluster(task, batches, cluster)


def _run_on_cluster(task: Task, batches: list[list[Any]], cluster: ClusterOptions) -> Iterator[Any]:
    with connected(cluster) as ray:
        require_shared_store(ray, task.store)
        rows = [{"batch": json.dumps(batch)} for batch in batches]
        dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS)).map(
            _Worker,
            fn_constructor_args=(task, cluster.threads),
            compute=ray.data.ActorPoolStrategy(size=min(len(rows), workers_of(ray, cluster))),
            num_cpus=cluster.threads,
            num_gpus=cluster.gpus,
        )
        dataset.context.enable_progress_bars = False
        dataset.context.execution_options.preserve_order = True
        try:
            for row in dataset.iter_rows():
                if row["failure"]:
                    raise ClusterError(f"a worker could not start: {row['failure']}")
                yield from json.loads(row["results"])
        except ray.exceptions.RayError as error:
            # The worker's own error comes first, and Ray's errors about it come later.
            first = re.search(r"^[\w.]+: .+", str(error), re.MULTILINE)
            cause = " ".join((first[0] if first else str(error)).split())[:500]
            raise ClusterError(f"the work on the cluster failed: {cause}") from error


class _Worker:
    """The actor: one model, which processes one batch after another."""

    def __init__(self, task: Task, threads: int) -> None:
        torch.set_num_threads(threads)
        store, self._failure = task.store, ""
        self._cache = WorkerCache(store) if store is not None and "://" in store else None  # locked until the end
        try:
            self._work = task.start(self._cache.folder if self._cache else None)
        except KVFusionError as error:  # a new actor would fail too, so Ray must not keep starting them
            self._failure = str(error)

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        results = [] if self._failure else self._work(json.loads(row["batch"]))
        return {"results": json.dumps(results), "failure": self._failure}


def apart(work: Callable[[list[T]], list[R]], items: list[T], failed: Callable[[T, KVFusionError], R]) -> list[R]:
    """Return the results of ``work`` for all items. If one is invalid, the others still have a result.

    Args:
        work: returns one result per item, or raises an error if an item is invalid.
        failed: returns the result of an item that is invalid even without the others.
    """
    try:
        return work(items)
    except KVFusionError as error:
        if len(items) == 1:
            return [failed(items[0], error)]
    half = len(items) // 2
    return [*apart(work, items[:half], failed), *apart(work, items[half:], failed)]
