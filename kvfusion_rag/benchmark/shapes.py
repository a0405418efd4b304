"""Models of published shapes with random weights, and random texts for them, which need no hub."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from ..errors import InvalidInputError, MissingDependencyError
from ..model.backbone import Backbone
from ..model.hardware import choose_device
from ..model.pretrained import PreTrainedModel
from ..text.settings import ModelSettings


class Shape(NamedTuple):
    """Shape of a Llama or Qwen2 model. It is ``tied`` if the output matrix is the embedding matrix."""

    family: type[LlamaConfig] | type[Qwen2Config]
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = True


SHAPES = {  # from the published configurations
    "qwen2.5-0.5b": Shape(Qwen2Config, 896, 4864, 24, 14, 2, 151_936),
    "qwen2.5-1.5b": Shape(Qwen2Config, 1536, 8960, 28, 12, 2, 151_936),
    "qwen2.5-7b": Shape(Qwen2Config, 3584, 18_944, 28, 28, 4, 152_064, tied=False),
    "llama-3.1-8b": Shape(LlamaConfig, 4096, 14_336, 32, 32, 8, 128_256, tied=False),
    "tiny": Shape(Qwen2Config, 64, 128, 2, 4, 2, 6_000),
}
WEIGHTS = {"int8": "Int8WeightOnlyConfig", "float8": "Float8WeightOnlyConfig"}  # names in torchao
WORDS = 5_000
END = WORDS + 1  # id of the end token


def shape_named(name: str) -> Shape:
    if name not in SHAPES:
        raise InvalidInputError(f"shape is {name!r}, but it must be one of {', '.join(SHAPES)}.")
    return SHAPES[name]


def random_backbone(name: str, dtype: str, device: str, seed: int, weights: str | None = None) -> Backbone:
    """Return a model of the shape ``name`` with one token per word of :func:`random_text`. Its answers never end
    early.

    With ``weights`` "int8" or "float8", torchao stores the layers' weights in 8 bits, but not the output matrix.
    """
    words = {f"w{n}": n for n in range(WORDS)} | {"<unk>": WORDS, "<end>": END}
    tokens = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<end>", unk_token="<unk>")
    shape = shape_named(name)
    config = shape.family(
        hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, vocab_size=shape.vocabulary,
        max_position_embeddings=1 << 20, tie_word_embeddings=shape.tied, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    with choose_device(device):  # a CPU draws billions of weights slowly
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with torch.no_grad():
        model.get_output_embeddings().weight[END] = 0  # among thousands of logits, 0 is never the largest
    if weights is not None:
        _quantize(model, weights)
    settings = ModelSettings(document_template="{text}", titled_document_template="{title} {text}",
                             question_template="{question}", prompt_template=None, tuned=True)  # fmt: skip
    return Backbone(model, tokenizer, settings, model_id=f"random-{name}")


def _quantize(model: PreTrainedModel, weights: str) -> None:
    if weights not in WEIGHTS:
        raise InvalidInputError(f"weights is {weights!r}, but it must be one of {', '.join(WEIGHTS)}, or None.")
    try:
        from torchao import quantization
    except ImportError as error:
        raise MissingDependencyError.of_extra("a model in 8 bits", "torchao", "quantize") from error
    head = model.get_output_embeddings()
    quantization.quantize_(
        model,
        getattr(quantization, WEIGHTS[weights])(),
        filter_fn=lambda module, name: isinstance(module, torch.nn.Linear) and module is not head,
    )


def random_text(rng: random.Random, tokens: int) -> str:
    return " ".join(f"w{rng.randrange(WORDS)}" for _ in range(tokens))
