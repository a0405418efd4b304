"""Evaluates systems on many rows. Batches are those of one process, so the answers are the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..data.rows import QARow, row_from
from ..evaluation.journal import Journal
from ..evaluation.orders import Plan
from ..evaluation.predictions import Prediction, Predictions
from ..evaluation.runner import Answers, Batch, answer_rows, predict_with
from ..evaluation.systems import SYSTEMS, Models, System, make_systems, possible_systems
from ..generator import KVFusionGenerator
from ..store import DocumentStore, MemoryStore
from .connection import connected
from .options import ClusterOptions
from .pool import run_batches
from .spec import GeneratorSpec, absolute_if_here

DEFAULT_MEMORY_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class SystemsSpec:
    """The systems of an evaluation as plain data, which can be sent to workers.

    Attributes:
        generator: the base model and its options. Its store is not used.
        names: systems of ``SYSTEMS``. The others are compared with the first one.
        inputs: weights to compare with the base model: ``adapter``, ``decoder``, ``sft`` and ``concat_model``.
        leave_out: whether a system whose mode the model does not support is left out with a note instead of an error.
        max_new_tokens: maximum tokens of an answer. Default: the model's own.
        focus: documents kept by the systems with focus. Default: the model's own number, else 1.
        focus_weight: weight of the passages' scores. Default: the model's own, else 0.
        ape: temperature and scale of the system ``ape`` (``ApeSearch.settings``). Default: the model's own.
        memory_bytes: memory of each worker for document KVs.
    """

    generator: GeneratorSpec
    names: Sequence[str]
    inputs: Mapping[str, str | None] = field(default_factory=dict)
    leave_out: bool = False
    max_new_tokens: int | None = None
    focus: int | None = None
    focus_weight: float | None = None
    ape: Mapping[str, Any] = field(default_factory=dict)
    memory_bytes: int = DEFAULT_MEMORY_BYTES

    def load(self) -> tuple[list[System], tuple[str, ...]]:
        """Load the models. Return the systems, and notes on those that are left out.

        Raises:
            UnsupportedModelError: a model does not support a mode, and ``leave_out`` is False.
        """
        store = DocumentStore(MemoryStore(self.memory_bytes))  # shared by systems with the same base model
        models = Models(
            partial(self._generator, store), self.inputs, self.max_new_tokens, self.focus, self.focus_weight
        )
        factories: dict[str, Callable[[Models], System]] = dict(SYSTEMS)
        if self.ape:
            factories["ape"] = lambda models: models.system("ape", "ape", "base", **self.ape)
        return possible_systems(make_systems(self.names, models, factories), named=not self.leave_out)

    def in_this_folder(self) -> SystemsSpec:
        """Return the same systems with absolute paths, because workers have other current folders."""
        inputs = {name: absolute_if_here(value) for name, value in self.inputs.items()}
        return replace(self, generator=self.generator.in_this_folder(), inputs=inputs)

    def _generator(self, store: DocumentStore, changes: Mapping[str, str | None]) -> KVFusionGenerator:
        options = {**self.generator.options, **changes}
        if "model" in changes:
            options["gguf_file"] = None  # it belongs to the other model
        model = options.pop("model", self.generator.model)
        return KVFusionGenerator.from_pretrained(model, store=store, **options)


@dataclass(frozen=True, slots=True)
class DescribedSystem:
    """A system that answered elsewhere."""

    name: str
    facts: Mapping[str, Any] = field(repr=False)

    def identity(self) -> Mapping[str, Any]:
        """Return what the answers depend on, as plain data for the report."""
        return self.facts


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The predictions of one evaluation, its systems, and notes on those that were left out."""

    predictions: Predictions
    systems: tuple[DescribedSystem, ...]
    notes: tuple[str, ...]


def evaluate_systems(
    rows: Sequence[QARow],
    systems: SystemsSpec,
    plan: Plan,
    *,
    cluster: ClusterOptions | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
    journal: Journal | None = None,
) -> Evaluated:
    """Return the predictions of ``evaluation.runner.predict``, with batches of rows on the workers of a cluster.

    Args:
        rows: questions with passages.
        systems: what answers them. Each worker loads all of it.
        plan: conditions, from ``plan_conditions(rows)``.
        cluster: where to work. Default: in this process.
        batch_size: questions answered together.
        seed: seed of the shuffled order.
        progress: whether to show a progress bar if stderr is a terminal.
        journal: its answers are not computed again, and new ones are recorded in it batch by batch.

    Raises:
        InvalidInputError: the journal belongs to other systems.
        ClusterError: the cluster or its workers cannot be used, or a model cannot be loaded.
    """
    spec = systems.in_this_folder()
    with nullcontext() if cluster is None else connected(cluster):  # one connection for both calls below
        [facts] = run_batches(DescribeTask(spec), [None], 1, cluster)
        described = tuple(DescribedSystem(name, identity) for name, identity in facts["systems"])
        if journal is not None:
            journal.require(described)
        predictions = predict_with(
            partial(_answers, spec, cluster), rows, [one.name for one in described], plan, batch_size=batch_size,
            seed=seed, progress=progress, journal=journal,
        )  # fmt: skip
    return Evaluated(predictions, described, tuple(facts["notes"]))


def _answers(spec: SystemsSpec, cluster: ClusterOptions | None, batches: Sequence[Batch]) -> Iterator[Answers]:
    for answers in run_batches(EvaluateTask(spec), [_batch_data(batch) for batch in batches], 1, cluster):
        for one in answers:
            yield [None if found is None else Prediction.from_list(found) for found in one]


def _batch_data(batch: Batch) -> dict[str, Any]:
    rows = [
        {"id": row.id, "question": row.question, "answers": list(row.answers),
         "passages": [passage.to_dict() for passage in row.passages]}
        for row in batch.rows
    ]  # fmt: skip
    return {"rows": rows, "asks": [[ask.system, ask.orders] for ask in batch.asks]}


@dataclass(frozen=True, slots=True)
class DescribeTask:
    """Describes the systems for the report."""

    systems: SystemsSpec

    @property
    def store(self) -> None:
        return None

    def start(self, cache: Path | None) -> _Systems:
        return _Systems(self.systems, _describe)


@dataclass(frozen=True, slots=True)
class EvaluateTask:
    """Answers batches of rows."""

    systems: SystemsSpec

    @property
    def store(self) -> None:
        return None

    def start(self, cache: Path | None) -> _Systems:
        return _Systems(self.systems, _evaluate)


class _Systems:
    """The systems of one worker, and what they do with an item."""

    def __init__(self, spec: SystemsSpec, work: Callable[[_Systems, Any], Any]) -> None:
        self._work = work
        self.systems, self.notes = spec.load()

    def __call__(self, batch: list[Any]) -> list[Any]:
        return [self._work(self, item) for item in batch]

    def close(self) -> None:
        """Do nothing, because the store is in memory."""


def _describe(loaded: _Systems, item: None) -> dict[str, Any]:
    systems = [
        [system.name, json.loads(json.dumps(dict(system.identity()), default=str))] for system in loaded.systems
    ]
    return {"systems": systems, "notes": loaded.notes}


def _evaluate(loaded: _Systems, item: Mapping[str, Any]) -> list[list[Any]]:
    by_name = {system.name: system for system in loaded.systems}
    rows = [row_from(data, "a row") for data in item["rows"]]
    answers = (answer_rows(by_name[name], rows, orders) for name, orders in item["asks"])
    return [[None if one is None else one.to_list() for one in found] for found in answers]
