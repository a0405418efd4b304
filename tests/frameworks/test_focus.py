"""Focus in LangChain and LlamaIndex."""

import asyncio
import math
from dataclasses import replace

import numpy as np
import pytest
import tiny
from fakes import RecordingGenerator

from kvfusion_rag import Document, InvalidInputError
from tests.engine.test_focus import QUESTION, made_documents

DOCUMENTS = made_documents(5)
MESSAGES = [("user", QUESTION)]


def described(sources):
    return [(source["id"], source["used"], source["focus_score"]) for source in sources]


def expected(answer):
    return [(source.id, source.used, source.focus_score) for source in answer.sources]


@pytest.fixture(scope="module")
def focused():
    """Return a generator with focus 2, and its sources for each focus."""
    gen = tiny.generator("llama", focus=2)
    prompts = {most: gen.answer(QUESTION, DOCUMENTS, focus=most, max_new_tokens=3) for most in (1, 2, 3, None)}
    return gen, {most: expected(answer) for most, answer in prompts.items()}


# LangChain


@pytest.fixture
def langchain():
    pytest.importorskip("langchain_core")
    import langchain_kvfusion

    return langchain_kvfusion


def test_langchain_llm(langchain, focused):
    gen, found = focused
    llm = langchain.KVFusionLLM(generator=gen, max_tokens=3)

    def sources(model, **options):
        result = model.generate([QUESTION], documents=DOCUMENTS, **options)
        return described(result.generations[0][0].generation_info["sources"])

    assert sources(llm) == found[2]  # the model's own focus
    assert sources(llm, focus=1) == found[1]
    assert sources(llm, focus=None) == found[None]
    fixed = langchain.KVFusionLLM(generator=gen, max_tokens=3, focus=3)
    assert sources(fixed) == found[3]
    assert sources(fixed, focus="auto") == found[2]
    assert sources(fixed, focus=None) == found[None]
    assert sources(langchain.KVFusionLLM(generator=gen, max_tokens=3, focus=None)) == found[None]
    assert sources(langchain.KVFusionLLM(generator=gen, max_tokens=3, focus=1, streaming=True)) == found[1]
    joined = llm.generate([QUESTION, QUESTION], documents=[DOCUMENTS, DOCUMENTS[:1]], focus=1)
    assert [described(g[0].generation_info["sources"]) for g in joined.generations] == [
        found[1],
        [(DOCUMENTS[0].id, True, None)],
    ]
    later = asyncio.run(llm.agenerate([QUESTION], documents=DOCUMENTS, focus=1))
    assert described(later.generations[0][0].generation_info["sources"]) == found[1]


def test_langchain_chat(langchain, focused):
    gen, found = focused
    chat = langchain.ChatKVFusion(generator=gen, max_tokens=3, focus=3)

    async def last_of(pieces):
        return [piece async for piece in pieces][-1]

    options = {"documents": DOCUMENTS, "focus": 1}
    messages = [
        chat.invoke(MESSAGES, **options),
        chat.bind(**options).invoke(MESSAGES),
        *chat.batch([MESSAGES], **options),
        list(chat.stream(MESSAGES, **options))[-1],
        asyncio.run(chat.ainvoke(MESSAGES, **options)),
        asyncio.run(last_of(chat.astream(MESSAGES, **options))),
    ]
    for message in messages:
        assert described(message.response_metadata["sources"]) == found[1]
    whole = chat.invoke(MESSAGES, documents=DOCUMENTS, focus=None)
    assert described(whole.response_metadata["sources"]) == found[None]
    assert described(chat.invoke(MESSAGES, documents=DOCUMENTS).response_metadata["sources"]) == found[3]


@pytest.mark.parametrize("name", ["KVFusionLLM", "ChatKVFusion"])
def test_langchain_show_prompt_has_the_kept_documents(langchain, focused, name):
    gen, found = focused
    model = getattr(langchain, name)(generator=gen, focus=3)

    def shown(**options):
        parts = model.show_prompt(QUESTION, documents=DOCUMENTS, **options).parts
        return {part.document_id for part in parts if part.document_id is not None}

    def used(most):
        return {document for document, is_used, _ in found[most] if is_used}

    assert shown() == used(3)
    assert shown(focus=1) == used(1)
    assert shown(focus="auto") == used(2)
    assert shown(focus=None) == used(None)


