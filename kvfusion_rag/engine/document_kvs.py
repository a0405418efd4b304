"""Keys and values (KVs) of documents under the model as it is now: names them, takes them from the store, or prefills.

Keeps the KVs of prefixes that documents see, and notices weights, threads and precision that change under a request.
Does not handle questions or answers.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future

import torch
from tqdm.auto import tqdm

from ..errors import InvalidInputError
from ..fusion.prefill import TOKENS_PER_PASS, kv_shape, prefill
from ..model.backbone import Backbone
from ..model.kv import DocumentKV
from ..schema import Origin
from ..store import FetchedKVs, KVRequest, Miss, Place, as_store, document_key

STORED_AT_ONCE = 128  # documents
PREFIXES = 32  # whose KVs stay in memory beside the store

Ids = tuple[int, ...]


class DocumentKVs:
    """Document KVs of one backbone, for all threads.

    Args:
        store: where document KVs are kept, as ``as_store`` takes it; ``None`` keeps nothing.
        namespace: part of every key.
        tokens_per_pass: padded tokens of one prefill pass; ``None`` for the device's default.
    """

    def __init__(self, backbone: Backbone, *, store: Place, namespace: str, tokens_per_pass: int | None) -> None:
        self.backbone = backbone
        self.store = as_store(store)
        self.namespace = namespace
        kind = "cpu" if backbone.device.type == "cpu" else "accelerator"
        self.tokens_per_pass = tokens_per_pass or TOKENS_PER_PASS[kind]
        self._prefixes: OrderedDict[str, DocumentKV] = OrderedDict()  # by store key, the last used one last
        self.kv_shape = kv_shape(backbone)
        self._weights, self._fingerprint = "", ""  # of the model at the last look
        self.refresh()

    def refresh(self) -> None:
        """Notice weights that were changed in place: documents then have other keys and are prefilled again."""
        digest = self.backbone.weights_digest
        if digest == self._weights:
            return
        facts = [self.backbone.fingerprint(), self.tokens_per_pass]
        self._fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        self._weights = digest  # last: whoever sees it takes the fingerprint as it is

    @property
    def model(self) -> str:
        """Everything that changes the bits of KVs besides the ids, as far as :meth:`refresh` has seen.

        That is the model, the shape of a prefill pass, and what the process may change at any time: the number of
        threads and the precision of matrix products.
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

    def key(self, token_ids: Ids, prefix: Ids) -> str:
        """Store key of a document's ids behind ``prefix``: the model and the namespace are in it."""
        seen = hashlib.sha256(json.dumps(prefix).encode()).hexdigest() if prefix else ""
        return document_key(f"{self.model}/{seen}", self.namespace, token_ids)

    def prefix_kv(self, prefix: Ids) -> DocumentKV | None:
        """KV of a prefix at positions 0..p-1, kept in the store like a document's; ``None`` for an empty one."""
        if not prefix:
            return None
        key = self.key(prefix, ())
        kv = self._prefixes.pop(key, None)
        if kv is None:
            kv = self.fetch({key: KVRequest(prefix)}, None, self.model, prefix=()).kvs[key]
        self._prefixes[key] = kv
        while len(self._prefixes) > PREFIXES:
            self._prefixes.popitem(last=False)
        return kv

    def fetch(
        self, wanted: Mapping[str, KVRequest], starts: Mapping[str, int] | None, model: str, *, prefix: Ids,
        keep: bool = True,
    ) -> FetchedKVs:  # fmt: skip
        """Documents from the store, or prefilled at ``starts`` (by default right after the prefix).

        Args:
            wanted: by store key.
            starts: position of each document's first token, by store key.
            model: what the store keys were made with.
            prefix: ids that every document sees.
            keep: hand over the KVs; otherwise they go to the store alone.

        Raises:
            InvalidInputError: the weights were changed after that; nothing is stored under a wrong key.
        """

        def compute(missing: Sequence[str]) -> Iterator[tuple[str, DocumentKV]]:
            computed = prefill(
                self.backbone,
                [wanted[key].token_ids for key in missing],
                self.prefix_kv(prefix),
                tokens_per_pass=self.tokens_per_pass,
                starts=None if starts is None else [starts[key] for key in missing],
            )
            for index, kv in computed:
                self.require_unchanged(model)
                yield missing[index], kv

        return self.store.fetch(wanted, self.kv_shape, self.backbone.device, compute, keep=keep)

    def get(self, keys: Mapping[str, Ids], prefix: Ids) -> dict[str, DocumentKV]:
        """KV of every key, from the store or computed now (and then stored)."""
        return self.fetch({key: KVRequest(ids) for key, ids in keys.items()}, None, self.model, prefix=prefix).kvs

    def store_all(
        self, keys: Mapping[str, Ids], prefix: Ids, *, progress: bool
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
                wanted = {key: KVRequest(keys[key]) for key in absent[start : start + STORED_AT_ONCE]}
                fetched = self.fetch(wanted, None, model, prefix=prefix, keep=False)
                origins |= fetched.origins
                misses |= fetched.misses
                bar.update(len(wanted))
        return origins, misses

    def prefetch(self, keys: Mapping[str, tuple[int, ...]]) -> Future[int]:
        """Begin to bring stored documents into memory; the future has how many are there."""
        return self.store.prefetch(keys, self.kv_shape, self.backbone.device)
