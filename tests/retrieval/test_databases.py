"""Indexes in vector databases: a shared index behaves as one in memory does, whatever happens to its writers."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from indexes import WordEmbedder, open_index
from vector_databases import MemoryDatabase, chroma_server

from kvfusion_rag import InvalidInputError, MissingDependencyError, RetrievalError
from kvfusion_rag.retrieval import DocumentIndex
from kvfusion_rag.retrieval.databases import DatabaseCollection, IndexUrl, is_index_url


@pytest.fixture(scope="module")
def chroma(tmp_path_factory) -> Iterator[str]:
    pytest.importorskip("chromadb")
    with chroma_server(tmp_path_factory.mktemp("chroma")) as address:
        yield f"chroma://{address}"


@pytest.fixture
def lance(tmp_path) -> str:
    pytest.importorskip("lancedb")
    return f"lance+file://{tmp_path}/lance"


@pytest.fixture
def lance_s3(monkeypatch) -> Iterator[str]:
    pytest.importorskip("lancedb")
    boto3 = pytest.importorskip("boto3")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1").create_bucket(Bucket=bucket)
    yield f"lance+s3://{bucket}/index"
    server.stop()


@pytest.fixture(params=["chroma", "lance", "lance_s3"])
def url(request) -> str:
    address = request.getfixturevalue(request.param)
    return f"{address}/n{uuid.uuid4().hex[:12]}" if request.param == "chroma" else address


def found(index: DocumentIndex, question: str = "lamp keeper", top_k: int = 100) -> list[tuple]:
    """Return everything about the found documents. Databases compute distances with other roundings."""
    documents = index.search(question, top_k)
    return sorted(
        (d.id, d.title, d.text, round(d.score or 0.0, 3), d.metadata["source"], d.metadata["start"]) for d in documents
    )


def change(docs: Path, step: int) -> None:
    """Change the files: copies, shared texts, edits and removals."""
    match step:
        case 1:
            shutil.copy(docs / "lamps.txt", docs / "a-copy.txt")
            (docs / "keepers.md").write_text("# Keepers\n\nOnly one keeper is left here.")
        case 2:
            (docs / "lamps.txt").unlink()
            (docs / "sea" / "seals.txt").write_text("Martha is a blue whale. Seals are grey.")
        case 3:
            (docs / "a-copy.txt").unlink()


# The databases


def test_shared_index_gives_what_an_index_in_memory_gives(docs, url):
    for step in range(4):
        change(docs, step)
        with open_index() as memory, open_index(url) as shared:
            expected, report = memory.update(docs), shared.update(docs)
            assert (report.files, report.chunks) == (expected.files, expected.chunks)
            assert found(shared) == found(memory)
            assert sorted(shared.documents(), key=str) == sorted(memory.documents(), key=str)
            assert found(shared, "whale", 2) == found(memory, "whale", 2)
            (first, *_) = shared.search("whale", 3, files=["sea/whales.txt"])
            assert first.metadata["file"] == "sea/whales.txt"
            wide = shared.search("whale", report.chunks, files=["keepers.md"])
            assert {document.metadata["file"] for document in wide} == {"keepers.md"}


def test_another_process_searches_and_updates_the_same_index(docs, url):
    with open_index(url) as first:
        first.update(docs)
        expected = found(first)
        embedder = WordEmbedder()
        with open_index(url, embedder) as second:
            assert found(second) == expected
            assert embedder.texts == []
            report = second.update(docs)
            assert len(report.unchanged) == 3 and embedder.texts == []


def test_index_with_other_settings_is_named(docs, url):
    with open_index(url) as index:
        index.update(docs)
    with open_index(url, chunk_tokens=20) as other, pytest.raises(RetrievalError, match="only: 12 tokens"):
        other.search("lamp")


def test_empty_index_is_empty(url):
    with open_index(url) as index, pytest.raises(RetrievalError, match="is empty; index some files first"):
        index.search("lamp")


@pytest.mark.parametrize("kind", ["chroma", "lance"])
def test_place_that_cannot_be_used_is_our_error(kind, tmp_path):
    pytest.importorskip({"chroma": "chromadb", "lance": "lancedb"}[kind])
    (tmp_path / "file").write_text("")
    url = {"chroma": "chroma://127.0.0.1:9", "lance": f"lance+file://{tmp_path}/file/index"}[kind]
    (tmp_path / "a.txt").write_text("a lamp")
    with pytest.raises(RetrievalError, match="cannot be used"), open_index(url) as index:
        index.update(tmp_path / "a.txt")


def test_missing_client_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "chromadb", None)
    with pytest.raises(MissingDependencyError, match=r"\[chroma\]"):
        open_index("chroma://localhost")
    monkeypatch.setitem(__import__("sys").modules, "lancedb", None)
    with pytest.raises(MissingDependencyError, match=r"\[lance\]"):
        open_index("lance+s3://bucket/index")


# URLs


@pytest.mark.parametrize(
    ("text", "address", "name"),
    [
        ("chroma://db", "http://db:8000", "kvfusion"),
        ("chroma://db:9000/notes", "http://db:9000", "notes"),
        ("chroma+https://db.example.org/notes/", "https://db.example.org:443", "notes"),
        ("chroma://[::1]:8000", "http://[::1]:8000", "kvfusion"),
        ("lance+s3://bucket/a/b", "s3://bucket/a/b", "kvfusion"),
        ("lance+file:///mnt/index", "file:///mnt/index", "kvfusion"),
    ],
)
def test_urls_are_read(text, address, name):
    assert is_index_url(text)
    url = IndexUrl.parse(text)
    assert (url.address, url.name) == (address, name)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("chroma://", "no host"),
        ("chroma://db:port", "port"),
        ("chroma://db:99999", "Port out of range"),
        ("chroma://db/a/b", "not a name"),
        ("chroma://db/../x", "not a name"),
        ("chroma://db?x=1", "query"),
        ("chroma://me:secret@db", "KVFUSION_INDEX_TOKEN"),
        ("lance+s3://key:secret@bucket/x", "AWS_ACCESS_KEY_ID"),
        ("lance+s3://bucket", "no folder"),
        ("chroma+http2://db", "scheme"),
    ],
)
def test_invalid_urls_are_refused_by_their_cause(text, cause):
    with pytest.raises(InvalidInputError, match=cause) as caught:
        IndexUrl.parse(text)
    assert "secret" not in str(caught.value)


# Laws, over a database in memory


@pytest.fixture
def memory(monkeypatch) -> MemoryDatabase:
    """The database behind ``chroma://`` URLs."""
    database = MemoryDatabase()
    return shared_database(monkeypatch, database)


