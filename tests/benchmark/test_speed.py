"""``kvfusion bench answer``: cases and sweeps, floors counted by hand, and the report of a tiny model."""

from __future__ import annotations

import json
import random

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config

from kvfusion_rag import KVFusionGenerator
from kvfusion_rag.benchmark import hardware_limits, shapes, speed
from kvfusion_rag.benchmark.hardware_limits import Costs, Peaks, Work
from kvfusion_rag.benchmark.shapes import END, SHAPES, Shape, random_backbone
from kvfusion_rag.benchmark.speed import AnswerBenchmark, AnswerRun
from kvfusion_rag.benchmark.workload import SYSTEMS, Case, sweep
from kvfusion_rag.cli import main
from kvfusion_rag.errors import InvalidInputError, KVFusionError, MemoryLimitError
from kvfusion_rag.fusion.torch_model import TorchModel

SMALL = Case(documents=4, document_tokens=32, question_tokens=8, answer_tokens=4)
COMMAND = ["bench", "answer", "--shape", "tiny", "--documents", "4", "--document-tokens", "32", "--question-tokens",
           "8", "--answer-tokens", "4", "--repeats", "2", "--dtype", "float32"]  # fmt: skip


@pytest.fixture
def any_machine(monkeypatch):
    """Fixed peak rates, which are not measured."""
    monkeypatch.setattr(speed, "measure_peaks", lambda device, dtype: Peaks(1e9, 1e9, 1e9))


@pytest.fixture
def measured(any_machine, tmp_path) -> AnswerRun:
    return AnswerRun(AnswerBenchmark("tiny", "float32", repeats=1), tmp_path)


# Floors


SHAPE = Shape(Qwen2Config, 8, 16, 2, 2, 1, 10)  # heads of width 4
CASE = Case(documents=2, document_tokens=3, question_tokens=2, answer_tokens=4)
LAYER = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 3 * 8 * 16  # queries, keys, values, output, and the three of the MLP
BODY, HEAD = 2 * LAYER, 8 * 10
PAIR = 2 * 2 * 4 * 4  # layers, heads, width; a product and a sum for scores and values
KV = 2 * 2 * 4 * 4  # keys and values, layers, numbers, bytes
WEIGHTS = 4 * (BODY + HEAD)
LAST = 8 * 4 + 8 * 4  # keys and values of the last layer
DOCUMENT = 2 * (LAYER + LAST) * 3 + PAIR / 2 * (1 + 2 + 3)
QUESTION = 2 * (LAYER + LAST) + PAIR / 2 * (6 + 1) + 2 * BODY + PAIR * (6 + 2) + 2 * HEAD
JOINED = 2 * (LAYER + LAST) * 7 + PAIR / 2 * 28 + 2 * BODY + PAIR * 8 + 2 * HEAD


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        ("generate", Work(JOINED, WEIGHTS + 8 * KV)),
        ("cold", Work(2 * DOCUMENT + QUESTION, WEIGHTS + 8 * KV)),
        ("memory", Work(QUESTION, WEIGHTS + 8 * KV)),
        ("disk", Work(QUESTION, WEIGHTS + 8 * KV, 6 * KV)),
    ],
)
def test_floors_equal_those_counted_by_hand(system, expected):
    costs = Costs.of(SHAPE, torch.float32)
    assert costs.first_token(CASE, system) == expected
    # The three further steps read 9, 10 and 11 tokens: 10 on average.
    assert costs.next_token(CASE, system) == Work(2 * (BODY + HEAD) + PAIR * 10, WEIGHTS + 10 * KV)


def test_shared_documents_are_moved_and_computed_once():
    costs = Costs.of(SHAPE, torch.float32)
    shared, different = (Case(2, 3, 2, 4, batch=3, over=over) for over in ("shared", "different"))
    assert costs.first_token(shared, "cold") == Work(2 * DOCUMENT + 3 * QUESTION, WEIGHTS + (6 + 3 * 2) * KV)
    assert costs.first_token(different, "cold") == Work(6 * DOCUMENT + 3 * QUESTION, WEIGHTS + 3 * 8 * KV)
    assert costs.next_token(shared, "disk").moved == WEIGHTS + (6 + 3 * (2 + 2)) * KV
    assert costs.next_token(different, "disk").moved == WEIGHTS + 3 * 10 * KV
    assert costs.first_token(shared, "generate") == costs.first_token(different, "generate")
    assert costs.next_token(shared, "generate") == costs.next_token(different, "memory")


def test_missing_documents_are_computed():
    costs, half = Costs.of(SHAPE, torch.float32), Case(2, 3, 2, 4, hit_rate=0.5)
    assert costs.first_token(half, "memory") == Work(DOCUMENT + QUESTION, WEIGHTS + 8 * KV)
    assert costs.first_token(half, "disk").loaded == 3 * KV
    assert costs.first_token(half, "cold") == costs.first_token(CASE, "cold")


