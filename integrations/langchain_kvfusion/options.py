"""The options of one call and what an answer reports back, in LangChain's words.

Knows the names that a call may use and the plain, JSON-ready form of an Answer. No model, no prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from kvfusion_rag import Answer, InvalidInputError

OPTION_NAMES = (
    "temperature",
    "max_tokens",
    "top_p",
    "top_k",
    "seed",
    "mode",
    "focus",
    "attribution",
    "chat_template_kwargs",
)
_ALIAS = "max_new_tokens"


def call_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that one call sets itself, under our names; those given as None are left out.

    ``focus`` stays even if it is None, because None means all documents.

    Raises:
        InvalidInputError: an unknown name, or ``max_tokens`` together with ``max_new_tokens``.
    """
    unknown = sorted(set(given) - {*OPTION_NAMES, _ALIAS})
    if unknown:
        raise InvalidInputError(
            f"unknown options {unknown}; a call takes documents, stop, {', '.join(OPTION_NAMES)} and {_ALIAS} "
            "(another name for max_tokens)."
        )
    if given.get(_ALIAS) is not None and given.get("max_tokens") is not None:
        raise InvalidInputError(
            f"max_tokens is {given['max_tokens']} and {_ALIAS} is {given[_ALIAS]}, but they are one option; set one."
        )
    named = {
        ("max_tokens" if name == _ALIAS else name): value
        for name, value in given.items()
        if value is not None or name == "focus"
    }
    return dict(sorted(named.items()))


def generation_info(answer: Answer) -> dict[str, Any]:
    """What stands beside the text of one answer: plain data without document texts or metadata.

    ``usage["prompt_tokens"]`` has the documents in it.
    """
    info = answer.to_dict()
    for name in ("text", "timings", "token_ids"):
        del info[name]
    for source in info["sources"]:
        del source["metadata"]
    return info


def total_usage(infos: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Token counts of a whole batch, from the ``generation_info`` of each prompt."""
    total: Counter[str] = Counter()
    for info in infos:
        total.update(info["usage"])
    return dict(total)
