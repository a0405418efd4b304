"""Small random models and tokenizers that are made in place, so that tests need no network.

``tokenizer(kind)`` returns one of four kinds that real models use. ``model(architecture, ...)`` returns a random
causal model of a few ten thousand parameters. Its weights have a wide distribution, so attention is far from uniform
and a wrong position or mask changes the logits.

Random models answer gibberish. Tests that need a known answer use ``speaker(answer)``. Tests that load a model use
``save(folder)`` or ``save_speaker(folder, answer)``.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    BertConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MiniCPM3Config,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from kvfusion_rag.fusion.interface import FusionModel
from kvfusion_rag.fusion.torch_model import TorchModel
from kvfusion_rag.generator import KVFusionGenerator
from kvfusion_rag.model.backbone import Backbone
from kvfusion_rag.schema import ModeChoice
from kvfusion_rag.store import MemoryStore
from kvfusion_rag.text.settings import ModelSettings, default_settings

WORDS = (
    "the river runs past an old mill and the miller counts sacks of flour while rain falls on the roof "
    "where two grey doves sleep; in 1874 Amara Osei built a lighthouse of 31 metres, and its lamp was lit "
    "for the first time on 3 May. Question: who built it? Answer: nobody knows, said the clerk, but wait! "
    "Title: Harbour records — naïve café 東京 русский. user system assistant"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENIZER_KINDS = ("byte-bpe", "unigram", "bpe-byte-fallback", "wordpiece")


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    return {
        "byte-bpe": byte_bpe,
        "unigram": _unigram,
        "bpe-byte-fallback": _bpe_byte_fallback,
        "wordpiece": _wordpiece,
    }[kind]()


def byte_bpe() -> PreTrainedTokenizerFast:
    """Like Qwen and Llama 3: byte-level BPE with control tokens outside the vocabulary, one of them not special."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(tok, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    tok.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tok.add_tokens([AddedToken("<tool_call>", special=False), AddedToken("    ", special=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


def _unigram() -> PreTrainedTokenizerFast:
    """Like T5 and XLM-R: SentencePiece unigram with control tokens in the vocabulary."""
    tok = Tokenizer(models.Unigram())
    tok.pre_tokenizer = pre_tokenizers.Metaspace()
    tok.decoder = decoders.Metaspace()
    control = ["<pad>", "</s>", "<unk>", "<extra_id_0>"]
    _train(
        tok, trainers.UnigramTrainer(vocab_size=200, special_tokens=control, unk_token="<unk>", show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def _bpe_byte_fallback() -> PreTrainedTokenizerFast:
    """Like Llama 2 and Gemma: SentencePiece BPE with byte pieces, ``<s>`` in the vocabulary and a leading BOS."""
    tok = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tok.normalizer = normalizers.Replace(" ", "▁")
    tok.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), "merged_with_next")
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    control = ["<unk>", "<s>", "</s>", "<start_of_turn>"]
    pieces = control + [f"<0x{byte:02X}>" for byte in range(256)]
    _train(tok, trainers.BpeTrainer(vocab_size=460, special_tokens=pieces, show_progress=False))
    spec = json.loads(tok.to_str())
    spec["added_tokens"] = [
        t for t in spec["added_tokens"] if t["content"] in control
    ]  # byte pieces are ordinary tokens
    tok = Tokenizer.from_str(json.dumps(spec))
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _wordpiece() -> PreTrainedTokenizerFast:
    """Like BERT, but split only at white space, so that a control token stays one word."""
    tok = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tok.normalizer = normalizers.BertNormalizer(lowercase=True)
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok.decoder = decoders.WordPiece()
    control = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    _train(tok, trainers.WordPieceTrainer(vocab_size=300, special_tokens=control, show_progress=False))
    names = {f"{token[1:-1].lower()}_token": token for token in control}
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="[SEP]", **names)


def _train(tok: Tokenizer, trainer) -> None:
    tok.train_from_iterator([WORDS] * 4, trainer)


SIZES = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": 512,
}
CONFIGS: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
    "phi3": Phi3Config,
    "gemma3": Gemma3TextConfig,
    "minicpm3": MiniCPM3Config,
}
CHANGES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 9},
    "qwen3": {"head_dim": 12},
    "gemma3": {
        "sliding_window": 7, "head_dim": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "minicpm3": {  # latent attention: its cache holds latents of width 16 and rotary keys of width 8
        "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
        "v_head_dim": 8, "scale_emb": 1,
    },
}  # fmt: skip
ARCHITECTURES = (*CONFIGS, "gpt2", "bert")


