"""Formats of answers: what is accepted, what is closed, and limits on hostile schemas."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvfusion_rag import AnswerFormat, InvalidInputError
from kvfusion_rag.text.answer_format import MAX_CHOICES, MAX_DEPTH, MAX_FORMAT_CHARACTERS


def schema_of(format: AnswerFormat) -> Any:
    return json.loads(format.text)


def test_objects_that_list_their_properties_are_closed():
    inner = {"type": "object", "properties": {"properties": {"type": "object", "properties": {}}}}
    found = schema_of(AnswerFormat.json_schema({"type": "object", "properties": {"a": inner}, "$defs": {"d": inner}}))
    assert found["additionalProperties"] is False
    closed = {"type": "object", "properties": {}, "additionalProperties": False}
    expected = {"type": "object", "properties": {"properties": closed}, "additionalProperties": False}
    assert found["properties"]["a"] == found["$defs"]["d"] == expected


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {"type": "object", "properties": {}, "additionalProperties": True},
        {"type": "object", "properties": {}, "allOf": [{"properties": {"b": True}}]},
        {"enum": [{"properties": {}}]},
        {"const": {"properties": {}}},
    ],
    ids=str,
)
def test_other_schemas_are_unchanged(schema):
    assert schema_of(AnswerFormat.json_schema(schema)) == schema


def test_equal_formats_are_equal_and_hashable():
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    assert len({AnswerFormat.json_schema(schema), AnswerFormat.json_schema(dict(schema))}) == 1


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


def shared() -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(60):
        schema = {"a": schema, "b": schema}
    return schema


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: AnswerFormat.json_schema([]), r"the JSON schema is \[\], but it must be a dictionary"),
        (lambda: AnswerFormat.json_schema(str), "must be a dictionary or a Pydantic model"),
        (lambda: AnswerFormat.json_schema({"const": {1}}), "is not JSON data"),
        (lambda: AnswerFormat.json_schema({"maximum": float("nan")}), "is not JSON data"),
        (lambda: AnswerFormat.json_schema(nested(MAX_DEPTH + 1)), f"more than {MAX_DEPTH} levels deep"),
        (lambda: AnswerFormat.json_schema(nested(100_000)), f"more than {MAX_DEPTH} levels deep"),
        (lambda: AnswerFormat.json_schema(shared()), "parts on one level"),
        (lambda: AnswerFormat.json_schema({"const": "a" * MAX_FORMAT_CHARACTERS}), "characters, but at most"),
        (lambda: AnswerFormat.regex(""), "the regular expression is ''"),
        (lambda: AnswerFormat.regex("a" * (MAX_FORMAT_CHARACTERS + 1)), "characters, but at most"),
        (lambda: AnswerFormat.choices([]), r"choices is \[\]"),
        (lambda: AnswerFormat.choices("yes"), "choices is 'yes'"),
        (lambda: AnswerFormat.choices(["yes", ""]), "non-empty texts"),
        (lambda: AnswerFormat.choices(["a"] * (MAX_CHOICES + 1)), f"at most {MAX_CHOICES}"),
        (lambda: AnswerFormat.of({"type": "object"}), r"pass a bare schema as AnswerFormat\.json_schema"),
        (lambda: AnswerFormat.of({"type": "json_schema"}), r"no schema at \['json_schema'\]\['schema'\]"),
        (lambda: AnswerFormat.of("json"), "response_format is 'json'"),
    ],
)
def test_wrong_formats_are_rejected_with_a_short_reason(make, reason):
    with pytest.raises(InvalidInputError, match=reason) as raised:
        make()
    assert len(str(raised.value)) < 500 and "\n" not in str(raised.value)


def test_formats_load_no_torch():
    assert AnswerFormat.of({"type": "text"}) is None and AnswerFormat.of(None) is None
    assert AnswerFormat.of({"type": "json_object"}) == AnswerFormat.json_object()
