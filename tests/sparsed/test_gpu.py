"""On a GPU: the fused scores in bf16, the kernels that run, memory."""

import math

import pytest
import torch

import diffctrl
from diffctrl.processors import SparseDAttnProcessor, SparseDConfig
from diffctrl.sparsed import Builder, Layout, fused
from diffctrl.sparsed.pooling import chunked_scores
from tests.sparsed.examples import SETTINGS, generate, tiny_llama, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def draw(tokens, heads, dim, batch=1, seed=0, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(batch, tokens, heads, dim, generator=generator, device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 1000])
def test_fused_equals_chunked(dtype, dim, block, tokens):
    query, key = draw(tokens, 7, dim, 2, 0, dtype), draw(tokens, 1, dim, 2, 1, dtype)
    valid, scale = [tokens, max(tokens - 37, 1)], 1 / math.sqrt(dim)
    assert fused.refused(query, key, block) is None
    lse = fused.reference_lse(query, key, valid, scale)
    got = fused.fused_scores(query, key, valid, valid, scale, block, lse)
    expected = chunked_scores(query, key, valid, valid, scale, block)
    assert float((got - expected).abs().max()) <= 2e-3 * float(expected.max())


@pytest.mark.parametrize("form", fused.CANDIDATES, ids=lambda form: form.label)
def test_candidates(form):
    query, key = draw(2000, 4, 128, 1, 0), draw(2000, 2, 128, 1, 1)
    scale = 128**-0.5
    lse = fused.reference_lse(query, key, [2000], scale)
    got = fused.fused_scores(query, key, [2000], [2000], scale, 128, lse, form)
    expected = chunked_scores(query, key, [2000], [2000], scale, 128)
    assert float((got - expected).abs().max()) <= 2e-3 * float(expected.max())


@pytest.mark.parametrize("mode", ["strict", "authors"])
def test_models_take_the_fast_kernels(mode):
    model, ids = tiny_llama(head_dim=32).cuda().bfloat16(), tokens(2, 96).cuda()
    with diffctrl.apply(model, SparseDAttnProcessor(SparseDConfig(**SETTINGS, mode=mode))) as control:
        outs = generate(control, model, ids, [70, 49], padding=[0, 21])
        stats = control.controller.stats()
        assert stats["builders"] == ["fused"]
        assert not any("sdpa" in name for name in stats["calls"])  # padding does not cost the fast kernels
        alone = generate(control, model, ids[1:, 21:], [49])
    for a, b in zip(outs, alone, strict=True):
        error = (a[1, 21:].float() - b[0].float()).norm() / b[0].float().norm()
        assert float(error) < 3e-2  # 16 bits, other tiles


def test_memory_of_a_pattern_at_64k():
    """Peak beside queries and keys, for the heads of LLaDA-8B."""
    length, heads = 65536 + 128, 32
    query, key = draw(length, heads, 128, seed=0), draw(length, heads, 128, seed=1)
    layout = Layout.of(torch.tensor([length - 128]), 128, 128)
    config = SparseDConfig()
    builder = Builder.of(config, query, key, 128**-0.5, None)
    lse = torch.full((1, heads, length), 12.0, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    builder.build(query, key, layout, lse)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 1.5 * 2**30
