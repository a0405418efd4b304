"""Parts of models that anybody may have published: GGUF headers, weights, and chat templates."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import tiny
from fuzzing import damaged, examples, ours
from growth import growth_of_time
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_gguf import ARCHITECTURE, field, header, tensor, text, write_gguf

from kvfusion_rag import KVFusionGenerator, ModelLoadError
from kvfusion_rag.model.adapters.base import _difference
from kvfusion_rag.model.gguf.header import read_header
from kvfusion_rag.text.reasoning import Tags, find_format

KEYS = st.sampled_from(["general.architecture", "general.alignment", "split.count", "llama.block_count", "a"])
MODEL = tiny.model("llama")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf").read_bytes()


@examples(30)
@given(data=st.data())
def test_damaged_gguf_headers_are_read_or_rejected(gguf, tmp_path, data):
    (tmp_path / "m.gguf").write_bytes(data.draw(damaged(gguf[:14_000])) + gguf[14_000:])
    ours(lambda: read_header(tmp_path / "m.gguf"))


@examples(60)
@given(
    st.lists(st.tuples(KEYS, st.integers(0, 13), st.binary(max_size=20)), max_size=4),
    st.lists(
        st.tuples(st.lists(st.integers(0, 2**64 - 1), max_size=5), st.integers(0, 40), st.integers(0, 2**64 - 1))
    ),
    st.none() | st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)),
)
def test_gguf_headers_of_any_fields_are_read_or_rejected(tmp_path, fields, tensors, counts):
    made = [field(key, kind, value) for key, kind, value in fields]
    shapes = tuple(tensor(str(n), tuple(shape), kind, at) for n, (shape, kind, at) in enumerate(tensors))
    (tmp_path / "m.gguf").write_bytes(header(ARCHITECTURE, *made, tensors=shapes, data=b"x" * 64, counts=counts))
    ours(lambda: read_header(tmp_path / "m.gguf"))


@pytest.mark.parametrize("key", ["llama.block_count", "llama.expert_count", "split.count"])
def test_errors_about_gguf_files_do_not_repeat_long_values(tmp_path, key):
    value = text(b"x" * 3_000_000)
    (tmp_path / "m.gguf").write_bytes(header(ARCHITECTURE, field(key, 8, value)))
    with pytest.raises(ModelLoadError) as caught:
        read_header(tmp_path / "m.gguf")
    assert len(str(caught.value)) < 300


@examples(30)
@given(data=st.data())
def test_damaged_weights_of_a_named_base_model_are_read_or_rejected(tmp_path, data):
    weights = {name: value for name, value in MODEL.state_dict().items() if "layers.0" in name}
    save_file(weights, tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    size = 8 + struct.unpack("<Q", content[:8])[0]
    head = data.draw(damaged(content[:size]))
    (tmp_path / "base").mkdir(exist_ok=True)
    (tmp_path / "base" / "model.safetensors").write_bytes(head + content[size:])
    ours(lambda: _difference(tmp_path / "base", MODEL))


# Chat templates. They belong to the model, so an endless one is not stopped

EXPRESSIONS = (
    *("'a' + 1", "1 / 0", "range(10 ** 9)", "messages[5].content", "messages.x.y.z", "''.__class__", "'a' * 10 ** 13"),
    *("raise_exception('no')", "messages[0].content[99]", "'%d' % 'a'", "none()", "'x' | no_such_filter", "a()"),
    *("[] | sum('x')", "'x' | int(5) | list", "messages | tojson", "'\\ud800'"),
)
STATEMENTS = [
    "{% for",
    "{% include 'x' %}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{% if 1 is x %}{% endif %}",
]
TEMPLATES = [*(f"{{{{ {one} }}}}" for one in EXPRESSIONS), *STATEMENTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.parametrize("start", ["", tiny.CHATML, "{% if messages[0].content == 'probe' %}probe{% else %}"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_template_that_fails_is_our_error(folder, template, start):
    (folder / "chat_template.jinja").write_text(start + template + ("{% endif %}" if "else" in start else ""))

    def answer() -> str:
        generator = KVFusionGenerator.from_pretrained(folder, mode="concat", store=None)
        return generator.answer("who built it?", ["the mill"], max_new_tokens=1).text

    ours(answer)


@pytest.mark.parametrize("unit", ["think", "[/", "</a", "</think"])
def test_time_to_find_the_tags_grows_in_step_with_the_template(unit):
    tok = tiny.byte_bpe()

    def run(size: int) -> None:
        tok.chat_template = "{# </" + unit * size + " #}"
        find_format(tok)

    assert growth_of_time(run, 2_000) < 10


@pytest.mark.parametrize(
    ("name", "is_found"), [("seed:think", True), ("my_reasoning", True), ("no.THOUGHTS", True), ("x", False)]
)
def test_tags_are_found_by_their_names(name, is_found):
    tok = tiny.byte_bpe()
    tok.chat_template = f"{{# </other> </{name}> #}}"
    assert find_format(tok) == (Tags(f"<{name}>", f"</{name}>") if is_found else None)
