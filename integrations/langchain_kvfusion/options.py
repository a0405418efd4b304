"""Options of a call, and the metadata of an answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from kvfusion_rag import Answer, InvalidInputError, UnknownOptionError

OPTION_NAMES = (
    "temperature",
    "max_tokens",
    "max_reasoning_tokens",
    "top_p",
    "top_k",
    "seed",
    "mode",
    "focus",
    "attribution",
    "min_support",
    "chat_template_kwargs",
)
_ALIAS = "max_new_tokens"
_FORM = ("response_format", "tools", "tool_choice", "parallel_tool_calls")  # what an answer consists of


def call_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a call under our names, without those that are None.

    ``focus`` is kept even if it is None, because None means all documents.

    Raises:
        InvalidInputError: a name is unknown, or ``max_tokens`` and ``max_new_tokens`` are both given.
    """
    UnknownOptionError.raise_for(given, ("documents", "stop", *OPTION_NAMES, *_FORM, _ALIAS), "a call")
    if given.get(_ALIAS) is not None and given.get("max_tokens") is not None:
        raise InvalidInputError(
            f"max_tokens is {given['max_tokens']} and {_ALIAS} is {given[_ALIAS]}, but they are the same option; set "
            "only one."
        )
    named = {
        ("max_tokens" if name == _ALIAS else name): value
        for name, value in given.items()
        if value is not None or name == "focus"
    }
    return dict(sorted(named.items()))


def generation_info(answer: Answer) -> dict[str, Any]:
    """Return the answer's metadata as plain data, without the metadata of its documents.

    ``usage["prompt_tokens"]`` includes the documents.
    """
    info = answer.to_dict()
    for name in ("text", "timings", "token_ids", "tool_calls"):
        del info[name]
    for source in info["sources"]:
        del source["metadata"]
    return info


def total_usage(infos: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return the total token counts of a batch from the ``generation_info`` of its answers."""
    total: Counter[str] = Counter()
    for info in infos:
        total.update(info["usage"])
    return dict(total)
