"""Questions that are answered in batches, in this process, by the function and by ``kvfusion answer``."""

from __future__ import annotations

import gzip
import json
from importlib.util import find_spec

import pytest
from commands import run
from indexes import WordEmbedder, open_index

from kvfusion_rag import KVFusionGenerator
from kvfusion_rag.cluster import GeneratorSpec, answer_questions, read_questions

DOCUMENTS = ["The mill was built by thomas grant.", {"text": "Rice is eaten everywhere.", "title": "Rice", "id": "r"}]
BAD = {
    "not json": "{question",
    "not an object": "[1]",
    "no question": '{"documents": []}',
    "blank question": '{"question": " ", "documents": []}',
    "no documents": '{"question": "who?"}',
    "documents are a text": '{"question": "who?", "documents": "mill"}',
    "document without text": '{"question": "who?", "documents": [{"title": "mill"}]}',
    "document id is a number": '{"question": "who?", "documents": [{"text": "mill", "id": 1}]}',
    "metadata is a list": '{"question": "who?", "documents": [{"text": "mill", "metadata": []}]}',
    "too long": json.dumps({"question": "who? " * 9000, "documents": []}),
}


def line(number: int) -> str:
    return json.dumps({"id": f"q{number}", "question": f"who built mill {number}?", "documents": DOCUMENTS})


@pytest.fixture
def spec(speaker_folder) -> GeneratorSpec:
    return GeneratorSpec(str(speaker_folder))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join([line(0), BAD["not json"], line(2)]))
    return path


def test_answers_are_those_of_the_generator(spec):
    rows = [json.loads(line(number)) for number in range(20)]
    found = list(answer_questions(rows, spec))
    generator = KVFusionGenerator.from_pretrained(spec.model)
    assert [row["id"] for row in found] == [f"q{number}" for number in range(20)]
    expected = generator.answer(rows[7]["question"], [DOCUMENTS[0]])
    assert found[7]["answer"] == found[7]["text"] == expected.text == "thomas grant"
    assert found[7]["sources"][1] == {"id": "r", "title": "Rice", "used": True, "place": None}
    assert found[7]["error"] is None
    assert found[7]["citations"][0]["document_id"] == "1"


def test_sources_and_citations_name_the_places_of_documents(spec):
    text = "The mill is old.\nThomas Grant built it."
    places = ["lines 7-8", "page 3", "", 5, None, "x" * 201, "\ud800"]
    documents = [{"text": text, "id": str(n), "metadata": {"place": place}} for n, place in enumerate(places)]
    (row,) = answer_questions([{"question": "who?", "documents": [*documents, {"text": text}]}], spec)
    assert [source["place"] for source in row["sources"]] == ["lines 7-8", "page 3", *[None] * 4, "?", None]
    assert [citation["place"] for citation in row["citations"]][:2] == ["line 8", "page 3"]
    json.dumps(row, ensure_ascii=False).encode()


def test_retrieved_documents_keep_their_places(spec, tmp_path):
    (tmp_path / "notes.txt").write_text("The mill is old.\nThomas Grant built it.")
    with open_index() as index:
        index.update(tmp_path)
        (row,) = answer_questions([{"question": "who?"}], spec, retrieve=index.search)
    assert row["sources"][0]["place"] == "lines 1-2" and row["citations"][0]["place"] == "line 2"


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_bad_row_is_an_error_row_and_the_others_are_answered(spec, tmp_path, bad):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join([line(0), bad, "", line(2)]))
    first, wrong, last = answer_questions(read_questions(path), spec)
    assert first["answer"] == last["answer"] == "thomas grant" and (first["id"], last["id"]) == ("q0", "q2")
    assert wrong["id"] == "2" and wrong["error"] and wrong["answer"] is None
    assert first.keys() == wrong.keys() == last.keys()


