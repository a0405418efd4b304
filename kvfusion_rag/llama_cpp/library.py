"""Loads llama.cpp through llama-cpp-python, and a model's weights with it.

Nothing is imported from ``llama_cpp`` before :func:`library` is called: the package is optional.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..errors import InvalidInputError, MissingDependencyError, ModelLoadError, UnsupportedModelError

logger = logging.getLogger(__name__)

PACKAGE = "llama-cpp-python"
LOWEST, ABOVE = (0, 3, 36), (0, 4)  # tested versions; the layout of a sequence's state is not a stable interface
ERROR_LEVEL = 4  # llama.cpp's number for errors


@cache
def library() -> Any:
    """Return the module ``llama_cpp``, with its log sent to ours.

    Raises:
        MissingDependencyError: the package is missing or has another version, or its library cannot be loaded.
    """
    try:
        found = version(PACKAGE)
        numbers = tuple(int(part) for part in found.split(".")[:3])
        if not LOWEST <= numbers < ABOVE:
            raise MissingDependencyError(
                f"engine 'llama.cpp' works with {PACKAGE} from {_dotted(LOWEST)} to below {_dotted(ABOVE)}, but "
                f"{found} is installed; install kvfusion-rag[llama-cpp] again."
            )
        import llama_cpp
    except PackageNotFoundError as error:
        raise MissingDependencyError.of_extra("engine 'llama.cpp'", PACKAGE, "llama-cpp") from error
    except (OSError, RuntimeError) as error:  # a library for another processor or C library
        raise MissingDependencyError(f"{PACKAGE} is installed, but cannot be loaded: {error}.") from error
    module: Any = llama_cpp
    module.llama_log_set(_log_callback(module.llama_log_callback), None)
    module.llama_backend_init()
    return module


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


@cache  # a ctypes callback must outlive its registration
def _log_callback(kind: Any) -> Any:
    return kind(_log)


def _log(level: int, text: bytes, _: object) -> None:
    logger.log(
        logging.WARNING if level == ERROR_LEVEL else logging.DEBUG, "%s", text.decode("utf-8", "replace").rstrip()
    )


class Weights:
    """The weights of one GGUF file, and LoRA adapters for them. Any number of contexts can use them at the same time.

    Args:
        file: GGUF file.
        gpu_layers: number of layers on the GPU; None puts all there if the library can use one.

    Raises:
        ModelLoadError: llama.cpp cannot read the file.
        UnsupportedModelError: the model has no keys and values per token, or a window that forgets them.
        InvalidInputError: ``gpu_layers`` is above 0, but the library cannot use a GPU.
    """

    def __init__(self, file: Path, *, gpu_layers: int | None = None) -> None:
        lib = library()
        can_offload = bool(lib.llama_supports_gpu_offload())
        if gpu_layers and not can_offload:
            raise InvalidInputError(
                f"gpu_layers is {gpu_layers}, but it must be 0: this build of {PACKAGE} cannot use a GPU."
            )
        options = lib.llama_model_default_params()
        options.n_gpu_layers = (999 if can_offload else 0) if gpu_layers is None else gpu_layers
        self.name = file.name.removesuffix(".gguf")
        self.uses_gpu = options.n_gpu_layers > 0
        self._lib = lib
        self._adapters: list[Any] = []
        self.pointer = lib.llama_model_load_from_file(str(file).encode(), options)
        if not self.pointer:
            raise ModelLoadError(
                f"llama.cpp cannot read {file.name!r}: the file is damaged, or its architecture is newer than "
                f"{PACKAGE} {version(PACKAGE)}."
            )
        weakref.finalize(self, _free, lib, self.pointer, self._adapters)
        self._require_supported()
        self.vocabulary_size: int = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.pointer))

    def _require_supported(self) -> None:
        lib, reason = self._lib, None
        if lib.llama_model_is_recurrent(self.pointer) or lib.llama_model_is_hybrid(self.pointer):
            reason = "it keeps a running state instead of keys and values per token"
        elif lib.llama_model_has_encoder(self.pointer) or lib.llama_model_is_diffusion(self.pointer):
            reason = "it is not a decoder that writes one token after another"
        elif lib.llama_model_n_swa(self.pointer) > 0:
            reason = "its layers attend to a window, for which llama.cpp drops keys that lie outside of it"
        if reason is not None:
            raise UnsupportedModelError(
                f"{self.name!r} cannot be fused by llama.cpp, because {reason}; engine='torch' may accept it."
            )

    def add_adapter(self, file: Path) -> Any:
        """Load a LoRA adapter in GGUF format, and return it for :meth:`Context.use_adapter`.

        Raises:
            ModelLoadError: it does not fit the model.
        """
        adapter = self._lib.llama_adapter_lora_init(self.pointer, str(file).encode())
        if not adapter:
            raise ModelLoadError(f"llama.cpp cannot apply the adapter to {self.name!r}: it belongs to another model.")
        self._adapters.append(adapter)
        return adapter


def _free(lib: Any, weights: Any, adapters: Sequence[Any]) -> None:
    for adapter in adapters:
        lib.llama_adapter_lora_free(adapter)
    lib.llama_model_free(weights)
