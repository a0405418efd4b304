"""Reads questions and commands from a terminal or a pipe, and prints answers while they are computed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, TextIO, cast, get_args

from ...errors import KVFusionError
from ...home import home
from ...schema import ModeChoice
from ..console import print_error, say, say_json, say_left_out, say_list, shown_path
from ..output.answers import answer_to_json, place_of, say_facts, say_notice, say_pieces, say_sources, say_spelling
from .conversation import Conversation, Turn

if TYPE_CHECKING:
    from prompt_toolkit.input import Input
    from prompt_toolkit.output import Output

    from ...retrieval import IndexReport

Lines = Generator[str, None, None]
PROMPT = "> "
HISTORY_FILE = "chat_history"
MODES = get_args(ModeChoice)


def open_lines(
    *, keep: bool, stdin: TextIO | None = None, terminal: tuple[Input, Output] | None = None
) -> Generator[str, None, None]:
    """Yield the lines of standard input. A terminal gets a prompt with line editing and a history.

    Args:
        keep: whether a terminal's lines are kept for the next conversation, in kvfusion's own folder.
        stdin: read instead of standard input.
        terminal: used instead of the real one.
    """
    source: TextIO = stdin or sys.stdin  # pyright: ignore[reportAssignmentType]  # commands always have one
    if terminal is None and not (source.isatty() and sys.stdout.isatty()):
        yield from (line.rstrip("\n") for line in source)
        return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    home().mkdir(parents=True, exist_ok=True)
    devices: dict[str, Any] = {} if terminal is None else {"input": terminal[0], "output": terminal[1]}
    history = FileHistory(str(home() / HISTORY_FILE)) if keep else InMemoryHistory()
    session: PromptSession[str] = PromptSession(PROMPT, history=history, **devices)
    while True:
        try:
            yield session.prompt()
        except KeyboardInterrupt:  # drops the line
            continue
        except EOFError:
            return


class Terminal:
    """Answers lines of a conversation, and runs those that begin with ``/`` as commands.

    Args:
        files: names of the files that are searched.
        quiet: print one JSON object at the end, and nothing else.
    """

    def __init__(self, conversation: Conversation, files: Sequence[str], *, quiet: bool = False) -> None:
        self._conversation = conversation
        self._files = files
        self._quiet = quiet
        self._all: list[Turn] = []  # also those of conversations before /new
        self._failed = 0
        self._commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "help": ("list the commands", self._help),
            "sources": ("show the documents of the last answer", self._sources),
            "files": ("list the files that are searched", self._list_files),
            "mode": (f"show or set the mode: {', '.join(MODES)}", self._set_mode),
            "focus": ("show or set the number of documents that are kept: a number, none or auto", self._set_focus),
            "new": ("begin a new conversation", self._begin_anew),
            "quit": ("end", self._help),
        }

    def talk(self, lines: Lines, report: IndexReport | None = None) -> int:
        """Answer all lines. Return the exit code: 0, or 1 if a question could not be answered."""
        if not self._quiet:
            say(f"{len(self._files)} file{'s' * (len(self._files) != 1)}. /help lists the commands, /quit ends.")
            if report is not None:
                say_left_out(report, heading="not searched")
        for line in lines:
            text = line.strip()
            if text in ("/quit", "/exit"):
                break
            if text.startswith("/"):
                self._obey(text[1:])
            elif text:
                self._answer(text)
        if self._quiet:
            turns = [
                {
                    "question": turn.question,
                    "read_as": turn.standalone,
                    **answer_to_json(turn.answer, turn.documents, None),
                }
                for turn in self._all
            ]
            say_json({"turns": turns, "failed": self._failed})
        return 1 if self._failed else 0

    def _answer(self, question: str) -> None:
        """Answer one question. An error or Ctrl-C ends only this answer."""
        try:
            reply = self._conversation.begin(question)
            if not self._quiet and reply.standalone != question:
                say(f"(read as: {reply.standalone})")
            with closing(reply.stream):
                if self._quiet:
                    for _ in reply.stream.pieces:
                        pass
                else:
                    say_pieces(reply.stream.pieces, show_reasoning=False)
        except KVFusionError as error:
            self._failed += 1
            print_error(str(error))
            return
        except KeyboardInterrupt:
            say("\n(interrupted)")
            return
        turn = self._conversation.finish(reply)
        self._all.append(turn)
        if not self._quiet:
            say_spelling(turn.answer)
            say_notice(turn.answer)
            _say_citations(turn)

    def _obey(self, text: str) -> None:
        name, _, value = text.partition(" ")
        if name not in self._commands:
            print_error(f"/{name} is not a command; /help lists them.")
            return
        self._commands[name][1](value.strip())

    def _say(self, text: str) -> None:
        if not self._quiet:
            say(text)

    def _help(self, value: str) -> None:
        for name, (summary, _) in self._commands.items():
            self._say(f"  /{name:<8} {summary}")

    def _sources(self, value: str) -> None:
        if not self._conversation.turns:
            print_error("there is no answer yet, so there are no sources.")
            return
        if self._quiet:
            return
        turn = self._conversation.turns[-1]
        say_sources(turn.answer, turn.standalone, turn.documents)
        say_facts(turn.answer)

    def _list_files(self, value: str) -> None:
        if not self._quiet:
            say_list("-", list(self._files))

    def _set_mode(self, value: str) -> None:
        if value and value not in MODES:
            print_error(f"the mode is {value!r}, but it must be one of {', '.join(MODES)}.")
            return
        if value:
            self._conversation.mode = cast("ModeChoice", value)
        self._say(f"  mode {self._conversation.mode or 'auto'}")

    def _set_focus(self, value: str) -> None:
        if value and value not in ("none", "auto") and not (value.isdecimal() and int(value) > 0):
            print_error(f"the focus is {value!r}, but it must be a number above 0, none or auto.")
            return
        if value:
            self._conversation.focus = None if value == "none" else "auto" if value == "auto" else int(value)
        focus = self._conversation.focus
        self._say(f"  focus {'none' if focus is None else focus}")

    def _begin_anew(self, value: str) -> None:
        self._conversation.forget()
        self._say("  the next question begins a new conversation")


def _say_citations(turn: Turn) -> None:
    """Print the places where the answer occurs, and a note if it was cut off."""
    documents = {document.id: document for document in turn.documents}
    for citation in turn.answer.citations:
        document = documents[citation.document_id]
        say(f"  [{shown_path(document.metadata['source'])}, {place_of(document, citation.start)}]")
    if turn.answer.finish_reason == "length":
        say("  (cut off by the limit on new tokens)")
