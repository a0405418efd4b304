"""Writes GGUF files of tiny random Llama models with their tokenizer, and makes headers byte by byte."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from transformers import PreTrainedModel

SIZES = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128, "num_hidden_layers": 2}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def model(seed: int = 0, *, tied: bool = True) -> PreTrainedModel:
    return tiny.model("llama", seed=seed, vocab_size=len(vocabulary()[0]), tie_word_embeddings=tied, **SIZES)


def write_gguf(
    path: Path,
    network: PreTrainedModel | None = None,
    *,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    metadata: Mapping[str, Any] | None = None,
    without: str = "",
) -> Path:
    """Write ``network`` as llama.cpp's converter does.

    Args:
        kind: format of the matrices.
        metadata: added or replaced fields (32-bit numbers and texts).
        without: name of a tensor to leave out.
    """
    network = network or model()
    config = network.config
    writer = GGUFWriter(path, "llama")
    tokens, types, merges = vocabulary()
    unused = config.vocab_size - len(tokens)  # rows of the embedding without a token
    tokens, types = [*tokens, *(f"[PAD{number}]" for number in range(unused))], [*types, *[UNUSED] * unused]
    fields: dict[str, Any] = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.rope.dimension_count": config.hidden_size // config.num_attention_heads,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.ggml.bos_token_id": tokens.index("<|im_start|>"),
        "tokenizer.ggml.padding_token_id": tokens.index("<|endoftext|>"),
        "tokenizer.chat_template": tiny.CHATML,
    }
    for key, value in {**fields, **(metadata or {})}.items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    for name, tensor in network.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads is not None:  # llama.cpp rotates neighbouring numbers, transformers rotates halves
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        values = np.ascontiguousarray(values)
        if gguf_name(name) == without:
            continue
        if values.ndim == 2 and kind != GGMLQuantizationType.F32:
            writer.add_tensor(gguf_name(name), quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.weight"
    _, _, number, rest = stem.split(".", 3)
    return f"blk.{number}.{NAMES[rest]}.weight"


def vocabulary() -> tuple[list[str], list[int], list[str]]:
    """Return the tokens, their types and the merges of the tiny byte-level tokenizer."""
    tok = tiny.tokenizer("byte-bpe")
    by_id = sorted(tok.get_vocab().items(), key=lambda item: item[1])
    special = {str(t): CONTROL if t.special else USER_DEFINED for t in tok.added_tokens_decoder.values()}
    tokens = [text if text.strip() else f"[UNUSED{number}]" for text, number in by_id]
    types = [special.get(text, NORMAL) if text.strip() else UNUSED for text, _ in by_id]
    merges = [" ".join(pair) for pair in json.loads(tok.backend_tokenizer.to_str())["model"]["merges"]]
    return tokens, types, merges


# Headers byte by byte


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def field(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


ARCHITECTURE = field("general.architecture", 8, text("llama"))


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def header(
    *fields: bytes,
    tensors: tuple[bytes, ...] = (),
    data: bytes = b"",
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """Return a file of these fields and tensors. ``counts`` replace the true counts of tensors and fields."""
    tensor_count, field_count = counts or (len(tensors), len(fields))
    start = b"GGUF" + struct.pack("<IQQ", version, tensor_count, field_count) + b"".join(fields) + b"".join(tensors)
    return start + b"\0" * (-len(start) % 32) + data
