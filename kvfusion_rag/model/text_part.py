"""Finds the text model inside a multimodal repository, so that it is loaded without the parts for images and sound.

On text alone, a multimodal model computes what its text model computes. The text model takes its weights from the same
files, under other names. Weights of the other parts stay on the disk.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

from transformers import CONFIG_MAPPING, PretrainedConfig

# Types whose text model gives the logits of the whole model on text, and finds all its weights under TEXT_WEIGHTS.
# tests/model/test_text_part.py measures each of them.
MULTIMODAL_TYPES = frozenset({
    "aria", "deepseek_vl", "exaone4_5", "gemma3", "gemma3n", "gemma4",
    "granite_speech", "idefics2", "idefics3", "internvl", "janus", "llama4", "llava",
    "llava_next", "llava_next_video", "llava_onevision", "mistral3", "ovis2", "qwen2_5_omni", "qwen2_5_vl",
    "qwen2_audio", "qwen2_vl", "qwen3_vl", "smolvlm", "video_llama_3", "video_llava", "vipllava", "voxtral",
})  # fmt: skip

# Text models without a class of their own in transformers. They differ from these only in RoPE with three axes, which
# are equal on text.
EQUAL_TYPES = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen2_5_omni_text": "qwen2",
               "qwen3_vl_text": "qwen3"}  # fmt: skip
ROPE_AXES = ("mrope_section", "mrope_interleaved")

# Names of the text model's weights in multimodal checkpoints, and in the text model.
TEXT_WEIGHTS = {
    r"^(?:thinker\.)?(?:model\.)?(?:language_model|text_model)\.lm_head\.": "lm_head.",
    r"^(?:thinker\.)?(?:model\.)?(?:language_model|text_model)\.(?:model\.)?": "model.",
    r"^thinker\.lm_head\.": "lm_head.",
    r"^thinker\.model\.": "model.",
}


# Where transformers reports weights that it did not load. Here they are those of the other parts.
_LOAD_LOGGER = logging.getLogger("transformers.modeling_utils")


def text_part(config: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration of the text model inside ``config``, or ``config`` itself if it is a text model."""
    text = _text_config(config)
    if text is config:
        return config
    if text.model_type in EQUAL_TYPES:
        values = {name: value for name, value in text.to_dict().items() if name != "model_type"}
        rope: dict[str, Any] = values.get("rope_parameters") or {}
        values["rope_parameters"] = {name: value for name, value in rope.items() if name not in ROPE_AXES}
        text = CONFIG_MAPPING[EQUAL_TYPES[text.model_type]](**values)
    else:
        text = copy.deepcopy(text)
    for name in ("dtype", "quantization_config", "tie_word_embeddings"):  # the whole model decides on these
        if getattr(config, name, None) is not None:
            setattr(text, name, getattr(config, name))
    text.architectures = None
    return text


def _text_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the nested text configuration, or ``config`` if there is none, or several."""
    try:
        return cast(Any, config).get_text_config()
    except ValueError:  # several, as in encoder-decoders
        return config


@contextmanager
def without_load_report() -> Generator[None, None, None]:
    """Suppress transformers' table of weights that are left on the disk. The caller checks for missing ones."""

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    _LOAD_LOGGER.addFilter(keep)
    try:
        yield
    finally:
        _LOAD_LOGGER.removeFilter(keep)
