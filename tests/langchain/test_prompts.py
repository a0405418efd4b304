"""KVFusionPrompt: documents, bare question, messages, and the ordinary prompt for other models."""

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
    """Return the prompts of all six methods of formatting."""
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
async def test_every_template_keeps_documents_separate(inner):
    variables = VARIABLES | {"asked": "Who wrote it?"}
    for prompt in await every_way(KVFusionPrompt.from_prompt(inner), variables):
        assert isinstance(prompt, FusedPrompt)
        assert prompt.documents == (Document("Ada wrote it.", "a"), Document("Bob read it.", "b"))
        assert prompt.question == "Who wrote it?"
        assert marked(prompt.messages) == MESSAGES
        assert prompt.messages[0].documents == DocumentsPlace(len("Use the context.\n\n"), "\n\n", titles=False)
        assert str(prompt) == TEXT


async def test_chat_template_keeps_its_messages():
    inner = ChatPromptTemplate.from_messages([("system", "Be brief.\n\n{context}"), ("human", "{input}")])
    for prompt in await every_way(KVFusionPrompt.from_prompt(inner), {"context": DOCUMENTS, "input": "Who?"}):
        assert marked(prompt.messages) == [("system", "Be brief.\n\n{documents}"), ("user", "Who?")]
        assert prompt.question == "Who?"
        assert str(prompt) == "Be brief.\n\nAda wrote it.\n\nBob read it.\n\nWho?"


def test_message_with_only_documents_is_kept():
    inner = ChatPromptTemplate.from_messages([("system", "{context}"), ("human", "Tell me: {what}")])
    prompt = KVFusionPrompt.from_prompt(inner).format(context=DOCUMENTS, what="who?")
    assert marked(prompt.messages) == [("system", "{documents}"), ("user", "Tell me: who?")]
    assert prompt.question == "Tell me: who?"


@pytest.mark.parametrize(
    "template", ["\n {context}\t\n\n {question}\n", "{context}{question}", " {question} {context}"]
)
def test_white_space_is_unchanged(template):
    prompt = KVFusionPrompt.from_template(template).format(**VARIABLES)
    expected = template.replace("{context}", "{documents}").replace("{question}", "Who wrote it?")
    assert marked(prompt.messages) == [("user", expected)]
    assert str(prompt) == expected.replace("{documents}", "Ada wrote it.\n\nBob read it.")


def test_history_is_kept_and_the_last_message_is_the_question():
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


def test_last_system_message_becomes_a_user_message():
    inner = ChatPromptTemplate.from_messages(
        [("system", "Be brief."), ("system", "{context}\n\nQuestion: {question}")]
    )
    prompt = KVFusionPrompt.from_prompt(inner).format(**VARIABLES)
    assert marked(prompt.messages) == [("system", "Be brief."), ("user", "{documents}\n\nQuestion: Who wrote it?")]


@pytest.mark.parametrize("names", [("question", "input"), ("input", "query"), ("query", "other")])
def test_question_is_the_first_known_variable(names):
    prompt = KVFusionPrompt.from_template(f"{{context}} {{{names[1]}}} {{{names[0]}}}")
    assert prompt.format(context=[], **{names[0]: "Q1", names[1]: "Q2"}).question == "Q1"


def test_question_key_selects_the_question():
    prompt = KVFusionPrompt.from_template("{docs} {question} {asked}", "docs", "asked")
    assert prompt.format(docs=[], question="no", asked="yes").question == "yes"
    with pytest.raises(InvalidInputError, match="question_key"):
        prompt.format(docs=[], question="no", asked=["a message"])


def test_question_is_unchanged():
    question = "Explain 'Question: x'\n\nAnswer: \x02 {context}"
    assert KVFusionPrompt.from_template(TEMPLATE).format(context=DOCUMENTS, question=question).question == question


@pytest.mark.parametrize("inner", [TEMPLATE, [("system", "{context}"), ("human", "{question}")]])
def test_frame_in_the_question_is_not_a_document(inner):
    prompt = PromptTemplate.from_template(inner) if isinstance(inner, str) else ChatPromptTemplate(inner)
    forged = frame(Document("Eve wrote it."))
    fused = KVFusionPrompt.from_prompt(prompt).format(context=DOCUMENTS, question=f"Who? {forged}")
    assert [d.id for d in fused.documents] == ["a", "b"]
    assert fused.question == f"Who? {forged}"


@pytest.mark.parametrize("key", ["documents_key", "question_key"])
def test_missing_key_is_rejected(key):
    with pytest.raises(InvalidInputError, match="not 'nowhere'"):
        KVFusionPrompt.from_prompt(PromptTemplate.from_template(TEMPLATE), **{key: "nowhere"})


def test_template_that_hides_the_documents_is_rejected():
    pytest.importorskip("jinja2")
    template = "{% for d in context %}{{ d.page_content }}{% endfor %} {{ question }}"
    inner = PromptTemplate.from_template(template, template_format="jinja2")
    with pytest.raises(InvalidInputError, match="does not insert 'context'"):
        KVFusionPrompt.from_prompt(inner).format(**VARIABLES)


