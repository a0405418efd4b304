"""The remote tier over a real S3 client and a local S3 server."""

from __future__ import annotations

import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from store_generators import over
from stores import fetch, files_of, key_of, put_all

from kvfusion_rag import Document, DocumentStore, DurabilityError, StoreError
from kvfusion_rag.store import collections, namespace_key, open_store

pytest.importorskip("s3fs")
ThreadedMotoServer: Any = pytest.importorskip("moto.server").ThreadedMotoServer

DOCUMENTS = [Document(f"the mill number {number} was built in 1874", id=f"d{number}") for number in range(20)]


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def s3(server, monkeypatch) -> str:
    """The URL of an empty bucket on the local server."""
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    import fsspec

    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(bucket)
    return f"s3://{bucket}/kvs"


def opened(url: str, folder, **remote) -> DocumentStore:
    return open_store(url, local=folder, remote={"wait": 30.0, "skip_instance_cache": True, **remote})


def test_documents_written_by_one_machine_are_read_by_another(s3, tmp_path):
    first = opened(s3, tmp_path / "one")
    fetch(first, range(3))
    assert first.flush()
    first.close()
    second = opened(s3, tmp_path / "two")
    assert fetch(second, range(4)) == ["remote"] * 3 + ["computed"]
    assert second.flush() and second.remote.verify() == (4, 0)
    assert second.remote.totals()[namespace_key("")][1] == 4


def test_flipped_bit_is_found_by_readers_and_by_verify(s3, tmp_path):
    store = opened(s3, tmp_path / "one")
    fetch(store, range(2))
    assert store.flush()
    system = store.remote._folder.system

    def damage(number: int) -> None:
        data = bytearray(system.cat_file(path := store.remote._path(key_of(number))))
        data[-9] ^= 1
        system.pipe_file(path, bytes(data))

    damage(1)
    other = opened(s3, tmp_path / "two")
    assert fetch(other, range(2)) == ["remote", "computed"]
    assert other.flush() and store.remote.verify() == (2, 0)  # replaced
    damage(0)
    assert store.remote.verify() == (1, 1) and store.remote.verify() == (1, 0)


def test_lost_object_is_restored_by_the_next_prefill(s3, tmp_path):
    gen = over(opened(s3, tmp_path / "one"))
    gen.prefill(DOCUMENTS, durable=True, collection="mills")
    keys = list(gen._engine.read(DOCUMENTS).keys)
    gen.store.remote._folder.system.rm(gen.store.remote._path(keys[3]))
    assert gen.store.missing(keys) == [keys[3]]
    assert {source.origin for source in gen.prefill(DOCUMENTS, durable=True)} == {"memory"}
    assert not gen.store.missing(keys)
    (mills,) = collections(opened(s3, tmp_path / "two").slowest_tier)
    assert list(mills.documents) == [document.id for document in DOCUMENTS]


def test_slow_bucket_gets_every_document(s3, tmp_path):
    gen = over(opened(s3, tmp_path / "one"))
    write = gen.store.remote._folder.write
    gen.store.remote._folder.write = lambda *given: (time.sleep(0.1), write(*given))[1]
    gen.prefill(DOCUMENTS, durable=True)
    assert not gen.store.missing(gen._engine.read(DOCUMENTS).keys)


def test_throttled_bucket_gets_every_document(s3, tmp_path, monkeypatch):
    """The client itself repeats throttled calls. What it gives up is uploaded again."""
    from botocore.exceptions import ClientError

    monkeypatch.setattr("kvfusion_rag.store.documents.UPLOAD_PAUSES", (0.0, 0.05, 0.05))
    gen = over(opened(s3, tmp_path / "one"))
    write, calls = gen.store.remote._folder.write, iter(range(10**6))

    def throttled(*given: object) -> None:
        if next(calls) % 3 == 0:
            raise ClientError({"Error": {"Code": "SlowDown", "Message": "reduce your rate"}}, "PutObject")
        write(*given)

    monkeypatch.setattr(gen.store.remote._folder, "write", throttled)
    documents = DOCUMENTS[:4]
    for _ in range(3):  # the pauses of this test are short
        try:
            gen.prefill(documents, durable=True)
            break
        except DurabilityError as error:
            assert "SlowDown" in str(error) and set(error.documents) <= {document.id for document in documents}
    assert not gen.store.missing(gen._engine.read(documents).keys)


def test_missing_bucket_is_named_and_costs_no_answer(s3, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("kvfusion_rag.store.documents.UPLOAD_PAUSES", (0.0,))
    gen = over(opened(s3.replace("bucket-", "absent-"), tmp_path / "one"))
    with pytest.raises(StoreError, match=r"does not have 1 document \('d0'\): .*bucket"):
        gen.prefill(DOCUMENTS[:1], durable=True)
    assert gen.answer("who?", DOCUMENTS[:1], max_new_tokens=1).sources[0].origin == "memory"
    assert "cannot be written" in caplog.text


def test_expired_credentials_are_an_error_of_durable_prefill_and_cost_no_answer(s3, tmp_path, monkeypatch):
    from botocore.exceptions import ClientError

    monkeypatch.setattr("kvfusion_rag.store.documents.UPLOAD_PAUSES", (0.0,))
    gen = over(opened(s3, tmp_path / "one"))
    expired = ClientError({"Error": {"Code": "ExpiredToken", "Message": "the token has expired"}}, "PutObject")

    def fail(*_: object) -> None:
        raise expired

    monkeypatch.setattr(gen.store.remote._folder.system, "exists", fail)
    with pytest.raises(StoreError, match="ExpiredToken"):
        gen.prefill(DOCUMENTS[:2], durable=True)
    assert gen.answer("who?", DOCUMENTS[:2], max_new_tokens=1).sources[0].origin == "memory"


def test_cap_evicts_the_oldest_objects(s3, tmp_path, monkeypatch):
    monkeypatch.setattr("kvfusion_rag.store.remote.store._UPLOADS_PER_CHECK", 1)
    store = opened(s3, tmp_path / "one")
    put_all(store.remote, 0)
    assert store.remote.flush()
    size = store.remote.totals()[namespace_key("")][0]
    capped = opened(s3, tmp_path / "two", max_bytes=int(2.5 * size)).remote
    for number in (1, 2, 3):
        time.sleep(1.1)  # S3 counts whole seconds
        put_all(capped, number)
        assert capped.flush()
    left = [number for number in range(4) if not capped.missing([key_of(number)])]
    assert left == [2, 3] and capped.evictions == 2


def test_forgotten_documents_and_namespaces_leave_the_bucket(s3, tmp_path):
    store = opened(s3, tmp_path / "one")
    fetch(store, range(3))
    fetch(store, range(2), namespace="tenant")
    assert store.flush()
    store.forget([key_of(1)])
    assert store.remote.totals() == {
        namespace_key(""): (store.remote.totals()[namespace_key("")][0], 2),
        namespace_key("tenant"): (store.remote.totals()[namespace_key("tenant")][0], 2),
    }
    store.clear(namespace_key("tenant"))
    assert list(store.remote.totals()) == [namespace_key("")]
    store.clear()
    assert store.remote.totals() == {} and not files_of(store.disk)


def test_two_writers_at_once_leave_whole_files(s3, tmp_path):
    stores = [opened(s3, tmp_path / name) for name in ("one", "two")]
    threads = [threading.Thread(target=fetch, args=(store, range(12))) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(store.flush() for store in stores)
    assert stores[0].remote.verify() == (12, 0)
    shutil.rmtree(tmp_path / "one")
    assert fetch(opened(s3, tmp_path / "three"), range(12)) == ["remote"] * 12
