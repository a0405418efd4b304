"""Tools are checked before they are compiled, and calls are found in answers and in streams of any pieces."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfusion_rag import AnswerPiece, InvalidInputError, Message, Tool, ToolCall
from kvfusion_rag.text.answer_format import MAX_FORMAT_CHARACTERS
from kvfusion_rag.text.tools.call_format import OWN_FORMAT, CallFormat
from kvfusion_rag.text.tools.conversation import plain_messages
from kvfusion_rag.text.tools.definitions import MAX_TOOLS, ToolUse
from kvfusion_rag.text.tools.reading import CallReader

FORMATS = [OWN_FORMAT, CallFormat("[CALL]", "[ARGS]", "[CALL]", ""), CallFormat('{"n": "', '", "p": ', None, "}")]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('ab"\\{}[] é東\n', max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab} ", max_size=3), inner, max_size=2),
    max_leaves=4,
)
CALLS = st.lists(
    st.tuples(st.sampled_from(["a", "get_b"]), st.dictionaries(st.text("xy", max_size=2), JSON, max_size=2)),
    max_size=3,
)


def written(format: CallFormat, text: str, calls: list[tuple[str, dict]]) -> tuple[str, list[tuple[str, str]]]:
    calls = calls if format.between is not None else calls[:1]
    made = [ToolCall(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in calls]
    whole = text + (format.write(made) if made else "")
    return whole.strip(), [(call.name, call.arguments) for call in made]


@pytest.mark.parametrize("format", FORMATS)
@given(text=st.sampled_from(["", "so: ", "<tool", "[CAL", "hm\n"]), calls=CALLS, data=st.data())
def test_pieces_of_any_size_join_to_text_and_calls(format, text, calls, data):
    whole, expected = written(format, text, calls)
    reader = CallReader(format, (1, 2, 3))
    found, made = reader.read(whole)
    assert found == (text.strip() if expected else whole)
    assert [(call.name, call.arguments) for call in made] == expected
    assert len({call.id for call in made}) == len(made)
    splitter, pieces, at = reader.splitter(), [], 0
    while at < len(whole) or not pieces:
        size = data.draw(st.integers(1, 9))
        added = splitter.add(whole[at : at + size], is_complete=at + size >= len(whole))
        pieces += added or [AnswerPiece("")]
        at += size
    assert "".join(piece.text for piece in pieces if piece.call_index is None) == found
    starts = [piece.call for piece in pieces if piece.call is not None]
    assert [(start.name, start.id) for start in starts] == [(call.name, call.id) for call in made]
    for number, call in enumerate(made):
        assert "".join(piece.text for piece in pieces if piece.call_index == number) == call.arguments


def test_the_arguments_of_a_call_that_was_cut_are_cut():
    whole = OWN_FORMAT.write([ToolCall("a", '{"x": [1, 2]}')])
    _, [call] = CallReader(OWN_FORMAT, ()).read(whole[: whole.index(", 2]")])
    assert call.arguments == '{"x": [1'
    assert CallReader(OWN_FORMAT, ()).read(whole[: whole.index('a"')]) == ("", ())


def test_ids_of_calls_depend_on_the_prompt():
    whole = OWN_FORMAT.write([ToolCall("a", "{}")])
    ids = [CallReader(OWN_FORMAT, prompt).read(whole)[1][0].id for prompt in [(1,), (2,), (1,)]]
    assert ids[0] == ids[2] != ids[1] and all(re.fullmatch("call_[0-9a-f]{24}", each) for each in ids)


OBJECT = {"type": "object", "properties": {}}


@pytest.mark.parametrize(
    ("tools", "choice", "reason"),
    [
        ("a", None, "tools is a str"),
        ([{"name": "a"}], None, "must be a list of kvfusion_rag.Tool"),
        ([Tool("a b")], None, "a tool is named 'a b'"),
        ([Tool("")], None, "a tool is named ''"),
        ([Tool("auto")], None, "must not be one of auto, none, required"),
        ([Tool("a"), Tool("a")], None, "two tools are named 'a'"),
        ([Tool("a")], "b", "tool_choice is 'b'"),
        ([], "required", "there are no tools"),
        ([Tool(f"t{n}") for n in range(MAX_TOOLS + 1)], None, f"at most {MAX_TOOLS}"),
        ([Tool("a", "d" * MAX_FORMAT_CHARACTERS)], None, "pass fewer ones"),
        ([Tool("a", "", {"type": "array"})], None, '"array", but arguments are an object'),
        ([Tool("a", "", {**OBJECT, "default": {1}})], None, "is not JSON data"),
        ([Tool("a", "", [])], None, "must be a JSON schema"),
        ([Tool("a", 3)], None, "must be a text"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_wrong_tools_are_rejected(tools, choice, reason):
    with pytest.raises(InvalidInputError, match=re.escape(reason)):
        ToolUse.of(tools, choice, None)


def test_only_a_free_choice_allows_several_calls_by_default():
    for choice, parallel, several in [("auto", None, True), ("required", None, False), ("a", None, False),
                                      ("auto", False, False), ("required", True, True)]:  # fmt: skip
        use = ToolUse.of([Tool("a"), Tool("b")], choice, parallel)
        assert use is not None and use.several is several
        assert [name for name, _ in use.callable] == (["a"] if choice == "a" else ["a", "b"])
    assert ToolUse.of([Tool("a")], "none", None) is None is ToolUse.of([], None, None)


def test_calls_and_results_become_plain_messages():
    calls = (ToolCall("a", '{"x": 1}', "c1"), ToolCall("b", "{}", "c2"))
    messages = [
        Message("system", "Be brief."), Message("user", "q"), Message("assistant", "so", tool_calls=calls),
        Message("tool", "one", tool_call_id="c1"),
    ]  # fmt: skip
    system, user, assistant, result = plain_messages(messages, ToolUse.of([Tool("a", "Does a.")], None, None))
    assert system.text.startswith('You can call these tools:\n{"name": "a", "description": "Does a."')
    assert system.text.endswith("Be brief.") and user.text == "q"
    assert assistant.text == "so\n" + OWN_FORMAT.write(calls)
    assert (result.role, result.text) == ("user", "<tool_response>\none\n</tool_response>")
    assert plain_messages(messages[:2], None) == messages[:2]


def test_a_description_of_tools_moves_the_documents():
    message = Message.around("system", "before ", " after")
    [found, _] = plain_messages([message, Message("user", "q")], ToolUse.of([Tool("a")], None, None))
    assert found.documents is not None
    assert (found.text[: found.documents.offset][-7:], found.text[found.documents.offset :]) == ("before ", " after")