def config(architecture: str, **changes) -> PretrainedConfig:
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    if architecture == "gpt2":
        made = GPT2Config(n_embd=48, n_layer=3, n_head=4, n_positions=512, vocab_size=512, **ends)
    elif architecture == "bert":
        sizes = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
        made = BertConfig(**sizes, **ends, is_decoder=True)
    else:
        made = CONFIGS[architecture](**SIZES | ends | CHANGES.get(architecture, {}))
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def model(architecture: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> PreTrainedModel:
    made = config(architecture, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = AutoModelForCausalLM.from_config(made)
        for parameter in network.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    return network.to(dtype).eval()


def backbone(
    architecture: str, dtype: torch.dtype = torch.float32, *, tokens: str = "byte-bpe", settings=None, **changes
) -> Backbone:
    tok = tokenizer(tokens)
    settings = settings or replace(default_settings(tok), layout="fixed", mode="fusion")
    return Backbone(model(architecture, dtype, **changes), tok, settings, model_id=f"tiny-{architecture}")


def on_engine(made: Backbone) -> FusionModel:
    """Return a model on torch, or on llama.cpp if ``KVFUSION_TEST_ENGINE`` says so and the architecture is Llama."""
    if os.environ.get("KVFUSION_TEST_ENGINE") == "llama.cpp" and made.config.model_type == "llama":
        from tiny_llama_cpp import model_over

        return model_over(made)
    return TorchModel(made)


def generator(
    architecture: str = "llama",
    dtype: torch.dtype = torch.float32,
    *,
    tokens: str = "byte-bpe",
    store="memory",
    **settings,
) -> KVFusionGenerator:
    made = ModelSettings(**{"mode": "fusion", **settings}) if settings else None
    kept = MemoryStore() if store == "memory" else store
    return KVFusionGenerator(on_engine(backbone(architecture, dtype, tokens=tokens, settings=made)), store=kept)


def untuned(mode: ModeChoice = "auto", **changes) -> KVFusionGenerator:
    """Return a random model that reads the caller's prompt in its chat template."""
    settings = replace(default_settings(tokenizer("byte-bpe")), mode=mode)
    return KVFusionGenerator(on_engine(backbone("llama", settings=settings, **changes)), store=MemoryStore())


def save(
    folder: Path,
    architecture: str = "llama",
    *,
    tokens: str = "byte-bpe",
    settings: ModelSettings | None = None,
    **changes,
) -> Path:
    """Save a random model below 1 MB with its tokenizer. ``settings`` become its ``kvfusion.json``."""
    return _save(folder, model(architecture, **changes), tokenizer(tokens), settings)


def speaker(answer: str, **settings) -> KVFusionGenerator:
    """Return a model that answers every question with ``answer``. Documents change its logits, not its best token."""
    tok = tokenizer("byte-bpe")
    made = replace(default_settings(tok), **settings)
    return KVFusionGenerator(
        on_engine(Backbone(_speaking_model(answer), tok, made, model_id="tiny-speaker")), store=MemoryStore()
    )


def save_speaker(folder: Path, answer: str) -> Path:
    """Save the model of ``speaker(answer)``, marked as trained for fusion, so that it loads without a warning."""
    tok = tokenizer("byte-bpe")
    return _save(folder, _speaking_model(answer), tok, replace(default_settings(tok), tuned=True))


def _speaking_model(answer: str) -> PreTrainedModel:
    """Make embeddings outweigh attention, and map each token of the answer to the next in the output layer."""
    tok = tokenizer("byte-bpe")
    before = tok(default_settings(tok).question_template, add_special_tokens=False)["input_ids"][-1]
    return chained_model([before, *tok(answer, add_special_tokens=False)["input_ids"], tok.eos_token_id])


def chained_model(chain: list[int]) -> PreTrainedModel:
    """Return a model whose most likely token behind each token of ``chain`` is the next one."""
    assert len(set(chain)) == len(chain), f"{chain} has a token twice, but each token can have only one successor"
    network = model("llama", max_position_embeddings=2048)
    with torch.no_grad():
        embeddings, output = network.get_input_embeddings().weight, network.get_output_embeddings().weight
        embeddings.mul_(20)
        for token, following in pairwise(chain):
            output[following] += 2 * embeddings[token] / embeddings[token].norm()
    return network


def _save(
    folder: Path, network: PreTrainedModel, tok: PreTrainedTokenizerFast, settings: ModelSettings | None
) -> Path:
    network.save_pretrained(folder)
    tok.save_pretrained(folder)
    if settings is not None:
        (folder / "kvfusion.json").write_text(json.dumps(settings.to_dict()), encoding="utf-8")
    return folder
