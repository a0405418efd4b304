"""Small files that a store keeps beside its documents: manifests of collections, and facts about environments.

A manifest lists the documents of a collection, with their store keys, so that lost ones can be found without a model.
It consists of parts, one for each call that stored documents, and the newest part with a document counts.

    manifests/<namespace>/<digest of the collection's name>/<time>-<random>.jsonl
    environments/<digest>.json
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

from ..errors import InvalidInputError, StoreError
from .keys import KEY_PATTERN

MAX_RECORD_BYTES = 256 << 20
MAX_COLLECTION_NAME = 1000  # characters
MANIFESTS, ENVIRONMENTS = "manifests", "environments"
RECORD_FOLDERS = (MANIFESTS, ENVIRONMENTS)
_ENVIRONMENT = re.compile(r"environments/(?P<digest>[0-9a-f]{16})\.json")
_PART = re.compile(r"manifests/(?P<namespace>[0-9a-f]{32})/[0-9a-f]{32}/[0-9a-f]{16}-[0-9a-f]{32}\.jsonl")
_KEY = re.compile(KEY_PATTERN)


class Collection(NamedTuple):
    """The documents of one collection.

    Attributes:
        name: its name.
        namespace: key of its namespace (``namespace_key``).
        documents: store keys of each document's pieces, by document id.
    """

    name: str
    namespace: str
    documents: dict[str, tuple[str, ...]]


def require_collection(name: object) -> None:
    """Raise InvalidInputError if ``name`` cannot name a collection."""
    if not isinstance(name, str) or not name.strip() or len(name) > MAX_COLLECTION_NAME or not name.isprintable():
        raise InvalidInputError(
            f"collection is {name!r}, but it must be a printable name of at most {MAX_COLLECTION_NAME} characters."
        )


class RecordTier(Protocol):
    """A tier that keeps records: a disk or a remote store."""

    def write_record(self, name: str, data: bytes) -> None: ...
    def remove_records(self, names: Iterable[str]) -> None: ...
    def records(self, beginning: str) -> list[tuple[str, bytes]]: ...


def write_manifest(tier: RecordTier, namespace: str, collection: str, documents: Mapping[str, Sequence[str]]) -> None:
    """Add documents to a collection's manifest.

    Args:
        tier: where to keep it.
        namespace: key of the collection's namespace.
        collection: its name.
        documents: store keys of each document's pieces, by document id.

    Raises:
        StoreError: the tier is read-only or cannot be changed.
    """
    lines = [{"collection": collection}, *({"id": name, "keys": list(keys)} for name, keys in documents.items())]
    data = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
    tier.write_record(f"{_parts_of(namespace, collection)}{time.time_ns():016x}-{uuid.uuid4().hex}.jsonl", data)


def keep_newest_parts(tier: RecordTier, namespace: str, collection: str, parts: int = 1) -> None:
    """Remove the documents of all but the last ``parts`` calls of :func:`write_manifest` from a manifest.

    Raises:
        StoreError: the tier is read-only or cannot be changed.
    """
    names = sorted(name for name, _ in tier.records(_parts_of(namespace, collection)))
    tier.remove_records(names[:-parts])


def collections(tier: RecordTier, namespace: str | None = None) -> list[Collection]:
    """Return the collections of a namespace (its key), or all, in the order of their names.

    Raises:
        StoreError: the tier cannot be read, or a manifest is damaged.
    """
    found: dict[str, Collection] = {}
    for name, data in sorted(tier.records(f"{MANIFESTS}/{namespace}/" if namespace else f"{MANIFESTS}/")):
        match = _PART.fullmatch(name)
        assert match is not None  # listings contain only such names
        try:
            first, *lines = map(json.loads, data.decode().splitlines())
            documents = {str(line["id"]): tuple(map(_checked, line["keys"])) for line in lines}
            empty = Collection(str(first["collection"]), match["namespace"], {})
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise StoreError(f"the manifest {name!r} is damaged; store its collection again.") from error
        found.setdefault(name.rpartition("/")[0], empty).documents.update(documents)
    return sorted(found.values(), key=lambda one: (one.namespace, one.name))


def write_environment(tier: RecordTier, digest: str, facts: Mapping[str, object]) -> None:
    """Write the facts of an environment whose KVs are in the store.

    Raises:
        StoreError: the tier is read-only or cannot be changed.
    """
    tier.write_record(f"{ENVIRONMENTS}/{digest}.json", json.dumps(facts, sort_keys=True, default=str).encode())


def environments(tier: RecordTier) -> dict[str, dict[str, Any]]:
    """Return the facts of each environment that has filled the store, by digest. Skip damaged records.

    Raises:
        StoreError: the tier cannot be read.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, data in tier.records(f"{ENVIRONMENTS}/"):
        match = _ENVIRONMENT.fullmatch(name)
        with suppress(ValueError, RecursionError):
            facts = json.loads(data)
            if match is not None and isinstance(facts, dict):
                found[match["digest"]] = facts
    return found


def is_record(name: object) -> bool:
    """Return whether a name from a listing is that of a record."""
    return isinstance(name, str) and any(pattern.fullmatch(name) for pattern in (_PART, _ENVIRONMENT))


def _parts_of(namespace: str, collection: str) -> str:
    """Return how the names of all parts of a manifest begin."""
    return f"{MANIFESTS}/{namespace}/{hashlib.sha256(collection.encode()).hexdigest()[:32]}/"


def _checked(key: object) -> str:
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise ValueError(f"{key!r} is not a document key")
    return key
