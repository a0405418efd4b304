"""One model with its tokenizer and optional adapter: loading, forward passes, fingerprint.

The only module that calls the model, and the only one where differences between transformers versions may
live. ``forward`` of a transformers model swallows unknown keyword arguments in silence, so nobody else may
call it. Weights are shared by the prefill decoder Dp (adapter off) and the answering decoder Dt (adapter on).
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
import xxhash
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .errors import InvalidInputError, ModelLoadError
from .schema import DocumentKV
from .settings import ModelSettings, load_settings
from .support import require_supported

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SAMPLED_ELEMENTS = 4096  # per weight tensor, for the fingerprint; training changes nearly every element


class Backbone:
    """A causal language model that can prefill apart, and decode over a fused cache.

    Safe from several threads: forward passes take turns, and the adapter is switched under the same lock.
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
    ) -> None:
        require_supported(model.config, model_id)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.settings = settings
        self.model_id = model_id
        self.revision = revision
        self.config: PretrainedConfig = model.config.get_text_config()
        self.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.context_window: int | None = getattr(self.config, "max_position_embeddings", None)
        self.end_ids = _end_ids(model, tokenizer)
        self.weights_digest = _weights_digest(model)
        self.adapter_digest = None if adapter is None else self._load_adapter(str(adapter))
        self._lock = threading.Lock()
        self._adapter_on = adapter is not None

    @classmethod
    def load(
        cls,
        model: str,
        *,
        model_id: str,
        revision: str | None = None,
        adapter: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> Backbone:
        """Load a model from a folder or the hub with transformers' own loaders; remote code stays off.

        Args:
            model: folder or hub name.
            model_id: how the model is named in answers and keys.
            device: "cpu", "cuda", "cuda:1", "mps"; by default an accelerator if there is one.
            dtype: "float32", "bfloat16", "float16"; by default float32 on CPU, else the checkpoint's own.
            model_kwargs: passed on to ``AutoModelForCausalLM.from_pretrained``.

        Raises:
            ModelLoadError: model, tokenizer or adapter cannot be read.
            UnsupportedModelError: the architecture cannot be fused exactly.
        """
        place = choose_device(device)
        precision = choose_dtype(dtype, place)
        kwargs = dict(model_kwargs or {})
        try:
            config = AutoConfig.from_pretrained(model, revision=revision)
            config_overrides = {k: kwargs.pop(k) for k in list(kwargs) if k in config.to_dict()}
            for name, value in config_overrides.items():
                setattr(config, name, value)
            require_supported(config, model_id)  # before gigabytes are read
            tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
            network: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                model, config=config, revision=revision, dtype=precision, **kwargs
            )
        except (OSError, ValueError, KeyError) as error:
            raise ModelLoadError(f"cannot load the model {model_id!r}: {_first_line(error)}") from error
        settings = load_settings(model, revision, tokenizer)
        commit = getattr(config, "_commit_hash", None) or revision
        if "device_map" not in kwargs:
            network.to(device=place)  # type: ignore[call-arg]  # in place
        return cls(network, tokenizer, settings, model_id=model_id, revision=commit, adapter=adapter)

    @torch.inference_mode()
    def prefill(self, ids: torch.Tensor, prefix: DocumentKV | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Dp: keys and values of independent rows, each row seeing the prefix and itself.

        Args:
            ids: (R, T) token ids, right-padded; pads are not masked, since causal attention cannot see them.
            prefix: KV at positions 0..p-1, or ``None``; rows stand at p..p+T-1.

        Returns:
            Keys and values, each (L, R, H_kv, T, d), without the prefix.
        """
        rows, length = ids.shape
        cache = DynamicCache(config=self.config)  # passing one keeps packed-sequence detection off
        past = 0
        if prefix is not None:
            past = prefix.num_tokens
            for layer in range(prefix.keys.shape[0]):
                shape = (rows, -1, -1, -1)
                cache.update(prefix.keys[layer].expand(shape), prefix.values[layer].expand(shape), layer)
        positions = torch.arange(past, past + length, device=self.device).expand(rows, -1)
        mask = torch.ones(rows, past + length, dtype=torch.long, device=self.device)
        with self._turn(adapter=False):
            self.model.get_decoder()(
                input_ids=ids.to(self.device),
                position_ids=positions,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
            )
        filled = cast(list[tuple[torch.Tensor, ...]], list(cache))  # keys, values (R, H_kv, p + T, d) of each layer
        keys = torch.stack([layer[0][:, :, past:] for layer in filled])  # (L, R, H_kv, T, d)
        values = torch.stack([layer[1][:, :, past:] for layer in filled])
        return keys, values

    @torch.inference_mode()
    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor,
        cache: DynamicCache,
        last: torch.Tensor,
        *,
        adapter: bool,
    ) -> torch.Tensor:
        """One pass of Dt over ``ids``, appended to ``cache``.

        Args:
            ids: (B, Q) token ids, right-padded.
            positions: (B, Q) position of each.
            mask: (B, K + Q), 1 where a slot of the cache or of ``ids`` is real; or (B, 1, Q, K + Q) bool.
            cache: K slots; grows by Q.
            last: (B,) index in ``ids`` whose next token is asked for.
            adapter: whether the adapter takes part, if one is loaded.

        Returns:
            Logits (B, V), float32.
        """
        wanted, place = torch.unique(last, return_inverse=True)
        with self._turn(adapter=adapter):
            out = self.model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=wanted,
            )
        rows = torch.arange(ids.shape[0], device=ids.device)
        return out.logits[rows, place].float()  # (B, len(wanted), V) -> (B, V)

    def fingerprint(self) -> str:
        """Hex digest of everything about this model that changes a document's keys and values.

        Weights are sampled (4,096 elements of each tensor); configuration, dtype, attention implementation,
        RoPE settings and library versions are taken whole. Tokenizer and templates act through the token ids.
        """
        config = {k: v for k, v in self.config.to_dict().items() if not k.startswith("_")}
        facts = {
            "weights": self.weights_digest,
            "revision": self.revision,
            "dtype": str(self.dtype),
            "device": self.device.type,
            "attention": self.config._attn_implementation,
            "config": config,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def has_adapter(self) -> bool:
        return self.adapter_digest is not None

    @contextmanager
    def _turn(self, *, adapter: bool) -> Iterator[None]:
        """The model for one forward pass, with the adapter (if any) on or off."""
        with self._lock:
            wanted = adapter and self.has_adapter
            if wanted != self._adapter_on:
                self.model.enable_adapters() if wanted else self.model.disable_adapters()
                self._adapter_on = wanted
            yield

    def _load_adapter(self, adapter: str) -> str:
        try:
            self.model.load_adapter(adapter)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ModelLoadError(
                f"cannot load the adapter {Path(adapter).name!r} onto {self.model_id!r}: {_first_line(error)}"
            ) from error
        self.model.eval()
        return _digest(sorted(self.model.get_adapter_state_dict().items()))


def choose_device(device: str | None) -> torch.device:
    """``device`` as torch knows it, or the accelerator of this machine, or the CPU."""
    if device is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        return found if found is not None else torch.device("cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise InvalidInputError(
            f"device is {device!r}, but it must be a torch device such as 'cpu', 'cuda' or 'cuda:1'."
        ) from error


def choose_dtype(dtype: str | None, device: torch.device) -> torch.dtype | str:
    """``dtype`` as torch knows it; by default float32 on the CPU, where it is exact and runs everywhere."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in DTYPES:
        raise InvalidInputError(f"dtype is {dtype!r}, but it must be one of {sorted(DTYPES)}.")
    return DTYPES[dtype]


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end an answer: the generation config's, and the tokenizer's own end token."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in [*ids, tokenizer.eos_token_id] if i is not None)


def _weights_digest(model: PreTrainedModel) -> str:
    return _digest(sorted(model.state_dict().items()))


def _digest(tensors: list[tuple[str, torch.Tensor]]) -> str:
    """xxh3-128 over names, shapes, dtypes and evenly spaced elements of each tensor."""
    digest = xxhash.xxh3_128()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        step = max(1, tensor.numel() // _SAMPLED_ELEMENTS)
        sample = tensor.detach().reshape(-1)[::step].contiguous().cpu()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    """The libraries' messages run over many lines; the first says what is wrong."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