@pytest.mark.parametrize("name", ["KVFusionLLM", "ChatKVFusion"])
@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "2", "all"])
def test_langchain_rejects_an_invalid_focus(langchain, focused, name, wrong):
    gen, _ = focused
    with pytest.raises(ValueError, match="focus"):
        getattr(langchain, name)(generator=gen, focus=wrong)
    with pytest.raises(InvalidInputError, match="focus is"):
        getattr(langchain, name)(generator=gen).invoke(QUESTION, documents=DOCUMENTS, focus=wrong)


class FocusEcho(RecordingGenerator):
    """Answers with its focus and the scores of its documents."""

    def answer_to(self, call):
        scores = [document.score for document in call.documents]
        return replace(super().answer_to(call), text=f"{call.options['focus']} {scores}")


@pytest.mark.parametrize("name", ["KVFusionLLM", "ChatKVFusion"])
def test_langchain_cache_distinguishes_focus_and_scores(langchain, name):
    from langchain_core.caches import InMemoryCache

    fake, cache = FocusEcho(), InMemoryCache()

    def answers():
        for own in ("auto", None, 1):
            model = getattr(langchain, name)(generator=fake, cache=cache, focus=own)
            for options in ({}, {"focus": 2}, {"focus": None}):
                for score in (0.5, 1.5):
                    found = model.invoke("q", documents=[Document("a", score=score)], **options)
                    yield getattr(found, "content", found), f"{options.get('focus', own)} [{score}]"

    assert all(found == wanted for found, wanted in answers())
    computed = len(fake.calls)
    assert all(found == wanted for found, wanted in answers())
    assert len(fake.calls) == computed


def test_langchain_identity_contains_focus(langchain):
    llms = [langchain.KVFusionLLM(generator=RecordingGenerator(), focus=focus) for focus in ("auto", None, 1)]
    assert [llm._identifying_params["focus"] for llm in llms] == ["auto", None, 1]


@pytest.mark.parametrize(
    ("metadata", "score"),
    [
        ({"score": 0.5}, 0.5),
        ({"score": 2}, 2.0),
        ({"score": np.float32(0.5)}, 0.5),
        ({"relevance_score": 0.25}, 0.25),
        ({"relevance_score": 0.25, "score": 7.0}, 0.25),  # the reranker's score has priority
        ({"relevance_score": "high", "score": 7.0}, 7.0),
        ({"score": True}, None),
        ({"score": "0.5"}, None),
        ({"score": math.nan}, None),
        ({"score": math.inf}, None),
        ({"score": None}, None),
        ({}, None),
    ],
)
def test_langchain_documents_keep_their_score(langchain, metadata, score):
    from langchain_core.documents import Document as LangChainDocument

    from langchain_kvfusion.documents import to_document

    found = to_document(LangChainDocument("text", metadata=metadata))
    assert (found.score, found.metadata) == (score, metadata)
    assert found.score is None or type(found.score) is float
    assert to_document({"text": "text", "metadata": metadata}).score == score


def test_langchain_mappings_keep_their_score(langchain):
    from langchain_kvfusion.documents import to_document

    assert to_document({"text": "a", "score": 1, "page": 3}) == Document("a", metadata={"page": 3}, score=1.0)
    assert to_document({"text": "a", "score": "high"}) == Document("a", metadata={"score": "high"})


def test_langchain_scores_reach_the_generator(langchain):
    from langchain_core.documents import Document as LangChainDocument
    from langchain_core.prompts import PromptTemplate, format_document

    texts = ["The office is in Lima, up a hill.", "Rice is eaten everywhere."]
    found = [LangChainDocument(text, metadata={"score": n + 0.5}) for n, text in enumerate(texts)]
    template = PromptTemplate.from_template("{context}\n\nQuestion: {question}")
    framed = langchain.KVFusionDocumentPrompt(score_key="score")
    for name in ("KVFusionLLM", "ChatKVFusion"):
        fake = RecordingGenerator()
        model = getattr(langchain, name)(generator=fake)
        model.invoke("q", documents=found)
        (langchain.KVFusionPrompt.from_prompt(template) | model).invoke({"context": found, "question": "q"})
        context = "\n\n".join(format_document(document, framed) for document in found)
        model.invoke(template.format(context=context, question="q"))
        assert [[d.score for d in call.documents] for call in fake.calls] == [[0.5, 1.5]] * 3, name


