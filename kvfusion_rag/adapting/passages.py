"""The user's documents as passages, cut as ``kvfusion index`` cuts them, and the sample that is asked about."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.mining import text_key
from ..data.rows import Passage
from ..errors import InvalidInputError, RetrievalError
from ..retrieval.loaders import SkippedFile, UnreadableFileError, find_files, printable_path, read_document
from ..retrieval.splitting import check_chunk_tokens, split_text

LEAST_PASSAGES = 10  # fewer leave no negatives, or nothing to judge
LEAST_SHARE = 0.25  # of the longest passage: a shorter one, such as a heading, gives nothing to ask about


@dataclass(frozen=True, slots=True)
class PassagePool:
    """All passages of the documents, each once.

    Attributes:
        tokens: of each passage.
        files: number of files read.
    """

    passages: tuple[Passage, ...]
    tokens: tuple[int, ...]
    files: int
    skipped: tuple[SkippedFile, ...]

    @property
    def digest(self) -> str:
        """Hex digest of all titles and texts."""
        lines = "\n".join(json.dumps([passage.title, passage.text]) for passage in self.passages)
        return hashlib.sha256(lines.encode()).hexdigest()

    def sample(self, count: int, seed: int) -> list[int]:
        """Numbers of at most ``count`` passages that are long enough to be asked about, in an order drawn by ``seed``.

        Raises:
            InvalidInputError: there are too few.
        """
        least = LEAST_SHARE * max(self.tokens)
        numbers = [number for number, tokens in enumerate(self.tokens) if tokens >= least]
        if len(numbers) < LEAST_PASSAGES:
            raise InvalidInputError(
                f"the documents have {len(numbers)} passages that can be asked about, but at least {LEAST_PASSAGES} "
                "are needed; name more documents with --docs, or cut smaller passages with --passage-tokens."
            )
        random.Random(seed).shuffle(numbers)
        return numbers[:count]


def read_passages(
    paths: Sequence[str | Path],
    passage_tokens: int,
    count_tokens: Callable[[str], int],
    *,
    exclude: Path | None = None,
) -> PassagePool:
    """Read and cut all documents under ``paths`` but those in the folder ``exclude``.

    Raises:
        RetrievalError: a path does not exist, or no file under them can be read.
        InvalidInputError: no path was named, or ``passage_tokens`` is too small.
    """
    if not paths:
        raise InvalidInputError("no documents were named; name at least one file or folder with --docs.")
    found, skipped = find_files(paths, exclude=exclude)
    check_chunk_tokens(passage_tokens)
    passages: dict[bytes, Passage] = {}
    files = 0
    for path in found:
        try:
            loaded = read_document(path)
        except UnreadableFileError as error:
            skipped.append(SkippedFile(printable_path(path), str(error)))
            continue
        files += 1
        for chunk in split_text(loaded.text, loaded.kind, passage_tokens, count_tokens):
            passages.setdefault(text_key(chunk.text), Passage(chunk.text.strip(), loaded.title))
    if not passages:
        where = ", ".join(repr(printable_path(Path(path))) for path in paths)
        reason = f": {skipped[0].path!r} is left out ({skipped[0].reason})" if skipped else ""
        raise RetrievalError(f"there is no document to read in {where}{reason}.")
    kept = tuple(passages.values())
    return PassagePool(kept, tuple(count_tokens(passage.text) for passage in kept), files, tuple(skipped))
