"""Connects to a Ray cluster, or starts one on this machine."""

from __future__ import annotations

import os
import socket
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from ..errors import ClusterError, InvalidInputError, MissingDependencyError
from .options import AUTO, ClusterOptions

CONNECT_SECONDS = 10.0


def load_ray() -> Any:
    """Return the module ``ray``, with ``ray.data``.

    Raises:
        MissingDependencyError: Ray or a package that Ray Data needs is not installed.
    """
    try:
        import_module("ray.data")
    except ImportError as error:
        raise MissingDependencyError.of_extra("a cluster", error.name or "ray", "ray") from error
    return import_module("ray")


def load_serve() -> Any:
    """Return the module ``ray.serve``.

    Raises:
        MissingDependencyError: Ray or a package that Ray Serve needs is not installed.
    """
    try:
        return import_module("ray.serve")
    except ImportError as error:
        raise MissingDependencyError.of_extra("serving on a cluster", error.name or "ray", "ray") from error


@contextmanager
def connected(options: ClusterOptions) -> Generator[Any, None, None]:
    """Return a context with the module ``ray``, connected to the cluster.

    A connection that this process already has is used and kept. A cluster that starts here has the CPUs of this
    machine, or as many as the workers ask for, and ends with the context.

    Raises:
        MissingDependencyError: Ray is not installed.
        ClusterError: the cluster cannot be reached, or cannot be started.
    """
    ray = load_ray()
    if ray.is_initialized():
        yield ray
        return
    _connect(ray, options)
    try:
        yield ray
    finally:
        ray.shutdown()


def _connect(ray: Any, options: ClusterOptions) -> None:
    quiet = {"log_to_driver": False, "logging_level": "error"}  # stdout belongs to the results
    try:
        if options.address != AUTO:
            host, _, port = options.address.rpartition(":")
            # Ray itself tries for minutes to reach an address where no cluster is.
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        try:
            ray.init(address=options.address, **quiet)
        except ConnectionError:
            if options.address != AUTO:
                raise
            cpus = max(os.cpu_count() or 1, (options.workers or 1) * options.threads)
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    except Exception as error:  # Ray raises many kinds, and plain Exception if a machine is too slow to start it
        cause = " ".join(str(error).split())[:300]
        raise ClusterError(f"the cluster {options.address!r} cannot be used: {cause}") from error


def workers_of(ray: Any, options: ClusterOptions) -> int:
    """Return the number of workers: the given one, or as many as the cluster has CPUs and GPUs for."""
    if options.workers is not None:
        return options.workers
    resources = ray.cluster_resources()
    room = resources.get("CPU", 0) // options.threads
    if options.gpus:
        room = min(room, resources.get("GPU", 0) // options.gpus)
    return max(1, int(room))


def require_shared_store(ray: Any, store: str | None) -> None:
    """Raise InvalidInputError if the store is a folder but the cluster has several machines, which cannot share it."""
    if store is None or "://" in store:
        return
    nodes = sum(node["Alive"] for node in ray.nodes())
    if nodes > 1:
        raise InvalidInputError(
            f"the store is the folder {store!r}, but the cluster has {nodes} machines, which cannot share the index "
            "of a folder; use a URL, such as s3://bucket/kv or file:///mnt/shared/kv."
        )