def shared_database(monkeypatch, database: MemoryDatabase) -> MemoryDatabase:
    monkeypatch.setattr(
        "kvfusion_rag.retrieval.index.open_collection",
        lambda url, name, settings: DatabaseCollection(database, f"kvfusion-{name}", settings),
    )
    return database


URL = "chroma://tests"


def contents(database: MemoryDatabase) -> dict:
    """Return all records. Vectors of a text may differ in their last bits."""
    return {
        key: {id: (one.payload, None if one.vector is None else one.vector.tobytes()) for id, one in table.items()}
        for key, table in database.tables.items()
        if table
    }


def test_interrupted_update_is_completed_by_the_next(docs, monkeypatch):
    fail_at, failed = 0, True
    while failed:
        fresh = shared_database(monkeypatch, MemoryDatabase())
        with open_index(URL) as index:
            index.update(docs)
        database = shared_database(monkeypatch, MemoryDatabase())
        folder = docs.with_name(f"docs-{fail_at}")
        shutil.copytree(docs, folder)
        failed = False
        for step in range(4):
            change(folder, step)
            database.fail_at, database.calls = fail_at, 0
            with open_index(URL) as index:
                try:
                    index.update(folder)
                except ConnectionError:
                    failed = True
                    database.fail_at = None
                    if fail_at % 2:  # the same process goes on
                        index.update(folder)
                for document in index.documents():
                    assert document.text
        database.fail_at = None
        with open_index(URL) as index:
            index.update(folder)
            expected = found(index)
        fresh = shared_database(monkeypatch, MemoryDatabase())
        with open_index(URL) as index:
            index.update(folder)
            assert found(index) == expected
        assert contents(database) == contents(fresh), fail_at
        fail_at += 1
    assert fail_at > 5  # calls of one update


