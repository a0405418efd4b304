"""Expected prompts and answers of an untuned model, from transformers' ``apply_chat_template`` and ``generate``.

Only the generator under test belongs to this package. Its requests and answers are recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import tiny
import torch

from kvfusion_rag import KVFusionGenerator
from kvfusion_rag.engine.running_batch import Run

NEW_TOKENS = 6
POSITIONS = 4096


@dataclass
class Reader:
    """A tiny untuned chat model with the token ids of its prompts and answers."""

    generator: KVFusionGenerator
    read: list[tuple[int, ...]] = field(default_factory=list)
    answered: list[tuple[int, ...]] = field(default_factory=list)


def untuned_reader(monkeypatch: pytest.MonkeyPatch) -> Reader:
    found = Reader(tiny.untuned(max_position_embeddings=POSITIONS))
    engine = found.generator._engine
    request, answer = engine.request, Run.answer

    def note_request(*arguments: Any, **named: Any) -> Any:
        made = request(*arguments, **named)
        found.read.append(tuple(made.question.ids))
        return made

    def note_answer(*arguments: Any) -> Any:
        made = answer(*arguments)
        found.answered.append(made.token_ids)
        return made

    monkeypatch.setattr(engine, "request", note_request)
    monkeypatch.setattr(Run, "answer", note_answer)
    return found


def ids_of(turns: Sequence[tuple[str, str]], **variables: Any) -> list[int]:
    conversation = [{"role": role, "content": text} for role, text in turns]
    tok = tiny.tokenizer("byte-bpe")
    return list(tok.apply_chat_template(conversation, add_generation_prompt=True, **variables)["input_ids"])


def generated(ids: Sequence[int]) -> list[int]:
    network = tiny.model("llama", max_position_embeddings=POSITIONS)
    asked = torch.tensor([list(ids)])
    found = network.generate(
        asked, attention_mask=torch.ones_like(asked), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )
    return found[0, len(ids) :].tolist()
