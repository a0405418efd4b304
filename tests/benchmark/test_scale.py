"""The tables of docs/scale.md, and the simulated replicas against brute force, Che's approximation and real stores."""

import random
import sys
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from store_generators import over
from tiny import backbone

from kvfusion_rag import DocumentStore, MemoryStore
from kvfusion_rag.model.backbone import Backbone
from kvfusion_rag.text.settings import ModelSettings

ROOT = Path(__file__).parent.parent.parent
sys.path.append(str(ROOT / "benchmarks"))  # its scripts import each other

import scale_costs  # noqa: E402
import simulate_cluster  # noqa: E402
from simulate_cluster import Memory, Traffic, draw_questions, expected_hit_rate, simulate  # noqa: E402

TRAFFIC = Traffic(documents=3000, pool=10, per_question=5, exponent=1.0, questions=4000)


@pytest.mark.parametrize("script", [scale_costs, simulate_cluster], ids=lambda script: script.__name__)
def test_page_has_the_tables_that_the_scripts_print(script):
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    for name, table in script.TABLES.items():
        assert scale_costs.markdown(table(script.parse([]))) in page, name


@pytest.mark.parametrize("capacity", [1, 7, 40])
def test_memory_equals_brute_force(capacity):
    """A document is in memory if fewer than ``capacity`` others were used since its last use."""
    rng = random.Random(capacity)
    trace = [rng.choice([rng.randrange(10), rng.randrange(100)]) for _ in range(2000)]
    memory = Memory(capacity)
    for now, document in enumerate(trace):
        last = max((time for time in range(now) if trace[time] == document), default=None)
        is_kept = last is not None and len(set(trace[last + 1 : now])) < capacity
        assert memory.read([document]) == is_kept


def test_hit_rate_rises_with_memory_and_with_affinity():
    questions = draw_questions(TRAFFIC)
    for name, route in simulate_cluster.ROUTERS.items():
        owners = route(questions, 4)
        rates = [simulate(questions, owners, 4, capacity).hit_rate for capacity in (10, 40, 160, 750)]
        assert all(less < more for less, more in pairwise(rates)), name
        pooled = simulate(questions, np.zeros(len(questions), dtype=int), 1, 4 * 40).hit_rate
        assert rates[1] < pooled
    by_document = simulate(questions, simulate_cluster.route_by_document(questions, 4), 4, 40)
    at_random = simulate(questions, simulate_cluster.route_randomly(questions, 4), 4, 40)
    assert by_document.hit_rate > 1.3 * at_random.hit_rate and by_document.busiest > at_random.busiest


@pytest.mark.parametrize("capacity", [100, 400, 1500])
@pytest.mark.parametrize("exponent", [0.7, 1.2])
def test_one_memory_has_the_hit_rate_of_ches_approximation(capacity, exponent):
    traffic = TRAFFIC._replace(exponent=exponent, questions=20_000)
    questions = draw_questions(traffic)
    found = simulate(questions, np.zeros(len(questions), dtype=int), 1, capacity)
    assert found.hit_rate == pytest.approx(expected_hit_rate(traffic, capacity), abs=0.02)


def test_approximation_of_grouped_ranks_equals_that_of_single_ones(monkeypatch):
    traffic = TRAFFIC._replace(documents=1_000_000)
    exact = expected_hit_rate(traffic, 20_000)
    monkeypatch.setattr(simulate_cluster, "EXACT_RANKS", 1000)
    assert expected_hit_rate(traffic, 20_000) == pytest.approx(exact, abs=1e-4)


def test_consistent_hash_moves_few_documents_to_a_new_replica():
    questions = draw_questions(TRAFFIC)
    before, after = (simulate_cluster.route_by_document(questions, number) for number in (8, 9))
    assert set(after[before != after]) == {8}  # nothing moves between the old ones


@pytest.mark.parametrize("router", simulate_cluster.ROUTERS)
def test_generators_find_as_many_documents_in_memory_as_the_simulation(router):
    """Three generators with a memory each answer the same questions as three simulated replicas."""
    replicas, capacity = 3, 8
    traffic = Traffic(documents=40, pool=5, per_question=3, exponent=1.0, questions=30)
    texts, size = _documents_of_equal_size(traffic.documents)
    stores = [DocumentStore(MemoryStore(capacity * size)) for _ in range(replicas)]
    generators = [over(store, model=_model()) for store in stores]
    questions = np.sort(draw_questions(traffic), axis=1)  # the engine reads documents in the order of their keys
    owners = simulate_cluster.ROUTERS[router](questions, replicas)
    memories = [Memory(capacity) for _ in range(replicas)]
    for owner, row in zip(owners.tolist(), questions.tolist(), strict=True):
        sources = (
            generators[owner]
            .answer("who?", [texts[number] for number in row], mode="fusion", max_new_tokens=1)
            .sources
        )
        assert [source.origin for source in sources].count("memory") == memories[owner].read(row)
    assert sum(store.memory.evictions for store in stores) > 0


@cache
def _model() -> Backbone:
    """Return a tiny model whose prompts have no text in front of the documents, which a memory would keep too."""
    settings = ModelSettings(
        document_template="{text}", question_template="{question}", prompt_template=None, tuned=True
    )
    return backbone("llama", settings=settings)


@cache
def _documents_of_equal_size(number: int) -> tuple[list[str], int]:
    """Return documents whose KVs have the same size, in the order of their store keys, and the size in bytes."""
    memory = MemoryStore()
    generator = over(DocumentStore(memory), model=_model())
    keys: dict[str, str] = {}
    for n in range(4 * number):
        generator.prefill([f"the mill {chr(97 + n // 26)}{chr(97 + n % 26)} runs"])
        (key,) = memory._entries.keys() - keys
        keys[key] = f"the mill {chr(97 + n // 26)}{chr(97 + n % 26)} runs"
    sizes = {key: memory._entries[key].nbytes for key in keys}
    ((size, _),) = Counter(sizes.values()).most_common(1)
    texts = [keys[key] for key in sorted(keys) if sizes[key] == size][:number]
    assert len(texts) == number
    return texts, size
