"""Small random generators over the stores of a test."""

from functools import cache
from pathlib import Path

from tiny import backbone

from kvfusion_rag import Answer, DiskStore, Document, DocumentStore, KVFusionGenerator
from kvfusion_rag.engine.engine import EngineOptions
from kvfusion_rag.fusion.torch_model import TorchModel
from kvfusion_rag.model.backbone import Backbone
from kvfusion_rag.schema import KeyKindChoice
from kvfusion_rag.store import Place

DOCUMENTS = [Document("the mill was built in 1874", title="mill"), "the river runs past", "two grey doves sleep"]
llama = cache(lambda: backbone("llama"))  # for tests that leave its weights alone


def over(
    store: Place, *, model: Backbone | None = None, key_kind: KeyKindChoice = "auto", **options
) -> KVFusionGenerator:
    return KVFusionGenerator(
        TorchModel(model or llama()), store=store, options=EngineOptions(key_kind=key_kind), **options
    )


def over_disk(folder: Path, **options) -> KVFusionGenerator:
    """A generator over a disk tier without memory in front."""
    return over(DocumentStore(None, DiskStore(folder / "s")), **options)


def ask(gen: KVFusionGenerator, tokens: int = 2) -> Answer:
    return gen.answer("who?", DOCUMENTS, max_new_tokens=tokens)


def origins(answer: Answer) -> set[str]:
    return {source.origin for source in answer.sources}
