"""Writes answers as JSON lines or as a Parquet file, which appears complete or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from ..data.rows import open_text
from ..errors import InvalidInputError, MissingDependencyError

PARQUET = ".parquet"
ROWS_PER_GROUP = 1000  # rows per group of a Parquet file

Write = Callable[[Mapping[str, Any]], None]


@contextmanager
def answers_file(path: Path) -> Generator[Write, None, None]:
    """Return a context with the function that writes one answer. Its end renames the file to ``path``.

    Args:
        path: the suffix .parquet is Parquet, and every other is JSON lines, compressed if it ends in .gz.

    Raises:
        MissingDependencyError: the file is Parquet, and pyarrow is not installed.
        InvalidInputError: the file cannot be written.
    """
    part = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        with (_parquet if path.suffix == PARQUET else _json_lines)(part) as write:
            yield write
        part.replace(path)
    except OSError as error:
        raise InvalidInputError(f"{str(path)!r} cannot be written: {error.strerror or error}.") from error
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _json_lines(path: Path) -> Generator[Write, None, None]:
    with open_text(path, "wt") as file:
        yield lambda row: print(json.dumps(row, ensure_ascii=False), file=file)


@contextmanager
def _parquet(path: Path) -> Generator[Write, None, None]:
    pyarrow = load_parquet()
    schema = _schema(pyarrow)
    waiting: list[Mapping[str, Any]] = []
    with ExitStack() as stack:
        writer = stack.enter_context(pyarrow.parquet.ParquetWriter(path, schema))

        def flush() -> None:
            writer.write_table(pyarrow.Table.from_pylist(waiting, schema))
            waiting.clear()

        def write(row: Mapping[str, Any]) -> None:
            waiting.append(row)
            if len(waiting) == ROWS_PER_GROUP:
                flush()

        yield write
        flush()


def load_parquet() -> Any:
    """Return the module ``pyarrow`` with its reader and writer of Parquet.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingDependencyError.of_extra("a Parquet file", "pyarrow", "ray") from error
    return import_module("pyarrow")


def _schema(pyarrow: Any) -> Any:
    """Return the columns of answers, the same for every file."""
    text, count = pyarrow.string(), pyarrow.int64()
    source = pyarrow.struct({"id": text, "title": text, "used": pyarrow.bool_(), "place": text})
    citation = pyarrow.struct({"document_id": text, "start": count, "end": count, "text": text, "place": text})
    texts = ("id", "question", "answer", "text", "reasoning", "mode", "finish_reason")
    lists = {"sources": pyarrow.list_(source), "citations": pyarrow.list_(citation)}
    judged = {"support": pyarrow.float64(), "found": pyarrow.bool_()}
    counts = dict.fromkeys(("prompt_tokens", "completion_tokens"), count)
    return pyarrow.schema({**dict.fromkeys(texts, text), **judged, **lists, **counts, "error": text})
