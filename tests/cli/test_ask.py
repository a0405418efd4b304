"""``kvfusion ask``: its options, its output, and complete runs with a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from commands import run
from hypothesis import given
from hypothesis import strategies as st
from indexes import LIGHTHOUSE, WordEmbedder, load_minilm

from kvfusion_rag import InvalidInputError, InvarianceReport
from kvfusion_rag.cli import ask
from kvfusion_rag.cli.console import printable
from kvfusion_rag.cli.output.answers import MAX_SENTENCE_CHARACTERS, sentence_around
from kvfusion_rag.retrieval.files.kinds import KNOWN_TYPES


def test_ask_passes_all_options_on(capsys, generator, docs):
    argv = ["--mode", "concat", "--max-new-tokens", 7, "--temperature", 0.5, "--seed", 3, "--stop", "x", "--stop", "y"]
    assert run(capsys, "ask", "Where is the office?", "--docs", docs, *argv)[0] == 0
    (call,) = generator.calls
    assert (call.method, call.question) == ("answer", "Where is the office?")
    decoding = {"max_new_tokens": 7, "temperature": 0.5, "seed": 3, "stop": ["x", "y"]}
    assert call.options == {"mode": "concat", "focus": "auto", **decoding}
    assert call.ids == ["peru.md#1", "rice.txt#1"]


def test_ask_prints_answer_sources_and_timings(capsys, generator, docs):
    code, out, err = run(capsys, "ask", "Where is the office?", "--docs", docs, "--shuffle-check", 3)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "In Lima",
        "  in the model's words: in lima",
        "",
        "sources (* contains the answer)",
        f"  * Peru ({docs / 'peru.md'}, line 3)",
        "      The office is »In Lima«.",
        f"    rice ({docs / 'rice.txt'}, line 1)",
        "",
        "mode fusion · 2 documents (20 tokens, 0 from the store) · prefill 0.10 s, first token 0.20 s, total 0.30 s",
        "shuffle check: 3 other orders of the documents, identical answers, identical logits",
        "",
        "not searched",
        f"  ! {docs / 'data.bin'}: unknown file type '.bin'; known types: {KNOWN_TYPES}",
    ]
    assert generator.checked == ("Where is the office?", 2, 3, None, "auto")


def test_ask_names_what_it_did_not_search(capsys, generator, docs):
    (docs / "map.md").write_text("The map is blue. ![m](data:image/png;base64," + "iVBORw0KGgo" * 100 + ")")
    (docs / "empty.txt").touch()
    argv = ["ask", "Where is the office?", "--docs", docs]
    out = run(capsys, *argv)[1]
    assert out.splitlines()[-4:] == [
        "not searched",
        f"  ! {docs / 'data.bin'}: unknown file type '.bin'; known types: {KNOWN_TYPES}",
        f"  ! {docs / 'empty.txt'}: empty",
        f"  ! {docs / 'map.md'}: without embedded base64 data (1,122 characters)",
    ]
    update = json.loads(run(capsys, *argv, "--json")[1])["update"]
    assert [Path(one["path"]).name for one in update["skipped"]] == ["data.bin", "empty.txt"]
    assert [Path(one["path"]).name for one in update["left_out"]] == ["map.md"]


def test_shuffle_check_reports_a_difference(capsys, generator, docs):
    generator.report = InvarianceReport("concat", 1, ("in lima", "in\x1b[31m rome"), 0.25)
    out = run(capsys, "ask", "Where is the office?", "--docs", docs, "--shuffle-check", 1)[1]
    assert out.splitlines()[-6:-3] == [
        "shuffle check: 1 other order of the documents, different answers, different logits (by up to 0.25)",
        "  - in lima",
        "  - in\ufffd[31m rome",
    ]


def test_attribution_lists_the_largest_effect_first(capsys, generator, docs):
    out = run(capsys, "ask", "Where is the office?", "--docs", docs, "--attribute")[1]
    assert out.splitlines()[-6:-3] == [
        "attribution (the answer's log-probability is -1.00)",
        "   +16.00   50.0% of attention  Peru",
        "    +4.00   50.0% of attention  rice",
    ]
    data = json.loads(run(capsys, "ask", "Where is the office?", "--docs", docs, "--attribute", "--json")[1])
    assert [document["effect"] for document in data["attribution"]["documents"]] == [16.0, 4.0]
    plain = json.loads(run(capsys, "ask", "Where is the office?", "--docs", docs, "--json")[1])
    assert plain["attribution"] is None


@pytest.mark.parametrize(("given", "focus"), [((), "auto"), (("auto",), "auto"), (("none",), None), (("2",), 2)])
def test_ask_passes_focus_and_retriever_scores_on(capsys, generator, docs, given, focus):
    options = [
        "--docs",
        docs,
        "--show-prompt",
        "--shuffle-check",
        1,
        "--attribute",
        *(["--focus", *given] * bool(given)),
    ]
    assert run(capsys, "ask", "Where is the office?", *options)[0] == 0
    assert {call.method: call.options["focus"] for call in generator.calls} == {
        "show_prompt": focus,
        "answer": focus,
        "attribute": focus,
    }
    assert generator.checked[-1] == focus
    run(capsys, "ask", "Where is the office?", *options, "--stream")
    assert {call.options["focus"] for call in generator.calls if call.method == "stream"} == {focus}
    for document in generator.calls[0].documents:
        assert document.score == pytest.approx(1 - document.metadata["distance"])


def calibrated_model(folder: Path) -> Path:
    """Save a model that says "in lima", with a calibration of support."""
    settings = tiny.save_speaker(folder, "in lima") / "kvfusion.json"
    support = {"weights": {"gain": 0.4, "coverage": 2.0}, "bias": -1.0, "threshold": 0.0}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"support": support}))
    return folder


def test_ask_says_that_an_answer_was_probably_not_found(capsys, monkeypatch, docs, tmp_path):
    monkeypatch.setattr("kvfusion_rag.retrieval.SentenceTransformerEmbedder", lambda name, device: WordEmbedder())
    argv = ["ask", "Where is the office?", "--docs", docs, "--model", calibrated_model(tmp_path / "model")]
    for more in ((), ("--stream",)):
        code, out, _ = run(capsys, *argv, "--min-support", 1, *more)
        notice = next(line for line in out.splitlines() if "not found" in line)
        assert code == 0 and notice.startswith("  not found: The documents probably do not contain the answer")
        assert out.splitlines().index(notice) < out.splitlines().index("sources (* contains the answer)")
    found = json.loads(run(capsys, *argv, "--min-support", "auto", "--json")[1])
    assert (found["found"], found["notice"]) == (True, None) and 0 < found["support"] < 1
    assert "not found" not in run(capsys, *argv)[1]


def test_ask_rejects_min_support_of_a_model_without_calibration(capsys, docs, tmp_path):
    model = tiny.save_speaker(tmp_path / "model", "in lima")
    code, _, err = run(capsys, "ask", "Where?", "--docs", docs, "--model", model, "--min-support", 0.5)
    assert code == 2 and "min_support is 0.5, but the model has no calibration of support; measure one" in err


def test_ask_marks_documents_that_focus_dropped(capsys, monkeypatch, docs):
    model = tiny.generator(store=None)
    monkeypatch.setattr(ask, "load_generator", lambda args: model)
    monkeypatch.setattr("kvfusion_rag.retrieval.SentenceTransformerEmbedder", lambda name, device: WordEmbedder())
    argv = ["ask", "Where is the office?", "--docs", docs, "--focus", 1, "--max-new-tokens", 4]
    code, out, _ = run(capsys, *argv, "--attribute", "--shuffle-check", 2)
    assert code == 0
    result = json.loads(run(capsys, *argv, "--attribute", "--json", "--show-prompt")[1])
    kept, dropped = sorted(result["sources"], key=lambda source: not source["used"])
    assert (kept["used"], dropped["used"]) == (True, False)
    assert kept["focus_score"] > dropped["focus_score"]
    lines = [line for line in out.splitlines() if ", line" in line]
    for source in (kept, dropped):
        (line,) = (line for line in lines if source["metadata"]["source"] in line)
        assert f"{source['focus_score']:8.2f}  {source['title']} (" in line
        assert line.endswith(", dropped)") == (not source["used"])
    assert ", with focus scores\n" in out
    assert "mode fusion · 1 of 2 documents (" in out
    assert [document["id"] for document in result["attribution"]["documents"]] == [kept["id"]]
    named = out[out.index("attribution (") :].splitlines()[1:]
    assert [line.split("of attention  ")[1] for line in named if "of attention" in line] == [kept["title"]]
    assert kept["metadata"]["source"] and "shuffle check: 2 other orders" in out


def test_ask_streams_piece_by_piece(capsys, generator, docs, monkeypatch):
    flushed = []
    monkeypatch.setattr("kvfusion_rag.cli.output.answers.say", lambda text="", end="\n": flushed.append(text + end))
    code, *_ = run(capsys, "ask", "Where is the office?", "--docs", docs, "--stream")
    assert code == 0
    assert flushed[:3] == ["in", " lima", "\n"]
    assert "".join(flushed[3:]).startswith("  in the source's spelling: In Lima\n\nsources")


def test_answer_without_citations(capsys, generator, docs):
    generator.pieces = ("in rome",)
    out = run(capsys, "ask", "Where is the office?", "--docs", docs)[1]
    assert out.startswith("in rome\n\nsources (none has the answer)\n    Peru")
    generator.pieces = ("",)
    assert run(capsys, "ask", "Where is the office?", "--docs", docs)[1].startswith("(no answer)\n")


def test_control_characters_do_not_reach_the_terminal(capsys, generator, docs):
    (docs / "peru.md").write_text("# Pe\x1b]0;owned\x07ru\n\nIt is \x1b[2Jin lima, \u202eok.")
    code, out, _ = run(capsys, "ask", "Where is the office?", "--docs", docs)
    assert code == 0
    assert not set(out) & {"\x1b", "\x07", "\u202e"}


@given(st.text())
def test_printable_text_has_no_control_characters(text):
    shown = printable(text)
    assert len(shown) == len(text)
    assert all(c in "\n\t" or (c.isprintable() or c.isspace() or ord(c) > 159) for c in shown)
    shown.encode()


@given(st.lists(st.sampled_from(["Dr. ", "ab ", "x", "! ", "\n", "\n\n", "é"]), min_size=1, max_size=300), st.data())
def test_sentence_contains_its_citation(pieces, data):
    text = "".join(pieces)
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    first, last = sentence_around(text, start, end)
    assert 0 <= first <= start <= end <= last <= len(text)
    assert last - first <= MAX_SENTENCE_CHARACTERS + end - start


def test_json_contains_the_whole_answer(capsys, generator, docs):
    code, out, err = run(capsys, "ask", "Where is the office?", "--docs", docs, "--json", "--shuffle-check", 3)
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["question"] == "Where is the office?"
    assert (result["answer"], result["text"], result["mode"]) == ("In Lima", "in lima", "fusion")
    assert [(s["id"], s["cited"]) for s in result["sources"]] == [("peru.md#1", True), ("rice.txt#1", False)]
    assert result["sources"][0]["metadata"]["source"] == str(docs / "peru.md")
    (citation,) = result["citations"]
    assert citation["sentence"] == "The office is In Lima."
    meta = result["sources"][0]["metadata"]
    chunk = (docs / "peru.md").read_text()[meta["start"] : meta["end"]]
    assert chunk[citation["start"] : citation["end"]] == citation["text"] == "In Lima"
    assert result["usage"]["document_tokens"] == 20
    assert result["shuffle_check"]["identical"] is True
    assert result["model"]["model_id"] == "fake/model"
    assert result["index"] is None
    assert [Path(s["path"]).name for s in result["update"]["skipped"]] == ["data.bin"]


def test_ask_updates_and_uses_the_index_next_to_the_documents(capsys, generator, docs):
    assert run(capsys, "ask", "Where?", "--docs", docs, "--index", docs / ".kvfusion")[0] == 0
    (docs / "rice.txt").write_text("Rice and beans.")
    result = json.loads(run(capsys, "ask", "Where?", "--docs", docs, "--json")[1])
    assert result["index"] == str(docs / ".kvfusion")
    assert (result["update"]["changed"], result["update"]["unchanged"]) == (["rice.txt"], ["peru.md"])
    assert "Rice and beans." in generator.calls[-1].texts
    result = json.loads(run(capsys, "ask", "Where?", "--docs", docs / "peru.md", "--json")[1])
    assert (result["index"], [s["id"] for s in result["sources"]]) == (str(docs / ".kvfusion"), ["peru.md#1"])


def test_ask_searches_the_named_documents_or_the_whole_index(capsys, generator, docs, tmp_path):
    index = tmp_path / "index"
    run(capsys, "ask", "Where?", "--docs", docs, "--index", index)
    run(capsys, "ask", "Where?", "--docs", docs / "rice.txt", "--index", index)
    run(capsys, "ask", "Where?", "--index", index)
    assert [sorted(call.ids) for call in generator.calls] == [
        ["docs/peru.md#1", "docs/rice.txt#1"],
        ["docs/rice.txt#1"],
        ["docs/peru.md#1", "docs/rice.txt#1"],
    ]


# Complete runs with a model

KEEPER = "Who was the last keeper of the Harrow Point Lighthouse?"


@pytest.fixture
def real(monkeypatch) -> None:
    """Use a model that answers "thomas grant", and the real embedding model."""
    generator = tiny.speaker("thomas grant", mode="fusion")
    monkeypatch.setattr(ask, "load_generator", lambda args: generator)
    monkeypatch.setattr("kvfusion_rag.retrieval.SentenceTransformerEmbedder", lambda name, device: load_minilm())


def test_order_of_documents_does_not_change_the_answer(capsys, real):
    code, out, _ = run(capsys, "ask", KEEPER, "--docs", LIGHTHOUSE, "--json", "--shuffle-check", 4)
    assert code == 0
    result = json.loads(out)
    assert result["answer"] == "Thomas Grant"
    assert result["shuffle_check"] == {
        "mode": "fusion",
        "permutations": 4,
        "identical": True,
        "answers": ["thomas grant"],
        "max_logit_difference": 0.0,
    }
    assert result["citations"][0]["sentence"] == (
        "The last keeper, Thomas Grant, moved to the mainland in the same year."
    )


def test_stream_with_a_model(capsys, real):
    code, out, _ = run(capsys, "ask", KEEPER, "--docs", LIGHTHOUSE, "--stream", "--top-k", 1)
    assert code == 0
    assert out.startswith("thomas grant\n  in the source's spelling: Thomas Grant\n")
    assert "mode fusion · 1 document (" in out


@pytest.mark.parametrize("stream", [(), ("--stream",)])
def test_reasoning_is_shown_only_on_request_and_counted(capsys, generator, docs, stream):
    generator.thoughts = ("the hill", " it is")
    asked = ["ask", "Where is the office?", "--docs", docs, *stream]
    hidden, shown = (run(capsys, *asked, *options)[1] for options in ((), ("--show-reasoning",)))
    assert "hill it" not in hidden and shown == f"the hill it is\n\n{hidden}"
    assert " · 2 tokens of reasoning · prefill" in hidden
    assert json.loads(run(capsys, *asked[:4], "--json")[1])["reasoning"] == "the hill it is"


def test_the_budget_of_reasoning_becomes_the_models_own(monkeypatch, capsys, docs):
    given: list[object] = []

    def load(*args: object, **options: object) -> object:
        given.append(options["max_reasoning_tokens"])
        raise InvalidInputError("stop here.")

    monkeypatch.setattr("kvfusion_rag.KVFusionGenerator.from_pretrained", load)
    for options in ((), ("--max-reasoning-tokens", 0), ("--max-reasoning-tokens", 9)):
        assert run(capsys, "ask", "Where?", "--docs", docs, *options)[0] != 0
    assert given == [None, 0, 9]
