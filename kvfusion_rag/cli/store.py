"""Show, check and clean a document store.

The store is a folder or URL, as for ``--store`` of ``kvfusion ask`` and ``kvfusion index``. Removals cover its disk
tier and the files behind the URL.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..errors import InvalidInputError
from .arguments.paths import existing, store_place
from .arguments.values import namespace, plain_text
from .console import say, say_json, say_list
from .options import (
    CODECS,
    FILE_KINDS,
    add_device,
    add_index_arguments,
    add_model_name,
    load_config,
    load_encoder,
    open_index,
)

if TYPE_CHECKING:
    from .. import DocumentStore

ACTIONS = {
    "stats": "show bytes and documents by namespace",
    "verify": "check every file, including those behind a URL, remove damaged ones, and repair the index",
    "missing": "show which documents of a collection the store has lost, without loading a model",
    "clear": "remove all documents of one namespace, or of all",
    "forget": "remove the documents of files, regardless of the model that stored them",
    "estimate": "show how much space the documents of files would take",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    for name, about in ACTIONS.items():
        action = actions.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
        if name != "estimate":
            action.add_argument("store", type=store_place, metavar="STORE", help="folder or fsspec URL of the store")
        if name in ("clear", "forget"):
            action.add_argument(
                "--namespace",
                type=namespace,
                default="",
                metavar="NAME",
                help="namespace whose documents are removed (default: the unnamed one)",
            )
        if name == "missing":
            checked = "namespace whose collections are checked (default: the unnamed one)"
            action.add_argument("--namespace", type=namespace, default="", metavar="NAME", help=checked)
            names = "name of the collection to check (default: all)"
            action.add_argument("--collection", type=plain_text, metavar="NAME", help=names)
        if name == "clear":
            action.add_argument("--all", action="store_true", help="remove the documents of every namespace")
        if name in ("forget", "estimate"):
            files = f"file or folder with the documents ({FILE_KINDS})"
            action.add_argument("paths", nargs="+", type=existing, metavar="PATH", help=files)
            add_model_name(action)
            add_index_arguments(action)
            add_device(action, "embedding model")
        if name == "estimate":
            action.add_argument(
                "--dtype",
                choices=["float32", "bfloat16", "float16"],
                default="bfloat16",
                help="precision of the KVs (default: bfloat16)",
            )


def run(args: argparse.Namespace) -> int:
    actions = {"stats": _stats, "verify": _verify, "missing": _missing, "clear": _clear, "forget": _forget,
               "estimate": _estimate}  # fmt: skip
    return actions[args.action](args)


def _open(args: argparse.Namespace) -> DocumentStore:
    """Open the store that the arguments name, which must exist."""
    from ..store import open_store

    if "://" not in args.store and not os.path.isfile(os.path.join(args.store, "format.json")):
        raise InvalidInputError(f"there is no document store in {args.store!r}.")
    return open_store(args.store)


def _stats(args: argparse.Namespace) -> int:
    from ..store import environments

    store = _open(args)
    assert store.slowest_tier is not None  # open_store always adds a disk tier
    machines = environments(store.slowest_tier)
    tiers: dict[str, dict[str, Any]] = {}
    for name, tier in (("disk", store.disk), ("remote", store.remote)):
        if tier is not None:
            totals = tier.totals()
            tiers[name] = {
                "documents": sum(count for _, count in totals.values()),
                "bytes": sum(size for size, _ in totals.values()),
                "namespaces": {
                    key: {"documents": count, "bytes": size} for key, (size, count) in sorted(totals.items())
                },
            }
    if args.json:
        say_json({"store": args.store, "tiers": tiers, "environments": machines})
        return 0
    for name, counts in tiers.items():
        namespaces = counts["namespaces"]
        say(f"{name}: {counts['documents']:,} documents, {counts['bytes']:,} bytes, {len(namespaces)} namespaces")
        for key, part in namespaces.items():
            say(f"  {key}  {part['documents']:>8,} documents  {part['bytes']:>16,} bytes")
    for digest, facts in machines.items():
        say(f"environment {digest}: " + ", ".join(f"{name} {value}" for name, value in facts.items()))
    return 0


def _verify(args: argparse.Namespace) -> int:
    store = _open(args)
    assert store.disk is not None  # open_store always adds a disk tier
    disk = asdict(store.disk.verify())
    remote = None if store.remote is None else dict(zip(("whole", "broken"), store.remote.verify(), strict=True))
    if args.json:
        say_json({"store": args.store, **disk, **({} if remote is None else {"remote": remote})})
    else:
        for name, counts in (("disk", disk), ("remote", remote or {})):
            if counts:
                say(f"{name}: " + ", ".join(f"{count:,} {what}" for what, count in counts.items()))
    return 1 if disk["broken"] or (remote or {}).get("broken") else 0


def _missing(args: argparse.Namespace) -> int:
    """Print the documents of collections that the slowest tier lacks. Return 1 if there are any."""
    from ..store import collections, namespace_key

    store = _open(args)
    assert store.slowest_tier is not None  # open_store always adds a disk tier
    found = [
        collection
        for collection in collections(store.slowest_tier, namespace_key(args.namespace))
        if args.collection in (None, collection.name)
    ]
    if not found:
        named = "no collection" if args.collection is None else f"no collection {args.collection!r}"
        raise InvalidInputError(
            f"{args.store!r} lists {named} in namespace {args.namespace!r}; 'kvfusion index --store' writes one."
        )
    results = []
    for collection in found:
        lacking = set(store.missing({key for keys in collection.documents.values() for key in keys}))
        lost = [name for name, keys in collection.documents.items() if not lacking.isdisjoint(keys)]
        results.append({"collection": collection.name, "documents": len(collection.documents), "missing": lost})
    if args.json:
        say_json({"store": args.store, "collections": results})
    else:
        for result in results:
            say(f"{result['collection']}: {result['documents']:,} documents, {len(result['missing']):,} missing")
            say_list("-", result["missing"])
    return 1 if any(result["missing"] for result in results) else 0


def _clear(args: argparse.Namespace) -> int:
    from ..store import namespace_key

    removed = _open(args).clear(None if args.all else namespace_key(args.namespace))
    return _say_removed(args, removed)


def _forget(args: argparse.Namespace) -> int:
    from ..store import document_key

    store = _open(args)
    # The store finds documents by namespace and token ids, so the model's part of the key may be empty.
    keys = [document_key("", args.namespace, ids) for ids in _token_ids(args)]
    return _say_removed(args, store.forget(keys))


def _estimate(args: argparse.Namespace) -> int:
    import torch

    from ..model.document_cache import expected_kv_shape
    from ..store.format import layout

    shape = expected_kv_shape(load_config(args), getattr(torch, args.dtype))
    lengths = [len(ids) for ids in _token_ids(args)]
    key = "0" * 130  # as long as a real key
    facts = {
        "documents": len(lengths),
        "tokens": sum(lengths),
        "dtype": args.dtype,
        "bytes_per_1000_tokens": shape.nbytes(1000),
        "bytes": {codec: sum(layout(key, n, shape, codec).total for n in lengths) for codec in CODECS},
    }
    if args.json:
        say_json(facts)
        return 0
    say(f"{len(lengths):,} documents, {sum(lengths):,} tokens, {shape.nbytes(1000):,} bytes per 1,000 tokens")
    for codec, size in facts["bytes"].items():
        say(f"  codec {codec}: {size:,} bytes on disk")
    return 0


def _token_ids(args: argparse.Namespace) -> list[tuple[int, ...]]:
    """Return the token ids of the files' distinct documents, split as in ``kvfusion ask`` and ``kvfusion index``."""
    from ..model.rope import PositionLimit
    from ..store import document_key
    from ..text.documents import UNLIMITED, Limits, encode_documents, limit_of

    encoder, settings = load_encoder(args)
    limit = limit_of(settings, PositionLimit.of(load_config(args)).positions, len(encoder.prefix_ids))
    with open_index(args, None, lambda text: len(encoder.plain.encode(text)), settings.passage_length) as index:
        index.update(args.paths)
        documents = index.documents()
    limits = Limits(limit, UNLIMITED, settings.long_documents)
    encoded = encode_documents(documents, encoder, limits, lambda ids: document_key("", "", ids))
    return list(encoded.keys.values())


def _say_removed(args: argparse.Namespace, removed: int) -> int:
    if args.json:
        say_json({"store": args.store, "removed": removed})
    else:
        say(f"{args.store}: {removed:,} removed")
    return 0
