"""One vLLM server as a child process: how it is started, asked for tokens, and stopped.

It listens on a Unix socket in a folder that only this user can enter.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from ..errors import EngineError, ModelLoadError
from ..text.answer_format import AnswerFormat, with_fixed_space
from .reader import ReaderOptions

logger = logging.getLogger(__name__)

BASE, TUNED = "base", "tuned"  # names of the model without and with its adapter
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values that vLLM allows for the largest rank
START_SECONDS = 1800.0  # large models are read from slow disks, and compiled
STOP_SECONDS = 15.0
MAX_CONNECTIONS = 1024
_ERROR = re.compile(r"\b((?:\w+\.)*\w*error: \S.*)", re.IGNORECASE)
_LOG_LINES = 400  # last lines of the log to search for the cause of a failed start


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What a server runs.

    Attributes:
        model: folder or hub name.
        revision: of a hub model.
        dtype: of weights and activations.
        reader: where the documents are.
        max_model_len: tokens of documents, question and answer of one request together.
        max_positions: ``max_position_embeddings`` that replaces the model's own, or None.
        adapter, adapter_rank: folder of the adapter, and its rank. None: no adapter.
        arguments: further arguments of ``vllm serve``.
    """

    model: str
    revision: str | None
    dtype: str
    reader: ReaderOptions
    max_model_len: int
    max_positions: int | None = None
    adapter: Path | None = None
    adapter_rank: int = 0
    arguments: Sequence[str] = ()

    def command(self, socket: Path) -> list[str]:
        """Return the arguments of ``vllm serve`` that listens on ``socket``."""
        connector = {
            "kv_connector": "KVFusionConnector",
            "kv_connector_module_path": "vllm_kvfusion.connector",
            "kv_role": "kv_consumer",
            "kv_connector_extra_config": self.reader.to_dict(),
        }
        given = [
            "--model", self.model, "--served-model-name", BASE, "--uds", str(socket), "--dtype", self.dtype,
            "--max-model-len", str(self.max_model_len), "--kv-transfer-config", json.dumps(connector),
            "--generation-config", "vllm", "--disable-uvicorn-access-log",
            "--structured-outputs-config", json.dumps({"backend": "guidance"}),  # llguidance, as in our own masks
        ]  # fmt: skip
        if self.revision is not None:
            given += ["--revision", self.revision]
        if self.max_positions is not None:
            given += ["--hf-overrides", json.dumps({"max_position_embeddings": self.max_positions})]
        if self.adapter is not None:
            rank = next(rank for rank in LORA_RANKS if rank >= self.adapter_rank)
            given += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{TUNED}={self.adapter}"]
        return [*given, *self.arguments]


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """A prompt, and how its next tokens are chosen.

    Attributes:
        model: ``BASE`` or ``TUNED``.
        prompt: all token ids.
        salt: what separates the blocks of this prompt from those of others.
        end_ids: tokens after which vLLM stops. They are returned.
        documents: ``FusedPrompt.params()``, or empty if the prompt has no fused documents.
        sampling: temperature, top_p, top_k and seed.
        format: what the text of the generated tokens must match, or None for any text.
        first: ids that the first token may have, or None for all.
        scored: return log-probabilities too.
    """

    model: str
    prompt: Sequence[int]
    salt: str
    max_tokens: int
    end_ids: Sequence[int]
    documents: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    format: AnswerFormat | None = None
    first: Sequence[int] | None = None
    scored: bool = False

    def body(self) -> dict[str, Any]:
        """Return the body of a request to ``/v1/completions``."""
        return {
            "model": self.model,
            "prompt": list(self.prompt),
            "max_tokens": self.max_tokens,
            "stop_token_ids": list(self.end_ids),
            "ignore_eos": True,  # vLLM's own end tokens can be others
            "stream": True,
            "return_token_ids": True,
            "cache_salt": self.salt,
            **({"kv_transfer_params": self.documents} if self.documents else {}),
            **({"structured_outputs": _structured(self.format)} if self.format is not None else {}),
            **({"allowed_token_ids": list(self.first)} if self.first is not None else {}),
            **({"logprobs": 0} if self.scored else {}),
            **self.sampling,
        }


