"""The processor, memory and accelerators of this machine, and how much of them this process may use."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16", "asimd", "sve")  # as Linux names them
CONTROL_GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
UNLIMITED_BYTES = 1 << 60  # the first version of control groups writes a number above this one


@dataclass(frozen=True, slots=True)
class Processor:
    """The CPUs.

    Attributes:
        name: product name.
        instructions: those of ``INSTRUCTIONS`` that it has. Empty on systems other than Linux.
        cores: CPUs of the machine.
        usable: CPUs that this process may run on.
        limit: CPUs that a container may use, such as 1.5, or None.
        threads: threads of torch.
    """

    name: str
    instructions: tuple[str, ...]
    cores: int
    usable: int
    limit: float | None
    threads: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Main memory in bytes: all of it, what is available (None if unknown), and the limit of a container or None."""

    total: int
    available: int | None
    limit: int | None


@dataclass(frozen=True, slots=True)
class Accelerator:
    """A GPU with its memory in bytes, which is None if torch does not know it."""

    name: str
    total: int | None
    free: int | None


def processor() -> Processor:
    """Return the facts of the CPUs."""
    import torch

    lines = _lines(Path("/proc/cpuinfo"))
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return Processor(
        name or platform.processor() or platform.machine(),
        tuple(instruction for instruction in INSTRUCTIONS if instruction in flags),
        cores,
        usable,
        cpu_limit(),
        torch.get_num_threads(),
    )


def memory() -> Memory:
    """Return the facts of the main memory."""
    entries = dict(line.split(":", 1) for line in _lines(Path("/proc/meminfo")) if ":" in line)
    sizes = {name: int(text.split()[0]) << 10 for name, text in entries.items() if text.split()}
    total = sizes.get("MemTotal") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Memory(total, sizes.get("MemAvailable"), memory_limit())


def accelerators() -> tuple[Accelerator, ...]:
    """Return the accelerators that torch can use."""
    import torch

    current = torch.accelerator.current_accelerator(check_available=True)
    if current is None:
        return ()
    if current.type != "cuda":
        return (Accelerator(current.type, None, None),)
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append(Accelerator(torch.cuda.get_device_name(index), total, free))
    return tuple(found)


def has_idle_gpu() -> bool:
    """Return whether this machine has an NVIDIA GPU that this build of torch cannot use."""
    import torch

    return Path("/proc/driver/nvidia/version").exists() and torch.version.cuda is None


def cpu_limit(groups: Path = CONTROL_GROUPS, own: Path = OWN_GROUPS) -> float | None:
    """Return the number of CPUs that the control groups of this process allow, or None.

    Args:
        groups, own: where Linux shows them.
    """
    limits = []
    for folder in _folders(groups, own, "cpu"):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if not quota:  # the first version of control groups
            quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(period):
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def memory_limit(groups: Path = CONTROL_GROUPS, own: Path = OWN_GROUPS) -> int | None:
    """Return the bytes of memory that the control groups of this process allow, or None."""
    texts = (
        _text(folder / name)
        for folder in _folders(groups, own, "memory")
        for name in ("memory.max", "memory.limit_in_bytes")
    )
    return min((size for text in texts if text.isdecimal() and (size := int(text)) < UNLIMITED_BYTES), default=None)


def _folders(groups: Path, own: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's groups and of those around them, in both versions of control groups."""
    for line in _lines(own):
        _, names, path = line.split(":", 2)
        root = groups if not names else groups / controller
        if names and controller not in names.split(","):
            continue
        inner = root / path.lstrip("/")
        yield inner
        yield from (folder for folder in inner.parents if folder == root or root in folder.parents)


def _lines(path: Path) -> list[str]:
    return _text(path).splitlines()


def _text(path: Path) -> str:
    """Return the text of a file of the system, or nothing if this system does not have it."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
