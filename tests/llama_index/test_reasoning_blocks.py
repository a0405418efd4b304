"""Reasoning in LlamaIndex: a block of the message, deltas in streams, and never sent back."""

from __future__ import annotations

from fakes import RecordingGenerator
from llama_index.core.base.llms.types import ChatMessage, TextBlock, ThinkingBlock

from llama_index_kvfusion import KVFusionLlamaIndexLLM, KVFusionSynthesizer


def thinking() -> KVFusionLlamaIndexLLM:
    return KVFusionLlamaIndexLLM(RecordingGenerator(thoughts=("the mill", " it is")))


QUESTION = [ChatMessage(role="user", content="Where?")]


async def test_chat_messages_have_the_reasoning_in_a_block_of_its_own():
    llm = thinking()
    streamed, astreamed = list(llm.stream_chat(QUESTION)), [c async for c in await llm.astream_chat(QUESTION)]
    for chunks in (streamed, astreamed):
        assert [c.additional_kwargs.get("thinking_delta") for c in chunks[:3]] == ["the mill", " it is", None]
        assert "".join(c.delta for c in chunks) == "in lima"
    for response in (llm.chat(QUESTION), await llm.achat(QUESTION), streamed[-1], astreamed[-1], streamed[-2]):
        first, second = response.message.blocks
        assert isinstance(first, ThinkingBlock) and isinstance(second, TextBlock)
        assert (first.content, second.text, response.message.content) == ("the mill it is", "in lima", "in lima")
    assert streamed[-1].raw["reasoning"] == "the mill it is"


def test_completions_have_the_answer_alone():
    llm = thinking()
    assert llm.complete("Where?").text == "in lima" and llm.complete("Where?").raw["reasoning"] == "the mill it is"
    assert "".join(c.delta for c in llm.stream_complete("Where?")) == "in lima"


def test_reasoning_of_earlier_turns_is_not_sent_back():
    llm = thinking()
    first = llm.chat(QUESTION).message
    llm.chat([*QUESTION, first, ChatMessage(role="user", content="Since when?")])
    wording = llm.generator.calls[-1].wording
    assert "mill" not in wording and "in lima" in wording


def test_synthesizers_stream_the_answer_alone():
    for streaming in (False, True):
        found = KVFusionSynthesizer(thinking(), streaming=streaming).get_response("Where?", ["a text"])
        assert (found if isinstance(found, str) else "".join(found)) == "in lima"
