"""KVFusionPrefill in ingestion pipelines, and KVFusionPrefetch before a reranker."""

from __future__ import annotations

import asyncio
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llama_index.core")

from llama_index.core import Document as LlamaDocument
from llama_index.core import VectorStoreIndex
from llama_index.core.embeddings.mock_embed_model import MockEmbedding
from llama_index.core.ingestion import IngestionCache, IngestionPipeline
from llama_index.core.llms import MockLLM
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle, TextNode
from llama_index_helpers import FixedRetriever
from tiny import backbone
from tiny import generator as tiny_generator

from kvfusion_rag import InvalidInputError, KVFusionGenerator, OverloadError
from kvfusion_rag.fusion.torch_model import TorchModel
from llama_index_kvfusion import KVFusionLlamaIndexLLM, KVFusionPrefetch, KVFusionPrefill, KVFusionSynthesizer

QUESTION = "Who built it?"
MODES = [None, MetadataMode.NONE, MetadataMode.LLM]


def documents() -> list[LlamaDocument]:
    text = "Amara Osei built a lighthouse. Its lamp was lit in 1874. " * 6
    return [
        LlamaDocument(text=text, doc_id="lighthouse", metadata={"title": "Harbour records", "page": 3}),
        LlamaDocument(text="The miller counts sacks of flour.", doc_id="mill"),
    ]


def llm_on(store: Any) -> KVFusionLlamaIndexLLM:
    return KVFusionLlamaIndexLLM(KVFusionGenerator(TorchModel(backbone("llama")), store=store), max_new_tokens=1)


def pipeline(llm: KVFusionLlamaIndexLLM, mode: MetadataMode | None = None, **options: Any) -> IngestionPipeline:
    steps = [
        SentenceSplitter(chunk_size=60, chunk_overlap=0),
        KVFusionPrefill(llm, metadata_mode=mode),
        MockEmbedding(embed_dim=4),
    ]
    return IngestionPipeline(transformations=steps, **options)


