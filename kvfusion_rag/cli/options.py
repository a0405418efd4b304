"""Arguments that several commands share, and the loading that belongs to them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ModelLoadError, RetrievalError
from .console import patient_bars

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from .. import DocumentIndex, KVFusionGenerator
    from ..prompts import PromptEncoder
    from ..settings import ModelSettings

DEFAULT_CHUNK_TOKENS = 200  # for a model that was not trained with a passage length
INDEX_FOLDER = ".kvfusion"


def positive(text: str) -> int:
    """Argument type: a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        type=lambda text: None if text == "none" else text,
        default="shipped",
        help="tuned LoRA adapter of the answering decoder, or none (default: the one in the model's folder, if any)",
    )
    parser.add_argument("--decoder", metavar="NAME", help="tuned answering decoder with weights of its own")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: an accelerator if there is one)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="precision of the model")


def add_index_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--embedding-model", metavar="NAME", help="sentence-transformers model (default: offline MiniLM)"
    )
    parser.add_argument(
        "--chunk-tokens",
        type=positive,
        metavar="N",
        help=f"most tokens of a chunk (default: the model's passage length, else {DEFAULT_CHUNK_TOKENS})",
    )


def add_store_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", metavar="PLACE", help="folder or fsspec URL where document KVs are kept")
    parser.add_argument("--namespace", default="", metavar="NAME", help="tenant whose documents these are")


def load_generator(args: argparse.Namespace) -> KVFusionGenerator:
    """The generator that the arguments of models, and of stores where a command has them, name."""
    from .. import KVFusionGenerator

    with patient_bars():
        return KVFusionGenerator.from_pretrained(
            args.model,
            adapter=args.adapter,
            decoder=args.decoder,
            device=args.device,
            dtype=args.dtype,
            store=getattr(args, "store", None) or "memory",
            namespace=getattr(args, "namespace", ""),
        )


def load_encoder(model: str | None) -> tuple[PromptEncoder, ModelSettings]:
    """How a model reads documents, without its weights."""
    from transformers import AutoTokenizer

    from ..generator import EMBEDDED_MODEL
    from ..prompts import PromptEncoder
    from ..settings import load_settings

    name = str(model or EMBEDDED_MODEL)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        cause = " ".join(str(error).split())[:300]
        raise ModelLoadError(f"the tokenizer of {name!r} cannot be loaded: {cause}") from error
    settings = load_settings(name, tokenizer, model_id=name)
    return PromptEncoder(tokenizer, settings), settings


def load_config(model: str | None) -> PretrainedConfig:
    """The text configuration of a model, without its weights."""
    from transformers import AutoConfig

    from ..generator import EMBEDDED_MODEL

    name = str(model or EMBEDDED_MODEL)
    try:
        return AutoConfig.from_pretrained(name).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        cause = " ".join(str(error).split())[:300]
        raise ModelLoadError(f"the configuration of {name!r} cannot be loaded: {cause}") from error


def load_token_counter(model: str | None) -> tuple[Callable[[str], int], int | None]:
    """How a model counts the tokens of plain text, and its passage length, without loading its weights."""
    encoder, settings = load_encoder(model)
    return lambda text: len(encoder.plain.encode(text)), settings.passage_length


def open_index(
    args: argparse.Namespace, folder: Path | None, count_tokens: Callable[[str], int], passage_length: int | None
) -> DocumentIndex:
    """The index in ``folder`` (``None``: in memory) with the embedding model and chunk size of ``args``."""
    from ..retrieval import DocumentIndex, SentenceTransformerEmbedder

    with patient_bars():
        embedder = SentenceTransformerEmbedder(args.embedding_model, device=args.device)
    return DocumentIndex(
        folder,
        count_tokens=count_tokens,
        chunk_tokens=args.chunk_tokens or passage_length or DEFAULT_CHUNK_TOKENS,
        embedder=embedder,
        progress=True,
    )


def require_paths(paths: Sequence[str]) -> None:
    """Fail on a mistyped path before models are loaded."""
    for path in paths:
        if not os.path.exists(Path(path).expanduser()):
            raise RetrievalError(f"{path!r} does not exist.")


def folder_of(path: str) -> Path:
    """A folder itself, or the folder around a file."""
    place = Path(path).expanduser()
    return place if place.is_dir() else place.parent


def first_folder(paths: Sequence[str]) -> Path:
    """The first folder among ``paths``, else the folder around the first file."""
    folders = [path for path in paths if Path(path).expanduser().is_dir()]
    return folder_of((folders or paths)[0])
