"""Conversations: which turns a model reads behind its documents, and its own chat template around them.

Documents stand in the first user turn, at its beginning, so that their keys and values do not depend on what is said
in any turn. Texts of messages never pass through the template: it is rendered with a mark in the place of each, which
``prompts.py`` fills in. This module encodes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter

from transformers import PreTrainedTokenizerBase

from .errors import InvalidInputError
from .schema import ROLES, Message

TEXT_SEPARATOR = "\n\n"
MARK = re.compile("\u2983[a-z0-9]+\u2984")  # unlikely text, and cut out again
DOCUMENTS_MARK = "\u2983documents\u2984"
# Some templates print today's date, which would change the prefix, and so every key, at midnight: they take one as
# an argument (Llama 3), or ask a function for it (SmolLM 3), which is shadowed.
FIXED_DATE = "26 Jul 2024"
_FIXED_CLOCK = f"{{%- macro strftime_now(format) -%}}{FIXED_DATE}{{%- endmacro -%}}"

_LABELS = {"user": "User", "assistant": "Assistant"}


def documents_turn(text: str) -> str:
    """The first user turn: the documents, then ``text``."""
    return f"Documents:\n\n{DOCUMENTS_MARK}{text}"


def mark(name: object) -> str:
    """What stands in a template in the place of a text."""
    return f"\u2983{name}\u2984"


def render(tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]]) -> str:
    """The model's chat template around ``turns`` (role, text), up to where its answer begins.

    Raises:
        jinja2.TemplateError: the template does not take such turns.
    """
    text = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns],
        chat_template=_FIXED_CLOCK + tokenizer.get_chat_template(),
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
        date_string=FIXED_DATE,
    )
    assert isinstance(text, str)
    return text


def conversation(messages: Sequence[Message]) -> list[Message]:
    """``messages`` as turns of user and assistant, one after the other, from user to user.

    What the system says opens the first user turn: behind the documents, so that it changes none of their keys.
    Neighbours of one role become one turn, blank ones fall away.

    Raises:
        InvalidInputError: an item that is no message, an unknown role, or a last message that is not the user's.
    """
    for number, message in enumerate(messages):
        if not isinstance(message, Message) or message.role not in ROLES or not isinstance(message.text, str):
            raise InvalidInputError(
                f"message {number} of the prompt is {message!r}, but it must be a kvfusion_rag.Message with a text "
                f"and one of the roles {', '.join(ROLES)}."
            )
    spoken = [message for message in messages if message.text.strip()]
    if not spoken or spoken[-1].role != "user":
        raise InvalidInputError(
            f"the conversation ends with {spoken[-1].role if spoken else 'no text'!r}, but its last message must be "
            "the user's, because that is what is answered."
        )
    said = [Message("user", message.text) for message in spoken if message.role == "system"]
    others = [message for message in spoken if message.role != "system"]
    opening = said if said or others[0].role == "user" else [Message("user", "")]
    return [
        Message(role, TEXT_SEPARATOR.join(message.text.strip() for message in group))
        for role, group in groupby([*opening, *others], key=attrgetter("role"))
    ]


def as_text(turns: Sequence[Message]) -> str:
    """Turns as one text, for models without a chat template; only where there are several are they labelled."""
    if len(turns) == 1:
        return turns[0].text
    return TEXT_SEPARATOR.join(f"{_LABELS[turn.role]}: {turn.text}" for turn in turns if turn.text)
