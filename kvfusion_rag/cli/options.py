"""Arguments shared by several commands, and functions that load models, stores and indexes from them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidInputError, RetrievalError
from .arguments.engine import add_engine_arguments, engine_options
from .arguments.paths import existing, index_place, store_place
from .arguments.values import (
    byte_count,
    count,
    device,
    focus,
    min_support,
    namespace,
    number,
    plain_text,
    positive,
    seed,
    stop,
)
from .console import collection_paused, patient_bars

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from .. import DocumentIndex, DocumentStore, KVFusionGenerator
    from ..cluster import GeneratorSpec
    from ..text.encoder import PromptEncoder
    from ..text.settings import ModelSettings

DEFAULT_CHUNK_TOKENS = 200  # for models that were not trained with a passage length
CODECS = ("raw", "v8")  # repeated here, because importing them from the store would import torch
INDEX_FOLDER = ".kvfusion"
FILE_KINDS = "text, web pages, PDF, Office, tables, e-books, emails, code"
MODELS = "hub name, folder or GGUF file (default: SmolLM2-135M-Instruct)"


def add_model_name(parser: argparse.ArgumentParser, role: str = "") -> None:
    """Add ``--model`` and ``--gguf-file``. ``role`` describes a model that does not answer questions itself."""
    parser.add_argument("--model", type=plain_text, metavar="NAME", help=f"{role}: {MODELS}" if role else MODELS)
    add_gguf_file(parser)


def add_model_position(parser: argparse.ArgumentParser) -> None:
    """Add the argument ``MODEL`` without an option's name, and ``--gguf-file``."""
    parser.add_argument("model", nargs="?", type=plain_text, metavar="MODEL", help=MODELS)
    add_gguf_file(parser)


def add_gguf_file(parser: argparse.ArgumentParser) -> None:
    """Add ``--gguf-file``."""
    parser.add_argument(
        "--gguf-file",
        type=plain_text,
        metavar="FILE",
        help="a GGUF file in the model's folder or hub repository (default: the only one, if there are no other "
        "weights)",
    )


def add_device(parser: argparse.ArgumentParser, subject: str = "model") -> None:
    """Add ``--device``, the device on which the ``subject`` runs."""
    names = "cpu, cuda, cuda:1 or mps (default: an accelerator if there is one)"
    parser.add_argument("--device", type=device, metavar="NAME", help=f"device of the {subject}: {names}")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the answering model: adapter, decoder, device, precision and engine."""
    parser.add_argument(
        "--adapter",
        metavar="NAME",
        type=_adapter,
        default="shipped",
        help="folder or hub name of an adapter (peft), or none (default: the adapter in the model's folder, if any)",
    )
    parser.add_argument(
        "--decoder",
        type=plain_text,
        metavar="NAME",
        help="folder or hub name of a tuned decoder with its own weights (default: none)",
    )
    add_device(parser)
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="precision of the model (default: float32 on CPU, otherwise the checkpoint's)",
    )
    add_engine_arguments(parser)


def _adapter(text: str) -> str | None:
    return None if text == "none" else plain_text(text)


def add_reasoning_limit(parser: argparse.ArgumentParser, scope: str = "") -> None:
    """Add ``--max-reasoning-tokens``. ``scope`` says to which requests the option applies."""
    parser.add_argument(
        "--max-reasoning-tokens",
        type=count,
        metavar="N",
        help=f"maximum tokens of the reasoning in front of an answer{scope}, 0 for none (default: the model's own)",
    )


def add_focus(parser: argparse.ArgumentParser, scope: str = "") -> None:
    """Add ``--focus``. ``scope`` says to which requests the option applies."""
    parser.add_argument(
        "--focus",
        type=focus,
        default="auto",
        metavar="N",
        help=f"number of documents to keep{scope}, those that make the question most likely, or none to keep all "
        "(default: auto, the model's own number)",
    )


def add_min_support(parser: argparse.ArgumentParser, scope: str = "") -> None:
    """Add ``--min-support``. ``scope`` says to which requests the option applies."""
    parser.add_argument(
        "--min-support", type=min_support, metavar="P",
        help="probability, from 0 to 1, that the documents answer a question, below which the answer counts as not "
        f"found{scope}; auto is the threshold of the model's calibration (default: not measured)",
    )  # fmt: skip


def add_retrieval_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the places of documents, and how many of them are retrieved for a question."""
    parser.add_argument(
        "--docs",
        nargs="+",
        type=existing,
        metavar="PATH",
        default=[],
        help="files and folders to search: text, PDF, Office files and more (default: all files of --index)",
    )
    parser.add_argument(
        "--index",
        type=index_place,
        metavar="PLACE",
        help="folder of the index, or its URL in a vector database, such as chroma://host/name or lance+s3://bucket/"
        f"folder (default: {INDEX_FOLDER} next to the documents if there is one, otherwise memory)",
    )
    parser.add_argument(
        "--top-k", type=positive, default=5, metavar="N", help="number of documents to retrieve (default: 5)"
    )


