"""The mask object: validation, identity, density, composition, conversions."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffctrl.attention import BlockLists, Rule
from diffctrl.attention.convert import transpose_lists
from tests.attention.cases import make_rule, random_lists


def lists_of(rows: list[list[int]], nk: int, *, block: int = 4, **fields) -> BlockLists:
    """One head, one batch row; `rows` as given, not sorted."""
    width = max(max(map(len, rows)), 1)
    indices = torch.tensor([[[row + [0] * (width - len(row)) for row in rows]]])
    counts = torch.tensor([[[len(row) for row in rows]]])
    return BlockLists((block, block), (len(rows) * block, nk * block), counts, indices, **fields)


# --- validation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0, 2], [2, 1]], "query block 1 is not in ascending order"),
        ([[0, 0], [1, 2]], "query block 0 lists a block twice"),
        ([[0, 3], [1, 2]], "hold block 3; accepted is 0 to 2"),
        ([[-1, 2], [1, 2]], "hold block -1"),
        ([[0, 2], []], "Query block 1 of batch row 0, head 0 has no key block"),
    ],
)
def test_wrong_lists_are_refused_with_their_place(rows, message):
    with pytest.raises(ValueError, match=message):
        lists_of(rows, nk=3)


def test_wrong_shapes_and_types_are_refused():
    counts, indices = torch.tensor([[[1, 1]]]), torch.tensor([[[[0], [1]]]])
    for bad in (
        {"counts": counts.float()},
        {"counts": torch.tensor([[[2, 1]]])},
        {"counts": counts[0]},
        {"indices": indices[..., :0]},
        {"block": (4, 0)},
        {"block": [4, 4]},
        {"lengths": (12, 8)},
        {"n_valid": torch.tensor([9])},
        {"n_valid": torch.tensor([0.5])},
        {"rule": make_rule("causal", (8, 8))},
        {"partial_counts": counts, "partial_indices": indices},
        {"partial_counts": counts, "partial_indices": indices, "rule": make_rule("causal", (8, 8))},
    ):
        fields = {"block": (4, 4), "lengths": (8, 8), "counts": counts, "indices": indices} | bad
        with pytest.raises(ValueError, match=r"\w"):
            BlockLists(**fields)


def test_a_rule_must_fit_the_lengths():
    with pytest.raises(ValueError, match="not known"):
        Rule("diagonal", ())
    with pytest.raises(ValueError, match="takes 3 tensors"):
        Rule("frame_window", (torch.tensor([1]),))
    with pytest.raises(ValueError, match="do not fit lengths"):
        random_lists((4, 4), (8, 8), rule=make_rule("kv_validity", (8, 12)), density=1.0)


def test_entries_past_the_count_do_not_matter_and_the_caller_cannot_reach_in():
    counts, indices = torch.tensor([[[1, 2]]]), torch.tensor([[[[1, 77, 5], [0, 1, -3]]]])
    lists = BlockLists((4, 4), (8, 8), counts, indices)
    assert lists.indices.tolist() == [[[[1, 0], [0, 1]]]]
    counts.fill_(0)
    indices.fill_(0)
    assert lists.counts.tolist() == [[[1, 2]]]
    assert lists == lists_of([[1], [0, 1]], nk=2)


def test_identity_follows_the_contents():
    one = random_lists((16, 16), (100, 80), heads=3)
    assert one == random_lists((16, 16), (100, 80), heads=3)
    assert hash(one) == hash(random_lists((16, 16), (100, 80), heads=3))
    assert one != random_lists((16, 16), (100, 80), heads=3, seed=5)
    assert one != random_lists((16, 16), (100, 80), heads=3, n_valid=[70])
    assert one != random_lists((16, 16), (100, 79), heads=3)
    assert len({one.digest, one.transpose().digest, one.transpose().transpose().digest}) == 2


# --- density: worked values ---------------------------------------------------------------------------------


def test_density_weighs_the_cut_blocks():
    # 10 queries in blocks of 4 (4, 4, 2), 7 keys in blocks of 4 (4, 3): areas 16 12 / 16 12 / 8 6, together
    # 70.
    blocks = torch.tensor([[[[1, 0], [0, 1], [1, 1]]]]).bool()
    lists = BlockLists.from_dense_blocks(blocks, (4, 4), (10, 7))
    assert lists.density() == pytest.approx((16 + 12 + 14) / 70)
    assert lists.kernel_density() == pytest.approx(4 / 6)
    assert not lists.is_full
    assert BlockLists.full((4, 4), (10, 7)).density() == 1.0


def test_density_counts_valid_keys_only():
    # Row 0 has 5 valid keys (4 + 1), row 1 has 2: areas of the listed blocks over 10 * (5 + 2) possible
    # pairs.
    blocks = torch.tensor([[[[1, 0], [0, 1], [1, 1]]]]).bool()
    lists = BlockLists.from_dense_blocks(blocks, (4, 4), (10, 7), n_valid=torch.tensor([5, 2]))
    assert lists.density() == pytest.approx((16 + 4 + 8 + 2 + 8 + 0 + 4 + 0) / 70)
    assert lists.kernel_density() == pytest.approx(4 / 6)
    assert not BlockLists.full((4, 4), (10, 7), n_valid=torch.tensor([7, 6])).is_full
    assert BlockLists.full((4, 4), (10, 7), n_valid=torch.tensor([7, 7])).is_full


def test_forced_blocks_are_counted():
    base = BlockLists.from_dense_blocks(torch.eye(8).bool()[None, None], (16, 16), (128, 128))
    forced = base.force(rows=(120, 128), cols=(0, 17))
    # 8 diagonal; the last row adds 7; columns 0 and 1 add 6 each beside the diagonal and the last row's two.
    assert base.density() == pytest.approx(8 / 64)
    assert forced.density() == pytest.approx((8 + 7 + 6 + 6) / 64)
    assert base.force() == base
    with pytest.raises(ValueError, match=r"rows must lie in 0\.\.128"):
        base.force(rows=(0, 129))


# --- composition and conversion -----------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    sq=st.integers(1, 70), sk=st.integers(1, 70), bq=st.sampled_from([1, 8, 16]),
    bk=st.sampled_from([1, 8, 16]),
    heads=st.sampled_from([1, 3]), seed=st.integers(0, 99),
)  # fmt: skip
def test_composition_and_round_trips_equal_elementwise_logic(sq, sk, bq, bk, heads, seed):
    a = random_lists((bq, bk), (sq, sk), density=0.4, heads=heads, batch=2, seed=seed, allow_empty=True)
    b = random_lists((bq, bk), (sq, sk), density=0.4, seed=seed + 1, allow_empty=True)
    assert torch.equal((a & b).to_dense_bool(), a.to_dense_bool() & b.to_dense_bool())
    assert torch.equal((a | b).to_dense_bool(), a.to_dense_bool() | b.to_dense_bool())
    assert BlockLists.from_bits(a.to_bits(), a.block, a.lengths, allow_empty=True) == a
    assert BlockLists.from_dense_blocks(a.to_dense_blocks(), a.block, a.lengths, allow_empty=True) == a
    assert torch.equal(a.transpose().to_dense_bool(), a.to_dense_bool().transpose(-1, -2))
    assert a.density() == pytest.approx(a.to_dense_bool().double().mean().item())
    rows, cols = (0, sq // 2), (sk // 2, sk)
    wanted = a.to_dense_bool()
    wanted[:, :, : -(-rows[1] // bq) * bq] = True
    if cols[0] < cols[1]:
        wanted[..., cols[0] // bk * bk :] = True
    assert torch.equal(a.force(rows, cols).to_dense_bool(), wanted)


def test_composition_with_rules_and_lengths():
    lengths = (40, 40)
    ruled = random_lists((8, 8), lengths, rule=make_rule("causal", lengths), n_valid=[30, 40])
    plain = random_lists((8, 8), lengths, seed=4, heads=2)
    limited = random_lists((8, 8), lengths, seed=4, n_valid=[35, 20])
    both = ruled & plain
    assert torch.equal(both.to_dense_bool(), ruled.to_dense_bool() & plain.to_dense_bool())
    assert both.rule is not None
    same_rule = ruled & random_lists((8, 8), lengths, seed=6, rule=make_rule("causal", lengths))
    assert same_rule.rule is not None
    assert (limited & ruled).n_valid.tolist() == [30, 20]
    assert BlockLists.full((8, 8), lengths, n_valid=torch.tensor([30, 40])) | ruled == BlockLists.full(
        (8, 8), lengths, n_valid=torch.tensor([30, 40])
    )


def test_impossible_compositions_are_refused_with_both_names():
    lengths = (40, 40)
    causal = random_lists((8, 8), lengths, density=1.0, rule=make_rule("causal", lengths))
    window = random_lists((8, 8), lengths, density=1.0, seed=2, rule=make_rule("frame_window", lengths))
    plain = random_lists((8, 8), lengths)
    with pytest.raises(ValueError, match="'causal' and 'frame_window'"):
        causal & window
    with pytest.raises(ValueError, match="different n_valid"):
        plain | random_lists((8, 8), lengths, n_valid=[3])
    with pytest.raises(ValueError, match="different block"):
        plain & random_lists((8, 16), lengths)
    with pytest.raises(ValueError, match="different order"):
        plain & BlockLists.full((8, 8), lengths, order="frames")
    with pytest.raises(ValueError, match=r"\[2, 3\] head lists"):
        random_lists((8, 8), lengths, heads=2) & random_lists((8, 8), lengths, heads=3)
    disjoint = BlockLists.from_dense_blocks(torch.eye(5).bool()[None, None], (8, 8), lengths)
    other = BlockLists.from_dense_blocks(torch.eye(5).bool().roll(1, 0)[None, None], (8, 8), lengths)
    with pytest.raises(ValueError, match="has no key block"):
        disjoint & other


def test_clipped_lists_end_with_the_last_valid_key():
    lists = random_lists((8, 8), (40, 40), density=0.8, n_valid=[0, 1, 8, 9, 40])
    clipped = lists.clipped()
    assert torch.equal(clipped.to_dense_bool(), lists.to_dense_bool())
    for b, limit in enumerate([0, 1, 8, 9, 40]):
        used = clipped.indices[b][torch.arange(clipped.indices.shape[-1]) < clipped.counts[b].unsqueeze(-1)]
        assert used.numel() == 0 or int(used.max()) * 8 < limit


@settings(max_examples=20, deadline=None)
@given(
    sq=st.integers(1, 700),
    sk=st.integers(1, 700),
    seed=st.integers(0, 99),
    dim=st.sampled_from([64, 160, 256]),
)
def test_fa4_lists_attend_the_same_pairs(sq, sk, seed, dim):
    lists = random_lists((128, 128), (sq, sk), heads=2, seed=seed)
    fa4 = lists.to_fa4(90, dim)
    assert fa4.block[1] == {64: 128, 160: 64, 256: 64}[dim]
    again = BlockLists(fa4.block, lists.lengths, fa4.full_count, fa4.full_index)
    assert torch.equal(again.to_dense_bool(), lists.to_dense_bool())
    assert int(fa4.mask_count.sum()) == 0
    assert fa4.mask_index.shape == (1, 2, lists.n_q_blocks, 1)
    assert fa4.full_index.shape[-1] <= -(-sk // fa4.block[1])  # wider lists are refused by the package


def test_fa4_lists_on_sm100_and_refusals():
    lists = random_lists((128, 128), (700, 700), density=0.3)
    with pytest.raises(ValueError, match="multiples of 256"):
        lists.to_fa4(100, 128)
    merged = lists.to_fa4(100, 128, allow_merge=True)
    assert merged.merged
    assert merged.kernel_density >= lists.kernel_density()
    again = BlockLists(merged.block, lists.lengths, merged.full_count, merged.full_index)
    wanted = lists.to_dense_bool() | torch.cat(
        [lists.to_dense_bool()[:, :, 128:], torch.zeros(1, 1, 128, 700).bool()], 2
    )
    assert torch.equal(again.to_dense_bool()[:, :, :128], wanted[:, :, :128])
    for arch in (80, 89, 120):
        with pytest.raises(ValueError, match=f"not on sm{arch}"):
            lists.to_fa4(arch, 128)
    with pytest.raises(ValueError, match="takes query blocks of"):
        random_lists((32, 128), (700, 700)).to_fa4(90, 128)


def test_transposed_lists_need_no_dense_table():
    counts, indices = transpose_lists(torch.tensor([[[2, 1]]]), torch.tensor([[[[0, 2], [2, 0]]]]), 4)
    assert counts.tolist() == [[[1, 0, 2, 0]]]
    assert indices.tolist() == [[[[0, 0], [0, 0], [0, 1], [0, 0]]]]
    with pytest.raises(ValueError, match="without n_valid"):
        random_lists((8, 8), (40, 40), n_valid=[3]).transpose()


@pytest.mark.parametrize("case", ["plain", "n_valid", "causal", "frame_window", "kv_validity"])
def test_flex_mask_attends_the_same_pairs(case):
    lengths = (50, 40)
    fields = {"n_valid": [0, 13, 40]} if case == "n_valid" else {}
    if case not in ("plain", "n_valid"):
        fields["rule"] = make_rule(case, lengths, batch=3)
    lists = random_lists((16, 8), lengths, heads=2, batch=3, **fields)
    flex = lists.to_flex()
    b, h, q, k = torch.meshgrid(*(torch.arange(n) for n in (3, 2, *lengths)), indexing="ij")
    element = flex.mask_mod(b, h, q, k)

    def listed(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        lists = BlockLists((16, 8), lengths, counts, indices, allow_empty=True)
        return lists.to_dense_bool()

    full = listed(flex.full_kv_num_blocks, flex.full_kv_indices)
    partial = listed(flex.kv_num_blocks, flex.kv_indices)
    assert torch.equal(full | (partial & element), lists.to_dense_bool())
    assert flex.kv_indices.shape[-1] == lists.n_k_blocks
    assert flex.full_q_indices.shape[-2:] == (lists.n_k_blocks, lists.n_q_blocks)


# --- caches -------------------------------------------------------------------------------------------------


def test_derived_forms_are_made_once_and_die_with_the_mask():
    lists, made = random_lists((8, 8), (40, 40)), []
    for _ in range(3):
        lists.cached("cpu", "some kernel", lambda: made.append(1) or object())
    assert made == [1]
    lists.free()
    lists.cached("cpu", "some kernel", lambda: made.append(1) or object())
    assert made == [1, 1]
    assert lists.on("cpu") is lists.on("cpu")
    assert (lists & lists) is (lists & lists)

    from diffctrl.attention.lists import _ORIGINS, origin_of

    on_device = lists.on("cpu")
    assert origin_of(on_device, (40, 40)) is lists
    before = len(_ORIGINS)
    del lists
    gc.collect()
    # The tensors alone still mean the same mask.
    assert origin_of(on_device, (40, 40)) == random_lists((8, 8), (40, 40))
    del on_device
    gc.collect()
    assert len(_ORIGINS) < before
