"""enable_document_capture: unchanged chains pass on separate documents, and only retrieved texts become documents."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from typing import Any

import pytest

pytest.importorskip("langchain_core")
pytest.importorskip("langchain_classic")
pytest.importorskip("langchain")
pytest.importorskip("langgraph")

from conversation_fakes import ChatRecorder, turns
from fakes import EchoGenerator
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.caches import InMemoryCache
from langchain_core.documents import Document as LangChainDocument
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_routes import PROMPT, ROUTES, SHELF, Route, Shelf, format_docs, lcel

from kvfusion_rag import InvalidInputError
from langchain_kvfusion import ChatKVFusion, KVFusionLLM, enable_document_capture
from langchain_kvfusion.framing import Extraction
from langchain_kvfusion.matching import MIN_CHARACTERS, cut_out

QUESTION = "Who grinds flour?"
MODELS = pytest.mark.parametrize("make", [KVFusionLLM, ChatKVFusion])

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def with_retriever(retriever: Any, llm: Any) -> Any:
    context = retriever | RunnableLambda(format_docs)
    return {"context": context, "question": RunnablePassthrough()} | PROMPT | llm | StrOutputParser()


@MODELS
@pytest.mark.parametrize("route", [route for route in ROUTES if not route.chat_only], ids=lambda route: route.name)
async def test_capture_separates_documents_of_unchanged_chains(route: Route, make: Any):
    fake = ChatRecorder()
    chain = route.before(make(generator=fake))
    with enable_document_capture():
        answers = [chain.invoke(QUESTION), await chain.ainvoke(QUESTION)]
        answers += [*chain.batch([QUESTION]), *await chain.abatch([QUESTION])]
        if not route.is_graph:
            answers += ["".join(chain.stream(QUESTION)), "".join([piece async for piece in chain.astream(QUESTION)])]
    assert set(answers) == {"in lima"}
    for call in fake.calls:
        assert (call.texts, call.ids) == ([SHELF[name] for name in route.found], list(route.found))
        assert call.question == (route.question or QUESTION)
        assert not any(text in str(call.prompt) for text in SHELF.values())
        assert turns(call)[0] == ("system", "Answer from this context:\n\n{documents}")
    fake.calls.clear()
    chain.invoke(QUESTION)
    assert not fake.calls[0].documents  # the capture is closed


@MODELS
def test_capture_separates_documents_of_each_question_in_a_batch(make):
    class Named(Shelf):
        def _get_relevant_documents(self, query: str, **kwargs: Any) -> list[LangChainDocument]:
            return [LangChainDocument(SHELF[query], id=query)]

    fake = ChatRecorder()
    with enable_document_capture():
        with_retriever(Named(), make(generator=fake)).batch(list(SHELF))
    assert sorted(call.ids for call in fake.calls) == [["clerk"], ["doves"], ["lamp"], ["mill"]]


@MODELS
def test_capture_works_without_a_chain(make):
    fake = ChatRecorder()
    with enable_document_capture():
        context = format_docs(Shelf().invoke(QUESTION))
        make(generator=fake).invoke(f"Context:\n{context}\n\nQuestion: {QUESTION}")
    assert (fake.calls[0].ids, fake.calls[0].question) == (["lamp", "mill"], QUESTION)


@MODELS
def test_documents_of_other_runs_are_not_captured(make):
    fake = ChatRecorder()
    with enable_document_capture():
        lcel(make(generator=fake)).invoke(QUESTION)
        with_retriever(Shelf(names=["doves"]), make(generator=fake)).invoke(f"Is this right? {SHELF['lamp']}")
    assert fake.calls[1].ids == ["doves"]
    assert SHELF["lamp"] in fake.calls[1].question


@MODELS
def test_other_threads_are_not_captured(make):
    fake = ChatRecorder()
    with enable_document_capture():
        stranger = threading.Thread(target=lambda: lcel(make(generator=fake)).invoke(QUESTION))
        stranger.start()
        stranger.join()
    assert not fake.calls[0].documents


async def test_captures_of_two_tasks_are_separate():
    fake = EchoGenerator()

    async def serve(name: str) -> Any:
        with enable_document_capture():
            context = format_docs(await Shelf(names=[name]).ainvoke(QUESTION))
            await asyncio.sleep(0.01)
            quoted = "doves" if name == "lamp" else "lamp"
            return await ChatKVFusion(generator=fake).ainvoke(f"{context}\n\nQuestion: Is it so? {SHELF[quoted]}")

    first, second = await asyncio.gather(serve("lamp"), serve("doves"))
    assert first.text == f"Is it so? {SHELF['doves']} <- {SHELF['lamp']} at 0.0"
    assert second.text == f"Is it so? {SHELF['lamp']} <- {SHELF['doves']} at 0.0"


async def test_task_that_outlives_a_capture_joins_its_documents():
    fake = ChatRecorder()
    go = asyncio.Event()

    async def later() -> None:
        await go.wait()
        await lcel(ChatKVFusion(generator=fake)).ainvoke(QUESTION)

    with enable_document_capture():
        task = asyncio.create_task(later())
        await asyncio.sleep(0)
    go.set()
    await task
    assert not fake.calls[0].documents


async def test_capture_must_be_closed_by_its_own_task():
    capture = enable_document_capture()

    async def elsewhere() -> None:
        with pytest.raises(InvalidInputError, match="did not open"):
            capture.close()

    await asyncio.create_task(elsewhere())
    capture.close()
    capture.close()


@MODELS
def test_number_of_captured_documents_is_limited(make):
    fake = ChatRecorder()
    with enable_document_capture(most_documents=1):
        lcel(make(generator=fake)).invoke(QUESTION)
    assert fake.calls[0].ids == ["mill"]
    with pytest.raises(InvalidInputError, match="most_documents is 0"):
        enable_document_capture(0)


def test_documents_are_dropped_after_a_run():
    with enable_document_capture() as capture:
        for _ in range(3):
            lcel(ChatKVFusion(generator=ChatRecorder())).invoke(QUESTION)
        assert not capture._found and not capture._roots


@MODELS
def test_explicit_documents_replace_captured_ones(make):
    fake = ChatRecorder()
    with enable_document_capture():
        context = format_docs(Shelf().invoke(QUESTION))
        make(generator=fake).invoke(f"Note: {context}\n\nQuestion: {QUESTION}", documents=["another document"])
    assert fake.calls[0].texts == ["another document"]


@MODELS
def test_cache_distinguishes_documents_with_equal_joined_text(make):
    fake = ChatRecorder()
    one, two = (
        "The lamp was lit in 1874.\n\nThe mill grinds flour.",
        ["The lamp was lit in 1874.", "The mill grinds flour."],
    )
    model = make(generator=fake, cache=InMemoryCache())
    for texts in ([one], two, [one], two):
        found = [LangChainDocument(text) for text in texts]

        class Fixed(Shelf):
            def _get_relevant_documents(
                self, query: str, found: Any = found, **kwargs: Any
            ) -> list[LangChainDocument]:
                return found

        with enable_document_capture():
            with_retriever(Fixed(), model).invoke(QUESTION)
    assert [call.texts for call in fake.calls] == [[one], two]


def test_document_in_an_ai_message_is_not_removed():
    fake = ChatRecorder()
    with enable_document_capture():
        context = format_docs(Shelf(names=["lamp"]).invoke(QUESTION))
        said = AIMessage(f"As I said: {SHELF['lamp']}")
        ChatKVFusion(generator=fake).invoke(
            [SystemMessage(context), HumanMessage("When?"), said, HumanMessage("Sure?")]
        )
    assert fake.calls[0].ids == ["lamp"]
    assert SHELF["lamp"] in str(fake.calls[0].prompt)


@pytest.mark.slow
def test_import_registers_no_hook():
    code = (
        "import langchain_core.callbacks.manager, langchain_core.tracers.context as c; "
        "before = len(c._configure_hooks); "
        "import langchain_kvfusion; print(len(c._configure_hooks) - before); "
        "langchain_kvfusion.enable_document_capture().close(); langchain_kvfusion.enable_document_capture().close(); "
        "print(len(c._configure_hooks) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "1"]


# Documents in a text

pieces = st.text("ab \n", min_size=0, max_size=40)


@settings(max_examples=50)
@given(st.lists(pieces, max_size=4), st.lists(st.one_of(pieces, st.integers(0, 3)), max_size=8))
def test_only_retrieved_texts_are_removed(found, parts):
    text = " ".join(part if isinstance(part, str) else (found[part] if part < len(found) else "") for part in parts)
    cut = cut_out(text, [LangChainDocument(each) for each in found])
    shown = {each for text in found for each in (text, text.strip())}
    assert all(document.text in shown and document.text in text for document in cut.documents)
    kept, words = cut.text.split(), text.split()
    remaining = iter(words)
    assert all(word in remaining for word in kept)  # the rest of the text is unchanged
    if not cut.documents:
        assert (cut.text, cut.place) == (text, None)


words = st.text("ab", min_size=MIN_CHARACTERS, max_size=20)
margins = st.sampled_from(["", " ", "\n"])
documents = st.lists(st.builds("{}{}{}".format, margins, words, margins), min_size=1, max_size=5, unique_by=str.strip)


@settings(max_examples=50)
@given(documents, st.sampled_from(["\n\n", "\n---\n", " | ", "\n\nDocument: "]), st.booleans())
def test_place_and_separator_reproduce_the_prompt(texts, separator, strips):
    shown = [text.strip() for text in texts] if strips else texts
    text = f"Use this.\n\nDocument: {separator.join(shown)}\n\nQuestion: who?"
    cut = cut_out(text, [LangChainDocument(text) for text in texts])
    place = cut.place
    assert place is not None
    joined = place.separator.join(document.text for document in cut.documents)
    assert cut.text[: place.offset] + joined + cut.text[place.offset :] == text


@pytest.mark.parametrize(
    ("prompt", "left", "number"),
    [
        ("Use: [1] {0}\n\n[2] {1}\n\nwho?", "Use: [1] {documents}\n\n[2]\n\nwho?", 2),
        ("Use:\n{0} (mill.txt)\n{1} (lamp.txt)\nwho?", "Use:\n{documents} (mill.txt)\n(lamp.txt)\nwho?", 2),
        ("{0}\n\n{1}\n{2}\n\nwho?", "{documents}\n\nwho?", 3),
        ("{0}\n\n{1}\n\nIs it true? {0}", "{documents}\n\nIs it true?", 2),
    ],
)
def test_labelled_documents_are_placed_at_the_first_one(prompt, left, number):
    texts = [SHELF["mill"], SHELF["lamp"], SHELF["doves"]]
    cut = cut_out(prompt.format(*texts), [LangChainDocument(text) for text in texts])
    assert cut.place is not None and cut.place.separator == "\n\n"
    assert f"{cut.text[: cut.place.offset]}{{documents}}{cut.text[cut.place.offset :]}" == left
    assert [document.text for document in cut.documents] == texts[:number]


def test_longer_documents_are_matched_first():
    short, long = "doves sleep on the roof", "Two doves sleep on the roof."
    cut = cut_out(f"Context: {long}\n\nQuestion: who?", [LangChainDocument(short), LangChainDocument(long)])
    assert ([d.text for d in cut.documents], cut.text) == ([long], "Context: \n\nQuestion: who?")


@pytest.mark.parametrize("text", ["too short", "in the midst of words"])
def test_short_texts_and_parts_of_words_are_not_removed(text):
    prompt = f"x{text}y, {text[:9]}"
    assert cut_out(prompt, [LangChainDocument(text)]) == Extraction(prompt)


def test_cache_considers_documents_retrieved_outside_the_chain():
    fake, cache = EchoGenerator(), InMemoryCache()
    text = SHELF["mill"]
    chain = RunnableLambda(lambda found: f"{found[0].page_content}\n\nQuestion: Who?") | ChatKVFusion(
        generator=fake, cache=cache
    )
    joined = chain.invoke([LangChainDocument(text)])
    with enable_document_capture():
        apart = chain.invoke(Shelf(names=["mill"]).invoke("q"))
    assert [call.texts for call in fake.calls] == [[], [text]]
    assert apart.text != joined.text
