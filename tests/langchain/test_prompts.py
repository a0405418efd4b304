"""KVFusionPrompt and what it hands on: documents, bare question, wording, and the ordinary prompt for others."""

from __future__ import annotations

import copy
import json
import logging
import pickle

import pytest

pytest.importorskip("langchain_core")

from conversation_fakes import ChatRecorder, marked
from langchain_core.documents import Document as LangChainDocument
from langchain_core.load import dumpd, load
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder, PromptTemplate

from kvfusion_rag import Document, DocumentsPlace, InvalidInputError, Message
from langchain_kvfusion import (
    ChatKVFusion,
    FusedPrompt,
    KVFusionDocumentPrompt,
    KVFusionPrompt,
    KVFusionPromptValue,
    bare_question,
)
from langchain_kvfusion.framing import frame
from langchain_kvfusion.fused import fuse_prompt

DOCUMENTS = [LangChainDocument("Ada wrote it.", id="a"), LangChainDocument("Bob read it.", id="b")]
TEMPLATE = "Use the context.\n\n{context}\n\nQuestion: {question}\nAnswer:"
TEXT = "Use the context.\n\nAda wrote it.\n\nBob read it.\n\nQuestion: Who wrote it?\nAnswer:"
MESSAGES = [("user", "Use the context.\n\n{documents}\n\nQuestion: Who wrote it?\nAnswer:")]
VARIABLES = {"context": DOCUMENTS, "question": "Who wrote it?"}

pytestmark = pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning")


async def every_way(prompt, variables):
    """The prompt strings that all ways of formatting give."""
    return [
        prompt.invoke(variables).to_string(),
        prompt.format_prompt(**variables).to_string(),
        prompt.format(**variables),
        (await prompt.ainvoke(variables)).to_string(),
        (await prompt.aformat_prompt(**variables)).to_string(),
        await prompt.aformat(**variables),
    ]


@pytest.mark.parametrize(
    "inner",
    [
        PromptTemplate.from_template(TEMPLATE),
        PromptTemplate.from_template(TEMPLATE.replace("{", "{{{").replace("}", "}}}"), template_format="mustache"),
        PromptTemplate.from_template(TEMPLATE.replace("{question}", "{asked}")),
        ChatPromptTemplate.from_messages([("human", TEMPLATE)]),
    ],
    ids=["f-string", "mustache", "question by its label", "chat"],
)
async def test_documents_stay_apart_in_every_template_and_way(inner):
    variables = VARIABLES | {"asked": "Who wrote it?"}
    for prompt in await every_way(KVFusionPrompt.from_prompt(inner), variables):
        assert isinstance(prompt, FusedPrompt)
        assert prompt.documents == (Document("Ada wrote it.", "a"), Document("Bob read it.", "b"))
        assert prompt.question == "Who wrote it?"
        assert marked(prompt.messages) == MESSAGES
        assert prompt.messages[0].documents == DocumentsPlace(len("Use the context.\n\n"), "\n\n", titles=False)
        assert str(prompt) == TEXT


async def test_chat_templates_keep_their_messages_and_need_no_labels():
    inner = ChatPromptTemplate.from_messages([("system", "Be brief.\n\n{context}"), ("human", "{input}")])
    for prompt in await every_way(KVFusionPrompt.from_prompt(inner), {"context": DOCUMENTS, "input": "Who?"}):
        assert marked(prompt.messages) == [("system", "Be brief.\n\n{documents}"), ("user", "Who?")]
        assert prompt.question == "Who?"
        assert str(prompt) == "Be brief.\n\nAda wrote it.\n\nBob read it.\n\nWho?"


def test_a_message_of_nothing_but_documents_is_kept():
    inner = ChatPromptTemplate.from_messages([("system", "{context}"), ("human", "Tell me: {what}")])
    prompt = KVFusionPrompt.from_prompt(inner).format(context=DOCUMENTS, what="who?")
    assert marked(prompt.messages) == [("system", "{documents}"), ("user", "Tell me: who?")]
    assert prompt.question == "Tell me: who?"


@pytest.mark.parametrize(
    "template", ["\n {context}\t\n\n {question}\n", "{context}{question}", " {question} {context}"]
)
def test_white_space_is_untouched(template):
    prompt = KVFusionPrompt.from_template(template).format(**VARIABLES)
    expected = template.replace("{context}", "{documents}").replace("{question}", "Who wrote it?")
    assert marked(prompt.messages) == [("user", expected)]
    assert str(prompt) == expected.replace("{documents}", "Ada wrote it.\n\nBob read it.")


def test_a_history_stays_in_place_and_the_last_message_is_the_question():
    inner = ChatPromptTemplate.from_messages(
        [("system", "S {context}"), MessagesPlaceholder("past"), ("human", "{q}")]
    )
    past = [HumanMessage("Who wrote it?"), AIMessage("Ada.")]
    prompt = KVFusionPrompt.from_prompt(inner).format(context=DOCUMENTS, past=past, q="And who read it?")
    assert marked(prompt.messages) == [
        ("system", "S {documents}"),
        ("user", "Who wrote it?"),
        ("assistant", "Ada."),
        ("user", "And who read it?"),
    ]
    assert prompt.question == "And who read it?"
    assert str(prompt).endswith("\n\nUser: Who wrote it?\n\nAssistant: Ada.\n\nAnd who read it?")


