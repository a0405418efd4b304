"""Reasoning in replies of the server: a field of its own, in streams too, and counted apart."""

from __future__ import annotations

import pytest
from fakes import RecordingGenerator
from openai import OpenAI
from serving_client import CHAT, client_of, events, request

from kvfusion_rag.serving import create_app, running
from tests.engine.test_reasoning_answers import DOCUMENTS, QUESTION, THOUGHTS, thinker

THINKING = RecordingGenerator(thoughts=("the mill", " it is"))


def test_a_reply_has_the_reasoning_beside_the_answer():
    found = client_of(THINKING).post(CHAT, json=request()).json()
    assert found["choices"][0]["message"] == {
        "role": "assistant",
        "content": "in lima",
        "reasoning_content": "the mill it is",
    }
    assert found["usage"]["completion_tokens"] == 4
    assert found["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2}


def test_a_stream_has_the_reasoning_first_and_apart():
    text = client_of(THINKING).post(CHAT, json=request(stream=True, stream_options={"include_usage": True})).text
    *chunks, usage = events(text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "the mill"},
        {"reasoning_content": " it is"},
        {"content": "in"},
        {"content": " lima"},
        {},
    ]
    assert usage["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2}


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_replies_may_be_sent_back_and_their_reasoning_is_not_read(field):
    fake = RecordingGenerator()
    turns = [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "in lima", field: "the secret mill"},
        {"role": "user", "content": "Since when?"},
    ]
    assert client_of(fake).post(CHAT, json=request(*turns)).status_code == 200
    assert "secret" not in fake.calls[0].wording and "in lima" in fake.calls[0].wording


@pytest.mark.parametrize("wrong", [1.5, "2", True])
def test_wrong_budgets_are_rejected(wrong):
    reply = client_of(RecordingGenerator()).post(CHAT, json=request(max_reasoning_tokens=wrong))
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "max_reasoning_tokens"


def test_openais_client_reads_the_reasoning_of_a_model():
    with running(create_app(thinker(THOUGHTS))) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        body = {
            "model": "thinker",
            "messages": [{"role": "user", "content": QUESTION}],
            "extra_body": {"documents": [d.text for d in DOCUMENTS], "max_reasoning_tokens": 20},
        }
        message = client.chat.completions.create(**body).choices[0].message
        assert (message.reasoning_content, message.content) == ("mill", "Amara Osei built")
        deltas = [c.choices[0].delta for c in client.chat.completions.create(**body, stream=True)]
        assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == "mill"
        assert "".join(d.content or "" for d in deltas) == "Amara Osei built"
        body["extra_body"] |= {"max_reasoning_tokens": -1}
        with pytest.raises(Exception, match="max_reasoning_tokens is -1"):
            client.chat.completions.create(**body)
