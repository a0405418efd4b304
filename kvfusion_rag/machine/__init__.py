"""Facts about this machine that decide how fast a model runs, and advice. No model is loaded."""

from .report import MachineReport, inspect_machine

__all__ = ["MachineReport", "inspect_machine"]
