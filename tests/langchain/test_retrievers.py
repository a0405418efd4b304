"""PrefetchingRetriever: documents are loaded while a reranker runs, and returned unchanged."""

from __future__ import annotations

import copy
from typing import Any

import pytest

pytest.importorskip("langchain_core")
pytest.importorskip("langchain_classic")

import tiny
from conversation_fakes import ChatRecorder
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document as LangChainDocument
from langchain_core.runnables import RunnableLambda
from langchain_routes import LastFirst, Shelf

from kvfusion_rag import DiskStore, DocumentStore, KVFusionGenerator, MemoryStore, OverloadError
from kvfusion_rag.fusion.torch_model import TorchModel
from langchain_kvfusion import ChatKVFusion, KVFusionLLM, PrefetchingRetriever

FOUND = Shelf().invoke("")


@pytest.mark.parametrize("make", [KVFusionLLM, ChatKVFusion])
async def test_documents_are_prefetched_and_returned_unchanged(make):
    fake = ChatRecorder()
    for inner in (Shelf(), RunnableLambda(lambda query: copy.deepcopy(FOUND))):
        retriever = PrefetchingRetriever(retriever=inner, llm=make(generator=fake))
        assert retriever.invoke("who?") == await retriever.ainvoke("who?") == FOUND
    assert [[d.id for d in documents if not isinstance(d, str)] for documents in fake.prefetched] == [
        ["lamp", "mill"]
    ] * 4


async def test_reranker_runs_after_prefetching_has_started():
    fake = ChatRecorder()
    seen: list[int] = []

    class Watching(LastFirst):
        def compress_documents(self, documents: Any, query: str, callbacks: Any = None) -> list[LangChainDocument]:
            seen.append(len(fake.prefetched))
            return super().compress_documents(documents, query, callbacks)

    wrapper = PrefetchingRetriever(retriever=Shelf(), llm=ChatKVFusion(generator=fake))
    reranked = ContextualCompressionRetriever(base_compressor=Watching(), base_retriever=wrapper)
    assert reranked.invoke("who?") == await reranked.ainvoke("who?") == FOUND[-1:]
    assert seen == [1, 2]


async def test_documents_are_returned_if_prefetching_fails(caplog):
    class Busy(ChatRecorder):
        def prefetch(self, documents: Any) -> Any:
            raise OverloadError("too many wait")

    caplog.set_level("INFO")
    retriever = PrefetchingRetriever(retriever=Shelf(), llm=ChatKVFusion(generator=Busy()))
    assert retriever.invoke("who?") == await retriever.ainvoke("who?") == FOUND
    assert "2 documents were not prefetched: too many wait" in caplog.text


def test_callbacks_are_passed_on_and_the_generator_is_not_shown():
    started: list[str] = []

    class Watch(BaseCallbackHandler):
        def on_retriever_start(self, serialized: Any, query: str, **kwargs: Any) -> None:
            started.append(kwargs.get("name") or "")

    retriever = PrefetchingRetriever(retriever=Shelf(), llm=ChatKVFusion(generator=ChatRecorder()))
    retriever.invoke("who?", {"callbacks": [Watch()]})
    assert started == ["PrefetchingRetriever", "Shelf"]
    assert "ChatRecorder" not in repr(retriever)


def test_prefetched_documents_are_loaded_from_memory(tmp_path):
    question = "Who?"
    before = KVFusionGenerator(TorchModel(tiny.backbone("llama")), store=DocumentStore(disk=DiskStore(tmp_path)))
    before.prefill([document.page_content for document in FOUND])
    gen = KVFusionGenerator(
        TorchModel(tiny.backbone("llama")), store=DocumentStore(memory=MemoryStore(), disk=DiskStore(tmp_path))
    )
    futures = []

    class Watched:
        def prefetch(self, documents: Any) -> Any:
            futures.append(gen.prefetch(documents))
            return futures[-1]

    llm = KVFusionLLM(generator=gen)
    watched = llm.model_copy(update={"generator": Watched()})
    found = PrefetchingRetriever(retriever=Shelf(), llm=watched).invoke(question)
    assert futures[0].result() == 2
    info = llm.generate([question], documents=found, max_tokens=1).generations[0][0].generation_info or {}
    assert [source["origin"] for source in info["sources"]] == ["memory", "memory"]