def add_mode(parser: argparse.ArgumentParser) -> None:
    """Add ``--mode``."""
    parser.add_argument(
        "--mode", choices=["auto", "fusion", "concat", "ape"], help="how documents are read (default: the model's own)"
    )


def add_decoding_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how tokens of answers are chosen, and where an answer ends."""
    parser.add_argument(
        "--max-new-tokens", type=positive, metavar="N", help="maximum tokens of the answer (default: the model's own)"
    )
    parser.add_argument(
        "--temperature",
        type=number(0),
        default=0.0,
        metavar="X",
        help="sampling temperature (default: 0, the most likely token)",
    )
    parser.add_argument(
        "--seed",
        type=seed,
        metavar="N",
        help="seed that makes sampling at a temperature above 0 repeatable (default: random)",
    )
    parser.add_argument(
        "--stop",
        action="append",
        type=stop,
        default=[],
        metavar="TEXT",
        help="text that ends the answer; may be repeated (default: none)",
    )


def decoding_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the values of :func:`add_decoding_arguments`."""
    return {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "seed", "stop")}


def generator_spec(args: argparse.Namespace) -> GeneratorSpec:
    """Return the model and store of the arguments as data for workers."""
    from ..cluster import GeneratorSpec

    share: int | None = getattr(args, "store_namespace_bytes", None)  # only of servers
    store: str | None = getattr(args, "store", None)
    return GeneratorSpec(args.model, store, _store_options(args), _generator_options(args), share)


def add_index_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the embedding model and the chunk size."""
    parser.add_argument(
        "--embedding-model",
        type=plain_text,
        metavar="NAME",
        help="sentence-transformers model that finds documents: folder or hub name (default: MiniLM from its package)",
    )
    parser.add_argument(
        "--chunk-tokens",
        type=positive,
        metavar="N",
        help=f"maximum tokens of a chunk (default: the model's passage length, or {DEFAULT_CHUNK_TOKENS})",
    )


def add_store_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the document store."""
    parser.add_argument(
        "--store",
        type=store_place,
        metavar="PLACE",
        help="folder or fsspec URL that stores document KVs (default: memory only)",
    )
    parser.add_argument(
        "--namespace",
        type=namespace,
        default="",
        metavar="NAME",
        help="namespace of the documents in the store, which separates tenants (default: the unnamed one)",
    )
    parser.add_argument(
        "--store-codec",
        choices=CODECS,
        help="format of the stored files: raw, or v8, which keeps values in 8 bits (default: raw)",
    )
    parser.add_argument(
        "--key-kind",
        choices=["auto", "exact", "portable"],
        default="auto",
        help="exact: use only stored KVs with the bits that this machine computes; portable: use those of other "
        "machines too (default: auto, which is portable for a URL and exact for a folder)",
    )
    parser.add_argument(
        "--store-max-bytes",
        type=byte_count,
        metavar="SIZE",
        help="maximum bytes of the files on this machine's disk, such as 2GiB or 500MB (default: 20GiB)",
    )


def require_store(args: argparse.Namespace) -> None:
    """Reject store options that are given without ``--store``, before models are loaded."""
    for name in ("codec", "max_bytes"):
        if getattr(args, f"store_{name}") is not None and not args.store:
            option = f"--store-{name.replace('_', '-')}"
            raise InvalidInputError(f"{option} is given without --store; pass the store's folder or URL too.")


def open_chosen_store(args: argparse.Namespace) -> DocumentStore | str:
    """Return the store in ``--store``, or "memory"."""
    if not getattr(args, "store", None) and getattr(args, "store_namespace_bytes", None) is None:
        return "memory"
    return generator_spec(args).open_store()


def _store_options(args: argparse.Namespace) -> dict[str, Any]:
    options = {name: getattr(args, f"store_{name}", None) for name in ("codec", "max_bytes")}
    return {name: value for name, value in options.items() if value is not None}


