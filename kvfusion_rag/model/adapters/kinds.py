"""Decides from an adapter's settings alone whether it can be switched off for documents and on for answers.

``docs/models.md`` has the table of kinds. Tests compare every accepted kind with peft's own model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import ModelLoadError

if TYPE_CHECKING:
    from peft import PeftConfig

ACCEPTED_TYPES = frozenset(
    (
        "LORA", "ADALORA", "ADAMSS", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA",
        "HIRA", "HRA", "IA3", "LILY", "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "PVERA",
        "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA",
        "WAVEFT",
    )
)  # fmt: skip
# Reasons against other types that train more than weights of layers.
TYPE_REASONS = {
    "ADAPTION_PROMPT": "replaces whole attention layers, which fusion has to call itself",
    "POLY": "needs the id of a task in each call",
    "SHADOW": "runs a second network beside the model, which would have to read the documents too",
    "XLORA": "chooses between other adapters by a second pass over the whole prompt",
}
# Reasons against options of LoRA, by the field of its settings.
OPTION_REASONS = {
    "alora_invocation_tokens": "is switched on by tokens of the prompt",
    "arrow_config": "chooses between other adapters",
    "kasa_config": "removes parts of the base weights, which documents need",
    "layer_replication": "adds layers, for which the documents of the base model have no keys and values",
    "megatron_config": "needs layers of Megatron",
    "use_bdlora": "has block-diagonal matrices, which are not tested",
}
_CONVERT = "save it again with path_initial_model_for_weight_conversion, as an ordinary LoRA"
# Reasons against initial weights that were subtracted from the base weights, and cannot be computed again.
INITIAL_REASONS = {
    "corda": f"from activations (CorDA), which are not saved; {_CONVERT}",
    "lora_ga": "from gradients (LoRA-GA), which are not saved",
    "loftq": "from quantized base weights (LoftQ), which documents cannot be read with",
    "pissa_niter": f"by a randomized decomposition (PiSSA with niter), which cannot be repeated; {_CONVERT}",
}


def require_accepted_kind(config: PeftConfig, name: str) -> None:
    """Check that an adapter is of a kind that equals peft's own model.

    Raises:
        ModelLoadError: it is not. The message contains the reason.
    """
    reason = _reason_against(config)
    if reason is not None:
        raise ModelLoadError(f"cannot load the adapter {name!r}: it {reason}.")


def changes_base(config: PeftConfig) -> bool:
    """Whether peft subtracts the initial weights from the base weights (PiSSA, OLoRA)."""
    return str(getattr(config, "init_lora_weights", "")).lower() in ("pissa", "olora")


def _reason_against(config: PeftConfig) -> str | None:
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in ACCEPTED_TYPES:
        usual = "is not supported"
        if config.is_prompt_learning:
            usual = "puts trained tokens or keys in front of the documents, which are read without the adapter"
        return f"is of type {kind}, which {TYPE_REASONS.get(kind, usual)}"
    task = config.task_type and str(getattr(config.task_type, "value", config.task_type))
    if task not in (None, "CAUSAL_LM"):
        return f"was trained for the task {task}, but only adapters for CAUSAL_LM generate answers"
    for option, reason in OPTION_REASONS.items():
        if getattr(config, option, None):
            return f"has {option}, so it {reason}"
    initial = str(getattr(config, "init_lora_weights", "")).lower()
    for start, reason in INITIAL_REASONS.items():
        if initial.startswith(start):
            return f"is relative to base weights that were changed {reason}"
    return None
