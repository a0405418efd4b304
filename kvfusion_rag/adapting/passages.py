"""Cuts the user's documents into passages like ``kvfusion index``, and samples those to ask about."""

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

LEAST_PASSAGES = 10  # with fewer, negatives or judged questions are missing
LEAST_SHARE = 0.25  # of the longest passage; shorter ones, such as headings, contain too little to ask about


@dataclass(frozen=True, slots=True)
class PassagePool:
    """All distinct passages of the documents.

    Attributes:
        tokens: number of tokens of each passage.
        files: number of files read.
        skipped: files that could not be read.
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
        """Return the numbers of up to ``count`` passages that are long enough to ask about, in random order.

        Raises:
            InvalidInputError: there are fewer than ``LEAST_PASSAGES``.
        """
        least = LEAST_SHARE * max(self.tokens)
        numbers = [number for number, tokens in enumerate(self.tokens) if tokens >= least]
        if len(numbers) < LEAST_PASSAGES:
            raise InvalidInputError(
                f"the documents have {len(numbers)} passages to ask about, but at least {LEAST_PASSAGES} are needed; "
                "name more documents with --docs, or cut smaller passages with --passage-tokens."
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
    """Read and cut all documents under ``paths`` except those in the folder ``exclude``.

    Raises:
        RetrievalError: a path does not exist, or no file can be read.
        InvalidInputError: there are no paths, or ``passage_tokens`` is too small.
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
        reason = f": {skipped[0].path!r} was skipped ({skipped[0].reason})" if skipped else ""
        raise RetrievalError(f"there is no document to read in {where}{reason}.")
    distinct = tuple(passages.values())
    return PassagePool(distinct, tuple(count_tokens(passage.text) for passage in distinct), files, tuple(skipped))
