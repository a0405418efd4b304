"""Checks the processes of one training run: they are connected and agree, and no other run uses the folder."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from filelock import FileLock, Timeout

from ..errors import InvalidInputError

LOCK = "training.lock"  # stays in the folder, because removing a lock file lets two processes lock two files
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # set by torchrun and by MPI
_SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")


def connect(device: torch.device, *, shard_weights: bool = False) -> PartialState:
    """Connect this process with the others of its launch, if there are any.

    Args:
        device: where to train. Processes with a GPU each get one of their machine's.
        shard_weights: whether the base weights will be split between the processes.

    Raises:
        InvalidInputError: the launch asks for several processes but does not connect them, or asks for another
            library's shards. Or ``shard_weights`` is true for one process alone, or differs between processes.
    """
    require_own_shards(os.environ)
    processes = PartialState(cpu=device.type == "cpu")
    require_connected(processes.num_processes, os.environ)
    if shard_weights and processes.num_processes == 1:
        raise InvalidInputError(
            "shard_weights is true, but there is only this process to keep the weights; launch several with torchrun, "
            "or train without shard_weights."
        )
    require_agreement(processes, {"shard_weights": shard_weights})
    return processes


def require_connected(connected: int, environment: Mapping[str, str]) -> None:
    """Raise InvalidInputError if the environment announces other processes, but this one is not connected to any.

    Every such process would train a whole model of its own.

    Args:
        connected: number of connected processes, including this one.
        environment: environment variables.
    """
    if connected > 1:
        return
    size = next((name for name in _SIZES if name in environment), None)
    if size is None and "MASTER_ADDR" in environment:  # all that accelerate sets for processes on CPU
        raise InvalidInputError(
            f"MASTER_ADDR is {environment['MASTER_ADDR']!r} but WORLD_SIZE is not set, so this process would not be "
            "connected to the others, as with 'accelerate launch --cpu'; launch it with torchrun, or unset "
            "MASTER_ADDR to train in one process."
        )
    if size is not None and environment[size] != "1":
        raise InvalidInputError(
            f"{size} is {environment[size]!r}, but this process is not connected to any other; launch it with "
            f"torchrun, or unset {size} to train in one process."
        )


def require_own_shards(environment: Mapping[str, str]) -> None:
    """Raise InvalidInputError if the launch asks another library to split the model."""
    name = next((name for name in _SHARDING if environment.get(name, "false").lower() == "true"), None)
    if name is not None:
        raise InvalidInputError(
            f"{name} is {environment[name]!r}, but only shard_weights (--shard-weights) can split the model here; "
            "launch it without FSDP, DeepSpeed and Megatron, for example with torchrun."
        )


def require_agreement(processes: PartialState, facts: Mapping[str, Any]) -> None:
    """Raise InvalidInputError on every process if one has other ``facts`` (plain data by name) than the first."""
    if processes.num_processes == 1:
        return
    gathered: Sequence[Mapping[str, Any]] = gather_object([dict(facts)])
    for number, other in enumerate(gathered):
        for name, value in gathered[0].items():
            if other[name] != value:
                raise InvalidInputError(
                    f"{name} is {other[name]!r} in process {number}, but {value!r} in process 0; start all processes "
                    "with the same rows, model and options, and with an output folder that all machines share."
                )


@contextmanager
def sole_run(folder: Path) -> Generator[None, None, None]:
    """Keep other training runs out of an output folder, which must exist.

    Raises:
        InvalidInputError: another run has the folder, or it cannot be locked.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InvalidInputError(
            f"{str(folder)!r} is in use by another training run; wait until it ends, or name another folder."
        ) from error
    except (OSError, NotImplementedError) as error:
        raise InvalidInputError(f"{str(folder)!r} cannot be locked: {error}; name another folder.") from error
    try:
        yield
    finally:
        lock.release()
