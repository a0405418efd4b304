"""Makes an adapter from a model and documents in one call, and keeps it only if it beats the untuned model."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path

from ..data.rows import QARow
from ..data.writing import write_atomically
from ..evaluation.bootstrap import Bootstrap
from ..evaluation.report import run_facts
from ..fusion.torch_model import TorchModel
from ..generator import KVFusionGenerator
from ..home import absolute
from ..model.adapters.libraries import require_adapter_libraries
from ..model.loading import load_backbone
from ..model.location import locate_model
from ..store import MemoryStore
from ..text.settings import FILE_NAME as SETTINGS
from ..text.settings import leading_bos
from ..training.checkpoint import recover
from ..training.config import TrainingConfig
from ..training.progress import LOSSES, Progress
from ..training.run import require_uniform_positions, train
from .card import card
from .judging import (
    ADAPTED,
    ADAPTED_FOCUS,
    SYSTEMS,
    UNTUNED,
    UNTUNED_FOCUS,
    System,
    answer_rows,
    best_focus,
    best_system,
    judge,
    right_answers,
    wins,
)
from .making import ROWS_AT_ONCE, AdaptRows, RowMaker
from .options import DEFAULT_PASSAGE_TOKENS, AdaptOptions
from .passages import PassagePool, read_passages
from .questions import read_questions
from .report import FILE, AdaptReport
from .stages import Stages, prepare_folder, writing_errors

FORMAT = 2  # increase it when questions, filters or rows change, since runs with others cannot be resumed


@dataclass(frozen=True, slots=True)
class _Model:
    """The model, which is loaded three times: to write and answer questions, to be trained, and to be judged."""

    model: str | Path | None
    gguf_file: str | None
    device: str | None
    dtype: str | None


@dataclass(frozen=True, slots=True)
class _Prepared:
    """All results of the untuned model."""

    stages: Stages
    pool: PassagePool
    rows: AdaptRows
    config: TrainingConfig
    answers: dict[System, list[str]]
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
    """Make an adapter of ``model`` from documents, and keep it in ``output/adapter`` if it beats the untuned model.

    A run that was killed is resumed by calling it again with the same arguments.

    Args:
        model, gguf_file, device, dtype: as in ``KVFusionGenerator.from_pretrained``.
        docs: files and folders.
        output: folder for the run's state, its report and the adapter.
        questions: file with the user's own questions, instead of the model's.
        progress: whether to show progress bars on stderr.
        note: function that is called with a line of text after each stage.

    Raises:
        InvalidInputError: there are too few passages or questions, or the output contains another run or cannot be
            written.
        RetrievalError: there are no documents.
        ModelLoadError, UnsupportedModelError: as in ``KVFusionGenerator.from_pretrained``.
        MissingDependencyError: an extra is not installed, or transformers and peft do not work together.
    """
    options, folder, began = options or AdaptOptions(), Path(output), time.perf_counter()
    require_adapter_libraries()
    bootstrap = Bootstrap(options.seed)
    prepare_folder(folder)
    with writing_errors(folder):
        source = _Model(model, gguf_file, device, dtype)
        prepared = _prepare(source, docs, questions, folder, options, progress, note)
        if isinstance(prepared, AdaptReport):
            return prepared
        gc.collect()  # free the untuned model before it is loaded again
        trained = _train(prepared, source, folder, note)
        adapted = _answer_adapted(prepared, source, folder, options)
        report = _report(prepared, trained, adapted, options, bootstrap, time.perf_counter() - began)
        _finish(report, folder)
        return report


def _prepare(
    source: _Model,
    docs: Sequence[str | Path],
    questions: str | Path | None,
    folder: Path,
    options: AdaptOptions,
    progress: bool,
    note: Callable[[str], None],
) -> _Prepared | AdaptReport:
    """Do everything before training, or return the report if the run has already finished."""
    given = None if questions is None else list(read_questions(questions))
    location = locate_model(source.model, gguf_file=source.gguf_file)
    backbone = load_backbone(location, device=source.device, dtype=source.dtype)
    require_uniform_positions(backbone)
    settings = replace(backbone.settings, mode="auto", layout=options.layout or backbone.settings.layout)
    generator = KVFusionGenerator(TorchModel(backbone), store=MemoryStore(), settings=settings, gather=False)
    tokens = options.passage_tokens or settings.passage_length or DEFAULT_PASSAGE_TOKENS
    pool = read_passages(docs, tokens, generator.count_tokens, exclude=absolute(folder))
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
    note(f"{len(pool.passages)} passages of up to {tokens} tokens in {pool.files} files, {len(pool.skipped)} skipped")
    start = leading_bos(backbone.tokenizer)
    rows = RowMaker(generator, pool, options, stages, start=start, given=given).make()
    note(f"{len(rows.trained)} of {rows.asked} questions for training, {len(rows.judged)} for judging")
    for reason, count in rows.dropped.items():
        note(f"  dropped {count}: {reason}")
    answers = _answers(stages, generator, rows.judged, options, adapted=False)
    return _Prepared(stages, pool, rows, config, answers, backbone.model_id, precision)


def _answers(
    stages: Stages, generator: KVFusionGenerator, rows: Sequence[QARow], options: AdaptOptions, *, adapted: bool
) -> dict[System, list[str]]:
    """Return the answers of all systems with or without the adapter."""

    def answers(system: System) -> list[str]:
        def answer(chunk: Sequence[QARow]) -> list[str]:
            return answer_rows(generator, chunk, system.mode, options.answer_tokens, system.focus)

        return stages.work(system.stage, rows, ROWS_AT_ONCE, answer)

    return {system: answers(system) for system in SYSTEMS if system.adapted == adapted}


def _train(prepared: _Prepared, source: _Model, folder: Path, note: Callable[[str], None]) -> Progress:
    output = folder / "training"
    recover(output / "checkpoint")
    if not (output / "checkpoint").exists():
        shutil.rmtree(output, ignore_errors=True)  # left by a run that was killed before its first checkpoint

    def report(progress: Progress) -> None:
        recent = [loss for _, loss in progress.losses[-20:]]
        note(f"step {progress.step}: loss {sum(recent) / len(recent):.3f} nats per token")

    pool = prepared.pool
    return train(
        prepared.rows.trained, output=output, config=prepared.config, resume=True, report=report,
        files={"documents": {"sha256": pool.digest, "passages": len(pool.passages)}}, **asdict(source),
    )  # fmt: skip


def _answer_adapted(
    prepared: _Prepared, source: _Model, folder: Path, options: AdaptOptions
) -> dict[System, list[str]]:
    adapter = folder / "training" / "best"
    generator = KVFusionGenerator.from_pretrained(adapter=adapter, store=MemoryStore(), gather=False, **asdict(source))
    return _answers(prepared.stages, generator, prepared.rows.judged, options, adapted=True)


def _report(
    prepared: _Prepared, trained: Progress, adapted: dict[System, list[str]], options: AdaptOptions,
    bootstrap: Bootstrap, seconds: float,
) -> AdaptReport:  # fmt: skip
    """Judge all systems, and decide whether to keep the adapter."""
    rows = prepared.rows.judged
    texts = prepared.answers | adapted
    verdicts = {system: judge(system, rows, texts[system]) for system in SYSTEMS}

    def margin(first: System, second: System) -> tuple[float, float, float]:
        points = ([100.0 * one for one in right_answers(rows, texts[system])] for system in (first, second))
        return astuple(bootstrap.difference(*points))

    losses = [loss for _, loss in trained.losses]
    tenth = max(1, len(losses) // 10)
    return AdaptReport(
        model_id=prepared.model_id,
        dtype=prepared.dtype,
        files=prepared.pool.files,
        passages=len(prepared.pool.passages),
        asked=prepared.rows.asked,
        dropped=prepared.rows.dropped,
        trained=len(prepared.rows.trained),
        judged=len(rows),
        documents=options.documents,
        steps=trained.step,
        losses=(sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth),
        seconds=round(seconds, 1),
        verdicts=tuple(verdicts.values()),
        margin=margin(ADAPTED, UNTUNED),
        focus_margin=margin(ADAPTED_FOCUS, UNTUNED_FOCUS),
        best=best_system(verdicts).name,
        focus=best_focus(verdicts),
        kept=wins(verdicts),
        run=run_facts(),
    )


def _finish(report: AdaptReport, folder: Path) -> None:
    """Put the adapter, if it is kept, with its card into ``folder/adapter``, and write the report last."""
    if report.kept:
        new = folder / "adapter.new"
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(folder / "training" / "best", new)
        settings = json.loads((new / SETTINGS).read_text(encoding="utf-8")) | {"focus": report.focus}
        (new / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        (new / "README.md").write_text(card(report), encoding="utf-8")
        shutil.rmtree(folder / "adapter", ignore_errors=True)
        new.rename(folder / "adapter")
    shutil.copyfile(folder / "training" / LOSSES, folder / LOSSES)
    write_atomically(folder / FILE, json.dumps(report.to_dict(), indent=2) + "\n")
    shutil.rmtree(folder / "training")
