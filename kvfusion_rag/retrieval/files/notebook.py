"""Reads Jupyter notebooks: texts, code and what the code printed."""

from __future__ import annotations

from typing import Any

from ...text.json_text import parse_json
from .reading import Reading, TextBuilder, UnreadableFileError
from .text import decode, first_heading

MAX_OUTPUT = 2_000  # characters of each cell; longer outputs are logs and tables of numbers


def read_notebook(data: bytes) -> Reading:
    """Return the cells of a notebook, titled by its first heading, and a mark of each cell.

    Raises:
        UnreadableFileError: it is not a notebook.
    """
    decoded = decode(data)
    try:
        content = parse_json(decoded.text)
    except ValueError as error:
        raise UnreadableFileError(f"not a notebook: {error}"[:200]) from error
    builder = TextBuilder()
    title = ""
    cut = 0
    for number, cell in enumerate(_cells(content), start=1):
        source = _joined(cell.get("source", cell.get("input"))).strip()
        is_code = cell.get("cell_type") == "code"
        if not is_code and not title:
            title = first_heading(source)
        output = "\n".join(filter(None, map(_output, _objects(cell.get("outputs"))))).strip() if is_code else ""
        cut += len(output) > MAX_OUTPUT
        blocks = [f"```\n{source}\n```" if is_code else source] if source else []
        blocks += [f"```\n{output[:MAX_OUTPUT]}\n```"] if output else []
        if blocks:
            builder.separate()
            builder.mark("cell", number)
            builder.write("\n\n".join(blocks))
    left_out = (f"outputs beyond {MAX_OUTPUT:,} characters (in {cut:,} cells)",) if cut else ()
    return builder.reading(title, (*decoded.note(), *left_out))


def _cells(content: Any) -> list[dict[str, Any]]:
    """Return the cells of a notebook in the current format, or in one from before 2015."""
    cells = content.get("cells") if isinstance(content, dict) else None
    if cells is None and isinstance(content, dict):
        sheets = _objects(content.get("worksheets"))
        cells = [cell for sheet in sheets for cell in _objects(sheet.get("cells"))] if sheets else None
    if not isinstance(cells, list):
        raise UnreadableFileError("not a notebook: it has no list of cells")
    return _objects(cells)


def _objects(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _joined(value: Any) -> str:
    """Return a text, which may be a list of lines."""
    if isinstance(value, list):
        return "".join(line for line in value if isinstance(line, str))
    return value if isinstance(value, str) else ""


def _output(output: dict[str, Any]) -> str:
    """Return the text that an output shows. Pictures have none."""
    if output.get("output_type") in ("error", "pyerr"):
        return f"{_joined(output.get('ename'))}: {_joined(output.get('evalue'))}"
    data = output.get("data")
    plain = data.get("text/plain") if isinstance(data, dict) else None
    return _joined(output.get("text") if plain is None else plain).rstrip()
