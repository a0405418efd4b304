"""Document KVs under the model's current weights: their store keys, and how they are fetched or computed.

Keeps the KVs of prefixes, and notices weights, threads and precision that change between requests.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from ..errors import InvalidInputError
from ..fusion.interface import FusionModel
from ..model.forks import ForkGuard
from ..model.kv import DocumentKV
from ..schema import Origin
from ..store import FetchedKVs, KVRequest, Miss, Place, as_store, document_key

PASSES_AT_ONCE = 4  # full passes between two pauses when documents are prefilled into the store
PREFIXES_IN_MEMORY = 32

Ids = tuple[int, ...]


class Scope(NamedTuple):
    """What a document's KV depends on besides model and ids: the ids in front of it, and its tenant's namespace."""

    prefix: Ids = ()
    namespace: str = ""


class DocumentKVs:
    """Document KVs of one model, for all threads and namespaces.

    Args:
        store: where KVs are kept, as ``as_store`` takes it; None keeps nothing.
    """

    def __init__(self, model: FusionModel, *, store: Place) -> None:
        self.model = model
        self.store = as_store(store)
        self._prefixes: OrderedDict[str, DocumentKV] = OrderedDict()  # by store key, least recently used first
        self._weights, self._fingerprint = "", ""  # as of the last refresh
        self._fork_guard = ForkGuard()
        self.refresh()

    def refresh(self) -> None:
        """Notice weights that were changed in place: documents then get other keys and are prefilled again.

        Raises:
            ForkedProcessError: this process was forked and would hang.
        """
        self._fork_guard.require_threads()
        digest = self.model.weights_digest
        if digest == self._weights:
            return
        facts = [self.model.fingerprint(), self.model.tokens_per_pass]
        self._fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        self._weights = digest  # last, so that no other thread reads an old fingerprint with the new digest

    @property
    def version(self) -> str:
        """Everything besides ids and scope that changes the bits of KVs, as of the last :meth:`refresh`.

        That is the model, the shape of a prefill pass, and what a process may change at any time: the number of
        threads and the precision of matrix products.
        """
        return f"{self._fingerprint}/{torch.get_num_threads()}/{torch.get_float32_matmul_precision()}"

    def require_version(self, version: str) -> None:
        """Raise InvalidInputError if :attr:`version` is no longer the one that keys were made with."""
        self.refresh()
        if self.version != version:
            raise InvalidInputError(
                f"the weights, threads or precision of {self.model.model_id!r} changed while it was answering; change "
                "them between questions."
            )

    def key(self, token_ids: Ids, scope: Scope) -> str:
        """Return the store key of a document's ids in ``scope`` under the current model."""
        prefix = hashlib.sha256(json.dumps(scope.prefix).encode()).hexdigest() if scope.prefix else ""
        return document_key(f"{self.version}/{prefix}", scope.namespace, token_ids)

    def prefix_kv(self, scope: Scope) -> DocumentKV | None:
        """Return the KV of the scope's prefix at positions 0..p-1, or None if the prefix is empty."""
        if not scope.prefix:
            return None
        prefix_scope = Scope((), scope.namespace)  # the prefix is stored like a document without one
        key = self.key(scope.prefix, prefix_scope)
        kv = self._prefixes.pop(key, None)
        if kv is None:
            kv = self.fetch({key: KVRequest(scope.prefix)}, None, self.version, prefix_scope).kvs[key]
        self._prefixes[key] = kv
        while len(self._prefixes) > PREFIXES_IN_MEMORY:
            self._prefixes.popitem(last=False)
        return kv

    def fetch(
        self,
        requests: Mapping[str, KVRequest],
        starts: Mapping[str, int] | None,
        version: str,
        scope: Scope,
        *,
        keep: bool = True,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> FetchedKVs:
        """Take documents from the store, or prefill them.

        Args:
            requests: requested documents by store key.
            starts: position of each document's first token, by store key. Default: right behind the prefix.
            version: :attr:`version` that the keys were made with.
            scope: scope of all documents.
            keep: return the KVs; otherwise they only go to the store.
            is_cancelled: asked after each pass.

        Raises:
            CancelledError: ``is_cancelled`` returned True. What was computed until then is stored.
            InvalidInputError: the weights changed in the meantime. Nothing is stored under a wrong key.
        """

        def compute(missing: Sequence[str]) -> Iterator[tuple[str, DocumentKV]]:
            computed = self.model.prefill(
                [requests[key].token_ids for key in missing],
                self.prefix_kv(scope),
                None if starts is None else [starts[key] for key in missing],
            )
            for index, kv in computed:
                self.require_version(version)
                yield missing[index], kv
                if is_cancelled():
                    raise CancelledError

        return self.store.fetch(requests, self.model.kv_shape, self.model.device, compute, keep=keep)

    def get(self, keys: Mapping[str, Ids], scope: Scope) -> dict[str, DocumentKV]:
        """Return the KV of every key, from the store or computed now (and then stored)."""
        return self.fetch({key: KVRequest(ids) for key, ids in keys.items()}, None, self.version, scope).kvs

    def store_steps(
        self, keys: Mapping[str, Ids], scope: Scope, *, progress: bool
    ) -> Generator[None, None, tuple[dict[str, Origin], dict[str, Miss]]]:
        """Compute the documents that no local tier has, and return each document's origin and miss reason.

        KVs only go to the store, pass by pass, so the store's caps bound the memory. A step computes a few passes or
        one long document. Few documents are claimed at a time, so that a question about one of the others does not
        wait for all.
        """
        misses: dict[str, Miss] = {}
        origins: dict[str, Origin] = {key: tier for key in keys if (tier := self.store.tier_of(key)) is not None}
        version = self.version
        with tqdm(
            total=len(keys), initial=len(origins), desc="prefill", unit="doc", delay=1, disable=not progress
        ) as bar:
            for part in self._parts({key: ids for key, ids in keys.items() if key not in origins}):
                fetched = self.fetch(part, None, version, scope, keep=False)
                origins |= fetched.origins
                misses |= fetched.misses
                bar.update(len(part))
                yield
        return origins, misses

    def _parts(self, keys: Mapping[str, Ids]) -> Iterator[dict[str, KVRequest]]:
        """Yield documents of similar length together, at most ``PASSES_AT_ONCE`` passes of them."""
        part: dict[str, KVRequest] = {}
        tokens, most = 0, PASSES_AT_ONCE * self.model.tokens_per_pass
        for key, ids in sorted(keys.items(), key=lambda item: len(item[1])):
            if part and tokens + len(ids) > most:
                yield part
                part, tokens = {}, 0
            part[key] = KVRequest(ids)
            tokens += len(ids)
        if part:
            yield part

    def prefetch(self, keys: Mapping[str, Ids]) -> Future[int]:
        """Start loading stored documents into memory; the future's result is the number of documents there."""
        return self.store.prefetch(keys, self.model.kv_shape, self.model.device)
