"""The systems that an evaluation compares.

A system answers questions from documents in a given order. ``SYSTEMS`` lists those of the command; add a line there
for another one. The caller loads models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..errors import InvalidInputError, UnsupportedModelError
from ..home import expanded
from .orders import long_context_order

if TYPE_CHECKING:
    from ..generator import KVFusionGenerator
    from ..schema import Document, FocusChoice, Mode

ADAPTER_FILE = "adapter_config.json"  # as peft names it
Reorder = Callable[[Sequence["Document"]], "list[Document]"]


class AnswerLike(Protocol):
    """The fields of an answer that are used: the model's text, the source's spelling, and the generated ids."""

    @property
    def text(self) -> str: ...
    @property
    def cited_text(self) -> str: ...
    @property
    def token_ids(self) -> tuple[int, ...]: ...


class Named(Protocol):
    """What a report shows of a system. ``name`` is its name there."""

    @property
    def name(self) -> str: ...

    def identity(self) -> Mapping[str, Any]:
        """Return what the answers depend on, as plain data for the report."""
        ...


class System(Named, Protocol):
    """A deterministic way to answer questions."""

    def answer_batch(self, questions: Sequence[str], documents: Sequence[Sequence[Document]]) -> Sequence[AnswerLike]:
        """Return one answer per question. Raises ContextLimitError if one is too long for the model."""
        ...


@dataclass(frozen=True, slots=True)
class GeneratorSystem:
    """A generator in one mode with greedy decoding.

    Attributes:
        reorder: function applied to the documents first.
        max_new_tokens: maximum tokens of an answer; None for the model's own limit.
        focus: documents kept; None keeps all, even if the model has its own number.
    """

    name: str
    generator: KVFusionGenerator
    mode: Mode
    reorder: Reorder = list
    max_new_tokens: int | None = None
    focus: FocusChoice = None

    def answer_batch(self, questions: Sequence[str], documents: Sequence[Sequence[Document]]) -> Sequence[AnswerLike]:
        ordered = [self.reorder(row) for row in documents]
        return self.generator.answer_batch(
            questions, ordered, mode=self.mode, focus=self.focus, max_new_tokens=self.max_new_tokens
        )

    def require_mode(self) -> None:
        """Raise UnsupportedModelError if the model does not support the mode. Nothing is decoded."""
        if self.mode == "ape":  # the others were checked when the model was loaded
            self.generator.stream("?", ["."], mode="ape", max_new_tokens=1).close()

    def identity(self) -> Mapping[str, Any]:
        """Return the generator's identity with the changes of this system."""
        found, settings = self.generator.identity(), self.generator.settings
        tuned = self.mode == "fusion" or (self.mode == "concat" and settings.tuned_concat)
        changed: dict[str, Any] = {} if tuned else {"adapter": None, "decoder": None}
        if self.mode == "fusion":
            changed["positions"] = settings.positions
        if self.mode == "ape":
            changed |= {"temperature": settings.ape_temperature, "scale": settings.ape_scale}
        if self.focus is not None:  # omitted without focus, so that earlier journals stay valid
            changed |= {"focus": self.focus, "focus_weight": settings.focus_weight}
        return found | {
            **changed,
            "mode": self.mode,
            "context_window": self.generator.context_window,
            "max_new_tokens": self.max_new_tokens or self.generator.max_new_tokens,
        }


Weights = Literal["tuned", "full", "base", "concat", "sft"]


