"""The command line: what it prints where, how it fails, and the whole path from a question to its source."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from fakes import RecordingGenerator
from hypothesis import given
from hypothesis import strategies as st

from kvfusion_rag import Check, GateReport, InvarianceReport, UnsupportedModelError, __version__
from kvfusion_rag.cli import ask, doctor, main
from kvfusion_rag.cli.answers import MAX_SENTENCE_CHARACTERS, sentence_around
from kvfusion_rag.cli.console import collection_paused, printable
from kvfusion_rag.retrieval import SkippedFile
from tests.retrieval.test_retrieval import LIGHTHOUSE, WordEmbedder, load_minilm, reasons

ROOT = Path(__file__).parent.parent.parent


class CommandGenerator(RecordingGenerator):
    """The fake generator with what only the commands ask for."""

    store = None
    settings = SimpleNamespace(passage_length=40)
    gate = GateReport("fake/model", (Check("full attention", True, "2 layers"),))
    report = InvarianceReport("fusion", 3, ("in lima",), 0.0)

    def default_focus(self):
        return None

    def default_mode(self):
        return "concat", "set for this model"

    def check_invariance(self, question, documents, *, permutations, mode, focus):
        self.checked = (question, len(documents), permutations, mode, focus)
        return self.report


@pytest.fixture
def generator(monkeypatch) -> CommandGenerator:
    """Commands that load a model get this one, and vectors come from hashed words."""
    fake = CommandGenerator()
    monkeypatch.setattr(ask, "load_generator", lambda args: fake)
    monkeypatch.setattr(doctor, "load_generator", lambda args: fake)
    monkeypatch.setattr("kvfusion_rag.retrieval.SentenceTransformerEmbedder", lambda name, device: WordEmbedder())
    return fake


@pytest.fixture
def docs(tmp_path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "peru.md").write_text("# Peru\n\nThe office stands on a hill. The office is In Lima. It is old.")
    (folder / "rice.txt").write_text("Rice is eaten everywhere.")
    (folder / "data.bin").write_text("x")
    return folder


def run(capsys, *argv: object) -> tuple[int, str, str]:
    code = main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    return code, out, err


# Failing


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "COMMAND"),
        (["sing"], "invalid choice: 'sing'"),
        (["ask"], "QUESTION"),
        (["ask", "Who?"], "name documents with --docs"),
        (["ask", " ", "--docs", "."], "the question is blank"),
        (["ask", "Who?", "--docs", "/no/such/path"], "'/no/such/path' does not exist"),
        (["ask", "Who?", "--index", "/no/such/path"], "'/no/such/path' does not exist"),
        (["ask", "Who?", "--docs", ".", "--top-k", "0"], "'0' is not a whole number from 1"),
        (["ask", "Who?", "--docs", ".", "--mode", "mix"], "invalid choice: 'mix'"),
        (["ask", "Who?", "--docs", ".", "--focus", "0"], "'0' is not a number of documents from 1, auto or none"),
        (["ask", "Who?", "--docs", ".", "--focus", "all"], "'all' is not a number of documents from 1, auto or none"),
        (["ask", "Who?", "--docs", ".", "--json", "--stream"], "exclude each other"),
        (["ask", "Who?", "--docs", ".", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["index"], "PATH"),
        (["index", "/no/such/path"], "does not exist"),
        (["doctor", "/no/such/path"], "to load a model from"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(capsys, monkeypatch, argv, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("kvfusion: error: ")
    assert message in err
    assert err.count("\n") == 1 and err.endswith("\n")


def test_errors_of_the_library_are_one_line_too(capsys, generator, docs):
    for argv in (
        ["ask", "Who?", "--docs", docs / "data.bin"],
        ["ask", "Who?", "--docs", docs, "--temperature", "-1"],
        ["ask", "Who?", "--docs", docs, "--index", docs],
        ["ask", "Who?", "--docs", docs, "--chunk-tokens", "1"],
    ):
        code, out, err = run(capsys, *argv)
        assert (code, out, err.count("\n")) == (2, "", 1), err


def test_other_errors_are_not_hidden(generator, docs):
    generator.error = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        main(["ask", "Who?", "--docs", str(docs)])


def test_help_and_version(capsys):
    assert run(capsys, "--version") == (0, f"kvfusion {__version__}\n", "")
    for argv in (["--help"], ["ask", "--help"], ["index", "--help"], ["doctor", "--help"]):
        code, out, err = run(capsys, *argv)
        assert (code, err) == (0, "")
        assert out.startswith("usage: kvfusion")


def test_nothing_is_left_behind(capsys, generator, docs):
    own = logging.getLogger("kvfusion_rag")
    before = (dict(os.environ), list(own.handlers), logging.getLogger("transformers").level)
    handler = signal.getsignal(signal.SIGINT)
    run(capsys, "ask", "Who?", "--docs", docs)
    assert (dict(os.environ), list(own.handlers), logging.getLogger("transformers").level) == before
    assert signal.getsignal(signal.SIGINT) is handler
    assert not (docs / ".kvfusion").exists()


def test_ctrl_c_is_quiet(capsys, generator, docs, monkeypatch):
    monkeypatch.setattr(ask, "load_generator", lambda args: signal.raise_signal(signal.SIGINT))
    assert run(capsys, "ask", "Who?", "--docs", docs) == (130, "", "")


def test_ctrl_c_that_an_import_turned_into_another_error_is_quiet(capsys, generator, docs, monkeypatch):
    def load(args):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as stopped:
            raise ModuleNotFoundError("Could not import module 'PreTrainedModel'") from stopped

    monkeypatch.setattr(ask, "load_generator", load)
    assert run(capsys, "ask", "Who?", "--docs", docs) == (130, "", "")


# ask


def test_ask_passes_everything_on(capsys, generator, docs):
    argv = ["--mode", "concat", "--max-new-tokens", 7, "--temperature", 0.5, "--seed", 3, "--stop", "x", "--stop", "y"]
    assert run(capsys, "ask", "Where is the office?", "--docs", docs, *argv)[0] == 0
    (call,) = generator.calls
    assert (call.method, call.question) == ("answer", "Where is the office?")
    decoding = {"max_new_tokens": 7, "temperature": 0.5, "seed": 3, "stop": ["x", "y"]}
    assert call.options == {"mode": "concat", "focus": "auto", **decoding}
    assert call.ids == ["peru.md#1", "rice.txt#1"]


def test_ask_prints_the_answer_its_source_and_the_facts(capsys, generator, docs):
    code, out, err = run(capsys, "ask", "Where is the office?", "--docs", docs, "--shuffle-check", 3)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "In Lima",
        "  in the model's own words: in lima",
        "",
        "sources (* holds the answer)",
        f"  * Peru ({docs / 'peru.md'}, part 1)",
        "      The office is »In Lima«.",
        f"    rice ({docs / 'rice.txt'}, part 1)",
        "",
        "mode fusion · 2 documents (20 tokens, 0 from the store) · prefill 0.10 s, first token 0.20 s, total 0.30 s",
        "shuffle check: 3 other orders of the documents, identical answer bytes, identical logits",
    ]
    assert generator.checked == ("Where is the office?", 2, 3, None, "auto")


def test_a_shuffle_check_that_found_a_difference_says_so(capsys, generator, docs):
    generator.report = InvarianceReport("concat", 1, ("in lima", "in\x1b[31m rome"), 0.25)
    out = run(capsys, "ask", "Where is the office?", "--docs", docs, "--shuffle-check", 1)[1]
    assert out.splitlines()[-3:] == [
        "shuffle check: 1 other order of the documents, different answer bytes, different logits (by up to 0.25)",
        "  - in lima",
        "  - in\ufffd[31m rome",
    ]


def test_attribution_names_what_matters_most_first(capsys, generator, docs):
    out = run(capsys, "ask", "Where is the office?", "--docs", docs, "--attribute")[1]
    assert out.splitlines()[-3:] == [
        "attribution (the answer's log-probability is -1.00)",
        "   +16.00   50.0% of attention  Peru",
        "    +4.00   50.0% of attention  rice",
    ]
    data = json.loads(run(capsys, "ask", "Where is the office?", "--docs", docs, "--attribute", "--json")[1])
    assert [document["effect"] for document in data["attribution"]["documents"]] == [16.0, 4.0]
    plain = json.loads(run(capsys, "ask", "Where is the office?", "--docs", docs, "--json")[1])
    assert plain["attribution"] is None


@pytest.mark.parametrize(("given", "focus"), [((), "auto"), (("auto",), "auto"), (("none",), None), (("2",), 2)])
def test_ask_passes_focus_and_scores_on(capsys, generator, docs, given, focus):
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


def test_ask_tells_what_focus_left_out(capsys, monkeypatch, docs):
    model = tiny.generator(store=None)
    monkeypatch.setattr(ask, "load_generator", lambda args: model)
    monkeypatch.setattr("kvfusion_rag.retrieval.SentenceTransformerEmbedder", lambda name, device: WordEmbedder())
    argv = ["ask", "Where is the office?", "--docs", docs, "--focus", 1, "--max-new-tokens", 4]
    code, out, _ = run(capsys, *argv, "--attribute", "--shuffle-check", 2)
    assert code == 0
    result = json.loads(run(capsys, *argv, "--attribute", "--json", "--show-prompt")[1])
    kept, left_out = sorted(result["sources"], key=lambda source: not source["used"])
    assert (kept["used"], left_out["used"]) == (True, False)
    assert kept["focus_score"] > left_out["focus_score"]
    lines = [line for line in out.splitlines() if ", part 1" in line]
    for source in (kept, left_out):
        (line,) = (line for line in lines if source["metadata"]["source"] in line)
        assert f"{source['focus_score']:8.2f}  {source['title']} (" in line
        assert line.endswith(", left out)") == (not source["used"])
    assert ", each with its focus score\n" in out
    assert "mode fusion · 1 of 2 documents (" in out
    assert [document["id"] for document in result["attribution"]["documents"]] == [kept["id"]]
    named = out[out.index("attribution (") :].splitlines()[1:]
    assert [line.split("of attention  ")[1] for line in named if "of attention" in line] == [kept["title"]]
    assert kept["metadata"]["source"] and "shuffle check: 2 other orders" in out


def test_ask_streams_piece_by_piece(capsys, generator, docs, monkeypatch):
    flushed = []
    monkeypatch.setattr(ask, "say", lambda text="", end="\n": flushed.append(text + end))
    code, out, _ = run(capsys, "ask", "Where is the office?", "--docs", docs, "--stream")
    assert code == 0
    assert flushed == ["in", " lima", "\n"]
    assert out.startswith("  as the source spells it: In Lima\n\nsources")


def test_an_answer_that_stands_nowhere(capsys, generator, docs):
    generator.pieces = ("in rome",)
    out = run(capsys, "ask", "Where is the office?", "--docs", docs)[1]
    assert out.startswith("in rome\n\nsources (none holds the answer word for word)\n    Peru")
    generator.pieces = ("",)
    assert run(capsys, "ask", "Where is the office?", "--docs", docs)[1].startswith("(no answer)\n")


def test_documents_cannot_reach_the_terminal(capsys, generator, docs):
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
def test_the_sentence_holds_its_citation(pieces, data):
    text = "".join(pieces)
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    first, last = sentence_around(text, start, end)
    assert 0 <= first <= start <= end <= last <= len(text)
    assert last - first <= MAX_SENTENCE_CHARACTERS + end - start


def test_json_is_the_whole_answer(capsys, generator, docs):
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


def test_ask_uses_the_index_beside_the_documents_and_keeps_it_fresh(capsys, generator, docs):
    assert run(capsys, "ask", "Where?", "--docs", docs, "--index", docs / ".kvfusion")[0] == 0
    (docs / "rice.txt").write_text("Rice and beans.")
    result = json.loads(run(capsys, "ask", "Where?", "--docs", docs, "--json")[1])
    assert result["index"] == str(docs / ".kvfusion")
    assert (result["update"]["changed"], result["update"]["unchanged"]) == (["rice.txt"], ["peru.md"])
    assert "Rice and beans." in generator.calls[-1].texts
    result = json.loads(run(capsys, "ask", "Where?", "--docs", docs / "peru.md", "--json")[1])
    assert (result["index"], [s["id"] for s in result["sources"]]) == (str(docs / ".kvfusion"), ["peru.md#1"])


def test_ask_reads_only_the_named_documents_of_an_index_or_all_of_it(capsys, generator, docs, tmp_path):
    index = tmp_path / "index"
    run(capsys, "ask", "Where?", "--docs", docs, "--index", index)
    run(capsys, "ask", "Where?", "--docs", docs / "rice.txt", "--index", index)
    run(capsys, "ask", "Where?", "--index", index)
    assert [sorted(call.ids) for call in generator.calls] == [
        ["docs/peru.md#1", "docs/rice.txt#1"],
        ["docs/rice.txt#1"],
        ["docs/peru.md#1", "docs/rice.txt#1"],
    ]


# index


def test_index_reports_what_it_did(capsys, generator, docs, model_folder):
    code, out, err = run(capsys, "index", docs, "--model", model_folder)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"{docs / '.kvfusion'}: 2 chunks of up to 200 tokens",
        "2 added, 0 changed, 0 removed, 0 unchanged, 1 skipped",
        "  + peru.md",
        "  + rice.txt",
        f"  ! {docs / 'data.bin'}: unknown kind '.bin'; known: .txt, .text, .md, .markdown, .html, .htm, .xhtml, .pdf",
    ]
    (docs / "rice.txt").unlink()
    result = json.loads(run(capsys, "index", docs, "--json", "--model", model_folder)[1])
    assert (result["index"], result["chunk_tokens"], result["chunks"]) == (str(docs / ".kvfusion"), 200, 1)
    assert (result["removed"], result["unchanged"]) == (["rice.txt"], ["peru.md"])
    assert reasons([SkippedFile(**one) for one in result["skipped"]]).keys() == {"data.bin"}


def test_a_long_report_is_cut(capsys, generator, docs, model_folder):
    for n in range(30):
        (docs / f"{n:02}.txt").write_text(f"text {n}")
    out = run(capsys, "index", docs, "--chunk-tokens", 30, "--model", model_folder)[1]
    assert out.count("\n  + ") == 21
    assert "  + ... and 12 more (--json lists all)" in out


# doctor


def test_doctor_prints_every_check(capsys, generator):
    code, out, err = run(capsys, "doctor")
    assert (code, err) == (0, "")
    assert out.splitlines()[:2] == ["fake/model", "  pass  full attention: 2 layers"]
    assert json.loads(run(capsys, "doctor", "--json")[1]) == {
        "model": "fake/model",
        "passed": True,
        "checks": [{"name": "full attention", "passed": True, "detail": "2 layers"}],
        "error": None,
        "mode": "concat",
        "mode_reason": "set for this model",
        "focus": None,
        "measured": None,
    }


def test_doctor_refuses_with_the_cause(capsys, monkeypatch):
    def refuse(args):
        raise UnsupportedModelError("'x' has sliding-window attention,\nwhich cannot be fused.")

    monkeypatch.setattr(doctor, "load_generator", refuse)
    line = "kvfusion: error: 'x' has sliding-window attention, which cannot be fused.\n"
    assert run(capsys, "doctor", "x") == (1, "", line)
    code, out, err = run(capsys, "doctor", "x", "--json")
    assert (code, err) == (1, line)
    assert json.loads(out)["passed"] is False


# The whole path, with a model

KEEPER = "Who was the last keeper of the Harrow Point Lighthouse?"


@pytest.fixture
def real(monkeypatch) -> None:
    """A model that answers "thomas grant", and the real embedding model, loaded once for all tests."""
    generator = tiny.speaker("thomas grant", mode="fusion")
    monkeypatch.setattr(ask, "load_generator", lambda args: generator)
    monkeypatch.setattr("kvfusion_rag.retrieval.SentenceTransformerEmbedder", lambda name, device: load_minilm())


def test_order_of_documents_does_not_matter(capsys, real):
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


def test_the_real_stream(capsys, real):
    code, out, _ = run(capsys, "ask", KEEPER, "--docs", LIGHTHOUSE, "--stream", "--top-k", 1)
    assert code == 0
    assert out.startswith("thomas grant\n  as the source spells it: Thomas Grant\n")
    assert "mode fusion · 1 document (" in out


def shell(*argv: object, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvfusion_rag.cli", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False, **options)


def test_a_process_prints_nothing_but_its_answer(capsys, tmp_path, speaker_folder):
    shutil.copytree(LIGHTHOUSE, tmp_path / "docs", ignore=shutil.ignore_patterns(".kvfusion"))
    code, out, err = run(capsys, "index", tmp_path / "docs", "--json", "--model", speaker_folder)
    assert (code, err, len(json.loads(out)["added"])) == (0, "", 11)
    docs = ("--docs", tmp_path / "docs")
    asked = shell("ask", KEEPER, *docs, "--json", "--model", speaker_folder, env=os.environ | {"LC_ALL": "C"})
    assert (asked.returncode, asked.stderr) == (0, "")
    result = json.loads(asked.stdout)
    assert result["answer"] == "Thomas Grant"
    assert len(result["update"]["unchanged"]) == 11  # both commands cut and embed alike
    checked = shell("doctor", speaker_folder)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert checked.stdout.count("  pass  ") >= 4


def test_a_reader_that_leaves_is_no_error():
    read_end, write_end = os.pipe()
    os.close(read_end)
    code = "from kvfusion_rag.cli import console, doctor, main; doctor.run = lambda args: console.say('x' * 99); "
    command = [sys.executable, "-c", code + "raise SystemExit(main(['doctor']))"]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, cwd=ROOT, timeout=60, check=False)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, b"")


# The garbage collector


@pytest.mark.parametrize("fails", [False, True])
def test_the_garbage_collector_is_as_before_when_a_command_ends(monkeypatch, fails):
    seen = []

    @collection_paused()
    def load(args):
        seen.append(gc.isenabled())
        if fails:
            raise UnsupportedModelError("no such model")

    def run(args):
        load(args)
        seen.append((gc.isenabled(), gc.get_freeze_count() > 0))
        return 0

    monkeypatch.setattr(doctor, "run", run)
    assert main(["doctor", "a/model"]) == (2 if fails else 0)
    assert seen == ([False] if fails else [False, (True, True)])
    assert gc.isenabled() and gc.get_freeze_count() == 0
