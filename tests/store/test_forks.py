"""A store and a generator in a process that was forked after they were used."""

import threading

import pytest
import torch
from store_generators import ask, over
from stores import CPU, ids_of, key_of, kv_of, layered, run_forked

from kvfusion_rag import DocumentStore, ForkedProcessError, MemoryStore
from kvfusion_rag.model.kv import KVShape
from kvfusion_rag.store import KVRequest
from kvfusion_rag.store.metrics import Counters, StoreEvent

LARGE = KVShape(8, 4, 64, 64, torch.float32)  # torch divides the work on such documents among its threads


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def fetch_large(store: DocumentStore) -> None:
    request = KVRequest(ids_of(1, 200), LARGE.empty(ids_of(1, 200)))
    store.fetch({key_of(1, 200): request}, LARGE, CPU, lambda keys: ((key, kv_of(1, 200, LARGE)) for key in keys))


def require_refusal_and_remedy(use) -> None:
    """In a forked process: ``use`` is refused, and works after what the message advises."""
    with pytest.raises(ForkedProcessError, match=r"none of its parent's 2 torch threads.*torch.set_num_threads\(1\)"):
        use()
    torch.set_num_threads(1)
    use()


def test_store_says_why_it_would_hang_after_a_fork(tmp_path, two_threads):
    store = layered(tmp_path)
    fetch_large(store)
    (torch.ones(500, 500) @ torch.ones(500, 500)).exp()
    assert run_forked(lambda: require_refusal_and_remedy(lambda: fetch_large(store))) == 0


def test_store_that_was_not_used_can_be_used_after_a_fork(tmp_path, two_threads):
    store = layered(tmp_path)
    assert run_forked(lambda: store.fetch({}, LARGE, CPU, lambda keys: ())) == 0


def test_generator_says_why_it_would_hang_after_a_fork(two_threads):
    gen = over(DocumentStore(MemoryStore()))
    ask(gen)
    assert run_forked(lambda: require_refusal_and_remedy(lambda: ask(gen))) == 0
    uses = [
        lambda: list(gen.stream("who?", ["a"], max_new_tokens=1)),
        lambda: gen.answer("who?", ["a"], mode="concat", max_new_tokens=1),
    ]
    for use in uses:
        assert run_forked(lambda use=use: require_refusal_and_remedy(use)) == 0


def test_fork_waits_until_other_threads_have_released_their_locks():
    """Otherwise the new process would find them locked forever."""
    memory, counters = MemoryStore(), Counters(None)
    memory.put(key_of(1), kv_of(1))
    stop = threading.Event()

    def use() -> None:
        while not stop.is_set():
            memory.get(key_of(1), ids_of(1))
            counters.note(StoreEvent("hit", "memory"))

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):

            def child() -> None:
                assert memory.get(key_of(1), ids_of(1)) is not None
                counters.note(StoreEvent("hit", "memory"))

            assert run_forked(child) == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
