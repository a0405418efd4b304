"""Document KVs under the model's current weights: their store keys, and how they are fetched or computed.

Keeps the KVs of prefixes, and notices weights, threads and precision that change between requests.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from ...errors import InvalidInputError, StoreError
from ...fusion.interface import FusionModel
from ...model.forks import ForkGuard
from ...model.kv import DocumentKV
from ...schema import KeyKind, KeyKindChoice, Origin
from ...store import Computing, FetchedKVs, KVRequest, Miss, Place, as_store, document_key, write_environment
from .environments import PROBE_NAMESPACE, Environments, environment_digest, probe_ids

logger = logging.getLogger(__name__)

PASSES_AT_ONCE = 4  # full passes between two pauses when documents are prefilled into the store
CHECKED_AT_ONCE = 256  # documents that the remote tier is asked for between two pauses
PREFIXES_IN_MEMORY = 32

Ids = tuple[int, ...]


class Scope(NamedTuple):
    """What a document's KV depends on besides model and ids: the ids in front of it, and its tenant's namespace."""

    prefix: Ids = ()
    namespace: str = ""


class Stored(NamedTuple):
    """Documents that a store was filled with, by store key.

    Attributes:
        origins: where each document came from.
        misses: why no tier had a document that was computed.
        lost: why the slowest tier lacks a document, including prefix and probe. Empty unless it had to keep all.
    """

    origins: dict[str, Origin]
    misses: dict[str, Miss]
    lost: dict[str, str]


class DocumentKVs:
    """Document KVs of one model, for all threads and namespaces.

    Args:
        store: where KVs are kept, as ``as_store`` takes it; None keeps nothing.
        key_kind: what store keys promise. "auto" is "portable" for a store behind a URL, and "exact" otherwise.
    """

    def __init__(self, model: FusionModel, *, store: Place, key_kind: KeyKindChoice = "auto") -> None:
        self.model = model
        self.store = as_store(store)
        shared: KeyKind = "exact" if self.store.remote is None else "portable"
        self.key_kind: KeyKind = shared if key_kind == "auto" else key_kind
        self._environments: Environments | None = None  # of portable keys, under the version in front of it
        self._measured_version = ""
        self._described = ""  # the environment whose facts were written last
        self._probe: dict[str, Ids] = {}  # token ids of this environment's probe by store key
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
        if self.key_kind == "exact":
            facts = [self.model.fingerprint(), self.model.tokens_per_pass]
            self._fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        else:
            self._fingerprint = f"portable/{self.model.portable_fingerprint()}"
        self._weights = digest  # last, so that no other thread reads an old fingerprint with the new digest

    @property
    def version(self) -> str:
        """Everything besides ids and scope that a store key contains, as of the last :meth:`refresh`.

        Portable keys contain weights, configuration and dtype. Exact keys also contain whatever changes the bits of a
        KV: the environment, the shape of a prefill pass, and what a process may change at any time, which is the
        number of threads and the precision of matrix products.
        """
        if self.key_kind == "portable":
            return self._fingerprint
        return f"{self._fingerprint}/{torch.get_num_threads()}/{torch.get_float32_matmul_precision()}"

    @property
    def environment(self) -> str:
        """Digest of what changes the rounding of a KV, stored beside each document."""
        return environment_digest(self._environment_facts())

    def _environment_facts(self) -> dict[str, object]:
        now = {"threads": torch.get_num_threads(), "precision": torch.get_float32_matmul_precision()}
        return {**self.model.environment(), **now, "tokens_per_pass": self.model.tokens_per_pass}

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

        fetched = self.store.fetch(
            requests, self.model.kv_shape, self.model.device, compute, keep=keep, computing=self._computing()
        )
        logger.debug("KVs of documents: %s", dict(Counter(fetched.origins.values())))
        return fetched

    def _computing(self) -> Computing:
        """Return this environment, and for portable keys also which others are accepted."""
        environment = self.environment
        if self.key_kind == "exact" or self.store.disk is None:
            return Computing(environment)
        known = self._environments
        if known is None or (self._measured_version, known.own) != (self.version, environment):
            known = self._measure_environment(environment)
        return Computing(environment, known.accepts)

    def _measure_environment(self, environment: str) -> Environments:
        """Compute this environment's probe and store it for the others."""
        ids, version = probe_ids(self.model.vocabulary_size), self.version

        def key_of(digest: str) -> str:
            return document_key(f"{version}/environment/{digest}", PROBE_NAMESPACE, ids)

        def stored(digest: str) -> DocumentKV | None:
            return self.store.read(key_of(digest), ids, self.model.kv_shape)

        def compute(keys: Sequence[str]) -> Iterator[tuple[str, DocumentKV]]:
            return ((keys[index], kv) for index, kv in self.model.prefill([ids] * len(keys), None))

        own = key_of(environment)
        found = self.store.fetch(
            {own: KVRequest(ids)}, self.model.kv_shape, self.model.device, compute, computing=Computing(environment)
        )
        compressed = self.store.disk is not None and self.store.disk.codec != "raw"
        self._environments = Environments(environment, found.kvs[own], stored, is_compressed=compressed)
        self._measured_version, self._probe = version, {own: ids}
        return self._environments

    def get(self, keys: Mapping[str, Ids], scope: Scope) -> dict[str, DocumentKV]:
        """Return the KV of every key, from the store or computed now (and then stored)."""
        return self.fetch({key: KVRequest(ids) for key, ids in keys.items()}, None, self.version, scope).kvs

    def store_steps(
        self, keys: Mapping[str, Ids], scope: Scope, *, progress: bool, durable: bool = False
    ) -> Generator[None, None, Stored]:
        """Compute the documents that no local tier has, and upload those that the remote tier has lost.

        KVs only go to the store, pass by pass, so the store's caps bound the memory. A step computes a few passes or
        one long document. Few documents are claimed at a time, so that a question about one of the others does not
        wait for all.

        Args:
            keys: token ids by store key.
            scope: scope of all documents.
            progress: show a progress bar if this takes longer than a second.
            durable: wait until the slowest tier has all documents.
        """
        misses: dict[str, Miss] = {}
        origins: dict[str, Origin] = {key: tier for key in keys if (tier := self.store.tier_of(key)) is not None}
        version, local = self.version, list(origins)
        with tqdm(
            total=len(keys), initial=len(origins), desc="prefill", unit="doc", delay=1, disable=not progress
        ) as bar:
            for part in self._parts({key: ids for key, ids in keys.items() if key not in origins}):
                fetched = self.fetch(part, None, version, scope, keep=False)
                origins |= fetched.origins
                misses |= fetched.misses
                bar.update(len(part))
                yield
        shared = {**self.store_prefix(scope, version), **self._probe}
        for start in range(0, len(local), CHECKED_AT_ONCE):
            self.store.refill({key: keys[key] for key in local[start : start + CHECKED_AT_ONCE]}, self.environment)
            yield
        self.store.refill(shared, self.environment)
        self._describe_environment()
        lost = self.store.settle({**keys, **shared}, self.environment) if durable else {}
        return Stored(origins, misses, lost)

    def _describe_environment(self) -> None:
        """Write the facts of this environment beside the documents that other machines may use, once."""
        tier, digest = self.store.slowest_tier, self.environment
        if self.key_kind == "exact" or tier is None or not tier.takes_uploads or digest == self._described:
            return
        try:
            write_environment(tier, digest, self._environment_facts())
        except StoreError as error:
            logger.warning("the facts of this environment are not stored: %s", error)
        self._described = digest

    def store_prefix(self, scope: Scope, version: str) -> dict[str, Ids]:
        """Store the scope's prefix if no tier has it. Return its ids by store key, or nothing without a prefix."""
        if not scope.prefix:
            return {}
        prefix_scope = Scope((), scope.namespace)
        key = self.key(scope.prefix, prefix_scope)
        if self.store.tier_of(key) is None:
            self.fetch({key: KVRequest(scope.prefix)}, None, version, prefix_scope, keep=False)
        return {key: scope.prefix}

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
        return self.store.prefetch(keys, self.model.kv_shape, self.model.device, self._computing())
