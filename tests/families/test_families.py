"""The compatibility table: verdicts, reasons, and the laws of fusion on a small random model of every family.

The reference is attention that tests write out by hand, so these tests do not trust the code under test.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from compatibility_table import PAGE, page, verdict
from families import FAMILIES, Family
from family_laws import ALLOWED, LAWS, LONG, QUICK, SAME_BITS, Subject, relative_error
from reference_attention import Row, run
from tiny import tokenizer

from kvfusion_rag import KVFusionGenerator, UnsupportedModelError
from kvfusion_rag.model.families.table import FamilyRow, rows_of, structure_of, table
from kvfusion_rag.model.support import routes_tokens

ROWS: dict[str, FamilyRow] = {row.family: row for row in table()}
ACCEPTED = [family for family in FAMILIES if family.name in ROWS and ROWS[family.name].accepted]
REFUSED = [family for family in FAMILIES if family not in ACCEPTED]
IDS = torch.randint(10, 390, (1, 150), generator=torch.Generator().manual_seed(1))


def name_of(family: Family) -> str:
    return family.name


@pytest.fixture(scope="module", params=ACCEPTED, ids=name_of)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    """The models of one accepted family, which pytest keeps for all tests of that family."""
    found, reason = verdict(request.param, tmp_path_factory.mktemp("family"))
    assert found is not None, f"the table says accepted, but it is refused: {reason}"
    return found


# The table


def test_table_has_every_family_in_order():
    assert list(ROWS) == [family.name for family in FAMILIES]
    assert len(ACCEPTED) >= 40 and len({family.model_type for family in FAMILIES}) >= 75
    for family in FAMILIES:
        row = ROWS[family.name]
        facts = (row.model_type, row.example, row.note, row.structure)
        assert facts == (family.model_type, family.example, family.note, structure_of(family.config()))


def test_figures_keep_the_laws():
    for row in ROWS.values():
        assert row.accepted == (row.reason is None) == bool(row.deviations)
        for law, deviation in row.deviations.items():
            assert deviation is None or deviation <= (0 if law in SAME_BITS else ALLOWED), f"{row.family}: {law}"
        assert not row.accepted or list(row.deviations) == list(LAWS)


def test_page_is_the_table():
    assert PAGE.read_text(encoding="utf-8") == page(ROWS.values()), "run make families"


@pytest.mark.parametrize("family", REFUSED, ids=name_of)
def test_refused_families_have_the_reason_of_the_table(family, tmp_path):
    found, reason = verdict(family, tmp_path)
    assert found is None, "the table says refused, but it is accepted; run make families"
    assert reason == ROWS[family.name].reason, "run make families"
    assert rows_of(family.config())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=name_of)
def test_saved_models_get_the_same_verdict(family, tmp_path):
    """A user loads files; the other tests build models in memory."""
    tokenizer("byte-bpe").save_pretrained(tmp_path)
    row = ROWS[family.name]
    if row.accepted or (row.reason is not None and "gate" in row.reason):
        family.network().save_pretrained(tmp_path)
    else:
        family.config().save_pretrained(tmp_path)
    if row.accepted:
        assert KVFusionGenerator.from_pretrained(tmp_path, device="cpu", dtype="float32").gate.passed
    else:
        with pytest.raises(UnsupportedModelError):
            KVFusionGenerator.from_pretrained(tmp_path, device="cpu", dtype="float32")


# The reference


def test_reference_is_the_models_own_attention_on_one_text(subject):
    """Also beyond the window, where the model's masks count slots, which are positions here. A wrong window shows."""
    row, config = Row.contiguous(IDS[0].tolist()), subject.reference.config
    with torch.no_grad():
        expected = subject.plain(input_ids=IDS, use_cache=False).logits[0].float()
    assert relative_error(run(subject.reference, row), expected) < ALLOWED
    if "sliding" in structure_of(config):
        window = config.sliding_window
        config.sliding_window = window + 1
        wrong = run(subject.reference, row)
        config.sliding_window = window
        assert relative_error(wrong, expected) > 100 * ALLOWED


def test_owners_and_positions_decide_who_sees_whom():
    row = Row.of([7], [[1, 2], [3]], [1, 1], [4, 5], 3)
    assert row.positions.tolist() == [0, 1, 2, 1, 3, 4] and row.context == 4
    full = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 0, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1] * 6,
    ]
    assert row.sees("full_attention", None).int().tolist() == full
    assert row.sees("sliding_attention", 2).int().tolist()[-2:] == [[0, 0, 1, 0, 1, 0], [0, 0, 0, 0, 1, 1]]
    assert row.sees("chunked_attention", 3).int().tolist()[-2:] == [[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1]]


# The laws


@pytest.mark.parametrize("law", QUICK)
def test_law(subject, law):
    deviation = QUICK[law](subject)
    assert deviation is not None and deviation <= (0 if law in SAME_BITS else ALLOWED)


@pytest.mark.slow
@pytest.mark.parametrize("law", LONG)
def test_long_law(subject, law):
    deviation = LONG[law](subject)
    assert (deviation is None) == (ROWS[subject.family.name].deviations[law] is None)
    assert deviation is None or deviation <= (0 if law in SAME_BITS else ALLOWED)


def test_experts_are_seen_in_the_configuration(subject):
    """Other documents of a pass would change the shapes of the experts' products, and so a document's bits."""
    has_experts = any("expert" in name for name, _ in subject.plain.named_parameters())
    assert routes_tokens(subject.plain.config) == has_experts


def test_rows_can_be_written_as_json():
    assert [FamilyRow(**row) for row in json.loads(json.dumps([row.to_dict() for row in table()]))] == list(table())
