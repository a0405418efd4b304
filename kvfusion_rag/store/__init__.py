"""Where document KVs are kept between questions: keys and the in-memory tier."""

from .keys import document_key
from .memory import MemoryStore, StoreStats

__all__ = ["MemoryStore", "StoreStats", "document_key"]
