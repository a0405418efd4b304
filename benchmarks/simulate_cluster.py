"""Simulate replicas with a memory tier each behind a router, under skewed traffic. Prints tables of docs/scale.md.

    python benchmarks/simulate_cluster.py [--table routers] [--replicas 8] [--exponent 1.0] ...

A question is about a topic, drawn from Zipf's law, and reads some of the topic's documents. It goes to one replica,
whose memory keeps the documents that were used last, as ``MemoryStore`` does. All others are requests to the store.
Documents have the same size. Rates are counted after a warm-up of half of the questions.
"""

from __future__ import annotations

import argparse
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scale_costs import CORPORA, MODELS, Table, amount, markdown, passage_bytes, scaled, short

POINTS = 100  # of a replica on the ring of the consistent hash
MODEL = "Llama-3.1-8B"  # whose passages are kept
EXACT_RANKS = 100_000  # topics that the approximation counts one by one; the rarer ones are counted in groups
GROUPS = 400


class Traffic(NamedTuple):
    """Questions over the documents 0..D-1.

    Attributes:
        documents: number D of documents.
        pool: documents of a topic.
        per_question: documents k of a question, at most ``pool``.
        exponent: s in Zipf's law: the r-th topic has a share in proportion to r ** -s.
        questions: number N of questions.
    """

    documents: int
    pool: int
    per_question: int
    exponent: float
    questions: int
    seed: int = 0


class Counts(NamedTuple):
    """Documents that were read, those found in memory, and the largest replica's questions over the mean."""

    reads: int
    hits: int
    busiest: float

    @property
    def hit_rate(self) -> float:
        return self.hits / self.reads


class Memory:
    """Keeps the documents that were used last, in the order in which a question reads them from a store."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._documents: OrderedDict[int, None] = OrderedDict()

    def read(self, documents: Sequence[int]) -> int:
        """Read the documents of a question: those in memory first, then the others. Return the number of hits."""
        kept = self._documents
        missing = []
        for document in documents:
            if document in kept:
                kept.move_to_end(document)
            else:
                missing.append(document)
        for document in missing:
            if len(kept) >= self._capacity:
                kept.popitem(last=False)
            kept[document] = None
        return len(documents) - len(missing)


def draw_questions(traffic: Traffic) -> np.ndarray:
    """Return the documents of each question, shape (N, k)."""
    rng = np.random.default_rng(traffic.seed)
    shares = np.arange(1, traffic.documents // traffic.pool + 1, dtype=float) ** -traffic.exponent
    topics = np.searchsorted(np.cumsum(shares) / shares.sum(), rng.random(traffic.questions))
    members = np.argsort(rng.random((traffic.questions, traffic.pool)), axis=1)[:, : traffic.per_question]
    return topics[:, None] * traffic.pool + members


def document_hashes(documents: int) -> np.ndarray:
    """Return 64 bits of the sha256 of each document, shape (D,)."""
    return np.array([_hash(str(number)) for number in range(documents)], dtype=np.uint64)


def route_randomly(questions: np.ndarray, replicas: int) -> np.ndarray:
    """Return the replica of each question, shape (N,)."""
    return np.random.default_rng(1).integers(replicas, size=len(questions))


def route_by_document(questions: np.ndarray, replicas: int) -> np.ndarray:
    """Route by consistent hash on the smallest sha256 of the question's documents."""
    return _owners(questions, replicas)[:, 0]


def route_to_idler_of_two(questions: np.ndarray, replicas: int) -> np.ndarray:
    """Route to that one of the first two replicas on the ring which has had fewer questions."""
    loads = [0] * replicas
    chosen = np.empty(len(questions), dtype=int)
    for number, (first, second) in enumerate(_owners(questions, replicas)):
        chosen[number] = first if loads[first] <= loads[second] else second
        loads[chosen[number]] += 1
    return chosen


ROUTERS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "random": route_randomly,
    "consistent hash on min(sha256(document))": route_by_document,
    "the less busy of the first two on the ring": route_to_idler_of_two,
}


def simulate(questions: np.ndarray, owners: np.ndarray, replicas: int, capacity: int) -> Counts:
    """Count what the second half of the questions finds in the replicas' memories of ``capacity`` documents."""
    memories = [Memory(capacity) for _ in range(replicas)]
    hits = [memories[owner].read(row) for owner, row in zip(owners.tolist(), questions.tolist(), strict=True)]
    half = len(questions) // 2
    loads = np.bincount(owners[half:], minlength=replicas)
    return Counts(questions[half:].size, sum(hits[half:]), float(loads.max() / loads.mean()))


