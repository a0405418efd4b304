"""Laws of a server with replicas on a Ray cluster: it answers like the single server, even if one dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving_client import CHAT, events

from kvfusion_rag import ClusterError, KVFusionGenerator
from kvfusion_rag.serving import Access, ServingOptions, create_app, running

ray = pytest.importorskip("ray")
pytest.importorskip("ray.serve")
pytest.importorskip("prometheus_client")
from kvfusion_rag.cluster.serving import Deployment, GeneratorSpec, Replicas, deployed  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
KEY, OTHER = "key-of-the-first-tenant", "key-of-the-other-tenant"
ACCESS = Access({KEY: None, OTHER: "b"})
CAPACITY = 4  # requests at once on each replica
TEXTS = [f"The old mill number {n} has {n} sacks of flour and belongs to family {n % 7}." for n in range(80)]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("cluster-home")
        patch.setenv("KVFUSION_HOME", str(home))  # replicas inherit it
        yield home


@pytest.fixture(scope="module")
def deployment(home, model_folder) -> Iterator[Deployment]:
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    options = ServingOptions(max_concurrency=CAPACITY, tenant_concurrency=1000, metrics=True)
    with deployed(GeneratorSpec(str(model_folder)), access=ACCESS, options=options, replicas=Replicas(2, 2)) as found:
        yield found
    ray.shutdown()


@pytest.fixture(scope="module")
def url(deployment) -> Iterator[str]:
    with running(deployment.app) as address:
        yield address


@pytest.fixture(scope="module")
def client(url) -> Iterator[httpx.Client]:
    with client_at(url) as found:
        yield found


@pytest.fixture(scope="module")
def single(home, model_folder) -> Iterator[httpx.Client]:
    generator = KVFusionGenerator.from_pretrained(str(model_folder))
    with running(create_app(generator, access=ACCESS)) as address, client_at(address) as found:
        yield found


def client_at(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=120, headers={"authorization": f"Bearer {KEY}"})


def body(number: int = 0, **fields: Any) -> dict[str, Any]:
    documents = [TEXTS[(number * 4 + k) % len(TEXTS)] for k in range(4)]
    messages = [{"role": "user", "content": f"How many sacks has mill {number}?"}]
    standard = {"model": "tiny-llama", "messages": messages, "documents": documents, "max_tokens": 8, "mode": "fusion"}
    return standard | fields


def essence(reply: dict[str, Any]) -> dict[str, Any]:
    """Return a reply without what differs between two calls of one server."""
    reply = {name: value for name, value in reply.items() if name not in ("id", "created")}
    if "kvfusion" in reply:
        shown = {k: v for k, v in reply["kvfusion"].items() if k != "timings"}
        shown["sources"] = [{k: v for k, v in s.items() if k not in ("origin", "miss")} for s in shown["sources"]]
        reply["kvfusion"] = shown
    if "usage" in reply:
        reply["usage"] = {k: v for k, v in reply["usage"].items() if k != "prompt_tokens_details"}
    return reply


def replica_pids() -> list[int]:
    """Return the processes of this cluster's replicas."""
    home = f"KVFUSION_HOME={os.environ['KVFUSION_HOME']}\0".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"replica" in (folder / "cmdline").read_bytes() and home in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it ended meanwhile
            continue
    return found


def soon(condition, seconds: float = 300.0) -> bool:
    limit = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < limit:
        time.sleep(0.1)
    return found


def metric(client: httpx.Client, name: str) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line.startswith(name)}


