"""A chain with our model instead of another one has the same prompt ids and the same greedy answer.

The expectation comes from the same stock chain with a recording fake model and LangChain's own document prompt: what
it was sent goes through ``apply_chat_template`` and ``generate`` of transformers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

pytest.importorskip("langchain_core")
pytest.importorskip("langchain_classic")
pytest.importorskip("langchain")
pytest.importorskip("langgraph")

import tiny
from langchain_classic.chains import RetrievalQA, create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.documents import Document as LangChainDocument
from langchain_core.language_models import FakeListChatModel, FakeListLLM
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import BasePromptTemplate, ChatPromptTemplate, MessagesPlaceholder, PromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_routes import ROUTES, format_docs
from pydantic import Field

from kvfusion_rag import KVFusionGenerator, MemoryStore, Message
from kvfusion_rag.fusion.torch_model import TorchModel
from kvfusion_rag.text.settings import default_settings
from langchain_kvfusion import (
    ChatKVFusion,
    KVFusionDocumentPrompt,
    KVFusionLLM,
    KVFusionPrompt,
    create_kvfusion_documents_chain,
    enable_document_capture,
)

QUESTION = "Who built it?"
FOUND = [
    LangChainDocument("Amara Osei built a lighthouse.", id="a", metadata={"title": "Lamp"}),
    LangChainDocument(" the miller counts sacks\n", id="b", metadata={"title": "Mill"}),
    LangChainDocument("two doves sleep on the roof", id="c", metadata={"title": ""}),
]
HISTORY = [HumanMessage("who said it? "), AIMessage("the clerk")]
TOKENS = 8
MODELS = pytest.mark.parametrize("make", [KVFusionLLM, ChatKVFusion])

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class RecordingChat(FakeListChatModel):
    """Records the messages of each call."""

    responses: list[str] = Field(default_factory=lambda: ["an answer"])
    seen: list[Any] = Field(default_factory=list)

    def _call(self, messages: Any, *args: Any, **kwargs: Any) -> str:
        roles = {"human": "user", "ai": "assistant", "system": "system"}
        self.seen.append([{"role": roles[message.type], "content": message.text} for message in messages])
        return super()._call(messages, *args, **kwargs)


class RecordingText(FakeListLLM):
    """Records the prompt of each call as one user message."""

    responses: list[str] = Field(default_factory=lambda: ["an answer"])
    seen: list[Any] = Field(default_factory=list)

    def _call(self, prompt: str, *args: Any, **kwargs: Any) -> str:
        self.seen.append([{"role": "user", "content": prompt}])
        return super()._call(prompt, *args, **kwargs)


class Fixed(BaseRetriever):
    """Returns the same documents for every question."""

    found: list[LangChainDocument] = Field(default_factory=lambda: list(FOUND))

    def _get_relevant_documents(self, query: str, **kwargs: Any) -> list[LangChainDocument]:
        return self.found


class Watching(KVFusionGenerator):
    """Records its requests."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.made: list[Any] = []
        request = self._engine.request

        def record(*arguments: Any, **options: Any) -> Any:
            self.made.append(request(*arguments, **options))
            return self.made[-1]

        self._engine.request = record


@pytest.fixture(scope="module")
def generator() -> Watching:
    settings = replace(default_settings(tiny.tokenizer("byte-bpe")), mode="auto")
    return Watching(TorchModel(tiny.backbone("llama", settings=settings)), store=MemoryStore(), gather=False)


def expected(generator: KVFusionGenerator, messages: Any, **kwargs: Any) -> tuple[list[int], str]:
    """Return prompt ids and greedy answer of transformers for ``messages``."""
    backbone = generator._engine.model.backbone
    inputs = backbone.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt", **kwargs
    )
    ends = sorted(backbone.end_ids)
    out = backbone.model.generate(
        **inputs, do_sample=False, max_new_tokens=TOKENS, eos_token_id=ends, pad_token_id=ends[0]
    )
    prompt = inputs["input_ids"][0].tolist()
    written = list(itertools.takewhile(lambda token: token not in ends, out[0, len(prompt) :].tolist()))
    return prompt, backbone.tokenizer.decode(written, skip_special_tokens=True).strip()


