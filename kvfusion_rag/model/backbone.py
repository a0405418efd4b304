"""One model with its tokenizer and optional adapter: forward passes and fingerprint.

This is the only module that calls the model, because ``forward`` of a transformers model silently ignores unknown
keyword arguments. ``adapters.switching`` makes the prefill decoder Dp beside the answering decoder Dt.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from transformers import DynamicCache, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from ..errors import UnsupportedModelError
from ..text.json_text import is_list
from ..text.settings import ModelSettings
from .adapters.base import require_trained_on
from .adapters.libraries import require_adapter_libraries
from .adapters.loading import load_adapter
from .adapters.switching import AdapterSwitch, prefill_decoder
from .attention.ape import Ape
from .attention.functions import GROUPED, checkpoint_with_context, register_explicit, share_heads
from .attention.weights import AttentionSum
from .attention.windows import Windows
from .document_cache import DocumentCache, PositionedCache, layer_states, num_kv_layers
from .fingerprint import digest_facts, digest_tensors, essential_config
from .hardware import device_name
from .kv import DocumentKV
from .positions import additive
from .pretrained import PreTrainedModel, attention_of, set_attention
from .rope import PositionLimit
from .support import require_supported

if TYPE_CHECKING:
    from peft import LoraConfig


class Backbone:
    """A causal language model that can prefill documents separately, and decode over a fused cache.

    Safe to use from several threads: each decoder runs one pass at a time, because a pass may switch the adapter or
    the attention of its decoder. Passes of the two decoders can run at the same time.

    Args:
        settings: settings with the adapter.
        model_id: name to show.
        revision: commit of a hub model.
        adapter: folder of an adapter.
        base_settings: settings without the adapter. Default: ``settings``.
        is_text_part: the model was loaded from a multimodal repository.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: ModelSettings,
        *,
        model_id: str,
        revision: str | None = None,
        adapter: str | Path | None = None,
        base_settings: ModelSettings | None = None,
        is_text_part: bool = False,
    ) -> None:
        require_supported(model.config, model_id)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.settings = settings
        self.base_settings = base_settings or settings
        self.model_id = model_id
        self._is_text_part = is_text_part
        self.revision = revision
        self.config: PretrainedConfig = cast(Any, model.config).get_text_config()
        self.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.quantized = bool(getattr(model, "is_quantized", False))  # weights have fewer bits than ``dtype``
        self.attention = share_heads(self.model)
        self.windows = Windows.of(self.config)
        self.position_limit = PositionLimit.of(self.config)
        self.num_kv_layers = num_kv_layers(self.config)
        self.context_window = self.position_limit.positions
        if self.windows is not None and not self.takes_any_mask:
            raise UnsupportedModelError(
                f"{model_id!r} has attention windows, which {self.attention!r} counts in cache slots instead of "
                "positions; load it with model_kwargs={'attn_implementation': 'sdpa'} or 'eager'."
            )
        generation = cast(Any, model.generation_config)  # may be None
        self.max_new_tokens: int | None = None if generation is None else generation.max_new_tokens
        self.end_ids = end_ids(generation, tokenizer)
        ends = [cast("int | None", tokenizer.eos_token_id), *sorted(self.end_ids)]
        self.end_id: int | None = next((i for i in ends if i is not None), None)  # ends the answers in training
        self._base_weights = list(model.state_dict(keep_vars=True).items())
        self._digest: tuple[list[int], str] | None = None  # with the versions of the weights that it covers
        self.prefill_decoder = prefill_decoder(model)
        self._prefill_lock, self._lock = threading.Lock(), threading.Lock()
        self.adapter_digest: str | None = None
        self._switch = AdapterSwitch(model, is_on=adapter is not None)
        if adapter is not None:
            self.require_base_of(Path(adapter))
            self.adapter_digest = load_adapter(model, Path(adapter), model_id)
        self.checkpoints_activations = False

    @torch.inference_mode()
    def prefill(
        self, ids: torch.Tensor, prefix: DocumentKV | None, starts: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run Dp over independent rows, each of which sees the prefix and itself.

        Args:
            ids: (B, T) token ids, right-padded. Causal attention cannot see the padding.
            prefix: KV at positions 0..p-1, or None.
            starts: position of each row's first token. The default is p, right after the prefix. Padding beyond the
                window gets the window's last position.

        Returns:
            Keys (L, B, H_kv, T, d) and values (L, B, H_kv, T, d_v), without the prefix.
        """
        rows, length = ids.shape
        past = 0 if prefix is None else prefix.num_tokens
        first = torch.tensor(starts or [past] * rows)
        positions = (first[:, None] + torch.arange(length)).to(self.device)  # (B, T)
        if self.context_window is not None:
            positions = positions.clamp(max=self.context_window - 1)
        mask = torch.ones(rows, past + length, dtype=torch.long, device=self.device)
        cache = DocumentCache(self.num_kv_layers, prefix, rows, self.device)
        # A caller's autocast would change the bits under an unchanged key.
        with self._prefill_lock, torch.autocast(self.device.type, enabled=False), cache.collecting():
            self.prefill_decoder(
                input_ids=ids.to(self.device),
                position_ids=positions,
                attention_mask=self._masks(mask, positions, cache),
                past_key_values=cache,
                use_cache=True,
            )
        return cache.collected()

    @torch.inference_mode()
    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor,
        cache: DynamicCache,
        last: torch.Tensor,
        *,
        rows: torch.Tensor | None = None,
        adapter: bool,
        ape: Ape | None = None,
        attention_sum: AttentionSum | None = None,
    ) -> torch.Tensor:
        """Run one pass of Dt over ``ids`` and append it to ``cache``.

        Args:
            ids: (B, Q) token ids.
            positions: (B, Q) positions of the tokens.
            mask: (B, K + Q), 1 for real slots of the cache and of ``ids``; or (B, 1, Q, K + Q) bool if the model
                :attr:`takes_any_mask`.
            cache: K slots; grows by Q. Windows are measured in the positions of a ``PositionedCache``. With another
                cache, the model makes its own masks, by slots.
            last: (N,) columns of ``ids`` whose next tokens are predicted.
            rows: (N,) rows of these columns; by default one column per row.
            adapter: use the adapter, if one is loaded.
            ape: read the documents' slots as APE does, in this pass only.
            attention_sum: accumulates the attention weights of this pass, which must have one row.

        Returns:
            Logits (N, V), float32.
        """
        columns, column_of = cast(Any, torch).unique(last, return_inverse=True)
        extra: dict[str, Any] = {} if ape is None else {"adapt": ape.adapt}
        extra |= {} if attention_sum is None else {"note": attention_sum.add}
        masks = self._masks(mask, positions, cache, as_bool=bool(extra))
        with self._prepared(adapter=adapter, attention=register_explicit() if extra else None):
            out = self.model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=masks,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=columns,
                **extra,
            )
        if rows is None:
            rows = torch.arange(ids.shape[0], device=ids.device)
        return out.logits[rows, column_of].float()  # (B, len(columns), V) -> (N, V)

    def training_logits(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor,
        cache: DynamicCache,
        columns: torch.Tensor,
        *,
        tuned: bool = True,
    ) -> torch.Tensor:
        """Return the logits (B, N, V) of one pass of Dt with gradients, at the N ``columns`` of ``ids``.

        The other arguments are those of :meth:`forward`. With ``tuned=False`` the base model answers, without adapter
        or dropout. The caller turns gradients off.

        After :meth:`checkpoint_activations`, the mask must have four dimensions. The backward pass must then come
        before any other use of the model, because it computes the layers again.
        """
        adds_mask = attention_of(self.config) == "eager"
        masks = self._masks(mask, positions, cache, as_bool=not adds_mask)
        context: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        if self.checkpoints_activations and tuned:
            layers = list(layer_states(cache)) if cache.get_seq_length() else None
            context = {"context": layers, "use_cache": False}
        with self._prepared(adapter=tuned, training=tuned and self.model.training):
            out = self.model(
                input_ids=ids, position_ids=positions, attention_mask=masks, logits_to_keep=columns, **context
            )
        return out.logits

    def checkpoint_activations(self) -> None:
        """From now on, recompute layers in the backward pass instead of keeping their activations.

        Raises:
            UnsupportedModelError: the architecture has no gradient checkpointing, or its attention cannot be replaced.
        """
        checkpoint_with_context(self.model, self.model_id)
        self.checkpoints_activations = True

    def add_adapter(self, settings: LoraConfig) -> None:
        """Add a fresh LoRA adapter for training. Prefill still runs without it.

        Raises:
            MissingDependencyError: the installed transformers and peft are not compatible.
        """
        require_adapter_libraries()
        with self._lock:
            cast(Any, self.model).add_adapter(settings)
            self.adapter_digest = "in training"
            self._switch.added()

    def require_base_of(self, folder: Path) -> None:
        """Check that the adapter or decoder in ``folder`` was trained on this model.

        A folder without a training record is accepted. A quantized model is not checked, because quantization changes
        its digest.

        Raises:
            ModelLoadError: the adapter or decoder was trained on another base model.
        """
        if not self.quantized:
            require_trained_on(folder, self.model_id, self.dtype, lambda: self.weights_digest)

    def save(self, folder: Path) -> None:
        """Write the adapter in peft's format, or the whole model with its tokenizer if there is no adapter."""
        # The names of the repository that a text part came from do not fit the text model alone.
        cast(Any, self.model).save_pretrained(folder, save_original_format=not self._is_text_part)
        if not self.has_adapter:
            cast(Any, self.tokenizer).save_pretrained(folder)

    def fingerprint(self) -> str:
        """Return a SHA-256 hex digest of everything about this model that changes the bits of a document's KV.

        It covers the bytes of the weights, the configuration, dtype, device, attention implementation and library
        versions. The tokenizer and the templates act only through the token ids.
        """
        config = {k: v for k, v in self.config.to_dict().items() if not k.startswith("_")}
        facts = {"weights": self.weights_digest, "revision": self.revision, "dtype": str(self.dtype),
                 "config": config, **self.environment()}  # fmt: skip
        return digest_facts(facts)

    def portable_fingerprint(self) -> str:
        """Return a SHA-256 hex digest of everything about this model that changes a document's KV by more than
        rounding: the bytes of the weights, the dtype and the configuration."""
        facts = {"weights": self.weights_digest, "dtype": str(self.dtype), "config": essential_config(self.config)}
        return digest_facts(facts)

    def environment(self) -> dict[str, str | None]:
        """Return what changes the rounding of KVs besides the model itself."""
        return {
            "device": device_name(self.device),
            "attention": self.attention,
            "instructions": torch.backends.cpu.get_cpu_capability() if self.device.type == "cpu" else None,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    @property
    def weights_digest(self) -> str:
        """xxh3-128 of the base weights. It is recomputed when torch has counted an in-place change."""
        versions = [tensor._version for _, tensor in self._base_weights if not tensor.is_inference()]
        if self._digest is None or self._digest[0] != versions:
            self._digest = versions, digest_tensors(self._base_weights)
        return self._digest[1]

    def keep_digest(self) -> None:
        """Compute the digest of the weights, and never again, since they will not change, but will be split."""
        self._digest = [], self.weights_digest
        self._base_weights = []

    def digest_again(self) -> None:
        """Compute the digest of the weights again at its next use, after a change that torch does not count."""
        self._digest = None

    @property
    def takes_any_mask(self) -> bool:
        """Whether attention honours masks other than padding masks, which flash attention does not."""
        return self.attention in ("sdpa", "eager", GROUPED)

    @property
    def has_adapter(self) -> bool:
        return self.adapter_digest is not None

    def _masks(
        self, mask: torch.Tensor, positions: torch.Tensor, cache: DynamicCache, *, as_bool: bool = False
    ) -> Any:
        """Return the masks of a pass as the model takes them, and append its positions to the cache if it has windows.

        Additive masks are made here once, instead of in every layer.
        """
        if self.windows is None or not isinstance(cache, PositionedCache):
            return mask if as_bool or mask.dim() == 2 else additive(mask, self.dtype)
        keys = cache.append_positions(positions)
        return self.windows.masks(mask, positions, keys, None if as_bool else self.dtype)

    @contextmanager
    def _prepared(
        self, *, adapter: bool, attention: str | None = None, training: bool = False
    ) -> Generator[None, None, None]:
        """Hold Dt for one forward pass.

        Args:
            adapter: use the adapter, if one is loaded.
            attention: name of another attention implementation for this pass.
            training: keep dropout on if the model is in training mode.
        """
        with self._lock, torch.autocast(self.device.type, enabled=False):
            self._switch.turn(adapter and self.has_adapter)
            usual_attention = attention_of(self.config)
            suspend_training = self.model.training and not training
            if attention is not None:
                set_attention(self.model, attention)
            if suspend_training:
                self.model.eval()
            try:
                yield
            finally:
                if attention is not None:
                    set_attention(self.model, usual_attention)
                if suspend_training:
                    self.model.train()


def end_ids(generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids that end an answer: those of the generation config, and the tokenizer's own end token."""
    configured = None if generation is None else cast(Any, generation).eos_token_id
    ids = configured if is_list(configured) else [configured]
    return frozenset(i for i in [*ids, tokenizer.eos_token_id] if isinstance(i, int))
