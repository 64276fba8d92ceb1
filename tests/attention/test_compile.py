"""torch.compile(fullgraph=True): one opaque node, at most two graphs, counted and differentiable."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from diffctrl.attention import EngineStats, attend
from diffctrl.attention import lists as lists_module
from diffctrl.attention.ops import attend_op
from tests.attention.cases import make_inputs, make_rule, random_lists


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("passed", ["mask", "tensors"])
@pytest.mark.parametrize("sizes", [(300, 300, 517), (300, 389, 517), (300, 260, 129)])
def test_three_lists_and_three_sizes_make_two_graphs(grad, passed, sizes, monkeypatch):
    rebuilt = []
    monkeypatch.setattr(lists_module, "_rebuilt", lambda *args: rebuilt.append(args))
    counter, stats = CompileCounterWithBackend("aot_eager"), EngineStats()

    @torch.compile(fullgraph=True, backend=counter)
    def layer(q, k, v, mask):
        return attend(q * 2.0, k, v, mask=mask, stats=stats).square()

    for step, length in enumerate(sizes):
        mask = random_lists((128, 128), (length, length), density=0.3 + 0.3 * step, heads=2, seed=step)
        inputs = make_inputs(2, 2, 2, (length, length), 32, requires_grad=grad)
        out = layer(*inputs, mask if passed == "mask" else mask.on("cpu"))
        q, k, v = inputs
        expected = attend(q * 2.0, k, v, mask=mask).square()
        assert torch.equal(out, expected)
        if grad:
            got = torch.autograd.grad(out.sum(), inputs)
            wanted = torch.autograd.grad(expected.sum(), inputs)
            for one, two in zip(got, wanted, strict=True):
                torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
    assert counter.frame_count <= 2
    assert stats.calls == {"gathered": 3}
    assert stats.as_dict()["density"] < 1.0
    assert not rebuilt  # the masks were found again behind their tensors


def test_torchs_own_kernels_have_gradients_in_compiled_code():
    inputs = make_inputs(1, 2, 2, (40, 56), 16, requires_grad=True)
    layer = torch.compile(lambda *qkv: attend(*qkv, kernel="sdpa"), fullgraph=True, backend="aot_eager")
    out, expected = layer(*inputs), attend(*inputs)
    assert torch.equal(out, expected)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad(out, inputs, direction)
    for one, two in zip(got, torch.autograd.grad(expected, inputs, direction), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


def test_inductor_gives_the_same_bits():
    mask = random_lists((64, 64), (150, 150), heads=2)
    inputs = make_inputs(1, 2, 2, (150, 150), 32)
    out, lse = torch.compile(lambda q, k, v, m: attend(q, k, v, mask=m, return_lse=True), fullgraph=True)(
        *inputs, mask
    )
    expected, expected_lse = attend(*inputs, mask=mask, return_lse=True)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


def test_dense_calls_trace_into_the_graph():
    counter = CompileCounter()
    stats = EngineStats()

    @torch.compile(fullgraph=True, backend=counter)
    def layer(q, k, v):
        return attend(q, k, v, stats=stats)

    for length in (40, 52, 67):
        inputs = make_inputs(2, 2, 2, (length, length), 16)
        assert torch.equal(layer(*inputs), attend(*inputs))
    assert counter.frame_count <= 2
    assert not stats.calls


def test_dense_calls_with_lse_compile_too():
    counter = CompileCounterWithBackend("aot_eager")
    layer = torch.compile(lambda *qkv: attend(*qkv, return_lse=True), fullgraph=True, backend=counter)
    for length in (40, 300, 517):
        inputs = make_inputs(2, 2, 2, (length, length), 16)
        out, lse = layer(*inputs)
        expected, expected_lse = attend(*inputs, return_lse=True)
        assert torch.equal(out, expected)
        torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("kind", ["n_valid", "causal", "kv_validity"])
def test_lengths_and_rules_travel_as_tensors(kind):
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def layer(q, k, v, mask):
        return attend(q, k, v, mask=mask, return_lse=True)

    for step, length in enumerate((90, 100, 120)):
        lengths = (length, length)
        fields = (
            {"n_valid": [length - step, 40 + step]}
            if kind == "n_valid"
            else {"rule": make_rule(kind, lengths, 2)}
        )
        mask = random_lists((16, 16), lengths, heads=2, density=0.7, seed=step, **fields)
        inputs = make_inputs(2, 2, 2, lengths, 16)
        for got, expected in zip(
            layer(*inputs, mask), attend(*inputs, mask=mask, return_lse=True), strict=True
        ):
            assert torch.equal(got, expected)
    assert counter.frame_count <= 2


def test_the_operator_keeps_torchs_contract():
    mask = random_lists((16, 16), (40, 40), heads=2).on("cpu")
    for grad in (False, True):
        inputs = make_inputs(1, 2, 2, (40, 40), 16, requires_grad=grad)
        args = (
            *inputs, mask.counts, mask.indices, None, None, None, [], "", [16, 16], 0.25, True, grad, "", 0,
        )  # fmt: skip
        torch.library.opcheck(attend_op, args)


def test_a_forced_kernel_holds_in_compiled_code():
    mask = random_lists((16, 16), (40, 40), heads=2)
    inputs = make_inputs(1, 2, 2, (40, 40), 16)
    stats = EngineStats()
    layer = torch.compile(
        lambda *qkv: attend(*qkv, mask=mask, kernel="reference", stats=stats),
        fullgraph=True,
        backend="aot_eager",
    )
    torch.testing.assert_close(layer(*inputs), attend(*inputs, mask=mask), atol=1e-5, rtol=1e-5)
    assert stats.calls == {"reference": 1}
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        torch.compile(lambda *qkv: attend(*qkv, kernel="cudnn"), fullgraph=True, backend="aot_eager")(*inputs)
