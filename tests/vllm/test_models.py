"""Other models, stores and divisions on vLLM. Each test starts a server. Needs vLLM (make test-vllm)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from chat_families import family_tokenizer
from thinkers import OPENED, TAGGED

from kvfusion_rag import AnswerFormat, KVFusionGenerator, ModelLoadError, UnsupportedModelError
from kvfusion_rag.engine.calls import read_call
from kvfusion_rag.engine.requests import Batch
from kvfusion_rag.engine.runner import Runner

pytest.importorskip("vllm")
from kvfusion_rag.vllm import server

pytestmark = pytest.mark.slow

DOCUMENTS = [
    "In 1874 Amara Osei built a lighthouse of 31 metres, and its lamp was lit for the first time on 3 May.",
    "The river runs past an old mill and the miller counts sacks of flour.",
    "Rain falls on the roof where two grey doves sleep; nobody knows, said the clerk.",
]
QUESTION = "who built it? the clerk said wait"
SIZES = {  # vLLM's kernels need heads of at least 32 numbers
    "hidden_size": 128, "intermediate_size": 192, "head_dim": 32,
    "max_position_embeddings": 1024,
}  # fmt: skip
ROPES = {
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 128},
}
EVERYTHING = {"mode": "fusion", "focus": None, "max_new_tokens": 12}


def save(folder: Path, architecture: str = "llama", rope: str = "default", **changes: Any) -> Path:
    parameters = {"rope_type": rope, "rope_theta": 10_000.0, **ROPES.get(rope, {})}
    return tiny.save(folder, architecture, rope_parameters=parameters, **{**SIZES, **changes})


def load(folder: Path, *arguments: str, **options: Any) -> KVFusionGenerator:
    return KVFusionGenerator.from_pretrained(
        folder, engine="vllm", vllm_args=["--enforce-eager", *arguments], **{"dtype": "float32", **options}
    )


def torch_runner(generator: KVFusionGenerator) -> Runner[Any]:
    """Return a runner that answers on torch, from the same weights and store."""
    runner = generator._engine.runner
    return Runner(runner.model, runner.document_kvs, max_fused_tokens=runner.max_fused_tokens)


def on_both(
    generator: KVFusionGenerator, documents: list[str] = DOCUMENTS, question: str = QUESTION, **options: Any
) -> tuple[Any, Any]:
    """Return the tokens of vLLM and of torch."""
    runner = generator._engine.runner
    call = read_call(generator._engine, question, documents, {**EVERYTHING, **options})
    (found,) = runner.answer_all(call.requests, call.decoding)
    (expected,) = torch_runner(generator).answer_all(call.requests, call.decoding)
    return found.token_ids, expected.token_ids


@pytest.mark.parametrize(
    ("architecture", "rope"), [("qwen2", "default"), ("qwen3", "yarn"), ("mistral", "llama3"), ("llama", "llama3")]
)
def test_other_families_answer_like_torch(tmp_path, architecture, rope):
    """The gate compares probabilities, and refuses to load otherwise."""
    changes = {"sliding_window": None} if architecture == "mistral" else {}
    generator = load(save(tmp_path / "model", architecture, rope, **changes))
    found, expected = on_both(generator)
    assert found == expected
    assert sum(check.name.startswith("vLLM") and check.passed for check in generator.gate.checks) == 6


@pytest.mark.parametrize("name", [TAGGED, OPENED])
def test_a_format_begins_behind_the_reasoning(tmp_path, name):
    """A model may open its reasoning itself, or its prompt has opened it."""
    folder = tiny.save(tmp_path / "model", **SIZES)
    family_tokenizer(name).save_pretrained(folder)
    generator = load(folder)
    formats = [AnswerFormat.choices([one]) for one in "abcdefgh"] + [AnswerFormat.regex("[a-f]{2,4}-[0-9]{3}")]
    opening = family_tokenizer(name).convert_tokens_to_ids("<think>")
    opened = []
    for format in formats:
        found, expected = on_both(generator, response_format=format, max_reasoning_tokens=6)
        assert found == expected
        opened.append(found[0] == opening or name == OPENED)
    assert any(opened) and (name == OPENED or not all(opened))


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_two_workers_divide_the_heads(tmp_path, kv_heads):
    folder = save(tmp_path / "model", num_key_value_heads=kv_heads)
    found, expected = on_both(load(folder, "--tensor-parallel-size", "2"))
    assert found == expected


def test_longer_requests_than_the_context_window(tmp_path):
    """The documents together exceed the window, and each of them does not."""
    folder = save(tmp_path / "model", max_position_embeddings=256)
    documents = [f"{number} {text}" for number in range(6) for text in DOCUMENTS]
    generator = load(folder, max_model_len=2048)
    assert sum(map(len, documents)) > 1000
    found, expected = on_both(generator, documents)
    assert found == expected


def test_preempted_requests_load_their_documents_again(tmp_path):
    """24 requests with answers of 200 tokens do not fit into vLLM's memory at the same time."""
    generator = load(save(tmp_path / "model"), "--num-gpu-blocks-override", "16", max_model_len=512)
    runner = generator._engine.runner
    questions = [f"{number} {QUESTION}" for number in range(24)]
    call = read_call(generator._engine, questions[0], DOCUMENTS, {**EVERYTHING, "max_new_tokens": 200})
    requests = [read_call(generator._engine, q, DOCUMENTS, EVERYTHING).requests[0] for q in questions]
    requests = [replace(request, limits=call.requests[0].limits) for request in requests]
    answers = runner.answer_all(requests, call.decoding)
    expected = [torch_runner(generator).answer_all([request], call.decoding)[0] for request in requests]
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]