class Token(NamedTuple):
    """A generated token, and its log-probability in nats if the request is ``scored``."""

    id: int
    log_probability: float | None


class VllmServer:
    """A running server. Safe from several threads. It ends with this object, or with this process.

    Raises:
        ModelLoadError: vLLM ended before it could answer. The message contains the cause from its log.
    """

    def __init__(self, options: ServerOptions) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kvfusion-vllm-")
        folder = Path(self._folder.name)
        self._log = folder / "log.txt"
        command = [sys.executable, "-m", f"{__package__}.child", *options.command(folder / "socket")]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=_environment(),
                process_group=0,  # Ctrl-C in a terminal reaches only this process, which then stops vLLM
            )  # fmt: skip
        transport = httpx.HTTPTransport(
            uds=str(folder / "socket"),
            limits=httpx.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=MAX_CONNECTIONS),
        )
        self._http = httpx.Client(transport=transport, base_url="http://vllm", timeout=None)
        self.close = weakref.finalize(self, _stop, self._process, self._http, self._folder)
        logger.info("starting vLLM, whose log is %s", self._log)
        self._wait(options.model)

    def _wait(self, model: str) -> None:
        began = time.monotonic()
        while time.monotonic() - began < START_SECONDS:
            if self._process.poll() is not None:
                cause = self._cause()
                self.close()
                raise ModelLoadError(f"vLLM cannot serve {model!r}: {cause}")
            try:
                if self._http.get("/health").status_code == 200:
                    logger.info("vLLM was ready after %.0f s", time.monotonic() - began)
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        self.close()
        raise ModelLoadError(f"vLLM was not ready to serve {model!r} within {START_SECONDS:g} s.")

    def tokens(self, request: TokenRequest) -> Generator[Token, None, None]:
        """Yield tokens as vLLM generates them. Closing the generator ends the request.

        Raises:
            DocumentsLostError: vLLM could not load the documents.
            EngineError: vLLM has ended, or rejects the request.
        """
        try:
            with self._http.stream("POST", "/v1/completions", json=request.body()) as response:
                if response.status_code != 200:
                    response.read()
                    raise self._error(response.text, request)
                for line in response.iter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise self._error(json.dumps(event["error"]), request)
                    for choice in event["choices"]:
                        ids = choice.get("token_ids") or []
                        scores = choice["logprobs"]["token_logprobs"] if request.scored else [None] * len(ids)
                        yield from map(Token, ids, scores)
        except httpx.TransportError as error:
            ended = self._process.poll() is not None
            cause = self._cause() if ended else str(error)
            raise EngineError(f"vLLM {'has ended' if ended else 'does not respond'}: {cause}") from error

    def _error(self, text: str, request: TokenRequest) -> EngineError:
        if request.documents and "Internal server error" in text:
            return DocumentsLostError(f"vLLM cannot load the documents of a request; its log is {self._log}.")
        return EngineError(f"vLLM rejects a request: {text[:300]}")

    def _cause(self) -> str:
        """Return the first error at the end of the log. Later ones are about processes that waited for the first."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
        found = next((match for match in map(_ERROR.search, lines) if match is not None), None)
        return found[1][:500] if found else "its log contains no error"


class DocumentsLostError(EngineError):
    """vLLM could not load the documents of a request. They may have been evicted, or their files are damaged."""


def _structured(format: AnswerFormat) -> dict[str, Any]:
    """Return a format as vLLM's ``structured_outputs``."""
    if format.kind == "json_schema":
        return {"json": with_fixed_space(format.text)}
    if format.kind == "choices":
        return {"choice": json.loads(format.text)}
    return {format.kind: format.text}


def _environment() -> dict[str, str]:
    """Return this process's environment, in which vLLM finds this package and sends no statistics."""
    paths = [path for path in sys.path if path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "VLLM_NO_USAGE_STATS": "1"}


def _stop(process: subprocess.Popen[bytes], http: httpx.Client, folder: tempfile.TemporaryDirectory[str]) -> None:
    http.close()
    assert process.stdin is not None
    process.stdin.close()  # the child ends its whole group
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    with suppress(ProcessLookupError):  # vLLM's own processes survive a child that was killed
        os.killpg(process.pid, signal.SIGKILL)
    folder.cleanup()
