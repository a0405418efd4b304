"""Conditions: where documents are put, and what rows allow."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from readers import row, rows

from kvfusion_rag.errors import InvalidInputError
from kvfusion_rag.evaluation.orders import (
    NO_GOLD,
    ORIGINAL,
    SHUFFLED,
    Condition,
    arrange,
    long_context_order,
    plan_conditions,
    usable_rows,
)

gold_flags = st.lists(st.booleans(), min_size=1, max_size=24)
BARE = "row 'bare' has no gold passage to put at a slot."


@given(gold_flags.filter(any), st.data())
def test_gold_passage_is_at_its_slot_and_the_others_keep_their_order(gold, data):
    made = row(gold)
    documents = data.draw(st.integers(sum(gold), len(gold)))
    slot = data.draw(st.integers(1, documents))
    order = arrange(made, Condition("slot", slot), documents, 0)
    wanted = [index for index, is_gold in enumerate(gold) if is_gold]
    first = min(slot - 1, documents - len(wanted))
    assert order[first : first + len(wanted)] == wanted
    others = [index for index in order if not gold[index]]
    assert others == [index for index, is_gold in enumerate(gold) if not is_gold][: documents - len(wanted)]
    if len(wanted) == 1:
        assert order.index(wanted[0]) == slot - 1


@given(gold_flags, st.data(), st.integers())
def test_all_conditions_of_a_row_have_the_same_documents(gold, data, seed):
    made = row(gold)
    documents = data.draw(st.integers(max(1, sum(gold)), len(gold)))
    original = arrange(made, ORIGINAL, documents, seed)
    shuffled = arrange(made, SHUFFLED, documents, seed)
    assert len(original) == documents and original == sorted(set(original))
    assert sorted(shuffled) == original
    assert sorted(arrange(made, Condition("slot", 1), documents, seed)) == original
    assert arrange(made, NO_GOLD, documents, seed) == [index for index in original if not gold[index]]
    assert arrange(made, Condition("top", documents), documents, seed) == list(range(documents))
    assert shuffled == arrange(made, SHUFFLED, documents, seed)


def test_shuffling_depends_on_seed_and_row_and_moves_the_gold_passage():
    made = rows(200, 10)
    places = [arrange(one, SHUFFLED, 10, 0).index(0) for one in made]
    assert set(places) == set(range(10))
    assert places != [arrange(one, SHUFFLED, 10, 1).index(0) for one in made]


@given(st.lists(st.integers(), unique=True, max_size=40))
def test_long_context_order_has_the_best_documents_at_the_ends(items):
    ordered = long_context_order(items)
    assert sorted(ordered) == sorted(items)
    ranks = [items.index(item) for item in ordered]
    assert all(max(ranks[left], ranks[-1 - left]) <= 2 * left + 1 for left in range(len(ranks) // 2))
    if len(items) > 1:
        assert {ordered[0], ordered[-1]} == set(items[:2])


@pytest.mark.parametrize("count", [1, 2, 5, 10])
def test_long_context_order_equals_that_of_llama_index(count):
    postprocessor = pytest.importorskip("llama_index.core.postprocessor")
    schema = pytest.importorskip("llama_index.core.schema")
    nodes = [schema.NodeWithScore(node=schema.TextNode(id_=str(n)), score=float(-n)) for n in range(count)]
    theirs = postprocessor.LongContextReorder().postprocess_nodes(nodes)
    assert [int(node.node.node_id) for node in theirs] == long_context_order(range(count))


def names(plan) -> list[str]:
    return [condition.name for condition in plan.conditions]


def test_plan_contains_what_the_rows_allow():
    plan = plan_conditions(rows(2, 10))
    assert names(plan) == [*("slot:1", "slot:5", "slot:10", "original", "shuffled", "top:5", "top:10", "no-gold")]
    assert (plan.documents, plan.notes) == (10, ())
    assert names(plan_conditions(rows(2, 40), ["slots", "slot:5", "top"], 20)) == [
        *("slot:1", "slot:5", "slot:10", "slot:15", "slot:20", "top:5", "top:10", "top:20", "top:40")
    ]


def test_default_plan_notes_what_it_leaves_out():
    plan = plan_conditions([row([False, False], "without")])
    assert names(plan) == ["original", "shuffled", "no-gold"]
    assert len(plan.notes) == 2
    assert "slots left out: row 'without' has no gold passage" in plan.notes[0]


def test_several_gold_passages_are_noted():
    made = [*rows(2, 6), row([False, True, False, False, True, False], "hops")]
    (note,) = plan_conditions(made, ["slots"]).notes
    assert note.startswith("1 of 3 rows have several gold passages, which are placed together")
    assert arrange(made[2], Condition("slot", 2), 6, 0) == [0, 1, 4, 2, 3, 5]
    assert arrange(made[2], Condition("slot", 6), 6, 0) == [0, 2, 3, 5, 1, 4]
    assert plan_conditions(made, ["original"]).notes == ()


@pytest.mark.parametrize(
    ("made", "wanted", "documents", "message"),
    [
        ([], None, None, "no rows"),
        ([row([])], None, None, "row 'r' has no passages"),
        (rows(2, 3), None, 4, "documents is 4, but row 'q0' has 3 passages"),
        ([row([True, True, False])], None, 1, "documents is 1, but row 'r' has 2 gold passages"),
        (rows(), ["sideways"], None, "condition is 'sideways', but it must be one of slots, original"),
        (rows(), ["slot:x"], None, "condition is 'slot:x'"),
        (rows(), ["slot:6"], None, "condition is slot:6, but its number must be from 1 to 5"),
        (rows(), ["slot:0"], None, "condition is slot:0, but"),
        (rows(), ["top:6"], None, "condition is top:6, but"),
        (rows(2, 3), ["top"], None, "top starts at 5 documents, but a row has only 3"),
        ([*rows(), row([False] * 5, "bare")], ["slot:1"], None, "row 'bare' has no gold passage"),
        (rows(2, 1), ["no-gold"], None, "row 'q0' has only gold passages"),
    ],
)
def test_impossible_conditions_raise(made, wanted, documents, message):
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        plan_conditions(made, wanted, documents)


def test_rows_with_too_few_passages_can_be_left_out():
    mixed = [row([True, False], "short"), *rows(3, 6), row([False] * 6, "bare")]
    kept, (note,) = usable_rows(mixed)
    assert kept == mixed[1:4]
    assert note.startswith("2 of 5 rows left out, the first because top starts at 5 documents")
    assert usable_rows(mixed, ["slots"], 2) == (mixed[:4], ("1 of 5 rows left out, the first because " + BARE,))
    assert usable_rows(mixed, ["original"]) == (mixed, ())
    with pytest.raises(InvalidInputError, match="5 of 5 rows left out, the first because documents is 7"):
        usable_rows(mixed, None, 7)


def test_rows_of_different_length_are_noted():
    plan = plan_conditions([*rows(2, 6), *rows(1, 3)], ["original"])
    assert plan.notes == ("rows have 3 to 6 passages, and every question gets 3 documents.",)
    assert plan_conditions([*rows(2, 6), *rows(1, 3)], ["original"], 3).notes == ()
