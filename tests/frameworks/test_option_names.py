"""Options of the LangChain and LlamaIndex components: a wrong name is an error with the right one, which works."""

from __future__ import annotations

import logging

import pytest
import tiny

from kvfusion_rag import InvalidInputError, UnknownOptionError

DOCUMENTS = ["the river runs past an old mill", "two grey doves sleep"]


@pytest.fixture(scope="module")
def gen():
    return tiny.generator("llama", store="memory", max_new_tokens=3)


def langchain(name: str):
    return getattr(pytest.importorskip("langchain_kvfusion"), name)


def llama_index(name: str):
    pytest.importorskip("llama_index.core")
    return getattr(pytest.importorskip("llama_index_kvfusion"), name)


CLASSES = [(langchain, "KVFusionLLM"), (langchain, "ChatKVFusion"), (llama_index, "KVFusionLlamaIndexLLM")]
components = pytest.mark.parametrize(("of", "name"), CLASSES, ids=[name for _, name in CLASSES])


@components
def test_misspelt_name_is_an_error_with_the_nearest_one(gen, model_folder, of, name):
    kind = of(name)
    with pytest.raises(UnknownOptionError, match=f"'temprature' is not an option of {name}; .* is 'temperature'"):
        kind(generator=gen, temprature=0.5)
    with pytest.raises(UnknownOptionError, match="the nearest option is 'temperature'"):
        kind.from_model_id(model_folder, temprature=0.5)
    made = kind(generator=gen)
    call = getattr(made, "invoke", None) or made.complete
    with pytest.raises(UnknownOptionError, match="the nearest option is 'temperature'"):
        call("who?", documents=DOCUMENTS, temprature=0.5)


@components
def test_names_of_other_libraries_are_explained(gen, model_folder, of, name):
    kind = of(name)
    made = kind(generator=gen)
    call = getattr(made, "invoke", None) or made.complete
    for wrong, right in (("do_sample", "temperature"), ("max_length", "max_new_tokens"), ("stop_strings", "stop")):
        with pytest.raises(UnknownOptionError, match=right):
            kind(generator=gen, **{wrong: 1})
        with pytest.raises(UnknownOptionError, match=right):
            call("who?", documents=DOCUMENTS, **{wrong: 1})
    for right in ({"temperature": 0.5}, {"max_new_tokens": 2}, {"stop": ["x"]}):
        assert call("who?", documents=DOCUMENTS, **right) and kind(generator=gen, **right)
    with pytest.raises(UnknownOptionError, match="dtype='float32'"):
        kind.from_model_id(model_folder, torch_dtype="float32")


@components
@pytest.mark.parametrize("alias", ["model", "model_name", "model_id"])
def test_component_without_a_generator_says_how_to_load_one(model_folder, of, name, alias):
    kind, folder = of(name), str(model_folder)
    if alias != "model_id" or of is langchain:
        with pytest.raises(InvalidInputError) as raised:
            kind(**{alias: folder})
        assert f"load a model with {name}.from_model_id({folder!r})" in str(raised.value)
    with pytest.raises(InvalidInputError, match=f"load a model with {name}.from_model_id"):
        kind()
    assert kind.from_model_id(folder)


@pytest.mark.parametrize("name", ["KVFusionLLM", "ChatKVFusion"])
@pytest.mark.parametrize("alias", ["model", "model_name"])
def test_langchain_accepts_other_names_of_the_model(gen, model_folder, name, alias):
    kind = langchain(name)
    assert kind.from_model_id(**{alias: model_folder}, device="cpu").model_id == model_folder.name
    assert kind(generator=gen, **{alias: gen.model_id}).model_id == gen.model_id


def test_llama_index_says_where_options_of_loading_belong(model_folder):
    kind = llama_index("KVFusionLlamaIndexLLM")
    with pytest.raises(InvalidInputError, match=r"pass model_options=\{'device': 'cpu'\}"):
        kind.from_model_id(model_folder, device="cpu")
    assert kind.from_model_id(model_folder, model_options={"device": "cpu"})
    with pytest.raises(InvalidInputError, match=r"'model' is named model_id here; call KVFusionLlamaIndexLLM.from_mo"):
        kind.from_model_id(model=str(model_folder))


def test_synthesizer_names_the_nearest_option_and_logs_nothing(gen, caplog, capsys):
    make, llm = llama_index("KVFusionSynthesizer"), llama_index("KVFusionLlamaIndexLLM")(gen)
    with pytest.raises(UnknownOptionError, match="the nearest option is 'text_qa_template'"):
        make(llm, qa_template="x")
    with caplog.at_level(logging.DEBUG):
        make(llm=llm)
    assert not caplog.records and capsys.readouterr() == ("", "")


def test_query_engine_with_only_our_llm_does_not_say_that_there_are_no_documents(caplog):
    """LlamaIndex's own synthesizer sends one joined prompt to the LLM."""
    llm = llama_index("KVFusionLlamaIndexLLM")(tiny.untuned(max_position_embeddings=4096), max_new_tokens=3)
    from llama_index.core import MockEmbedding, VectorStoreIndex
    from llama_index.core.schema import TextNode

    index = VectorStoreIndex([TextNode(text=text) for text in DOCUMENTS], embed_model=MockEmbedding(embed_dim=4))
    with caplog.at_level(logging.WARNING):
        assert index.as_query_engine(llm=llm).query("who?") is not None
    [record] = caplog.records
    assert record.message.startswith("no separate documents: those in the prompt")
