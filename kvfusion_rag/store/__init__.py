"""Where document KVs are kept between questions: keys, and the tiers in memory, on disk and behind a URL."""

from .disk import DiskStore, VerifyReport
from .documents import DocumentStore, FetchedKVs, KVRequest
from .files import Miss
from .format import CODECS, Codec
from .keys import document_key, namespace_key, require_namespace
from .memory import MemoryStore, StoreStats
from .metrics import StoreEvent, StoreMetrics, Tier
from .opening import Place, as_store, open_store
from .remote import RemoteStore

__all__ = [
    "CODECS",
    "Codec",
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
    "StoreStats",
    "Tier",
    "VerifyReport",
    "as_store",
    "document_key",
    "namespace_key",
    "open_store",
    "require_namespace",
]
