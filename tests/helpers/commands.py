"""Helpers for tests of the command line: a fake generator, and a function that runs one command."""

from __future__ import annotations

from types import SimpleNamespace

from fakes import RecordingGenerator

from kvfusion_rag import Check, GateReport, InvarianceReport
from kvfusion_rag.cli import main


class CommandGenerator(RecordingGenerator):
    """A fake generator with the attributes that only the commands use."""

    store = None
    settings = SimpleNamespace(passage_length=40)
    gate = GateReport("fake/model", (Check("full attention", True, "2 layers"),))
    report = InvarianceReport("fusion", 3, ("in lima",), 0.0)

    def default_focus(self):
        return None

    def default_mode(self):
        return "concat", "set for this model"

    def check_invariance(self, question, documents, *, permutations, mode, focus):
        self.checked = (question, len(documents), permutations, mode, focus)
        return self.report


def run(capsys, *argv: object) -> tuple[int, str, str]:
    """Run one command and return its exit code, stdout and stderr."""
    code = main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    return code, out, err
