"""The loss of many questions over a group of documents in one pass, with gradients for documents and questions.

Documents of a group are read apart, their keys and values are joined, and all questions of the group are packed into
one row and read over them, blind to each other. ``CacheReader`` does that with any model of transformers and its
cache; ``BertReader`` does the same for a ``BertLMHeadModel`` in functions of its own, compiled for fixed shapes,
which is several times faster on a CPU. A test holds both against the product's own loss. Knows no text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch.nn.functional import cross_entropy, dropout, gelu, layer_norm, linear, one_hot
from transformers import BertConfig, BertLMHeadModel, DynamicCache, PreTrainedModel

from kvfusion_rag.positions import additive, bidirectional_mask, packed_mask

Weights = Mapping[str, torch.Tensor]
KeysAndValues = list[tuple[torch.Tensor, torch.Tensor]]  # (rows, heads, tokens, d) of each layer
HIDDEN = -30_000.0  # added to the logits of slots that must not be seen; bfloat16 can hold it


@dataclass(frozen=True, slots=True)
class GroupBatch:
    """G groups of D documents each, and their questions packed into one row a group.

    Attributes:
        documents: (G * D, T) ids, right-padded with 0, read in both directions.
        ids, positions: (G, Q) questions with their answers, one after the other.
        owner: (G, Q) number of the question that an id belongs to, -1 for padding.
        targets: (M,) flat indices into (G, Q) whose next token is trained, padded with 0.
        labels: (M,) those next tokens, -100 for padding.
        sources: (G, K) number of the document that a slot of the fused context belongs to.
        golds: (M,) number of the document that answers, where the first token of an answer is asked for; else, and
            where none answers, -1.
        questions: how many there are.
    """

    documents: torch.Tensor
    ids: torch.Tensor
    positions: torch.Tensor
    owner: torch.Tensor
    targets: torch.Tensor
    labels: torch.Tensor
    sources: torch.Tensor
    golds: torch.Tensor
    questions: int

    @property
    def trained_tokens(self) -> int:
        return int((self.labels != -100).sum())


class Losses(NamedTuple):
    """Of one batch.

    Attributes:
        answer: sum over the trained tokens of their negative log-likelihood.
        attention: mean over the answerable questions, where the first token of the answer is asked for, and over the
            guided layers of ``-log`` (share of the attention on documents that the answering one gets); 0 where no
            layer is guided.
        found: share of those questions whose answering document gets more attention than any other, mean over the
            guided layers.
    """

    answer: torch.Tensor
    attention: torch.Tensor
    found: torch.Tensor


class Reader(Protocol):
    def loss(self, batch: GroupBatch) -> Losses:
        """Loss of a batch, with gradients."""
        ...


class CacheReader:
    """Any causal language model, read through transformers' own forward pass and cache.

    Args:
        bidirectional: documents are read in both directions.
        dtype: of matrix products (autocast); the weights stay as they are.
    """

    def __init__(self, model: PreTrainedModel, *, bidirectional: bool, dtype: torch.dtype = torch.bfloat16) -> None:
        self._model, self._bidirectional, self._dtype = model, bidirectional, dtype

    def loss(self, batch: GroupBatch) -> Losses:
        place, enabled = self._model.device, self._dtype != torch.float32
        with torch.autocast(place.type, self._dtype, enabled=enabled):
            context, seen = self._read_documents(batch.documents.to(place), len(batch.ids))
            mask = additive(packed_mask(seen, batch.owner.to(place)), self._model.dtype)
            row, column = batch.targets // batch.ids.shape[1], batch.targets % batch.ids.shape[1]
            wanted, place_of = torch.unique(column, return_inverse=True)
            logits = self._model(
                input_ids=batch.ids.to(place),
                position_ids=batch.positions.to(place),
                attention_mask=mask,
                past_key_values=context,
                use_cache=True,
                logits_to_keep=wanted.to(place),
            ).logits  # (G, W, V)
        asked = logits[row, place_of].float()  # (M, V)
        answer = cross_entropy(asked, batch.labels.to(place), ignore_index=-100, reduction="sum")
        return Losses(answer, answer.new_zeros(()), answer.new_zeros(()))

    def _read_documents(self, ids: torch.Tensor, groups: int) -> tuple[DynamicCache, torch.Tensor]:
        """The documents' joined cache of every group, and which of its slots (G, K) are real."""
        used = ids != 0
        lengths, size = used.sum(dim=1).clamp(min=1), ids.shape[1]
        apart, joined = DynamicCache(config=self._model.config), DynamicCache(config=self._model.config)
        two_way = additive(bidirectional_mask(0, lengths, size), self._model.dtype)
        self._model.get_decoder()(
            input_ids=ids,
            position_ids=torch.arange(size, device=ids.device).expand(ids.shape),
            attention_mask=two_way if self._bidirectional else torch.ones_like(ids),
            past_key_values=apart,
            use_cache=True,
        )
        for layer, (keys, values, *_) in enumerate(apart):
            joined.update(_fuse(keys, groups), _fuse(values, groups), layer)
        return joined, used.view(groups, -1)


