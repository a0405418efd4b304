"""``kvfusion chat``: follow-up questions, commands, and lines from terminals and pipes."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from commands import CommandGenerator, run
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from kvfusion_rag import Document, InvalidInputError
from kvfusion_rag.cli import chat
from kvfusion_rag.cli.chat.conversation import Conversation, Turn
from kvfusion_rag.cli.chat.terminal import HISTORY_FILE, open_lines

DOCUMENTS = [Document("The office is In Lima.", id="a", metadata={"source": "a.txt", "chunk": 1})]


class Rewriter(CommandGenerator):
    """Answers with the next of its texts."""

    texts: Iterator[str]
    finish_reason = "stop"

    def answer_to(self, call):
        self.pieces = (next(self.texts),)
        answer = super().answer_to(call)
        object.__setattr__(answer, "finish_reason", self.finish_reason)
        return answer


def conversation(*texts: str, **attributes) -> Conversation:
    generator = Rewriter(**attributes)
    generator.texts = iter(texts)
    return Conversation(generator, lambda question: DOCUMENTS)


def answered(talk: Conversation, question: str) -> Turn:
    reply = talk.begin(question)
    for _ in reply.stream.pieces:
        pass
    return talk.finish(reply)


def test_first_question_is_read_as_it_is():
    talk = conversation("in lima")
    assert answered(talk, "Where is it?").standalone == "Where is it?"
    assert len(talk._generator.calls) == 1


def test_model_that_follows_instructions_rewrites_later_questions():
    talk = conversation("in lima", "\nHow old is the office?\n\nIt is old.", "old")
    answered(talk, "Where is the office?")
    turn = answered(talk, "How old is it?")
    assert (turn.question, turn.standalone) == ("How old is it?", "How old is the office?")
    rewriting, reading = talk._generator.calls[1:]
    assert rewriting.documents == [] and reading.question == "How old is the office?"
    for part in ("Where is the office?", "in lima", "How old is it?"):
        assert part in rewriting.wording


@pytest.mark.parametrize(
    ("text", "finish_reason"), [("How old is the off", "length"), ("x" * 501, "stop"), (" \n", "stop")]
)
def test_question_stays_if_its_new_form_is_unusable(text, finish_reason):
    talk = conversation("in lima", text, "old")
    answered(talk, "Where is the office?")
    talk._generator.finish_reason = finish_reason
    assert talk.standalone("How old is it?") == "How old is it?"


@pytest.mark.parametrize(
    ("question", "standalone"),
    [
        ("How old is it?", "Where is the office? How old is it?"),
        ("And in winter?", "Where is the office? And in winter?"),
        ("Which river flows through Lima?", "Which river flows through Lima?"),
    ],
)
def test_bare_reader_gets_the_question_before_if_there_is_a_reference(question, standalone):
    talk = conversation("in lima", follows_instructions=False)
    answered(talk, "Where is the office?")
    assert talk.standalone(question) == standalone


def test_new_conversation_has_no_references():
    talk = conversation("in lima", follows_instructions=False)
    answered(talk, "Where is the office?")
    talk.forget()
    assert talk.standalone("How old is it?") == "How old is it?"


# The command


@pytest.fixture
def talk(monkeypatch, capsys, generator, docs):
    """Return a function that runs the command over lines of a pipe."""
    monkeypatch.setattr(chat, "load_generator", lambda args: generator)
    generator.follows_instructions = False

    def talk(*lines: str, argv: tuple = ()) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return run(capsys, "chat", "--docs", docs, *argv)

    return talk


def test_lines_of_a_pipe_are_answered_with_their_places(talk, docs):
    code, out, err = talk("Where is the office?", "", "How old is it?")
    assert (code, err) == (0, "")
    place = f"  [{docs / 'peru.md'}, line 3]"
    lines = out.splitlines()
    assert lines[0] == "2 files. /help lists the commands, /quit ends."
    assert "data.bin" in lines[2]
    assert lines[3:] == [
        "in lima", "  in the source's spelling: In Lima", place,
        "(read as: Where is the office? How old is it?)", "in lima", "  in the source's spelling: In Lima", place,
    ]  # fmt: skip


def test_commands_show_and_set(talk, generator):
    lines = [
        "/mode",
        "/mode concat",
        "/mode odd",
        "/focus 2",
        "/focus -1",
        "Where?",
        "/sources",
        "/files",
        "/new",
        "/help",
    ]
    code, out, err = talk("/sources", *lines, "/odd", "/quit", "Never asked?")
    assert code == 0 and [call.question for call in generator.calls] == ["Where?"]
    assert generator.calls[0].options["mode"] == "concat" and generator.calls[0].options["focus"] == 2
    for text in (
        "mode auto",
        "mode concat",
        "focus 2",
        "- peru.md",
        "sources (* contains",
        "/quit",
        "new conversation",
    ):
        assert text in out
    for text in ("there is no answer yet", "the mode is 'odd'", "the focus is '-1'", "/odd is not a command"):
        assert text in err


def test_failed_question_does_not_end_the_conversation(talk, generator, monkeypatch):
    real, failing = generator.stream, {"Bad?"}

    def stream(question, *arguments, **options):
        if question in failing:
            raise InvalidInputError("the question is bad.")
        return real(question, *arguments, **options)

    monkeypatch.setattr(generator, "stream", stream)
    code, out, err = talk("Bad?", "Where is the office?")
    assert code == 1 and err == "kvfusion: error: the question is bad.\n"
    assert out.count("in lima") == 1


def test_json_is_one_object_with_all_turns(talk):
    code, out, err = talk("/help", "Where is the office?", "/sources", "/files", "/new", "Where?", argv=("--json",))
    data = json.loads(out)
    assert (code, err, data["failed"]) == (0, "", 0)
    assert [(turn["question"], turn["read_as"], turn["answer"]) for turn in data["turns"]] == [
        ("Where is the office?", "Where is the office?", "In Lima"),
        ("Where?", "Where?", "In Lima"),
    ]


def test_chat_needs_documents(capsys):
    assert run(capsys, "chat")[2] == (
        "kvfusion: error: there are no documents; pass them with --docs, or an index with --index.\n"
    )


# The terminal


def typed(text: str, *, keep: bool = True) -> list[str]:
    with ExitStack() as stack:
        pipe = stack.enter_context(create_pipe_input())
        pipe.send_text(text)
        return list(open_lines(keep=keep, terminal=(pipe, DummyOutput())))


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("KVFUSION_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_terminal_ends_with_control_d_and_drops_a_line_with_control_c():
    assert typed("Where?\nHow o\x03Why?\n\x04") == ["Where?", "Why?"]


def test_history_returns_in_the_next_conversation(folder):
    assert typed("Where?\n\x04") == ["Where?"]
    assert typed("\x1b[A\n\x04") == ["Where?"]
    assert (folder / HISTORY_FILE).exists()


def test_history_is_not_kept_unwanted(folder):
    typed("Where?\n\x04", keep=False)
    assert not (folder / HISTORY_FILE).exists()
