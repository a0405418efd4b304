"""The document store: keeps document KVs between questions, so that each document is prefilled once.

Requests enter as store keys with token ids, together with a function that computes missing documents. Document KVs
leave, from memory, from disk, from a remote folder or freshly computed, each with its origin and the reason for a
miss. The room must not know about models, text, prompts or the order of documents in an answer.
"""

from .disk import DEFAULT_MAX_BYTES as DEFAULT_DISK_BYTES
from .disk import DiskStore, VerifyReport
from .documents import DocumentStore
from .format import CODECS, Codec
from .keys import document_key, is_document_key, namespace_key, require_namespace
from .memory import DEFAULT_MAX_BYTES as DEFAULT_MEMORY_BYTES
from .memory import MemoryStore
from .metrics import Miss, StoreEvent, StoreMetrics, Tier, UploadReport
from .opening import Place, as_store, open_store
from .records import (
    Collection,
    collections,
    environments,
    keep_newest_parts,
    require_collection,
    write_environment,
    write_manifest,
)
from .remote import RemoteStore
from .tiers import Computing, FetchedKVs, KVRequest

__all__ = [
    "CODECS",
    "DEFAULT_DISK_BYTES",
    "DEFAULT_MEMORY_BYTES",
    "Codec",
    "Collection",
    "Computing",
    "DiskStore",
    "DocumentStore",
    "FetchedKVs",
    "KVRequest",
    "MemoryStore",
    "Miss",
    "Place",
    "RemoteStore",
    "StoreEvent",
    "StoreMetrics",
    "Tier",
    "UploadReport",
    "VerifyReport",
    "as_store",
    "collections",
    "document_key",
    "environments",
    "is_document_key",
    "keep_newest_parts",
    "namespace_key",
    "open_store",
    "require_collection",
    "require_namespace",
    "write_environment",
    "write_manifest",
]
