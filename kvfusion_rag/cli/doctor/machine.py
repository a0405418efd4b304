"""Prints the facts about this machine."""

from __future__ import annotations

from ...machine.report import MachineReport
from ..console import say

GIB = 1 << 30


def say_machine(report: MachineReport) -> None:
    """Print one line per fact, and the advice at the end."""
    processor, memory = report.processor, report.memory
    say(f"processor: {processor.name} ({', '.join(processor.instructions) or 'instructions unknown'})")
    limit = "" if processor.limit is None else f", at most {processor.limit:g} in this container"
    say(f"CPUs: {processor.usable} of {processor.cores} usable{limit}; torch has {processor.threads} threads")
    say(
        f"memory: {memory.total / GIB:.1f} GiB"
        + ("" if memory.available is None else f", {memory.available / GIB:.1f} GiB available")
        + ("" if memory.limit is None else f", at most {memory.limit / GIB:.1f} GiB in this container")
    )
    for accelerator in report.accelerators:
        known = ""
        if accelerator.free is not None and accelerator.total is not None:
            known = f", {accelerator.free / GIB:.1f} of {accelerator.total / GIB:.1f} GiB free"
        say(f"accelerator: {accelerator.name}{known}")
    if not report.accelerators:
        say("accelerator: none")
    say("versions: " + ", ".join(f"{name} {version}" for name, version in report.versions.items()))
    installed = [name for name, whole in report.extras.items() if whole]
    absent = [name for name, whole in report.extras.items() if not whole]
    say(f"extras: {', '.join(installed) or 'unknown'}" + (f"; not installed: {', '.join(absent)}" if absent else ""))
    for cache in report.caches:
        say(f"{cache.name}: {cache.size / GIB:.2f} GiB in {cache.path} ({cache.free / GIB:.1f} GiB free)")
    for name, value in report.variables.items():
        say(f"{name}={value}")
    for sentence in report.advice:
        say(f"advice: {sentence}")
