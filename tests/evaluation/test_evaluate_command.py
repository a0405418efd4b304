"""``kvfusion evaluate`` from rows to report."""

from __future__ import annotations

import json
import logging
import re
import sys

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from readers import Reader, row, rows
from transformers import AutoModelForCausalLM, GPTJConfig

from kvfusion_rag import KVFusionGenerator
from kvfusion_rag.cli import COMMANDS, evaluate, main
from kvfusion_rag.data.rows import QARow, write_rows
from kvfusion_rag.errors import MissingDependencyError
from kvfusion_rag.evaluation import plots, report
from kvfusion_rag.evaluation.orders import ORIGINAL, long_context_order
from kvfusion_rag.evaluation.predictions import Prediction
from kvfusion_rag.evaluation.systems import SYSTEMS, default_systems
from kvfusion_rag.fusion.torch_model import TorchModel
from kvfusion_rag.model.backbone import Backbone
from kvfusion_rag.text.settings import ModelSettings
from tests.evaluation.test_orders import BARE


def test_command_writes_all_files(capsys, command, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "a.json").write_text("old")
    files = ["--output", "a.json", "--markdown", "a.md", "--predictions", "p.jsonl", "--plot", "a.png", "--force"]
    assert command("rows.jsonl.gz", "--limit", 4, "--batch-size", 3, "--seed", 5, *files) == 0
    out, err = capsys.readouterr()
    assert [line for line in err.splitlines() if "was not trained" not in line] == []
    assert out == (tmp_path / "a.md").read_text()
    assert "**tiny-llama on rows.jsonl.gz: 4 questions, 5 documents each.**" in out
    figures = json.loads((tmp_path / "a.json").read_text())
    assert [system["name"] for system in figures["systems"]] == default_systems({})
    assert figures["systems"][0]["model_id"] == "tiny-llama"
    assert (figures["rows"], figures["documents"], figures["settings"]["seed"]) == (4, 5, 5)
    assert {"date", "command", "commit", "versions", "hardware"} == figures["run"].keys()
    assert len(figures["cells"]) == 6 * len(figures["conditions"]) == 6 * 6
    assert figures["token_match"][0]["figure"] == {"mean": 100.0, "low": 100.0, "high": 100.0}
    assert figures["slot_spread"][0] == {"system": "fusion", "points": 0.0}
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(lines) == 4 * len(figures["cells"])
    at_5 = [line["documents"] for line in lines if line["condition"] == "slot:5"]
    assert at_5 == [[2, 3, 4, 5, 1]] * 24
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    sections = out.split("### ")[1:]
    assert len(sections) == 5
    for section in sections:
        table = [line for line in section.splitlines() if line.startswith("|")]
        assert len(table) >= 4 and len({(len(line), line.count("|")) for line in table}) == 1


def test_files_are_written_if_stdout_is_closed(command, tmp_path, monkeypatch):
    def closed(*args, **options):
        raise BrokenPipeError

    monkeypatch.setattr(evaluate, "say", closed)
    assert command("rows.jsonl.gz", "--systems", "fusion", "--output", "a.json", "--markdown", "a.md") != 0
    assert json.loads((tmp_path / "a.json").read_text())["rows"] == 6 and (tmp_path / "a.md").read_text()


def test_digest_is_that_of_the_rows_that_were_read(command, tmp_path, monkeypatch):
    judged = report.file_digest(tmp_path / "rows.jsonl.gz")
    load = evaluate.load_generator

    def replacing(args, store):
        (tmp_path / "rows.jsonl.gz").unlink(missing_ok=True)
        return load(args, store)

    monkeypatch.setattr(evaluate, "load_generator", replacing)
    assert command("rows.jsonl.gz", "--systems", "fusion", "--output", "a.json") == 0
    assert json.loads((tmp_path / "a.json").read_text())["settings"]["file_sha256"] == judged


def test_predictions_can_contain_lone_surrogates(command, tmp_path):
    odd = QARow("odd\ud800", "who built \ud83d it?", ("東京\udfff",), row([True, False]).passages)
    lines = report.prediction_lines([odd], {("s", ORIGINAL): [Prediction("\ud800", "x", (1,), (1, 2))]})
    assert json.loads("".join(lines).encode())["answers"] == ["東京\udfff"]


def test_json_output_repeats(capsys, command):
    argv = ("rows.jsonl.gz", "--json", "--systems", "fusion,concat", "--conditions", "shuffled,original")
    reports = []
    for _ in range(2):
        assert command(*argv) == 0
        reports.append(json.loads(capsys.readouterr().out))
    for one in reports:
        del one["run"]
    assert reports[0] == reports[1]
    assert reports[0]["conditions"] == ["shuffled", "original"]