def require_parity(generator: Watching, recorder: Any, stock: Any, ours: Any, given: Any) -> None:
    """Check that our chain has the prompt ids and the answer that follow from the messages of the original chain."""
    stock.invoke(given)
    [messages] = recorder.seen
    ids, answer = expected(generator, messages)
    generator.made.clear()
    given_answer = ours.invoke(given)
    [request] = generator.made
    assert request.mode.name == "concat"
    assert list(request.question.ids) == ids
    assert given_answer == answer


# Prompts


STRINGS = {
    "a string": "Be brief.\n\n{context}\n\nQuestion: {question}\nAnswer:",
    "the question in front": "Question: {question}\n\nContext:\n{context}\nAnswer: ",
    "white space": "\n  {context} \n\n\t{question}\n",
    "nothing between": "{context}{question}",
}
CHATS: dict[str, list[Any]] = {
    "the system message": [("system", "Answer from this context:\n\n{context}"), ("human", "{question}")],
    "text behind": [("system", "Read:\n{context}\n\nBe brief. "), ("human", " {question}")],
    "nothing but documents": [("system", "{context}"), ("human", "{question}")],
    "a human message": [("human", "Use this.\n\n{context}\n\nQuestion: {question}")],
    "a human message before": [("system", "Be brief."), ("human", "{context}"), ("human", "{question}")],
    "a history": [("system", "Use this:\n{context}"), MessagesPlaceholder("history"), ("human", "{question}")],
    "behind a history": [
        ("system", "Be brief."),
        MessagesPlaceholder("history"),
        ("human", "Use this:\n{context}\n\nQuestion: {question}"),
    ],
    "examples": [
        ("system", "Be brief."),
        ("human", "who?"),
        ("ai", "nobody"),
        ("human", "Question: {question}\n{context}\nAnswer:"),
    ],
}
PROMPTS: dict[str, BasePromptTemplate] = {
    **{name: PromptTemplate.from_template(text) for name, text in STRINGS.items()},
    **{name: ChatPromptTemplate.from_messages(messages) for name, messages in CHATS.items()},
    "mustache": PromptTemplate.from_template(
        "Use:{{#context}} {{{context}}}{{/context}}\n{{{question}}}", template_format="mustache"
    ),
    "partials": PromptTemplate.from_template("{tone} {context}\n{question}").partial(tone="Be brief:"),
}


def recorder_of(make: Any, *, is_text: bool) -> Any:
    """Return a recording model of the same kind. Chat messages keep their roles in KVFusionLLM too."""
    return RecordingText() if make is KVFusionLLM and is_text else RecordingChat()


BLANK = {"nothing but documents", "a human message before"}  # prompts with a message that is empty without documents
CASES = [(name, found) for name in PROMPTS for found in (FOUND, FOUND[1:2], []) if found or name not in BLANK]


@MODELS
@pytest.mark.parametrize(("name", "documents"), CASES)
def test_wrapped_prompt_equals_the_original_prompt(name, documents, make, generator):
    prompt = PROMPTS[name]
    recorder = recorder_of(make, is_text=isinstance(prompt, PromptTemplate))
    model = make(generator=generator, max_tokens=TOKENS)
    joined = (lambda given: {**given, "context": format_docs(given["context"])}) | prompt | recorder
    apart = KVFusionPrompt.from_prompt(prompt) | model | StrOutputParser()
    given = {"context": documents, "question": QUESTION, "history": HISTORY}
    require_parity(generator, recorder, joined, apart, given)


@MODELS
@pytest.mark.parametrize("name", PROMPTS)
def test_show_prompt_equals_the_rendered_template(name, make, generator):
    given = {"context": FOUND, "question": QUESTION, "history": HISTORY}
    shown = (KVFusionPrompt.from_prompt(PROMPTS[name]) | make(generator=generator).show_prompt).invoke(given)
    value = PROMPTS[name].invoke({**given, "context": format_docs(FOUND)})
    recorder = RecordingChat()
    recorder.invoke(value)
    assert shown.text == generator._engine.model.backbone.tokenizer.apply_chat_template(
        recorder.seen[0], add_generation_prompt=True, tokenize=False
    )
    assert [part.document_id for part in shown.parts if part.document_id] == ["a", "b", "c"]


