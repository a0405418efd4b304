"""``kvfusion store``, ``kvfusion index --store`` and ``kvfusion bench store``, with a small random model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from indexes import WordEmbedder

from kvfusion_rag import DiskStore
from kvfusion_rag.cli import main
from kvfusion_rag.cli.arguments.values import byte_count
from kvfusion_rag.store import namespace_key


@pytest.fixture(scope="module", autouse=True)
def word_embedder():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvfusion_rag.retrieval.SentenceTransformerEmbedder", lambda name, device: WordEmbedder())
        yield


@pytest.fixture(scope="module")
def indexed(tmp_path_factory, model_folder) -> Path:
    """A folder with four documents, their index and their store."""
    folder = tmp_path_factory.mktemp("indexed")
    (folder / "docs").mkdir()
    for number in range(4):
        (folder / f"docs/{number}.txt").write_text(f"The office number {number} stands on a hill in Lima.")
    assert main(["index", *places(folder), "--model", str(model_folder), "--json"]) == 0
    return folder


@pytest.fixture
def folder(tmp_path, indexed) -> Path:
    """A copy of ``indexed`` that a test may change."""
    return Path(shutil.copytree(indexed, tmp_path / "copy"))


@pytest.fixture
def run(capsys, model_folder):
    """Run a command. Return its exit code, and its JSON or else its output."""

    def command(*argv: object):
        needs_model = argv[0] in ("index", "ask") or argv[1] in ("forget", "estimate")
        code = main([str(part) for part in (*argv, *(["--model", model_folder] if needs_model else []))])
        output = capsys.readouterr()
        return code, json.loads(output.out) if output.out.startswith("{") else output.out + output.err

    return command


def places(folder: Path, store: object = None) -> list[str]:
    """Arguments that name the documents, the index and the store (default: the one in ``folder``)."""
    return [str(part) for part in (folder / "docs", "--index", folder / "ix", "--store", store or folder / "s")]


def files_of(store: Path) -> list[Path]:
    return sorted(store.glob("v*/*/*/*.safetensors"))


def damage(store: Path) -> None:
    file = files_of(store)[0]
    file.write_bytes(file.read_bytes()[:-1] + b"x")


def test_index_computes_only_what_is_not_stored(run, folder):
    (folder / "docs/new.txt").write_text("Rice is eaten everywhere.")
    code, found = run("index", *places(folder), "--json")
    assert code == 0 and found["store"] == {"computed": 1, "stored already": 4}
    assert run("store", "verify", folder / "s", "--json")[1]["whole"] == 5 + 1  # the prefix too


def test_stats_and_clear_by_namespace(run, folder):
    run("index", *places(folder), "--namespace", "tenant")
    _, found = run("store", "stats", folder / "s", "--json")
    disk = found["tiers"]["disk"]
    assert disk["documents"] == 2 * (4 + 1) and set(disk["namespaces"]) == {namespace_key(""), namespace_key("tenant")}
    assert disk["bytes"] == sum(file.stat().st_size for file in files_of(folder / "s"))
    assert "disk: 10 documents" in run("store", "stats", folder / "s")[1]
    assert run("store", "clear", folder / "s", "--namespace", "tenant", "--json")[1]["removed"] == 4 + 1
    assert run("store", "clear", folder / "s", "--namespace", "nobody", "--json")[1]["removed"] == 0
    assert "5 removed" in run("store", "clear", folder / "s", "--all")[1]
    assert DiskStore(folder / "s").totals() == {}


def test_forget_removes_the_documents_of_files(run, folder):
    run("index", *places(folder), "--dtype", "bfloat16")
    assert run("store", "forget", folder / "s", folder / "docs/1.txt", "--json")[1]["removed"] == 2
    _, found = run("index", *places(folder), "--json")
    assert found["store"] == {"computed": 1, "stored already": 3}


def test_verify_reports_a_damaged_file_by_its_exit_code(run, folder):
    damage(folder / "s")
    code, found = run("store", "verify", folder / "s", "--json")
    assert code == 1 and (found["whole"], found["broken"]) == (4, 1)
    assert run("store", "verify", folder / "s", "--json")[0] == 0


def test_verify_checks_files_behind_a_url(run, folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    url = (folder / "shared").as_uri()
    run("index", *places(folder, url))
    damage(folder / "shared")
    code, found = run("store", "verify", url, "--json")
    assert code == 1 and found["remote"] == {"whole": 5, "broken": 1} and (found["whole"], found["broken"]) == (6, 0)
    code, output = run("store", "verify", url)
    assert code == 0 and "disk: 6 whole" in output and "remote: 5 whole, 0 broken" in output


def test_questions_find_documents_in_the_codec_of_the_index(run, folder):
    code, _ = run("index", *places(folder), "--store-codec", "v8", "--store-max-bytes", "1GiB")
    assert code == 0 and len(list((folder / "s").glob("v*-v8/*/*/*.safetensors"))) == 4 + 1
    shutil.rmtree(next((folder / "s").glob("v*-raw")))
    asking = ("ask", "Where is office 2?", "--docs", *places(folder), "--json", "--mode", "fusion")
    for options, origin in (((), "computed"), (("--store-codec", "v8"), "disk")):
        code, found = run(*asking, "--max-new-tokens", 2, *options)
        assert code == 0 and {source["origin"] for source in found["sources"]} == {origin}


def test_byte_count_reads_sizes():
    sizes = {"1000": 1000, "2GiB": 2 << 30, "500MB": 500_000_000, "1.5 kb": 1500, "7b": 7, "1TiB": 1 << 40}
    assert {text: byte_count(text) for text in sizes} == sizes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--store-max-bytes", "much"], "'much' is not a size from 1 byte such as 2GiB"),
        (["--store-max-bytes", "0GB"], "'0GB' is not a size"),
        (["--store-max-bytes", "5"], "max_bytes of the disk store is 5, but one document"),
        (["--store-codec", "zip"], "invalid choice: 'zip'"),
        (["--store", ""], "argument --store: '' is blank"),
        (["--namespace", "../x"], "namespace is '../x'"),
        (["--store", __file__], "is a file"),
    ],
)
def test_wrong_options_of_the_store_are_one_error(run, folder, options, message):
    code, output = run("index", *places(folder), "--json", *options)
    assert code == 2 and message in output and output.count("\n") == 1


def test_estimate_is_the_size_of_the_files(run, folder):
    _, found = run("store", "estimate", folder / "docs", "--dtype", "float32", "--json")
    sizes = [file.stat().st_size for file in files_of(folder / "s")]
    assert found["documents"] == 4 and found["bytes"]["v8"] < found["bytes"]["raw"] < sum(sizes)  # with the prefix
    assert sum(sizes) - found["bytes"]["raw"] <= max(sizes)


@pytest.mark.parametrize("action", ["stats", "verify", "clear", "forget"])
def test_missing_store_is_an_error_and_is_not_created(run, folder, action):
    code, output = run("store", action, folder / "nowhere", *([folder / "docs"] if action == "forget" else []))
    assert code == 2 and "there is no document store" in output and output.count("\n") == 1
    assert not (folder / "nowhere").exists()


def test_bench_store_measures_every_tier(run, tmp_path):
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


def test_missing_names_the_documents_that_the_store_has_lost(run, folder):
    store = folder / "s"
    code, report = run("store", "missing", store, "--json")
    (collection,) = report["collections"]
    assert code == 0 and collection["documents"] == 4 and collection["missing"] == []
    assert collection["collection"].endswith("ix")
    (docs := folder / "docs" / "0.txt").unlink()
    assert run("index", *places(folder))[0] == 0 and not docs.exists()
    assert run("store", "missing", store, "--json")[1]["collections"][0]["documents"] == 4  # of the original folder
    assert {len(found["missing"]) for found in run("store", "missing", store, "--json")[1]["collections"]} == {0}
    for file in files_of(store):
        file.unlink()
    code, output = run("store", "missing", store)
    assert code == 1 and "4 documents, 4 missing" in output and "3 documents, 3 missing" in output


def test_missing_without_a_collection_is_an_error(run, folder):
    code, output = run("store", "missing", folder / "s", "--collection", "other")
    assert code == 2 and "lists no collection 'other' in namespace ''" in output
    assert run("index", folder / "docs", "--collection", "x")[0] == 2


def test_index_fails_if_the_store_cannot_keep_all_documents(run, folder):
    size = max(file.stat().st_size for file in files_of(folder / "s"))
    code, output = run("index", *places(folder, folder / "small"), "--store-max-bytes", str(2 * size))
    assert code == 2 and "the store does not have" in output and "a cap is too small" in output
