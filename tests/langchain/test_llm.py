"""KVFusionLLM: prompts, messages, results, streams, errors and callbacks."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import pytest

pytest.importorskip("langchain_core")

from conversation_fakes import turns
from fakes import RecordingGenerator
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.prompt_values import ChatPromptValue
from langchain_models import DEFAULTS, call_all

import kvfusion_rag
from kvfusion_rag import Document, DocumentsPlace, InvalidInputError, MissingDependencyError
from langchain_kvfusion import KVFusionLLM
from langchain_kvfusion.framing import frame


class Recorder(BaseCallbackHandler):
    """Records the calls of callbacks."""

    def __init__(self) -> None:
        self.starts: list[dict[str, Any]] = []
        self.tokens: list[Any] = []
        self.ends: list[Any] = []
        self.errors: list[BaseException] = []

    def on_llm_start(self, serialized: Any, prompts: list[str], **kwargs: Any) -> None:
        self.starts.append({"serialized": serialized, "prompts": prompts, **kwargs})

    def on_llm_new_token(self, token: str, *, chunk: Any = None, **kwargs: Any) -> None:
        self.tokens.append((token, chunk))

    def on_llm_end(self, response: Any, **kwargs: Any) -> None:
        self.ends.append(response)

    def on_llm_error(self, error: BaseException, **kwargs: Any) -> None:
        self.errors.append(error)


class AsyncRecorder(AsyncCallbackHandler):
    """Records tokens on the event loop."""

    def __init__(self) -> None:
        self.tokens: list[str] = []

    async def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
        self.tokens.append(token)


# Options


async def test_plain_prompt_is_the_question():
    fake = RecordingGenerator()
    assert set(await call_all(KVFusionLLM(generator=fake), "Two\n\nparagraphs")) == {"in lima"}
    for call in fake.calls:
        assert (call.question, call.documents) == ("Two\n\nparagraphs", [])
        assert turns(call) == [("user", "Two\n\nparagraphs")]
        assert call.options == DEFAULTS


def test_unknown_fields_and_other_models_are_rejected():
    with pytest.raises(ValueError, match="max_length"):
        KVFusionLLM(generator=RecordingGenerator(), max_length=3)
    with pytest.raises(ValueError, match="max_new_tokens"):
        KVFusionLLM(generator=RecordingGenerator(), max_tokens=3, max_new_tokens=4)
    with pytest.raises(InvalidInputError, match="other/model"):
        KVFusionLLM(generator=RecordingGenerator(), model_id="other/model")


def test_from_model_id_separates_loading_options_from_fields(monkeypatch):
    loaded = {}

    class Loader(kvfusion_rag.KVFusionGenerator):
        @staticmethod
        def from_pretrained(model: Any, **options: Any) -> RecordingGenerator:
            loaded.update(options, model=model)
            return RecordingGenerator()

    monkeypatch.setattr(kvfusion_rag, "KVFusionGenerator", Loader, raising=False)
    llm = KVFusionLLM.from_model_id(
        "org/model", device="cpu", adapter="a", temperature=0.5, max_new_tokens=3, tags=["t"]
    )
    assert loaded == {"model": "org/model", "device": "cpu", "adapter": "a"}
    assert (llm.model_id, llm.temperature, llm.max_tokens, llm.tags) == ("fake/model", 0.5, 3, ["t"])
    KVFusionLLM.from_model_id()
    assert loaded["model"] is None


# Documents of a call


async def test_documents_of_a_call_are_passed_on_by_all_methods():
    fake = RecordingGenerator()
    llm = KVFusionLLM(generator=fake)
    documents = ["x", {"text": "y", "id": "i"}]
    await call_all(llm, "Be brief.\n\nQuestion: Who?\nAnswer:", documents=documents)
    await call_all(llm.bind(documents=documents), "Be brief.\n\nQuestion: Who?\nAnswer:")
    assert len(fake.calls) == 12
    for call in fake.calls:
        assert call.documents == [Document("x"), Document("y", "i")]
        assert (call.question, turns(call)) == ("Who?", [("user", "Be brief.\n\nQuestion: Who?\nAnswer:")])


async def test_bare_question_with_documents_has_no_prompt():
    fake = RecordingGenerator()
    await call_all(KVFusionLLM(generator=fake), "Who?", documents=["x"])
    assert {(call.question, call.prompt) for call in fake.calls} == {("Who?", None)}


# Chat messages


@pytest.mark.parametrize("wrap", [list, lambda messages: ChatPromptValue(messages=messages)])
async def test_documents_in_messages_are_extracted(wrap):
    fake = RecordingGenerator()
    blocks: list[Any] = [
        {"type": "text-plain", "text": "x", "title": "T", "id": "i", "mime_type": "text/plain"},
        {"type": "text", "text": "Who?"},
    ]
    messages = [SystemMessage("Be brief."), HumanMessage(blocks, additional_kwargs={"documents": ["y"]})]
    await call_all(KVFusionLLM(generator=fake), wrap(messages))
    for call in fake.calls:
        assert call.documents == [Document("y"), Document("x", "i", "T")]
        assert (call.question, turns(call)) == ("Who?", [("system", "Be brief."), ("user", "Who?")])


def test_messages_without_documents_are_unchanged():
    fake = RecordingGenerator()
    KVFusionLLM(generator=fake).invoke([("system", "Be brief."), ("human", "Line one.\n\nLine two?")])
    assert turns(fake.calls[0]) == [("system", "Be brief."), ("user", "Line one.\n\nLine two?")]
    assert fake.calls[0].question == "Line one.\n\nLine two?"


def test_framed_documents_in_messages_are_extracted():
    fake = RecordingGenerator()
    frames = f"{frame(Document('x'))}\n\n{frame(Document('y'))}"
    llm = KVFusionLLM(generator=fake)
    llm.invoke([SystemMessage(f"Be brief.\n\n{frames}"), HumanMessage("Who?")])
    llm.invoke([HumanMessage(f"Be brief.\n\n{frames}\n\nWho?")])
    assert [turns(call) for call in fake.calls] == [
        [("system", "Be brief.\n\n{documents}"), ("user", "Who?")],
        [("user", "Be brief.\n\n{documents}\n\nWho?")],
    ]
    for call in fake.calls:
        assert (call.texts, call.question) == (["x", "y"], "Who?")


def test_framed_string_is_one_user_message_with_a_place():
    fake = RecordingGenerator()
    frames = f"{frame(Document('x', title='T'))}\n{frame(Document('y'))}"
    KVFusionLLM(generator=fake).invoke(f" Be brief.\n{frames} \nQuestion: Who?\nAnswer: ")
    [call] = fake.calls
    assert turns(call) == [("user", " Be brief.\n{documents} \nQuestion: Who?\nAnswer: ")]
    assert call.prompt[0].documents == DocumentsPlace(11, "\n", titles=True)
    assert (call.texts, call.question) == (["x", "y"], "Who?")


@pytest.mark.parametrize(
    "content", [[{"type": "image_url", "image_url": "http://a"}], [{"type": "text-plain", "url": "http://a"}]]
)
def test_content_that_is_not_text_is_rejected(content):
    with pytest.raises(InvalidInputError, match=r"text"):
        KVFusionLLM(generator=RecordingGenerator()).invoke([HumanMessage(content)])


@pytest.mark.parametrize("documents", [None, ["x"]])
def test_conversation_that_ends_with_an_ai_message_becomes_one_text(documents):
    fake = RecordingGenerator()
    messages = [HumanMessage("Who?"), AIMessage([{"type": "text", "text": "Ada"}])]
    KVFusionLLM(generator=fake).invoke(messages, documents=documents)
    assert (turns(fake.calls[0]), fake.calls[0].question) == ([("user", "User: Who?\n\nAssistant: Ada")], "Who?")


def test_lone_system_message_becomes_a_user_message():
    fake = RecordingGenerator()
    frames = f"{frame(Document('x'))}\n\n{frame(Document('y'))}"
    KVFusionLLM(generator=fake).invoke([SystemMessage(f"Be brief.\n\n{frames}\n\nQuestion: Who?")])
    assert turns(fake.calls[0]) == [("user", "Be brief.\n\n{documents}\n\nQuestion: Who?")]
    assert (fake.calls[0].texts, fake.calls[0].question) == (["x", "y"], "Who?")


# Results


async def test_results_contain_usage_sources_and_citations():
    llm = KVFusionLLM(generator=RecordingGenerator())
    documents = [Document("born In Lima", "a", "T"), Document("born In Lima", "b")]
    usage = {
        "prompt_tokens": 7,
        "completion_tokens": 2,
        "total_tokens": 9,
        "document_tokens": 6,
        "cached_document_tokens": 0,
        "reasoning_tokens": 0,
    }
    for result in (
        llm.generate(["Where?"], documents=documents),
        await llm.agenerate(["Where?"], documents=documents),
    ):
        assert result.llm_output == {"token_usage": usage, "model_name": "fake/model"}
        info = result.generations[0][0].generation_info or {}
        assert info["usage"] == usage
        assert (info["mode"], info["finish_reason"], info["cited_text"]) == ("fusion", "stop", "In Lima")
        assert [(s["id"], s["origin"], s["tokens"], s["title"], s["duplicate_of"]) for s in info["sources"]] == [
            ("a", "computed", 3, "T", None),
            ("b", "computed", 3, None, "a"),
        ]
        assert info["citations"][0] == {"document_id": "a", "start": 5, "end": 12, "text": "In Lima", "place": None}
        json.dumps(info)
    total = llm.generate(["Where?", "Who?"], documents=documents).llm_output or {}
    assert total["token_usage"] == {name: 2 * count for name, count in usage.items()}


def test_streaming_reports_tokens_of_a_single_prompt():
    fake, recorder = RecordingGenerator(), Recorder()
    llm = KVFusionLLM(generator=fake, streaming=True, callbacks=[recorder])
    result = llm.generate(["q"], documents=["in lima"])
    assert result.generations[0][0].text == "in lima"
    assert (result.llm_output or {})["token_usage"]["completion_tokens"] == 2
    assert [token for token, _ in recorder.tokens] == ["in", " lima", ""]
    llm.batch(["p", "q"])
    assert [call.method for call in fake.calls] == ["stream", "answer_batch", "answer_batch"]


# Streams


async def test_callbacks_receive_each_chunk_before_it_is_yielded():
    recorder, on_loop = Recorder(), AsyncRecorder()
    llm = KVFusionLLM(generator=RecordingGenerator(), callbacks=[recorder, on_loop])
    seen = []
    for piece in llm.stream("q", documents=["x"]):
        seen.append(piece)
        assert [token for token, _ in recorder.tokens] == seen
    async for piece in llm.astream("q", documents=["x"]):
        seen.append(piece)
        assert [token for token, _ in recorder.tokens] == seen
    assert seen == ["in", " lima", ""] * 2
    assert all(chunk.text == token for token, chunk in recorder.tokens)
    assert on_loop.tokens[-3:] == seen[:3]
    for ended in recorder.ends:
        generation = ended.generations[0][0]
        assert generation.text == "in lima"
        assert generation.generation_info["usage"]["completion_tokens"] == 2
        assert generation.generation_info["finish_reason"] == "stop"


# Errors


@pytest.mark.parametrize("after", [0, 1])
async def test_generator_errors_are_raised_unchanged(after):
    error = RuntimeError("out of memory")
    fake, recorder = RecordingGenerator(error=error, fail_after=after), Recorder()
    llm = KVFusionLLM(generator=fake, callbacks=[recorder])
    for call in (lambda: llm.invoke("q"), lambda: list(llm.stream("q")), lambda: llm.batch(["p", "q"])):
        with pytest.raises(RuntimeError) as raised:
            call()
        assert raised.value is error
    with pytest.raises(RuntimeError):
        await llm.ainvoke("q")
    with pytest.raises(RuntimeError):
        assert [piece async for piece in llm.astream("q")] == []
    assert recorder.errors == [error] * 6  # one error for each run of a batch
    assert [stream.closed for stream in fake.streams] == [True, True]
    assert not recorder.ends


# Callbacks and metadata


async def test_runs_record_parameters_and_prompts():
    recorder = Recorder()
    llm = KVFusionLLM(generator=RecordingGenerator(), callbacks=[recorder], temperature=0.5)
    llm.batch(["p", "q"], documents=["x"], temperature=0.1, stop=["."])
    await llm.abatch(["p", "q"], documents=["x"], temperature=0.1, stop=["."])
    assert [start["batch_size"] for start in recorder.starts] == [2] * 4
    list(llm.stream("q", documents=["x"], temperature=0.1, stop=["."]))
    for start in recorder.starts:
        params = start["invocation_params"]
        assert (params["_type"], params["temperature"], params["stop"]) == ("kvfusion", 0.1, ["."])
        assert params["generator"] == {"model_id": "fake/model", "revision": None, "mode": "fusion"}
        assert "documents" not in params
        assert start["prompts"][0] in ("x\n\np", "x\n\nq")
        assert start["metadata"]["lc_versions"]["kvfusion-rag"] == kvfusion_rag.__version__
        assert "langchain-core" in start["metadata"]["lc_versions"]


def test_metadata_of_the_caller_is_kept():
    mine = {"project": "p", "lc_versions": {"mine": "1"}}
    llm = KVFusionLLM(generator=RecordingGenerator(), metadata=mine)
    versions = (llm.metadata or {})["lc_versions"]
    assert (llm.metadata or {})["project"] == "p"
    assert (versions["mine"], versions["kvfusion-rag"]) == ("1", kvfusion_rag.__version__)


def test_missing_langchain_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "langchain_kvfusion"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "langchain_core", None)
    with pytest.raises(MissingDependencyError, match=r'"\.\[langchain\]"'):
        importlib.import_module("langchain_kvfusion")
