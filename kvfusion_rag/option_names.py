"""Names of keyword arguments. An unknown one is an error that names the nearest option, or explains its other name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable
from difflib import get_close_matches
from functools import wraps
from typing import ParamSpec, TypeVar

from .errors import InvalidInputError

P = ParamSpec("P")
R = TypeVar("R")

MISSPELT = 0.8  # ratio of equal letters from which a name that could be another library's is taken for a misspelt one
_NAMED = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

_QUANTIZED = "pass model_kwargs={'quantization_config': TorchAoConfig(...)} of transformers when the model is loaded"
_PENALTY = "leave it out, because the tokens before do not change the probabilities"
_AT_LOAD = "it is chosen when the model is loaded, with KVFusionGenerator.from_pretrained"
_IN_CALLS = "it is an option of each call, such as answer"
# What to do instead of a name that transformers or another library has, or that is an option at another place.
EXPLAINED: dict[str, str] = {
    "torch_dtype": "pass dtype='float32', 'bfloat16' or 'float16' when the model is loaded",
    "device_map": "pass device='cuda', or model_kwargs={'device_map': ...}, when the model is loaded",
    "attn_implementation": "pass model_kwargs={'attn_implementation': ...} when the model is loaded",
    "quantization_config": _QUANTIZED,
    "load_in_8bit": _QUANTIZED,
    "load_in_4bit": _QUANTIZED,
    "token": "pass model_kwargs={'token': ...} when the model is loaded",
    "use_auth_token": "pass model_kwargs={'token': ...} when the model is loaded",
    "cache_dir": "pass model_kwargs={'cache_dir': ...} when the model is loaded",
    "trust_remote_code": "leave it out, because code of a repository is never run",
    "max_length": "limit the tokens of the answer, without its prompt, with max_new_tokens",
    "max_tokens": "limit the tokens of the answer with max_new_tokens",
    "do_sample": "set temperature above 0 to sample; at 0, the default, the most likely token is taken",
    "num_beams": "leave it out, because there is no beam search",
    "repetition_penalty": _PENALTY,
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "pad_token_id": "leave it out, because the model's files contain it",
    "eos_token_id": "leave it out, because the model's files contain it",
    "stop_strings": "pass the list of texts as stop",
    "streamer": "call stream, which yields the answer in pieces",
    **dict.fromkeys(("adapter", "decoder", "device", "dtype", "gguf_file", "revision", "store"), _AT_LOAD),
    **dict.fromkeys(("temperature", "top_k", "top_p", "seed", "stop", "focus", "attribution"), _IN_CALLS),
}


class UnknownOptionError(InvalidInputError, TypeError):
    """A keyword argument is unknown. The message names the nearest one, or explains a name of another library."""

    @classmethod
    def raise_for(cls, given: Iterable[str], allowed: Collection[str], owner: str) -> None:
        """Raise this error for the first name in ``given`` that is not in ``allowed``.

        Args:
            owner: the function or class that takes the options, for the message.
        """
        for name in given:
            if name not in allowed:
                raise cls(f"{name!r} is not an option of {owner}; {_advice(name, allowed)}.")


def check_option_names(*more: type) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator with which a function raises UnknownOptionError for an unknown keyword argument.

    If the function passes ``**options`` on to another library, only misspelt names of its own options are errors.

    Args:
        more: classes whose fields are the names that the function takes as ``**options``.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        parameters = inspect.signature(function).parameters.values()
        allowed = [each.name for each in parameters if each.kind in _NAMED and each.name not in ("self", "cls")]
        allowed += [name for fields in more for name in fields.__annotations__]
        passes_on = not more and any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)
        owner = function.__qualname__.removesuffix(".__init__")

        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            own = [name for name in kwargs if not passes_on or get_close_matches(name, allowed, 1, MISSPELT)]
            UnknownOptionError.raise_for(own, allowed, owner)
            return function(*args, **kwargs)

        return checked

    return decorate


def _advice(name: str, allowed: Collection[str]) -> str:
    if name in EXPLAINED:
        return EXPLAINED[name]
    if near := get_close_matches(name, allowed, 1):
        return f"the nearest option is {near[0]!r}"
    return f"the options are {', '.join(sorted(allowed))}"