def expected_hit_rate(traffic: Traffic, capacity: float) -> float:
    """Return the hit rate of one memory of ``capacity`` documents by Che's approximation."""
    ranks, numbers = _grouped_ranks(traffic.documents // traffic.pool)
    weights = ranks**-traffic.exponent
    rates = weights / (weights * numbers).sum() * traffic.per_question / traffic.pool  # of a document, per question
    numbers = numbers * traffic.pool
    if capacity >= numbers.sum():
        return 1.0
    low, high = 1e-3, 1e30  # questions whose documents fill the memory, found by bisection of the exponent
    while high / low > 1 + 1e-9:
        middle = (low * high) ** 0.5
        fits = (numbers * -np.expm1(-rates * middle)).sum() <= capacity
        low, high = (middle, high) if fits else (low, middle)
    return float((numbers * rates * -np.expm1(-rates * low)).sum() / (numbers * rates).sum())


def routers(args: argparse.Namespace) -> Table:
    """Hit rates of the routers by the memory of all replicas together."""
    traffic = Traffic(args.documents, args.pool, args.per_question, args.exponent, args.questions)
    questions = draw_questions(traffic)
    shares = (0.01, 0.05, 0.2)
    rows = [["router", *(f"memory for {share:.0%}" for share in shares), "busiest replica"]]
    for name, route in ROUTERS.items():
        owners = route(questions, args.replicas)
        counts = [
            simulate(questions, owners, args.replicas, round(s * traffic.documents / args.replicas)) for s in shares
        ]
        rows.append([name, *(f"{100 * one.hit_rate:.1f} %" for one in counts), f"{counts[0].busiest:.2f} x mean"])
    together = np.zeros(len(questions), dtype=int)
    pooled = [simulate(questions, together, 1, round(s * traffic.documents)) for s in shares]
    rows.append(["one shared memory (upper bound)", *(f"{100 * one.hit_rate:.1f} %" for one in pooled), ""])
    return rows


def balance(args: argparse.Namespace) -> Table:
    """The busiest replica's questions over the mean, by number of replicas."""
    questions = draw_questions(Traffic(args.documents, args.pool, args.per_question, args.exponent, args.questions))
    numbers = (4, 16, 64, 256)
    rows = [["router", *(f"{number} replicas" for number in numbers)]]
    for name, route in ROUTERS.items():
        loads = [np.bincount(route(questions, number), minlength=number) for number in numbers]
        rows.append([name, *(f"{load.max() / load.mean():.1f} x mean" for load in loads)])
    return rows


def corpus(args: argparse.Namespace) -> Table:
    """Hit rates and store traffic by size of the corpus, by Che's approximation."""
    size = passage_bytes(MODELS[MODEL], "raw")
    rows = [["passages, router", "replicas", "hits", "store requests/s", "bytes/s from the store", "per replica"]]
    for documents, replicas in zip(CORPORA, args.fleet, strict=True):
        traffic = Traffic(documents, args.pool, args.per_question, args.exponent, 0)
        own = args.memory * 1e9 / size
        for name, capacity in (("random", own), ("one shared memory", own * replicas)):
            hits = expected_hit_rate(traffic, capacity)
            requests = (1 - hits) * args.per_question * args.rate * replicas
            rows.append([f"{amount(documents)}, {name}", str(replicas), f"{100 * hits:.1f} %", short(requests),
                         scaled(requests * size), scaled(requests * size / replicas)])  # fmt: skip
    return rows


TABLES = {"routers": routers, "balance": balance, "corpus": corpus}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--table", choices=list(TABLES), help="table to print (default: all)")
    add("--documents", type=int, default=100_000, help="documents of the simulation (default: 100000)")
    add("--pool", type=int, default=30, help="documents of a topic (default: 30)")
    add("--per-question", type=int, default=20, help="documents of a question (default: 20)")
    add("--exponent", type=float, default=1.0, help="exponent of Zipf's law over topics (default: 1)")
    add("--questions", type=int, default=20_000, help="questions of the simulation (default: 20000)")
    add("--replicas", type=int, default=8, help="replicas of the simulation (default: 8)")
    add("--fleet", type=int, nargs=3, default=[8, 64, 512], help="replicas for each corpus (default: 8 64 512)")
    add("--memory", type=float, default=512.0, help="GB for KVs in each replica's memory (default: 512)")
    add("--rate", type=float, default=2.0, help="questions per second and replica (default: 2)")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    for name in [args.table] if args.table else TABLES:
        print(markdown(TABLES[name](args)), end="\n\n")


def _owners(questions: np.ndarray, replicas: int) -> np.ndarray:
    """Return the first two different replicas on the ring for each question, shape (N, 2)."""
    points = sorted(
        (_hash(f"replica {replica} {point}"), replica) for replica in range(replicas) for point in range(POINTS)
    )
    ring = np.array([point for point, _ in points], dtype=np.uint64)
    owners = np.array([replica for _, replica in points])
    nexts = np.array([_next_other(owners, place) for place in range(len(owners))])
    smallest = document_hashes(int(questions.max()) + 1)[questions].min(axis=1)
    places = np.searchsorted(ring, smallest) % len(ring)
    return np.stack([owners[places], nexts[places]], axis=1)


def _next_other(owners: np.ndarray, place: int) -> int:
    following = (int(owners[(place + step) % len(owners)]) for step in range(1, len(owners)))
    return next((owner for owner in following if owner != owners[place]), int(owners[place]))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _grouped_ranks(topics: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ranks from 1 to ``topics``, and how many topics each stands for."""
    if topics <= EXACT_RANKS:
        return np.arange(1.0, topics + 1), np.ones(topics)
    edges = np.geomspace(EXACT_RANKS + 1, topics + 1, GROUPS + 1)
    ranks = np.concatenate([np.arange(1.0, EXACT_RANKS + 1), np.sqrt(edges[1:] * edges[:-1])])
    return ranks, np.concatenate([np.ones(EXACT_RANKS), np.diff(edges)])


if __name__ == "__main__":
    main()
