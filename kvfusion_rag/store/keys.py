"""Names of stored document KVs. A key holds everything that changes the bits; it reveals nothing of the text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

FORMAT_VERSION = 1


def document_key(fingerprint: str, namespace: str, token_ids: Sequence[int]) -> str:
    """sha256 (hex) over the format version, the model's fingerprint, the namespace and the token ids.

    Fields are length-prefixed, so no two different (fingerprint, namespace, ids) write the same bytes.
    """
    digest = hashlib.sha256(f"kvfusion-document-kv/{FORMAT_VERSION}".encode())
    for field in (fingerprint.encode(), namespace.encode("utf-8", "surrogatepass")):
        digest.update(len(field).to_bytes(8, "little") + field)
    digest.update(np.asarray(token_ids, dtype="<i8").tobytes())
    return digest.hexdigest()
