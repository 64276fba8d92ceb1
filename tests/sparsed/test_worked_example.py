"""The worked example of the specification, to six decimals, through the reference and through our builder."""

import math

import pytest
import torch

from diffctrl.attention import attend
from diffctrl.sparsed import Builder, Layout, RowBlocks, SparseDConfig, select
from diffctrl.sparsed import reference as slow
from diffctrl.sparsed.pooling import chunked_scores
from tests.sparsed.examples import Worked, kept_sets

W = """
.104440 .044171 .049657 .206169 .046070 .049494
.052548 .051593 .145756 .052463 .063095 .134546
.007442 .198469 .016370 .006452 .174358 .096909
.305622 .010049 .040641 .106651 .014215 .022821
.081804 .084256 .220402 .054730 .017904 .040904
.006327 .316871 .093029 .003742 .040393 .039638
"""
STRICT = [{0, 3, 5}, {0, 2, 5}, {1, 2, 4}, {0, 3, 5}, {1, 2, 5}, {1, 2, 4}]
AUTHORS = [{0, 2, 3, 4, 5}, {0, 2, 4, 5}, {1, 2, 4, 5}, {0, 2, 3, 4, 5}, {0, 1, 2, 3, 4, 5}, {1, 2, 4, 5}]
JOINT = [{0, 2, 3}, {2, 4, 5}, {1, 4, 5}, {0, 2, 3}, {0, 1, 2}, {1, 2, 4}]
OUTPUTS = {
    "dense": [5.500000, 4.974320, 7.575888, 1.419286, 4.835091, 4.833284],
    "strict": [5.833333, 4.956134, 7.628534, 1.384290, 6.270691, 3.940563],
    "authors": [6.100000, 4.999497, 7.695947, 1.414893, 4.835091, 4.917254],
}
ROWS = [0, 1, 2, 7, 8, 11]
EXAMPLE = Worked()


def settings(**changes):
    return SparseDConfig(**{"select": 0.5, "block_size": 2} | changes)


def built(example, prompt, config):
    layout = Layout.of(torch.tensor([prompt]), example.tokens - prompt, config.block_size)
    builder = Builder.of(config, example.query, example.key, example.scale, None)
    return builder.build(example.query, example.key, layout)


def test_block_scores():
    expected = torch.tensor([[float(number) for number in line.split()] for line in W.split("\n") if line])
    naive = slow.pooled(
        slow.attention(EXAMPLE.query[0].transpose(0, 1), EXAMPLE.key[0].transpose(0, 1), 0.5), 2
    )
    ours = chunked_scores(EXAMPLE.query, EXAMPLE.key, [12], [12], 0.5, 2)[0]
    for scores in (naive, ours):
        torch.testing.assert_close(scores[0].float(), expected, atol=6e-7, rtol=0)
        torch.testing.assert_close(scores.sum(-1) * 2, torch.ones(1, 6).double())


def test_generation_scores():
    ours = chunked_scores(EXAMPLE.query, EXAMPLE.key[:, 8:], [12], [4], 0.5, 2)[0, 0]
    for row, expected in ((0, [0.215001, 0.284999]), (2, [0.326330, 0.173670]), (5, [0.328555, 0.171445])):
        assert ours[row].tolist() == pytest.approx(expected, abs=6e-7)


@pytest.mark.parametrize(
    ("config", "kept", "mass"),
    [(settings(), STRICT, 0.771033), (settings(mode="authors"), AUTHORS, 0.939254)],
    ids=["strict", "authors"],
)
def test_selection_mass_and_output(config, kept, mass):
    pattern = built(EXAMPLE, 8, config)
    assert kept_sets(pattern.lists)[0][0] == kept
    assert pattern.mass.item() == pytest.approx(mass, abs=6e-7)
    q, k, v = EXAMPLE.query, EXAMPLE.key, EXAMPLE.value
    out = attend(q, k, v, mask=pattern.lists, scale=0.5)
    assert out[0, ROWS, 0, 0].tolist() == pytest.approx(OUTPUTS[config.mode], abs=6e-7)
    assert attend(q, k, v, scale=0.5)[0, ROWS, 0, 0].tolist() == pytest.approx(OUTPUTS["dense"], abs=6e-7)
    rows = [t[0].transpose(0, 1) for t in (q, k, v)]
    slow_kept = slow.kept_blocks(rows[0], rows[1], 8, 0.5, config)
    assert slow_kept == [kept]
    slow_out = slow.sparse_attention(*rows, slow_kept, 0.5, 2)
    torch.testing.assert_close(slow_out.transpose(0, 1)[None], out)


def test_joint_ranking_is_the_ablation_alone():
    assert kept_sets(built(EXAMPLE, 8, settings(isolated=False)).lists)[0][0] == JOINT
    assert STRICT != JOINT
    # Rows that love the prompt would keep nothing of what is being written.
    assert [i for i, blocks in enumerate(JOINT) if not blocks & {4, 5}] == [0, 3, 4]


RAGGED_STRICT = [{0, 3, 4}, {0, 2, 4}, {1, 2, 4}, {0, 3, 5}, {0, 2, 4}, {0, 1, 4}]
RAGGED_AUTHORS = [{0, 3, 4}, {2, 4}, {1, 4}, {0, 3, 4}, {0, 2, 4}, {1, 4}]


@pytest.mark.parametrize(("mode", "kept"), [("strict", RAGGED_STRICT), ("authors", RAGGED_AUTHORS)])
def test_ragged(mode, kept):
    example = Worked(tokens=11)
    assert RowBlocks.of(7, 4, 2) == RowBlocks(6, 4)
    scores = chunked_scores(example.query, example.key, [11], [11], 0.5, 2)
    assert scores[0, 0, -1].sum().item() == pytest.approx(0.25)  # one real row
    config = settings(select=0.3, mode=mode)
    assert kept_sets(built(example, 7, config).lists)[0][0] == kept
    q, k = (t[0].transpose(0, 1) for t in (example.query, example.key))
    assert slow.kept_blocks(q, k, 7, 0.5, config) == [kept]


def test_everything_is_kept_at_one():
    for mode in ("strict", "authors"):  # whose n + 1 blocks crashed
        assert built(EXAMPLE, 8, settings(select=1.0, mode=mode)).lists.is_full


def test_scale_of_the_authors_ranks_otherwise():
    """Planted fault: scores over sqrt(heads). Four heads of dim 64 would sharpen them fourfold."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 128, 4, 64, generator=generator) for _ in range(2))
    layout = Layout.of(torch.tensor([96]), 32, 16)
    kept = {}
    for name in ("head_dim", "authors"):
        config = SparseDConfig(block_size=16, score_scale=name)
        builder = Builder.of(config, q, k, 1 / 8, None)
        kept[name] = kept_sets(builder.build(q, k, layout).lists)
        scale = {"head_dim": 1 / math.sqrt(64), "authors": 1 / math.sqrt(4)}[name]
        assert kept[name][0] == slow.kept_blocks(
            q[0].transpose(0, 1), k[0].transpose(0, 1), 96, scale, config
        )
    assert kept["head_dim"] != kept["authors"]


def test_no_prompt_and_one_block():
    scores = torch.rand(1, 1, 1)
    kept = select(scores, RowBlocks.of(0, 3, 4), settings())
    assert kept.indices.tolist() == [[[0]]]
    assert RowBlocks.of(0, 8, 2) == RowBlocks(4, 0)
