"""The calls of a generator that fill and empty its document store."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from ..errors import DurabilityError, InvalidInputError
from ..option_names import check_option_names
from ..schema import Document, Prompt, Source, Tool
from ..store import namespace_key, require_collection, write_manifest
from ..text.documents import UNLIMITED
from ..text.layouts import Layout
from ..text.steps import finish
from ..text.tools.definitions import ToolUse
from .document_kvs import Scope
from .generator_facts import GeneratorFacts

logger = logging.getLogger(__name__)


class DocumentCalls(GeneratorFacts):
    """Prefill, prefetch, forget and clear over ``_engine``."""

    @check_option_names()
    def prefill(
        self,
        documents: Sequence[Document | str],
        *,
        prompt: Prompt = None,
        question: str = "",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Tool] | None = None,
        progress: bool = False,
        durable: bool = False,
        collection: str | None = None,
    ) -> list[Source]:
        """Compute the KVs of ``documents`` and keep them in the store for later questions.

        Args:
            documents: any number. The limit on what one question may fuse does not apply.
            prompt: wording of the questions to come. Its fixed text in front of the documents is part of their keys.
            question: the question in ``prompt``, if it contains one. Lines with the question are not part of the keys.
            chat_template_kwargs, tools: those of the questions (:meth:`answer`). Tools that a prompt shows in front of
                the documents are part of their keys.
            progress: show a progress bar if this takes longer than a second.
            durable: return when the store's folder or URL has every document, and raise if it cannot. A local disk in
                front of a URL is a cache, whose cap may be smaller. A process with a full queue of uploads waits.
            collection: name of the collection that the documents are added to. The store lists its documents, so that
                ``kvfusion store missing`` finds lost ones.

        Raises:
            InvalidInputError: the generator has no store, a tool is not allowed, ``positions`` is "global", or a
                collection or ``durable`` is asked of a store that only keeps documents in memory or cannot be written.
            DurabilityError: the store could not keep all documents; the error names them.
            StoreError: the store's URL fails while documents are looked up or listed.
        """
        steps = self.prefill_steps(
            documents,
            prompt,
            question,
            chat_template_kwargs,
            tools,
            progress=progress,
            durable=durable,
            collection=collection,
        )
        return finish(steps)

    def prefill_steps(
        self,
        documents: Sequence[Document | str],
        prompt: Prompt = None,
        question: str = "",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Tool] | None = None,
        *,
        progress: bool = False,
        durable: bool = False,
        collection: str | None = None,
    ) -> Generator[None, None, list[Source]]:
        """Like :meth:`prefill`, as a generator that pauses after every few passes and returns the sources.

        Close it to stop early. What has been computed until then stays in the store.
        """
        if self.store is None:
            raise InvalidInputError(
                "store is None, but prefill keeps document KVs in a store; give the generator one."
            )
        if self.settings.positions == "global":
            raise InvalidInputError(
                "positions is 'global', so a document's position depends on the question's other documents; use "
                "positions='uniform' to prefill."
            )
        if durable or collection is not None:
            self._require_writable_store(collection)
        layout = self._layout(prompt, question, chat_template_kwargs, tools)
        encoded = yield from self._engine.reading_steps(documents, layout, max_tokens=UNLIMITED)
        kvs, scope = self._engine.document_kvs, Scope(layout.prefix, self.namespace)
        stored = yield from kvs.store_steps(encoded.keys, scope, progress=progress, durable=durable)
        if stored.lost:
            raise DurabilityError(encoded.ids_with(stored.lost), next(iter(stored.lost.values())))
        if lost := 0 if durable else sum(key not in self.store for key in encoded.keys):
            logger.warning(
                "the store is too small: %d of %d documents were computed but not kept", lost, len(encoded.keys)
            )
        if collection is not None and (tier := self.store.slowest_tier) is not None:
            write_manifest(tier, namespace_key(self.namespace), collection, encoded.keys_by_id)
        return list(encoded.sources(stored.origins, stored.misses, kvs.key_kind))

    def _layout(
        self,
        prompt: Prompt,
        question: str,
        chat_template_kwargs: Mapping[str, Any] | None,
        tools: Sequence[Tool] | None,
    ) -> Layout:
        use = ToolUse.of(tools, None, None)  # which of them may be called changes no key
        return self._engine.prompts.fused_layout(prompt, question, chat_template_kwargs, use)

    def _require_writable_store(self, collection: str | None) -> None:
        if collection is not None:
            require_collection(collection)
        tier = None if self.store is None else self.store.slowest_tier
        if tier is None or tier.read_only:
            raise InvalidInputError(
                f"the store is {self.store!r}, but durable=True and collection= need a folder or URL that can be "
                "written."
            )

    @check_option_names()
    def prefetch(
        self,
        documents: Sequence[Document | str],
        *,
        prompt: Prompt = None,
        question: str = "",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Tool] | None = None,
    ) -> Future[int]:
        """Start loading the stored KVs of ``documents`` into memory, for example while a reranker chooses.

        Returns at once. Documents that are not stored are not computed. Arguments are those of :meth:`prefill`.

        Returns:
            A future with the number of documents (pieces, if long ones are split) that are in memory at the end.
        """
        layout = self._layout(prompt, question, chat_template_kwargs, tools)
        return self._engine.document_kvs.prefetch(self._engine.read(documents, layout, max_tokens=UNLIMITED).keys)

    @check_option_names()
    def store_keys(
        self,
        documents: Sequence[Document | str],
        *,
        prompt: Prompt = None,
        question: str = "",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Tool] | None = None,
    ) -> dict[str, list[str]]:
        """Return the store keys of each document's pieces, by document id. Nothing is computed.

        Arguments are those of :meth:`prefill`. ``store.missing`` tells which of the keys the store lacks.
        """
        layout = self._layout(prompt, question, chat_template_kwargs, tools)
        return self._engine.read(documents, layout, max_tokens=UNLIMITED).keys_by_id

    def forget(self, documents: Sequence[Document | str]) -> int:
        """Remove the KVs of ``documents`` in this namespace from every tier of the store, for all models.

        Documents are found by the token ids that this model's tokenizer gives them, with and without their titles,
        in its own templates and in prompts that separate documents by a blank line.

        Returns:
            The number of removed copies.
        """
        return finish(self.forget_steps(documents))

    def forget_steps(self, documents: Sequence[Document | str]) -> Generator[None, None, int]:
        """Like :meth:`forget`, as a generator that pauses while it encodes. Nothing is removed before its end."""
        keys: set[str] = set()
        for layout in self._engine.prompts.every_layout():
            keys.update((yield from self._engine.reading_steps(documents, layout, max_tokens=UNLIMITED)).keys)
        return self._engine.document_kvs.store.forget(keys)

    def clear(self) -> int:
        """Remove all document KVs of this namespace from every tier, and return the number of removed copies."""
        return self._engine.document_kvs.store.clear(namespace_key(self.namespace))
