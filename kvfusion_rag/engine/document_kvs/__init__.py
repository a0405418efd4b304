"""Document KVs under the model's current weights, between the engine and the store.

Token ids with their scope come in. Their KVs go out, from the store or computed now. The room decides what a store key
contains, and measures whether KVs of other machines may be used. It must not know about questions or answers.
"""

from .kvs import DocumentKVs, Ids, Scope

__all__ = ["DocumentKVs", "Ids", "Scope"]