# Chains


@dataclass(frozen=True)
class Chain:
    """A chain as a function of its model and its document prompt."""

    build: Callable[[Any, dict[str, Any]], Any]
    stock: dict[str, Any]
    ours: dict[str, Any]
    is_text: bool = False


def stuff(llm: Any, kwargs: dict[str, Any]) -> Any:
    prompt = ChatPromptTemplate.from_messages([("system", "Use this:\n\n{context}\n\n"), ("human", "{input}")])
    chain = create_retrieval_chain(Fixed(), create_stuff_documents_chain(llm, prompt, **kwargs))
    return (lambda question: {"input": question}) | chain.pick("answer")


def retrieval_qa(llm: Any, kwargs: dict[str, Any]) -> Any:
    chain = RetrievalQA.from_chain_type(llm, retriever=Fixed(), chain_type_kwargs=kwargs)
    return (lambda question: {"query": question}) | chain | (lambda result: result["result"])


FRAMES = {"document_prompt": KVFusionDocumentPrompt()}
TITLED = PromptTemplate.from_template("Title: {title}\n{page_content}")
CHAINS = {
    "create_stuff_documents_chain": Chain(stuff, {}, FRAMES),
    "another separator": Chain(stuff, {"document_separator": "\n"}, {"document_separator": "\n", **FRAMES}),
    "RetrievalQA": Chain(retrieval_qa, {}, FRAMES, is_text=True),  # its prompt depends on the kind of model
}


@MODELS
@pytest.mark.parametrize("name", CHAINS)
def test_frames_do_not_change_the_prompt_of_a_chain(name, make, generator):
    chain = CHAINS[name]
    recorder = recorder_of(make, is_text=chain.is_text)
    model = make(generator=generator, max_tokens=TOKENS)
    require_parity(generator, recorder, chain.build(recorder, chain.stock), chain.build(model, chain.ours), QUESTION)


def test_frames_with_titles_equal_a_title_template(generator):
    prompt = ChatPromptTemplate.from_messages([("human", "{context}\n\n{question}")])
    recorder, model = RecordingChat(), ChatKVFusion(generator=generator, max_tokens=TOKENS)
    titled = KVFusionDocumentPrompt(title_key="title")
    stock = create_stuff_documents_chain(recorder, prompt, document_prompt=TITLED)
    ours = create_stuff_documents_chain(model, prompt, document_prompt=titled)
    require_parity(generator, recorder, stock, ours, {"context": FOUND[:2], "question": QUESTION})


PLACED = [route for route in ROUTES if not route.is_graph]  # graphs and agents pass documents outside the prompt


@pytest.mark.parametrize("route", PLACED, ids=lambda route: route.name)
def test_changed_chains_have_the_original_prompt(route, generator):
    recorder, model = RecordingChat(), ChatKVFusion(generator=generator, max_tokens=TOKENS)
    require_parity(generator, recorder, route.before(recorder), route.after(model), QUESTION)


@MODELS
@pytest.mark.parametrize("route", [route for route in ROUTES if not route.chat_only], ids=lambda route: route.name)
def test_captured_chains_have_the_original_prompt(route, make, generator):
    recorder, model = RecordingChat(), make(generator=generator, max_tokens=TOKENS)
    with enable_document_capture():
        require_parity(generator, recorder, route.before(recorder), route.before(model), QUESTION)
    assert len(generator.made[0].encoded.documents) == len(route.found)


@MODELS
def test_prompt_without_documents_is_unchanged(make, generator):
    recorder, model = RecordingChat(), make(generator=generator, max_tokens=TOKENS)
    prompt = ChatPromptTemplate.from_messages([("system", " Be brief. "), ("human", "{question}\n")])
    require_parity(generator, recorder, prompt | recorder, prompt | model | StrOutputParser(), {"question": QUESTION})