class Models:
    """Generators over the weights of a run, each loaded once and on first use.

    Args:
        load: function that returns a generator for ``model`` (another base model), ``adapter`` and ``decoder``.
        inputs: names of the weights to compare with the base model, or None: ``adapter`` and ``decoder`` (trained on
            fused documents), ``sft`` (an adapter folder or a whole model, trained on joined prompts), and
            ``concat_model`` (another base model for joined prompts).
        max_new_tokens: maximum tokens of an answer; None for the model's own limit.
        focus: documents kept by the systems with focus; None for the model's own number, else 1.
        focus_weight: weight of the passages' scores; None for the model's own, else 0.
    """

    def __init__(
        self,
        load: Callable[[Mapping[str, str | None]], KVFusionGenerator],
        inputs: Mapping[str, str | None],
        max_new_tokens: int | None = None,
        focus: int | None = None,
        focus_weight: float | None = None,
    ) -> None:
        self._load = load
        self._focus, self._focus_weight = focus, focus_weight
        self._inputs = inputs
        self._loaded: dict[frozenset[tuple[str, Any]], KVFusionGenerator] = {}
        self.max_new_tokens = max_new_tokens

    @property
    def focus(self) -> int:
        """Documents kept by all systems with focus, by default the number of the tuned weights."""
        return self._focus or self.generator("tuned").settings.focus or 1

    @property
    def focus_weight(self) -> float:
        """Weight of the passages' scores in all systems with focus, by default that of the tuned weights."""
        if self._focus_weight is not None:
            return self._focus_weight
        return self.generator("tuned").settings.focus_weight or 0.0

    def system(
        self,
        name: str,
        mode: Mode,
        weights: Weights,
        *,
        reorder: Reorder = list,
        focus: FocusChoice = None,
        **settings: Any,
    ) -> System:
        """Return a generator system over ``weights``, with ``settings`` in place of the model's own."""
        if focus is not None and self.generator(weights).settings.focus_weight != self.focus_weight:
            settings["focus_weight"] = self.focus_weight
        return GeneratorSystem(name, self.generator(weights, **settings), mode, reorder, self.max_new_tokens, focus)

    def generator(self, weights: Weights, **settings: Any) -> KVFusionGenerator:
        """Return the generator over ``weights``. Generators with other settings share the weights and the store."""
        options = self._options(weights)
        key = frozenset(options.items())
        if key not in self._loaded:
            self._loaded[key] = self._load(options)
        if not settings:
            return self._loaded[key]
        changed = key | frozenset(settings.items())
        if changed not in self._loaded:
            self._loaded[changed] = self._loaded[key].with_settings(**settings)
        return self._loaded[changed]

    def _options(self, weights: Weights) -> dict[str, str | None]:
        """Return what to load: for "tuned" the adapter, else the decoder, else the base model."""
        adapter, decoder, sft, other = (self._inputs.get(n) for n in ("adapter", "decoder", "sft", "concat_model"))
        joined = {} if other is None else {"model": other}
        tuned = {"decoder": decoder} if adapter is None else {"adapter": adapter}
        changes = {
            "base": {},
            "tuned": tuned,
            "full": {"decoder": decoder},
            "concat": joined or tuned,
            "sft": {**joined, "adapter": sft} if _contains(sft, ADAPTER_FILE) else _whole(sft, joined),
        }
        return {"adapter": None, "decoder": None} | changes[weights]


SystemFactory = Callable[[Models], System]

# Without --concat-model, mode "concat" uses the generator that "fusion" has loaded.
SYSTEMS: Mapping[str, SystemFactory] = MappingProxyType(
    {
        "fusion": lambda models: models.system("fusion", "fusion", "tuned"),
        "fusion-full": lambda models: models.system("fusion-full", "fusion", "full"),
        "fusion-base": lambda models: models.system("fusion-base", "fusion", "base"),
        "concat": lambda models: models.system("concat", "concat", "concat"),
        "concat-reorder": lambda models: models.system(
            "concat-reorder", "concat", "concat", reorder=long_context_order
        ),
        "sft": lambda models: models.system("sft", "concat", "sft", tuned_concat=True),
        "sft-reorder": lambda models: models.system(
            "sft-reorder", "concat", "sft", reorder=long_context_order, tuned_concat=True
        ),
        # Parallel Context Windows (arXiv 2212.10947) with one document per window
        "pcw": lambda models: models.system("pcw", "fusion", "base", passage_length=None),
        "global": lambda models: models.system("global", "fusion", "tuned", positions="global"),
        "ape": lambda models: models.system("ape", "ape", "base"),
        "focus": lambda models: models.system("focus", "fusion", "tuned", focus=models.focus),
        "focus-base": lambda models: models.system("focus-base", "fusion", "base", focus=models.focus),
        "concat-focus": lambda models: models.system("concat-focus", "concat", "concat", focus=models.focus),
    }
)
FOCUS_SYSTEMS = ("focus", "focus-base", "concat-focus")
NEEDED = MappingProxyType({"fusion-full": "decoder", "sft": "sft", "sft-reorder": "sft"})  # input by system


