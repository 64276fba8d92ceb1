"""The gathered kernel: right for every shape and mask, differentiable, no more work than listed."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from diffctrl.attention import BlockLists, attend
from diffctrl.attention.kernels import gathered
from diffctrl.attention.kernels.gathered_plan import PlanKey, make_plan
from tests.attention.cases import assert_matches, make_inputs, make_rule, random_lists, reference

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def check(inputs, mask: BlockLists, scale: float | None = None) -> None:
    out, lse = attend(*inputs, mask=mask, scale=scale, return_lse=True, kernel="gathered")
    assert out.dtype == inputs[0].dtype
    assert_matches(out, lse, reference(*inputs, mask, scale))


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3), groups=st.sampled_from([1, 2]), kv_heads=st.integers(1, 2),
    sq=st.integers(1, 90), sk=st.integers(1, 90), dim=st.sampled_from([8, 17, 32]),
    bq=st.sampled_from([8, 16, 48]), bk=st.sampled_from([8, 16, 48]),
    density=st.floats(0, 1), per_head=st.booleans(), per_row=st.booleans(),
    dtype=st.sampled_from([F32, F64, BF16, F16]),
    kind=st.sampled_from([None, None, "n_valid", "causal", "kv_validity"]),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_every_shape_equals_the_reference(
    batch, groups, kv_heads, sq, sk, dim, bq, bk, density, per_head, per_row, dtype, kind, seed
):
    heads = groups * kv_heads
    fields = {}
    if kind == "n_valid":
        fields["n_valid"] = [(seed * (b + 1)) % (sk + 1) for b in range(batch)]
    elif kind is not None:
        fields["rule"] = make_rule(kind, (sq, sk), batch)
    mask = random_lists(
        (bq, bk), (sq, sk), density=density, heads=heads if per_head else 1, batch=batch if per_row else 1,
        seed=seed, allow_empty=True, **fields,
    )  # fmt: skip
    check(make_inputs(batch, heads, kv_heads, (sq, sk), dim, dtype=dtype, seed=seed), mask)


@pytest.mark.parametrize("length", [1, 127, 128, 129, 1001])
def test_lengths_that_divide_nothing(length):
    mask = random_lists((128, 128), (length, length), heads=2)
    check(make_inputs(1, 2, 2, (length, length), 64), mask)


@pytest.mark.parametrize("dim", [32, 64, 72, 96, 128, 256])
def test_head_dims(dim):
    check(make_inputs(1, 2, 2, (200, 190), dim), random_lists((64, 64), (200, 190), heads=2))


def test_scale_and_strides_of_models():
    lengths = (70, 60)
    q, k, v = make_inputs(2, 3, 3, lengths, 16)
    mask = random_lists((16, 16), lengths, heads=3)
    expected = reference(q, k, v, mask, 0.3)
    fused = torch.cat([k, v], -1)
    k_view, v_view = fused.chunk(2, -1)  # rows that are not dense
    q_view = q.transpose(1, 2).contiguous().transpose(1, 2)  # heads outermost
    assert_matches(*attend(q_view, k_view, v_view, mask=mask, scale=0.3, return_lse=True), expected)


@pytest.mark.parametrize("limit", [0, 1, 63, 64, 65, 150])
def test_valid_lengths_per_row(limit):
    lengths = (100, 150)
    mask = random_lists((64, 64), lengths, heads=2, n_valid=[limit, 150, 64])
    check(make_inputs(3, 2, 2, lengths, 32), mask)


def test_rows_without_keys_are_zero():
    blocks = torch.tensor([[[[1, 1, 0], [0, 0, 0], [0, 0, 1]]]]).bool()
    mask = BlockLists.from_dense_blocks(blocks, (16, 16), (40, 40), allow_empty=True)
    q, k, v = make_inputs(1, 2, 2, (40, 40), 16, requires_grad=True)
    out, lse = attend(q, k, v, mask=mask, return_lse=True)
    assert bool((out[:, 16:32] == 0).all())
    assert bool((lse[..., 16:32] == float("-inf")).all())
    out.square().sum().backward()
    assert all(bool(t.grad.isfinite().all()) for t in (q, k, v))
    assert bool((q.grad[:, 16:32] == 0).all())


def test_all_blocks_equal_dense_attention():
    q, k, v = make_inputs(2, 3, 3, (130, 130), 32)
    full = BlockLists.full((32, 32), (130, 130))
    # Through the chain a full mask IS the dense kernel, bit for bit; forced, gathered blocks agree within
    # rounding.
    assert torch.equal(attend(q, k, v, mask=full), attend(q, k, v))
    torch.testing.assert_close(
        attend(q, k, v, mask=full, kernel="gathered"), attend(q, k, v), atol=2e-6, rtol=2e-5
    )


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_key_outside_the_lists_does_not_move_a_bit(dtype):
    lengths = (100, 100)
    mask = random_lists((16, 16), lengths, density=0.3, heads=2, seed=8)
    q, k, v = make_inputs(1, 2, 2, lengths, 32, dtype=dtype)
    out, lse = attend(q, k, v, mask=mask, return_lse=True)
    listed = mask.to_dense_bool()
    for token in (5, 50, 99):
        k2, v2 = k.clone(), v.clone()
        k2[:, token], v2[:, token] = 100.0, float("nan")
        out2, lse2 = attend(q, k2, v2, mask=mask, return_lse=True)
        outside = ~listed[..., token].expand(1, 2, -1)
        assert torch.equal(out.transpose(1, 2)[outside], out2.transpose(1, 2)[outside])
        assert torch.equal(lse[outside], lse2[outside])
        assert bool(out2.transpose(1, 2)[~outside].isnan().all())


def test_batch_threads_budget_and_width_do_not_move_a_bit(monkeypatch):
    lengths = (300, 300)
    mask = random_lists((32, 32), lengths, density=0.4, heads=2)
    q, k, v = make_inputs(3, 2, 2, lengths, 32)
    out = attend(q, k, v, mask=mask)
    for row in range(3):
        alone = attend(*(t[row : row + 1] for t in (q, k, v)), mask=mask)
        assert torch.equal(alone[0], out[row])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert torch.equal(attend(q, k, v, mask=mask), out)
    finally:
        torch.set_num_threads(threads)
    for budget in (1, 1 << 30):
        monkeypatch.setattr(gathered, "_budget", lambda device, budget=budget: budget)
        assert torch.equal(attend(q, k, v, mask=mask), out)
    wide = BlockLists(
        mask.block,
        mask.lengths,
        mask.counts,
        torch.nn.functional.pad(mask.indices, (0, 9), value=7),
        allow_empty=True,
    )
    assert torch.equal(attend(q, k, v, mask=wide), out)


def test_threads_share_a_mask():
    mask = random_lists((32, 32), (200, 200), density=0.4, heads=2)
    inputs = [make_inputs(1, 2, 2, (200, 200), 24, seed=seed) for seed in range(4)]
    expected = [attend(*qkv, mask=mask) for qkv in inputs]
    mask.free()
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda qkv: attend(*qkv, mask=mask), inputs * 5))
    assert all(torch.equal(a, b) for a, b in zip(got, expected * 5, strict=True))


# --- gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "n_valid", "causal", "frame_window", "kv_validity"])
def test_gradcheck(kind):
    lengths = (7, 6)
    fields = {"n_valid": [0, 5]} if kind == "n_valid" else {}
    if kind not in ("plain", "n_valid"):
        fields["rule"] = make_rule(kind, lengths, 2)
    mask = random_lists((4, 4), lengths, heads=2, allow_empty=True, **fields)
    inputs = make_inputs(2, 2, 1, lengths, 3, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *qkv: attend(*qkv, mask=mask, kernel="gathered"), inputs)


@pytest.mark.parametrize(("dtype", "bound"), [(F32, 1e-5), (BF16, 2e-2)])
def test_gradients_equal_those_of_the_reference(dtype, bound):
    lengths = (150, 140)
    mask = random_lists((32, 64), lengths, heads=4)
    inputs = make_inputs(2, 4, 2, lengths, 48, dtype=dtype, requires_grad=True)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    direction = torch.randn(2, 150, 4, 48)
    got = torch.autograd.grad(attend(*inputs, mask=mask), inputs, direction.to(dtype))
    expected = torch.autograd.grad(attend(*exact, mask=mask, kernel="reference"), exact, direction.double())
    for one, two in zip(got, expected, strict=True):
        assert one.dtype == dtype
        assert float((one.double() - two).norm() / two.norm()) < bound


def test_only_inputs_output_and_lse_are_kept_and_double_backward_is_refused():
    lengths = (64, 64)
    mask = random_lists((16, 16), lengths)
    inputs = make_inputs(1, 2, 2, lengths, 16, requires_grad=True)
    attend(*inputs, mask=mask)  # the self-test, out of the way
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        out = attend(*inputs, mask=mask)
    assert sorted(kept) == sorted([*(t.numel() for t in inputs), out.numel(), 2 * 64])
    with pytest.raises(RuntimeError, match="first-order gradients only"):
        torch.autograd.grad(out.sum(), inputs[:1], create_graph=True)


# --- work and memory ----------------------------------------------------------------------------------------


def planned_pairs(mask: BlockLists, batch: int, heads: int) -> int:
    key = PlanKey(batch, heads, heads, 256, 0, 1 << 20)
    return sum(items * q * k for items, q, k in gathered.iter_chunk_shapes(make_plan(mask, key)))


@pytest.mark.parametrize("density", [0.1, 0.25, 0.7])
def test_the_work_is_the_listed_area(density):
    mask = random_lists((64, 64), (1000, 900), density=density, heads=3)
    assert planned_pairs(mask, 2, 3) == round(mask.density() * 2 * 3 * 1000 * 900)
    limited = random_lists((64, 64), (1000, 900), density=density, n_valid=[900, 300])
    assert planned_pairs(limited, 2, 3) == round(limited.density() * 3 * 1000 * 1200)


def test_neighbours_with_one_list_are_merged_and_runs_are_read_in_place():
    band = torch.zeros(1, 1, 40, 40, dtype=torch.bool)
    band[..., :30] = True
    mask = BlockLists.from_dense_blocks(band, (128, 128), (5000, 5000))
    plan = make_plan(mask, PlanKey(1, 1, 1, 256, 0, 1 << 20))
    assert [(c.q_rows, c.kv_rows, c.start) for c in plan] == [(904, 3840, 0)] + [(1024, 3840, 0)] * 4


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


def test_no_tensor_comes_near_s_times_s():
    length, heads, dim = 4096, 2, 64
    mask = random_lists((128, 128), (length, length), density=0.25, heads=heads)
    inputs = make_inputs(1, heads, heads, (length, length), dim, requires_grad=True)
    few = random_lists((128, 128), (256, 256), heads=heads)
    attend(*(t[:, :256] for t in inputs), mask=few)  # the self-test, out of the way
    with LargestTensor() as largest:
        out = attend(*inputs, mask=mask)
        torch.autograd.grad(out.sum(), inputs)
    own = length * heads * dim * 4
    assert largest.bytes <= max(2 * own, 2 * gathered._budget(torch.device("cpu")))
    assert largest.bytes < length * length * 4 / 8


def test_scale_default_is_that_of_torch():
    q, k, v = make_inputs(1, 1, 1, (20, 20), 24)
    mask = random_lists((8, 8), (20, 20), density=0.2)
    assert torch.equal(attend(q, k, v, mask=mask), attend(q, k, v, mask=mask, scale=1 / math.sqrt(24)))
