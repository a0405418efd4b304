"""Calibrating support: the fit, its threshold and figures, and ``kvfusion calibrate`` with a small model."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from readers import row, rows

from kvfusion_rag import KVFusionGenerator, SupportCalibration
from kvfusion_rag.cli import COMMANDS, calibrate, main
from kvfusion_rag.data.rows import write_rows
from kvfusion_rag.errors import InvalidInputError
from kvfusion_rag.evaluation.bootstrap import Bootstrap
from kvfusion_rag.evaluation.support import (
    FITTED,
    Measured,
    fit_calibration,
    halves,
    measure_rows,
    report_of,
    require_calibration_rows,
    support_of,
    threshold_keeping,
)
from kvfusion_rag.text.settings import ModelSettings
from kvfusion_rag.text.support import OF_SEVERAL, SIGNALS

CALIBRATION = SupportCalibration({"explained": 1.0, "coverage": 0.0}, 0.0, 0.5)


def pair(gain, gain_without, *, right=True, coverage=0.5):
    signals = ({"gain": value, "explained": value, "coverage": coverage} for value in (gain, gain_without))
    return Measured("q", True, right, next(signals)), Measured("q", False, False, next(signals))


def drawn(count, seed=0):
    """Return pairs whose gains are normal around 1 and -1, and whose coverage says nothing."""
    rng = random.Random(seed)
    return [pair(rng.gauss(1, 1), rng.gauss(-1, 1), coverage=rng.random()) for _ in range(count)]


# Fit


def test_the_fit_finds_the_probability_that_the_signals_were_drawn_from():
    calibration = fit_calibration(drawn(4000), 0.95)
    assert calibration.weights["explained"] == pytest.approx(2, abs=0.15)  # of two normals at +1 and -1
    assert calibration.weights["coverage"] == pytest.approx(0, abs=0.15)
    assert calibration.bias == pytest.approx(0, abs=0.15)


def test_the_fit_is_a_minimum():
    found, measured = fit_calibration(drawn(60), 0.9), drawn(60)

    def loss(gain, bias):
        changed = SupportCalibration({**found.weights, "explained": gain}, bias, 0.5)
        known = [one for pair in measured for one in pair]
        return -sum(np.log(abs(support_of(changed, one) - (not one.answerable))) for one in known)

    gain, bias = found.weights["explained"], found.bias
    others = [(1.3 * gain, bias), (0.6 * gain, bias), (gain, bias + 0.3), (gain, bias - 0.3)]
    assert loss(gain, bias) < min(loss(*other) for other in others)


def test_a_constant_signal_gets_no_weight_and_separable_questions_a_finite_one():
    found = fit_calibration([pair(5.0, -5.0), pair(4.0, -6.0)], 1.0)
    assert found.weights["coverage"] == pytest.approx(0) and 0 < found.weights["explained"] < 10


def test_questions_without_a_signal_have_a_calibration_of_their_own():
    rng = random.Random(1)
    pairs = [
        tuple(
            Measured("q", answerable, False, {name: rng.gauss(2 * answerable, 1) for name in SIGNALS})
            for answerable in (True, False)
        )
        for _ in range(80)
    ]
    found = fit_calibration(pairs, 0.9)
    assert [set(one.weights) for one in (found, found.without, found.without.without)] == list(map(set, FITTED))
    assert found.without.without.without is None
    report = report_of(found, pairs, 0.9, Bootstrap())
    assert [one.signals for one in report.fallbacks] == list(FITTED[1:])
    other = report_of(found.without, pairs, 0.9, Bootstrap())
    assert report.fallbacks[0].auc == other.auc > report.fallbacks[1].auc == other.fallbacks[0].auc > 0.9
    assert report.fallbacks[0].refused == other.refused
    assert list(report.auc_of) == list(SIGNALS)
    lacking = [tuple(replace(one, signals=without(one.signals, "focus_lead")) for one in pair) for pair in pairs]
    assert fit_calibration(lacking, 0.9) == found.without
    alone = [tuple(replace(one, signals=without(one.signals, *OF_SEVERAL)) for one in pair) for pair in pairs]
    assert fit_calibration(alone, 0.9) == found.without.without
    for (with_gold, _), (same, _) in zip(lacking, pairs, strict=True):
        assert support_of(found, with_gold) == support_of(found.without, same)


def without(signals, *names):
    return {name: value for name, value in signals.items() if name not in names}


def test_questions_of_one_kind_cannot_be_fitted():
    silent = [(pair(1, 0)[0], Measured("q", False, False, None))] * 4
    with pytest.raises(InvalidInputError, match="all questions with an answer are of one kind"):
        fit_calibration(silent, 0.95)


@given(supports=st.lists(st.floats(0, 1), min_size=1, max_size=40), share=st.floats(0, 1))
def test_the_threshold_keeps_at_least_the_share_and_is_the_highest(supports, share):
    threshold = threshold_keeping(supports, share)
    assert sum(value >= threshold for value in supports) >= share * len(supports) - 1e-6
    above = [value for value in supports if value > threshold]
    assert len(above) < max(1, share * len(supports) - 1e-9)


def test_halves_are_disjoint_complete_and_drawn_by_the_seed():
    measured = drawn(9)
    first, second = halves(measured, 3)
    assert sorted(map(id, [*first, *second])) == sorted(map(id, measured)) and len(first) == 4
    assert halves(measured, 3) == (first, second) != halves(measured, 4)


# Figures


def test_figures_count_kept_and_refused_questions():
    measured = [pair(3, -3), pair(2, -2, right=False), pair(1, 1.5), pair(-1, -4)]
    report = report_of(CALIBRATION, measured, 0.75, Bootstrap())
    assert (report.questions, report.kept.mean, report.refused.mean) == (4, 75, 75)
    assert report.refused_at_share.mean == 75  # at the support of a gain of 1
    assert report.auc == report.auc_of["gain"] == 14 / 16 and report.auc_of["coverage"] == 0.5
    at_75 = next(point for point in report.curve if point.kept == 0.75)
    assert (at_75.refused, at_75.answered) == (0.75, 0.5)
    assert (at_75.accuracy, at_75.accuracy_answerable) == (2 / 4, 2 / 3)
    kept = [point.kept for point in report.curve]
    refused = [point.refused for point in report.curve]
    assert kept == sorted(kept, reverse=True) and refused == sorted(refused)
    assert json.loads(json.dumps(report.to_dict()))["calibration"]["threshold"] == 0.5


def test_empty_answers_count_as_refused():
    measured = [(one, Measured("q", False, False, None)) for one, _ in drawn(5)]
    report = report_of(CALIBRATION, measured, 1.0, Bootstrap())
    assert report.refused.mean == 100 and report.auc == 1


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ([], "there are 0 rows"),
        ([row([False, False])] * 4, "0 gold passages and 2 others"),
        ([row([True])] * 4, "1 gold passages and 0 others"),
        ([row([True, False], answers=())] * 4, "has 0 answers"),
        ([row([True, True, False])] * 4, "2 gold passages and 1 others"),
    ],
)
def test_rows_that_cannot_calibrate_are_rejected(bad, reason):
    with pytest.raises(InvalidInputError, match=reason):
        require_calibration_rows(bad, 2)


# With a model


def test_rows_are_measured_with_and_without_their_gold_passage(generator):
    found = list(measure_rows(generator, rows(3), 4, batch_size=2))
    assert [(one.answerable, other.answerable) for one, other in found] == [(True, False)] * 3
    assert not any(other.right for _, other in found)
    [passages] = [[p.document(str(n + 1)) for n, p in enumerate(rows(1)[0].passages[:4])]]
    [(_, signals)] = generator.support_signals([rows(1)[0].question], [passages[1:]], mode="fusion")
    assert found[0][1].signals == signals


@pytest.fixture
def command(monkeypatch, tmp_path, generator):
    monkeypatch.setitem(COMMANDS, "calibrate", calibrate)
    monkeypatch.setattr(calibrate, "load_generator", lambda args: generator)
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl.gz", rows(8))
    return lambda *argv: main(["calibrate", *map(str, argv)])


def test_command_writes_figures_plot_and_settings_that_load(capsys, command, tmp_path):
    pytest.importorskip("matplotlib")
    files = ["--output", "a.json", "--plot", "a.png", "--settings", "kvfusion.json"]
    assert command("rows.jsonl.gz", "--documents", 4, "--seed", 2, "--share", 0.75, *files) == 0
    out = capsys.readouterr().out
    data = json.loads((tmp_path / "a.json").read_text())
    assert (data["rows"], data["questions"], data["settings"]["share"]) == (8, 4, 0.75)
    assert {"date", "command", "commit", "versions", "hardware"} == data["run"].keys()
    assert f"threshold {data['calibration']['threshold']:.3f}, which kept 75% of the questions" in out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    settings = json.loads((tmp_path / "kvfusion.json").read_text())
    assert ModelSettings(**settings).support == SupportCalibration(**data["calibration"])
    folder = tiny.save(tmp_path / "model", settings=ModelSettings(**settings))
    answer = KVFusionGenerator.from_pretrained(folder, min_support="auto").answer("who?", ["lima"], max_new_tokens=2)
    assert answer.found is not None
    assert command("rows.jsonl.gz", "--documents", 4, *files) == 2
    assert "already exists" in capsys.readouterr().err


def test_command_prints_json(capsys, command):
    assert command("rows.jsonl.gz", "--documents", 3, "--limit", 6, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["rows"] == 6 and len(data["curve"]) == 51


def test_command_rejects_rows_that_are_named_twice(capsys, command):
    assert command("rows.jsonl.gz", "rows.jsonl.gz") == 2
    assert "named twice" in capsys.readouterr().err