def origins(llm: KVFusionLlamaIndexLLM, nodes: Any, mode: MetadataMode | None = None) -> list[str]:
    """Return the origin of each node in a query over an index of `nodes`."""
    index = VectorStoreIndex(nodes, embed_model=MockEmbedding(embed_dim=4))
    synthesizer = KVFusionSynthesizer(llm, metadata_mode=mode)
    engine = synthesizer.as_query_engine(index, similarity_top_k=len(nodes))
    return [source["origin"] for source in engine.query(QUESTION).metadata["kvfusion"]["sources"]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("asynchronous", [False, True])
async def test_query_finds_prefilled_nodes_in_memory(mode: MetadataMode | None, asynchronous: bool) -> None:
    llm = llm_on("memory")
    made = pipeline(llm, mode)
    nodes = await made.arun(documents=documents()) if asynchronous else made.run(documents=documents())
    assert len(nodes) > 2  # the first document was split
    assert set(origins(llm, nodes, mode)) == {"memory"}


@pytest.mark.parametrize("mode", MODES)
def test_another_process_finds_prefilled_nodes_on_disk(tmp_path: Path, mode: MetadataMode | None) -> None:
    nodes = pipeline(llm_on(tmp_path), mode).run(documents=documents())
    assert set(origins(llm_on(tmp_path), nodes, mode)) == {"disk"}


def test_another_metadata_mode_does_not_find_prefilled_nodes() -> None:
    llm = llm_on("memory")
    nodes = pipeline(llm, MetadataMode.LLM).run(documents=documents()[:1])
    assert set(origins(llm, nodes, MetadataMode.NONE)) == {"computed"}


def test_nodes_are_returned_unchanged() -> None:
    nodes = [TextNode(text="The miller counts.", id_="n", metadata={"title": "T"})]
    before = [node.model_dump() for node in nodes]
    assert KVFusionPrefill(llm_on("memory"))(nodes) is nodes
    assert [node.model_dump() for node in nodes] == before


class Counted(KVFusionGenerator):
    """Counts calls of prefill."""

    prefills = 0

    def prefill(self, *args: Any, **kwargs: Any) -> Any:
        self.prefills += 1
        return super().prefill(*args, **kwargs)


def test_pipeline_cache_skips_nodes_stored_by_the_same_model(tmp_path: Path) -> None:
    cache = IngestionCache()

    def prefills(store: Any, architecture: str = "llama") -> int:
        generator = Counted(TorchModel(backbone(architecture)), store=store)
        pipeline(KVFusionLlamaIndexLLM(generator), cache=cache).run(documents=documents())
        return generator.prefills

    assert [prefills(tmp_path / "a"), prefills(tmp_path / "a")] == [1, 0]
    assert prefills(tmp_path / "b") == 1
    assert prefills(tmp_path / "a", "qwen2") == 1
    assert [prefills("memory"), prefills("memory")] == [1, 1]  # stores in memory are separate


def test_pipeline_cache_is_separate_for_namespaces(tmp_path: Path) -> None:
    cache, generator = IngestionCache(), KVFusionGenerator(TorchModel(backbone("llama")), store=tmp_path)
    for tenant in (generator, generator.with_namespace("b")):
        llm = KVFusionLlamaIndexLLM(tenant, max_new_tokens=1)
        nodes = pipeline(llm, cache=cache).run(documents=documents())
        assert "computed" not in origins(llm, nodes)


async def test_prefill_does_not_block_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, held = llm_on("memory"), threading.Event()
    monkeypatch.setattr(llm.generator, "prefill", lambda documents, **wording: held.wait(10))
    task = asyncio.create_task(KVFusionPrefill(llm).acall([TextNode(text="a")]))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not task.done()
    held.set()
    assert [node.text for node in await task] == ["a"]


# Prefetching


class SlowReranker(BaseNodePostprocessor):
    """Waits until prefetching has ended, and keeps the second node."""

    loading: Any

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        assert self.loading[0].result(10) == len(nodes)
        return nodes[1:2]


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_prefetched_nodes_are_in_memory_after_the_reranker(
    tmp_path: Path, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [NodeWithScore(node=node) for node in pipeline(llm_on(tmp_path)).run(documents=documents())]
    llm, loading = llm_on(tmp_path), list[Any]()
    prefetch = llm.generator.prefetch
    monkeypatch.setattr(llm.generator, "prefetch", lambda texts, **wording: loading.append(prefetch(texts, **wording)))
    engine = KVFusionSynthesizer(llm).as_query_engine(
        FixedRetriever(nodes), node_postprocessors=[KVFusionPrefetch(llm), SlowReranker(loading=loading)]
    )
    response = await engine.aquery(QUESTION) if asynchronous else engine.query(QUESTION)
    (source,) = response.metadata["kvfusion"]["sources"]
    assert (source["id"], source["origin"]) == (nodes[1].node.node_id, "memory")


def test_nodes_are_returned_when_the_queue_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, nodes = llm_on("memory"), [NodeWithScore(node=TextNode(text="a"))]

    def refuse(documents: Any, **wording: Any) -> None:
        raise OverloadError("too many wait")

    monkeypatch.setattr(llm.generator, "prefetch", refuse)
    assert KVFusionPrefetch(llm).postprocess_nodes(nodes) == nodes


# Errors


@pytest.mark.parametrize("kind", [KVFusionPrefill, KVFusionPrefetch])
def test_another_llm_and_a_generator_without_a_store_are_rejected(kind: Any) -> None:
    with pytest.raises(InvalidInputError, match=f"MockLLM, but {kind.__name__} needs"):
        kind(MockLLM())
    with pytest.raises(InvalidInputError, match="store=None"):
        kind(KVFusionLlamaIndexLLM(tiny_generator(store=None)))


def test_prefill_cannot_be_pickled() -> None:
    with pytest.raises(InvalidInputError, match="without num_workers"):
        pickle.dumps(KVFusionPrefill(llm_on("memory")))


def test_pipeline_with_several_processes_is_rejected() -> None:
    with pytest.raises(InvalidInputError, match="without num_workers"):
        pipeline(llm_on("memory"), disable_cache=True).run(documents=documents(), num_workers=2)
