"""The losses of KV-Fusion: cross entropy of the answer, given question and fused cache (paper section 3.2), or the
divergence from the base model over the gold passages only.

The documents' KV comes from the frozen prefill decoder Dp and has no gradient. Only the answering decoder Dt is
trained. Shapes: B batch rows, K fused slots, Q question tokens, C kept columns of Q, A target tokens of the batch, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from ..engine.document_kvs import Scope
from ..engine.engine import Engine
from ..errors import UnsupportedModelError
from ..fusion.fused_cache import fuse
from ..fusion.torch_model import TorchModel
from ..model.kv import DocumentKV
from ..model.positions import packed_mask
from ..model.tolerance import TOLERANCE, relative_error
from .examples import Batch, Example, collate


def fusion_loss(engine: Engine[TorchModel], batch: Batch) -> torch.Tensor:
    """Return the negative log-likelihood summed over the batch's target tokens, a float32 scalar with gradients.

    The caller divides by the number of target tokens, so that tokens of all accumulated batches have equal weight.
    Questions with the same documents read one fused cache; loss and gradients are those of separate rows.

    Args:
        engine: engine whose backbone prefills the documents and whose decoder is trained.
        batch: examples, fused or joined.
    """
    logits = _target_logits(engine, batch, _prefilled(engine, _members(batch)))
    labels = batch.labels[batch.labels != -100]
    return cross_entropy(logits.float(), labels.to(logits.device), reduction="sum")


def distillation_loss(engine: Engine[TorchModel], batch: Batch) -> torch.Tensor:
    """Return KL(base || Dt) in nats summed over the batch's target tokens, a float32 scalar with gradients.

    The base model reads the gold passages only, Dt all passages. At each token both have read the same beginning of
    the answer.

    Args:
        engine: as in :func:`fusion_loss`; the adapter is off while the base model reads.
        batch: examples that were encoded with ``loss="distill"``.
    """
    members = _members(batch)
    bases = [example.base for example in members if example.base is not None]
    kvs = _prefilled(engine, [*members, *bases])
    # The base model comes first, since gradient checkpointing allows nothing between Dt's two passes.
    expected = base_log_probabilities(engine, bases, kvs)
    found = log_softmax(_target_logits(engine, batch, kvs).float(), dim=-1)
    return kl_div(found, expected, log_target=True, reduction="sum")


@torch.no_grad()
def base_log_probabilities(
    engine: Engine[TorchModel], examples: Sequence[Example], kvs: Mapping[str, DocumentKV] | None = None
) -> torch.Tensor:
    """Return the log probabilities (A, V) of the base model for the target tokens of ``examples``, in order.

    Args:
        kvs: document KVs by key, if they are already computed.
    """
    batch = collate(examples)
    logits = _target_logits(engine, batch, kvs or _prefilled(engine, examples), tuned=False)
    members = _members(batch)  # in a different order, because examples with the same documents are grouped
    pieces = logits.split([len(example.target) for example in members])
    piece_of = {id(example): piece for example, piece in zip(members, pieces, strict=True)}
    return log_softmax(torch.cat([piece_of[id(example)] for example in examples]).float(), dim=-1)


def _members(batch: Batch) -> list[Example]:
    """Return the examples of ``batch`` in the order of their target tokens."""
    return [example for group in batch.groups for example in group]


def _prefilled(engine: Engine[TorchModel], examples: Sequence[Example]) -> dict[str, DocumentKV]:
    """Return the KVs of all documents in ``examples`` by store key."""
    kvs: dict[str, DocumentKV] = {}
    for prefix in dict.fromkeys(example.prefix for example in examples):
        documents = [example.documents for example in examples if example.prefix == prefix]
        merged = {key: ids for keys in documents for key, ids in keys.items()}
        kvs |= engine.document_kvs.get(merged, Scope(prefix))
    return kvs


def _target_logits(
    engine: Engine[TorchModel], batch: Batch, kvs: Mapping[str, DocumentKV], *, tuned: bool = True
) -> torch.Tensor:
    """Return the logits (A, V) of all target tokens of ``batch``."""
    trained = batch.labels != -100  # (B, Q)
    kept = trained.any(dim=0).nonzero()[:, 0]  # logits of all question tokens would need too much memory
    logits = batch_logits(engine, batch, kept, kvs, tuned=tuned)
    return logits[trained[:, kept].to(logits.device)]  # (B, C, V) -> (A, V)


def batch_logits(
    engine: Engine[TorchModel],
    batch: Batch,
    kept: torch.Tensor,
    kvs: Mapping[str, DocumentKV] | None = None,
    *,
    tuned: bool = True,
) -> torch.Tensor:
    """Return the logits (B, C, V) of Dt at the columns ``kept`` (C,), over document KVs of Dp without gradients.

    Args:
        kvs: document KVs by key, if they are already computed.
        tuned: whether to use Dt; False for the base model.
    """
    kvs = _prefilled(engine, _members(batch)) if kvs is None else kvs
    firsts = [group[0] for group in batch.groups]  # all examples of a group have its documents
    prefixes = [None if first.joined else engine.document_kvs.prefix_kv(Scope(first.prefix)) for first in firsts]
    rows = [[kvs[key] for key in first.documents] for first in firsts]
    decoder = engine.model.decoder if tuned else engine.model.backbone
    with torch.no_grad():
        context = fuse(rows, decoder.device, prefixes)
    if batch.packed or decoder.checkpoints_activations:
        mask = packed_mask(context.mask, batch.question_of.to(decoder.device))  # (B, 1, Q, K + Q)
    else:
        mask = torch.cat([context.mask, batch.used.to(decoder.device)], dim=1)  # (B, K + Q)
    ids, positions, kept = (part.to(decoder.device) for part in (batch.ids, batch.positions, kept))
    return decoder.training_logits(ids, positions, mask, context.cache, kept, tuned=tuned)


@torch.inference_mode()
def checkpoint_exactly(engine: Engine[TorchModel], example: Example) -> None:
    """Turn on gradient checkpointing of Dt, and check on ``example`` that it still reads the fused cache.

    Raises:
        UnsupportedModelError: layers of this architecture do not pass on the cache.
    """
    decoder, batch = engine.model.decoder, collate([example])
    columns = torch.arange(batch.ids.shape[1])
    allowed = TOLERANCE[decoder.dtype]
    expected = batch_logits(engine, batch, columns).float()
    decoder.checkpoint_activations()
    try:
        logits = batch_logits(engine, batch, columns).float()
        error = relative_error(logits, expected)
        cause = f"logits have a relative error of {error:.1e}, allowed {allowed:.0e}"
    except torch.OutOfMemoryError:
        raise  # not a property of the architecture
    except (ValueError, TypeError, RuntimeError, AttributeError) as failure:
        error, cause = float("nan"), f"its layers fail ({failure})"
    if not error <= allowed:  # NaN fails
        raise UnsupportedModelError(
            f"{decoder.model_id!r} ({decoder.config.model_type}) loses the fused cache under gradient checkpointing: "
            f"{cause}; train without gradient_checkpointing."
        )
