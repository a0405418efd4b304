"""Measures the compatibility table and writes it: into the package, and as ``docs/compatibility.md``.

    python -m compatibility_table

Verdicts and reasons are the same on every machine, and a test compares them. Deviations are rounding, so they differ.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from families import FAMILIES, Family
from family_laws import LAWS, SAME_BITS, Subject

from kvfusion_rag import UnsupportedModelError
from kvfusion_rag.model.families.table import FILE, FamilyRow, structure_of, table
from kvfusion_rag.model.support import require_supported

PAGE = Path(__file__).parent.parent.parent / "docs" / "compatibility.md"
FIGURE = re.compile(r" \d[\d.]*e[-+]\d+")

INTRODUCTION = """\
# Compatibility

Each row is a small random model with the structure of a real one: the same layer kinds, windows, position encodings,
norms, soft caps, sinks, experts and latent ranks, and a few hundred thousand weights. It is judged by attention that
the tests write out by hand (`tests/helpers/reference_attention.py`), not by the code under test, over texts that are
longer than its windows. `kvfusion doctor MODEL --config-only` prints the row of any model from its `config.json`.

The figures are the largest relative errors of logits in float32 over one answer. Rounding alone causes up to 2e-06.

| column | law |
| --- | --- |
| fused | an answer over fused documents equals one pass of the model in which documents cannot see each other |
| global | the same with `positions="global"` |
| batch | questions that are answered together get the same answers as on their own |
| concat | mode `concat` answers like `generate` |
| adapter | a LoRA adapter acts on question and answer, and documents are read without it |
| ape | mode `ape` with temperature and scale 1 equals fusion; "no" if the model rejects it |
| attribution | shares of attention and log-probabilities are those of the reference; "no" if the model rejects it |

All accepted families also keep the laws of equal bits: any order of documents, stored and computed KVs, and the base
model with its adapter off.
"""
REFUSED = """
## Refused

The reasons are those of the error messages. Their numbers are those of the small model.

| family | type | layers and positions | example | reason |
| --- | --- | --- | --- | --- |
"""
NOTE = "\nRandom models show whether fusion is exact, not whether answers are good. `make families` measures them.\n"


def verdict(family: Family, folder: Path) -> tuple[Subject | None, str | None]:
    """Return the accepted family's models, or the reason of the refusal.

    Raises:
        Exception: anything but our own error, which is a fault of the package.
    """
    try:
        require_supported(family.config(), family.model_type)
        subject = Subject(family, folder)
        _ = subject.generator
    except UnsupportedModelError as error:
        return None, _reason(str(error))
    return subject, None


def _reason(message: str) -> str:
    """Return what an error says about the family: no model name, no figures, which are rounding, and no advice."""
    name, _, reason = message.removesuffix(".").partition("; use ")[0].partition(": ")
    if name.endswith("failed the support gate"):
        law, _, detail = reason.partition(": ")
        return f"the support gate measures that a law does not hold: {law if FIGURE.search(detail) else reason}"
    return reason if name.endswith("cannot be fused exactly") else message.removesuffix(".")


def measured(family: Family, folder: Path) -> FamilyRow:
    """Return the row of a family, with all laws measured."""
    subject, reason = verdict(family, folder)
    found = {} if subject is None else {name: law(subject) for name, law in LAWS.items()}
    deviations = {name: value if not value else float(f"{value:.0e}") for name, value in found.items()}
    return FamilyRow(
        family.name, family.model_type, family.example, structure_of(family.config()), subject is not None, reason,
        deviations, family.note,
    )  # fmt: skip


def page(rows: Iterable[FamilyRow]) -> str:
    """Return ``docs/compatibility.md``."""
    rows = sorted(rows, key=lambda row: row.family.lower())
    laws = [name for name in LAWS if name not in SAME_BITS]
    lines = [
        INTRODUCTION,
        "## Accepted\n",
        f"| family | type | layers and positions | example | {' | '.join(laws)} | note |",
        f"| --- | --- | --- | --- | {' | '.join('---' for _ in laws)} | --- |",
    ]
    for row in (row for row in rows if row.accepted):
        figures = " | ".join(_figure(row.deviations[name]) for name in laws)
        lines.append(f"| {_start(row)} | {figures} | {row.note} |")
    lines.append(REFUSED.removesuffix("\n"))
    lines += [f"| {_start(row)} | {row.reason} |" for row in rows if not row.accepted]
    return "\n".join([*lines, NOTE])


def _start(row: FamilyRow) -> str:
    return f"{row.family} | `{row.model_type}` | {row.structure} | {row.example}"


def _figure(value: float | None) -> str:
    return "no" if value is None else f"{value:.0e}" if value else "0"


def main() -> None:
    """Measure all families, or those whose names or types are arguments, and write the table."""
    torch.set_num_threads(1)
    logging.getLogger("kvfusion_rag").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    chosen, known = sys.argv[1:], {row.family: row for row in (table() if FILE.exists() else ())}
    rows = []
    for family in FAMILIES:
        if chosen and family.name not in chosen and family.model_type not in chosen and family.name in known:
            rows.append(known[family.name])
            continue
        try:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measured(family, Path(folder)))
        except Exception as error:
            print(f"FAULT {family.name}: {type(error).__name__}: {error}")
            continue
        print(f"{family.name}: {rows[-1].verdict}", flush=True)
    FILE.write_text(json.dumps([row.to_dict() for row in rows], indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
