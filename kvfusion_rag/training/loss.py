"""The loss of KV-Fusion: next-token loss on the answer, given the question and the fused cache (paper section 3.2).

The documents' keys and values come from the frozen prefill decoder Dp and carry no gradient; the gradient
reaches the answering decoder Dt alone.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from ..engine import Engine
from ..errors import UnsupportedModelError
from ..fusion import fuse
from ..gate import TOLERANCE
from ..kv import DocumentKV
from ..positions import packed_mask
from .examples import Batch, Example, collate


def fusion_loss(engine: Engine, batch: Batch) -> torch.Tensor:
    """Sum over the batch's target tokens of the negative log-likelihood, a float32 scalar with gradients.

    The caller divides by the number of target tokens, so that accumulated batches weigh tokens alike. Questions on
    the same documents read one fused context; loss and gradients are those of a row for each.

    Args:
        engine: its backbone prefills (and its store keeps) the documents, its decoder is trained.
        batch: examples, fused or joined.
    """
    trained = batch.labels != -100  # (R, Q)
    kept = trained.any(dim=0).nonzero()[:, 0]  # a vocabulary of logits for each question token would fill the memory
    logits = batch_logits(engine, batch, kept)
    labels, trained = (part[:, kept].to(logits.device) for part in (batch.labels, trained))
    return cross_entropy(logits[trained].float(), labels[trained], reduction="sum")


def batch_logits(engine: Engine, batch: Batch, kept: torch.Tensor) -> torch.Tensor:
    """Logits (R, N, V) of Dt at the columns ``kept`` (N,), over keys and values that Dp made without a gradient."""
    firsts = [group[0] for group in batch.groups]  # speaks for its group's documents
    keys = {key: ids for example in firsts for key, ids in example.documents.items()}
    prefix = engine.encoder.prefix_ids
    kvs, prefix_kv = engine.supply.document_kvs(keys, prefix), engine.supply.prefix_kv(prefix)
    head = [] if prefix_kv is None else [prefix_kv]
    rows: list[list[DocumentKV]] = [
        [] if example.joined else [*head, *(kvs[key] for key in example.documents)] for example in firsts
    ]
    decoder = engine.decoder
    with torch.no_grad():
        context = fuse(rows, decoder.device)
    if batch.packed or decoder.checkpoints_activations:
        mask = packed_mask(context.mask, batch.question_of.to(decoder.device))  # (R, 1, Q, K + Q)
    else:
        mask = torch.cat([context.mask, batch.used.to(decoder.device)], dim=1)  # (R, K + Q)
    ids, positions, kept = (part.to(decoder.device) for part in (batch.ids, batch.positions, kept))
    return decoder.training_logits(ids, positions, mask, context.cache, kept)


@torch.inference_mode()
def checkpoint_exactly(engine: Engine, example: Example) -> None:
    """Turn gradient checkpointing of Dt on, and measure on ``example`` that it still reads the fused cache.

    Raises:
        UnsupportedModelError: it does not, so layers of this architecture do not hand the cache on.
    """
    decoder, batch = engine.decoder, collate([example])
    everywhere = torch.arange(batch.ids.shape[1])
    allowed = TOLERANCE[decoder.dtype]
    expected = batch_logits(engine, batch, everywhere).float()
    decoder.checkpoint_activations()
    try:
        found = batch_logits(engine, batch, everywhere).float()
        error = float((found - expected).norm() / expected.norm())
        cause = f"logits have a relative error of {error:.1e}, allowed {allowed:.0e}"
    except torch.OutOfMemoryError:
        raise  # says nothing about the architecture
    except (ValueError, TypeError, RuntimeError, AttributeError) as failure:
        error, cause = float("nan"), f"its layers fail ({failure})"
    if not error <= allowed:  # NaN fails
        raise UnsupportedModelError(
            f"{decoder.model_id!r} ({decoder.config.model_type}) loses the fused cache under gradient checkpointing: "
            f"{cause}; train without gradient_checkpointing."
        )
