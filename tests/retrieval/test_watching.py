"""Watched folders: an update for each change, none without one, and a clean end."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import run
from indexes import WordEmbedder, open_index

from kvfusion_rag import KVFusionError, RetrievalError
from kvfusion_rag.retrieval import watch_folder


class Looks(threading.Event):
    """An event whose waits make the next change of the files, and which is set after the last."""

    def __init__(self, *changes: Callable[[], object]) -> None:
        super().__init__()
        self._changes = [change for one in changes for change in (one, lambda: None)]  # seen, and then settled

    def wait(self, timeout: float | None = None) -> bool:
        if self._changes:
            self._changes.pop(0)()
        else:
            self.set()
        return self.is_set()


def watched(
    docs: Path, *changes: Callable[[], object]
) -> tuple[list[tuple[tuple[str, ...], ...]], list[KVFusionError]]:
    """Return what each update did (added, changed, removed), and the errors."""
    done: list[tuple[tuple[str, ...], ...]] = []
    errors: list[KVFusionError] = []
    with open_index() as index:

        def update() -> None:
            report = index.update(docs)
            done.append((report.added, report.changed, report.removed))

        watch_folder([docs], update, Looks(*changes), on_error=errors.append)
    return done, errors


def test_each_change_updates_the_index_once(docs):
    done, errors = watched(
        docs,
        lambda: (docs / "new.csv").write_text("name,age\nAnn,40\n"),
        lambda: None,
        lambda: (docs / "lamps.txt").write_text("The lamps are out."),
        lambda: (docs / "new.csv").unlink(),
    )
    assert done[1:] == [(("new.csv",), (), ()), ((), ("lamps.txt",), ()), ((), (), ("new.csv",))]
    assert errors == []


def test_file_is_read_when_it_is_no_longer_written(docs):
    parts = iter(["a", "ab", "abc"])

    def write() -> None:
        (docs / "new.txt").write_text(next(parts))

    looks = Looks()
    looks._changes = [write, write, write, lambda: None]
    texts: list[str] = []
    watch_folder(
        [docs], lambda: texts.append(" ".join(p.read_text() for p in docs.glob("new*"))), looks, on_error=texts.append
    )
    assert texts == ["", "abc"]


def test_files_that_change_during_an_update_are_updated_again(docs):
    seen: list[int] = []

    def update() -> None:
        seen.append(len(list(docs.iterdir())))
        if len(seen) == 1:
            (docs / "late.txt").write_text("late")

    watch_folder([docs], update, Looks(lambda: None), on_error=seen.append)
    assert seen == [3, 4]


def test_folder_that_is_gone_for_a_while_is_an_error_and_then_updated(docs, tmp_path):
    aside = tmp_path / "aside"
    done, errors = watched(docs, lambda: shutil.move(docs, aside), lambda: shutil.move(aside, docs))
    assert [type(error) for error in errors] == [RetrievalError]
    assert len(done) == 2


def test_first_error_is_raised(tmp_path):
    with pytest.raises(RetrievalError, match="no files to index"):
        watched(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_watches_until_a_signal(capsys, monkeypatch, docs, number):
    class StoppedEmbedder(WordEmbedder):
        """Sends the signal when the changed file is embedded, in the middle of an update."""

        def embed_documents(self, texts):
            if any("harbour" in text for text in texts):
                os.kill(os.getpid(), number)
            else:
                (docs / "new.txt").write_text("The harbour is open.")
            return super().embed_documents(texts)

    monkeypatch.setattr("kvfusion_rag.retrieval.SentenceTransformerEmbedder", lambda name, device: StoppedEmbedder())
    monkeypatch.setattr("kvfusion_rag.cli.index.load_token_counter", lambda args: (lambda text: len(text.split()), 12))
    before = signal.getsignal(number)
    code, out, err = run(capsys, "index", docs, "--watch")
    assert (code, err) == (0, "") and signal.getsignal(number) is before
    assert "watching for changes (stop with Ctrl-C)" in out
    with open_index(docs / ".kvfusion", WordEmbedder()) as index:  # it was closed, and has whole files only
        assert set(index.files()) == {"keepers.md", "lamps.txt", "sea/whales.txt"}


def test_watching_has_no_single_report(capsys, docs):
    code, _, err = run(capsys, "index", docs, "--watch", "--json")
    assert code == 2 and "--watch and --json cannot be combined" in err
