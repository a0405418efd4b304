"""Index files and folders for later questions.

Only new and changed files are read and embedded, and deleted files are removed from the index. Skipped files, and data
in files that is left out (such as images in base64), are listed with the reason. With ``--store``, the KV of each
chunk that is not stored yet is computed too, and the command fails unless the store has all of them in the end. With
``--ray``, the workers of a cluster embed many chunks and compute KVs. An interrupted run can be repeated and then
continues.

With ``--watch``, the command keeps running and updates index and store after each change of the files, until Ctrl-C or
SIGTERM (exit code 0).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.writing import check_folder
from ..errors import InvalidInputError, StoreError
from .arguments.cluster import add_cluster_arguments, cluster_of
from .arguments.paths import existing, index_place
from .arguments.values import plain_text
from .console import (
    patient_bars,
    print_error,
    say,
    say_json,
    say_left_out,
    say_list,
    shown_path,
    shows_progress,
    until_stopped,
)
from .options import (
    FILE_KINDS,
    INDEX_FOLDER,
    add_index_arguments,
    add_model_arguments,
    add_model_name,
    add_store_arguments,
    first_folder,
    generator_spec,
    index_name,
    load_generator,
    load_token_counter,
    open_chosen_store,
    open_index,
    require_store,
)

if TYPE_CHECKING:
    from .. import Document, DocumentIndex, DocumentStore, KVFusionGenerator
    from ..cluster import ClusterOptions
    from ..retrieval import IndexReport

    Fill = Callable[[list[Document]], tuple[dict[str, int], dict[str, str]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths", nargs="+", type=existing, metavar="PATH", help=f"file or folder to index ({FILE_KINDS})"
    )
    parser.add_argument(
        "--index",
        type=index_place,
        metavar="PLACE",
        help="folder of the index, or its URL in a vector database, such as chroma://host/name or lance+s3://bucket/"
        f"folder (default: {INDEX_FOLDER} in the first folder)",
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="keep running, and update the index when files change, until Ctrl-C (default: update once)",
    )
    add_model_name(parser, "model that will answer from the chunks")
    add_index_arguments(parser)
    add_model_arguments(parser)
    add_store_arguments(parser)
    add_cluster_arguments(parser)
    parser.add_argument(
        "--collection",
        type=plain_text,
        metavar="NAME",
        help="collection under which the store lists the chunks for 'store missing' (default: the index's folder)",
    )


def run(args: argparse.Namespace) -> int:
    require_store(args)
    if args.watch and args.json:
        raise InvalidInputError("--watch and --json cannot be combined, because there is more than one report.")
    cluster = cluster_of(args)
    folder = args.index or first_folder(args.paths) / INDEX_FOLDER
    if isinstance(folder, Path):
        check_folder(folder)
    collection = _collection(args, folder)
    store = open_chosen_store(args)  # first, so that a store that cannot be used is reported before the work
    count_tokens, passage_length = load_token_counter(args)
    fill = None
    if cluster is not None and args.store:
        fill = partial(_prefill_on_cluster, args, collection=collection, cluster=cluster)
    elif args.store:
        fill = _Prefill(args, collection, store)
    try:
        with open_index(args, folder, count_tokens, passage_length, **_embedding(args, cluster)) as index:
            if args.watch:
                return _watch(args, index, folder, fill)
            report = index.update(args.paths)
            documents = index.documents(files=report.files) if fill else []
        return _finish(args, report, documents, folder, index.chunk_tokens, fill)
    finally:
        if isinstance(fill, _Prefill):
            fill.close()


def _watch(args: argparse.Namespace, index: DocumentIndex, folder: Path | str, fill: Fill | None) -> int:
    """Update the index after each change, until a signal."""
    from ..retrieval import watch_folder

    def update() -> None:
        report = index.update(args.paths)
        documents = index.documents(files=report.files) if fill else []
        _finish(args, report, documents, folder, index.chunk_tokens, fill)
        say("watching for changes (stop with Ctrl-C)")

    with until_stopped() as stop:
        watch_folder(args.paths, update, stop, on_error=lambda error: print_error(str(error)), exclude=index.folder)
    return 0


def _finish(
    args: argparse.Namespace,
    report: IndexReport,
    documents: list[Document],
    folder: Path | str,
    chunk_tokens: int,
    fill: Fill | None,
) -> int:
    """Fill the store after an update of the index, and print what was done. Return the exit code."""
    stored, failed = None, dict[str, str]()
    if fill is not None:
        stored, failed = fill(documents)
    if args.json:
        result = {"index": index_name(folder), "chunk_tokens": chunk_tokens, **report.to_dict()}
        failures = {"failed": failed} if args.ray is not None and args.store else {}
        say_json(result | ({} if stored is None else {"store": stored}) | failures)
    else:
        _say_report(report, folder, chunk_tokens)
        if stored is not None:
            say(f"{args.store}: " + ", ".join(f"{count:,} {name}" for name, count in stored.items()))
        say_list("!", [f"{name}: {reason}" for name, reason in failed.items()])
    return 1 if failed else 0


def _embedding(args: argparse.Namespace, cluster: ClusterOptions | None) -> dict[str, Any]:
    """Return options of the index with which the workers of a cluster embed its texts."""
    if cluster is None:
        return {}
    from ..cluster.embedding import TEXTS_PER_STEP, ClusterEmbedder
    from ..cluster.spec import absolute_if_here
    from ..retrieval import SentenceTransformerEmbedder

    load = partial(SentenceTransformerEmbedder, absolute_if_here(args.embedding_model), device=args.device)
    with patient_bars(args.verbosity >= 0):
        return {"embedder": ClusterEmbedder(load, cluster), "chunks_per_step": TEXTS_PER_STEP}


def _collection(args: argparse.Namespace, folder: Path | str) -> str:
    """Return the name of the collection, checked before any work begins."""
    if args.collection is None:
        return index_name(folder)
    if not args.store:
        raise InvalidInputError("--collection is given without --store; pass the store's folder or URL too.")
    from ..store.records import require_collection

    require_collection(args.collection)
    return args.collection


class _Prefill:
    """Stores the KV of every document. The model is loaded once."""

    def __init__(self, args: argparse.Namespace, collection: str, store: DocumentStore | str) -> None:
        self._args, self._collection, self._store = args, collection, store
        self._generator: KVFusionGenerator | None = None

    def __call__(self, documents: list[Document]) -> tuple[dict[str, int], dict[str, str]]:
        """Return how many KVs were computed and how many were stored already. No document fails alone."""
        from ..store import keep_newest_parts, namespace_key

        if self._generator is None:
            self._generator = load_generator(self._args, self._store)
        generator = self._generator
        given = generator.prefill(
            documents, progress=shows_progress(self._args), durable=True, collection=self._collection
        )
        sources = [source for source in given if source.origin != "blank"]
        assert generator.store is not None and generator.store.slowest_tier is not None  # --store is set
        keep_newest_parts(generator.store.slowest_tier, namespace_key(self._args.namespace), self._collection)
        computed = sum(source.origin == "computed" for source in sources)
        return {"computed": computed, "stored already": len(sources) - computed}, {}

    def close(self) -> None:
        """Close the store."""
        if self._generator is not None and self._generator.store is not None:
            self._generator.store.close()


def _prefill_on_cluster(
    args: argparse.Namespace, documents: list[Document], collection: str, cluster: ClusterOptions
) -> tuple[dict[str, int], dict[str, str]]:
    """Store the KV of every document on a cluster. Return the counts, and why documents failed by their ids.

    Raises:
        StoreError: the store has the documents, but its list of them could not be written.
    """
    from ..cluster import index_documents

    report = index_documents(
        documents, generator_spec(args), cluster=cluster, collection=collection, progress=shows_progress(args)
    )
    if report.unlisted is not None and not report.failed:
        raise StoreError(f"the collection {collection!r} could not be listed in the store: {report.unlisted}")
    counts = {"stored": report.stored, "stored already": report.present, "failed": len(report.failed)}
    return counts, report.failed


def _say_report(report: IndexReport, folder: Path | str, chunk_tokens: int) -> None:
    say(f"{shown_path(folder)}: {report.chunks} chunk{'s' * (report.chunks != 1)} of up to {chunk_tokens} tokens")
    say(
        f"{len(report.added)} added, {len(report.changed)} changed, {len(report.removed)} removed, "
        f"{len(report.unchanged)} unchanged, {len(report.skipped)} skipped"
    )
    say_list("+", list(report.added))
    say_list("~", list(report.changed))
    say_list("-", list(report.removed))
    say_left_out(report)
