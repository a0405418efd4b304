"""Options made from the fields of a dataclass, with its docstring as their help."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterable, Mapping
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .values import count, number, plain_text, positive


def add_fields(
    parser: argparse.ArgumentParser, kind: type, names: Iterable[str], defaults: Mapping[str, object]
) -> None:
    """Add an option for each field in ``names`` of a dataclass.

    Args:
        defaults: instances by the preset that they belong to; the first is that without a preset.
    """
    docs, hints = attribute_docs(kind), get_type_hints(kind)
    for name in names:
        values = [(preset, _shown(getattr(instance, name))) for preset, instance in defaults.items()]
        (_, default), *others = values
        default += "".join(f"; preset {preset}: {value}" for preset, value in others if value != default)
        text = f"{docs[name]} (default: {default})".replace("%", "%%")
        parser.add_argument(f"--{name.replace('_', '-')}", help=text, **_reader(name, hints[name]))


def attribute_docs(kind: type) -> dict[str, str]:
    """Return the text of each attribute in the docstring of ``kind``, without its full stop."""
    found = re.findall(r"^    (\w+(?:, \w+)*): (.+(?:\n {8}.+)*)", inspect.getdoc(kind) or "", re.MULTILINE)
    texts = [
        (names.split(", "), " ".join(text.replace("``", "").split()).removeprefix("whether to ").rstrip("."))
        for names, text in found
    ]
    return {name: text for names, text in texts for name in names}


def _reader(name: str, hint: Any) -> dict[str, Any]:
    """Return the arguments of ``add_argument`` that read a value of this type."""
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not NoneType]
    if get_origin(hint) is Literal:
        return {"choices": list(kinds)}
    if get_origin(kinds[0]) is Literal:
        return {"choices": list(get_args(kinds[0]))}
    if kinds[0] is bool:
        return {"action": "store_true", "default": None}
    if kinds[0] is str:
        return {"nargs": "+", "type": plain_text, "metavar": "NAME"}
    if kinds[0] is float:
        return {"type": number(0), "metavar": "X"}
    return {"type": count if name == "seed" else positive, "metavar": "N"}


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(value)
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
