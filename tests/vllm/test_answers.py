"""Answers of the default model on vLLM, with torch as the reference. Needs vLLM (make test-vllm)."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from serving_client import CHAT, client_of, events

from kvfusion_rag import (
    AnswerFormat,
    ContextLimitError,
    Document,
    FusedPrompt,
    InvalidInputError,
    KVFusionGenerator,
    Tool,
    UnsupportedModelError,
)
from kvfusion_rag.engine.calls import read_call
from kvfusion_rag.engine.requests import Batch, Request
from kvfusion_rag.engine.runner import Runner
from kvfusion_rag.store import document_key

pytest.importorskip("vllm")
from kvfusion_rag.vllm.server import DocumentsLostError, EngineError

pytestmark = [pytest.mark.default_model, pytest.mark.slow]

DOCUMENTS = [
    Document("The Harrow Point Lighthouse was designed by Edda Marsh. Work began in 1871 and ended in 1874.", id="h"),
    Document("The mill on the Brack grinds twenty sacks of flour a day. Jonas Peel, the miller, counts them.", id="m"),
    Document("The ferry to Ostrey leaves at seven in the morning, and at noon on Sundays.", id="f", title="Timetable"),
    Document("Two grey doves sleep on the roof of the boat house. Nobody has ever painted it.", id="d"),
]
QUESTIONS = [
    "Who designed the Harrow Point Lighthouse?",
    "When did work on the lighthouse begin?",
    "How many sacks of flour does the mill grind a day?",
    "Who is the miller?",
    "When does the ferry leave on Sundays?",
    "What sleeps on the roof of the boat house?",
    "What does the miller count?",
    "Where does the ferry go?",
    "In which year did the work on the lighthouse end?",
]
EVERYTHING = {"mode": "fusion", "focus": None}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "found": {"type": "boolean"}},
    "required": ["name", "found"],
}


def request_of(generator: KVFusionGenerator, question: str, documents: Sequence[Any] = DOCUMENTS, **options: Any):
    """Return a request whose documents are stored, and its decoding options."""
    engine = generator._engine
    call = read_call(engine, question, documents, {**EVERYTHING, "max_new_tokens": 20, **options})
    request = engine.runner.prepare(call.requests[0], call.decoding)
    engine.runner.begin(Batch.of(request))
    return request, call.decoding


def torch_runner(generator: KVFusionGenerator) -> Runner[Any]:
    """Return a runner that answers on torch, from the same weights and store."""
    runner = generator._engine.runner
    return Runner(runner.model, runner.document_kvs, max_fused_tokens=runner.max_fused_tokens)


def on_both(generator: KVFusionGenerator, request: Request, decoding: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens of vLLM and of torch."""
    runner = generator._engine.runner
    (found,) = runner.answer_all([request], decoding)
    (expected,) = torch_runner(generator).answer_all([request], decoding)
    return found.token_ids, expected.token_ids


def asked_of(generator: KVFusionGenerator, request: Request, decoding: Any) -> Any:
    return generator._engine.runner.token_request(request, (), decoding)


def tokens_of(generator: KVFusionGenerator, asked: Any) -> list[int]:
    return [token.id for token in generator._engine.runner.server.tokens(asked)]


# Answers


def test_the_base_model_answers_like_torch(on_vllm):
    pairs = []
    for question in QUESTIONS:
        request, decoding = request_of(on_vllm, question, max_new_tokens=24)
        request = replace(request, mode=replace(request.mode, tuned=False))
        pairs.append(on_both(on_vllm, request, decoding))
    assert all(found == expected for found, expected in pairs)
    assert sum(len(found) for found, _ in pairs) >= 119


def test_the_adapter_answers_like_torch(on_vllm, on_torch):
    answers = [[g.answer(q, DOCUMENTS, **EVERYTHING).token_ids for q in QUESTIONS] for g in (on_vllm, on_torch)]
    assert answers[0] == answers[1] and sum(map(len, answers[0])) >= 39
    bases = [request_of(on_vllm, question) for question in QUESTIONS]
    untuned = [replace(request, mode=replace(request.mode, tuned=False)) for request, _ in bases]
    assert answers[0] != [a.token_ids for a in on_vllm._engine.runner.answer_all(untuned, bases[0][1])]


