"""Laws of a Ray cluster with two processors: it changes neither bits nor counts, and a dead worker loses nothing."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from commands import run
from indexes import WordEmbedder, open_index

from kvfusion_rag import ClusterError, Document, InvalidInputError
from kvfusion_rag.cluster import ClusterEmbedder, ClusterOptions, GeneratorSpec, answer_questions, index_documents
from kvfusion_rag.cluster.pool import run_batches

ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

DOCUMENTS = [Document(f"The old mill has {n} sacks of flour.", id=f"mill-{n}") for n in range(96)]
TWO = ClusterOptions(workers=2)


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVFUSION_HOME", str(tmp_path_factory.mktemp("cluster-home")))  # workers inherit it
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture
def spec(tmp_path, model_folder) -> GeneratorSpec:
    return GeneratorSpec(str(model_folder), (tmp_path / "shared").as_uri(), options={"mode": "fusion"})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.glob("v*/*/*/*.safetensors")}


def worker_pids() -> list[int]:
    """Return the processes of this cluster's actors."""
    home = f"KVFUSION_HOME={os.environ['KVFUSION_HOME']}\0".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"MapWorker" in (folder / "cmdline").read_bytes() and home in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it ended meanwhile
            continue
    return found


def test_stored_bits_are_those_of_one_process(spec, tmp_path):
    first = index_documents(DOCUMENTS, spec, cluster=TWO, collection="mills")
    assert (first.stored, first.present, first.failed) == (96, 0, {})
    second = index_documents(DOCUMENTS, spec, cluster=TWO, collection="mills")
    assert (second.stored, second.present, second.failed) == (0, 96, {})
    alone = GeneratorSpec(spec.model, (tmp_path / "alone").as_uri(), options=spec.options)
    index_documents(DOCUMENTS, alone)
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone") and len(contents(tmp_path / "alone")) > 96


def test_answers_are_those_of_one_process_in_order(spec):
    texts = [document.text for document in DOCUMENTS]
    rows = [{"question": f"how many sacks has mill {n}?", "documents": texts[n : n + 3]} for n in range(50)]
    rows[13] = {"question": "who?"}
    options = {"max_new_tokens": 6}
    there = list(answer_questions(rows, spec, cluster=TWO, answer_options=options))
    assert there == list(answer_questions(rows, spec, answer_options=options))
    assert [row["id"] for row in there if row["error"]] == ["14"]


def test_index_is_embedded_by_the_workers(tmp_path):
    for number in range(1500):
        (tmp_path / f"{number}.txt").write_text(f"The mill number {number} belongs to family {number % 7}.")
    found = []
    for embedder in (WordEmbedder(), ClusterEmbedder(WordEmbedder, TWO)):
        with open_index(embedder=embedder, chunks_per_step=2000) as index:
            index.update(tmp_path)
            found.append([index.search(f"mill number {number}", 5) for number in range(0, 1500, 100)])
    assert found[0] == found[1]


def test_worker_with_another_embedding_model_is_one_error():
    command = os.getpid()

    def load() -> WordEmbedder:
        return WordEmbedder(8 if os.getpid() == command else 9)

    with pytest.raises(ClusterError, match="words-9"):
        ClusterEmbedder(load, TWO).embed_documents(["a mill"] * 2000)


def test_results_keep_their_order_if_batches_take_different_times():
    class Waiting:
        """Waits longest for the first item. It is defined here, so that workers get its code."""

        store = None

        def start(self, cache):
            return self

        def __call__(self, batch):
            time.sleep(3 if batch == [0] else 0.01)
            return batch

        def close(self):
            pass

    assert list(run_batches(Waiting(), list(range(12)), 1, TWO)) == list(range(12))


def test_fault_of_a_worker_is_one_error():
    class Faulty:
        store = None

        def start(self, cache):
            return lambda batch: 1 / 0

    with pytest.raises(ClusterError, match="ZeroDivisionError"):
        list(run_batches(Faulty(), [1], 1, TWO))


def test_killed_worker_loses_nothing(spec, tmp_path):
    killed = []

    def kill_one() -> None:
        while len(contents(tmp_path / "shared")) < 16:
            time.sleep(0.01)
        killed.append(worker_pids()[0])
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill_one)
    thread.start()
    many = [Document(f"The new mill has {n} sacks of flour.", id=str(n)) for n in range(640)]
    report = index_documents(many, spec, cluster=TWO)
    thread.join()
    assert killed and report.failed == {} and report.stored + report.present == len(many)
    generator = spec.load()
    assert not generator.store.missing({key for own in generator.store_keys(many).values() for key in own})
    assert generator.store.remote.verify()[1] == 0


def test_failures_are_exactly_the_documents_that_the_store_lacks(spec, tmp_path):
    index_documents(DOCUMENTS[:3], spec)
    for file in (tmp_path / "shared").glob("v*/*/*/*.safetensors"):
        file.unlink()
    for folder in (tmp_path / "shared").glob("v*/*/*"):
        folder.rmdir()
        folder.write_text("")  # no file can be written below it
    report = index_documents(DOCUMENTS, spec, cluster=TWO)
    generator = spec.load()
    keys = generator.store_keys(DOCUMENTS)
    missing = set(generator.store.missing({key for own in keys.values() for key in own}))
    assert set(report.failed) == {name for name, own in keys.items() if not missing.isdisjoint(own)}
    assert {"mill-0", "mill-1", "mill-2"} <= set(report.failed)
    assert report.stored + report.present + len(report.failed) == len(DOCUMENTS)


def test_model_that_workers_cannot_load_is_one_error(tmp_path):
    spec = GeneratorSpec(str(tmp_path), (tmp_path / "shared").as_uri())
    with pytest.raises(ClusterError, match="a worker could not start"):
        index_documents(DOCUMENTS, spec, cluster=TWO)


def test_folder_is_rejected_if_the_cluster_has_several_machines(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}, {"Alive": True}, {"Alive": False}])
    with pytest.raises(InvalidInputError, match="the cluster has 2 machines"):
        index_documents(DOCUMENTS, GeneratorSpec(spec.model, str(tmp_path / "kv")), cluster=TWO)


def test_commands_work_on_the_cluster(capsys, spec, tmp_path, monkeypatch):
    monkeypatch.setattr("kvfusion_rag.retrieval.SentenceTransformerEmbedder", lambda name, device: WordEmbedder())
    (tmp_path / "docs").mkdir()
    for number in range(8):
        (tmp_path / f"docs/{number}.txt").write_text(f"The office number {number} stands on a hill in Lima.")
    shared = ("--model", spec.model, "--store", spec.store, "--ray", "auto", "--workers", 2, "--threads", 1, "--json")
    counts = []
    for _ in range(2):
        code, out, _ = run(capsys, "index", tmp_path / "docs", "--collection", "offices", *shared)
        assert code == 0 and json.loads(out)["failed"] == {}
        counts.append(json.loads(out)["store"])
    assert counts == [{"stored": 8, "stored already": 0, "failed": 0}, {"stored": 0, "stored already": 8, "failed": 0}]
    assert run(capsys, "store", "missing", spec.store, "--collection", "offices")[0] == 0
    (tmp_path / "q.jsonl").write_text('{"question": "where is office 3?"}\n')
    code, out, _ = run(
        capsys, "answer", tmp_path / "q.jsonl", "--docs", tmp_path / "docs", "--mode", "fusion", *shared
    )
    assert code == 0 and len(json.loads(out)["answers"][0]["sources"]) == 5
