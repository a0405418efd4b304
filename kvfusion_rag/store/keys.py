"""Names of stored document KVs. A key holds everything that changes the bits; it reveals nothing of the text.

A key has three parts, so that documents and tenants can be found again without knowing which models read them:
the namespace, the document (token ids in that namespace), and all of it together with the model's fingerprint.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np

from ..errors import InvalidInputError

_SCHEMA = 2
_NAMESPACE = re.compile(r"[A-Za-z0-9 _.:@+=-]{0,128}")
_NAMESPACE_KEY = re.compile(r"[0-9a-f]{32}")
_KEY = re.compile(r"[0-9a-f]{32}-[0-9a-f]{32}-[0-9a-f]{64}")


def document_key(fingerprint: str, namespace: str, token_ids: Sequence[int]) -> str:
    """``namespace-document-digest`` in hex: 128, 128 and 256 bits of sha256.

    Fields are typed and length-prefixed, so no two different (fingerprint, namespace, ids) write the same bytes.
    """
    ids = np.asarray(token_ids, dtype="<i8").tobytes()
    return "-".join(
        [
            namespace_key(namespace),
            _digest("document", namespace, ids)[:32],
            _digest("kv", fingerprint, namespace, ids),
        ]
    )


def namespace_key(namespace: str) -> str:
    """The first part of the keys of all documents of ``namespace``."""
    return _digest("namespace", namespace)[:32]


def document_part(key: str) -> str:
    """``namespace-document``: what the keys of one document under all models begin with."""
    return key[:65]


def require_namespace(namespace: object) -> None:
    """Raise InvalidInputError for a namespace that is no plain name."""
    if not isinstance(namespace, str):
        raise InvalidInputError(f"namespace is {namespace!r}, but it must be a string.")
    if not _NAMESPACE.fullmatch(namespace) or namespace in (".", ".."):
        raise InvalidInputError(
            f"namespace is {namespace!r}, but it must be up to 128 letters, digits, blanks and _.:@+=- (no path)."
        )


def require_namespace_key(text: object) -> None:
    """Raise InvalidInputError for what :func:`namespace_key` never makes."""
    if not isinstance(text, str) or not _NAMESPACE_KEY.fullmatch(text):
        raise InvalidInputError(
            f"the key of a namespace is {text!r}, but it must be 32 hex digits; namespace_key(name) makes it."
        )


def require_key(key: object) -> None:
    """Raise InvalidInputError for what :func:`document_key` never makes: a path is made of it."""
    if not isinstance(key, str) or not is_key(key):
        raise InvalidInputError(
            f"the key of a document is {key!r}, but it must be 32, 32 and 64 hex digits with dashes between; "
            "document_key(...) makes it."
        )


def is_key(text: str) -> bool:
    return _KEY.fullmatch(text) is not None


def _digest(kind: str, *fields: str | bytes) -> str:
    digest = hashlib.sha256(f"kvfusion-{kind}/{_SCHEMA}".encode())
    for field in fields:
        data = field.encode("utf-8", "surrogatepass") if isinstance(field, str) else field
        digest.update((b"s" if isinstance(field, str) else b"b") + len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