def test_template_variables_reach_the_template(generator, monkeypatch):
    tokenizer = generator._engine.model.backbone.tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", tiny.CHATML + "{% if thinks %}wait! {% endif %}")
    ids, answer = expected(generator, [{"role": "user", "content": QUESTION}], thinks=True)
    model = ChatKVFusion(generator=generator, max_tokens=TOKENS, chat_template_kwargs={"thinks": False})
    generator.made.clear()
    assert model.invoke(QUESTION, chat_template_kwargs={"thinks": True}).text == answer
    assert list(generator.made[0].question.ids) == ids
    assert model.show_prompt(QUESTION, chat_template_kwargs={"thinks": True}).text.endswith("wait! ")
    assert not model.show_prompt(QUESTION).text.endswith("wait! ")


@pytest.mark.parametrize("template", STRINGS.values(), ids=STRINGS)
def test_model_without_a_chat_template_reads_plain_text(template):
    tokenizer = tiny.tokenizer("bpe-byte-fallback")
    settings = replace(default_settings(tokenizer), mode="auto")
    backbone = tiny.backbone("llama", tokens="bpe-byte-fallback", settings=settings)
    plain = Watching(TorchModel(backbone), store=MemoryStore(), gather=False)
    prompt, recorder = PromptTemplate.from_template(template), RecordingText()
    (prompt | recorder).invoke({"context": format_docs(FOUND), "question": QUESTION})
    chain = KVFusionPrompt.from_prompt(prompt) | KVFusionLLM(generator=plain, max_tokens=1)
    chain.invoke({"context": FOUND, "question": QUESTION})
    assert list(plain.made[0].question.ids) == tokenizer(recorder.seen[0][0]["content"])["input_ids"]


# Fused


@MODELS
@pytest.mark.parametrize("name", PROMPTS)
def test_order_of_fused_documents_does_not_matter_and_their_kv_is_shared(name, make, generator):
    llm = make(
        generator=generator.with_namespace(f"{name.replace(' ', '-')}-{make.__name__}"), mode="fusion", max_tokens=4
    )
    prompt = KVFusionPrompt.from_prompt(PROMPTS[name])

    def ask(documents: Any, question: str) -> tuple[str, list[str]]:
        value = prompt.invoke({"context": list(documents), "question": question, "history": HISTORY})
        generation = llm.generate_prompt([value]).generations[0][0]
        info = generation.generation_info or generation.message.response_metadata
        assert info["mode"] == "fusion"
        return generation.text, [source["origin"] for source in info["sources"]]

    first, origins = ask(FOUND, QUESTION)
    assert origins == ["computed"] * 3
    for documents in (FOUND[::-1], FOUND[1:] + FOUND[:1]):
        assert ask(documents, QUESTION) == (first, ["memory"] * 3)
    assert ask(FOUND, "what was lit in 1874?")[1] == ["memory"] * 3


def test_documents_chain_inserts_documents_in_place(generator):
    model = KVFusionLLM(generator=generator, max_tokens=TOKENS)
    generator.made.clear()
    create_kvfusion_documents_chain(model).invoke({"context": FOUND, "input": QUESTION})
    text = generator._engine.model.backbone.tokenizer.decode(generator.made[0].question.ids)
    assert f"as you can.\n\n{format_docs(FOUND)}\n\nQuestion: {QUESTION}\nAnswer:" in text


def test_default_length_comes_from_the_generator(generator):
    short = ChatKVFusion(generator=generator.with_settings(max_new_tokens=3)).invoke(QUESTION)
    assert short.response_metadata["finish_reason"] == "length"
    assert short.response_metadata["usage"]["completion_tokens"] == 3


def test_documents_of_a_call_have_the_default_place(generator):
    model = ChatKVFusion(generator=generator)
    messages = [("system", "Be brief."), ("human", "Tell me: who?")]
    shown = model.show_prompt(messages, documents=FOUND)
    prompt = [Message("system", "Be brief."), Message("user", "Tell me: who?")]
    documents = [document.page_content for document in FOUND]
    assert (
        shown.text != generator.show_prompt("Tell me: who?", documents, prompt=prompt).text
    )  # these documents have titles
    untitled = [LangChainDocument(document.page_content) for document in FOUND]
    shown = model.show_prompt(messages, documents=untitled)
    assert shown.text == generator.show_prompt("Tell me: who?", documents, prompt=prompt).text
