"""Chat templates that show tools, calls and results like those of three model families, and one that does not."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import tiny
from tiny import byte_bpe
from transformers import PreTrainedTokenizerFast

from kvfusion_rag import KVFusionGenerator, MemoryStore, Tool
from kvfusion_rag.fusion.torch_model import TorchModel
from kvfusion_rag.model.backbone import Backbone
from kvfusion_rag.schema import ModeChoice
from kvfusion_rag.text.settings import default_settings

# Tags around JSON; their tokens are control tokens, though not special ones.
TAGGED = """
{%- if tools %}{{- '<|im_start|>system\\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}
{%- endif %}{{- '# Tools\\n<tools>' }}{% for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}
{{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}{{ '<|im_start|>assistant' }}{% if m.content %}{{ '\\n' + m.content }}{% endif %}
{%- for c in m.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + c.function.name + '", "arguments": ' + (c.function.arguments | tojson) }}
{{- '}\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# A bare JSON object, one call at most, and a role of its own for results.
BARE = """
{%- for m in messages %}{% if m.role == 'assistant' and m.tool_calls %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{%- set c = m.tool_calls[0].function %}
{{- '<|im_start|>assistant\\n{"name": "' + c.name + '", "parameters": ' + (c.arguments | tojson) + '}<|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if tools and loop.first %}
{%- for tool in tools %}{{ (tool | tojson) + '\\n' }}{% endfor %}{% endif %}
{{- m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Special tokens around names and arguments that are not in one JSON object.
SPECIAL = """
{%- if tools %}{{ '[AVAILABLE]' + (tools | tojson) + '[/AVAILABLE]' }}{% endif %}
{%- for m in messages %}{% if m.role == 'tool' %}{{ '[RESULT]' + m.name + ':' + m.content + '[/RESULT]' }}
{%- elif m.role == 'assistant' %}{{ m.content }}{% for c in m.tool_calls or [] %}
{{- '[CALL]' + c.function.name + '[ARGS]' + (c.function.arguments | tojson) }}{% endfor %}{{ '<|im_end|>' }}
{%- else %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"""

TEMPLATES = {"tagged": TAGGED, "bare": BARE, "special": SPECIAL, "none": tiny.CHATML}

TOOLS = [
    Tool(
        "weather",
        "Tells the weather.",
        {
            "type": "object",
            "properties": {
                "city": {"enum": ["Lima", "Oslo"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city"],
        },
    ),
    Tool("now", "Tells the time."),
]


@cache
def tool_tokenizer(name: str) -> PreTrainedTokenizerFast:
    tok = byte_bpe()
    if name == "tagged":
        tok.add_tokens(["</tool_call>"])
    if name == "special":
        special = ["[AVAILABLE]", "[/AVAILABLE]", "[RESULT]", "[/RESULT]", "[CALL]", "[ARGS]"]
        tok.add_special_tokens({"additional_special_tokens": special})
    tok.chat_template = TEMPLATES[name]
    return tok


@cache
def tool_model(name: str, mode: ModeChoice = "concat") -> KVFusionGenerator:
    """Return a random model with the chat template of ``name``."""
    tok = tool_tokenizer(name)
    settings = replace(default_settings(tok), mode=mode)
    network = tiny.model("llama", max_position_embeddings=4096)
    backbone = Backbone(network, tok, settings, model_id="tiny-caller")
    return KVFusionGenerator(TorchModel(backbone), store=MemoryStore())