def test_options_reach_the_answers(spec):
    [row] = answer_questions([json.loads(line(0))], spec, answer_options={"max_new_tokens": 1, "mode": "concat"})
    assert (row["completion_tokens"], row["finish_reason"], row["mode"]) == (1, "length", "concat")


def test_command_prints_json_lines_in_order(capsys, spec, file):
    code, out, err = run(capsys, "answer", file, "--model", spec.model)
    rows = [json.loads(text) for text in out.splitlines()]
    assert code == 1 and not err and [row["id"] for row in rows] == ["q0", "2", "q2"]
    assert rows == list(answer_questions(read_questions(file), spec))


@pytest.mark.parametrize("name", ["answers.jsonl", "answers.jsonl.gz"])
def test_command_writes_a_file_of_json_lines(capsys, spec, file, tmp_path, name):
    code, out, _ = run(capsys, "answer", file, "--model", spec.model, "--output", tmp_path / name, "--json")
    assert code == 1 and json.loads(out)["questions"] == 3 and list(json.loads(out)["failed"]) == ["2"]
    opened = (gzip.open if name.endswith("gz") else open)(tmp_path / name, "rt")
    with opened as lines:
        assert [json.loads(text)["answer"] for text in lines] == ["thomas grant", None, "thomas grant"]


def test_parquet_file_has_the_same_rows(capsys, spec, file, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("kvfusion_rag.cluster.writing.ROWS_PER_GROUP", 2)
    assert run(capsys, "answer", file, "--model", spec.model, "--output", tmp_path / "a.parquet")[0] == 1
    assert parquet.read_table(tmp_path / "a.parquet").to_pylist() == list(answer_questions(read_questions(file), spec))


def test_documents_are_retrieved_for_questions_without_them(capsys, spec, tmp_path, monkeypatch):
    monkeypatch.setattr("kvfusion_rag.retrieval.SentenceTransformerEmbedder", lambda name, device: WordEmbedder())
    (tmp_path / "docs").mkdir()
    for name in ("mill", "rice"):
        (tmp_path / f"docs/{name}.txt").write_text(f"The {name} belongs to thomas grant.")
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "whose rice is it?"}\n' + line(1))
    docs = ("--docs", tmp_path / "docs", "--top-k", "1", "--model", spec.model)
    code, out, _ = run(capsys, "answer", path, *docs)
    assert code == 0
    retrieved, listed = (json.loads(text) for text in out.splitlines())
    assert [source["id"].split("#")[0].endswith("rice.txt") for source in retrieved["sources"]] == [True]
    assert [source["id"] for source in listed["sources"]] == ["1", "r"]


def test_wrong_options_are_rejected_before_the_model_is_loaded(capsys, file, tmp_path):
    for options, reason in [
        (["--workers", 2], "--workers is given without --ray"),
        (["--worker-gpus", 1], "--worker-gpus is given without --ray"),
        (["--output", file], "is the file of the questions"),
        (["--index", tmp_path / "none"], "does not exist"),
        (["--ray", "nowhere"], "must be auto or HOST:PORT"),
        (["--store-codec", "v8"], "--store-codec is given without --store"),
    ]:
        code, out, err = run(capsys, "answer", file, "--model", "no/such-model", *options)
        assert (code, out) == (2, "") and reason in err and err.count("\n") == 1


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:99999", "[::1]:1"])
def test_cluster_that_cannot_be_reached_is_one_line(capsys, file, address):
    pytest.importorskip("ray.data")
    code, out, err = run(capsys, "answer", file, "--model", "no/such-model", "--ray", address)
    assert (code, out) == (2, "") and f"the cluster '{address}' cannot be used" in err


@pytest.mark.skipif(find_spec("ray") is not None, reason="needs an environment without Ray")
def test_index_on_a_cluster_needs_ray(capsys, tmp_path):
    code, _, err = run(capsys, "index", tmp_path, "--ray", "auto")
    assert code == 2 and "ray, which is not installed" in err
