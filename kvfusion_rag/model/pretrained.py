"""transformers' class of models, imported without warnings that no user can act on.

The first import of this class imports torchao if it is installed. torchao then warns about its own GPU libraries, and
about how it uses torch. Modules of this package import the class from here.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager

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
