"""Every kind of damage to the index ends in a rebuilt index with true totals and one log line.

Damage is done to the bytes of the SQLite file, to its tables and rows, and to the entries beside it.
"""

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import FOREIGN, SIZE, files_of, key_of, put, read

from kvfusion_rag import DiskStore
from kvfusion_rag.store import namespace_key
from kvfusion_rag.store.format import file_name

DOCUMENTS = 4
JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    """A store folder that is copied before each damage."""
    store = DiskStore(tmp_path_factory.mktemp("intact") / "s")
    put(store, *range(DOCUMENTS))
    store.close()
    return store.path


def copy_of(intact: Path, folder: Path) -> Path:
    """Return a fresh copy of a store, beside a file that must not be touched."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(intact, folder / "s")
    (folder / "outside").write_text("precious")
    return folder / "s"


def require_true_totals(store: DiskStore) -> None:
    files = len(files_of(store))
    assert store.totals() == ({namespace_key(""): (files * SIZE, files)} if files else {})
    assert (store.path.parent / "outside").read_text() == "precious"


def rebuilt_lines(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if "was rebuilt" in r.message or "was corrected" in r.message]


def use(store: DiskStore, how: str) -> None:
    """Use a store in one way, which must succeed whatever its index contains."""
    if how == "put":
        put(store, 9)
        put(store, 10)
    elif how == "forget":
        assert store.forget(key_of(0)) == 1
    elif how == "verify":
        assert store.verify().broken == 0
    elif how == "get":
        assert read(store, 1)[0] is None


USES = ["open", "put", "forget", "verify", "get", "totals"]


# Damage to the bytes of the file


def overwrite(data: bytes, start: int, new: bytes) -> bytes:
    return data[:start] + new + data[start + len(new) :]


def damaged_bytes(data: bytes) -> st.SearchStrategy[bytes]:
    """Cut, emptied, zeroed, filled, overwritten and flipped versions of a file."""
    place = st.one_of(st.sampled_from([0, 1, 16, 18, 24, 28, 96, 100, 512, 4095, 4096]), st.integers(0, len(data) - 1))
    junk = st.binary(min_size=1, max_size=200)
    fills = st.tuples(place, place, st.sampled_from([b"\0", b"\xff", b"A"]))
    flips = st.lists(st.tuples(place, st.integers(0, 255)), min_size=1, max_size=30)

    def flipped(changes: list[tuple[int, int]]) -> bytes:
        changed = bytearray(data)
        for index, value in changes:
            changed[index] = value
        return bytes(changed)

    return st.one_of(
        place.map(lambda end: data[:end]),
        fills.map(lambda given: overwrite(data, min(given[:2]), given[2] * abs(given[0] - given[1]))),
        st.tuples(place, junk).map(lambda given: overwrite(data, *given)),
        flips.map(flipped),
        st.binary(max_size=5000),
    )


def check_bytes(intact: Path, folder: Path, data: st.DataObject) -> None:
    path = copy_of(intact, folder)
    how, is_live = data.draw(st.sampled_from(USES)), data.draw(st.booleans())
    store = DiskStore(path) if is_live else None
    index = path / "index.sqlite"
    index.write_bytes(data.draw(damaged_bytes(index.read_bytes())))
    store = store or DiskStore(path)
    use(store, how)
    require_true_totals(store)
    put(store, 20)
    require_true_totals(store)
    assert {read(store, number)[0] for number in range(1, DOCUMENTS)} == {None}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_bytes_of_the_index(intact, tmp_path, data):
    check_bytes(intact, tmp_path / "d", data)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_bytes_of_the_index_at_length(intact, tmp_path, data):
    check_bytes(intact, tmp_path / "d", data)


# Damage to tables and rows. An open store notices wrong rows only when it comes across them

GHOST = f"'{file_name(key_of(77), 'raw')}', '{namespace_key('')}'"
TABLES = {
    "documents gone": "DROP TABLE documents",
    "totals gone": "DROP TABLE totals",
    "trigger gone": "DROP TRIGGER added",
    "column gone": "DROP TABLE documents; CREATE TABLE documents (a, b)",
    "view": "DROP TABLE documents; CREATE VIEW documents AS SELECT '../outside' AS name, 2 AS namespace, 3 AS bytes",
    "foreign trigger": "CREATE TRIGGER x AFTER INSERT ON documents BEGIN DELETE FROM documents; END",
    "foreign table": "CREATE TABLE x (a)",
    "write-ahead log": "PRAGMA journal_mode = WAL",
}
TOTALS = {
    "totals high": "UPDATE totals SET bytes = bytes * 10",
    "totals zero": "UPDATE totals SET bytes = 0",
    "totals negative": "UPDATE totals SET bytes = -5, entries = -1",
    "totals text": "UPDATE totals SET bytes = 'many'",
    "totals of nobody": "UPDATE totals SET namespace = x'ff00'",
    "totals removed": "DELETE FROM totals",
    "size": "UPDATE documents SET bytes = 7",
    "size negative": "PRAGMA ignore_check_constraints = 1; UPDATE documents SET bytes = -700000",
    "size text": "PRAGMA ignore_check_constraints = 1; UPDATE documents SET bytes = 'x'",
    "namespace": "UPDATE documents SET namespace = 'zz'",
    "last use": f"UPDATE documents SET used = {1 << 62}",
    "use beyond": "PRAGMA ignore_check_constraints = 1; UPDATE documents SET used = 9223372036854775807",
    "use text": "PRAGMA ignore_check_constraints = 1; UPDATE documents SET used = 'x'",
}
ROWS = {
    "name outside": "UPDATE documents SET name = '../outside' WHERE name = (SELECT MIN(name) FROM documents)",
    "name absolute": "UPDATE documents SET name = '/etc/none' WHERE name = (SELECT MIN(name) FROM documents)",
    "name below": "UPDATE documents SET name = 'v4-raw/../../outside' WHERE name = (SELECT MIN(name) FROM documents)",
    "name not text": "UPDATE documents SET name = CAST(x'ff' AS TEXT) WHERE name = (SELECT MIN(name) FROM documents)",
    "name of bytes": "PRAGMA ignore_check_constraints = 1; UPDATE documents SET name = x'ff' || name",
    "rows gone": "DELETE FROM documents WHERE name IN (SELECT name FROM documents LIMIT 2)",
    "all rows gone": "DELETE FROM documents",
    "row without a file": f"INSERT INTO documents VALUES ({GHOST}, 5000, 1, 1)",
    "row outside": f"INSERT INTO documents VALUES ('../outside', '{namespace_key('')}', 5000, 0, 1)",
}


def run_sql(path: Path, script: str) -> None:
    with closing(sqlite3.connect(path / "index.sqlite")) as database:
        database.executescript(script)


@pytest.mark.parametrize("script", [*TABLES.values(), *TOTALS.values(), *ROWS.values()], ids=[*TABLES, *TOTALS, *ROWS])
def test_wrong_tables_and_rows_are_corrected_at_opening_with_one_log_line(intact, tmp_path, caplog, script):
    path = copy_of(intact, tmp_path / "d")
    run_sql(path, script)
    store = DiskStore(path, max_bytes=DOCUMENTS * SIZE)
    assert len(rebuilt_lines(caplog)) == 1
    require_true_totals(store)
    put(store, 9)
    assert len(files_of(store)) == DOCUMENTS
    require_true_totals(store)
    DiskStore(path)
    assert len(rebuilt_lines(caplog)) == 1


@pytest.mark.parametrize("how", ["put", "totals", "verify"])
@pytest.mark.parametrize("script", [*TABLES.values(), *TOTALS.values()], ids=[*TABLES, *TOTALS])
def test_wrong_tables_and_totals_are_corrected_while_the_store_is_open(intact, tmp_path, caplog, script, how):
    path = copy_of(intact, tmp_path / "d")
    store = DiskStore(path, max_bytes=DOCUMENTS * SIZE)
    run_sql(path, script)
    use(store, how)
    require_true_totals(store)
    put(store, 11)
    assert len(files_of(store)) <= DOCUMENTS
    require_true_totals(store)
    assert len(rebuilt_lines(caplog)) == 1


@pytest.mark.parametrize("script", ROWS.values(), ids=ROWS)
def test_verify_corrects_rows(intact, tmp_path, script):
    path = copy_of(intact, tmp_path / "d")
    store = DiskStore(path)
    run_sql(path, script)
    store.verify()
    require_true_totals(store)


def test_index_of_another_store_is_corrected(intact, tmp_path, caplog):
    path = copy_of(intact, tmp_path / "d")
    other = DiskStore(tmp_path / "other")
    put(other, *range(30, 37))
    other.close()
    shutil.copy(other.path / "index.sqlite", path / "index.sqlite")
    require_true_totals(DiskStore(path))
    assert len(rebuilt_lines(caplog)) == 1


# Something else in the place of the index


KINDS: dict[str, Damage] = {
    **FOREIGN,
    "link outside": lambda path: path.symlink_to(path.parent.parent / "outside"),
    "nothing": lambda path: None,
}


@pytest.mark.parametrize("is_live", [False, True], ids=["closed", "open"])
@pytest.mark.parametrize("ending", ["", "-journal", "-wal", "-shm"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_entries_in_the_place_of_the_index_are_replaced(intact, tmp_path, kind, ending, is_live):
    path = copy_of(intact, tmp_path / "d")
    store = DiskStore(path) if is_live else None
    file = path / f"index.sqlite{ending}"
    file.unlink(missing_ok=True)
    KINDS[kind](file)
    store = store or DiskStore(path)
    put(store, 9)
    require_true_totals(store)
    assert not (path / "nothing").exists()


def test_journal_that_names_a_file_elsewhere_does_not_remove_it(intact, tmp_path, caplog):
    """SQLite deletes the file that such a journal names after it has rolled back."""
    path = copy_of(intact, tmp_path / "d")
    pages, name = (path / "index.sqlite").stat().st_size // 4096, str(path.parent / "outside").encode()
    header = JOURNAL_MAGIC + b"".join(n.to_bytes(4, "big") for n in (0, 1, pages, 512, 4096))
    tail = [(0x40000000 // 4096 + 1).to_bytes(4, "big"), name]
    tail += [n.to_bytes(4, "big") for n in (len(name), sum(name))]
    (path / "index.sqlite-journal").write_bytes(header.ljust(512, b"\0") + b"".join(tail) + JOURNAL_MAGIC)
    require_true_totals(DiskStore(path))
    assert len(rebuilt_lines(caplog)) == 1
