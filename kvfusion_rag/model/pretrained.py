"""transformers' class of models, imported without warnings that no user can act on, and its choice of attention.

The first import of this class imports torchao if it is installed. torchao then warns about its own GPU libraries, and
about how it uses torch. Modules of this package import the class from here.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_WARNINGS = {"torchao": "Failed to load ", "torch.utils._pytree": "register_constant()"}  # by logger


@contextmanager
def without_torchao_warnings() -> Generator[None, None, None]:
    """Drop the warnings of torchao's import. All other messages are logged as usual."""
    loggers = [logging.getLogger(name) for name in _WARNINGS]
    for logger in loggers:
        logger.addFilter(_is_useful)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_useful)


def _is_useful(record: logging.LogRecord) -> bool:
    return _WARNINGS[record.name] not in record.getMessage()


with without_torchao_warnings():
    from transformers import PreTrainedModel as PreTrainedModel


def attention_of(config: PretrainedConfig) -> str:
    """Return the name of a model's attention implementation, for which transformers has no public attribute."""
    return cast(Any, config)._attn_implementation


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Let ``model`` use another attention implementation."""
    cast(Any, model).set_attn_implementation(name)
