"""Attribution in LangChain and LlamaIndex."""

import pytest
import tiny

from kvfusion_rag import Message

DOCUMENTS = ["the river runs past an old mill", "two grey doves sleep"]


@pytest.fixture(scope="module")
def measured():
    """Return a generator, and attention and effect of each document for a bare question."""
    gen = tiny.generator("llama")
    found = gen.attribute("who?", DOCUMENTS, max_new_tokens=3)
    return gen, [(document.attention, document.effect) for document in found.documents]


def numbers(sources):
    return [(source["attention"], source["effect"]) for source in sources]


@pytest.mark.torch_only
def test_langchain(measured):
    pytest.importorskip("langchain_core")
    from langchain_kvfusion import ChatKVFusion, KVFusionLLM

    gen, expected = measured
    llm = KVFusionLLM(generator=gen, max_tokens=3, attribution="effects")
    info = llm.generate(["who?"], documents=DOCUMENTS).generations[0][0].generation_info
    assert numbers(info["sources"]) == expected
    chat = ChatKVFusion(generator=gen, max_tokens=3)
    message = chat.invoke("who?", documents=DOCUMENTS, attribution="attention")
    shares = numbers(message.response_metadata["sources"])
    assert all(0 < attention < 1 and effect is None for attention, effect in shares)
    *_, last = chat.stream("who?", documents=DOCUMENTS, attribution="effects")
    assert all(effect is not None for _, effect in numbers(last.response_metadata["sources"]))
    assert numbers(chat.invoke("who?", documents=DOCUMENTS).response_metadata["sources"]) == [(None, None)] * 2


def test_llama_index(measured):
    pytest.importorskip("llama_index.core")
    from llama_index.core.schema import NodeWithScore, TextNode

    from llama_index_kvfusion import KVFusionLlamaIndexLLM, KVFusionSynthesizer

    gen, _ = measured
    prompt = [Message.around("user", "Of ", ": who?")]
    found = gen.attribute("who?", DOCUMENTS, prompt=prompt, max_new_tokens=3)
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in DOCUMENTS]
    llm = KVFusionLlamaIndexLLM(gen, max_new_tokens=3, attribution="effects")
    synthesizer = KVFusionSynthesizer(llm, text_qa_template="Of {context_str}: {query_str}")
    response = synthesizer.synthesize("who?", nodes)
    expected = [(document.attention, document.effect) for document in found.documents]
    assert numbers(response.metadata["kvfusion"]["sources"]) == expected
