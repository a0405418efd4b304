"""Copies of components share the loaded model, and pickling them says why it is impossible."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

pytest.importorskip("llama_index.core")

from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index_helpers import FixedRetriever
from tiny import generator as tiny_generator

from kvfusion_rag import InvalidInputError
from llama_index_kvfusion import (
    KVFusionCitationQueryEngine,
    KVFusionContextChatEngine,
    KVFusionLlamaIndexLLM,
    KVFusionPrefetch,
    KVFusionPrefill,
    KVFusionSynthesizer,
)

NODES = [NodeWithScore(node=TextNode(text="two grey doves sleep", id_="n1"), score=1.0)]


def llm() -> KVFusionLlamaIndexLLM:
    return KVFusionLlamaIndexLLM(tiny_generator(), max_new_tokens=4)


def chat_engine() -> KVFusionContextChatEngine:
    memory = ChatMemoryBuffer.from_defaults(token_limit=400)
    return KVFusionContextChatEngine.from_defaults(FixedRetriever(NODES), llm=llm(), memory=memory)


COMPONENTS: dict[str, tuple[Any, Any]] = {
    "llm": (llm, lambda made: str(made.complete("who built it?"))),
    "synthesizer": (lambda: KVFusionSynthesizer(llm()), lambda made: str(made.synthesize("who built it?", NODES))),
    "citation engine": (
        lambda: KVFusionCitationQueryEngine(FixedRetriever(NODES), llm()),
        lambda made: str(made.query("who built it?")),
    ),
    "chat engine": (chat_engine, lambda made: str(made.chat("who built it?"))),
    "prefill": (lambda: KVFusionPrefill(llm()), lambda made: len(made([node.node for node in NODES]))),
    "prefetch": (lambda: KVFusionPrefetch(llm()), lambda made: len(made.postprocess_nodes(NODES))),
}


@pytest.mark.parametrize("name", COMPONENTS)
@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy])
def test_a_copy_answers_as_its_original(name: str, clone: Any) -> None:
    make, use = COMPONENTS[name]
    made = make()
    copied = clone(made)
    assert copied is not made and use(copied) == use(make())


@pytest.mark.parametrize("name", COMPONENTS)
def test_pickling_says_why_it_is_impossible(name: str) -> None:
    with pytest.raises(InvalidInputError, match="cannot be"):
        pickle.dumps(COMPONENTS[name][0]())


def test_a_generator_is_shared_by_copies_and_cannot_be_pickled() -> None:
    made = tiny_generator()
    assert copy.deepcopy({"generator": made})["generator"] is copy.copy(made) is made
    with pytest.raises(InvalidInputError, match="load it with from_pretrained in each process"):
        pickle.dumps(made)
