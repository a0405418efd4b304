"""``kvfusion store``, ``kvfusion index --store`` and ``kvfusion bench store``, with a small random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from indexes import WordEmbedder

from kvfusion_rag import DiskStore
from kvfusion_rag.cli import main
from kvfusion_rag.cli.options import byte_count
from kvfusion_rag.store import namespace_key


@pytest.fixture
def docs(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("kvfusion_rag.retrieval.SentenceTransformerEmbedder", lambda name, device: WordEmbedder())
    folder = tmp_path / "docs"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"The office number {number} stands on a hill in Lima.")
    return folder


@pytest.fixture
def run(capsys, model_folder):
    """Runs a command, with a model if it reads documents; its exit code, and its JSON or what it says on stderr."""

    def command(*argv: object):
        reads = argv[0] in ("index", "ask") or argv[1] in ("forget", "estimate")
        code = main([str(part) for part in (*argv, *(["--model", model_folder] if reads else []))])
        said = capsys.readouterr()
        return code, json.loads(said.out) if said.out.startswith("{") else said.out + said.err

    return command


def index(run, docs, tmp_path, *options):
    return run("index", docs, "--index", tmp_path / "ix", "--store", tmp_path / "s", "--json", *options)


def test_index_fills_a_store_and_goes_on_where_it_was(run, docs, tmp_path):
    code, found = index(run, docs, tmp_path)
    assert code == 0 and found["store"] == {"computed": 4, "stored already": 0}
    (docs / "new.txt").write_text("Rice is eaten everywhere.")
    _, found = index(run, docs, tmp_path)
    assert found["store"] == {"computed": 1, "stored already": 4}
    assert run("store", "verify", tmp_path / "s", "--json")[1]["whole"] == 5 + 1  # the prefix too


def test_questions_find_what_index_has_stored(run, docs, tmp_path):
    index(run, docs, tmp_path)
    code, found = run(
        "ask", "Where is office 2?", "--docs", docs, "--index", tmp_path / "ix", "--store", tmp_path / "s", "--json",
        "--mode", "fusion",
    )  # fmt: skip
    assert code == 0 and {s["origin"] for s in found["sources"]} == {"disk"}


def test_stats_and_clear_by_namespace(run, docs, tmp_path):
    index(run, docs, tmp_path)
    index(run, docs, tmp_path, "--namespace", "tenant")
    _, found = run("store", "stats", tmp_path / "s", "--json")
    disk = found["tiers"]["disk"]
    assert disk["documents"] == 2 * (4 + 1) and set(disk["namespaces"]) == {namespace_key(""), namespace_key("tenant")}
    assert disk["bytes"] == sum(f.stat().st_size for f in (tmp_path / "s").glob("v*/*/*/*.safetensors"))
    assert run("store", "clear", tmp_path / "s", "--namespace", "tenant", "--json")[1]["removed"] == 4 + 1
    assert run("store", "clear", tmp_path / "s", "--namespace", "nobody", "--json")[1]["removed"] == 0
    assert "5 removed" in run("store", "clear", tmp_path / "s", "--all")[1]
    assert DiskStore(tmp_path / "s").totals() == {}


def test_forget_takes_the_documents_of_files(run, docs, tmp_path):
    index(run, docs, tmp_path)
    index(run, docs, tmp_path, "--dtype", "bfloat16")
    assert run("store", "forget", tmp_path / "s", docs / "1.txt", "--json")[1]["removed"] == 2
    _, found = index(run, docs, tmp_path)
    assert found["store"] == {"computed": 1, "stored already": 3}


def test_verify_finds_a_broken_file_and_says_so_by_its_exit_code(run, docs, tmp_path):
    index(run, docs, tmp_path)
    file = next((tmp_path / "s").glob("v*/*/*/*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    code, found = run("store", "verify", tmp_path / "s", "--json")
    assert code == 1 and (found["whole"], found["broken"]) == (4, 1)
    assert run("store", "verify", tmp_path / "s", "--json")[0] == 0


def test_verify_reads_what_is_behind_a_url_too(run, docs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = (tmp_path / "shared").as_uri()
    run("index", docs, "--index", tmp_path / "ix", "--store", url, "--json")
    file = next((tmp_path / "shared").glob("v*/*/*/*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    code, found = run("store", "verify", url, "--json")
    assert code == 1 and found["remote"] == {"whole": 4, "broken": 1} and (found["whole"], found["broken"]) == (5, 0)
    code, said = run("store", "verify", url)
    assert code == 0 and "disk: 5 whole" in said and "remote: 4 whole, 0 broken" in said


def test_options_of_the_store(run, docs, tmp_path):
    code, _ = index(run, docs, tmp_path, "--store-codec", "v8", "--store-max-bytes", "1GiB")
    assert code == 0 and len(list((tmp_path / "s").glob("v2-v8/*/*/*.safetensors"))) == 4 + 1
    asking = ("ask", "Where?", "--docs", docs, "--index", tmp_path / "ix", "--store", tmp_path / "s", "--json")
    asking = (*asking, "--mode", "fusion")
    for options, origin in (((), "computed"), (("--store-codec", "v8"), "disk")):
        assert {source["origin"] for source in run(*asking, *options)[1]["sources"]} == {origin}
    never = run(*asking, "--store-codec", "v8", "--store-load", "never")[1]["sources"]
    assert {(source["origin"], source["miss"]) for source in never} == {("computed", "slower")}


def test_sizes():
    sizes = {"1000": 1000, "2GiB": 2 << 30, "500MB": 500_000_000, "1.5 kb": 1500, "7b": 7, "1TiB": 1 << 40}
    assert {text: byte_count(text) for text in sizes} == sizes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--store-max-bytes", "much"], "'much' is not a size from 1 byte such as 2GiB"),
        (["--store-max-bytes", "0GB"], "'0GB' is not a size"),
        (["--store-max-bytes", "5"], "max_bytes of the disk store is 5, but one document"),
        (["--store-codec", "zip"], "invalid choice: 'zip'"),
        (["--store-load", "perhaps"], "invalid choice: 'perhaps'"),
        (["--store", "", "--store-load", "never"], "--store-load is given without --store"),
    ],
)
def test_wrong_options_of_the_store_are_one_error(run, docs, tmp_path, options, message):
    code, said = index(run, docs, tmp_path, *options)
    assert code == 2 and message in said and said.count("\n") == 1


def test_an_estimate_is_what_the_files_take(run, docs, tmp_path):
    index(run, docs, tmp_path)
    _, found = run("store", "estimate", docs, "--dtype", "float32", "--json")
    stored = sum(file.stat().st_size for file in (tmp_path / "s").glob("v*/*/*/*.safetensors"))
    assert (
        found["documents"] == 4 and found["bytes"]["v8"] < found["bytes"]["raw"] < stored
    )  # files have the prefix too
    largest = max(file.stat().st_size for file in (tmp_path / "s").glob("v*/*/*/*.safetensors"))
    assert stored - found["bytes"]["raw"] <= largest


@pytest.mark.parametrize("action", ["stats", "verify", "clear", "forget"])
def test_a_store_that_is_not_there_is_one_error_and_is_not_made(run, docs, tmp_path, action):
    code, said = run("store", action, tmp_path / "nowhere", *([docs] if action == "forget" else []))
    assert code == 2 and "there is no document store" in said and said.count("\n") == 1
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("options", "message"), [(["--namespace", "../x"], "namespace is '../x'"), (["--store", "{file}"], "is a file")]
)
def test_wrong_places_and_names_are_one_error(run, docs, tmp_path, options, message):
    (tmp_path / "file").write_text("mine")
    options = [option.format(file=tmp_path / "file") for option in options]
    code, said = index(run, docs, tmp_path, *options)
    assert code == 2 and message in said and said.count("\n") == 1


def test_bench_store_measures_all_ways(run, tmp_path):
    code, found = run("bench", "store", "--shape", "tiny", "--documents", "3", "--document-tokens", "32", "--repeats",
                      "1", "--output", tmp_path / "out.json", "--json")  # fmt: skip
    assert code == 0 and json.loads((tmp_path / "out.json").read_text()) == found
    times = found["seconds_to_first_token"]
    assert set(times) == {"joined prompt", "cold", "disk", "cold disk", "memory"}
    assert all(0 < time["least"] <= time["median"] <= time["most"] for time in times.values())
    assert found["times_faster_than_joined_prompt"]["joined prompt"] == 1.0
    tokens = 3 * 32
    assert found["bytes_per_1000_tokens"] == round(1000 * found["bytes"] / tokens)
    assert run("bench", "store", "--shape", "huge")[0] == 2
