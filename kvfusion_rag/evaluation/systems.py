"""The systems that an evaluation sets side by side, and how each is made.

A system answers questions from documents in a given order. ``SYSTEMS`` is the one list of those that the command
knows: a further one is a line there. Loading models is the caller's; this module imports none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import InvalidInputError
from .orders import long_context_order

if TYPE_CHECKING:
    from ..generator import KVFusionGenerator
    from ..schema import Document, Mode

Reorder = Callable[[Sequence["Document"]], "list[Document]"]


class AnswerLike(Protocol):
    """What is read of an answer: the model's text, the source's spelling of it, and the generated ids."""

    @property
    def text(self) -> str: ...
    @property
    def cited_text(self) -> str: ...
    @property
    def token_ids(self) -> tuple[int, ...]: ...


class System(Protocol):
    """Something that answers questions, the same way each time; ``name`` heads its line in the report."""

    @property
    def name(self) -> str: ...

    def answer_batch(self, questions: Sequence[str], documents: Sequence[Sequence[Document]]) -> Sequence[AnswerLike]:
        """One answer a question. Raises ContextLimitError where one of them is too long for the model."""
        ...

    def identity(self) -> Mapping[str, Any]:
        """JSON-able: what the answers depend on, for the report."""
        ...


@dataclass(frozen=True, slots=True)
class GeneratorSystem:
    """A generator in one mode, documents reordered first where ``reorder`` is given; greedy decoding."""

    name: str
    generator: KVFusionGenerator
    mode: Mode
    reorder: Reorder = list
    max_new_tokens: int | None = None

    def answer_batch(self, questions: Sequence[str], documents: Sequence[Sequence[Document]]) -> Sequence[AnswerLike]:
        ordered = [self.reorder(row) for row in documents]
        return self.generator.answer_batch(questions, ordered, mode=self.mode, max_new_tokens=self.max_new_tokens)

    def identity(self) -> Mapping[str, Any]:
        """The generator's identity with what this system changes of it."""
        found = self.generator.identity()
        return found | {
            "adapter": found["adapter"] if self.mode == "fusion" or self.generator.settings.tuned_concat else None,
            "mode": self.mode,
            "context_window": self.generator.context_window,
            "max_new_tokens": self.max_new_tokens or self.generator.max_new_tokens,
        }


class Models:
    """Generators of one base model in several variants, each loaded once and on first use.

    Args:
        load: makes a generator from options (``adapter``: a folder or ``None``, ...).
        tuning: the options that name what was trained and is being judged; all ``None`` is the base model.
        max_new_tokens: longest answer; ``None`` for the model's own.
    """

    def __init__(
        self,
        load: Callable[[Mapping[str, str | None]], KVFusionGenerator],
        tuning: Mapping[str, str | None],
        max_new_tokens: int | None = None,
    ) -> None:
        self._load = load
        self._tuning = tuning
        self._loaded: dict[frozenset[tuple[str, str | None]], KVFusionGenerator] = {}
        self.max_new_tokens = max_new_tokens

    def system(self, name: str, mode: Mode, *, reorder: Reorder = list, **changes: str | None) -> System:
        """A generator system over the tuned model, or over one with ``changes`` of its options."""
        return self._system(name, mode, {**self._tuning, **changes}, reorder)

    def base_system(self, name: str, mode: Mode) -> System:
        """A generator system over the model without any tuning."""
        return self._system(name, mode, dict.fromkeys(self._tuning), list)

    def _system(self, name: str, mode: Mode, options: Mapping[str, str | None], reorder: Reorder) -> System:
        key = frozenset(options.items())
        if key not in self._loaded:
            self._loaded[key] = self._load(options)
        return GeneratorSystem(name, self._loaded[key], mode, reorder, self.max_new_tokens)


SystemFactory = Callable[[Models], System]

# Mode "concat" needs no other model, so it takes the generator that "fusion" has loaded.
SYSTEMS: Mapping[str, SystemFactory] = MappingProxyType(
    {
        "fusion": lambda models: models.system("fusion", "fusion"),
        "fusion-base": lambda models: models.base_system("fusion-base", "fusion"),
        "concat": lambda models: models.system("concat", "concat"),
        "concat-reorder": lambda models: models.system("concat-reorder", "concat", reorder=long_context_order),
    }
)


def make_systems(
    names: Sequence[str], models: Models, factories: Mapping[str, SystemFactory] = SYSTEMS
) -> list[System]:
    """The named systems in order; the first is the one that others are compared with.

    Raises:
        InvalidInputError: no name, one that is not in ``factories``, or one given twice.
    """
    require_systems(names, factories)
    return [factories[name](models) for name in names]


def require_systems(names: Sequence[str], factories: Mapping[str, SystemFactory] = SYSTEMS) -> None:
    """Raise InvalidInputError as ``make_systems`` does, before anything is loaded."""
    if not names:
        raise InvalidInputError(f"no system is named; they are {', '.join(factories)}.")
    for number, name in enumerate(names):
        if name not in factories:
            raise InvalidInputError(f"{name!r} is no system; they are {', '.join(factories)}.")
        if name in names[:number]:
            raise InvalidInputError(f"the system {name!r} is named twice.")