def test_floor_is_the_longer_of_computing_and_moving_after_loading():
    peaks = Peaks(operations=100, memory=10, load=5)
    assert Work(200, 10).seconds(peaks) == 2
    assert Work(200, 30).seconds(peaks) == 3
    assert Work(200, 30, 10).seconds(peaks) == 5


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-7b", 7_615_616_512),
        ("llama-3.1-8b", 8_030_261_248),
    ],
)
def test_shapes_have_the_published_number_of_parameters(name, parameters):
    costs = Costs.of(SHAPES[name], torch.bfloat16)
    embeddings = 0 if SHAPES[name].tied else costs.head
    assert costs.body + costs.head + embeddings == pytest.approx(parameters, rel=1e-3)  # without biases and norms


@pytest.mark.parametrize("shape", [SHAPES["tiny"], Shape(LlamaConfig, 64, 128, 2, 4, 2, 6_000, tied=False)])
def test_random_models_have_the_shape_and_never_end_an_answer(monkeypatch, shape):
    monkeypatch.setitem(SHAPES, "tiny", shape)
    backbone = random_backbone("tiny", "float32", "cpu", 0)
    matrices = sum(m.weight.numel() for m in backbone.model.modules() if isinstance(m, torch.nn.Linear))
    costs = Costs.of(shape, torch.float32)
    assert matrices == costs.body + costs.head
    assert not backbone.model.get_output_embeddings().weight[END].any() and backbone.end_ids == {END}
    generator = KVFusionGenerator(TorchModel(backbone), store=None)
    assert generator.count_tokens(shapes.random_text(random.Random(0), 40)) == 40
    assert generator.answer("w1 w2", ["w3 w4"], max_new_tokens=20).usage.completion_tokens == 20


# Cases


def test_sweep_has_each_case_once():
    assert sweep(SMALL, []) == [SMALL]
    assert [case.documents for case in sweep(SMALL, ["documents=5,20"])] == [5, 20]
    cases = sweep(SMALL, ["batch=1,4 over=shared,different", "hit-rate=1,0.5"])
    assert [(case.batch, case.over, case.hit_rate) for case in cases] == [
        (1, "shared", 1), (4, "shared", 1), (4, "different", 1), (1, "shared", 0.5),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("documents", "sweep is 'documents', but it must be NAME=VALUE"),
        ("colour=1", "sweep is 'colour=1', but it must be NAME=VALUE"),
        ("", "sweep is '', but it must be NAME=VALUE"),
        ("documents=5,many", "documents of the sweep is 'many', but it must be a whole number"),
        ("hit-rate=1.5", "hit_rate is 1.5, but it must be a number from 0 to 1"),
        ("over=nothing", "over is 'nothing', but it must be one of shared, different"),
        ("batch=0", "batch is 0, but it must be a whole number from 1"),
    ],
)
def test_wrong_sweep_raises(text, message):
    with pytest.raises(InvalidInputError, match=message):
        sweep(SMALL, [text])


# Runs


def test_hit_rate_does_not_depend_on_previous_cases(measured):
    for case in sweep(SMALL, ["hit-rate=0.5,0,1", "hit-rate=0.25 batch=3 over=shared,different"]):
        for row in measured.measure(case):
            stored = row["system"] in ("memory", "disk")
            assert row["hit_share"] == (case.hit_rate if stored else 0), row


def test_generate_reads_the_joined_prompt_and_gives_the_answer_of_mode_concat(measured, monkeypatch):
    texts, made = measured._texts(SMALL), []
    generate = measured._backbone.model.generate
    monkeypatch.setattr(
        measured._backbone.model, "generate", lambda *a, **k: made.append(generate(*a, **k)) or made[0]
    )
    measured._generate(SMALL, texts)
    generator = KVFusionGenerator(TorchModel(measured._backbone), store=None)
    answer = generator.answer(texts.questions[0], texts.documents[0], mode="concat", max_new_tokens=4)
    assert made[0].shape[1] == SMALL.joined_tokens + 4
    assert tuple(made[0][0, -4:].tolist()) == answer.token_ids


def test_systems_that_cannot_be_measured_are_left_out_with_a_reason(any_machine, tmp_path, monkeypatch):
    run = AnswerRun(AnswerBenchmark("tiny", "float32", repeats=1, generate_up_to=100), tmp_path)

    def no_memory(*args, **kwargs):
        raise MemoryLimitError("full")

    monkeypatch.setattr(run._generators["memory"], "answer_batch", no_memory)
    generate, cold, memory, _ = run.measure(SMALL)
    assert generate["left_out"] == "136 tokens are more than generate_up_to"
    assert memory["left_out"] == "out of memory"
    assert "left_out" not in cold and "times_faster_than_generate" not in cold


