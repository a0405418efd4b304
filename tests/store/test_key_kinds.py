"""Exact keys find only KVs with the bits that are computed here. Portable keys also find those of other machines."""

import pytest
import torch
from store_generators import DOCUMENTS, ask, origins, over
from stores import files_of
from tiny import backbone

from kvfusion_rag import DiskStore, DocumentStore, InvalidInputError, MemoryStore
from kvfusion_rag.engine.document_kvs.environments import relative_error
from kvfusion_rag.engine.engine import EngineOptions
from kvfusion_rag.model.fingerprint import essential_config
from kvfusion_rag.store import environments, open_store


@pytest.fixture
def threads():
    """Return a function that sets the number of threads, which is part of the environment."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def disk_only(folder, **options) -> DocumentStore:
    return DocumentStore(None, DiskStore(folder / "s", **options))


def test_store_behind_a_url_has_portable_keys_and_any_other_has_exact_ones(tmp_path):
    shared = over(open_store((tmp_path / "remote").as_uri(), local=tmp_path / "local"))
    assert {source.key_kind for source in ask(shared).sources} == {"portable"}
    for place in ("memory", tmp_path / "s"):
        assert {source.key_kind for source in ask(over(place)).sources} == {"exact"}
    joined = over("memory").answer("who?", DOCUMENTS, mode="concat", max_new_tokens=1)
    assert {source.key_kind for source in joined.sources} == {None}
    kept, dropped = over("memory").answer("who?", DOCUMENTS[:2], focus=1, max_new_tokens=1).sources
    assert kept.key_kind == dropped.key_kind == "exact" and kept.used != dropped.used


def test_unknown_kind_raises():
    with pytest.raises(InvalidInputError, match="key_kind is 'other', but it must be 'auto', 'exact' or 'portable'"):
        EngineOptions(key_kind="other")  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "expected"), [("portable", "disk"), ("exact", "computed")])
def test_documents_indexed_with_one_thread_are_served_with_two(tmp_path, threads, kind, expected):
    threads(1)
    over(disk_only(tmp_path), key_kind=kind).prefill(DOCUMENTS)
    threads(2)
    answer = ask(over(disk_only(tmp_path), key_kind=kind))
    assert origins(answer) == {expected}


@pytest.mark.parametrize("codec", ["raw", "v8"])
def test_kvs_of_another_environment_are_used_if_its_probe_agrees(tmp_path, monkeypatch, codec, caplog):
    model = backbone("llama")
    theirs = over(disk_only(tmp_path, codec=codec), model=model, key_kind="portable")
    monkeypatch.setattr(model, "environment", lambda: {"device": "their processor"})
    theirs.prefill(DOCUMENTS)
    monkeypatch.undo()
    ours = over(disk_only(tmp_path, codec=codec), key_kind="portable")
    with caplog.at_level("INFO", "kvfusion_rag"):
        assert origins(ask(ours)) == {"disk"}
    assert caplog.text.count("agree with this one's: relative error") == 1


def test_kvs_of_an_environment_whose_probe_differs_are_computed_again(tmp_path, monkeypatch, caplog):
    """A machine with faulty kernels fills the store under the right keys. None of its KVs is used."""
    model = backbone("llama")
    theirs = over(disk_only(tmp_path), model=model, key_kind="portable")
    monkeypatch.setattr(model, "environment", lambda: {"device": "a faulty processor"})
    prefill = model.prefill

    def faulty(*given):
        keys, values = prefill(*given)
        return keys, values * 1.001

    monkeypatch.setattr(model, "prefill", faulty)
    theirs.prefill(DOCUMENTS)
    monkeypatch.undo()
    stored = files_of(theirs.store.disk)
    ours = over(disk_only(tmp_path), key_kind="portable")
    answer = ask(ours)
    assert origins(answer) == {"computed"} and {source.miss for source in answer.sources} == {"environment"}
    assert answer.token_ids == ask(over(None)).token_ids
    assert set(stored) <= set(files_of(ours.store.disk))  # their files are not damaged
    assert caplog.text.count("differ from this one's by") == 1


def test_environment_without_a_probe_is_not_trusted(tmp_path, monkeypatch):
    model = backbone("llama")
    monkeypatch.setattr(model, "environment", lambda: {"device": "their processor"})
    over(disk_only(tmp_path), model=model, key_kind="portable").prefill(DOCUMENTS)
    monkeypatch.undo()
    for file in files_of(DiskStore(tmp_path / "s")):
        if file.stat().st_size == max(f.stat().st_size for f in files_of(DiskStore(tmp_path / "s"))):
            file.unlink()  # the probe is the longest text
            break
    assert "computed" in origins(ask(over(disk_only(tmp_path), key_kind="portable")))


def test_portable_keys_differ_for_other_weights_dtype_configuration_and_prefix(tmp_path):
    """Everything that changes a KV by more than rounding is in both kinds of keys."""
    gen = over(disk_only(tmp_path), key_kind="portable")
    ask(gen)
    same = backbone("llama")
    same.config.use_cache, same.config.transformers_version = False, "9.9"
    assert origins(ask(over(disk_only(tmp_path), model=same, key_kind="portable"))) == {"disk"}
    rotated = backbone("llama")
    rotated.config.rope_parameters = {**rotated.config.rope_parameters, "rope_theta": 1234.0}
    others = [rotated, backbone("llama", seed=1), backbone("llama", torch.bfloat16)]
    keys = {gen._engine.document_kvs.version}
    for model in others:
        other = over(disk_only(tmp_path), model=model, key_kind="portable")
        keys.add(other._engine.document_kvs.version)
    assert len(keys) == 4
    assert origins(ask(gen.with_settings(prefix="hear"))) == {"computed"}


def test_essential_configuration_has_the_numbers_that_attention_uses():
    config = backbone("llama").config
    essential = essential_config(config)
    assert {"model_type", "rope_parameters", "hidden_size", "rms_norm_eps"} <= set(essential)
    assert not {"transformers_version", "use_cache", "dtype", "eos_token_id"} & set(essential)


def test_prefetch_refuses_what_answers_refuse(tmp_path, monkeypatch):
    model = backbone("llama")
    monkeypatch.setattr(model, "environment", lambda: {"device": "their processor"})
    over(disk_only(tmp_path), model=model, key_kind="portable").prefill(DOCUMENTS)
    monkeypatch.setattr("kvfusion_rag.engine.document_kvs.environments.relative_error", lambda *_: 1.0)
    monkeypatch.setattr(model, "environment", lambda: {"device": "another"})
    gen = over(DocumentStore(MemoryStore(), DiskStore(tmp_path / "s")), model=model, key_kind="portable")
    assert gen.prefetch(DOCUMENTS).result(30) == 0


def test_relative_error_is_the_largest_of_all_layers():
    ids = (1, 2, 3)
    kvs = backbone("llama")
    gen = over(None, model=kvs)
    ((_, one),) = gen._engine.model.prefill([ids], None)
    other = type(one)(one.keys.clone(), one.values.clone(), ids)
    assert relative_error(other, one) == 0
    other.values[1, 0, 0, 0] += one.values[1].abs().max() / 8
    assert relative_error(other, one) == pytest.approx(1 / 8)


def test_facts_of_environments_are_written_beside_portable_documents_only(tmp_path):
    for kind, count in (("exact", 0), ("portable", 1)):
        gen = over(disk_only(tmp_path), key_kind=kind)
        gen.prefill(DOCUMENTS)
        assert len(environments(gen.store.disk)) == count
    ((digest, facts),) = environments(gen.store.disk).items()
    assert digest == gen._engine.document_kvs.environment and facts["threads"] == torch.get_num_threads()
    (record,) = (tmp_path / "s" / "environments").iterdir()
    record.write_text("[" * 100_000)
    assert environments(gen.store.disk) == {}
