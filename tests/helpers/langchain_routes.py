"""Usual LangChain chains, and the same chains with separate documents.

Each pair consists of two functions of a model. Their bodies differ by the lines that a user must change, besides the
line that creates the model. All chains take a question and return a text.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from difflib import ndiff
from functools import partial
from typing import Any, TypedDict

from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain_classic.chains import (
    ConversationalRetrievalChain,
    RetrievalQA,
    create_history_aware_retriever,
    create_retrieval_chain,
)
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_classic.retrievers import ContextualCompressionRetriever, EnsembleRetriever, MultiQueryRetriever
from langchain_core.documents import BaseDocumentCompressor
from langchain_core.documents import Document as LangChainDocument
from langchain_core.language_models import FakeListChatModel, GenericFakeChatModel
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnablePassthrough
from langchain_core.tools import create_retriever_tool
from langgraph.graph import START, StateGraph

from langchain_kvfusion import KVFusionDocumentPrompt, KVFusionPrompt

SHELF = {
    "lamp": "The lamp was lit in 1874.",
    "mill": "The mill grinds flour.",
    "doves": "Two doves sleep on the roof.",
    "clerk": "The clerk knows nothing.",
}
PROMPT = ChatPromptTemplate.from_messages(
    [("system", "Answer from this context:\n\n{context}"), ("human", "{question}")]
)
INPUT_PROMPT = ChatPromptTemplate.from_messages(
    [("system", "Answer from this context:\n\n{context}"), ("human", "{input}")]
)
REPHRASE_PROMPT = ChatPromptTemplate.from_messages([MessagesPlaceholder("chat_history"), ("human", "{input}")])
HISTORY = [("human", "When was the lamp lit?"), ("ai", "In 1874.")]
STANDALONE = "Where do the doves sleep?"


class Shelf(BaseRetriever):
    """Finds the texts of ``names`` for every query, and records the queries."""

    names: list[str] = ["lamp", "mill"]  # noqa: RUF012 - a pydantic field
    asked: list[str] = []  # noqa: RUF012

    def _get_relevant_documents(self, query: str, **kwargs: Any) -> list[LangChainDocument]:
        self.asked.append(query)
        return [LangChainDocument(SHELF[name], id=name) for name in self.names]


class LastFirst(BaseDocumentCompressor):
    """A reranker that keeps only the last document."""

    def compress_documents(self, documents: Any, query: str, callbacks: Any = None) -> list[LangChainDocument]:
        return list(documents)[-1:]


def format_docs(documents: list[LangChainDocument]) -> str:
    return "\n\n".join(document.page_content for document in documents)


def rewriter() -> FakeListChatModel:
    """Return a model that rewrites questions."""
    return FakeListChatModel(responses=[STANDALONE])


def planner() -> GenericFakeChatModel:
    """Return a model for an agent, which calls its tool and then gives a fixed answer."""
    call = AIMessage("", tool_calls=[{"name": "search", "args": {"query": STANDALONE}, "id": "1"}])

    class Planner(GenericFakeChatModel):
        def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
            return self

    return Planner(messages=iter([call, AIMessage("the planner's own words")]))


# LCEL


def lcel(llm: Any, retriever: Any = None) -> Any:
    retriever = retriever or Shelf()
    context = retriever | format_docs
    prompt = PROMPT
    return {"context": context, "question": RunnablePassthrough()} | prompt | llm | StrOutputParser()


def lcel_apart(llm: Any, retriever: Any = None) -> Any:
    retriever = retriever or Shelf()
    context = retriever
    prompt = KVFusionPrompt.from_prompt(PROMPT)
    return {"context": context, "question": RunnablePassthrough()} | prompt | llm | StrOutputParser()


# Chains that join documents


def retrieval_chain(llm: Any) -> Any:
    documents_chain = create_stuff_documents_chain(llm, INPUT_PROMPT)
    chain = create_retrieval_chain(Shelf(), documents_chain)
    return (lambda question: {"input": question}) | chain | (lambda result: result["answer"])


def retrieval_chain_apart(llm: Any) -> Any:
    documents_chain = create_stuff_documents_chain(llm, INPUT_PROMPT, document_prompt=KVFusionDocumentPrompt())
    chain = create_retrieval_chain(Shelf(), documents_chain)
    return (lambda question: {"input": question}) | chain | (lambda result: result["answer"])


def retrieval_qa(llm: Any) -> Any:
    kwargs = {"prompt": PROMPT}
    chain = RetrievalQA.from_chain_type(llm, retriever=Shelf(), chain_type_kwargs=kwargs)
    return (lambda question: {"query": question}) | chain | (lambda result: result["result"])


def retrieval_qa_apart(llm: Any) -> Any:
    kwargs = {"prompt": PROMPT, "document_prompt": KVFusionDocumentPrompt()}
    chain = RetrievalQA.from_chain_type(llm, retriever=Shelf(), chain_type_kwargs=kwargs)
    return (lambda question: {"query": question}) | chain | (lambda result: result["result"])


def conversational(llm: Any) -> Any:
    chain = ConversationalRetrievalChain.from_llm(
        llm,
        retriever=Shelf(names=["doves", "clerk"]),
        condense_question_llm=rewriter(),
        combine_docs_chain_kwargs={"prompt": PROMPT},
    )
    history = [("When was the lamp lit?", "In 1874.")]
    return (lambda question: {"question": question, "chat_history": history}) | chain | (lambda r: r["answer"])


def conversational_apart(llm: Any) -> Any:
    chain = ConversationalRetrievalChain.from_llm(
        llm,
        retriever=Shelf(names=["doves", "clerk"]),
        condense_question_llm=rewriter(),
        combine_docs_chain_kwargs={"prompt": PROMPT, "document_prompt": KVFusionDocumentPrompt()},
    )
    history = [("When was the lamp lit?", "In 1874.")]
    return (lambda question: {"question": question, "chat_history": history}) | chain | (lambda r: r["answer"])


def history_aware(llm: Any) -> Any:
    retriever = create_history_aware_retriever(rewriter(), Shelf(names=["doves", "clerk"]), REPHRASE_PROMPT)
    documents_chain = create_stuff_documents_chain(llm, INPUT_PROMPT)
    chain = create_retrieval_chain(retriever, documents_chain)
    return (lambda question: {"input": question, "chat_history": HISTORY}) | chain | (lambda r: r["answer"])


def history_aware_apart(llm: Any) -> Any:
    retriever = create_history_aware_retriever(rewriter(), Shelf(names=["doves", "clerk"]), REPHRASE_PROMPT)
    documents_chain = create_stuff_documents_chain(llm, INPUT_PROMPT, document_prompt=KVFusionDocumentPrompt())
    chain = create_retrieval_chain(retriever, documents_chain)
    return (lambda question: {"input": question, "chat_history": HISTORY}) | chain | (lambda r: r["answer"])


# Graphs and agents


class State(TypedDict, total=False):
    question: str
    documents: list[LangChainDocument]
    answer: str


def graph(llm: Any) -> Any:
    def retrieve(state: State) -> State:
        return {"documents": Shelf().invoke(state["question"])}

    def generate(state: State) -> State:
        prompt = PROMPT.invoke({"context": format_docs(state["documents"]), "question": state["question"]})
        return {"answer": StrOutputParser().invoke(llm.invoke(prompt))}

    built = StateGraph(State).add_sequence([retrieve, generate]).add_edge(START, "retrieve").compile()
    return (lambda question: {"question": question}) | built | (lambda state: state["answer"])


def graph_apart(llm: Any) -> Any:
    def retrieve(state: State) -> State:
        return {"documents": Shelf().invoke(state["question"])}

    def generate(state: State) -> State:
        prompt = PROMPT.invoke({"context": "", "question": state["question"]})
        return {"answer": StrOutputParser().invoke(llm.invoke(prompt, documents=state["documents"]))}

    built = StateGraph(State).add_sequence([retrieve, generate]).add_edge(START, "retrieve").compile()
    return (lambda question: {"question": question}) | built | (lambda state: state["answer"])


def agent(llm: Any) -> Any:
    tool = create_retriever_tool(Shelf(), "search", "Searches the shelf.")
    built = create_agent(planner(), [tool], system_prompt="Be brief.")
    return (lambda question: {"messages": [("human", question)]}) | built | (lambda state: state["messages"][-1].text)


def agent_apart(llm: Any) -> Any:
    @wrap_model_call
    def answer_from_documents(request: Any, handler: Any) -> Any:
        found = isinstance(request.messages[-1], ToolMessage)
        return handler(request.override(model=llm, tools=[]) if found else request)

    tool = create_retriever_tool(Shelf(), "search", "Searches the shelf.", response_format="content_and_artifact")
    built = create_agent(planner(), [tool], system_prompt="Be brief.", middleware=[answer_from_documents])
    return (lambda question: {"messages": [("human", question)]}) | built | (lambda state: state["messages"][-1].text)


@dataclass(frozen=True)
class Route:
    """One kind of chain in its original and changed form, and the documents and question of its model."""

    name: str
    before: Callable[[Any], Any]
    after: Callable[[Any], Any]
    found: tuple[str, ...] = ("lamp", "mill")
    question: str | None = None  # if the chain rewrites it
    is_graph: bool = False
    chat_only: bool = False

    @property
    def changed_lines(self) -> int:
        """The number of changed lines, including the one that creates the model."""
        bodies = [
            inspect.getsource(getattr(function, "func", function)).splitlines(keepends=True)[1:]
            for function in (self.before, self.after)
        ]
        return 1 + sum(line.startswith("+ ") and bool(line[2:].strip()) for line in ndiff(*bodies))


def with_retriever(name: str, retriever: BaseRetriever, found: tuple[str, ...] = ("lamp", "mill")) -> Route:
    """Return the LCEL chains with another retriever."""
    return Route(name, partial(lcel, retriever=retriever), partial(lcel_apart, retriever=retriever), found)


ROUTES = [
    Route("LCEL", lcel, lcel_apart),
    Route("create_retrieval_chain", retrieval_chain, retrieval_chain_apart),
    Route("RetrievalQA", retrieval_qa, retrieval_qa_apart),
    Route("ConversationalRetrievalChain", conversational, conversational_apart, ("doves", "clerk"), STANDALONE),
    Route("create_history_aware_retriever", history_aware, history_aware_apart, ("doves", "clerk")),
    with_retriever("MultiQueryRetriever", MultiQueryRetriever.from_llm(Shelf(), llm=rewriter())),
    with_retriever(
        "ContextualCompressionRetriever",
        ContextualCompressionRetriever(base_compressor=LastFirst(), base_retriever=Shelf()),
        ("mill",),
    ),
    with_retriever(
        "EnsembleRetriever",
        EnsembleRetriever(retrievers=[Shelf(), Shelf(names=["doves", "lamp"])], weights=[0.6, 0.4]),
        ("lamp", "mill", "doves"),
    ),
    Route("LangGraph StateGraph", graph, graph_apart, is_graph=True),
    Route("create_agent", agent, agent_apart, is_graph=True, chat_only=True),
]
