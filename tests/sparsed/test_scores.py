"""Block scores of every builder against the S x S definition."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from diffctrl.attention import attend
from diffctrl.sparsed import Builder, Layout, RowBlocks, SparseDConfig, pooling
from diffctrl.sparsed import reference as slow
from diffctrl.sparsed import select as choose
from diffctrl.sparsed.patterns import block_lists
from diffctrl.sparsed.pooling import chunked_scores, mean_scores, sampled_scores
from tests.sparsed.examples import LargestTensor, kept_sets


def draw(tokens, heads, kv_heads, dim=16, dtype=torch.float32, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(batch, tokens, n, dim, generator=generator) * 1.5 for n in (heads, kv_heads))
    return query.to(dtype), key.to(dtype)


def naive(query, key, scale, block):
    return torch.stack(
        [slow.pooled(slow.attention(q.transpose(0, 1), k.transpose(0, 1), scale), block)
         for q, k in zip(query, key, strict=True)]
    )  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 1000])
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_equals_naive(tokens, block, dtype):
    query, key = draw(tokens, 7, 1, dtype=dtype)
    ours = chunked_scores(query, key, [tokens], [tokens], 0.25, block)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), naive(query, key, 0.25, block), atol=1e-7, rtol=1e-5)


def test_known_log_sum_exp_saves_a_pass_and_changes_nothing():
    query, key = draw(300, 4, 2)
    lse = attend(query, key, key, return_lse=True, scale=0.25)[1]
    ours = chunked_scores(query, key, [300], [300], 0.25, 64, lse)
    torch.testing.assert_close(ours.double(), naive(query, key, 0.25, 64), atol=1e-7, rtol=2e-5)


def test_strips_and_groups_of_heads(monkeypatch):
    """A budget so small that one block of rows and one head make a strip."""
    query, key = draw(200, 6, 3, batch=2)
    whole = chunked_scores(query, key, [200, 150], [200, 150], 0.25, 32)
    monkeypatch.setattr(pooling, "CPU_STRIP_PER_THREAD", 1)
    torch.testing.assert_close(chunked_scores(query, key, [200, 150], [200, 150], 0.25, 32), whole)
    torch.testing.assert_close(
        whole[1, :, :5, :5].double(), naive(query[1:, :150], key[1:, :150], 0.25, 32)[0]
    )
    assert not whole[1, :, 5:].any()
    assert not whole[1, ..., 5:].any()


@pytest.mark.parametrize("mode", ["strict", "authors"])
def test_no_tensor_of_tokens_by_tokens(mode):
    tokens = 8192
    query, key = draw(tokens, 1, 1, dim=8)
    config = SparseDConfig(mode=mode)
    layout = Layout.of(torch.tensor([tokens - 128]), 128, 128)
    with LargestTensor() as largest, torch.no_grad():
        Builder.of(config, query, key, 0.35, None).build(query, key, layout)
    assert largest.elements <= 4 * tokens * 128


def test_estimates_are_estimates():
    """Planted fault: the mean of queries and keys passed off as exact misses by far more than the bound."""
    query, key = draw(512, 2, 2)
    exact = naive(query, key, 0.25, 64)
    sizes = ([512], [512], 0.25, 64)
    mean, sampled = mean_scores(query, key, *sizes), sampled_scores(query, key, *sizes, 8)
    for estimate in (mean, sampled):
        torch.testing.assert_close(estimate.sum(-1), torch.full((1, 2, 8), 1 / 64))
        assert float((estimate - exact).abs().max()) > 1e-5
    # All rows sampled is the definition.
    torch.testing.assert_close(sampled_scores(query, key, *sizes, 64).double(), exact, atol=1e-7, rtol=1e-5)


def test_mean_is_right_where_blocks_are_constant():
    query, key = draw(4, 2, 1)
    query, key = (t.repeat_interleave(32, 1)[:, :100] for t in (query, key))
    sizes = ([100], [100], 0.25, 32)
    torch.testing.assert_close(
        mean_scores(query, key, *sizes).double(), naive(query, key, 0.25, 32), atol=1e-7, rtol=1e-5
    )


@hypothesis_settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(2, 90),
    generated=st.integers(1, 40),
    select=st.floats(0.05, 1.0),
    mode=st.sampled_from(["strict", "authors"]),
    isolated=st.booleans(),
    block=st.sampled_from([4, 16]),
)
def test_kept_blocks_equal_the_reference(tokens, generated, select, mode, isolated, block):
    prompt = max(tokens - generated, 0)
    generated = tokens - prompt
    config = SparseDConfig(select=select, mode=mode, isolated=isolated or mode == "authors", block_size=block)
    query, key = draw(tokens, 4, 2, dim=8, seed=tokens)
    query, key = query.double(), key.double()
    layout = Layout.of(torch.tensor([prompt]), generated, block)
    pattern = Builder.of(config, query, key, 0.3, None).build(query, key, layout)
    q, k = (t[0].transpose(0, 1) for t in (query, key))
    assert kept_sets(pattern.lists)[0] == slow.kept_blocks(q, k, prompt, 0.3, config)
    assert bool((pattern.lists.counts >= 1).all())
    assert float(pattern.mass.min()) > 0
    assert float(pattern.mass.max()) <= 1 + 1e-9


def test_one_pattern_for_a_group_of_queries():
    query, key = draw(256, 14, 2)
    layout = Layout.of(torch.tensor([192]), 64, 32)
    kept = {}
    for share in ("query_head", "kv_group"):
        config = SparseDConfig(block_size=32, share=share)
        kept[share] = kept_sets(Builder.of(config, query, key, 0.25, None).build(query, key, layout).lists)[0]
    for group in (0, 1):
        heads = kept["kv_group"][7 * group : 7 * group + 7]
        assert all(head == heads[0] for head in heads)
    assert kept["kv_group"][0] != kept["kv_group"][7]
    assert any(head != kept["query_head"][0] for head in kept["query_head"][:7])


def test_prompt_blocks_are_kept_though_generation_wins_every_rank():
    """Isolation: keys of the generation outscore every other; strict still keeps its prompt blocks."""
    tokens, block, prompt = 160, 16, 96
    query, key = draw(tokens, 2, 2)
    key[:, prompt:] = 4 * query.mean(dim=1, keepdim=True) + key[:, prompt:]
    query = query + 4 * key[:, prompt:].mean(dim=1, keepdim=True)
    layout = Layout.of(torch.tensor([prompt]), tokens - prompt, block)
    prompts_kept = {}
    for mode in ("strict", "authors"):
        config = SparseDConfig(select=0.34, block_size=block, mode=mode)
        lists = Builder.of(config, query, key, 0.25, None).build(query, key, layout).lists
        prompts_kept[mode] = [len({j for j in row if j < 6}) for head in kept_sets(lists)[0] for row in head]
    assert set(prompts_kept["strict"]) == {3}  # ceil(0.34 * 6)
    assert max(prompts_kept["authors"]) < 3


def test_rows_of_a_batch_are_built_as_if_alone():
    query, key = draw(96, 4, 2, batch=3)
    prompts, generated = [72, 40, 8], 24
    config = SparseDConfig(block_size=16, mode="authors")
    layout = Layout.of(torch.tensor(prompts), generated, 16, torch.tensor([0, 32, 64]))
    together = kept_sets(Builder.of(config, query, key, 0.25, None).build(query, key, layout).lists)
    for b, prompt in enumerate(prompts):
        alone = Layout.of(torch.tensor([prompt]), generated, 16)
        q, k = query[b : b + 1, : prompt + generated], key[b : b + 1, : prompt + generated]
        blocks = math.ceil((prompt + generated) / 16)
        expected = kept_sets(Builder.of(config, q, k, 0.25, None).build(q, k, alone).lists)[0]
        assert [head[:blocks] for head in together[b]] == expected
        assert all(not row for head in together[b] for row in head[blocks:])  # padding asks for nothing
        assert all(j < blocks for head in together[b] for row in head for j in row)


def test_a_pattern_of_64k_tokens_is_small():
    """Of 65664 tokens 155 of 513 blocks, a bit each: 26 MB for Dream's 784 heads, 34 for LLaDA's 1024."""
    blocks = RowBlocks.of(65536, 128, 128)
    assert (blocks.count, blocks.split) == (513, 512)
    kept = choose(
        torch.rand(1, 513, 513, generator=torch.Generator().manual_seed(0)), blocks, SparseDConfig()
    )
    assert set(kept.counts.flatten().tolist()) == {155}
    layout = Layout.of(torch.tensor([65536]), 128, 128)
    packed = block_lists(kept.counts[None], kept.indices[None], layout).to_bits()
    size = packed.numel() * packed.itemsize
    assert size == 513 * 65
    assert [round(heads * size / 1e6) for heads in (784, 1024)] == [26, 34]
