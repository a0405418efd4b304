"""Linear layers by oneDNN: the same function as torch's, and its rows do not hang on each other."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from tiny import backbone, model
from torch.nn import Linear

from kvfusion_rag.model import linear
from kvfusion_rag.model.backbone import Backbone
from kvfusion_rag.model.linear import OneDNNLinear, replace_layers, use_onednn

pytestmark = pytest.mark.skipif(not linear.has_onednn(), reason="torch without oneDNN")


def layer(outputs: int, inputs: int, *, bias: bool = True) -> Linear:
    torch.manual_seed(outputs)
    return Linear(inputs, outputs, bias=bias)


def always_onednn(theirs: Linear) -> OneDNNLinear:
    """A layer that goes through oneDNN whatever its size and number of rows."""
    ours = OneDNNLinear.like(theirs)
    ours.rows = range(1, sys.maxsize)
    return ours


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 700), st.integers(1, 400), st.integers(1, 70), st.booleans(),
    st.sampled_from(["plain", "slice", "transposed"]),
)  # fmt: skip
def test_it_is_the_same_function(outputs, inputs, rows, bias, form):
    theirs = layer(outputs, inputs, bias=bias)
    ours = always_onednn(theirs)
    given = torch.randn(2, rows + 1, inputs)
    if form == "slice":
        given = given[:, 1:]
    elif form == "transposed":
        given = torch.randn(rows, 2, inputs).transpose(0, 1)
    with torch.inference_mode():
        found, expected = ours(given), theirs(given)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 700), st.integers(1, 400), st.integers(2, 64), st.randoms())
def test_rows_hang_on_nothing_but_themselves(outputs, inputs, rows, random):
    """Or the bits of a document would hang on its neighbours in a prefill pass."""
    ours = always_onednn(layer(outputs, inputs))
    order = random.sample(range(rows), rows)
    given = torch.randn(rows, inputs)
    with torch.inference_mode():
        assert ours(given[order]).equal(ours(given)[order])
        others = torch.randn(rows, inputs)
        others[0] = given[0]
        assert ours(others)[0].equal(ours(given)[0])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(4864, 896), (8192, 2048), (896, 4864), (2048, 8192), (896, 896), (64, 8192)]
)
def test_rows_hang_on_nothing_but_themselves_in_layers_of_real_size(outputs, inputs, threads):
    """Where sums are cut into blocks, and between threads."""
    ours, before = OneDNNLinear.like(layer(outputs, inputs)), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows in (2, 16, 127, 256):
            order, given = torch.randperm(rows), torch.randn(rows, inputs)
            with torch.inference_mode():
                assert ours(given[order]).equal(ours(given)[order])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32), (32,)])
def test_no_rows_and_no_row_dimension(shape):
    theirs = layer(96, 32)
    with torch.inference_mode():
        torch.testing.assert_close(OneDNNLinear.like(theirs)(torch.ones(shape)), theirs(torch.ones(shape)))


@pytest.mark.parametrize("changed", [torch.bfloat16, torch.float64, "meta"], ids=str)
def test_a_layer_that_was_moved_is_torchs_again(changed):
    theirs = layer(96, 32).to(changed)
    ours, given = OneDNNLinear.like(layer(96, 32)).to(changed), torch.randn(5, 32).to(changed)
    with torch.inference_mode():
        found, expected = ours(given), theirs(given)
    assert found.dtype == expected.dtype and found.device == expected.device
    assert changed == "meta" or found.equal(expected)


@pytest.mark.parametrize(
    ("avx512", "outputs", "shape", "expected"),
    [
        (False, 96, (7,), True), (False, 16, (4,), True), (False, 16, (2, 2), True), (False, 16, (5,), False),
        (False, 16, (2, 3), False), (False, 8, (4,), False), (True, 96, (1,), True), (True, 16, (1,), True),
        (True, 16, (99,), True), (True, 8, (1,), False), (True, 8, (2,), True), (True, 4, (2,), False),
    ],
)  # fmt: skip
def test_size_and_rows_decide_which_library_computes(monkeypatch, avx512, outputs, shape, expected):
    calls = []
    for name, value in (("SMALL", 8 * 32), ("LARGE", 16 * 32), ("FEW", 4)):
        monkeypatch.setattr(linear, name, value)
    monkeypatch.setattr(linear, "has_avx512", lambda: avx512)
    monkeypatch.setattr(linear, "onednn", lambda *given: calls.append(given) or torch.zeros(outputs))
    with torch.inference_mode():
        OneDNNLinear.like(layer(outputs, 32))(torch.ones(*shape, 32))
    assert bool(calls) is expected


def test_training_is_left_to_torch():
    theirs = layer(96, 32)
    ours, given = OneDNNLinear.like(theirs), torch.randn(5, 32)
    for one in (theirs, ours):
        one.zero_grad()
        one(given).square().sum().backward()
    assert ours(given).equal(theirs(given)) and ours.weight is theirs.weight
    with torch.no_grad():  # as under gradient checkpointing
        assert ours(given).equal(theirs(given))


@pytest.mark.parametrize("name", ["LARGE", "SMALL"])
@pytest.mark.parametrize("least", [linear.LARGE, 64 * 64, 64 * 64 + 1])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "bert"])
def test_only_layers_that_gain_are_replaced_and_weights_stay_where_they_are(monkeypatch, architecture, least, name):
    monkeypatch.setattr(linear, name, least)
    monkeypatch.setattr(linear, "has_avx512", lambda: name == "SMALL")
    made = model(architecture)
    before = {name: weight.data_ptr() for name, weight in made.state_dict().items()}
    sizes = {n: (m.out_features, m.in_features) for n, m in made.named_modules() if type(m) is Linear}
    wanted = [n for n, (outputs, inputs) in sizes.items() if outputs > inputs or outputs * inputs >= least]
    assert wanted or architecture == "gpt2"
    replace_layers(made)
    replace_layers(made)  # no layer twice
    assert [n for n, m in made.named_modules() if type(m) is OneDNNLinear] == wanted
    assert {name: weight.data_ptr() for name, weight in made.state_dict().items()} == before
    embeddings, head = made.get_input_embeddings(), made.get_output_embeddings()
    assert (head.weight is embeddings.weight) == made.config.tie_word_embeddings


def test_layers_that_are_not_plain_stay():
    class Own(Linear):
        pass

    hooked, own = layer(8, 4), layer(8, 4)
    hooked.register_forward_hook(lambda *_: None)
    own.forward = own.forward  # as accelerate does
    others = torch.nn.ModuleList([Own(4, 8), hooked, own, layer(4, 8), layer(8, 4).bfloat16()])
    replace_layers(others)
    assert not any(isinstance(one, OneDNNLinear) for one in others)


def test_an_adapter_goes_over_a_replaced_layer():
    made, plain = model("llama"), model("llama")
    replace_layers(made)
    settings = LoraConfig(target_modules=["gate_proj", "q_proj"], init_lora_weights=False)
    for one in (made, plain):
        torch.manual_seed(0)
        one.add_adapter(settings)
        one.eval()
    ids = torch.arange(9)[None]
    with torch.inference_mode():
        torch.testing.assert_close(made(ids).logits, plain(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("processor", "expected"), [("AMD EPYC", True), ("Intel(R) Xeon(R)", False), ("arm", False)])
def test_only_where_it_is_faster(monkeypatch, processor, expected):
    monkeypatch.setattr(linear, "device_name", lambda device: processor)
    made = model("llama")
    assert use_onednn(made) is expected
    assert any(isinstance(one, OneDNNLinear) for one in made.modules()) is expected


@pytest.mark.parametrize("found", [AttributeError, RuntimeError, TypeError, "wrong"])
def test_an_operator_that_is_not_what_it_was_is_not_used(monkeypatch, found):
    def operator(input, weight, bias):
        if found == "wrong":
            return torch.zeros(2, 5)
        raise found

    monkeypatch.setattr(linear, "onednn", operator)
    assert not linear.has_onednn()
    assert not any(isinstance(one, OneDNNLinear) for one in backbone("llama").model.modules())


def test_a_model_that_two_backbones_share_has_one_fingerprint():
    first = backbone("llama")
    second = Backbone(first.model, first.tokenizer, first.settings, model_id=first.model_id)
    assert first.linear == second.linear and first.fingerprint() == second.fingerprint()


def test_a_document_of_other_kernels_has_another_key(monkeypatch):
    found = set()
    for processor in ("AMD EPYC", "Intel(R) Xeon(R)"):
        monkeypatch.setattr(linear, "device_name", lambda device, name=processor: name)
        found.add(backbone("llama").fingerprint())
    assert len(found) == 2