def test_documents_in_s3(tmp_path, monkeypatch):
    """The worker reads documents from the bucket that its local disk does not have."""
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    import fsspec

    bucket_server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    bucket_server.start()
    host, port = bucket_server.get_host_and_port()
    for name, value in (("ENDPOINT_URL", f"http://{host}:{port}"), ("DEFAULT_REGION", "us-east-1"),
                        ("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret")):  # fmt: skip
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("KVFUSION_HOME", str(tmp_path / "home"))
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(bucket)
    try:
        generator = load(save(tmp_path / "model"), store=f"s3://{bucket}/kvs")
        runner, store = generator._engine.runner, generator.store
        call = read_call(generator._engine, QUESTION, DOCUMENTS, EVERYTHING)
        request = runner.prepare(call.requests[0], call.decoding)
        runner.begin(Batch.of(request))
        assert store.flush()
        (expected,) = torch_runner(generator).answer_all([request], call.decoding)
        for file in Path(store.disk.path).rglob("*.safetensors"):
            file.unlink()
        asked = runner.token_request(request, (), call.decoding)
        assert tuple(token.id for token in runner.server.tokens(asked)) == expected.token_ids
        assert any(Path(store.disk.path).rglob("*.safetensors"))
    finally:
        bucket_server.stop()


# Starting and stopping


def test_vllm_that_cannot_start_names_the_cause(tmp_path):
    with pytest.raises(ModelLoadError, match=r"vLLM cannot serve .*no-such-option"):
        load(save(tmp_path / "model"), "--no-such-option")


def test_a_gate_that_fails_names_the_difference(tmp_path, monkeypatch):
    """With keys that are moved by a wrong distance, the probabilities differ."""
    folder = save(tmp_path / "model")
    other = shutil.copytree(folder, tmp_path / "other")
    config = (other / "config.json").read_text().replace("10000.0", "12000.0")
    (other / "config.json").write_text(config)
    made = server.ServerOptions.command
    monkeypatch.setattr(
        server.ServerOptions, "command", lambda self, socket: made(replace(self, model=str(other)), socket)
    )
    with pytest.raises(UnsupportedModelError, match="failed the support gate on vLLM: vLLM over fused documents"):
        load(folder)


def test_vllm_ends_with_its_parent(tmp_path):
    """Even if that is killed."""
    folder = save(tmp_path / "model")
    code = (
        "import sys, time; from kvfusion_rag import KVFusionGenerator as G; "
        f"g = G.from_pretrained({str(folder)!r}, engine='vllm', vllm_args=['--enforce-eager'], dtype='float32'); "
        "print(g._engine.runner.server._process.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=_with_paths())
    assert parent.stdout is not None
    group = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
    os.killpg(group, signal.SIGKILL)
    pytest.fail("vLLM still runs")


def _with_paths() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
