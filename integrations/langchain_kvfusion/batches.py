"""DocumentBatches: batches whose calls take ``documents=``, and in which a bad input affects only its own answer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from langchain_core.language_models import LanguageModelInput
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import get_config_list

from .documents import DocumentsArgument, is_nested, require_one_list_each

Configs = RunnableConfig | list[RunnableConfig] | None


class DocumentBatches(Runnable[LanguageModelInput, Any]):
    """``batch`` and ``abatch`` of a model, in front of LangChain's own class of models."""

    @abstractmethod
    def _distribute(
        self, inputs: list[Any], config: Configs, documents: DocumentsArgument | None, options: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """Return inputs with their documents attached, and the options of the call."""

    def batch(
        self,
        inputs: list[Any],
        config: Configs = None,
        *,
        return_exceptions: bool = False,
        documents: DocumentsArgument | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Like LangChain's batch. ``documents`` is one list for all inputs, or one list per input.

        With ``return_exceptions``, a bad input has its exception in its place, and the others have their answers.
        """
        if not return_exceptions:
            inputs, options = self._distribute(inputs, config, documents, kwargs)
            return super().batch(inputs, config, **options)
        found, options = self._attach_each(inputs, config, documents, kwargs)
        good = [number for number, one in enumerate(found) if not isinstance(one, Exception)]
        configs = get_config_list(config, len(inputs))
        answers = self._batch_apart([found[i] for i in good], [configs[i] for i in good], options)
        return _merged(found, good, answers)

    async def abatch(
        self,
        inputs: list[Any],
        config: Configs = None,
        *,
        return_exceptions: bool = False,
        documents: DocumentsArgument | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Like :meth:`batch`, without blocking the event loop."""
        if not return_exceptions:
            inputs, options = self._distribute(inputs, config, documents, kwargs)
            return await super().abatch(inputs, config, **options)
        found, options = self._attach_each(inputs, config, documents, kwargs)
        good = [number for number, one in enumerate(found) if not isinstance(one, Exception)]
        configs = get_config_list(config, len(inputs))
        answers = await self._abatch_apart([found[i] for i in good], [configs[i] for i in good], options)
        return _merged(found, good, answers)

    def _attach_each(
        self, inputs: list[Any], config: Configs, documents: DocumentsArgument | None, options: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """Like :meth:`_distribute`, with an exception in place of each bad input."""
        shares = (
            [documents[i : i + 1] for i in range(len(inputs))] if is_nested(documents) else [documents] * len(inputs)
        )
        attached: list[Any] = []
        for one, own, share in zip(inputs, get_config_list(config, len(inputs)), shares, strict=True):
            try:
                if is_nested(documents):
                    require_one_list_each(documents, len(inputs))
                [value], options = self._distribute([one], [own], share, options)
                attached.append(value)
            except Exception as error:  # as LangChain's own batch
                attached.append(error)
        return attached, options

    def _batch_apart(self, inputs: list[Any], configs: list[RunnableConfig], options: dict[str, Any]) -> list[Any]:
        """Answer all inputs together. If that fails, answer the two halves separately."""
        answers = super().batch(inputs, configs, return_exceptions=True, **options)
        if not _failed_together(answers):
            return answers
        half = len(inputs) // 2
        first = self._batch_apart(inputs[:half], configs[:half], options)
        return first + self._batch_apart(inputs[half:], configs[half:], options)

    async def _abatch_apart(
        self, inputs: list[Any], configs: list[RunnableConfig], options: dict[str, Any]
    ) -> list[Any]:
        answers = await super().abatch(inputs, configs, return_exceptions=True, **options)
        if not _failed_together(answers):
            return answers
        half = len(inputs) // 2
        first = await self._abatch_apart(inputs[:half], configs[:half], options)
        return first + await self._abatch_apart(inputs[half:], configs[half:], options)


def _failed_together(answers: Sequence[Any]) -> bool:
    """Whether one exception stands for several inputs, as LangChain's LLMs return it."""
    return len(answers) > 1 and isinstance(answers[0], Exception) and all(one is answers[0] for one in answers)


def _merged(found: list[Any], good: Sequence[int], answers: Sequence[Any]) -> list[Any]:
    """Return ``found`` with the answers in the places of the good inputs."""
    answer_of = dict(zip(good, answers, strict=True))
    return [answer_of.get(number, one) for number, one in enumerate(found)]
