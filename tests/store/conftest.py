"""Remote stores for the tests of the store."""

import threading

import pytest

from kvfusion_rag import RemoteStore


@pytest.fixture
def bucket(tmp_path) -> RemoteStore:
    """A remote store in memory, whose files appear complete or not at all."""
    return RemoteStore(f"memory://{tmp_path.name}")


@pytest.fixture
def shared(tmp_path) -> RemoteStore:
    """A remote store in the folder ``remote``."""
    return RemoteStore((tmp_path / "remote").as_uri())


@pytest.fixture
def go():
    """An event that hanging calls wait for. Afterwards their threads end, so that later tests do not count them."""
    before, event = set(threading.enumerate()), threading.Event()
    yield event
    event.set()
    for thread in set(threading.enumerate()) - before:
        if thread.name == "kvfusion-remote":
            thread.join(10)
