"""Stores the KVs of many documents, and counts exactly which are stored and which are not."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..errors import DurabilityError, InvalidInputError, KVFusionError, StoreError
from ..generator import KVFusionGenerator
from ..schema import Document
from ..store import DocumentStore, keep_newest_parts, namespace_key, require_collection, write_manifest
from .options import ClusterOptions
from .pool import apart, run_batches
from .spec import GeneratorSpec

DOCUMENTS_PER_BATCH = 32
DOCUMENTS_PER_PART = 10_000  # of a manifest: an interrupted run has listed most of its documents

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class IndexedDocuments:
    """The results of one run.

    Attributes:
        stored: number of documents that this run stored.
        present: number of documents that the store had before.
        failed: reasons by id of the documents that the store does not have.
        unlisted: why the collection's manifest could not be written; None if it was, or if there is no collection.
    """

    stored: int
    present: int
    failed: dict[str, str]
    unlisted: str | None = None


def index_documents(
    documents: Sequence[Document],
    generator: GeneratorSpec,
    *,
    cluster: ClusterOptions | None = None,
    collection: str | None = None,
    progress: bool = False,
) -> IndexedDocuments:
    """Compute the KVs of documents that the store lacks, and wait until its folder or URL has them.

    A run can be repeated after an interruption or a failure. It asks the store first, and computes only the rest.

    Args:
        documents: any number. Ids must differ; by default they are positions, counted from 1.
        generator: the model, and the folder or URL of the store.
        cluster: where to work. Default: in this process.
        collection: name under which the store lists the documents for ``kvfusion store missing``. Documents of
            earlier runs that are not among ``documents`` leave the collection.
        progress: show a progress bar if this takes longer than a second.

    Raises:
        InvalidInputError: two documents have the same id, or there is no store that can be written.
        ClusterError: the cluster or its workers cannot be used.
        StoreError: the store cannot be opened.
    """
    if generator.store is None:
        raise InvalidInputError("the generator's store is None, but it must be a folder or URL.")
    if collection is not None:
        require_collection(collection)
    spec, rows = generator.in_this_folder(), _rows(documents)
    store = spec.open_store()
    assert isinstance(store, DocumentStore)  # spec.store is set
    listing = _Listing(store, spec.options.get("namespace", ""), collection)
    counts = {"stored": 0, "present": 0}
    failed: dict[str, dict[str, Any]] = {}
    with tqdm(total=len(rows), desc="prefill", unit="doc", delay=1, disable=not progress) as bar:
        for result in run_batches(PrefillTask(spec), rows, DOCUMENTS_PER_BATCH, cluster):
            if result["failure"] is None:
                counts[result["state"]] += 1
            else:
                failed[result["id"]] = result
            listing.add(result["id"], result["keys"])
            bar.update()
    late = _stored_late(store, failed)
    counts["stored"] += len(late)
    listing.finish()
    store.close()
    reasons = {name: result["failure"] for name, result in failed.items() if name not in late}
    return IndexedDocuments(**counts, failed=reasons, unlisted=listing.failure)


def _stored_late(store: DocumentStore, failed: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Return the failed documents that the store has after all, because a worker retried their uploads."""
    keys = {name: result["keys"] for name, result in failed.items() if result["keys"]}
    try:
        lacking = set(store.missing({key for own in keys.values() for key in own}))
    except StoreError:
        return set()
    return {name for name, own in keys.items() if lacking.isdisjoint(own)}


def _rows(documents: Sequence[Document]) -> list[dict[str, Any]]:
    """Return the documents with text as plain data, with their ids."""
    named = [one if one.id else replace(one, id=str(number)) for number, one in enumerate(documents, start=1)]
    ids = set[str | None]()
    for document in named:
        if document.id in ids:
            raise InvalidInputError(f"two documents have the id {document.id!r}, but ids must differ.")
        ids.add(document.id)
    return [{"text": one.text, "id": one.id, "title": one.title} for one in named if one.text.strip()]


@dataclass(frozen=True, slots=True)
class PrefillTask:
    """Stores the KVs of documents."""

    spec: GeneratorSpec

    @property
    def store(self) -> str | None:
        return self.spec.store

    def start(self, cache: Path | None) -> Prefill:
        return Prefill(self.spec.load(cache))


class Prefill:
    """Stores batches of documents, one after another. The result of each has id, state, failure and store keys."""

    def __init__(self, generator: KVFusionGenerator) -> None:
        assert generator.store is not None
        self._generator, self._store = generator, generator.store

    def __call__(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return apart(self._keep, [Document(**fields) for fields in batch], _invalid)

    def close(self) -> None:
        self._store.close()

    def _keep(self, documents: list[Document]) -> list[dict[str, Any]]:
        keys = self._generator.store_keys(documents)
        names = [str(document.id) for document in documents]
        try:
            lacking = set(self._store.missing({key for name in names for key in keys[name]}))
        except StoreError as error:
            return [_result(name, "failed", str(error), keys[name]) for name in names]
        absent = [name for name in names if not lacking.isdisjoint(keys[name])]
        failed = self._prefill([document for document in documents if document.id in absent])
        states = {name: "stored" if name in absent else "present" for name in names}
        return [_result(name, states[name], failed.get(name), keys[name]) for name in names]

    def _prefill(self, documents: list[Document]) -> dict[str, str]:
        """Store documents. Return why the store does not have some, by id."""
        failed: dict[str, str] = {}
        while documents:
            try:
                self._generator.prefill(documents, durable=True)
                break
            except StoreError as error:
                lost = error.documents if isinstance(error, DurabilityError) else ()
                failed |= dict.fromkeys(lost or [str(document.id) for document in documents], str(error))
            documents = [document for document in documents if document.id not in failed]  # are these durable?
        return failed


def _result(name: str, state: str, failure: str | None, keys: Sequence[str]) -> dict[str, Any]:
    return {"id": name, "state": state, "failure": failure, "keys": list(keys)}


def _invalid(document: Document, error: KVFusionError) -> dict[str, Any]:
    return _result(str(document.id), "failed", str(error), ())


class _Listing:
    """Writes the manifest of a collection in parts, and at the end removes the parts of earlier runs."""

    def __init__(self, store: DocumentStore, namespace: str, collection: str | None) -> None:
        self._tier, self._namespace, self._collection = store.slowest_tier, namespace_key(namespace), collection
        self._documents: dict[str, Sequence[str]] = {}
        self._parts = 0
        self.failure: str | None = None

    def add(self, name: str, keys: Sequence[str]) -> None:
        """List one document, also if the store does not have it yet."""
        if keys:
            self._documents[name] = keys
        if len(self._documents) == DOCUMENTS_PER_PART:
            self._write()

    def finish(self) -> None:
        """Write the last part."""
        if self._documents or not self._parts:
            self._write()
        if self._collection is None or self._tier is None or self.failure is not None:
            return
        try:
            keep_newest_parts(self._tier, self._namespace, self._collection, self._parts)
        except StoreError as error:
            self.failure = str(error)

    def _write(self) -> None:
        if self._collection is not None and self._tier is not None and self.failure is None:
            try:
                write_manifest(self._tier, self._namespace, self._collection, self._documents)
            except StoreError as error:
                self.failure = str(error)
        self._documents = {}
        self._parts += 1
