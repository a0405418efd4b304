"""The options of commands that can work on a Ray cluster."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING

from ...errors import InvalidInputError
from .values import number, positive, ray_address, replicas

if TYPE_CHECKING:
    from ...cluster import ClusterOptions


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the Ray cluster and the size of its workers."""
    _add_cluster(parser, "worker", "this process works")
    parser.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        help="workers on the cluster, each with its own model (default: as many as it has CPUs or GPUs for)",
    )


def add_replica_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the Ray cluster of a server, and the number and size of its replicas."""
    _add_cluster(parser, "replica", "this process answers")
    parser.add_argument(
        "--replicas",
        type=replicas,
        metavar="N",
        help="replicas on the cluster, each with its own model: a number, or LEAST:MOST such as 1:8, to start more "
        "while requests wait (default: as many as the cluster has CPUs or GPUs for)",
    )


def _add_cluster(parser: argparse.ArgumentParser, worker: str, otherwise: str) -> None:
    parser.add_argument(
        "--ray",
        type=ray_address,
        metavar="ADDRESS",
        help="Ray cluster that does the work: HOST:PORT, or auto for this machine's cluster, which is started if "
        f"there is none (default: {otherwise})",
    )
    parser.add_argument(
        "--worker-gpus", type=number(0, 64), metavar="X", help=f"GPUs of each {worker}, such as 1 or 0.5 (default: 0)"
    )


def cluster_of(args: argparse.Namespace) -> ClusterOptions | None:
    """Return the cluster in ``--ray``, or None. Reject the options of its workers without it."""
    names = {"workers": "workers", "threads": "threads", "worker_gpus": "gpus"}
    given = {field: value for name, field in names.items() if (value := getattr(args, name, None)) is not None}
    if args.ray is None:
        for name in ("workers", "worker_gpus", "replicas"):
            if getattr(args, name, None) is not None:
                raise InvalidInputError(f"--{name.replace('_', '-')} is given without --ray; pass --ray auto too.")
        return None
    from ...cluster import ClusterOptions
    from ...cluster.connection import load_ray

    load_ray()  # first, so that a missing package is reported before the work
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its import has set another level; restored by the command
    return ClusterOptions(args.ray, **given)