def test_answers_that_end_early_raise():
    with pytest.raises(KVFusionError, match=r"answers have \[3, 4\] tokens, but they must have 4"):
        speed._require_length(SMALL, [4, 3])


def test_peak_memory_is_that_of_the_measured_time():
    memory = speed._Memory(torch.device("cpu"))
    block = torch.ones(16 << 20)
    del block
    memory.stop()
    assert memory.growth == 0 or 60e6 < memory.growth <= memory.peak  # 0 if the system does not count


def test_command_measures_every_system_and_writes_json_and_a_table(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware_limits, "TRIES", 1)
    files = ["--output", str(tmp_path / "out.json"), "--markdown", str(tmp_path / "out.md")]
    assert main([*COMMAND, "--threads", "1", "--sweep", "batch=1,2", *files, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "out.json").read_text())
    assert [(row["system"], row["batch"]) for row in found["rows"]] == [(s, b) for b in (1, 2) for s in SYSTEMS]
    assert found["run"]["hardware"]["threads"] == 1 and found["run"]["hardware"]["instructions"]
    assert all(peak > 0 for peak in found["peaks"].values())
    for row in found["rows"]:
        first, token, whole = (row[f"seconds_{name}"] for name in ("to_first_token", "per_token", "in_all"))
        assert all(0 < one["least"] <= one["median"] <= one["most"] for one in (first, token, whole))
        assert first["median"] < whole["median"]
        ratios, floor = row["times_floor"], row["floors"]
        assert ratios["first_token"] == pytest.approx(first["median"] / floor["first_token"]["seconds"], rel=1e-2)
        assert ratios["token"] == pytest.approx(token["median"] / floor["token"]["seconds"], rel=1e-2)
        assert row["tokens_per_second"] == pytest.approx(row["batch"] * 4 / whole["median"], rel=1e-2)
    assert found["rows"][0]["times_faster_than_generate"] == {"first_token": 1.0, "in_all": 1.0}
    table = (tmp_path / "out.md").read_text().splitlines()
    assert sum(line.startswith("| ") for line in table) == 2 + len(found["rows"])


def test_command_measures_only_the_named_systems(any_machine, capsys):
    assert main([*COMMAND, "--systems", "cold,disk"]) == 0
    said = capsys.readouterr().out
    assert "| cold " in said and "| disk " in said and "| memory " not in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "huge"], "--shape: invalid choice: 'huge' (choose from 'qwen2.5-0.5b', "),
        (["--hit-rate", "2"], "--hit-rate: '2' is not a number from 0 to 1"),
        (["--sweep", "documents:5"], "sweep is 'documents:5', but it must be NAME=VALUE"),
        (["--systems", "cold,warm"], "--systems has 'warm', but it must be some of generate, cold, memory, disk."),
        (["--answer-tokens", "1"], "answer_tokens is 1, but it must be a whole number from 2."),
    ],
)
def test_wrong_options_are_one_line(capsys, options, message):
    assert main([*COMMAND, *options]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not said.out


def test_generate_uses_transformers_attention_and_ours_is_restored(any_machine, tmp_path, monkeypatch):
    run = AnswerRun(AnswerBenchmark("tiny", "float32", systems=("generate", "memory"), repeats=1, warmups=0), tmp_path)
    model = run._backbone.model
    ours, used = model.config._attn_implementation, []
    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda *a, **k: (used.append(model.config._attn_implementation), generate(*a, **k))[1]
    )
    assert [row["system"] for row in run.measure(SMALL)] == ["generate", "memory"]
    assert used == ["sdpa"] and model.config._attn_implementation == ours == "kvfusion_grouped"


@pytest.mark.parametrize("weights", ["int8", "float8"])
def test_8_bit_weights_have_their_own_floor(any_machine, tmp_path, weights):
    names = {"systems": ("generate", "memory"), "repeats": 1, "warmups": 0}
    run = AnswerRun(AnswerBenchmark("tiny", "float32", weights=weights, **names), tmp_path)
    plain = Costs.of(SHAPES["tiny"], torch.float32)
    assert run.facts()["model"]["weight_bytes_of_a_step"] == plain.body + 4 * plain.head
    assert all("left_out" not in row for row in run.measure(SMALL))
    kinds = {name: type(weight).__name__ for name, weight in run._backbone.model.state_dict(keep_vars=True).items()}
    assert kinds["model.layers.0.mlp.up_proj.weight"] == f"{weights.capitalize()}Tensor"
    assert kinds["lm_head.weight"] == kinds["model.embed_tokens.weight"] == "Parameter"  # tied


def test_unknown_weights_raise(any_machine, tmp_path):
    with pytest.raises(InvalidInputError, match="weights is 'int4', but it must be one of int8, float8"):
        AnswerRun(AnswerBenchmark("tiny", "float32", weights="int4"), tmp_path)