@given(st.lists(st.dictionaries(st.sampled_from("abcd"), st.lists(st.sampled_from("uvwxyz"), max_size=4)), max_size=5))
@settings(max_examples=60, deadline=None)
def test_any_sequence_of_updates_equals_one(tmp_path_factory, versions):
    folder = tmp_path_factory.mktemp("versions")
    (folder / "always.txt").write_text("always here")
    with pytest.MonkeyPatch.context() as patch:
        database = shared_database(patch, MemoryDatabase())
        for version in versions:
            for name in "abcd":
                path = folder / f"{name}.txt"
                path.unlink(missing_ok=True)
                if name in version:
                    path.write_text("\n\n".join(f"{word} " * 11 for word in version[name]))
            with open_index(URL, base=folder) as index:
                index.update(folder)
        fresh = shared_database(patch, MemoryDatabase())
        with open_index(URL, base=folder) as index:
            index.update(folder)
        if versions:
            assert contents(database) == contents(fresh)


def test_files_that_only_other_machines_have_stay(docs, memory):
    with open_index(URL) as index:
        index.update(docs)
    moved = docs.with_name("elsewhere")
    (docs / "sea").rename(moved)
    (docs / "lamps.txt").unlink()
    with open_index(URL) as index:
        report = index.update(docs / "keepers.md")
        assert report.removed == () and len(index.files()) == 3
        assert index.update(docs).removed == ("lamps.txt", "sea/whales.txt")


def test_names_are_relative_to_one_folder_for_all(docs, memory):
    with open_index(URL) as index:
        index.update(docs)
    other = docs.with_name("other")
    other.mkdir()
    (other / "lamps.txt").write_text("Another file of this name.")
    with open_index(URL) as index:
        assert index.update(other).added == ("../other/lamps.txt",)
        assert len(index.files()) == 4
    with open_index(URL) as index:
        assert {d.metadata["source"] for d in index.documents(files=["lamps.txt"])} == {str(docs / "lamps.txt")}
    with open_index(URL, base=other) as index, pytest.raises(InvalidInputError, match="relative to"):
        index.update(other)


@pytest.mark.parametrize("table", ["texts", "files"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: "",
        lambda data: "[" * 100_000,
        lambda data: "7",
        lambda data: json.dumps({}),
        lambda data: json.dumps(data | {"text": "another", "name": "another"}),
        lambda data: json.dumps(data | {"places": [1]}),
        lambda data: json.dumps(data | {"places": [{**data["places"][0], "start": "0"}]}),
        lambda data: json.dumps(data | {"places": [{**data["places"][0], "extra": 1}]}),
        lambda data: json.dumps(data | {"titles": 3, "left_out": 3}),
    ],
)
def test_damaged_records_are_reported(docs, memory, table, damage):
    with open_index(URL) as index:
        index.update(docs)
    for (_, name), records in memory.tables.items():
        for id, record in list(records.items()):
            if name == table and id != "0" * 32:
                records[id] = replace(record, payload=damage(json.loads(record.payload)))
    with open_index(URL) as index, pytest.raises(RetrievalError, match=r"is damaged \(.+\); index its files again"):
        index.search("lamp")
        index.documents()


def test_text_that_is_gone_is_reported(docs, memory):
    with open_index(URL) as index:
        index.update(docs)
        for (_, table), records in memory.tables.items():
            if table == "texts":
                records.clear()
        with pytest.raises(RetrievalError, match="texts are missing"):
            index.documents()
