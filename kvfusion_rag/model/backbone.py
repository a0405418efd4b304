"""One model with its tokenizer and optional adapter: loading, forward passes, fingerprint.

The only module that calls the model, and the only one where differences between transformers versions may
live. ``forward`` of a transformers model swallows unknown keyword arguments in silence, so nobody else may
call it. Weights are shared by the prefill decoder Dp (adapter off) and the answering decoder Dt (adapter on).
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import InvalidInputError, ModelLoadError, model_load_errors
from ..text.settings import FILE_NAME, RECORD_NAME, ModelSettings, load_settings
from .ape import Ape
from .attention import GROUPED, explicit, read_context_twice, share_heads
from .attention_weights import AttentionSum
from .devices import choose_device, choose_dtype
from .document_cache import DocumentCache
from .fingerprint import digest_tensors
from .hardware import SLOW, device_name, slowness
from .kv import DocumentKV
from .locating import HUB_OPTIONS, ModelLocation
from .positions import additive
from .support import require_supported
from .versions import require_adapters

if TYPE_CHECKING:
    from peft import LoraConfig

logger = logging.getLogger(__name__)

OWN_OPTIONS = (
    "config",
    "dtype",
    "torch_dtype",
    "revision",
    "gguf_file",
)  # have arguments of their own, or would be lost


class Backbone:
    """A causal language model that can prefill apart, and decode over a fused cache.

    Safe from several threads: forward passes take turns, and adapter and attention are switched under the same lock.
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
    ) -> None:
        require_supported(model.config, model_id)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.settings = settings
        self.base_settings = base_settings or settings  # without the adapter
        self.model_id = model_id
        self.revision = revision
        self.config: PretrainedConfig = model.config.get_text_config()
        self.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.quantized = bool(getattr(model, "is_quantized", False))  # weights are kept in fewer bits than ``dtype``
        self.attention = share_heads(self.model)
        self.context_window: int | None = getattr(self.config, "max_position_embeddings", None)
        generation = model.generation_config
        self.max_new_tokens: int | None = None if generation is None else generation.max_new_tokens
        self.end_ids = _end_ids(model, tokenizer)
        ends = [tokenizer.eos_token_id, *sorted(self.end_ids)]
        self.end_id: int | None = next((i for i in ends if i is not None), None)  # what training ends answers with
        self._weights = list(model.state_dict(keep_vars=True).items())  # without an adapter's
        self._digest_of: tuple[list[int], str] | None = None
        self.adapter_digest = None if adapter is None else self._load_adapter(str(adapter))
        self._lock = threading.Lock()
        self._adapter_on = adapter is not None
        self.checkpoints_activations = False

    @classmethod
    def load(
        cls,
        where: ModelLocation,
        *,
        adapter: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> Backbone:
        """Load a model from a folder or the hub with transformers' own loaders; remote code stays off.

        Args:
            where: what ``locate_model`` found.
            adapter: folder of a LoRA adapter.
            device: "cpu", "cuda", "cuda:1", "mps"; by default an accelerator if there is one.
            dtype: "float32", "bfloat16", "float16"; by default float32 on CPU, else the checkpoint's own.
            model_kwargs: passed on to ``AutoModelForCausalLM.from_pretrained``, but for those that say where the model
                is, which are in ``where``.

        Raises:
            ModelLoadError: model, tokenizer or adapter cannot be read.
            UnsupportedModelError: the architecture cannot be fused exactly.
            MissingDependencyError: there is an adapter, and the installed transformers and peft do not fit.
        """
        if adapter is not None:
            require_adapters()
        place = choose_device(device)
        precision = choose_dtype(dtype, place)
        if place.type == "cpu" and isinstance(precision, torch.dtype) and slowness(precision) > SLOW:
            logger.warning("this processor has no instructions for %s: float32 is many times faster here", dtype)
        kwargs = {name: value for name, value in (model_kwargs or {}).items() if name not in HUB_OPTIONS}
        if wrong := sorted(kwargs.keys() & set(OWN_OPTIONS)):
            raise InvalidInputError(
                f"model_kwargs holds {wrong[0]!r}, but that is no place for it; see from_pretrained."
            )
        model, model_id, hub = where.path, where.model_id, {"revision": where.revision, **where.hub}
        with model_load_errors(f"the configuration of {model_id!r}"):
            config = AutoConfig.from_pretrained(model, **hub)
            for name in kwargs.keys() & config.to_dict().keys():
                setattr(config, name, kwargs.pop(name))
        require_supported(config, model_id)  # before gigabytes are read
        with model_load_errors(f"the tokenizer of {model_id!r}"):
            tokenizer = AutoTokenizer.from_pretrained(model, **hub)
        with model_load_errors(f"the settings of {model_id!r}"):
            settings = base_settings = load_settings(where.home, tokenizer, model_id=model_id, **hub)
            if adapter is not None and (Path(adapter) / FILE_NAME).is_file():  # as it was trained
                settings = load_settings(str(adapter), tokenizer, model_id=Path(adapter).resolve().name)
            elif adapter is not None:  # one of other software, trained on ordinary prompts
                settings = replace(settings, tuned_concat=True)
        with model_load_errors(f"the weights of {model_id!r}"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                model, config=config, dtype=precision, output_loading_info=True, **hub, **kwargs
            )
            network, found = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
            if "device_map" not in kwargs:
                network.to(device=place)  # type: ignore[call-arg]  # in place
        if missing := sorted(found["missing_keys"]):
            raise ModelLoadError(
                f"cannot load the weights of {model_id!r}: {len(missing)} are missing in the checkpoint, the first "
                f"{missing[0]!r}; it is incomplete, or belongs to another architecture."
            )
        commit = getattr(config, "_commit_hash", None) or where.revision
        return cls(
            network,
            tokenizer,
            settings,
            model_id=model_id,
            revision=commit,
            adapter=adapter,
            base_settings=base_settings,
        )

    @torch.inference_mode()
    def prefill(
        self, ids: torch.Tensor, prefix: DocumentKV | None, starts: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Dp: keys and values of independent rows, each row seeing the prefix and itself.

        Args:
            ids: (R, T) token ids, right-padded; causal attention cannot see pads.
            prefix: KV at positions 0..p-1, or ``None``.
            starts: position of each row's first token; by default p, right after the prefix. Pads that would pass the
                window stay at its last position.

        Returns:
            Keys and values, each (L, R, H_kv, T, d), without the prefix.
        """
        rows, length = ids.shape
        past = 0 if prefix is None else prefix.num_tokens
        first = torch.tensor(starts or [past] * rows)
        positions = (first[:, None] + torch.arange(length)).to(self.device)  # (R, T)
        if self.context_window is not None:
            positions = positions.clamp(max=self.context_window - 1)
        mask = torch.ones(rows, past + length, dtype=torch.long, device=self.device)
        cache = DocumentCache(self.config, prefix, rows)
        with self._turn(adapter=False), cache.collecting():
            self.model.get_decoder()(
                input_ids=ids.to(self.device),
                position_ids=positions,
                attention_mask=mask,
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
        """One pass of Dt over ``ids``, appended to ``cache``.

        Args:
            ids: (R, Q) token ids.
            positions: (R, Q) position of each.
            mask: (R, K + Q), 1 where a slot of the cache or of ``ids`` is real; or (R, 1, Q, K + Q) bool, if the model
                :attr:`takes_any_mask`.
            cache: K slots; grows by Q.
            last: (N,) columns of ``ids`` whose next tokens are asked for.
            rows: (N,) and their rows; by default one of each row.
            adapter: whether the adapter takes part, if one is loaded.
            ape: attend to the documents' slots as APE does, in this pass alone.
            attention_sum: adds up the attention of this pass, which has one row.

        Returns:
            Logits (N, V), float32.
        """
        wanted, place = torch.unique(last, return_inverse=True)
        extra: dict[str, Any] = {} if ape is None else {"adapt": ape.adapt}
        extra |= {} if attention_sum is None else {"note": attention_sum.add}
        if mask.dim() == 4 and not extra:
            mask = additive(mask, self.dtype)  # once, not in every layer
        with self._turn(adapter=adapter, attention=explicit() if extra else None):
            out = self.model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=wanted,
                **extra,
            )
        if rows is None:
            rows = torch.arange(ids.shape[0], device=ids.device)
        return out.logits[rows, place].float()  # (R, len(wanted), V) -> (N, V)

    def training_logits(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor,
        cache: DynamicCache,
        kept: torch.Tensor,
        *,
        tuned: bool = True,
    ) -> torch.Tensor:
        """Logits (B, N, V) of one pass of Dt with gradients, at the N columns of ``ids`` that ``kept`` (N,) names.

        Other arguments are those of :meth:`forward`. With ``tuned=False`` the base model answers, adapter and dropout
        off; the caller turns gradients off.

        Once :meth:`checkpoint_activations` was called, the mask must be a four-dimensional one, and the backward
        pass must come before the model is used for anything else, since it computes the layers again.
        """
        if mask.dim() == 4 and self.config._attn_implementation == "eager":  # which adds a mask to the scores
            mask = additive(mask, self.dtype)
        known: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        if self.checkpoints_activations and tuned:
            layers = [layer[:2] for layer in cache] if cache.get_seq_length() else None
            known = {"context": layers, "use_cache": False}
        with self._turn(adapter=tuned, training=tuned and self.model.training):
            out = self.model(input_ids=ids, position_ids=positions, attention_mask=mask, logits_to_keep=kept, **known)
        return out.logits

    def checkpoint_activations(self) -> None:
        """From now on compute layers again in the backward pass instead of keeping their activations.

        Raises:
            UnsupportedModelError: the architecture has no checkpoints, or no attention function can be named for it.
        """
        read_context_twice(self.model, self.model_id)
        self.checkpoints_activations = True

    def add_adapter(self, settings: LoraConfig) -> None:
        """Put a fresh LoRA adapter onto the model, to be trained; prefill goes on without it.

        Raises:
            MissingDependencyError: the installed transformers and peft do not fit.
        """
        require_adapters()
        with self._lock:
            self.model.add_adapter(settings)
            self.adapter_digest = "in training"
            self._adapter_on = True

    def save(self, folder: Path) -> None:
        """Write the adapter in peft's format, or the whole model with its tokenizer where there is none."""
        self.model.save_pretrained(folder)
        if not self.has_adapter:
            self.tokenizer.save_pretrained(folder)

    def fingerprint(self) -> str:
        """Hex digest of everything about this model that changes a document's keys and values.

        All bytes of the weights, the configuration with its RoPE settings, dtype, device, implementation of attention,
        and library versions. Tokenizer and templates act through the token ids.
        """
        config = {k: v for k, v in self.config.to_dict().items() if not k.startswith("_")}
        facts = {
            "weights": self.weights_digest,
            "revision": self.revision,
            "dtype": str(self.dtype),
            "device": device_name(self.device),  # kinds of processors round differently
            "attention": self.attention,
            "instructions": torch.backends.cpu.get_cpu_capability() if self.device.type == "cpu" else None,
            "config": config,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def weights_digest(self) -> str:
        """xxh3-128 over all weights; computed again once torch says that one of them was changed in place."""
        versions = [tensor._version for _, tensor in self._weights if not tensor.is_inference()]
        if self._digest_of is None or self._digest_of[0] != versions:
            self._digest_of = versions, digest_tensors(self._weights)
        return self._digest_of[1]

    def digest_again(self) -> None:
        """Read all weights again at the next look: they were changed in a way that torch does not count."""
        self._digest_of = None

    @property
    def takes_any_mask(self) -> bool:
        """Whether attention honours a mask that is not one of padding; flash attention does not."""
        return self.attention in ("sdpa", "eager", GROUPED)

    @property
    def has_adapter(self) -> bool:
        return self.adapter_digest is not None

    @contextmanager
    def _turn(self, *, adapter: bool, attention: str | None = None, training: bool = False) -> Iterator[None]:
        """The model for one forward pass: the adapter (if any) on or off, another attention, dropout in training."""
        # A caller's autocast would change the bits under an unchanged key.
        with self._lock, torch.autocast(self.device.type, enabled=False):
            wanted = adapter and self.has_adapter
            if wanted != self._adapter_on:
                self.model.enable_adapters() if wanted else self.model.disable_adapters()
                self._adapter_on = wanted
            usual = cast(str, self.config._attn_implementation)
            paused = self.model.training and not training
            if attention is not None:
                self.model.set_attn_implementation(attention)
            if paused:
                self.model.eval()
            try:
                yield
            finally:
                if attention is not None:
                    self.model.set_attn_implementation(usual)
                if paused:
                    self.model.train()

    def _load_adapter(self, adapter: str) -> str:
        name = Path(adapter).resolve().name
        require_trained_on(Path(adapter), self)
        with model_load_errors(f"the adapter {name!r} onto {self.model_id!r}"):
            found = self.model.load_adapter(adapter)
        misfits = (*found.missing_keys, *found.unexpected_keys, *found.mismatched_keys)
        if wrong := sorted(map(str, misfits)):
            raise ModelLoadError(
                f"cannot load the adapter {name!r} onto {self.model_id!r}: {len(wrong)} weights do not fit, the first "
                f"{wrong[0]!r}; it was trained on another base model."
            )
        self.model.eval()
        settings = {key: vars(value) for key, value in self.model.peft_config.items()}
        facts = json.dumps(settings, sort_keys=True, default=_sorted_if_set)
        return digest_tensors(_adapter_weights(self.model).items(), facts)


def require_trained_on(folder: Path, base: Backbone) -> None:
    """Refuse an adapter or decoder whose record says that it was trained on other weights than those of ``base``.

    Shapes alone do not tell two models of one family apart. The record holds one digest of weights or a list of
    accepted ones, in all precisions. With ``"same_family": true``, other weights are accepted under the same name,
    with a warning: they are another quantisation of one model. What has no record, or was trained on a base that is
    quantised here (which changes the digest), is not judged; what has one digest, in another precision, is judged by
    the base model's name only, with a warning.

    Raises:
        ModelLoadError: it was trained on another base model.
    """
    file = folder / RECORD_NAME
    if not file.is_file() or base.quantized:
        return
    with model_load_errors(f"the record of {folder.name!r}"):
        record = json.loads(file.read_text(encoding="utf-8"))
        trained_on, dtype = record.get("base_weights"), record.get("dtype")
        accepted = trained_on if isinstance(trained_on, list) else [trained_on]
        is_family = record.get("same_family") is True
    name, precision, shown = record.get("base_model"), str(base.dtype).removeprefix("torch."), folder.resolve().name
    if base.weights_digest in accepted:
        return
    if dtype != precision and not isinstance(trained_on, list):
        if name != base.model_id:
            logger.warning(
                "%r was trained on %r in %s; whether %r in %s has the same weights cannot be told.",
                shown, name, dtype, base.model_id, precision,
            )  # fmt: skip
        return
    if name != base.model_id or not is_family:
        raise ModelLoadError(
            f"{shown!r} was trained on another base model: on {name!r}, and the weights of {base.model_id!r} are "
            "others."
        )
    logger.warning("%r was trained on other weights of %r; its answers may be worse here.", shown, name)


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end an answer: the generation config's, and the tokenizer's own end token."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in [*ids, tokenizer.eos_token_id] if i is not None)


def _adapter_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict  # slow to import, and needed for adapters only

    # The model's own method would ask the hub for the base model's configuration.
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def _sorted_if_set(value: object) -> object:
    """For JSON: sets in an order that does not change from run to run, anything else as text."""
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)
