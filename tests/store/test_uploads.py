"""Uploads to a remote tier: they run in the background, in a bounded queue, and never delay the exit."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from stores import fetch, key_of, put_all, remote_entries

from kvfusion_rag import DiskStore, DocumentStore


def test_flush_reports_whether_uploads_have_ended(tmp_path, bucket, monkeypatch, go):
    assert DocumentStore().flush()
    store = DocumentStore(None, DiskStore(tmp_path / "d"), bucket)
    monkeypatch.setattr(bucket._folder.system, "exists", lambda path: not go.wait(30))
    fetch(store, [1])
    assert not bucket.flush(0.05)
    go.set()
    assert store.flush()


def test_close_drops_what_waits_behind_hanging_uploads(bucket, monkeypatch, caplog, go):
    monkeypatch.setattr(bucket._folder.system, "exists", lambda path: not go.wait(30))
    put_all(bucket, *range(40))
    assert [thread.name for thread in threading.enumerate()].count("kvfusion-remote") == 4
    assert not bucket.close(0.1)
    assert bucket.dropped == 40 - 4 and "has not taken all documents within 0.1 s" in caplog.text
    go.set()
    assert bucket.close(10) and remote_entries(bucket) == 4


def test_uploads_beyond_the_queue_are_dropped_and_counted(bucket, monkeypatch, go):
    pipe_file = bucket._folder.system.pipe_file
    monkeypatch.setattr(bucket._folder.system, "pipe_file", lambda *given: (go.wait(30), pipe_file(*given)))
    put_all(bucket, *range(70))
    assert bucket.dropped == 70 - 64
    go.set()
    report = bucket.flush()
    assert not report and not report.unfinished and remote_entries(bucket) == 64
    assert report.lost == dict.fromkeys(map(key_of, range(64, 70)), "the queue of uploads was full")
    assert bucket.flush()


def test_exit_of_the_process_waits_for_uploads(shared, monkeypatch):
    pipe_file = shared._folder.system.pipe_file
    monkeypatch.setattr(shared._folder.system, "pipe_file", lambda *given: (time.sleep(0.05), pipe_file(*given)))
    put_all(shared, *range(6))
    shared._finish()  # what atexit calls
    assert remote_entries(shared) == 6


@pytest.mark.slow
@pytest.mark.parametrize("hangs", [True, False])
def test_process_without_close_exits_and_uploads_what_it_can(tmp_path, hangs):
    """A real process, because a thread that hangs forever must not keep it from exiting."""
    script = f"""
import sys, threading, time
sys.path.insert(0, {str(Path(__file__).parent.parent / "helpers")!r})
from stores import Computer, fetch_kvs
from kvfusion_rag import DiskStore, DocumentStore, RemoteStore
remote = RemoteStore({(tmp_path / "remote").as_uri()!r}, wait=0.2)
pipe_file = remote._folder.system.pipe_file
remote._folder.system.pipe_file = lambda *given: (time.sleep(0.3), pipe_file(*given))
if {hangs}:
    for name in ("open", "exists"):
        setattr(remote._folder.system, name, lambda *_: threading.Event().wait())
store = DocumentStore(None, DiskStore({str(tmp_path / "d")!r}), remote)
origins = fetch_kvs(store, range(6), Computer(range(6))).origins
assert set(origins.values()) == {{"computed"}}
"""
    ended = subprocess.run([sys.executable, "-c", script], timeout=120, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert len(list((tmp_path / "remote").rglob("*.safetensors"))) == (0 if hangs else 6)