@pytest.mark.parametrize("options", [{"mode": "concat"}, {}, {"mode": "fusion", "focus": 2}], ids=str)
def test_other_modes_answer_like_torch(on_vllm, on_torch, options):
    found, expected = (g.answer(QUESTIONS[2], DOCUMENTS, max_new_tokens=16, **options) for g in (on_vllm, on_torch))
    assert found.token_ids == expected.token_ids and found.mode == expected.mode
    assert [source.used for source in found.sources] == [source.used for source in expected.sources]


def test_no_documents(on_vllm, on_torch):
    found, expected = (g.answer("Who built it?", [], mode="fusion", max_new_tokens=12) for g in (on_vllm, on_torch))
    assert found.token_ids == expected.token_ids


def test_the_order_of_documents_changes_nothing(on_vllm):
    rng, answers = random.Random(0), set()
    for _ in range(4):
        shuffled = rng.sample(DOCUMENTS, len(DOCUMENTS))
        answers.add(on_vllm.answer(QUESTIONS[0], shuffled, **EVERYTHING).token_ids)
    assert len(answers) == 1


def test_a_long_question_is_read_in_parts(on_vllm):
    request, decoding = request_of(on_vllm, "and the river runs past it, " * 60 + QUESTIONS[3])
    assert len(request.question.ids) > 256
    found, expected = on_both(on_vllm, request, decoding)
    assert found == expected


def test_stop_strings_and_limits(on_vllm, on_torch):
    options = {**EVERYTHING, "max_new_tokens": 8, "stop": ["Marsh"]}
    found, expected = (g.answer(QUESTIONS[0], DOCUMENTS, **options) for g in (on_vllm, on_torch))
    assert (found.text, found.finish_reason) == (expected.text, expected.finish_reason) == ("Edda", "stop")
    short = on_vllm.answer(QUESTIONS[0], DOCUMENTS, **{**EVERYTHING, "max_new_tokens": 2})
    assert (short.finish_reason, len(short.token_ids)) == ("length", 2)


@pytest.mark.parametrize(
    "format",
    [
        AnswerFormat.choices(["Jonas Peel", "Edda Marsh", "nobody"]),
        AnswerFormat.regex("[A-Z][a-z]+( [A-Z][a-z]+)*"),
        AnswerFormat.json_schema(PERSON),
        AnswerFormat.json_object(),
    ],
    ids=lambda format: format.kind,
)
@pytest.mark.parametrize("mode", ["fusion", "concat"])
def test_formats_give_the_tokens_of_torch(on_vllm, on_torch, format, mode):
    options = {"mode": mode, "focus": None, "response_format": format, "max_new_tokens": 40}
    found, expected = (g.answer(QUESTIONS[0], DOCUMENTS, **options) for g in (on_vllm, on_torch))
    assert (found.token_ids, found.text, found.finish_reason) == (
        expected.token_ids, expected.text, expected.finish_reason
    )  # fmt: skip


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_tools_are_called_as_on_torch(on_vllm, on_torch, choice):
    tools = [Tool("timetable", "Look up when a ferry leaves.", {"type": "object", "properties": {"day": {
        "type": "string", "enum": ["weekday", "sunday"]}}, "required": ["day"]})]  # fmt: skip
    options = {"tools": tools, "tool_choice": choice, "max_new_tokens": 40}
    found, expected = (g.answer(QUESTIONS[4], DOCUMENTS, **options) for g in (on_vllm, on_torch))
    assert found.token_ids == expected.token_ids
    assert [(c.name, c.arguments) for c in found.tool_calls] == [(c.name, c.arguments) for c in expected.tool_calls]
    assert found.tool_calls or choice == "auto"


def test_a_bad_format_is_an_error_of_the_request(on_vllm):
    with pytest.raises(InvalidInputError, match="regular expression"):
        on_vllm.answer(QUESTIONS[0], DOCUMENTS, response_format=AnswerFormat.regex("(a"))


