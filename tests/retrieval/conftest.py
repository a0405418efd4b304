"""Fixtures of the retrieval tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """Three files, two of them longer than one chunk."""
    folder = tmp_path / "docs"
    (folder / "sea").mkdir(parents=True)
    sentences = [f"The lamp number {n} was lit by keeper {n} in the winter. " for n in range(12)]
    (folder / "lamps.txt").write_text("".join(sentences[:5]))
    (folder / "keepers.md").write_text("# The keepers\n\n" + "\n\n".join(sentences[5:]))
    (folder / "sea" / "whales.txt").write_text("Martha is a blue whale.")
    return folder