def test_a_prompt_of_system_text_is_asked_by_the_user():
    inner = ChatPromptTemplate.from_messages(
        [("system", "Be brief."), ("system", "{context}\n\nQuestion: {question}")]
    )
    prompt = KVFusionPrompt.from_prompt(inner).format(**VARIABLES)
    assert marked(prompt.messages) == [("system", "Be brief."), ("user", "{documents}\n\nQuestion: Who wrote it?")]


@pytest.mark.parametrize("names", [("question", "input"), ("input", "query"), ("query", "other")])
def test_the_question_is_the_first_known_variable(names):
    prompt = KVFusionPrompt.from_template(f"{{context}} {{{names[1]}}} {{{names[0]}}}")
    assert prompt.format(context=[], **{names[0]: "Q1", names[1]: "Q2"}).question == "Q1"


def test_the_question_key_decides():
    prompt = KVFusionPrompt.from_template("{docs} {question} {asked}", "docs", "asked")
    assert prompt.format(docs=[], question="no", asked="yes").question == "yes"
    with pytest.raises(InvalidInputError, match="question_key"):
        prompt.format(docs=[], question="no", asked=["a message"])


def test_a_question_is_taken_as_it_stands():
    question = "Explain 'Question: x'\n\nAnswer: \x02 {context}"
    assert KVFusionPrompt.from_template(TEMPLATE).format(context=DOCUMENTS, question=question).question == question


@pytest.mark.parametrize("inner", [TEMPLATE, [("system", "{context}"), ("human", "{question}")]])
def test_a_frame_in_the_question_is_no_document(inner):
    prompt = PromptTemplate.from_template(inner) if isinstance(inner, str) else ChatPromptTemplate(inner)
    forged = frame(Document("Eve wrote it."))
    fused = KVFusionPrompt.from_prompt(prompt).format(context=DOCUMENTS, question=f"Who? {forged}")
    assert [d.id for d in fused.documents] == ["a", "b"]
    assert fused.question == f"Who? {forged}"


@pytest.mark.parametrize("key", ["documents_key", "question_key"])
def test_a_key_that_the_template_lacks_is_refused(key):
    with pytest.raises(InvalidInputError, match="no variable 'nowhere'"):
        KVFusionPrompt.from_prompt(PromptTemplate.from_template(TEMPLATE), **{key: "nowhere"})


def test_a_template_that_hides_the_documents_is_refused():
    pytest.importorskip("jinja2")
    template = "{% for d in context %}{{ d.page_content }}{% endfor %} {{ question }}"
    inner = PromptTemplate.from_template(template, template_format="jinja2")
    with pytest.raises(InvalidInputError, match="did not show 'context'"):
        KVFusionPrompt.from_prompt(inner).format(**VARIABLES)


def test_a_template_that_shows_the_documents_twice_is_refused():
    with pytest.raises(InvalidInputError, match="'context' 2 times"):
        KVFusionPrompt.from_template("{context} {question} {context}").format(**VARIABLES)


def test_without_documents_a_template_may_leave_out_what_stands_around_them():
    template = "{{#context}}Use this:\n{{{context}}}\n{{/context}}Be brief.\n{{{question}}}"
    prompt = KVFusionPrompt.from_prompt(PromptTemplate.from_template(template, template_format="mustache"))
    assert marked(prompt.format(**VARIABLES).messages) == [
        ("user", "Use this:\n{documents}\nBe brief.\nWho wrote it?")
    ]
    assert marked(prompt.format(context=[], question="Who?").messages) == [("user", "Be brief.\nWho?")]


@pytest.mark.parametrize("inner", ["{context}{question}", [("system", "{context}"), ("human", "{question}")]])
def test_a_prompt_that_says_nothing_is_refused_by_the_model(inner):
    prompt = PromptTemplate.from_template(inner) if isinstance(inner, str) else ChatPromptTemplate(inner)
    chain = KVFusionPrompt.from_prompt(prompt) | ChatKVFusion(generator=ChatRecorder())
    with pytest.raises(InvalidInputError, match="no question"):
        chain.invoke({"context": [], "question": ""})


def test_frames_in_the_documents_variable_bring_their_separator_and_titles():
    frames = f" {frame(Document('x', title='T'))}\n{frame(Document('y'))}\n"
    prompt = KVFusionPrompt.from_template("Read:{context}{question}").format(context=frames, question="Who?")
    assert marked(prompt.messages) == [("user", "Read: {documents}\nWho?")]
    assert prompt.messages[0].documents == DocumentsPlace(6, "\n", titles=True)
    assert str(prompt) == "Read: Title: T\nx\ny\nWho?"