def test_a_seed_repeats_an_answer(on_vllm):
    options = {**EVERYTHING, "temperature": 1.5, "max_new_tokens": 16}
    draws = [on_vllm.answer(QUESTIONS[0], DOCUMENTS, seed=seed, **options).token_ids for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_streams_and_cancelled_streams(on_vllm):
    with on_vllm.stream(QUESTIONS[5], DOCUMENTS, **EVERYTHING) as stream:
        text = "".join(stream)
    assert stream.answer is not None and text == stream.answer.text == on_vllm.answer(QUESTIONS[5], DOCUMENTS).text
    with on_vllm.stream(QUESTIONS[5], DOCUMENTS, **EVERYTHING) as stream:
        next(stream)
    assert stream.answer is None


# What vLLM must not mix


def test_an_ordinary_request_never_meets_fused_blocks(on_vllm):
    """The same token ids as one prompt get the ordinary answer, before and after the fused one."""
    runner = on_vllm._engine.runner
    request, decoding = request_of(on_vllm, QUESTIONS[1])
    fused = asked_of(on_vllm, request, decoding)
    plain = replace(fused, documents={}, salt=runner.plain_salt(""))
    scored = [replace(asked, scored=True) for asked in (fused, plain, fused, plain, replace(plain, salt="0" * 64))]
    found = [[token.log_probability for token in runner.server.tokens(asked)] for asked in scored]
    assert found[0] == pytest.approx(found[2], abs=1e-3)
    assert found[1] == pytest.approx(found[3], abs=1e-3) == found[4]
    assert found[0] != pytest.approx(found[1][: len(found[0])], abs=1e-2)


@pytest.mark.parametrize("salt", ["plain", "of another order"])
def test_fused_documents_need_their_own_salt(on_vllm, salt):
    request, decoding = request_of(on_vllm, QUESTIONS[0])
    asked = asked_of(on_vllm, request, decoding)
    documents = on_vllm._engine.runner._documents(request).documents
    salts = {
        "plain": on_vllm._engine.runner.plain_salt(""),
        "of another order": FusedPrompt(documents[::-1], request.question.start).salt,
    }
    with pytest.raises(DocumentsLostError):
        tokens_of(on_vllm, replace(asked, salt=salts[salt]))
    assert tokens_of(on_vllm, asked)


def test_namespaces_share_no_blocks(on_vllm):
    request, _ = request_of(on_vllm, QUESTIONS[0])
    other, _ = request_of(on_vllm.with_namespace("tenant"), QUESTIONS[0])
    runner = on_vllm._engine.runner
    salts = [runner._documents(r).salt for r in (request, other)]
    salts += [runner.plain_salt(name) for name in ("", "tenant")]
    assert len(set(salts)) == 4


# Documents that are missing


def test_a_missing_document_fails_that_request_alone(on_vllm):
    request, decoding = request_of(on_vllm, QUESTIONS[0])
    asked = asked_of(on_vllm, request, decoding)
    expected = tokens_of(on_vllm, asked)
    documents = on_vllm._engine.runner._documents(request).documents
    nothing = (document_key("nobody", "", (1, 2)), documents[-1][1])
    missing = FusedPrompt((*documents[:-1], nothing), request.question.start)
    bad = replace(asked, documents=missing.params(), salt=missing.salt)

    def outcome(one: Any) -> Any:
        try:
            return tokens_of(on_vllm, one)
        except DocumentsLostError:
            return "lost"

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(outcome, [asked, bad] * 8))
    assert found == [expected, "lost"] * 8
    malformed = replace(asked, documents={"kvfusion": {"documents": [["../x", 3]], "start": 0}})
    assert outcome(malformed) == "lost" and outcome(asked) == expected


@pytest.mark.parametrize("damage", ["removed", "flipped"])
def test_a_lost_document_is_prefilled_again(on_vllm, store_folder, damage):
    """The document is lost between the check of the store and vLLM's reading of it."""
    runner = on_vllm._engine.runner
    document = Document(f"The {damage} bell of the chapel was cast by Ida Brook in 1820.")
    request, decoding = request_of(on_vllm, "Who cast the bell?", [document])
    (expected,) = torch_runner(on_vllm).answer_all([request], decoding)
    (file,) = store_folder.rglob(f"*{request.fused[0].key.split('-', 1)[1]}*")
    if damage == "removed":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[-9] ^= 1
        file.write_bytes(data)
    run = runner.begin(Batch.of(request)) if damage == "flipped" else None
    answer = runner.empty_answer(request, decoding)
    for _ in runner.growing(request, answer, decoding):
        pass
    assert tuple(answer.ids) == expected.token_ids
    assert run is None or set(run.origins.values()) == {"disk"}, "the damage was found before vLLM read the file"