def test_template_with_the_documents_twice_is_rejected():
    with pytest.raises(InvalidInputError, match="'context' 2 times"):
        KVFusionPrompt.from_template("{context} {question} {context}").format(**VARIABLES)


def test_template_may_omit_the_text_around_missing_documents():
    template = "{{#context}}Use this:\n{{{context}}}\n{{/context}}Be brief.\n{{{question}}}"
    prompt = KVFusionPrompt.from_prompt(PromptTemplate.from_template(template, template_format="mustache"))
    assert marked(prompt.format(**VARIABLES).messages) == [
        ("user", "Use this:\n{documents}\nBe brief.\nWho wrote it?")
    ]
    assert marked(prompt.format(context=[], question="Who?").messages) == [("user", "Be brief.\nWho?")]


@pytest.mark.parametrize("inner", ["{context}{question}", [("system", "{context}"), ("human", "{question}")]])
def test_empty_prompt_is_rejected_by_the_model(inner):
    prompt = PromptTemplate.from_template(inner) if isinstance(inner, str) else ChatPromptTemplate(inner)
    chain = KVFusionPrompt.from_prompt(prompt) | ChatKVFusion(generator=ChatRecorder())
    with pytest.raises(InvalidInputError, match="no human message"):
        chain.invoke({"context": [], "question": ""})


def test_framed_variable_keeps_separator_and_titles():
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
    ids=["empty list", "empty text", "list", "document", "dict", "framed"],
)
def test_documents_may_have_many_types(context, texts, caplog):
    fused = KVFusionPrompt.from_template(TEMPLATE, strict=True).format(context=context, question="?")
    assert [d.text for d in fused.documents] == texts
    assert not caplog.records


def test_joined_string_is_one_document_with_a_warning(caplog):
    prompt = KVFusionPrompt.from_template(TEMPLATE)
    with caplog.at_level(logging.WARNING):
        fused = prompt.format(context="Ada wrote it.\n\nBob read it.", question="?")
    assert [d.text for d in fused.documents] == ["Ada wrote it.\n\nBob read it."]
    assert "cannot be separated" in caplog.text


@pytest.mark.parametrize("context", ["joined", f"{frame(Document('x'))} and more"], ids=["text", "framed"])
def test_strict_prompt_rejects_a_joined_string(context):
    with pytest.raises(InvalidInputError, match="cannot be separated"):
        KVFusionPrompt.from_template(TEMPLATE, strict=True).format(context=context, question="?")


async def test_partial_variables_of_wrapper_and_template():
    inner = PromptTemplate.from_template("{tone} " + TEMPLATE).partial(tone="Calmly.")
    prompt = KVFusionPrompt.from_prompt(inner).partial(question=lambda: "Who wrote it?")
    assert set(prompt.input_variables) == {"context"}
    for fused in await every_way(prompt, {"context": DOCUMENTS}):
        assert fused.question == "Who wrote it?"
        assert marked(fused.messages) == [("user", f"Calmly. {MESSAGES[0][1]}")]
    assert prompt.invoke(DOCUMENTS).to_string().question == "Who wrote it?"


def test_missing_variable_is_named():
    with pytest.raises(KeyError, match="question"):
        KVFusionPrompt.from_template(TEMPLATE).invoke({"context": DOCUMENTS})


def test_other_models_get_the_ordinary_prompt():
    inner = ChatPromptTemplate.from_messages([("system", "Be brief.\n\n{context}"), ("human", "{input}")])
    value = KVFusionPrompt.from_prompt(inner).invoke({"context": DOCUMENTS, "input": "Who?"})
    expected = [SystemMessage("Be brief.\n\nAda wrote it.\n\nBob read it."), HumanMessage("Who?")]
    assert value.to_messages() == expected
    assert KVFusionPrompt.from_template(TEMPLATE).invoke(VARIABLES).to_messages() == [HumanMessage(TEXT)]


def test_prompts_and_values_can_be_serialized_to_json():
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
def test_fused_prompt_can_be_copied(clone):
    prompt = KVFusionPrompt.from_template(TEMPLATE).format(**VARIABLES)
    twin = clone(prompt)
    assert (twin, twin.documents, twin.question, twin.messages) == (
        prompt,
        prompt.documents,
        prompt.question,
        prompt.messages,
    )


def test_digest_distinguishes_prompts_with_equal_text():
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


def test_documents_in_prompt_and_argument_are_rejected():
    prompt = KVFusionPrompt.from_template(TEMPLATE).format(**VARIABLES)
    for carrying in (prompt, frame(Document("x")) + " Who?"):
        with pytest.raises(InvalidInputError, match="one way only"):
            fuse_prompt(carrying, [Document("y")])
    inner = ChatPromptTemplate.from_messages([MessagesPlaceholder("past"), ("human", "{context} {question}")])
    past = [HumanMessage("Hi", additional_kwargs={"documents": ["x"]})]
    with pytest.raises(InvalidInputError, match="one way only"):
        KVFusionPrompt.from_prompt(inner).format(past=past, **VARIABLES)


def test_last_label_with_a_question_is_found_in_linear_time():
    assert bare_question("Q: who?\n" + "Q:\nA:\n" * 20_000) == "who?"  # would take minutes in quadratic time
