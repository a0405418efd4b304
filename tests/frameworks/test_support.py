"""Support in LangChain and LlamaIndex: support, found and a notice in the answer's metadata."""

import pytest
import tiny

from kvfusion_rag import SupportCalibration

DOCUMENTS = ["the river runs past an old mill", "two grey doves sleep"]
NAMES = ("support", "found", "notice")


@pytest.fixture(scope="module")
def gen():
    calibration = SupportCalibration({"gain": 0.4, "coverage": 2.0}, -1.0, 1.0)
    return tiny.generator("llama", support=calibration, max_new_tokens=3)


@pytest.fixture(scope="module")
def expected(gen):
    """Return the metadata of the bare question at the calibration's threshold, which no answer reaches."""
    data = gen.answer("who?", DOCUMENTS, min_support="auto").to_dict()
    assert data["found"] is False and data["notice"]
    return {name: data[name] for name in NAMES}


def facts(record):
    return {name: record[name] for name in NAMES}


def test_langchain(gen, expected):
    pytest.importorskip("langchain_core")
    from langchain_kvfusion import ChatKVFusion, KVFusionLLM

    llm = KVFusionLLM(generator=gen, min_support="auto")
    assert facts(llm.generate(["who?"], documents=DOCUMENTS).generations[0][0].generation_info) == expected
    chat = ChatKVFusion(generator=gen)
    assert facts(chat.invoke("who?", documents=DOCUMENTS).response_metadata) == dict.fromkeys(NAMES)
    message = chat.invoke("who?", documents=DOCUMENTS, min_support="auto")
    assert facts(message.response_metadata) == expected
    *_, last = chat.stream("who?", documents=DOCUMENTS, min_support=0)
    assert last.response_metadata["found"] is True
    with pytest.raises(ValueError, match="min_support"):
        ChatKVFusion(generator=gen, min_support=2)


def test_llama_index(gen, expected):
    pytest.importorskip("llama_index.core")
    from llama_index.core.schema import NodeWithScore, TextNode

    from llama_index_kvfusion import KVFusionLlamaIndexLLM, KVFusionSynthesizer

    nodes = [NodeWithScore(node=TextNode(text=text)) for text in DOCUMENTS]
    llm = KVFusionLlamaIndexLLM(gen, min_support="auto")
    assert facts(KVFusionSynthesizer(llm).synthesize("who?", nodes).metadata["kvfusion"]) == expected
    assert facts(llm.complete("who?", documents=DOCUMENTS).raw) == expected
    assert llm.complete("who?", documents=DOCUMENTS, min_support=0.0).raw["found"] is True
    plain = KVFusionLlamaIndexLLM(gen).complete("who?", documents=DOCUMENTS)
    assert facts(plain.raw) == dict.fromkeys(NAMES)
