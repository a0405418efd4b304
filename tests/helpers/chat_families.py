"""Chat templates like those of ten model families, with tokenizers that have their control tokens.

Each has a peculiarity of its family: trimming, a rejected system role, a default system message, the current date,
reasoning that is removed from earlier turns, or options of the template.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache

from tiny import WORDS, byte_bpe
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML_DEFAULT_SYSTEM = """
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

THINKING = """
{%- for m in messages %}
{%- set text = m.content %}{% if m.role == 'assistant' and '</think>' in text %}
{%- set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}
{{- '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""

OPENED_THINKING = """
{{- bos_token }}{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}
{%- for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% elif m.role == 'assistant' %}
{%- set text = m.content.split('</think>')[-1] if '</think>' in m.content else m.content %}
{{- '<|Assistant|>' + text + eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"""

CHANNELS = """
{{- '<|start|>system<|message|>You are a language model.\nCurrent date: ' + strftime_now('%Y-%m-%d') }}
{{- '\n\nReasoning: ' + (reasoning_effort if reasoning_effort is defined else 'medium') }}
{{- '\n\n# Valid channels: analysis, commentary, final.<|end|>' }}
{%- if messages[0].role == 'system' %}
{{- '<|start|>developer<|message|># Instructions\n\n' + messages[0].content + '\n\n<|end|>' }}
{%- set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}
{%- for m in rest %}{% if m.role == 'assistant' %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}
{%- else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""

HEADERS = """
{{- bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{%- if messages[0].role == 'system' %}{% set told = messages[0].content | trim %}{% set rest = messages[1:] %}
{%- else %}{% set told = '' %}{% set rest = messages %}{% endif %}
{{- '<|head|>system<|/head|>\n\nToday: ' + date_string + '\n\n' + told + '<|eot|>' }}
{%- for m in rest %}{{ '<|head|>' + m.role + '<|/head|>\n\n' + (m.content | trim) + '<|eot|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"""

TURNS_WITHOUT_SYSTEM = """
{{- bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}
{{- (m.content | trim) + '<end_of_turn>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

INST = """
{{- bos_token }}{% if messages[0].role == 'system' %}{% set told = messages[0].content %}{% set rest = messages[1:] %}
{%- else %}{% set told = '' %}{% set rest = messages %}{% endif %}
{%- for m in rest %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if m.role == 'user' %}{{ '[INST] ' + (told + '\n\n' if told and loop.first else '') + m.content + ' [/INST]' }}
{%- else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"""

SYS_IN_INST = """
{%- if messages[0].role == 'system' %}{% set told = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}
{%- set rest = messages[1:] %}{% else %}{% set told = '' %}{% set rest = messages %}{% endif %}
{%- for m in rest %}{% if m.role == 'user' %}
{{- bos_token + '[INST] ' + ((told if loop.first else '') + m.content) | trim + ' [/INST]' }}
{%- else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"""

PIPES = """
{%- for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""

ROLE_TOKENS = """
{%- for m in messages %}{{ '<|role|>' + m.role + '<|/role|>' + m.content + '<|endoftext|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|role|>assistant' }}{% if controls %}{{ ' ' + controls | tojson }}{% endif %}
{{- '<|/role|>' }}{% endif %}"""


@dataclass(frozen=True)
class Family:
    """A chat template, its control tokens, those not marked as special, and whether it is SentencePiece's."""

    template: str
    tokens: tuple[str, ...] = ()
    ordinary: tuple[str, ...] = ()
    sentencepiece: bool = False


FAMILIES = {
    "chatml with a default system message": Family(CHATML_DEFAULT_SYSTEM),
    "chatml with reasoning": Family(THINKING, ("<think>", "</think>")),
    "reasoning that the prompt opens": Family(
        OPENED_THINKING, ("<|User|>", "<|Assistant|>"), ordinary=("<think>", "</think>")
    ),
    "channels": Family(
        CHANNELS, ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|constrain|>", "<|return|>", "<|call|>")
    ),
    "header tokens and a date": Family(HEADERS, ("<|head|>", "<|/head|>", "<|eot|>")),
    "turns without a system role": Family(TURNS_WITHOUT_SYSTEM, ("<start_of_turn>", "<end_of_turn>")),
    "inst tokens": Family(INST, ("[INST]", "[/INST]"), sentencepiece=True),
    "inst as text, system inside": Family(SYS_IN_INST, sentencepiece=True),
    "role pipes": Family(PIPES, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "role tokens with options": Family(ROLE_TOKENS, ("<|role|>", "<|/role|>")),
}


@cache
def family_tokenizer(name: str) -> PreTrainedTokenizerFast:
    family = FAMILIES[name]
    tok = _metaspace() if family.sentencepiece else byte_bpe()
    if tok.bos_token is None:
        tok.add_special_tokens({"bos_token": "<|begin|>"})
    if family.tokens:
        tok.add_special_tokens({"additional_special_tokens": list(family.tokens)})
    tok.add_tokens([AddedToken(token, special=False) for token in family.ordinary])
    tok.chat_template = family.template
    return tok


def _metaspace() -> PreTrainedTokenizerFast:
    """Return a SentencePiece BPE that adds a space at the start of a prompt, but not after a control token."""
    tok = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    control = ["<unk>", "<s>", "</s>"]
    pieces = control + [f"<0x{byte:02X}>" for byte in range(256)]
    words = [*WORDS.split(), *(f"▁{word}" for word in WORDS.split())]
    trainer = trainers.BpeTrainer(vocab_size=440, special_tokens=pieces, show_progress=False)
    tok.train_from_iterator(words * 4, trainer)
    spec = json.loads(tok.to_str())
    spec["added_tokens"] = [
        t for t in spec["added_tokens"] if t["content"] in control
    ]  # byte pieces are ordinary tokens
    tok = Tokenizer.from_str(json.dumps(spec))
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
