"""Build training data: each question with its gold passage among passages that do not contain an answer.

Questions come from this project's rows, one-context JSON lines, SQuAD, NQ-open, TriviaQA, PopQA, lost-in-the-middle
files or a Hugging Face dataset. Dropped questions are counted by reason. Files are only overwritten with ``--force``.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InvalidInputError
from .arguments.paths import existing, output_file
from .arguments.values import plain_text, positive, seed, share, shown
from .console import patient_bars, say, say_json, say_list, shown_path
from .options import add_device, add_model_name, load_token_counter

if TYPE_CHECKING:
    from ..data import DataOptions, DataReport, Example, QARow
    from ..retrieval import Embedder

NEGATIVES = ("bm25", "dense", "random")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("questions", nargs="*", type=existing, metavar="FILE", help="questions: .jsonl, .json or .tsv, also with .gz")
    dataset = "questions of a Hugging Face dataset, with the library datasets (default: the questions of the files)"
    add("--dataset", type=plain_text, metavar="NAME", help=dataset)
    config = "configuration of the dataset, if it has several (default: its only one)"
    add("--dataset-config", type=plain_text, metavar="NAME", help=config)
    add(
        "--dataset-split",
        type=plain_text,
        metavar="NAME",
        default="train",
        help="split of the dataset (default: train)",
    )
    add("--out", type=output_file, required=True, metavar="FILE", help="rows to write: .jsonl or .jsonl.gz")
    add("--force", action="store_true", help="replace the output if it exists")
    add(
        "--corpus", nargs="+", type=existing, default=[], metavar="PATH",
        help="passages to mine: rows {text, title}, questions with contexts, or folders of documents "
        "(default: the contexts of the questions)",
    )  # fmt: skip
    add(
        "--exclude", nargs="+", type=existing, default=[], metavar="FILE",
        help="evaluation files whose questions and contexts, whole or truncated, must not be in the output "
        "(default: none)",
    )  # fmt: skip
    add(
        "--passages", type=_passage_range, metavar="N",
        help="passages per row, including the gold one: 20, or 5-20 to draw it for each row (default: 20)",
    )  # fmt: skip
    add(
        "--group", type=positive, metavar="N",
        help="build rows in groups that share one set of N passages, which training reads once; replaces "
        "--passages (default: rows of their own)",
    )  # fmt: skip
    add(
        "--group-questions", type=positive, default=1, metavar="N",
        help="drop groups with fewer questions, which cost training as much as large ones (default: 1)",
    )  # fmt: skip
    add(
        "--negatives", type=_negative_sources, default=("bm25",), metavar="NAMES",
        help=f"sources of negatives, used in turn, out of {', '.join(NEGATIVES)} (default: bm25)",
    )  # fmt: skip
    no_gold = "share of rows without gold passage and answers, 0 to 1 (default: 0)"
    add("--no-gold", type=share, default=0.0, metavar="SHARE", help=no_gold)
    max_tokens = "maximum tokens of a passage with its title; longer ones are cut (default: no limit)"
    add("--max-tokens", type=positive, metavar="N", help=max_tokens)
    add_model_name(parser, "model whose tokenizer counts these tokens")
    embedding = "sentence-transformers model for dense (default: MiniLM from its package)"
    add("--embedding-model", type=plain_text, metavar="NAME", help=embedding)
    add_device(parser, "embedding model")
    add("--seed", type=seed, default=0, metavar="N", help="seed of everything random (default: 0)")
    add("--strict", action="store_true", help="fail at the first unusable question")


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ..data import DataBuilder, check_output, read_corpus, read_examples, write_training_rows

    out: Path = args.out
    _check_files(args, out)
    files = [Path(path) for path in (*args.questions, *args.corpus, *args.exclude)]
    check_output(out, force=args.force, inputs=files)
    options = _options(args)
    builder = DataBuilder(
        lambda: _read_questions(args),
        options,
        corpus=itertools.chain.from_iterable(map(read_corpus, args.corpus)) if args.corpus else None,
        exclude=itertools.chain.from_iterable(map(read_examples, args.exclude)),
        count_tokens=_token_counter(args),
        embedder=_embedder(args),
        progress=args.verbosity >= 0,
    )
    rows = tqdm(
        builder.rows(), desc="rows", unit="row", delay=1, leave=False, disable=None if args.verbosity >= 0 else True
    )
    write_training_rows(out, _some(rows, builder.report))
    if args.json:
        say_json({"out": str(out.resolve()), **builder.report.to_dict()})
    else:
        _say_report(builder.report, options, out)
    return 0


def _some(rows: Iterable[QARow], report: DataReport) -> Iterator[QARow]:
    """Yield ``rows``, or raise InvalidInputError with the reasons if there are none."""
    yield from rows
    if not report.kept and report.dropped:
        raise InvalidInputError(f"no rows are left of {report.read} questions: {'; '.join(_reasons(report))}.")


def _reasons(report: DataReport) -> list[str]:
    """Return why questions were dropped, the most frequent reason first."""
    return [f"{count}: {why} (first: {report.first_dropped[why]})" for why, count in report.dropped.most_common()]


def _check_files(args: argparse.Namespace, out: Path) -> None:
    """Check the arguments before a file is read."""
    if bool(args.questions) == bool(args.dataset):
        raise InvalidInputError("questions must come either from files or from --dataset; name one of the two.")
    if out.name.removesuffix(".gz").rpartition(".")[2] != "jsonl":
        raise InvalidInputError(f"--out is {str(out)!r}, but it must be a .jsonl or .jsonl.gz file.")


def _options(args: argparse.Namespace) -> DataOptions:
    from ..data import DataOptions

    if args.group is not None and (args.passages is not None or args.no_gold):
        raise InvalidInputError(
            "--group is given with --passages or --no-gold, but the rows of a group share one set of passages with "
            "their gold passages; give only --group."
        )
    passages = (args.group, args.group) if args.group else args.passages or (20, 20)
    return DataOptions(
        passages, args.negatives, args.no_gold, args.max_tokens, args.seed, args.strict, args.group is not None,
        args.group_questions,
    )  # fmt: skip


def _read_questions(args: argparse.Namespace) -> Iterator[Example]:
    from ..data import read_dataset, read_examples

    if args.dataset:
        return read_dataset(args.dataset, args.dataset_config, args.dataset_split)
    return itertools.chain.from_iterable(map(read_examples, args.questions))


def _token_counter(args: argparse.Namespace) -> Callable[[str], int] | None:
    return None if args.max_tokens is None else load_token_counter(args)[0]


def _embedder(args: argparse.Namespace) -> Embedder | None:
    if "dense" not in args.negatives:
        return None
    from ..retrieval import SentenceTransformerEmbedder

    with patient_bars(args.verbosity >= 0):
        return SentenceTransformerEmbedder(args.embedding_model, device=args.device)


def _say_report(report: DataReport, options: DataOptions, out: Path) -> None:
    least, most = options.passages
    size = str(least) if least == most else f"{least} to {most}"
    shape = f"in {report.groups} groups that share {size} passages" if options.grouped else f"of {size} passages"
    say(f"{shown_path(out.resolve())}: {report.kept} rows {shape}, of {report.read} questions read")
    if report.passed_over:
        say(
            f"{report.passed_over} times a question waited for another group, because two passages of the set contain "
            "its answer"
        )
    say(f"{report.pool} distinct passages in the pool, {report.pool_excluded} others excluded")
    say(
        f"{report.evidence} rows with evidence, {report.no_gold} without their gold passage, "
        f"{report.unanswerable} unanswerable, {report.gold_found} whose gold passage was found in the corpus"
    )
    say("negatives: " + (", ".join(f"{count} {name}" for name, count in sorted(report.negatives.items())) or "none"))
    say(f"{report.dropped.total()} questions dropped")
    say_list("!", _reasons(report))


def _passage_range(text: str) -> tuple[int, int]:
    least, _, most = text.partition("-")
    try:
        numbers = positive(least), positive(most or least)
    except argparse.ArgumentTypeError:
        numbers = 2, 1
    if numbers[0] > numbers[1]:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a number from 1 or a range such as 5-20")
    return numbers


def _negative_sources(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if set(names) - set(NEGATIVES) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not some of {', '.join(NEGATIVES)}, each once")
    return names
