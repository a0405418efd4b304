"""Answers in a format: always valid or cut at the limit, equal in batches and streams, in every mode."""

from __future__ import annotations

import json
import re
import sys
from functools import cache
from typing import Any

import pytest

pytest.importorskip("llguidance")
pytest.importorskip("jsonschema")

import jsonschema
import tiny
from schemas import random_schema
from thinkers import CHANNELS, OPENED, TAGGED, loaded, random_model, thinker

from kvfusion_rag import AnswerFormat, InvalidInputError, KVFusionGenerator, MemoryStore, MissingDependencyError
from kvfusion_rag.fusion.constraints import CACHED, ConstraintCompiler

QUESTION = "who built it?"
DOCUMENTS = ["the river runs past an old mill.", "in 1874 Amara Osei built a lighthouse."]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "year": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["name", "year"],
}
FORMATS = [
    AnswerFormat.json_schema(PERSON),
    None,
    AnswerFormat.regex(r" [a-f]{2,4}-[0-9]{3}\n"),
    AnswerFormat.choices(["Amara Osei", "Amara", "nobody", "東京"]),
]
MATCHES = [
    lambda text: jsonschema.validate(json.loads(text), PERSON) is None,
    lambda text: True,
    lambda text: re.fullmatch(r" [a-f]{2,4}-[0-9]{3}\n", text),
    lambda text: text in ("Amara Osei", "Amara", "nobody", "東京"),
]


@cache
def generator() -> KVFusionGenerator:
    return tiny.generator(max_new_tokens=80)


@pytest.mark.parametrize("first", range(0, 200, 25))
def test_answers_match_random_schemas_or_are_cut_at_the_limit(first):
    schemas = [random_schema(seed) for seed in range(first, first + 25)]
    answers = generator().answer_batch(
        [f"{number}?" for number in range(25)],
        [DOCUMENTS] * 25,
        response_format=[AnswerFormat.json_schema(schema) for schema in schemas],
        temperature=1.0 if first % 2 else 0.0,
        seed=first,
        max_new_tokens=300,
    )
    for answer, schema in zip(answers, schemas, strict=True):
        assert answer.finish_reason in ("stop", "length")
        if answer.finish_reason == "stop":
            jsonschema.validate(json.loads(answer.text), schema)
    assert sum(answer.finish_reason == "stop" for answer in answers) >= 24


@pytest.mark.parametrize("mode", ["fusion", "concat", "ape"])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_batches_and_streams_with_mixed_formats_equal_single_answers(mode, temperature):
    options: dict[str, Any] = {"mode": mode, "temperature": temperature, "seed": 5}
    singles = [generator().answer(QUESTION, DOCUMENTS, response_format=each, **options) for each in FORMATS]
    batch = generator().answer_batch([QUESTION] * 4, [DOCUMENTS] * 4, response_format=FORMATS, **options)
    for single, other, format, matches in zip(singles, batch, FORMATS, MATCHES, strict=True):
        assert (other.token_ids, other.text, other.finish_reason) == (single.token_ids, single.text, "stop") or (
            format is None and other.token_ids == single.token_ids
        )
        assert matches(single.text)
        stream = generator().stream(QUESTION, DOCUMENTS, response_format=format, **options)
        assert "".join(stream) == single.text and stream.answer is not None
        assert stream.answer.token_ids == single.token_ids
    assert singles[1].token_ids == generator().answer(QUESTION, DOCUMENTS, **options).token_ids


def test_one_format_for_a_batch_applies_to_all_its_questions():
    format = AnswerFormat.choices(["yes", "no"])
    answers = generator().answer_batch(["a?", "b?"], [DOCUMENTS, DOCUMENTS], response_format=format)
    assert {answer.text for answer in answers} <= {"yes", "no"}
    with pytest.raises(InvalidInputError, match="has 1 formats for 2 questions"):
        generator().answer_batch(["a?", "b?"], [[], []], response_format=[format])


def test_an_answer_cut_at_its_limit_says_so():
    cut = generator().answer(QUESTION, DOCUMENTS, response_format=FORMATS[0], max_new_tokens=5)
    assert cut.finish_reason == "length" and len(cut.token_ids) == 5
    whole = generator().answer(QUESTION, DOCUMENTS, response_format=FORMATS[0])
    exact = len(whole.token_ids)
    assert (
        generator().answer(QUESTION, DOCUMENTS, response_format=FORMATS[0], max_new_tokens=exact).finish_reason
        == "stop"
    )


def test_focus_and_attribution_work_with_a_format():
    answer = generator().answer(QUESTION, DOCUMENTS, response_format=FORMATS[0], focus=1, attribution="effects")
    assert MATCHES[0](answer.text) and sum(source.used for source in answer.sources) == 1


