"""A fake generator without a model, for tests of the code that uses one.

It has the public interface of KVFusionGenerator, records every call, answers with fixed pieces and checks arguments as
early as the real one. Tests can hold it at any step, or make it fail.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kvfusion_rag import (
    Answer,
    AnswerPiece,
    AnswerStream,
    Attribution,
    Citation,
    Document,
    Influence,
    InvalidInputError,
    Message,
    PromptPart,
    ShownPrompt,
    Source,
    Timings,
    Usage,
)
from kvfusion_rag.schema import FocusChoice, Mode

Prompt = str | Sequence[Message] | None

HOLD_LIMIT = 10.0  # seconds after which a held call fails, so that a blocked event loop does not hang the test


@dataclass
class Call:
    """One call with its arguments."""

    method: str
    question: str
    documents: list[Document | str]
    prompt: Prompt
    options: dict[str, Any]

    @property
    def texts(self) -> list[str]:
        return [d if isinstance(d, str) else d.text for d in self.documents]

    @property
    def ids(self) -> list[str | None]:
        return [None if isinstance(d, str) else d.id for d in self.documents]

    @property
    def wording(self) -> str:
        """The prompt, or the joined texts of its messages."""
        if self.prompt is None or isinstance(self.prompt, str):
            return self.prompt or self.question
        return "\n".join(message.text for message in self.prompt)


@dataclass
class RecordingGenerator:
    """Answers every question with `pieces` after reasoning with `thoughts`, and records calls and threads."""

    pieces: Sequence[str] = ("in", " lima")
    thoughts: Sequence[str] = ()
    hold: threading.Event | None = None
    error: Exception | None = None
    fail_after: int = 0
    follows_instructions: bool = True
    is_untuned: bool = False
    model_id: str = "fake/model"
    mode: str = "fusion"
    context_window: int = 4096
    max_new_tokens: int = 48
    namespace: str = ""
    calls: list[Call] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    streams: list[RecordingStream] = field(default_factory=list)

    def focus_of(self, wanted: FocusChoice, mode: Mode) -> int | None:
        return None if wanted == "auto" else wanted

    def reads_prompt(self, mode: str | None = None) -> bool:
        return self.is_untuned

    def answer(
        self, question: str, documents: Sequence[Document | str] = (), *, prompt: Prompt = None, **options: Any
    ) -> Answer:
        call = self._record("answer", question, documents, prompt, options)
        self.step()
        if self.error is not None:
            raise self.error
        return self.answer_to(call)

    def answer_batch(
        self,
        questions: Sequence[str],
        documents: Sequence[Sequence[Document | str]],
        *,
        prompts: Sequence[Prompt] | None = None,
        **options: Any,
    ) -> list[Answer]:
        wordings = prompts or [None] * len(questions)
        calls = [
            self._record("answer_batch", question, given, prompt, options)
            for question, given, prompt in zip(questions, documents, wordings, strict=True)
        ]
        self.step()
        if self.error is not None:
            raise self.error
        return [self.answer_to(call) for call in calls]

    async def aanswer(self, *args: Any, **kwargs: Any) -> Answer:
        return await asyncio.to_thread(self.answer, *args, **kwargs)

    async def aanswer_batch(self, *args: Any, **kwargs: Any) -> list[Answer]:
        return await asyncio.to_thread(self.answer_batch, *args, **kwargs)

    def stream(
        self, question: str, documents: Sequence[Document | str] = (), *, prompt: Prompt = None, **options: Any
    ) -> RecordingStream:
        self.streams.append(RecordingStream(self, self._record("stream", question, documents, prompt, options)))
        return self.streams[-1]

    def show_prompt(
        self, question: str, documents: Sequence[Document | str] = (), *, prompt: Prompt = None, **options: Any
    ) -> ShownPrompt:
        call = self._record("show_prompt", question, documents, prompt, options)
        return ShownPrompt("concat", (PromptPart(call.wording),))

    def attribute(
        self, question: str, documents: Sequence[Document | str], *, answer: Answer, **options: Any
    ) -> Attribution:
        """Return an effect of as many nats as the document has words."""
        call = self._record("attribute", question, documents, None, options)
        influences = (
            Influence(s.id, s.title, 1 / len(call.documents), -1.0 - s.tokens, float(s.tokens))
            for s in self._sources(call.documents)
        )
        return Attribution(question, answer.text, -1.0, answer.mode, tuple(influences))

    def prefill(self, documents: Sequence[Document | str], **wording: Any) -> list[Source]:
        return list(self._sources(list(documents)))

    def prefill_steps(
        self, documents: Sequence[Document | str], **wording: Any
    ) -> Generator[None, None, list[Source]]:
        for _ in documents:
            yield
        return self.prefill(documents, **wording)

    def forget_steps(self, documents: Sequence[Document | str]) -> Generator[None, None, int]:
        yield
        return len(documents)

    def encode_text(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]

    def count_tokens(self, text: str) -> int:
        return len(self.encode_text(text))

    def identity(self) -> dict[str, str | int | None]:
        return {"model_id": self.model_id, "revision": None, "mode": self.mode}

    def step(self) -> None:
        """One step of work: record the thread, and wait while the test holds it."""
        self.threads.append(threading.get_ident())
        if self.hold is not None and not self.hold.wait(HOLD_LIMIT):
            raise TimeoutError("the fake was held too long, because the test could not release it")

    def answer_to(self, call: Call) -> Answer:
        text = "".join(self.pieces)
        sources = self._sources(call.documents)
        document_tokens = sum(source.tokens for source in sources)
        return Answer(
            text=text,
            mode=call.options.get("mode") or self.mode,
            sources=sources,
            citations=tuple(_citations(text, sources, call)),
            usage=Usage(
                prompt_tokens=document_tokens + self.count_tokens(call.wording),
                document_tokens=document_tokens,
                cached_document_tokens=0,
                completion_tokens=len(self.thoughts) + len(self.pieces),
                reasoning_tokens=len(self.thoughts),
            ),
            timings=Timings(prefill=0.1, first_token=0.2, total=0.3),
            finish_reason="stop",
            reasoning="".join(self.thoughts) or None,
        )

    def _record(
        self,
        method: str,
        question: str,
        documents: Sequence[Document | str],
        prompt: Prompt,
        options: Mapping[str, Any],
    ) -> Call:
        if options.get("temperature", 0.0) < 0:
            raise InvalidInputError(f"temperature is {options['temperature']}, but it must be at least 0.")
        self.calls.append(Call(method, question, list(documents), prompt, dict(options)))
        return self.calls[-1]

    def _sources(self, documents: Sequence[Document | str]) -> tuple[Source, ...]:
        seen: dict[str, str] = {}
        sources = []
        for number, item in enumerate(documents, start=1):
            document = Document(item) if isinstance(item, str) else item
            name = str(number) if document.id is None else document.id
            sources.append(
                Source(
                    id=name,
                    origin="computed" if document.text.strip() else "blank",
                    tokens=self.count_tokens(document.text),
                    title=document.title,
                    duplicate_of=seen.get(document.text),
                    metadata=document.metadata,
                )
            )
            seen.setdefault(document.text, name)
        return tuple(sources)


class RecordingStream(AnswerStream):
    """A real stream over the pieces of a fake generator."""

    def __init__(self, generator: RecordingGenerator, call: Call) -> None:
        super().__init__(_pieces(generator, call), threading.Event())

    @property
    def closed(self) -> bool:
        """Whether the work has ended, which may be later than the call of close."""
        return inspect.getgeneratorstate(self._pieces) == inspect.GEN_CLOSED


def _pieces(generator: RecordingGenerator, call: Call) -> Generator[AnswerPiece | Answer, None, None]:
    pieces = [*(AnswerPiece(p, is_reasoning=True) for p in generator.thoughts), *map(AnswerPiece, generator.pieces)]
    for number, piece in enumerate([*pieces, None]):
        generator.step()
        if generator.error is not None and number == generator.fail_after:
            raise generator.error
        if piece is not None:
            yield piece
    yield generator.answer_to(call)


def _citations(text: str, sources: Sequence[Source], call: Call) -> Iterator[Citation]:
    for source, body in zip(sources, call.texts, strict=True):
        start = body.lower().find(text)
        if start >= 0:
            yield Citation(source.id, start, start + len(text), body[start : start + len(text)])


@dataclass
class EchoGenerator(RecordingGenerator):
    """Answers with its arguments, so that each answer identifies its call."""

    def stream(
        self, question: str, documents: Sequence[Document | str] = (), *, prompt: Prompt = None, **options: Any
    ) -> RecordingStream:
        call = self._record("stream", question, documents, prompt, options)
        before, space, after = echo(call).partition(" ")
        self.streams.append(RecordingStream(replace(self, pieces=(before, space, after)), call))
        return self.streams[-1]

    def answer_to(self, call: Call) -> Answer:
        return replace(super().answer_to(call), text=echo(call))


def echo(call: Call) -> str:
    """Return the answer of EchoGenerator to ``call``."""
    return f"{call.question} <- {' + '.join(call.texts)} at {call.options.get('temperature')}"
