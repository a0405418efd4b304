"""One call from a model and documents to an adapter that is kept only if it beats untuned fusion."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..data.rows import QARow
from ..errors import InvalidInputError
from ..evaluation.bootstrap import Bootstrap
from ..evaluation.report import run_facts
from ..generator import KVFusionGenerator
from ..model.adapters import require_adapter_libraries
from ..model.loading import load_backbone
from ..model.location import locate_model
from ..store import MemoryStore
from ..text.settings import leading_bos
from ..training.checkpoint import recover
from ..training.config import TrainingConfig
from ..training.progress import LOSSES, Progress
from ..training.run import train
from .card import card
from .judging import ADAPTED, CONCAT, UNTUNED, answer_rows, judge, right_answers, wins
from .making import ROWS_AT_ONCE, Made, RowMaker
from .options import DEFAULT_PASSAGE_TOKENS, AdaptOptions
from .passages import PassagePool, read_passages
from .questions import read_questions
from .report import FILE, AdaptReport
from .stages import Stages, prepare_folder, write_atomically, writing_errors

FORMAT = 1  # raise it when questions, filters or rows change, since a run cannot go on from others


@dataclass(frozen=True, slots=True)
class _Model:
    """What is loaded three times: to ask and answer, to be trained, to be judged."""

    model: str | Path | None
    gguf_file: str | None
    device: str | None
    dtype: str | None


@dataclass(frozen=True, slots=True)
class _Prepared:
    """All that the untuned model has done."""

    stages: Stages
    pool: PassagePool
    made: Made
    config: TrainingConfig
    untuned: list[str]
    concat: list[str]
    model_id: str
    dtype: str


def adapt(
    model: str | Path | None = None,
    *,
    docs: Sequence[str | Path],
    output: str | Path,
    options: AdaptOptions | None = None,
    gguf_file: str | None = None,
    questions: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    progress: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> AdaptReport:
    """Make an adapter of ``model`` from documents, and keep it in ``output/adapter`` if it beats untuned fusion.

    A run that was killed goes on when it is called again with the same arguments.

    Args:
        model, gguf_file, device, dtype: as ``KVFusionGenerator.from_pretrained`` takes them.
        docs: files and folders.
        output: folder of the run's state, its report and the adapter.
        questions: file of the user's own questions, in place of the model's.
        progress: draw bars on stderr.
        note: called with a line of text after each stage.

    Raises:
        InvalidInputError: too few passages or questions; the output holds another run or cannot be written.
        RetrievalError: there are no documents.
        ModelLoadError, UnsupportedModelError: as ``KVFusionGenerator.from_pretrained``.
        MissingDependencyError: an extra is not installed, or transformers and peft do not fit.
    """
    options, folder, began = options or AdaptOptions(), Path(output), time.perf_counter()
    require_adapter_libraries()
    prepare_folder(folder)
    with writing_errors(folder):
        named = _Model(model, gguf_file, device, dtype)
        found = _prepare(named, docs, questions, folder, options, progress, note)
        if isinstance(found, AdaptReport):
            return found
        gc.collect()  # the untuned model, before it is loaded again
        trained = _train(found, named, folder, note)
        adapted = _judge_adapted(found, named, folder, options)
        return _finish(found, trained, adapted, folder, options, time.perf_counter() - began)


def _prepare(
    named: _Model,
    docs: Sequence[str | Path],
    questions: str | Path | None,
    folder: Path,
    options: AdaptOptions,
    progress: bool,
    note: Callable[[str], None],
) -> _Prepared | AdaptReport:
    """Everything up to training; the report of a run that has ended already."""
    given = None if questions is None else list(read_questions(questions))
    where = locate_model(named.model, gguf_file=named.gguf_file)
    backbone = load_backbone(where, device=named.device, dtype=named.dtype)
    settings = replace(backbone.settings, mode="auto", layout=options.layout or backbone.settings.layout)
    if settings.positions != "uniform":
        raise InvalidInputError(
            f"positions is {settings.positions!r} in the settings of {backbone.model_id!r}, but training reads "
            "documents at uniform positions."
        )
    generator = KVFusionGenerator(backbone, store=MemoryStore(), settings=settings, gather=False)
    tokens = options.passage_tokens or settings.passage_length or DEFAULT_PASSAGE_TOKENS
    pool = read_passages(docs, tokens, generator.count_tokens, exclude=folder.resolve())
    config = replace(options.training, layout=settings.layout, seed=options.seed)
    precision = str(backbone.dtype).removeprefix("torch.")
    facts = {
        "format": FORMAT,
        "model": f"{backbone.model_id} ({precision}, weights {backbone.weights_digest})",
        "documents": pool.digest,
        "questions": None if given is None else hashlib.sha256(repr(given).encode()).hexdigest(),
    }
    chosen = {name: value for name, value in asdict(options).items() if name != "training"}
    facts |= {f"option {name}": value for name, value in (chosen | asdict(config)).items()}
    stages = Stages(folder, facts, progress=progress)
    if (folder / FILE).is_file():
        return AdaptReport.from_dict(json.loads((folder / FILE).read_text(encoding="utf-8")))
    note(f"{len(pool.passages)} passages of up to {tokens} tokens in {pool.files} files, {len(pool.skipped)} left out")
    start = leading_bos(backbone.tokenizer)
    made = RowMaker(generator, pool, options, stages, start=start, given=given).make()
    note(f"{len(made.trained)} questions to train on, {len(made.judged)} to judge by, of {made.asked}")
    for reason, count in made.dropped.items():
        note(f"  dropped {count}: {reason}")
    untuned = _answers(stages, "judged-untuned", generator, made.judged, "fusion", options)
    concat = _answers(stages, "judged-concat", generator, made.judged, "concat", options)
    return _Prepared(stages, pool, made, config, untuned, concat, backbone.model_id, precision)


def _answers(
    stages: Stages, name: str, generator: KVFusionGenerator, rows: Sequence[QARow], mode: Any, options: AdaptOptions
) -> list[str]:
    def answer(chunk: Sequence[QARow]) -> list[str]:
        return answer_rows(generator, chunk, mode, options.answer_tokens)

    return stages.work(name, rows, ROWS_AT_ONCE, answer)


def _train(found: _Prepared, named: _Model, folder: Path, note: Callable[[str], None]) -> Progress:
    where = folder / "training"
    recover(where / "checkpoint")
    if not (where / "checkpoint").exists():
        shutil.rmtree(where, ignore_errors=True)  # of a run that was killed before its first checkpoint

    def report(progress: Progress) -> None:
        recent = [loss for _, loss in progress.losses[-20:]]
        note(f"step {progress.step}: loss {sum(recent) / len(recent):.3f} nats a token")

    files: Mapping[str, Any] = {"documents": {"sha256": found.pool.digest, "passages": len(found.pool.passages)}}
    return train(
        found.made.trained, output=where, config=found.config, resume=True, files=files, report=report, **asdict(named)
    )


def _judge_adapted(found: _Prepared, named: _Model, folder: Path, options: AdaptOptions) -> list[str]:
    adapter = folder / "training" / "best"
    generator = KVFusionGenerator.from_pretrained(adapter=adapter, store=MemoryStore(), gather=False, **asdict(named))
    return _answers(found.stages, "judged-adapted", generator, found.made.judged, "fusion", options)


def _finish(
    found: _Prepared, trained: Progress, adapted: list[str], folder: Path, options: AdaptOptions, seconds: float
) -> AdaptReport:
    """Judge, keep the adapter or not, and write the report last."""
    rows = found.made.judged
    texts = {UNTUNED: found.untuned, ADAPTED: adapted, CONCAT: found.concat}
    verdicts = {system: judge(system, rows, answers) for system, answers in texts.items()}
    right = {system: [100.0 * one for one in right_answers(rows, answers)] for system, answers in texts.items()}
    margin = Bootstrap(options.seed).difference(right[ADAPTED], right[UNTUNED])
    losses = [loss for _, loss in trained.losses]
    tenth = max(1, len(losses) // 10)
    report = AdaptReport(
        model_id=found.model_id,
        dtype=found.dtype,
        files=found.pool.files,
        passages=len(found.pool.passages),
        asked=found.made.asked,
        dropped=found.made.dropped,
        trained=len(found.made.trained),
        judged=len(rows),
        documents=options.documents,
        steps=trained.step,
        losses=(sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth),
        seconds=round(seconds, 1),
        verdicts=tuple(verdicts.values()),
        margin=(margin.mean, margin.low, margin.high),
        kept=wins(verdicts[ADAPTED], verdicts[UNTUNED]),
        run=run_facts(),
    )
    if report.kept:
        _keep(folder, report)
    shutil.copyfile(folder / "training" / LOSSES, folder / LOSSES)
    write_atomically(folder / FILE, json.dumps(report.to_dict(), indent=2) + "\n")
    shutil.rmtree(folder / "training")
    return report


def _keep(folder: Path, report: AdaptReport) -> None:
    """Put the adapter with its card into ``folder/adapter``, whole or not at all."""
    fresh = folder / "adapter.new"
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(folder / "training" / "best", fresh)
    (fresh / "README.md").write_text(card(report), encoding="utf-8")
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    fresh.rename(folder / "adapter")