def test_langchain_scores_reach_a_captured_chain(langchain):
    from langchain_core.documents import Document as LangChainDocument
    from langchain_core.prompts import PromptTemplate
    from langchain_core.retrievers import BaseRetriever
    from langchain_core.runnables import RunnablePassthrough

    class Scoring(BaseRetriever):
        def _get_relevant_documents(self, query, **kwargs):
            return [LangChainDocument("The office is in Lima, up a hill.", metadata={"relevance_score": 0.75})]

    fake = RecordingGenerator()
    prompt = PromptTemplate.from_template("{context}\n\nQuestion: {question}")
    retrieved = Scoring() | (lambda documents: "\n\n".join(d.page_content for d in documents))
    chain = {"context": retrieved, "question": RunnablePassthrough()} | prompt
    with langchain.enable_document_capture():
        (chain | langchain.KVFusionLLM(generator=fake)).invoke("Where is the office?")
    assert [document.score for document in fake.calls[0].documents] == [0.75]


# LlamaIndex


@pytest.fixture
def llama_index():
    pytest.importorskip("llama_index.core")
    import llama_index_kvfusion

    return llama_index_kvfusion


def nodes_of(documents):
    from llama_index.core.schema import NodeWithScore, TextNode

    return [NodeWithScore(node=TextNode(text=d.text, id_=d.id), score=d.score) for d in documents]


def test_llama_index_llm(llama_index, focused):
    gen, found = focused
    llm = llama_index.KVFusionLlamaIndexLLM(gen, max_new_tokens=3, focus=3)

    def sources(model=llm, **options):
        return described(model.complete(QUESTION, documents=DOCUMENTS, **options).raw["sources"])

    assert sources() == found[3]
    assert sources(focus=1) == found[1]
    assert sources(focus="auto") == found[2]
    assert sources(focus=None) == found[None]
    assert sources(llama_index.KVFusionLlamaIndexLLM(gen, max_new_tokens=3)) == found[2]
    assert sources(llama_index.KVFusionLlamaIndexLLM(gen, max_new_tokens=3, focus=None)) == found[None]
    *_, last = llm.stream_complete(QUESTION, documents=DOCUMENTS, focus=1)
    later = asyncio.run(llm.acomplete(QUESTION, documents=DOCUMENTS, focus=1))
    assert described(last.raw["sources"]) == described(later.raw["sources"]) == found[1]
    shown = llm.show_prompt(QUESTION, documents=DOCUMENTS, focus=1)
    assert [p.document_id for p in shown.parts if p.document_id] == [name for name, used, _ in found[1] if used]


@pytest.mark.parametrize("wrong", [0, 1.5, True, "2"])
def test_llama_index_rejects_an_invalid_focus(llama_index, focused, wrong):
    gen, _ = focused
    with pytest.raises(ValueError, match="focus"):
        llama_index.KVFusionLlamaIndexLLM(gen, focus=wrong)
    with pytest.raises(InvalidInputError, match="focus is"):
        llama_index.KVFusionLlamaIndexLLM(gen).complete(QUESTION, documents=DOCUMENTS, focus=wrong)


@pytest.mark.parametrize("streaming", [False, True])
def test_llama_index_synthesizer(llama_index, focused, streaming):
    gen, found = focused
    llm = llama_index.KVFusionLlamaIndexLLM(gen, max_new_tokens=3, focus=1)
    response = llama_index.KVFusionSynthesizer(llm, streaming=streaming).synthesize(QUESTION, nodes_of(DOCUMENTS))
    str(response)  # reads the stream to the end
    assert described(response.metadata["kvfusion"]["sources"]) == found[1]


def test_llama_index_scores_reach_the_generator(llama_index):
    fake = RecordingGenerator()
    scores = [0.5, math.nan, None, 2.0]
    nodes = nodes_of([Document(f"text {n}", id="twin", score=score) for n, score in enumerate(scores)])
    llama_index.KVFusionSynthesizer(llama_index.KVFusionLlamaIndexLLM(fake)).synthesize("q", nodes)
    assert [(d.id, d.score) for d in fake.calls[0].documents] == [
        ("twin", 0.5),
        ("twin#2", None),
        ("twin#3", None),
        ("twin#4", 2.0),
    ]