def test_answers_are_those_of_the_single_server(client, single):
    for number in range(20):
        fields = {"mode": ["fusion", "concat"][number % 2], "focus": [None, 2][number // 2 % 2], "seed": number}
        asked = body(number, temperature=0.5 * (number % 3), **fields)
        ours, theirs = (one.post(CHAT, json=asked) for one in (client, single))
        assert ours.status_code == theirs.status_code == 200
        assert essence(ours.json()) == essence(theirs.json())
        streamed = [list(map(essence, events(one.post(CHAT, json=asked | {"stream": True}).text)))
                    for one in (client, single)]  # fmt: skip
        assert streamed[0] == streamed[1]
    for path in ("/", "/docs", "/health", "/v1/models/tiny-llama"):
        ours, theirs = (one.get(path) for one in (client, single))
        assert ours.status_code == theirs.status_code == 200
        assert path == "/docs" or path.startswith("/v1") or ours.text == theirs.text


@pytest.mark.parametrize("fields", [{"max_tokens": 0}, {"model": "x"}, {"documents": 3}, {"documents": ["x " * 9000]}])
def test_errors_are_those_of_the_single_server(client, single, fields):
    ours, theirs = (one.post(CHAT, json=body(**fields)) for one in (client, single))
    assert (ours.status_code, ours.json()) == (theirs.status_code, theirs.json()) and ours.status_code >= 400


def test_documents_of_the_second_question_come_from_memory(client):
    origins = Counter()
    for round_ in range(2):
        for number in range(20):
            asked = body(number)
            asked["documents"] = asked["documents"][::-1] if round_ else asked["documents"]
            sources = client.post(CHAT, json=asked).json()["kvfusion"]["sources"]
            origins.update(source["origin"] for source in sources if round_)
    assert origins["memory"] >= 0.95 * origins.total() and origins.total() == 80
    per_replica = metric(client, "kvfusion_store_computed_total")
    assert len(per_replica) == 2 and min(per_replica.values()) > 4  # both replicas work


def test_pieces_arrive_one_by_one(client):
    with client.stream("POST", CHAT, json=body(max_tokens=200, stream=True)) as reply:
        began, times = time.monotonic(), []
        for _ in reply.iter_text():
            times.append(time.monotonic() - began)
    assert len(times) > 20 and times[0] < times[-1] / 4


def test_client_that_leaves_ends_the_work_on_the_replica(client):
    def is_idle() -> bool:
        under_way = metric(client, "kvfusion_replica_requests_under_way")
        return len(under_way) == 2 and not any(under_way.values())

    asked = body(max_tokens=390, stream=True)
    began = time.monotonic()
    assert client.post(CHAT, json=asked).text.count("data: ") > 100
    whole, began = time.monotonic() - began, time.monotonic()
    with client.stream("POST", CHAT, json=asked) as reply:
        next(reply.iter_text())
        assert not is_idle()
    assert soon(is_idle) and time.monotonic() - began < whole


def test_access_is_checked_by_the_ingress(client):
    assert client.post(CHAT, json=body(), headers={"authorization": "Bearer wrong"}).status_code == 401
    documents = {"documents": ["Only tenant b has this text."]}
    other = {"authorization": f"Bearer {OTHER}"}
    for headers, origin in ((other, "computed"), (other, "memory"), ({}, "computed")):
        found = client.post("/v1/documents", json=documents, headers=headers).json()["data"]
        assert [one["origin"] for one in found] == [origin]
    assert client.post("/v1/documents/forget", json=documents).json()["removed"] == 1


def test_burst_gets_only_answers_and_rejections(client, url):
    codes, waits = Counter(), set()

    def ask(number: int) -> None:
        reply = httpx.post(url + CHAT, json=body(number, max_tokens=30), headers=client.headers, timeout=120)
        codes[reply.status_code] += 1
        if reply.status_code == 429:
            waits.add(reply.headers["retry-after"])

    burst = 10 * 2 * CAPACITY
    with ThreadPoolExecutor(burst) as pool:
        list(pool.map(ask, range(burst)))
    assert codes.keys() == {200, 429} and codes[200] >= 2 * CAPACITY and waits == {"1"}


def test_killed_replica_fails_no_request_and_comes_back(client, url):
    before = replica_pids()
    assert len(before) == 2
    codes, lost = Counter[int](), Counter[str]()

    def ask(number: int) -> None:
        asked = body(number, max_tokens=20, stream=number % 5 == 0)
        reply = httpx.post(url + CHAT, json=asked, headers=client.headers, timeout=300)
        if asked["stream"]:  # one that has begun cannot be repeated, so it ends with an error
            lost.update(one["error"]["code"] for one in events(reply.text) if "error" in one)
        codes[reply.status_code] += 1

    with ThreadPoolExecutor(CAPACITY) as pool:
        work = [pool.submit(ask, number) for number in range(250)]
        while codes.total() < 20:
            time.sleep(0.01)
        os.kill(before[0], signal.SIGKILL)
        for one in work:
            one.result()
    assert codes == {200: 250} and lost.total() == lost["replica_lost"] <= CAPACITY
    assert soon(lambda: before[0] not in replica_pids() and len(metric(client, "kvfusion_store_computed_total")) == 2)


def test_update_loses_no_request_and_a_wrong_one_changes_nothing(deployment, client, url, model_folder, tmp_path):
    codes, stop = Counter(), threading.Event()

    def ask() -> None:
        while not stop.is_set():
            codes[httpx.post(url + CHAT, json=body(), headers=client.headers, timeout=300).status_code] += 1

    before = set(replica_pids())
    thread = threading.Thread(target=ask)
    thread.start()
    try:
        deployment.update(GeneratorSpec(str(model_folder)))
        assert before.isdisjoint(replica_pids())
        after = set(metric(client, "kvfusion_store_computed_total"))
        with pytest.raises(ClusterError, match="no-such-model"):
            deployment.update(GeneratorSpec(str(tmp_path / "no-such-model")))
        assert set(metric(client, "kvfusion_store_computed_total")) & after
    finally:
        stop.set()
        thread.join()
    assert codes.keys() == {200} and codes.total() > 5


@contextmanager
def serving_command(home: Path, model_folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the command on a cluster of its own. Yields its process and its address."""
    options = ["--port", "0", "--ray", "auto", "--replicas", "1:2", "--max-concurrency", "8", "--metrics"]
    command = [sys.executable, "-m", "kvfusion_rag.cli", "serve", "--model", str(model_folder), *options,
               "--store", (home / "kv").as_uri()]  # fmt: skip
    environment = {**os.environ, "KVFUSION_HOME": str(home), "RAY_ADDRESS": ""}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().split()[3].removesuffix("/v1,")
    finally:
        process.kill()


def test_replicas_grow_with_the_load_and_are_replaced_after_a_hangup(tmp_path, model_folder):
    codes, stop = Counter[int](), threading.Event()
    with serving_command(tmp_path, model_folder) as (process, address), httpx.Client(base_url=address) as client:

        def replicas() -> set[str]:
            return set(metric(client, "kvfusion_replica_requests_under_way"))

        def ask(number: int) -> None:
            while not stop.is_set():
                reply = httpx.post(address + CHAT, json=body(number, max_tokens=100), timeout=300)
                codes[reply.status_code] += 1

        assert len(replicas()) == 1
        with ThreadPoolExecutor(12) as pool:  # above the target of one replica, below the capacity of two
            work = [pool.submit(ask, number) for number in range(12)]
            try:
                assert soon(lambda: len(replicas()) == 2)
                first = replicas()
                process.send_signal(signal.SIGHUP)
                assert soon(lambda: len(replicas()) == 2 and first.isdisjoint(replicas()))
            finally:
                stop.set()
            for one in work:
                one.result()
    assert codes.keys() == {200}


def test_command_serves_on_a_cluster_of_its_own_until_a_signal(tmp_path, model_folder):
    with serving_command(tmp_path, model_folder) as (process, address):
        found = httpx.post(address + CHAT, json=body(), timeout=60)
        assert found.status_code == 200, found.text
        with httpx.stream("POST", address + CHAT, json=body(max_tokens=390, stream=True), timeout=60) as reply:
            pieces = reply.iter_text()
            next(pieces)
            process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            assert "".join(pieces).endswith("data: [DONE]\n\n")
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "") and time.monotonic() - began < 10


def test_model_that_cannot_be_loaded_is_one_line(tmp_path):
    command = [sys.executable, "-m", "kvfusion_rag.cli", "serve", "--model", str(tmp_path), "--port", "0", "--ray",
               "auto", "--replicas", "1"]  # fmt: skip
    environment = {**os.environ, "KVFUSION_HOME": str(tmp_path), "RAY_ADDRESS": ""}
    found = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False, timeout=300
    )
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr.count("\n") == 1 and "the replicas could not start" in found.stderr


def test_single_server_imports_no_ray(model_folder):
    code = (
        "import sys, threading; from kvfusion_rag import KVFusionGenerator; from kvfusion_rag.cli import serve\n"
        "from kvfusion_rag.serving import create_app, running\n"
        f"with running(create_app(KVFusionGenerator.from_pretrained({str(model_folder)!r}))): pass\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'ray'])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "[]"
