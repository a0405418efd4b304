"""Keys of stored document KVs. A key depends on everything that changes the KV's bits and reveals none of the text.

A key has three parts: the namespace, the document (token ids within that namespace), and a digest of both with the
model's fingerprint. Documents and namespaces can therefore be removed without knowing which models stored them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

from ..errors import InvalidInputError

_SCHEMA = 2
_NAMESPACE = re.compile(r"[A-Za-z0-9 _.:@+=-]{0,128}")
_NAMESPACE_KEY = re.compile(r"[0-9a-f]{32}")
KEY_PATTERN = r"[0-9a-f]{32}-[0-9a-f]{32}-[0-9a-f]{64}"  # of a result of document_key
_KEY = re.compile(KEY_PATTERN)
PATH_PATTERN = r"(?P<namespace>[0-9a-f]{32})/[0-9a-f]{2}/[0-9a-f]{32}-[0-9a-f]{64}"  # of a result of path_of


def document_key(fingerprint: str, namespace: str, token_ids: Sequence[int]) -> str:
    """Return the store key ``namespace-document-digest``: 128, 128 and 256 bits of sha256 in hex.

    Fields are typed and length-prefixed before hashing, so different arguments never hash the same bytes.

    Args:
        fingerprint: everything about the model that changes the KV's bits.
        namespace: the tenant's name.
        token_ids: token ids of the document.
    """
    ids = np.asarray(token_ids, dtype="<i8").tobytes()
    document = _digest("document", namespace, ids)[:32]
    return "-".join([namespace_key(namespace), document, _digest("kv", fingerprint, namespace, ids)])


def namespace_key(namespace: str) -> str:
    """Return the first part of the keys of all documents of ``namespace``."""
    return _digest("namespace", namespace)[:32]


def namespace_part(key: str) -> str:
    """Return the namespace part of a document's key."""
    return key.partition("-")[0]


def document_part(key: str) -> str:
    """Return ``namespace-document``, which the keys of one document under all models share."""
    return key[:65]


def is_document_key(text: object) -> bool:
    """Return whether ``text`` can be a result of :func:`document_key`."""
    return isinstance(text, str) and _KEY.fullmatch(text) is not None


def path_of(key: str) -> str:
    """Return ``namespace/xx/document-digest``, the path of a document below a folder of a store.

    Raises:
        InvalidInputError: ``key`` is not a document key.
    """
    if not is_document_key(key):
        raise InvalidInputError(
            f"the document key is {key!r}, but it must be 32, 32 and 64 hex digits separated by dashes, as returned "
            "by document_key(...)."
        )
    namespace, rest = key.split("-", 1)
    return f"{namespace}/{rest[:2]}/{rest}"


def paths_of_documents(keys: Iterable[str]) -> set[str]:
    """Return how the paths of the documents of ``keys`` begin under every model.

    Raises:
        InvalidInputError: ``keys`` contains an invalid document key.
    """
    return {path_of(key)[:-64] for key in keys}


def require_namespace(namespace: object) -> None:
    """Raise InvalidInputError if ``namespace`` is not a plain name."""
    if not isinstance(namespace, str) or not _NAMESPACE.fullmatch(namespace) or namespace in (".", ".."):
        raise InvalidInputError(
            f"namespace is {namespace!r}, but it must be up to 128 letters, digits, blanks and _.:@+=- (not a path)."
        )


def require_namespace_key(text: object) -> None:
    """Raise InvalidInputError if ``text`` cannot be a result of :func:`namespace_key`."""
    if not isinstance(text, str) or not _NAMESPACE_KEY.fullmatch(text):
        raise InvalidInputError(
            f"the namespace key is {text!r}, but it must be 32 hex digits as returned by namespace_key(name)."
        )


def _digest(kind: str, *fields: str | bytes) -> str:
    digest = hashlib.sha256(f"kvfusion-{kind}/{_SCHEMA}".encode())
    for field in fields:
        data = field.encode("utf-8", "surrogatepass") if isinstance(field, str) else field
        digest.update((b"s" if isinstance(field, str) else b"b") + len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
