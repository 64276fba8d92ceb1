"""Dense calls are what the stock processors compute: bit for bit, with every mask form and backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn

from diffctrl.attention import EngineStats, attend, gives_lse
from tests.attention.cases import make_inputs, random_lists, reference


def older_processor(q, k, v, attn_mask=None, scale=None):
    """What AttnProcessor2_0 and its like do: views (B, H, S, D) into torch's function."""
    b, sq, h, d = q.shape
    q, k, v = (t.reshape(b, -1, h * d).view(b, -1, h, d).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, dropout_p=0.0, is_causal=False, scale=scale
    )
    return out.transpose(1, 2)


MASKS = {
    "none": lambda: None,
    "bool": lambda: torch.rand(2, 1, 33, 29) < 0.8,
    "bool per head": lambda: torch.rand(2, 4, 33, 29) < 0.8,
    "additive": lambda: torch.randn(2, 1, 33, 29),
    "key validity": lambda: torch.arange(29).expand(2, 1, 1, 29) < torch.tensor([29, 11]).view(2, 1, 1, 1),
    "shared": lambda: torch.randn(1, 1, 33, 29),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", MASKS)
@pytest.mark.parametrize("return_lse", [False, True])
def test_bitwise_equal_to_both_kinds_of_stock_processor(dtype, form, return_lse):
    q, k, v = make_inputs(2, 4, 4, (33, 29), 24, dtype=dtype)
    torch.manual_seed(0)
    attn_mask = MASKS[form]()
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.to(dtype)
    out = attend(q, k, v, attn_mask=attn_mask, return_lse=return_lse)
    out = out[0] if return_lse else out
    assert torch.equal(out, dispatch_attention_fn(q, k, v, attn_mask=attn_mask))
    assert torch.equal(out, older_processor(q, k, v, attn_mask))


def test_two_dimensional_key_validity_is_read_as_the_dispatcher_reads_it():
    q, k, v = make_inputs(2, 4, 4, (33, 29), 24)
    valid = torch.arange(29) < torch.tensor([[29], [11]])
    out, lse = attend(q, k, v, attn_mask=valid, return_lse=True)
    assert torch.equal(out, dispatch_attention_fn(q, k, v, attn_mask=valid))
    assert torch.equal(lse, attend(q, k, v, attn_mask=valid[:, None, None], return_lse=True)[1])


@pytest.mark.parametrize("scale", [None, 0.5])
def test_grouped_heads_scale_and_gradients(scale):
    q, k, v = make_inputs(2, 4, 2, (33, 29), 24, requires_grad=True)
    out = attend(q, k, v, scale=scale)
    stock = dispatch_attention_fn(q, k, v, scale=scale, enable_gqa=True)
    assert torch.equal(out, stock)
    got = torch.autograd.grad(out.sum(), (q, k, v))
    expected = torch.autograd.grad(stock.sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", ["native", "_native_math", "_native_flash"])
def test_a_backend_that_is_set_wins(backend):
    q, k, v = make_inputs(1, 2, 2, (40, 40), 16)
    stats = EngineStats()
    out = attend(q, k, v, backend=backend, stats=stats)
    assert torch.equal(out, dispatch_attention_fn(q, k, v, backend=backend))
    assert stats.calls == {"sdpa" if backend == "native" else backend: 1}
    with attention_backend(backend):
        assert torch.equal(attend(q, k, v), out)


@pytest.mark.parametrize("form", MASKS)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("backend", [None, "_native_math"])
def test_lse_of_dense_calls(form, kv_heads, grad, backend):
    q, k, v = make_inputs(2, 4, kv_heads, (33, 29), 24, requires_grad=grad)
    torch.manual_seed(0)
    attn_mask = MASKS[form]()
    if form == "bool":
        attn_mask[0, :, 3] = False  # a row that may attend nothing
    out, lse = attend(q, k, v, attn_mask=attn_mask, return_lse=True, backend=backend)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(4 // kv_heads, 2)).double() / 24**0.5
    if attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if is_bool else scores + attn_mask
    assert lse.dtype == torch.float32
    assert not lse.requires_grad
    assert lse.is_contiguous()
    torch.testing.assert_close(lse, torch.logsumexp(scores, -1).float().detach(), atol=1e-5, rtol=1e-5)
    assert out.requires_grad == grad


@pytest.mark.parametrize("kernel", ["sdpa", "reference"])
def test_forced_dense_kernels(kernel):
    q, k, v = make_inputs(1, 2, 2, (40, 40), 16)
    out, lse = attend(q, k, v, kernel=kernel, return_lse=True)
    expected, expected_lse = reference(q, k, v)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", MASKS)
def test_autocast_does_what_it_does_to_the_stock_call(form):
    q, k, v = make_inputs(2, 4, 4, (33, 29), 24, requires_grad=True)
    torch.manual_seed(0)
    attn_mask = MASKS[form]()
    with torch.autocast("cpu", torch.bfloat16):
        # As models have them: norms of queries and keys give float32, the layer of the values 16 bits.
        stock = dispatch_attention_fn(q, k, v.bfloat16(), attn_mask=attn_mask)
        out = attend(q, k, v.bfloat16(), attn_mask=attn_mask)
        with_lse, lse = attend(q, k, v.bfloat16(), attn_mask=attn_mask, return_lse=True)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, stock)
    assert torch.equal(with_lse, stock)
    assert lse.dtype == torch.float32
    got, expected = (torch.autograd.grad(one.float().sum(), (q, k, v)) for one in (out, stock))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("kernel", [None, "gathered", "reference"])
def test_autocast_changes_the_operands_of_a_kernel_and_nothing_inside(kernel):
    q, k, v = make_inputs(1, 2, 2, (40, 40), 16)
    settings = {"mask": random_lists((8, 8), (40, 40)), "kernel": kernel, "return_lse": True}
    expected = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), **settings)
    with torch.autocast("cpu", torch.bfloat16):
        assert gives_lse(q, k, v.bfloat16(), mask=settings["mask"])
        found = attend(q, k, v.bfloat16(), **settings)
        assert (q @ q.mT).dtype == torch.bfloat16  # it is on again
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