@pytest.mark.parametrize("given", ["pydantic", "json_schema", "json_object", "text"])
def test_formats_of_other_libraries_are_read(given):
    pydantic = pytest.importorskip("pydantic")
    person = pydantic.create_model("Person", name=(str, pydantic.Field(max_length=8)))
    schema = person.model_json_schema()
    formats = {
        "pydantic": person,
        "json_schema": {"type": "json_schema", "json_schema": {"name": "Person", "schema": schema}},
        "json_object": {"type": "json_object"},
        "text": {"type": "text"},
    }
    answer = generator().answer(QUESTION, DOCUMENTS, response_format=formats[given])
    if given in ("pydantic", "json_schema"):
        assert person.model_validate_json(answer.text)
    elif given == "json_object":
        assert answer.text.startswith("{")
    else:
        assert answer.text == generator().answer(QUESTION, DOCUMENTS).text


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "string", "format": "secret"}, "secret"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"$ref": "https://example.com/schema.json"}, "not present"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "Unsatisfiable"),
        ({"type": "wrong"}, "wrong"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_unsupported_schemas_are_rejected_before_any_work(schema, reason):
    gen = tiny.generator(store=MemoryStore())
    with pytest.raises(
        InvalidInputError, match=rf"the JSON schema cannot be used for an answer: .*{reason}"
    ) as raised:
        gen.answer(QUESTION, DOCUMENTS, response_format=AnswerFormat.json_schema(schema))
    assert "\n" not in str(raised.value)
    keys = [key for keys in gen.store_keys(DOCUMENTS).values() for key in keys]
    assert gen.store is not None and not any(key in gen.store for key in keys)


def test_a_regular_expression_that_cannot_be_read_is_rejected():
    with pytest.raises(InvalidInputError, match=r"the regular expression cannot be used for an answer: .*unclosed"):
        generator().answer(QUESTION, response_format=AnswerFormat.regex("(a"))


def test_stop_strings_conflict_with_a_format():
    with pytest.raises(InvalidInputError, match=r"stop is \['x'\], but a response_format decides"):
        generator().answer(QUESTION, DOCUMENTS, stop=["x"], response_format=FORMATS[0])


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_tokenizers_that_cannot_be_constrained_are_rejected(kind):
    with pytest.raises(InvalidInputError, match="its tokenizer is of an unsupported kind"):
        tiny.generator(tokens=kind).answer("who?", ["the mill"], response_format=FORMATS[0])


def test_byte_fallback_tokenizers_are_supported():
    gen = tiny.generator(tokens="bpe-byte-fallback", max_new_tokens=80)
    assert MATCHES[0](gen.answer("who?", ["the mill"], response_format=FORMATS[0]).text)


@pytest.mark.parametrize("kind", ["byte-bpe", "bpe-byte-fallback"])
def test_control_tokens_in_a_format_stay_plain_text(kind):
    gen, tok = tiny.generator(tokens=kind, max_new_tokens=90), tiny.tokenizer(kind)
    control = gen._engine.encoder.plain.control_ids
    for token in map(str, tok.added_tokens_decoder.values()):
        text = f"a{token}b"
        for format in (AnswerFormat.choices([text]), AnswerFormat.json_schema({"const": text})):
            answer = gen.answer("who?", ["the mill"], response_format=format)
            assert answer.text in (text, json.dumps(text)) and not control.intersection(answer.token_ids)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingDependencyError, match=r"response_format or tools needs llguidance.*\[structured\]"):
        tiny.generator().answer("who?", ["the mill"], response_format=FORMATS[0])


def test_compiled_formats_are_kept_up_to_a_limit():
    tok = tiny.tokenizer("byte-bpe")
    compiler = ConstraintCompiler(tok, 512, frozenset({tok.eos_token_id}))
    formats = [AnswerFormat.choices([f"answer {number}"]) for number in range(CACHED + 3)]
    compiled = [compiler.compile(format) for format in formats]
    assert len(compiler._compiled) == CACHED
    assert compiler.compile(formats[-1]) is compiled[-1] and compiler.compile(formats[0]) is not compiled[0]


@pytest.mark.parametrize("name", [OPENED, TAGGED, CHANNELS])
@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_the_format_begins_behind_the_reasoning(name, temperature):
    gen = random_model(name)
    options: dict[str, Any] = {
        "max_reasoning_tokens": 9, "max_new_tokens": 80, "temperature": temperature, "seed": 3, "mode": "fusion",
    }  # fmt: skip
    singles = [gen.answer(QUESTION, DOCUMENTS, response_format=each, **options) for each in FORMATS]
    batch = gen.answer_batch([QUESTION] * 4, [DOCUMENTS] * 4, response_format=FORMATS, **options)
    for single, other, format, matches in zip(singles, batch, FORMATS, MATCHES, strict=True):
        assert (other.token_ids, other.text, other.reasoning) == (single.token_ids, single.text, single.reasoning)
        assert matches(single.text)
        stream = gen.stream(QUESTION, DOCUMENTS, response_format=format, **options)
        pieces = list(stream.pieces)
        assert "".join(piece.text for piece in pieces if not piece.is_reasoning) == single.text
        assert "".join(piece.text for piece in pieces if piece.is_reasoning) == (single.reasoning or "")
    assert (name == TAGGED) or all(answer.usage.reasoning_tokens for answer in singles)


def test_reasoning_that_ends_the_answer_ends_only_itself():
    answer = thinker(" mill rain").answer(QUESTION, DOCUMENTS, response_format=FORMATS[3])  # then an end token
    assert answer.reasoning == "mill rain" and answer.finish_reason == "stop"
    assert MATCHES[3](answer.text)


def test_a_model_may_open_its_reasoning_itself():
    tok = loaded(TAGGED)._engine.model.tokenizer
    [start] = tok("\n", add_special_tokens=False)["input_ids"]
    written = tok("<think> mill</think>", add_special_tokens=False)["input_ids"]
    gen = loaded(TAGGED, tiny.chained_model([start, *written]))
    answer = gen.answer(QUESTION, DOCUMENTS, response_format=FORMATS[3])
    gap = tok("\n\n", add_special_tokens=False)["input_ids"]
    assert answer.reasoning == "mill" and list(answer.token_ids[: len(written + gap)]) == [*written, *gap]
    assert MATCHES[3](answer.text)