def default_systems(inputs: Mapping[str, str | None], *, focus: bool = False) -> list[str]:
    """Return the systems whose inputs are given, and those with focus if ``focus`` is set.

    ``fusion-base`` and ``focus-base`` are left out if they equal ``fusion`` and ``focus``.
    """
    tuned = inputs.get("adapter") or inputs.get("decoder")
    left_out = {*(() if tuned else ("fusion-base", "focus-base")), *(() if focus else FOCUS_SYSTEMS)}
    return [name for name in SYSTEMS if _missing(name, inputs) is None and name not in left_out]


def require_inputs(names: Sequence[str], inputs: Mapping[str, str | None]) -> None:
    """Raise InvalidInputError if an input of one of the named systems is missing."""
    for name in names:
        if (missing := _missing(name, inputs)) is not None:
            hint = "; with a decoder only, use 'fusion-full'" if name == "fusion" else ""
            raise InvalidInputError(f"the system {name!r} needs --{missing}, which is not given{hint}.")


def _missing(name: str, inputs: Mapping[str, str | None]) -> str | None:
    """Return the input that a system lacks, or None."""
    needed = NEEDED.get(name)
    if name == "fusion" and inputs.get("decoder") is not None:
        needed = "adapter"  # a decoder only is fusion-full
    return needed if needed is not None and inputs.get(needed) is None else None


def _whole(sft: str | None, joined: Mapping[str, str]) -> dict[str, str | None]:
    """Return how to load a whole model trained on joined prompts: as a decoder if this package trained it."""
    from ..text.settings import RECORD_NAME  # imports transformers

    return {**joined, "decoder": sft} if _contains(sft, RECORD_NAME) else {"model": sft}


def _contains(name: str | None, file: str) -> bool:
    """Return whether ``name`` is a folder that contains this file."""
    return name is not None and (expanded(name) / file).is_file()


def make_systems(
    names: Sequence[str], models: Models, factories: Mapping[str, SystemFactory] = SYSTEMS
) -> list[System]:
    """Return the named systems in order. The others are compared with the first one.

    Raises:
        InvalidInputError: there is no name, a name is not in ``factories``, or it is given twice.
    """
    require_systems(names, factories)
    return [factories[name](models) for name in names]


def possible_systems(systems: Sequence[System], *, named: bool) -> tuple[list[System], tuple[str, ...]]:
    """Return the systems whose model supports their mode, and a note on each of the others.

    Raises:
        UnsupportedModelError: a model does not support a mode, and the systems were ``named``.
    """
    possible: list[System] = []
    notes: list[str] = []
    for system in systems:
        try:
            if isinstance(system, GeneratorSystem):
                system.require_mode()
        except UnsupportedModelError as error:
            if named:
                raise
            notes.append(f"{system.name} left out: {error}")
        else:
            possible.append(system)
    return possible, tuple(notes)


def require_systems(names: Sequence[str], factories: Mapping[str, SystemFactory] = SYSTEMS) -> None:
    """Raise InvalidInputError as ``make_systems`` does, before anything is loaded."""
    if not names:
        raise InvalidInputError(f"no system is named; name some of {', '.join(factories)}.")
    for number, name in enumerate(names):
        if name not in factories:
            raise InvalidInputError(f"system is {name!r}, but it must be one of {', '.join(factories)}.")
        if name in names[:number]:
            raise InvalidInputError(f"the system {name!r} is named twice.")
