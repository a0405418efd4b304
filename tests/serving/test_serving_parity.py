"""The prompt of an untuned model behind the server equals the output of ``apply_chat_template``.

Its answers equal those of transformers' ``generate`` for the same token ids.
"""

from __future__ import annotations

from typing import Any

import pytest
import tiny
from parity import NEW_TOKENS, Reader, generated, ids_of, untuned_reader
from serving_client import CHAT, client_of, events

from kvfusion_rag import Document, Message

QUESTION = "who built the lighthouse?"
TURNS = [("system", " Be kind. "), ("user", "who sleeps?"), ("assistant", "two doves"), ("user", QUESTION)]
DOCUMENTS = [{"text": "Amara Osei built it.", "title": "Harbour records", "id": "a"}, "two grey doves sleep"]
SHOWN = (
    "Answer the question from these documents.\n\nTitle: Harbour records\nAmara Osei built it.\n\ntwo grey doves sleep"
)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Reader:
    return untuned_reader(monkeypatch)


def ask(model: Reader, turns: list[tuple[str, str]], *, stream: bool = False, **fields: Any) -> dict[str, Any]:
    """Return mode, sources, text and finish reason of a complete or streamed answer."""
    body = {
        "model": model.generator.model_id,
        "messages": [{"role": role, "content": text} for role, text in turns],
        "max_tokens": NEW_TOKENS,
        "stream": stream,
        **fields,
    }
    found = client_of(model.generator).post(CHAT, json=body)
    assert found.status_code == 200, found.text
    if not stream:
        whole = found.json()
        return {**whole["kvfusion"], **whole["choices"][0], "text": whole["choices"][0]["message"]["content"]}
    pieces = list(events(found.text))
    text = "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces)
    return {**pieces[-1]["kvfusion"], **pieces[-1]["choices"][0], "text": text}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    "turns", [TURNS, TURNS[3:], [TURNS[0], TURNS[3]], TURNS[1:3]], ids=["history", "one", "system", "assistant"]
)
def test_messages_reach_the_model_unchanged(model: Reader, turns: list[tuple[str, str]], stream: bool) -> None:
    found = ask(model, turns, stream=stream)
    ids = ids_of(turns)
    assert list(model.read[-1]) == ids
    assert list(model.answered[-1]) == generated(ids)
    assert found["text"].strip() == tiny.tokenizer("byte-bpe").decode(generated(ids)).strip()
    assert (found["mode"], found["finish_reason"]) == ("concat", "length")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_documents_are_appended_to_the_system_message(model: Reader, stream: bool) -> None:
    found = ask(model, TURNS, stream=stream, documents=DOCUMENTS, mode="auto")
    ids = ids_of([("system", f"{TURNS[0][1]}\n\n{SHOWN}"), *TURNS[1:]])
    assert list(model.read[-1]) == ids
    assert list(model.answered[-1]) == generated(ids)
    assert (found["mode"], {source["origin"] for source in found["sources"]}) == ("concat", {"prompt"})
    documents = [Document("Amara Osei built it.", "a", "Harbour records"), "two grey doves sleep"]
    prompt = [Message(role, text) for role, text in TURNS]  # type: ignore[arg-type]
    shown = model.generator.show_prompt(QUESTION, documents, prompt=prompt)
    assert shown.text == tiny.tokenizer("byte-bpe").decode(ids)


def test_order_of_fused_documents_does_not_change_the_answer(model: Reader) -> None:
    first = ask(model, TURNS, documents=DOCUMENTS, mode="fusion")
    again = ask(model, TURNS, documents=DOCUMENTS[::-1], mode="fusion")
    assert (first["mode"], first["text"]) == ("fusion", again["text"])
    assert {source["origin"] for source in again["sources"]} == {"memory"}


def test_model_object_contains_the_mode_behind_auto(model: Reader) -> None:
    (found,) = client_of(model.generator, mode="auto").get("/v1/models").json()["data"]
    assert found["kvfusion"]["mode"] == "concat"


@pytest.mark.parametrize("path", [CHAT, "/v1/documents"])
@pytest.mark.parametrize("name", ["tokenize", "messages", "chat_template"])
def test_reserved_template_variables_are_rejected(model: Reader, path: str, name: str) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    body: dict[str, Any] = {"documents": ["x"], "messages": messages, "chat_template_kwargs": {name: "x"}}
    if path == CHAT:
        body["model"] = model.generator.model_id
    found = client_of(model.generator).post(path, json=body)
    assert (found.status_code, found.json()["error"]["code"]) == (400, "invalid_value")