def _generator_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of ``from_pretrained`` apart from model and store."""
    return {
        "gguf_file": args.gguf_file,
        "adapter": args.adapter,
        "decoder": args.decoder,
        "device": args.device,
        "dtype": args.dtype,
        **engine_options(args),
        "max_reasoning_tokens": getattr(args, "max_reasoning_tokens", None),
        "min_support": getattr(args, "min_support", None),
        "namespace": getattr(args, "namespace", ""),
        "key_kind": getattr(args, "key_kind", "auto"),
    }


@collection_paused()
def load_generator(args: argparse.Namespace, store: DocumentStore | str | None = None) -> KVFusionGenerator:
    """Load the model of the arguments, with ``store`` or else the store of the arguments."""
    from .. import KVFusionGenerator

    with patient_bars(args.verbosity >= 0):
        return KVFusionGenerator.from_pretrained(
            args.model, store=open_chosen_store(args) if store is None else store, **_generator_options(args)
        )


def load_encoder(args: argparse.Namespace) -> tuple[PromptEncoder, ModelSettings]:
    """Load the prompt encoder and settings of the model, without its weights."""
    from ..model.location import locate_model
    from ..model.repository import read_tokenizer
    from ..text.encoder import PromptEncoder
    from ..text.settings import load_settings

    where = locate_model(args.model, gguf_file=args.gguf_file)
    tokenizer = read_tokenizer(where)
    settings = load_settings(where.home, tokenizer, model_id=where.model_id, revision=where.revision)
    return PromptEncoder(tokenizer, settings), settings


def load_config(args: argparse.Namespace) -> PretrainedConfig:
    """Load the text configuration of the model, without its weights."""
    from ..model.text_part import text_part

    return text_part(load_whole_config(args))


def load_whole_config(args: argparse.Namespace) -> PretrainedConfig:
    """Load the configuration of the model with all its parts, without its weights."""
    from ..model.location import locate_model
    from ..model.repository import read_config

    with patient_bars(args.verbosity >= 0):
        return read_config(locate_model(args.model, gguf_file=args.gguf_file))


def load_token_counter(args: argparse.Namespace) -> tuple[Callable[[str], int], int | None]:
    """Return the model's token counter for plain text and its passage length, without loading its weights."""
    encoder, settings = load_encoder(args)
    return lambda text: len(encoder.plain.encode(text)), settings.passage_length


@collection_paused()
def open_index(
    args: argparse.Namespace,
    folder: Path | str | None,
    count_tokens: Callable[[str], int],
    passage_length: int | None,
    **options: Any,
) -> DocumentIndex:
    """Open an index with the embedding model and chunk size of ``args``, and further options of ``DocumentIndex``.

    ``folder`` may be a URL of an index in a vector database, and ``None`` means memory.
    """
    from ..retrieval import DocumentIndex, SentenceTransformerEmbedder

    if "embedder" not in options:
        with patient_bars(args.verbosity >= 0):
            options["embedder"] = SentenceTransformerEmbedder(args.embedding_model, device=args.device)
    return DocumentIndex(
        folder,
        count_tokens=count_tokens,
        chunk_tokens=args.chunk_tokens or passage_length or DEFAULT_CHUNK_TOKENS,
        progress=args.verbosity >= 0,
        **options,
    )


def folder_of(path: str) -> Path:
    """Return ``path`` if it is a folder, or the folder that contains it."""
    return Path(path) if os.path.isdir(path) else Path(path).parent


def index_folder(args: argparse.Namespace) -> Path | str | None:
    """Return the folder or URL of the index to search, or ``None`` for an index in memory.

    Raises:
        RetrievalError: there is no such folder, and no documents to fill it with.
    """
    if args.index is not None:
        if not args.docs and isinstance(args.index, Path) and not args.index.is_dir():
            raise RetrievalError(
                f"the index {str(args.index)!r} does not exist; pass its documents with --docs to create it."
            )
        return args.index
    candidates = (folder_of(path) / INDEX_FOLDER for path in args.docs)
    return next((folder for folder in candidates if folder.is_dir()), None)


def index_name(place: Path | str) -> str:
    """Return the absolute path or the URL of an index."""
    return str(place.resolve()) if isinstance(place, Path) else place


def first_folder(paths: Sequence[str]) -> Path:
    """Return the first folder in ``paths``, or the folder of the first file if there is none."""
    return folder_of(([path for path in paths if os.path.isdir(path)] or list(paths))[0])
