"""Measure prefill and serving on two Ray nodes of this machine, with separate local disks and one S3 server.

    python benchmarks/cluster_figures.py [--documents 96] [--model NAME] [--json results.json]

Needs the extras ``ray``, ``serve``, ``metrics`` and ``dev`` (moto). Prefill is counted in documents per second of a
worker's processor time, so that other processes matter less. The other times are those of a clock.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fsspec
import httpx
import ray
from moto.server import ThreadedMotoServer
from ray.cluster_utils import Cluster

from kvfusion_rag import Document
from kvfusion_rag.cluster import ClusterOptions, GeneratorSpec, Replicas, index_documents
from kvfusion_rag.cluster.indexing import Prefill, PrefillTask
from kvfusion_rag.cluster.pool import run_batches
from kvfusion_rag.cluster.serving import deployed
from kvfusion_rag.evaluation.report import run_facts
from kvfusion_rag.serving import ServingOptions, running

BATCH = 8
CAPACITY = 4  # requests at once on each replica
SEEN = 20  # questions that are asked twice
REQUESTS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=96)
    parser.add_argument("--model", help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    for name in ("werkzeug", "ray.data", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    figures: dict[str, Any] = {"run": run_facts()}
    with tempfile.TemporaryDirectory() as folder, object_store(), two_nodes(Path(folder)) as kill_node:
        spec = GeneratorSpec(args.model, options={"mode": "fusion"})
        figures |= {"prefill": measure_prefill(spec, args.documents), "serving": measure_serving(spec)}
        figures["losses"] = measure_losses(spec, args.documents, kill_node)  # last, because a node ends
    print(json.dumps(figures, indent=2))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


@contextmanager
def object_store() -> Iterator[None]:
    """Run an S3 server of this machine, which the environment names."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    yield
    server.stop()


@contextmanager
def two_nodes(folder: Path) -> Iterator[Callable[[], None]]:
    """Run two nodes with one CPU and a local disk each. Yields the function that kills the second one."""
    cluster = Cluster()
    cluster.add_node(num_cpus=0, include_dashboard=False)  # the command's machine, which does not work
    nodes = [cluster.add_node(num_cpus=1, env_vars={"KVFUSION_HOME": str(folder / name)}) for name in ("one", "two")]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    yield lambda: cluster.remove_node(nodes[1], allow_graceful=False)
    ray.shutdown()
    cluster.shutdown()


def bucket(name: str) -> str:
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(name)
    return f"s3://{name}/kv"


def documents(count: int, name: str) -> list[Document]:
    words = "The keeper of the old mill in the valley counted sacks of flour while the river rose and the wheel turned"
    return [Document(f"{name} {number}: {words}, and {words.lower()}.", id=str(number)) for number in range(count)]


@dataclass(frozen=True, slots=True)
class TimedTask:
    """Prefill whose results are the worker, and its processor time for each document."""

    spec: GeneratorSpec

    def start(self, cache: Path | None) -> Timed:
        return Timed(PrefillTask(self.spec).start(cache))


class Timed:
    def __init__(self, work: Prefill) -> None:
        self._work = work
        work([{"text": "Nothing but a beginning.", "id": "0"}])  # the prefix and the first pass

    def __call__(self, batch: list[Any]) -> list[Any]:
        began = time.process_time()
        assert all(result["failure"] is None for result in self._work(batch))
        return [{"worker": os.getpid(), "seconds": (time.process_time() - began) / len(batch)}] * len(batch)

    def close(self) -> None:
        self._work.close()


def measure_prefill(spec: GeneratorSpec, count: int) -> list[dict[str, Any]]:
    figures = []
    for workers in (1, 2):
        task = TimedTask(GeneratorSpec(spec.model, bucket(f"prefill-{workers}"), options=spec.options))
        rows = [{"text": one.text, "id": one.id} for one in documents(count, "Report")]
        began = time.monotonic()
        results = list(run_batches(task, rows, BATCH, ClusterOptions(workers=workers)))
        seconds = sum(result["seconds"] for result in results)
        figures.append(
            {
                "workers": workers,
                "documents": Counter(str(result["worker"]) for result in results).most_common(),
                "documents_per_cpu_second": len(results) / seconds,
                "seconds_with_start": time.monotonic() - began,
            }
        )
    return figures


def measure_losses(spec: GeneratorSpec, count: int, kill_node: Callable[[], None]) -> dict[str, Any]:
    """Kill a worker and then a node while documents are stored, and look for losses."""
    shared = GeneratorSpec(spec.model, bucket("losses"), options=spec.options)
    store, made = shared.open_store(), documents(count, "Ledger")
    events: list[str] = []

    def harm() -> None:
        while stored() < count // 4:
            time.sleep(0.2)
        os.kill(pids_of("MapWorker")[0], signal.SIGKILL)
        events.append(f"a worker was killed after {stored()} objects")
        while stored() < count // 2:
            time.sleep(0.2)
        kill_node()
        events.append(f"a node was killed after {stored()} objects")

    def stored() -> int:
        files = fsspec.filesystem("s3", skip_instance_cache=True).find("losses")
        return sum(file.endswith(".safetensors") for file in files)

    thread = threading.Thread(target=harm, daemon=True)
    thread.start()
    report = index_documents(made, shared, cluster=ClusterOptions(workers=2))
    thread.join(60)
    generator = shared.load()
    keys = {key for own in generator.store_keys(made).values() for key in own}
    whole, broken = store.remote.verify()
    return {
        "events": events,
        "report": asdict(report),
        "missing": len(store.missing(keys)),
        "verified": whole,
        "broken": broken,
    }


def pids_of(name: str) -> list[int]:
    """Return the processes of Ray's actors with this name."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if line.startswith(b"ray::") and name.encode() in line:
            found.append(int(folder.name))
    return found


def measure_serving(spec: GeneratorSpec) -> dict[str, Any]:
    options = ServingOptions(max_concurrency=CAPACITY, metrics=True)
    with (
        deployed(spec, options=options, replicas=Replicas(2, 2)) as deployment,
        running(deployment.app) as url,
        httpx.Client(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client,
    ):
        texts = [one.text for one in documents(4 * SEEN, "Letter")]

        def ask(number: int) -> httpx.Response:
            start = 4 * (number % SEEN)
            body = {
                "model": deployment.model_id,
                "messages": [{"role": "user", "content": "Who counted sacks?"}],
                "max_tokens": 8,
            }
            return client.post("/v1/chat/completions", json=body | {"documents": texts[start : start + 4]})

        def replicas() -> set[str]:
            lines = client.get("/metrics").text.splitlines()
            return {line.split('"')[1] for line in lines if line.startswith("kvfusion_replica_requests_under_way{")}

        for number in range(SEEN):
            ask(number)
        second = [ask(number).json()["kvfusion"]["sources"] for number in range(SEEN)]
        origins = Counter(source["origin"] for sources in second for source in sources)
        with ThreadPoolExecutor(10 * 2 * CAPACITY) as pool:
            burst = Counter(reply.status_code for reply in pool.map(ask, range(10 * 2 * CAPACITY)))
        with ThreadPoolExecutor(CAPACITY) as pool:
            replies = [pool.submit(ask, number) for number in range(REQUESTS)]
            time.sleep(2)
            before = replicas()
            os.kill(pids_of("replica")[0], signal.SIGKILL)
            killed = time.monotonic()
            while not replicas() - before:
                time.sleep(0.1)
            back = time.monotonic() - killed
            codes = Counter(reply.result().status_code for reply in replies)
    return {"second_question": origins, "burst": burst, "killed": codes, "seconds_until_back": back}


if __name__ == "__main__":
    main()
