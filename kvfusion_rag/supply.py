"""Keys and values (KVs) of documents under the model as it is now: names them, takes them from the store, or prefills.

Owns the prefix that all documents see, and notices weights, threads and precision that change under a request. Knows
nothing of questions and answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future

import torch
from tqdm.auto import tqdm

from .backbone import Backbone
from .errors import InvalidInputError
from .kv import DocumentKV
from .prefill import TOKENS_PER_PASS, kv_shape, prefill, prefill_prefix
from .schema import Origin
from .store import Fetched, Miss, Place, Wanted, as_store, document_key

STORED_AT_ONCE = 128  # documents


class Supply:
    """Document KVs of one backbone and one prefix, for all threads.

    Args:
        prefix_ids: of what every document sees, maybe none.
        store: where document KVs are kept, as ``as_store`` takes it; ``None`` keeps nothing.
        namespace: part of every key.
        tokens_per_pass: padded tokens of one prefill pass; ``None`` for the device's default.
    """

    def __init__(
        self,
        backbone: Backbone,
        prefix_ids: Sequence[int],
        *,
        store: Place,
        namespace: str,
        tokens_per_pass: int | None,
    ) -> None:
        self.backbone = backbone
        self.store = as_store(store)
        self.namespace = namespace
        kind = "cpu" if backbone.device.type == "cpu" else "accelerator"
        self.tokens_per_pass = tokens_per_pass or TOKENS_PER_PASS[kind]
        self._prefix_ids = tuple(prefix_ids)
        self.prefix = prefill_prefix(backbone, self._prefix_ids)
        self.kv_shape = kv_shape(backbone)
        self._weights, self._fingerprint = "", ""  # of the model at the last look
        self.refresh()

    def refresh(self) -> None:
        """Notice weights that were changed in place: from then on documents have other keys, and prefix and all KVs
        are computed anew."""
        digest = self.backbone.weights_digest
        if digest == self._weights:
            return
        if self._weights:
            self.prefix = prefill_prefix(self.backbone, self._prefix_ids)
        facts = [self.backbone.fingerprint(), list(self._prefix_ids), self.tokens_per_pass]
        self._fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        self._weights = digest  # last: whoever sees it takes the fingerprint as it is

    @property
    def model(self) -> str:
        """Everything that changes the bits of a document's KV besides its ids, as far as :meth:`refresh` has seen.

        That is the model, the prefix, the shape of a prefill pass, and what the process may change at any time:
        the number of threads and the precision of matrix products.
        """
        return f"{self._fingerprint}/{torch.get_num_threads()}/{torch.get_float32_matmul_precision()}"

    def require_unchanged(self, model: str) -> None:
        """Raise InvalidInputError where :attr:`model` is no longer what keys were made with."""
        self.refresh()
        if self.model != model:
            raise InvalidInputError(
                f"the weights of {self.backbone.model_id!r}, its threads or its precision were changed while it was "
                "answering; change them between questions."
            )

    def key(self, token_ids: tuple[int, ...]) -> str:
        """Store key of a document's ids: the model and the namespace are in it."""
        return document_key(self.model, self.namespace, token_ids)

    def fetch(
        self, wanted: Mapping[str, Wanted], starts: Mapping[str, int] | None, model: str, *, keep: bool = True
    ) -> Fetched:
        """Documents from the store, or prefilled at ``starts`` (by default right after the prefix).

        Args:
            wanted: by store key.
            starts: position of each document's first token, by store key.
            model: what the store keys were made with.
            keep: hand over the KVs; otherwise they go to the store alone.

        Raises:
            InvalidInputError: the weights were changed after that; nothing is stored under a wrong key.
        """

        def compute(missing: Sequence[str]) -> Iterator[tuple[str, DocumentKV]]:
            computed = prefill(
                self.backbone,
                [wanted[key].token_ids for key in missing],
                self.prefix,
                tokens_per_pass=self.tokens_per_pass,
                starts=None if starts is None else [starts[key] for key in missing],
            )
            for index, kv in computed:
                self.require_unchanged(model)
                yield missing[index], kv

        return self.store.fetch(wanted, self.kv_shape, self.backbone.device, self._fingerprint, compute, keep=keep)

    def document_kvs(self, keys: Mapping[str, tuple[int, ...]]) -> dict[str, DocumentKV]:
        """KV of every key, from the store or computed now (and then stored)."""
        return self.fetch({key: Wanted(ids) for key, ids in keys.items()}, None, self.model).kvs

    def store_all(
        self, keys: Mapping[str, tuple[int, ...]], *, progress: bool
    ) -> tuple[dict[str, Origin], dict[str, Miss]]:
        """Compute what no local tier of the store has; where each document was, and why not in the store.

        KVs go to the store alone, pass by pass, so memory is bounded by its caps; and few documents at a time, so
        that a question about one of the others does not wait for all.
        """
        misses: dict[str, Miss] = {}
        origins: dict[str, Origin] = {key: tier for key in keys if (tier := self.store.tier_of(key)) is not None}
        absent = sorted((key for key in keys if key not in origins), key=lambda key: len(keys[key]))
        model = self.model
        with tqdm(
            total=len(keys), initial=len(origins), desc="prefill", unit="doc", delay=1, disable=not progress
        ) as bar:
            for start in range(0, len(absent), STORED_AT_ONCE):
                wanted = {key: Wanted(keys[key]) for key in absent[start : start + STORED_AT_ONCE]}
                fetched = self.fetch(wanted, None, model, keep=False)
                origins |= fetched.origins
                misses |= fetched.misses
                bar.update(len(wanted))
        return origins, misses

    def prefetch(self, keys: Mapping[str, tuple[int, ...]]) -> Future[int]:
        """Begin to bring stored documents into memory; the future has how many are there."""
        return self.store.prefetch(keys, self.kv_shape, self.backbone.device, self._fingerprint)