def test_rows_that_do_not_fit_are_marked_in_tables(capsys, command, monkeypatch):
    monkeypatch.setattr(evaluate, "make_systems", lambda *args: [Reader("wide"), Reader("small", limit=4)])
    assert command("rows.jsonl.gz", "--plot", "a.svg") == 0
    out = capsys.readouterr().out
    assert "| small  | does not fit" in out
    assert "- does not fit: documents, question and answer together exceed the model's window" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["none.jsonl"], "argument ROWS: 'none.jsonl' does not exist"),
        (["broken.jsonl"], "broken.jsonl, line 1: passages is None"),
        (["empty.jsonl"], "no rows to evaluate"),
        (["rows.jsonl.gz", "--conditions", "slot:9"], "condition is slot:9, but its number"),
        (["rows.jsonl.gz", "--seed", "-1"], "'-1' is not a whole number from 0"),
        (["squad.json"], "kvfusion build-data makes such rows from squad.json"),
        (["rows.jsonl.gz", "--conditions", ","], "no name is given"),
        (
            ["rows.jsonl.gz", "--systems", "fusion,magic"],
            "system is 'magic', but it must be one of fusion, fusion-full",
        ),
        (["rows.jsonl.gz", "--systems", "fusion,sft"], "the system 'sft' needs --sft, which is not given"),
        (["rows.jsonl.gz", "--systems", "fusion", "--decoder", "d"], "with a decoder only, use 'fusion-full'"),
        (["rows.jsonl.gz", "--output", "rows.jsonl.gz", "--force"], "rows.jsonl.gz' is also an input"),
        (["rows.jsonl.gz", "--output", "x.svg", "--plot", "x.svg"], "x.svg is named twice"),
        (["rows.jsonl.gz", "--output", "empty.jsonl"], "empty.jsonl' already exists; name another file"),
        (["rows.jsonl.gz", "--output", "no/a.json"], "no/a.json' does not exist"),
        (["rows.jsonl.gz", "--plot", "a.bmp"], "'a.bmp' is not a plot, which must end in one of .png"),
        (["rows.jsonl.gz", "--plot", "a.png", "--conditions", "original"], "but the conditions have no slot"),
    ],
)
def test_wrong_arguments_are_one_line_before_a_model_is_loaded(capsys, command, monkeypatch, tmp_path, argv, message):
    monkeypatch.setattr(evaluate, "load_generator", lambda args, store: pytest.fail("loaded a model"))
    (tmp_path / "broken.jsonl").write_text('{"question": "who?"}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    asked = {"question": "who?", "answers": [{"text": "Ann", "answer_start": 0}]}
    squad = {"data": [{"title": "t", "paragraphs": [{"context": "Ann did.", "qas": [asked]}]}]}
    (tmp_path / "squad.json").write_text(json.dumps(squad))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert command(*argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.fixture
def old(monkeypatch):
    """A generator over GPT-J, whose attention cannot be replaced."""
    config = GPTJConfig(n_embd=48, n_layer=2, n_head=4, n_positions=512, rotary_dim=8, vocab_size=512)
    model, tokenizer = AutoModelForCausalLM.from_config(config), tiny.tokenizer("byte-bpe")
    backbone = Backbone(model, tokenizer, ModelSettings(max_new_tokens=2), model_id="old")
    made = KVFusionGenerator(TorchModel(backbone), store=None)
    monkeypatch.setattr(evaluate, "load_generator", lambda args, store: made)


def test_unsupported_ape_is_left_out_with_a_note(capsys, command, old, caplog):
    with caplog.at_level(logging.WARNING):
        assert command("rows.jsonl.gz", "--conditions", "original", "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert [system["name"] for system in figures["systems"]] == [n for n in default_systems({}) if n != "ape"]
    assert re.search(r"^ape left out: 'old' \(gptj\) cannot answer in mode 'ape'", figures["notes"][-1])
    assert figures["notes"][-1] in caplog.text


@pytest.mark.parametrize("argv", [["--systems", "fusion,ape"], ["--ape-search", "others.jsonl"]])
def test_unsupported_ape_by_name_raises_before_other_systems_answer(capsys, command, old, monkeypatch, tmp_path, argv):
    write_rows(tmp_path / "others.jsonl", [row([True, *[False] * 4], "other")])
    answered = []
    answer_batch = KVFusionGenerator.answer_batch
    monkeypatch.setattr(
        KVFusionGenerator, "answer_batch", lambda *a, mode, **k: answered.append(answer_batch(*a, mode=mode, **k))
    )
    assert command("rows.jsonl.gz", *argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and "error: 'old' (gptj) cannot answer in mode 'ape'" in err and not answered


def test_adapter_is_compared_with_its_base(capsys, command, monkeypatch, generator):
    adapters = []
    monkeypatch.setattr(evaluate, "load_generator", lambda args, store: adapters.append(args.adapter) or generator)
    assert command("rows.jsonl.gz", "--adapter", "lora", "--conditions", "original", "--json") == 0
    found = [system["name"] for system in json.loads(capsys.readouterr().out)["systems"]]
    assert found == default_systems({"adapter": "lora"}) and "fusion-base" in found
    assert adapters == ["lora", None]


@pytest.mark.parametrize("given", ["shipped", "none"])
def test_adapter_in_a_models_folder_is_used_by_default(capsys, command, monkeypatch, generator, tmp_path, given):
    adapters = []
    monkeypatch.setattr(evaluate, "load_generator", lambda args, store: adapters.append(args.adapter) or generator)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    options = [] if given == "shipped" else ["--adapter", "none"]
    assert command("rows.jsonl.gz", "--model", tmp_path, *options, "--conditions", "original", "--json") == 0
    assert adapters == ([str(tmp_path / "adapter"), None] if given == "shipped" else [None])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two base models with different weights, a tuned decoder of the first, and an adapter for each."""
    place = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "decoder", "wide")):
        tiny.save(place / name, seed=seed)
        (place / name / "kvfusion.json").write_text('{"passage_length": 90}')
    for seed, (name, base) in enumerate((("adapter", 0), ("sft", 2))):
        torch.manual_seed(seed)
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(tiny.model("llama", seed=base), lora).save_pretrained(place / name)
        (place / name / "kvfusion.json").write_text('{"passage_length": 90}')
    return place


def test_all_systems_in_one_run(folders, monkeypatch, tmp_path):
    """Each system answers like a generator with its weights, mode and settings."""
    monkeypatch.setitem(COMMANDS, "evaluate", evaluate)
    made = rows(3)
    write_rows(tmp_path / "rows.jsonl", made)
    argv = f"evaluate {tmp_path}/rows.jsonl --model {folders}/base --concat-model {folders}/wide --focus 2"
    argv += f" --conditions original --max-new-tokens 6 --predictions {tmp_path}/p.jsonl"
    argv += "".join(f" --{name} {folders / name}" for name in ("adapter", "decoder", "sft"))
    assert main(argv.split()) == 0
    found = {}
    for line in map(json.loads, (tmp_path / "p.jsonl").read_text().splitlines()):
        found.setdefault(line["system"], []).append(tuple(line["token_ids"]))
    assert list(found) == list(SYSTEMS)
    expected = {
        "fusion": ("base", {"adapter": folders / "adapter"}),
        "fusion-full": ("base", {"decoder": folders / "decoder"}),
        "fusion-base": ("base", {}),
        "concat": ("wide", {"mode": "concat"}),
        "concat-reorder": ("wide", {"mode": "concat", "reorder": True}),
        "sft": ("wide", {"mode": "concat", "adapter": folders / "sft", "tuned_concat": True}),
        "sft-reorder": ("wide", {"mode": "concat", "adapter": folders / "sft", "tuned_concat": True, "reorder": True}),
        "pcw": ("base", {"passage_length": None}),
        "global": ("base", {"adapter": folders / "adapter", "positions": "global"}),
        "ape": ("base", {"mode": "ape"}),
        "focus": ("base", {"adapter": folders / "adapter", "focus": 2}),
        "focus-base": ("base", {"focus": 2}),
        "concat-focus": ("wide", {"mode": "concat", "focus": 2}),
    }
    assert list(expected) == list(SYSTEMS)
    for name, (base, options) in expected.items():
        changes = {key: options.pop(key) for key in ("passage_length", "tuned_concat") if key in options}
        focus, reorder = options.pop("focus", None), long_context_order if options.pop("reorder", False) else list
        gen = KVFusionGenerator.from_pretrained(folders / base, **{"mode": "fusion"} | options).with_settings(
            **changes
        )
        documents = [reorder([p.document(str(n)) for n, p in enumerate(one.passages)]) for one in made]
        answers = gen.answer_batch([one.question for one in made], documents, focus=focus, max_new_tokens=6)
        assert found[name] == [answer.token_ids for answer in answers], name
    assert len({str(found[name]) for name in expected}) == len(expected)  # all differ


def test_plot_without_matplotlib_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=re.escape('pip install -c constraints.txt ".[evaluation]"')):
        plots.require_plotting(tmp_path / "a.png")


def test_unusable_rows_are_skipped_on_demand(capsys, command, tmp_path):
    write_rows(tmp_path / "mixed.jsonl", [*rows(3), row([False] * 5, "bare")])
    assert command("mixed.jsonl", "--conditions", "slots") == 2
    assert "row 'bare' has no gold passage" in capsys.readouterr().err
    assert command("mixed.jsonl", "--conditions", "slots", "--skip-rows", "--limit", 3, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["rows"], report["notes"]) == (3, ["1 of 4 rows left out, the first because " + BARE])


def test_notes_are_logged_and_reported(capsys, command, tmp_path, caplog):
    write_rows(tmp_path / "two.jsonl", rows(2, 2))
    with caplog.at_level(logging.WARNING):
        assert command("two.jsonl", "--systems", "fusion") == 0
    assert "top left out: top starts at 5 documents" in caplog.text
    assert "- top left out: top starts at 5 documents" in capsys.readouterr().out


def test_report_contains_no_folders_of_the_machine(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["/opt/kvfusion", "evaluate", "/me/rows.jsonl", "--model=/srv/m", "--plot", "a/b.png"]
    )
    assert report.run_facts()["command"] == "kvfusion evaluate rows.jsonl --model=m --plot a/b.png"
