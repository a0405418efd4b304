"""Facts about a generator: its model, settings, default mode and identity."""

from __future__ import annotations

import hashlib
import json
from typing import Any, NoReturn, Self

from .. import __version__
from ..errors import InvalidInputError
from ..fusion.interface import FusionModel
from ..fusion.load_options import LoadKwargs
from ..home import HOME_VARIABLE, home
from ..schema import FocusChoice, Mode, ModeChoice
from ..store import DocumentStore
from ..text.measured_mode import Measured, keep_measurement
from ..text.settings import ModelSettings
from .engine import Engine


class GeneratorFacts:
    """Properties of a generator over ``_engine``."""

    _engine: Engine[FusionModel]

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.model_id!r}, mode={self.mode!r}, context_window={self.context_window}, "
            f"store={self.store!r})"
        )

    def __copy__(self) -> Self:
        return self  # frameworks copy their components, which share the loaded model

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise InvalidInputError(
            f"this {type(self).__name__} cannot be pickled, because it holds a loaded model; load it with "
            "from_pretrained in each process."
        )

    @staticmethod
    def load_options() -> frozenset[str]:
        """Return the names of the keyword arguments of ``from_pretrained``."""
        return frozenset(LoadKwargs.__annotations__) | {
            "store", "namespace", "max_fused_tokens", "key_kind", "gather"
        }  # fmt: skip

    @property
    def model_id(self) -> str:
        return self._engine.model.model_id

    @property
    def settings(self) -> ModelSettings:
        return self._engine.settings

    @property
    def mode(self) -> Mode:
        """Mode of calls that do not name one."""
        return self.default_mode()[0]

    def default_mode(self) -> tuple[Mode, str]:
        """Return the mode of calls that do not name one, and the reason for it."""
        mode, reason = self._engine.prompts.mode(None)
        return mode.name, reason

    def focus_of(self, choice: FocusChoice, mode: Mode) -> int | None:
        """Return the number of documents that a call in ``mode`` keeps, or None for all."""
        return self._engine.prompts.focus(choice, mode)

    def default_focus(self) -> int | None:
        """Return the number of documents that a call keeps by default, or None for all."""
        return self.focus_of("auto", self.mode)

    def keep_measurement(self, best: Measured, table: list[dict[str, Any]]) -> None:
        """Save the best mode and focus of this model and adapter for later processes, with the measured table.

        Raises:
            InvalidInputError: the file cannot be written.
        """
        try:
            keep_measurement(self._engine.prompts.identity, self.model_id, best, table)
        except OSError as error:
            raise InvalidInputError(
                f"the measured mode cannot be saved in {str(home())!r}: {error.strerror or error}; set "
                f"{HOME_VARIABLE} to a writable folder."
            ) from error

    @property
    def follows_instructions(self) -> bool:
        """Whether ``prompt=`` is read. A model trained on bare questions only reads ``question``."""
        return self.settings.layout == "prompt" or self._engine.encoder.follows_instructions

    def reads_prompt(self, mode: ModeChoice | None = None) -> bool:
        """Whether ``mode`` reads ``prompt=`` unchanged, in the model's chat template.

        Otherwise the model reads the fixed templates that it was trained with.
        """
        return self._engine.prompts.reads_prompt(self._engine.prompts.mode(mode)[0].name)

    @property
    def context_window(self) -> int | None:
        """Number of positions of the model, in tokens. Fused documents share them."""
        return self._engine.model.context_window

    @property
    def namespace(self) -> str:
        """Tenant whose documents this generator reads in a shared store."""
        return self._engine.namespace

    @property
    def max_new_tokens(self) -> int:
        return self._engine.max_new_tokens

    @property
    def store(self) -> DocumentStore | None:
        """Store of the document KVs, or None if nothing is kept."""
        store = self._engine.document_kvs.store
        return None if store.is_empty else store

    def identity(self) -> dict[str, str | int | None]:
        """Return everything that changes an answer besides question, documents and options. It holds no secrets.

        ``model`` is a digest of weights, configuration, dtype, device and library versions. ``settings`` is a digest
        of templates, lengths, tokenizer and end tokens.
        """
        model = self._engine.model
        facts = [self.settings.to_dict(), self._engine.encoder.plain.digest, sorted(model.end_ids)]
        return {
            "model_id": self.model_id,
            "revision": model.revision,
            **model.identity(),
            "settings": hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest(),
            "mode": self.mode,
            "version": __version__,
        }

    def encode_text(self, text: str) -> list[int]:
        """Return the token ids of plain text, without control tokens."""
        return self._engine.encoder.plain.encode(text)

    def count_tokens(self, text: str) -> int:
        return len(self.encode_text(text))
