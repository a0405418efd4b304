"""What an answer must look like: JSON by a schema, a regular expression, or one of several texts.

A format is plain data, checked in size and depth. ``fusion/constraints.py`` compiles it for one tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from ..errors import InvalidInputError
from .json_text import is_a, is_list, is_mapping, is_sequence

FormatKind = Literal["json_schema", "regex", "choices", "grammar"]

MAX_FORMAT_CHARACTERS = 1 << 18  # of a schema as JSON, a pattern, or all choices
MAX_DEPTH = 64  # objects and lists inside each other in a schema
MAX_CHOICES = 10_000

# llguidance's options of a schema. White space is fixed: a model that may choose it can write blanks until its limit.
FIXED_SPACE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_OPENAI_FORMATS = "'text', 'json_object' and 'json_schema'"
# With these, the properties of an object may be listed elsewhere.
_COMPOSED = frozenset(
    {"additionalProperties", "unevaluatedProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref"}
)
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # schemas by name
_DATA = ("enum", "const", "default", "examples")  # values, not schemas


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """What the text of an answer must match. Create one with the class methods; they raise InvalidInputError.

    Attributes:
        kind: how ``text`` is read. Grammars are written by this package.
        text: the schema as JSON, the pattern, the list of choices as JSON, or a grammar.
    """

    kind: FormatKind
    text: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | type) -> AnswerFormat:
        """Return the format of JSON by a schema, or by a Pydantic model.

        An object with ``properties`` gets no other ones unless the schema says so (``additionalProperties``, or a
        combination of schemas). Properties are written in the order of the schema.
        """
        if isinstance(schema, type) and hasattr(schema, "model_json_schema"):
            schema = cast(Any, schema).model_json_schema()
        if not is_mapping(schema):
            raise InvalidInputError(
                f"the JSON schema is {_shown(schema)}, but it must be a dictionary or a Pydantic model."
            )
        require_depth(schema, "the JSON schema")
        closed = dict(schema) if _combines(schema) else _closed(schema)
        return cls("json_schema", _checked(as_json(closed, "the JSON schema"), "the JSON schema"))

    @classmethod
    def json_object(cls) -> AnswerFormat:
        """Return the format of any JSON object."""
        return cls("json_schema", '{"type": "object"}')

    @classmethod
    def regex(cls, pattern: str) -> AnswerFormat:
        """Return the format of texts that match a regular expression from start to end, in the syntax of Rust."""
        if not is_a(pattern, str) or not pattern:
            raise InvalidInputError(f"the regular expression is {_shown(pattern)}, but it must be a text.")
        return cls("regex", _checked(pattern, "the regular expression"))

    @classmethod
    def choices(cls, choices: Sequence[str]) -> AnswerFormat:
        """Return the format of exactly one of these texts."""
        is_several = is_sequence(choices) and not isinstance(choices, str)
        if not is_several or not choices or not all(is_a(choice, str) and choice for choice in choices):
            raise InvalidInputError(f"choices is {_shown(choices)}, but it must be a list of non-empty texts.")
        if len(choices) > MAX_CHOICES:
            raise InvalidInputError(f"there are {len(choices)} choices, but at most {MAX_CHOICES} are allowed.")
        return cls("choices", _checked(as_json(list(dict.fromkeys(choices)), "it"), "the list of choices"))

    @classmethod
    def of(cls, given: ResponseFormat | None) -> AnswerFormat | None:
        """Return the format that a caller means, or None for any text.

        Args:
            given: a format, a Pydantic model, or OpenAI's ``{"type": "json_schema", "json_schema": {...}}``.
        """
        if given is None or isinstance(given, AnswerFormat):
            return given
        if isinstance(given, type):
            return cls.json_schema(given)
        kind = given.get("type") if is_mapping(given) else None
        if kind == "text":
            return None
        if kind == "json_object":
            return cls.json_object()
        if kind == "json_schema":
            inner = given.get("json_schema")
            if is_mapping(inner) and is_mapping(inner.get("schema")):
                return cls.json_schema(inner["schema"])
            raise InvalidInputError(
                "response_format has no schema at ['json_schema']['schema'], where its type 'json_schema' needs one."
            )
        raise InvalidInputError(
            f"response_format is {_shown(given)}, but it must be an AnswerFormat, a Pydantic model, or a dictionary "
            f"with one of the types {_OPENAI_FORMATS}; pass a bare schema as AnswerFormat.json_schema(schema)."
        )


ResponseFormat = AnswerFormat | Mapping[str, Any] | type


def as_json(value: object, what: str) -> str:
    """Return ``value`` as JSON, or raise InvalidInputError if it is not JSON data."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"{what} is not JSON data: {error}.") from error


def with_fixed_space(schema: str) -> str:
    """Return a schema (JSON) that tells llguidance to allow no other white space than ``FIXED_SPACE``."""
    return json.dumps({**json.loads(schema), "x-guidance": FIXED_SPACE}, ensure_ascii=False)


def require_depth(value: object, what: str) -> None:
    """Reject objects and lists that are nested too deeply. Time grows in step with the size."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [part for whole in level for part in _parts(whole)]
        if not level:
            return
        if len(level) > MAX_FORMAT_CHARACTERS:
            raise InvalidInputError(f"{what} has more than {MAX_FORMAT_CHARACTERS} parts on one level, the limit.")
    raise InvalidInputError(f"{what} is nested more than {MAX_DEPTH} levels deep, the limit.")


def _parts(value: object) -> list[Any]:
    if is_mapping(value):
        return list(value.values())
    return value if is_list(value) else []


def _combines(schema: object) -> bool:
    """Whether a schema contains ``allOf``, which a closed object could make unsatisfiable."""
    return (is_mapping(schema) and "allOf" in schema) or any(_combines(part) for part in _parts(schema))


def _closed(schema: object) -> Any:
    """Return a schema in which objects that list their properties allow no others."""
    if is_list(schema):
        return [_closed(part) for part in schema]
    if not is_mapping(schema):
        return schema
    inner = {name: _closed_part(name, part) for name, part in schema.items()}
    if is_mapping(schema.get("properties")) and not _COMPOSED & schema.keys():
        inner["additionalProperties"] = False
    return inner


def _closed_part(name: str, part: Any) -> Any:
    if name in _DATA:
        return part
    if name in _NAMED and is_mapping(part):
        return {key: _closed(value) for key, value in part.items()}
    return _closed(part)


def _checked(text: str, what: str) -> str:
    """Return a text that is not too long, in which lone surrogates are U+FFFD."""
    text = _LONE_SURROGATE.sub("\ufffd", text)
    if len(text) > MAX_FORMAT_CHARACTERS:
        raise InvalidInputError(
            f"{what} has {len(text)} characters, but at most {MAX_FORMAT_CHARACTERS} are allowed; shorten it."
        )
    return text


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
