"""Evaluations with rows shared by workers, here and on Ray: reports and journals are those of one process."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from commands import run
from readers import row, rows

from kvfusion_rag import ClusterError, InvalidInputError, KVFusionGenerator
from kvfusion_rag.cluster import ClusterOptions, GeneratorSpec, SystemsSpec, evaluate_systems
from kvfusion_rag.data.rows import QARow, write_rows
from kvfusion_rag.evaluation.journal import Journal
from kvfusion_rag.evaluation.orders import plan_conditions
from kvfusion_rag.evaluation.runner import predict
from kvfusion_rag.evaluation.systems import GeneratorSystem

NAMES = ("fusion", "concat", "pcw")


@pytest.fixture
def systems(model_folder) -> SystemsSpec:
    return SystemsSpec(GeneratorSpec(str(model_folder)), NAMES, max_new_tokens=4)


def test_predictions_are_those_of_one_process(systems, model_folder):
    made = [*rows(4), QARow("odd\ud800", "who built \ud83d it?", ("東京",), row([True] + [False] * 4).passages)]
    plan = plan_conditions(made)
    found = evaluate_systems(made, systems, plan, batch_size=3)
    generator = KVFusionGenerator.from_pretrained(str(model_folder))
    here = [
        GeneratorSystem(name, one, mode, max_new_tokens=4)
        for name, one, mode in (
            ("fusion", generator, "fusion"),
            ("concat", generator, "concat"),
            ("pcw", generator.with_settings(passage_length=None), "fusion"),
        )
    ]
    assert found.predictions == predict(made, here, plan, batch_size=3)
    assert [(one.name, one.identity()) for one in found.systems] == [(one.name, one.identity()) for one in here]
    assert found.notes == ()


def test_interrupted_run_resumes(systems, tmp_path, monkeypatch):
    made = rows(7)
    plan = plan_conditions(made, ["original", "slot:1", "shuffled"])
    whole = evaluate_systems(made, systems, plan, batch_size=2).predictions
    record = Journal.record

    def stop(self, system, condition, start, answers):
        if start >= 4:
            raise KeyboardInterrupt
        record(self, system, condition, start, answers)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "record", stop)
        evaluate_systems(made, systems, plan, batch_size=2, journal=Journal(tmp_path / "a", {}))
    recorded = (tmp_path / "a").read_bytes()
    again = evaluate_systems(made, systems, plan, batch_size=2, journal=Journal(tmp_path / "a", {}))
    assert again.predictions == whole and (tmp_path / "a").read_bytes().startswith(recorded)
    with monkeypatch.context() as patch:
        patch.setattr(
            "kvfusion_rag.cluster.evaluating.EvaluateTask.start", lambda *args: pytest.fail("answered again")
        )
        last = evaluate_systems(made, systems, plan, batch_size=2, journal=Journal(tmp_path / "a", {}))
    assert last.predictions == whole
    with pytest.raises(InvalidInputError, match="of another run"):
        evaluate_systems(
            made, SystemsSpec(systems.generator, NAMES, max_new_tokens=5), plan, journal=Journal(tmp_path / "a", {})
        )


def test_settings_of_ape_and_other_weights_reach_the_systems(model_folder, speaker_folder):
    spec = SystemsSpec(
        GeneratorSpec(str(model_folder), options={"adapter": None}),
        ("ape", "concat"),
        {"concat_model": str(speaker_folder)},
        ape={"ape_temperature": 0.8, "ape_scale": 0.9},
    )
    found = evaluate_systems(rows(2), spec, plan_conditions(rows(2), ["original"]))
    ape, concat = (one.identity() for one in found.systems)
    assert (ape["temperature"], ape["scale"], concat["model_id"]) == (0.8, 0.9, "tiny-speaker")
    texts = {one.text for (name, _), answers in found.predictions.items() for one in answers if name == "concat"}
    assert texts == {"thomas grant"}


def test_wrong_cluster_options_are_one_line_before_work(capsys, tmp_path):
    write_rows(tmp_path / "rows.jsonl", rows())
    for options, reason in [
        (["--workers", 2], "--workers is given without --ray"),
        (["--ray", "nowhere"], "must be auto or HOST:PORT"),
    ]:
        code, out, err = run(capsys, "evaluate", tmp_path / "rows.jsonl", "--model", "no/such-model", *options)
        assert (code, out) == (2, "") and reason in err and err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_command_on_a_cluster_makes_the_report_of_one_process(capsys, tmp_path, model_folder, monkeypatch):
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVFUSION_HOME", str(tmp_path / "home"))
    write_rows(tmp_path / "rows.jsonl", rows(13))
    model = ("--model", model_folder, "--max-new-tokens", 4, "--batch-size", 2, "--json")
    reports = []
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        for name, options in (("here", ()), ("there", ("--ray", "auto", "--workers", 2, "--resume", "journal"))):
            files = ("--predictions", f"{name}.jsonl", "--markdown", f"{name}.md")
            code, out, _ = run(capsys, "evaluate", "rows.jsonl", *model, *files, *options)
            assert code == 0
            reports.append(json.loads(out))
        with pytest.raises(ClusterError, match="a worker could not start"):
            missing = SystemsSpec(GeneratorSpec(str(tmp_path)), NAMES)
            evaluate_systems(rows(), missing, plan_conditions(rows()), cluster=ClusterOptions(workers=1))
    finally:
        ray.shutdown()
    assert reports[1]["run"].pop("cluster") == asdict(ClusterOptions(workers=2))
    assert reports[0]["run"].keys() == reports[1]["run"].keys()
    for report in reports:
        del report["run"]
    assert reports[0] == reports[1]
    assert (tmp_path / "here.jsonl").read_text() == (tmp_path / "there.jsonl").read_text()
    again = ("--resume", "journal", "--predictions", "again.jsonl")
    assert run(capsys, "evaluate", "rows.jsonl", *model, *again)[0] == 0  # one process goes on with the same journal
    assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "here.jsonl").read_text()
