"""The search for APE's temperature and scale: what is tried and chosen, and that it is chosen on other rows."""

import json
import re

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from readers import row, rows

from kvfusion_rag.cli import evaluate
from kvfusion_rag.data.rows import QARow, write_rows
from kvfusion_rag.errors import InvalidInputError
from kvfusion_rag.evaluation import ape
from kvfusion_rag.evaluation.ape import ApeSearch, Trial, require_search_rows, search_ape
from kvfusion_rag.evaluation.orders import ORIGINAL, plan_conditions
from kvfusion_rag.evaluation.runner import predict
from kvfusion_rag.evaluation.systems import GeneratorSystem

factors = st.sampled_from([1.0, 0.9, 0.8])


@given(st.lists(st.tuples(factors, factors, st.integers(0, 3)), min_size=1, max_size=9))
def test_best_trial_is_chosen_and_of_equal_ones_the_smallest_change(found):
    search = ApeSearch(3, tuple(Trial(t, s, float(em)) for t, s, em in found))
    chosen = search.chosen
    assert chosen in search.trials
    for trial in search.trials:
        assert trial.exact_match <= chosen.exact_match
        if trial.exact_match == chosen.exact_match:
            assert trial.change >= chosen.change
    assert search.settings == {"ape_temperature": chosen.temperature, "ape_scale": chosen.scale}


def answers_of(made, gen, **settings):
    system = GeneratorSystem("x", gen.with_settings(**settings), "ape")
    found = predict(made, [system], plan_conditions(made, ["original"]))["x", ORIGINAL]
    return [prediction.text for prediction in found]


def test_search_finds_the_pair_with_right_answers(generator, monkeypatch):
    """Random models answer gibberish, so the answers of one pair become the accepted ones."""
    monkeypatch.setattr(ape, "TEMPERATURES", (1.0, 0.6))
    monkeypatch.setattr(ape, "SCALES", (1.0, 0.8))
    asked = [row([True, *[False] * 4], f"s{n}") for n in range(8)]
    truth = answers_of(asked, generator, ape_temperature=0.6, ape_scale=0.8)
    asked = [QARow(r.id, r.question, (text,), r.passages) for r, text in zip(asked, truth, strict=True)]
    search = search_ape(asked, generator, documents=5, batch_size=3)
    pairs = [(trial.temperature, trial.scale) for trial in search.trials]
    assert pairs == [(1.0, 1.0), (1.0, 0.8), (0.6, 1.0), (0.6, 0.8)]
    assert search.settings == {"ape_temperature": 0.6, "ape_scale": 0.8}
    assert search.chosen.exact_match == 100 > min(trial.exact_match for trial in search.trials)
    plain = answers_of(asked, generator, ape_temperature=1.0, ape_scale=1.0)
    right = 100 * sum(a == b for a, b in zip(plain, truth, strict=True)) / 8
    assert search.note == (
        "ape: temperature 0.6 and scale 0.8, the best of 4 pairs on 8 other questions "
        f"(exact match 100.0; {right:.1f} with both at 1)."
    )
    assert json.loads(json.dumps(search.to_dict()))["trials"][0]["temperature"] == 1.0


def test_questions_that_do_not_fit_are_wrong_for_all_pairs():
    small = tiny.generator("llama", max_new_tokens=2)
    asked = [QARow("q", "who built it? " * 400, ("",), row([True, False]).passages)]
    search = search_ape(asked, small)
    assert {trial.exact_match for trial in search.trials} == {0.0}
    assert search.settings == {"ape_temperature": 1.0, "ape_scale": 1.0}


def test_rows_must_not_be_evaluated():
    require_search_rows([row([True, False], "a")], rows(2, 2), 2)
    for wrong, message in (
        ([*rows(1, 2), row([True, False], "a")], "1 of the 2 questions to search temperature and scale on are also"),
        ([row([True, False], "a")], "documents is 3, but"),
        ([], "no rows"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            require_search_rows(wrong, rows(2, 2), 3 if "documents is" in message else 2)


def test_command_reports_grid_and_choice(capsys, command, tmp_path):
    write_rows(tmp_path / "others.jsonl", [row([True, *[False] * 4], f"other{n}") for n in range(3)])
    argv = ["rows.jsonl.gz", "--systems", "ape,fusion", "--conditions", "original", "--ape-search", "others.jsonl"]
    assert command(*argv, "--output", "a.json") == 0
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "a.json").read_text())
    search = report["ape_search"]
    assert (search["file"], search["rows"], len(search["trials"])) == ("others.jsonl", 3, 16)
    assert search["file_sha256"] != report["settings"]["file_sha256"]
    ape = report["systems"][0]
    assert (ape["temperature"], ape["scale"]) == (search["temperature"], search["scale"])
    note = f"ape: temperature {search['temperature']:g} and scale {search['scale']:g}, the best of 16 pairs on 3"
    assert f"- {note}" in out and report["notes"][-1].startswith(note)
    assert command(*argv[:5], "--json") == 0
    assert "ape_search" not in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--ape-search", "rows.jsonl.gz"],
            "--ape-search is rows.jsonl.gz, but it must name rows that are not evaluated",
        ),
        (["--ape-search", "copy.jsonl"], "6 of the 6 questions to search temperature and scale on are also evaluated"),
        (["--ape-search", "none.jsonl"], "argument --ape-search: 'none.jsonl' does not exist"),
        (["--ape-search", "copy.jsonl", "--systems", "fusion"], "'ape' is not one of the systems"),
        (["--ape-search", "short.jsonl"], "documents is 5, but row 'short' has 2 passages"),
        (["--ape-search", "short.jsonl", "--output", "short.jsonl", "--force"], "short.jsonl' is also an input"),
        (["--ape-search", "short.jsonl", "--skip-rows"], "1 of 1 rows left out"),
    ],
)
def test_wrong_arguments_are_one_line_before_a_model_is_loaded(capsys, command, monkeypatch, tmp_path, argv, message):
    monkeypatch.setattr(evaluate, "load_generator", lambda args, store: pytest.fail("loaded a model"))
    write_rows(tmp_path / "copy.jsonl", rows())
    write_rows(tmp_path / "short.jsonl", [row([True, False], "short")])
    assert command("rows.jsonl.gz", *argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and re.search(re.escape(message), err)
