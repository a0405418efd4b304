"""Files of a store and of an index that anybody may have changed: a miss or a rebuilt index, never wrong contents."""

from __future__ import annotations

import io
import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from fuzzing import DEEP, JSON, damaged, examples, ours
from hypothesis import given
from hypothesis import strategies as st
from indexes import open_index
from stores import files_of, key_of, kv_of, put, read, same

from kvfusion_rag import DiskStore, RetrievalError
from kvfusion_rag.retrieval.collection import DATABASE_FILE
from kvfusion_rag.store.format import check, file_name


@pytest.fixture(scope="module")
def document(tmp_path_factory) -> bytes:
    store = DiskStore(tmp_path_factory.mktemp("store") / "s")
    put(store, 1)
    return files_of(store)[0].read_bytes()


@examples(40)
@given(data=st.data())
def test_damaged_document_is_a_miss_or_the_document(document, tmp_path, data):
    store = DiskStore(tmp_path / "s")
    put(store, 1)
    (file,) = files_of(store)
    content = data.draw(damaged(document))
    file.write_bytes(content)
    miss, found = read(store, 1)
    assert (miss is None) == (content == document) and (miss is not None or same(found, kv_of(1)))


@examples(60)
@given(st.dictionaries(st.sampled_from(["__metadata__", "keys", "values", "token_ids"]), JSON) | JSON, st.binary())
def test_any_header_is_checked_without_an_error(value, rest):
    path = Path(file_name(key_of(1), "raw"))
    text = json.dumps(value).encode()
    for head in (text, DEEP.encode()[:60_000], rest):
        data = len(head).to_bytes(8, "little") + head + rest
        assert check(io.BytesIO(data), len(data), path) is not None
        assert check(io.BytesIO(data), None, path) is not None


# The index of documents


@pytest.fixture(scope="module")
def indexed(tmp_path_factory) -> Path:
    """An index with two collections."""
    folder = tmp_path_factory.mktemp("indexed")
    (folder / "docs").mkdir()
    (folder / "docs" / "a.txt").write_text("The lamp was lit in 1870. " * 5)
    for tokens in (12, 20):
        with open_index(folder / "index", chunk_tokens=tokens) as index:
            index.update(folder / "docs")
    return folder


@examples(25)
@given(data=st.data(), tokens=st.sampled_from([12, 20, 30]))
def test_damaged_index_is_searched_rightly_or_says_so(indexed, tmp_path, data, tokens):
    whole = (indexed / "index" / DATABASE_FILE).read_bytes()
    (tmp_path / "index").mkdir(exist_ok=True)
    (tmp_path / "index" / DATABASE_FILE).write_bytes(data.draw(damaged(whole, most=40)))

    def search() -> list[str]:
        with open_index(tmp_path / "index", chunk_tokens=tokens) as index:
            return [document.text for document in index.search("lamp")]

    found = ours(search)
    assert found is None or all(text and text in "The lamp was lit in 1870. " * 5 for text in found)


@pytest.mark.parametrize("settings", ["x", None, "[1]", 5, b"\xff", '{"embedding_model": 1}', "[" * 3000, "{}"])
def test_damaged_settings_of_another_collection_are_reported(tmp_path, settings):
    (tmp_path / "a.txt").write_text("The lamp was lit in 1870.")
    with open_index(tmp_path / "index") as index:
        index.update(tmp_path / "a.txt")
    with closing(sqlite3.connect(tmp_path / "index" / DATABASE_FILE)) as database, database:
        database.execute("UPDATE collection SET settings = ?", (settings,))
    with open_index(tmp_path / "index", chunk_tokens=30) as index, pytest.raises(RetrievalError, match="is damaged"):
        index.search("lamp")
    with open_index(tmp_path / "index", chunk_tokens=30) as index:  # as the message advises
        assert len(index.update(tmp_path / "a.txt").added) == 1
        assert index.search("lamp")