@pytest.mark.parametrize(
    ("context", "texts"),
    [
        ([], []),
        ("", []),
        (["x", {"text": "y"}, Document("z")], ["x", "y", "z"]),
        (LangChainDocument("x"), ["x"]),
        ({"text": "x"}, ["x"]),
        (f"{frame(Document('x'))}\n\n{frame(Document('y'))}", ["x", "y"]),
    ],
)
def test_documents_come_in_many_forms(context, texts, caplog):
    fused = KVFusionPrompt.from_template(TEMPLATE, strict=True).format(context=context, question="?")
    assert [d.text for d in fused.documents] == texts
    assert not caplog.records


def test_a_joined_string_is_one_document_and_warns(caplog):
    prompt = KVFusionPrompt.from_template(TEMPLATE)
    with caplog.at_level(logging.WARNING):
        fused = prompt.format(context="Ada wrote it.\n\nBob read it.", question="?")
    assert [d.text for d in fused.documents] == ["Ada wrote it.\n\nBob read it."]
    assert "cannot be told apart" in caplog.text


@pytest.mark.parametrize("context", ["joined", f"{frame(Document('x'))} and more"])
def test_a_joined_string_is_refused_where_it_must_be(context):
    with pytest.raises(InvalidInputError, match="cannot be told apart"):
        KVFusionPrompt.from_template(TEMPLATE, strict=True).format(context=context, question="?")


async def test_partial_variables_work_in_the_wrapper_and_in_the_template():
    inner = PromptTemplate.from_template("{tone} " + TEMPLATE).partial(tone="Calmly.")
    prompt = KVFusionPrompt.from_prompt(inner).partial(question=lambda: "Who wrote it?")
    assert set(prompt.input_variables) == {"context"}
    for fused in await every_way(prompt, {"context": DOCUMENTS}):
        assert fused.question == "Who wrote it?"
        assert marked(fused.messages) == [("user", f"Calmly. {MESSAGES[0][1]}")]
    assert prompt.invoke(DOCUMENTS).to_string().question == "Who wrote it?"


def test_missing_variables_are_named():
    with pytest.raises(KeyError, match="question"):
        KVFusionPrompt.from_template(TEMPLATE).invoke({"context": DOCUMENTS})


def test_other_models_read_the_ordinary_prompt():
    inner = ChatPromptTemplate.from_messages([("system", "Be brief.\n\n{context}"), ("human", "{input}")])
    value = KVFusionPrompt.from_prompt(inner).invoke({"context": DOCUMENTS, "input": "Who?"})
    expected = [SystemMessage("Be brief.\n\nAda wrote it.\n\nBob read it."), HumanMessage("Who?")]
    assert value.to_messages() == expected
    assert KVFusionPrompt.from_template(TEMPLATE).invoke(VARIABLES).to_messages() == [HumanMessage(TEXT)]


def test_prompts_and_values_survive_a_round_trip_through_json():
    prompt = KVFusionPrompt.from_template(TEMPLATE)
    value = prompt.invoke(VARIABLES)
    for thing, classes in [
        (prompt, [KVFusionPrompt, PromptTemplate]),
        (value, [KVFusionPromptValue, HumanMessage]),
        (KVFusionDocumentPrompt(title_key="t"), [KVFusionDocumentPrompt]),
    ]:
        plain = json.loads(json.dumps(dumpd(thing)))
        assert load(plain, allowed_objects=classes, valid_namespaces=["langchain_kvfusion"]) == thing


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_a_fused_prompt_survives_copies(clone):
    prompt = KVFusionPrompt.from_template(TEMPLATE).format(**VARIABLES)
    twin = clone(prompt)
    assert (twin, twin.documents, twin.question, twin.messages) == (
        prompt,
        prompt.documents,
        prompt.question,
        prompt.messages,
    )


def test_the_digest_tells_apart_what_the_text_does_not():
    prompts = [
        FusedPrompt("ab", documents=documents, question=question, messages=[message])
        for documents in ([Document("ab")], [Document("a"), Document("b")], [Document("ab", "id")], [])
        for question in ("q", "ab")
        for message in (
            Message("user", "q"),
            Message.around("user", "q", ""),
            Message.around("user", "", "q"),
            Message.around("user", "", "q", separator="\n"),
            Message.around("user", "", "q", titles=True),
            Message.around("system", "", "q"),
        )
    ]
    assert len({prompt.digest() for prompt in prompts}) == len(prompts)
    assert len(set(prompts)) == 1


def test_documents_cannot_come_both_ways():
    prompt = KVFusionPrompt.from_template(TEMPLATE).format(**VARIABLES)
    for carrying in (prompt, frame(Document("x")) + " Who?"):
        with pytest.raises(InvalidInputError, match="one way only"):
            fuse_prompt(carrying, [Document("y")])
    inner = ChatPromptTemplate.from_messages([MessagesPlaceholder("past"), ("human", "{context} {question}")])
    past = [HumanMessage("Hi", additional_kwargs={"documents": ["x"]})]
    with pytest.raises(InvalidInputError, match="one way only"):
        KVFusionPrompt.from_prompt(inner).format(past=past, **VARIABLES)


def test_of_very_many_labels_the_last_with_a_question_counts():
    assert bare_question("Q: who?\n" + "Q:\nA:\n" * 200_000) == "who?"  # hours, if each label cut up all that follows