class BertReader:
    """A BERT decoder whose documents are read in both directions.

    Args:
        compiled: compile the computation for each shape of batch; slow at first, twice as fast afterwards.
        guided: in how many of the last layers attention is taught to find the answering document.
        dropout: of embeddings and of what each half of a layer adds; drawn from torch's own generator.
    """

    def __init__(
        self,
        model: BertLMHeadModel,
        *,
        compiled: bool,
        dtype: torch.dtype = torch.bfloat16,
        guided: int = 0,
        dropout: float = 0.0,
    ) -> None:
        self._weights = dict(model.named_parameters())
        self._network = _Network(model.config, dtype, guided, dropout)
        run: Callable[..., Losses] = self._network.loss
        self._loss = torch.compile(run, dynamic=False) if compiled else run

    def loss(self, batch: GroupBatch) -> Losses:
        """Loss of a batch, with gradients."""
        return Losses(
            *self._loss(
                self._weights, batch.documents, batch.ids, batch.positions, batch.owner, batch.targets, batch.labels,
                batch.sources, batch.golds,
            )
        )  # fmt: skip


class _Network:
    """The BERT decoder as functions of its weights."""

    def __init__(self, config: BertConfig, dtype: torch.dtype, guided: int, drops: float) -> None:
        self._layers = config.num_hidden_layers
        self._heads = config.num_attention_heads
        self._epsilon = config.layer_norm_eps
        self._dtype = dtype
        self._drops = drops
        self._guided = range(self._layers - guided, self._layers)

    def loss(
        self,
        weights: Weights,
        documents: torch.Tensor,
        ids: torch.Tensor,
        positions: torch.Tensor,
        owner: torch.Tensor,
        targets: torch.Tensor,
        labels: torch.Tensor,
        sources: torch.Tensor,
        golds: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        low = {name: weight.to(self._dtype) for name, weight in weights.items()}
        groups = len(ids)
        cache, unseen = self._read_documents(low, documents)
        fused = [(_fuse(keys, groups), _fuse(values, groups)) for keys, values in cache]
        hidden, masses = self._read_questions(low, fused, unseen.view(groups, -1), ids, positions, owner, sources)
        logits = self._predict(low, hidden.flatten(0, 1)[targets])
        answer = cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")
        if not masses:
            return answer, answer.new_zeros(()), answer.new_zeros(())
        return answer, *_guide(torch.stack(masses).flatten(1, 2)[:, targets], golds)

    def _read_documents(self, w: Weights, ids: torch.Tensor) -> tuple[KeysAndValues, torch.Tensor]:
        """Keys and values of separate documents, and what hides their padding, (rows, T)."""
        unseen = torch.where(ids != 0, 0.0, HIDDEN).to(self._dtype)
        x = self._embed(w, ids, torch.arange(ids.shape[1]))
        cache: KeysAndValues = []
        for layer in range(self._layers):
            query, key, value = self._project(w, x, layer)
            cache.append((key, value))
            if layer + 1 < self._layers:  # the last layer's output is never read
                x = self._finish(w, x, _attend(query, key, value, unseen[:, None, None, :]), layer)
        return cache, unseen

    def _read_questions(
        self,
        w: Weights,
        fused: KeysAndValues,
        unseen: torch.Tensor,
        ids: torch.Tensor,
        positions: torch.Tensor,
        owner: torch.Tensor,
        sources: torch.Tensor,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Packed questions over the fused documents.

        Returns:
            Last hidden states (G, Q, width), and for each guided layer the attention, mean over heads, that each
            document gets, (G, Q, D).
        """
        groups, length = ids.shape
        own = (owner[:, :, None] == owner[:, None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
        hidden = torch.where(own, 0.0, HIDDEN).to(self._dtype)
        bias = torch.cat([unseen[:, None, :].expand(groups, length, -1), hidden], dim=-1)[:, None]  # (G, 1, Q, K + Q)
        x = self._embed(w, ids, positions)
        belongs = one_hot(sources).to(self._dtype)  # (G, K, D)
        masses = []
        for layer in range(self._layers):
            query, key, value = self._project(w, x, layer)
            keys, values = (torch.cat(pair, dim=2) for pair in zip(fused[layer], (key, value), strict=True))
            shares = _shares(query, keys, bias)
            if layer in self._guided:
                masses.append(torch.matmul(shares[..., : sources.shape[1]].mean(dim=1), belongs).float())
            x = self._finish(w, x, torch.matmul(shares, values), layer)
        return x, masses

    def _embed(self, w: Weights, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        name = "bert.embeddings"
        x = w[f"{name}.word_embeddings.weight"][ids] + w[f"{name}.position_embeddings.weight"][positions]
        x = self._norm(w, x + w[f"{name}.token_type_embeddings.weight"][0], f"{name}.LayerNorm")
        return dropout(x, self._drops)

    def _project(self, w: Weights, x: torch.Tensor, layer: int) -> list[torch.Tensor]:
        """Queries, keys and values, each (rows, heads, tokens, d)."""
        name = f"bert.encoder.layer.{layer}.attention.self"
        parts = [_linear(w, x, f"{name}.{part}") for part in ("query", "key", "value")]
        return [part.view(*x.shape[:2], self._heads, -1).transpose(1, 2) for part in parts]

    def _finish(self, w: Weights, x: torch.Tensor, attended: torch.Tensor, layer: int) -> torch.Tensor:
        """The rest of a layer after attention (rows, heads, tokens, d)."""
        name = f"bert.encoder.layer.{layer}"
        attended = _linear(w, attended.transpose(1, 2).reshape(x.shape), f"{name}.attention.output.dense")
        x = self._norm(w, x + dropout(attended, self._drops), f"{name}.attention.output.LayerNorm")
        inner = _linear(w, gelu(_linear(w, x, f"{name}.intermediate.dense")), f"{name}.output.dense")
        return self._norm(w, x + dropout(inner, self._drops), f"{name}.output.LayerNorm")

    def _predict(self, w: Weights, x: torch.Tensor) -> torch.Tensor:
        name = "cls.predictions"
        x = self._norm(w, gelu(_linear(w, x, f"{name}.transform.dense")), f"{name}.transform.LayerNorm")
        return linear(x, w["bert.embeddings.word_embeddings.weight"], w[f"{name}.bias"])

    def _norm(self, w: Weights, x: torch.Tensor, name: str) -> torch.Tensor:
        return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], self._epsilon)


def _linear(w: Weights, x: torch.Tensor, name: str) -> torch.Tensor:
    return linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.matmul(_shares(query, key, bias), value)


def _shares(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    # Written out: on a CPU, scaled_dot_product_attention is slower than this in training at such sizes.
    scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(-1, -2)) + bias
    return scores.softmax(dim=-1)


def _guide(masses: torch.Tensor, golds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and success of attention that should go to document ``golds`` (M,), from (layers, M, D)."""
    known = (golds >= 0).float()
    shares = masses / masses.sum(dim=-1, keepdim=True).clamp(min=1e-6)
    gold = shares.gather(-1, golds.clamp(min=0)[None, :, None].expand(len(shares), -1, 1)).squeeze(-1)
    found = (shares.argmax(dim=-1) == golds).float()
    loss, right = ((values * known).sum(dim=-1).mean() for values in (-gold.clamp(min=1e-6).log(), found))
    questions = known.sum().clamp(min=1)
    return loss / questions, right / questions


def _fuse(rows: torch.Tensor, groups: int) -> torch.Tensor:
    """RES: (G * D, heads, T, d) -> (G, heads, D * T, d)."""
    return rows.view(groups, -1, *rows.shape[1:]).transpose(1, 2).flatten(2, 3)
