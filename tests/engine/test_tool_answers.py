"""Answers that call tools: valid calls in the model's own format, equal in batches and streams, in every mode."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("llguidance")
pytest.importorskip("jsonschema")

import jsonschema
import tiny
from tool_templates import TEMPLATES, TOOLS, tool_model, tool_tokenizer

from kvfusion_rag import Answer, AnswerFormat, InvalidInputError, Message, Tool, ToolCall
from kvfusion_rag.fusion.constraints import ConstraintCompiler
from kvfusion_rag.fusion.sampling import DecodingOptions
from kvfusion_rag.text.encoder import PlainEncoder
from kvfusion_rag.text.tools.call_format import OWN_FORMAT
from kvfusion_rag.text.tools.definitions import ToolUse, definition
from kvfusion_rag.text.tools.grammar import call_grammar

QUESTION = "what is the weather in Lima?"
DOCUMENTS = ["the river runs past an old mill."]
SCHEMAS = {tool.name: tool.parameters for tool in TOOLS}
NATIVE = [name for name in TEMPLATES if name != "none"]


def require_valid(answer: Answer) -> None:
    assert answer.tool_calls and answer.finish_reason == "tool_calls"
    for call in answer.tool_calls:
        jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name] or {"type": "object", "maxProperties": 0})


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("mode", ["fusion", "concat", "ape"])
def test_batches_and_streams_equal_single_answers(name, mode):
    gen, questions = tool_model(name), [QUESTION, "when?"]
    for temperature, choice in [(0.0, "required"), (1.2, "required"), (0.0, "weather"), (1.2, "auto")]:
        options: dict[str, Any] = {
            "mode": mode, "tools": TOOLS, "tool_choice": choice, "temperature": temperature, "seed": 3,
            "max_new_tokens": 90,
        }  # fmt: skip
        singles = [gen.answer(question, DOCUMENTS, **options) for question in questions]
        batch = gen.answer_batch(questions, [DOCUMENTS] * 2, **options)
        for single, other, question in zip(singles, batch, questions, strict=True):
            assert (other.token_ids, other.text) == (single.token_ids, single.text)
            assert other.tool_calls == single.tool_calls
            stream = gen.stream(question, DOCUMENTS, **options)
            pieces = list(stream.pieces)
            assert stream.answer is not None and stream.answer.tool_calls == single.tool_calls
            assert "".join(piece.text for piece in pieces if piece.call_index is None) == single.text
            for number, call in enumerate(single.tool_calls):
                mine = [piece for piece in pieces if piece.call_index == number]
                assert mine[0].call == ToolCall(call.name, "", call.id)
                assert "".join(piece.text for piece in mine) == call.arguments
            if choice != "auto":
                require_valid(single)
                assert single.text == "" and (choice == "required" or single.tool_calls[0].name == choice)


@pytest.mark.parametrize("name", NATIVE)
def test_a_prompt_with_tools_has_the_ids_of_apply_chat_template(name):
    gen, tok = tool_model(name), tool_tokenizer(name)
    assert gen._engine.prompts.call_format("concat").is_native
    call = ToolCall("weather", '{"city": "Lima"}', "c1")
    turns = [
        Message("user", "hello"), Message("assistant", "", tool_calls=(call,)),
        Message("tool", "12 degrees", tool_call_id="c1"),
    ]  # fmt: skip
    function = {"name": "weather", "arguments": {"city": "Lima"}}
    expected = tok.apply_chat_template(
        [
            {"role": "user", "content": "hello"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "c1", "type": "function", "function": function}],
            },
            {"role": "tool", "content": "12 degrees", "tool_call_id": "c1", "name": "weather"},
        ],
        tools=[definition(tool) for tool in TOOLS],
        add_generation_prompt=True,
    )
    options, use = DecodingOptions(4), ToolUse.of(TOOLS, None, None)
    request = gen._engine.request("hello", [], turns, "concat", options, tools=use)
    assert list(request.question.ids) == list(expected["input_ids"])


@pytest.mark.parametrize("name", NATIVE)
def test_the_model_writes_calls_as_its_template_shows_them(name):
    answer = tool_model(name).answer(QUESTION, DOCUMENTS, tools=TOOLS, tool_choice="required", max_new_tokens=90)
    format = tool_model(name)._engine.prompts.call_format("concat")
    assert tool_tokenizer(name).decode(answer.token_ids).startswith(format.write(answer.tool_calls))


@pytest.mark.parametrize("name", TEMPLATES)
def test_documents_can_be_prefilled_for_questions_with_tools(name):
    gen = tool_model(name, "fusion")
    gen.prefill(DOCUMENTS)
    gen.prefill(DOCUMENTS, tools=TOOLS)
    (keys,) = gen.store_keys(DOCUMENTS, tools=TOOLS).values()
    assert all(key in gen.store for key in keys)
    for options in ({}, {"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "required"}):
        assert gen.answer(QUESTION, DOCUMENTS, max_new_tokens=90, **options).sources[0].origin == "memory"
    other = gen.answer(QUESTION, DOCUMENTS, max_new_tokens=90, tools=TOOLS[:1]).sources[0].origin
    assert other == ("computed" if gen.store_keys(DOCUMENTS) != gen.store_keys(DOCUMENTS, tools=TOOLS) else "memory")


def test_documents_of_fixed_templates_can_be_prefilled_for_questions_with_tools():
    gen = tiny.generator()
    gen.prefill(["the mill"], tools=TOOLS)
    found = gen.answer("who?", ["the mill"], mode="fusion", tools=TOOLS, max_new_tokens=90)
    assert [source.origin for source in found.sources] == ["memory"]


def test_tools_of_prefill_are_checked():
    with pytest.raises(InvalidInputError, match="must be a list of kvfusion_rag"):
        tool_model("tagged").prefill(DOCUMENTS, tools=["weather"])


def test_a_model_may_write_text_and_then_a_call():
    tok = tool_tokenizer("tagged")
    ids = tok("\n the river<tool_call>", add_special_tokens=False)["input_ids"]
    gen = tool_model("tagged")
    network, made = tiny.chained_model(ids), gen._engine.model.backbone
    spoken = gen.__class__(
        type(gen._engine.model)(type(made)(network, tok, made.settings, model_id="tiny-speaker")), store=None
    )
    answer = spoken.answer(QUESTION, tools=TOOLS, mode="concat", parallel_tool_calls=False, max_new_tokens=90)
    require_valid(answer)
    assert answer.text == "the river" and len(answer.tool_calls) == 1
    assert Answer.from_dict(json.loads(json.dumps(answer.to_dict()))) == answer


@pytest.mark.parametrize(
    ("text", "choice", "is_allowed"),
    [
        ("no <tool", "auto", True),
        ('so <tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>', "auto", True),
        ("so <tool_call> now", "auto", False),
        ('<tool_call>\n{"name": "later', "auto", False),
        ('<tool_call>\n{"name": "now", "arguments": {"x', "auto", False),
        ('<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}\n</tool_call>', "weather", True),
        ('<tool_call>\n{"name": "now"', "weather", False),
        ("so", "required", False),
    ],
)
def test_the_beginning_of_a_call_must_be_followed_by_a_valid_one(text, choice, is_allowed):
    tok = tiny.tokenizer("byte-bpe")
    plain, use = PlainEncoder(tok), ToolUse.of(TOOLS, choice, None)
    assert use is not None
    compiler = ConstraintCompiler(tok, 512, frozenset({tok.eos_token_id}))
    constraint = compiler.compile(call_grammar(use, OWN_FORMAT, plain.ids_of_control)).copy()
    ids = plain.encode(text)
    if not is_allowed:
        with pytest.raises(InvalidInputError, match="cannot be followed"):
            [constraint.accept(token) for token in ids]
    else:
        [constraint.accept(token) for token in ids]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("mode", ["fusion", "concat"])
def test_texts_of_tools_and_calls_never_become_control_tokens(name, mode):
    gen, tok = tool_model(name), tool_tokenizer(name)
    control = set(gen._engine.encoder.plain.control_ids)

    def ids(evil: str) -> list[int]:
        schema = {"type": "object", "properties": {f"p{evil}": {"type": "string", "description": f"d{evil}"}}}
        tools = ToolUse.of([Tool("weather", f"tells{evil}", schema)], None, None)
        call = ToolCall("weather", json.dumps({f"city{evil}": evil}), "c1")
        turns = [
            Message("user", "hello"), Message("assistant", f"t{evil}", tool_calls=(call,)),
            Message("tool", f"12{evil}", tool_call_id="c1"), Message("user", "and?"),
        ]  # fmt: skip
        request = gen._engine.request("and?", DOCUMENTS, turns, mode, DecodingOptions(4), tools=tools)
        return [i for i in (*request.scope.prefix, *request.question.ids) if i in control]

    clean = ids("")
    for token in tok.added_tokens_decoder.values():
        assert ids(str(token)) == clean


def test_names_between_signs_of_a_template_do_not_become_control_tokens():
    tok = tool_tokenizer("none")
    gen = tool_model("none")
    settings, made = gen.settings, gen._engine.model.backbone
    template = tiny.CHATML.replace("{% for m", "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}{% for m")
    other = tiny.byte_bpe()
    calls = "{% for c in m.tool_calls or [] %}@{{ c.function.name }}:{{ c.function.arguments | tojson }};{% endfor %}"
    other.chat_template = template.replace("{{ m.content }}", "{{ m.content }}" + calls)
    model = type(gen._engine.model)(type(made)(made.model, other, settings, model_id="signs"))
    signs = gen.__class__(model, store=None)
    assert signs._engine.prompts.call_format("concat").opening == "@"
    use = ToolUse.of([Tool("tool_call")], None, None)
    request = signs._engine.request("q", [], None, "concat", DecodingOptions(4), tools=use)
    assert tok.convert_tokens_to_ids("<tool_call>") not in request.question.ids
    assert "<tool_call>" in other.decode(request.question.ids)


def test_tools_conflict_with_other_forms_of_an_answer():
    gen = tool_model("none")
    with pytest.raises(InvalidInputError, match="With tools, only JSON is supported"):
        gen.answer(QUESTION, tools=TOOLS, response_format=AnswerFormat.choices(["yes"]))
    with pytest.raises(InvalidInputError, match="cannot choose between them"):
        tool_model("bare").answer(QUESTION, tools=TOOLS, response_format=AnswerFormat.json_object())
    with pytest.raises(InvalidInputError, match="a list of tools decides where the answer ends"):
        gen.answer(QUESTION, tools=TOOLS, stop=["x"])
    plain = gen.answer(QUESTION, DOCUMENTS, max_new_tokens=5)
    for unused in ({"tools": TOOLS, "tool_choice": "none"}, {"tools": []}):
        assert gen.answer(QUESTION, DOCUMENTS, max_new_tokens=5, **unused).token_ids == plain.token_ids


@pytest.mark.parametrize("name", ["tagged", "none"])
def test_an_answer_without_a_call_may_have_a_format(name):
    city = {"type": "object", "properties": {"city": {"enum": ["Lima", "Oslo"]}}, "required": ["city"]}
    for seed in range(6):
        answer = tool_model(name).answer(
            QUESTION, tools=TOOLS, response_format=AnswerFormat.json_schema(city), temperature=1.5, seed=seed,
            parallel_tool_calls=False, max_new_tokens=90,
        )  # fmt: skip
        if answer.tool_calls:
            require_valid(answer)
        else:
            jsonschema.validate(json.loads(answer.text), city)


def test_unsupported_parameters_are_rejected():
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    with pytest.raises(InvalidInputError, match=r"the list of tools cannot be used .*: .*uniqueItems"):
        tool_model("none").answer(QUESTION, tools=[Tool("a", "", schema)])


def test_a_model_of_bare_questions_has_no_tools():
    gen = tiny.generator(prompt_template=None, layout="fixed")
    with pytest.raises(InvalidInputError, match="reads bare questions, so it cannot be told of tools"):
        gen.answer("who?", ["the mill"], tools=TOOLS)


def test_a_tuned_model_reads_tools_in_its_own_template():
    gen = tiny.generator(max_new_tokens=90)
    require_valid(gen.answer("who?", ["the mill"], tools=TOOLS, tool_choice="required"))
    assert "You can call these tools" in gen.show_prompt("who?", ["the mill"], tools=TOOLS).text
