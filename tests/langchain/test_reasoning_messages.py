"""Reasoning in LangChain: as langchain-deepseek and ChatOllama return it, and never sent back."""

from __future__ import annotations

import pytest
from conversation_fakes import ChatRecorder
from langchain_core.messages import AIMessage, HumanMessage
from langchain_models import Recorder, chat

from kvfusion_rag import Document
from langchain_kvfusion import ChatKVFusion, KVFusionLLM
from tests.engine.test_reasoning_answers import DOCUMENTS, QUESTION, THOUGHTS, thinker

TEXTS = [document.text for document in DOCUMENTS]


def thinking() -> ChatRecorder:
    return ChatRecorder(thoughts=("the mill", " it is"))


async def test_messages_have_the_reasoning_in_a_block_of_its_own():
    recorder = Recorder()
    model = chat(thinking(), callbacks=[recorder])
    streamed = list(model.stream("Where?"))
    assert [p.additional_kwargs.get("reasoning_content") for p in streamed[:3]] == ["the mill", " it is", None]
    assert recorder.tokens == ["", "", "in", " lima", ""]
    astreamed = [piece async for piece in model.astream("Where?")]
    joined = [sum(pieces[1:], pieces[0]) for pieces in (streamed, astreamed)]
    for message in (model.invoke("Where?"), await model.ainvoke("Where?"), *joined):
        assert message.text == "in lima"
        assert message.additional_kwargs == {"reasoning_content": "the mill it is"}
        assert message.content_blocks == [
            {"type": "reasoning", "reasoning": "the mill it is"},
            {"type": "text", "text": "in lima"},
        ]
        assert message.usage_metadata["output_tokens"] == 4
        assert message.usage_metadata["output_token_details"] == {"reasoning": 2}
        assert "reasoning" not in message.response_metadata


def test_answers_without_reasoning_have_no_block_for_it():
    assert chat().invoke("Where?").additional_kwargs == {}


def test_reasoning_of_earlier_turns_is_not_sent_back():
    fake = thinking()
    model = chat(fake)
    first = model.invoke("Where?")
    blocks = AIMessage(
        content=[{"type": "reasoning", "reasoning": "the mill it is"}, {"type": "text", "text": "in lima"}]
    )
    for earlier in (first, blocks):
        model.invoke([HumanMessage("Where?"), earlier, HumanMessage("Since when?")])
        assert "mill" not in fake.calls[-1].wording and "in lima" in fake.calls[-1].wording


def test_an_llm_returns_the_answer_and_keeps_the_reasoning_in_its_info():
    llm = KVFusionLLM(generator=thinking())
    assert llm.invoke("q") == "".join(llm.stream("q")) == "in lima"
    assert llm.generate(["q"]).generations[0][0].generation_info["reasoning"] == "the mill it is"


@pytest.mark.parametrize("budget", [None, 1])
def test_a_model_with_reasoning_answers_as_its_generator(budget):
    generator = thinker(THOUGHTS)
    model = ChatKVFusion(generator=generator, max_reasoning_tokens=budget)
    message = model.invoke(QUESTION, documents=[Document(text) for text in TEXTS])
    expected = generator.answer(QUESTION, TEXTS, max_reasoning_tokens=budget)
    assert (message.text, message.additional_kwargs) == (expected.text, {"reasoning_content": expected.reasoning})
    assert message.usage_metadata["output_token_details"] == {"reasoning": expected.usage.reasoning_tokens}