# Limits, and what vLLM cannot do


def test_too_long_requests_are_rejected_before_anything_is_computed(on_vllm):
    documents = [Document(f"{number} " + "the mill " * 200) for number in range(12)]
    with pytest.raises(ContextLimitError, match="vLLM accepts only 4096 per request"):
        on_vllm.answer(QUESTIONS[0], documents, **EVERYTHING)
    with pytest.raises(ContextLimitError, match="max_model_len"):
        on_vllm.answer(QUESTIONS[0], DOCUMENTS, **EVERYTHING, max_new_tokens=4000)


@pytest.mark.parametrize(
    ("options", "error"),
    [({"mode": "ape"}, UnsupportedModelError), ({"attribution": "attention"}, UnsupportedModelError)],
    ids=str,
)
def test_what_vllm_cannot_do_is_an_error_of_the_request(on_vllm, options, error):
    with pytest.raises(error, match="engine"):
        on_vllm.answer(QUESTIONS[0], DOCUMENTS, **options)
    assert on_vllm.answer(QUESTIONS[0], DOCUMENTS).text


def test_global_positions_are_refused(on_vllm):
    with pytest.raises(InvalidInputError, match="positions is 'global'"):
        on_vllm.with_settings(positions="global").answer(QUESTIONS[0], DOCUMENTS, **EVERYTHING)


def test_effects_are_measured_by_torch(on_vllm, on_torch):
    found, expected = (g.answer(QUESTIONS[0], DOCUMENTS, attribution="effects") for g in (on_vllm, on_torch))
    effects = [source.effect for source in expected.sources]
    assert [source.effect for source in found.sources] == pytest.approx(effects, rel=1e-3, abs=1e-3)


# The server


def test_100_concurrent_requests(on_vllm, on_torch):
    """Over HTTP, streamed or not, each over its own documents, and all right."""
    rng = random.Random(0)
    cases = [(rng.choice(QUESTIONS), rng.sample(DOCUMENTS, rng.randint(2, 4))) for _ in range(100)]
    expected = {}
    for question, documents in cases:
        key = question, frozenset(document.id for document in documents)
        if key not in expected:
            expected[key] = on_torch.answer(question, documents, **EVERYTHING).text
    with client_of(on_vllm, max_concurrency=128) as client:

        def ask(number: int) -> str:
            question, documents = cases[number]
            body = {
                "model": on_vllm.model_id,
                "messages": [{"role": "user", "content": question}],
                "documents": [{"text": d.text, "title": d.title, "id": d.id} for d in documents],
                "mode": "fusion",
                "focus": None,
                "stream": number % 2 == 0,
            }
            reply = client.post(CHAT, json=body)
            assert reply.status_code == 200, reply.text
            if not body["stream"]:
                return reply.json()["choices"][0]["message"]["content"]
            choices = [event["choices"][0] for event in events(reply.text) if event["choices"]]
            return "".join(choice["delta"].get("content") or "" for choice in choices)

        with ThreadPoolExecutor(100) as pool:
            found = list(pool.map(ask, range(100)))
    wanted = [expected[question, frozenset(d.id for d in documents)] for question, documents in cases]
    assert found == wanted


def test_vllm_that_ended_is_an_error_of_the_request(on_vllm):
    """Comes last, because it ends the server of the other tests."""
    request, decoding = request_of(on_vllm, QUESTIONS[0])
    server = on_vllm._engine.runner.server
    server._process.kill()
    server._process.wait()
    with pytest.raises(EngineError, match="vLLM has ended"):
        tokens_of(on_vllm, asked_of(on_vllm, request, decoding))
    server.close()
    deadline = time.monotonic() + 30
    while _group_exists(server._process.pid):  # of vLLM's own processes
        assert time.monotonic() < deadline
        time.sleep(0.2)


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
