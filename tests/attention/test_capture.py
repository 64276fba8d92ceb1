"""Captured weights against the softmax that is written out, by every route, and what is made of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffctrl.attention import BlockLists, attend
from diffctrl.attention import scores as scores_module
from diffctrl.attention.capture import (
    ROUTES,
    AttentionCall,
    CaptureSpec,
    Sink,
    Tokens,
    accumulate,
    choose_route,
    weights,
)
from diffctrl.attention.pairs import attended_pairs, part_of
from tests.attention.cases import make_inputs, make_rule, random_lists

torch.set_num_threads(1)


def softmax_of(call: AttentionCall) -> Tensor:
    """(B, H, Sq, Sk) in float64; 0 in rows that attend nothing."""
    groups = call.query.shape[2] // call.key.shape[2]
    q, k = call.query.double().transpose(1, 2), call.key.double().transpose(1, 2).repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) * call.scale
    if call.lists is not None:
        scores = scores.masked_fill(~call.lists.to_dense_bool(), -math.inf)
    if call.attn_mask is not None:
        bias = call.attn_mask
        scores = scores.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else scores + bias
    return torch.softmax(scores, -1).nan_to_num(0.0)


def with_lse(call: AttentionCall, value: Tensor) -> AttentionCall:
    _, lse = attend(
        call.query, call.key, value, mask=call.lists, attn_mask=call.attn_mask, scale=call.scale,
        return_lse=True,
    )  # fmt: skip
    return replace(call, lse=lse)


def gathered(call: AttentionCall, rows: Tokens, columns: Tokens, route: Any, tile_bytes: int) -> Tensor:
    """The parts put together; every pair must come exactly once."""
    batch, _, heads, _ = call.query.shape
    out = torch.full((batch, heads, rows.count, columns.count), math.nan, dtype=torch.float64)
    for part in weights(call, rows, columns, route, tile_bytes):
        height, width = part.weights.shape[2:]
        place = out[..., part.row : part.row + height, part.column : part.column + width]
        assert bool(place.isnan().all()), "a pair came twice"
        place.copy_(part.weights)
    assert not bool(out.isnan().any()), "a pair is missing"
    return out


def mask_of(kind: str, batch: int, heads: int, lengths: tuple[int, int], seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    sq, sk = lengths
    valid = torch.arange(sk) < torch.randint(1, sk + 1, (batch, 1), generator=generator)
    if kind == "padding":
        return {"attn_mask": valid[:, None, None, :]}
    if kind == "known padding":
        return {"attn_mask": valid[:, None, None, :], "key_lengths": tuple(valid.sum(1).tolist())}
    if kind == "additive":
        return {"attn_mask": torch.randn(1, heads, sq, sk, generator=generator)}
    if kind == "lists":
        return {
            "lists": random_lists((16, 8), lengths, heads=heads, batch=batch, seed=seed, allow_empty=True)
        }
    if kind == "lengths":
        n_valid = valid.sum(1).tolist()
        return {"lists": random_lists((8, 16), lengths, heads=heads, seed=seed, n_valid=n_valid)}
    if kind == "rule":
        rule = make_rule("kv_validity", lengths, batch)
        return {"lists": random_lists((16, 16), lengths, seed=seed, rule=rule, allow_empty=True)}
    return {}


MASKS = ("none", "padding", "known padding", "additive", "lists", "lengths", "rule")


def some_tokens(kind: str, batch: int, length: int, seed: int) -> tuple[Tokens, Tensor]:
    """Tokens, and their positions (B, n)."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, length + 1, (1,), generator=generator))
    if kind == "range":
        start = int(torch.randint(0, length - count + 1, (1,), generator=generator))
        return Tokens(start, count), torch.arange(start, start + count).expand(batch, -1)
    draws = torch.stack([torch.randperm(length, generator=generator)[:count] for _ in range(batch)])
    if kind == "index":
        return Tokens.at(draws[0]), draws[:1].expand(batch, -1)
    return Tokens.at(draws), draws


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 2),
    lengths=st.tuples(st.integers(1, 40), st.integers(1, 45)),
    mask=st.sampled_from(MASKS),
    kinds=st.tuples(*[st.sampled_from(("range", "index", "by row"))] * 2),
    tile_bytes=st.sampled_from((1, 2000, 1 << 20)),
    seed=st.integers(0, 999),
)
def test_every_route_gives_the_softmax(
    batch: int,
    kv_heads: int,
    groups: int,
    lengths: tuple[int, int],
    mask: str,
    kinds: tuple[str, str],
    tile_bytes: int,
    seed: int,
) -> None:
    heads = kv_heads * groups
    q, k, v = make_inputs(batch, heads, kv_heads, lengths, 16, seed=seed)
    call = AttentionCall(2 * q, k, 0.25, **mask_of(mask, batch, heads, lengths, seed))
    call = with_lse(call, v)
    rows, row_places = some_tokens(kinds[0], batch, lengths[0], seed)
    columns, column_places = some_tokens(kinds[1], batch, lengths[1], seed + 1)
    expected = softmax_of(call)
    expected = expected.gather(2, row_places[:, None, :, None].expand(-1, heads, -1, lengths[1]))
    expected = expected.gather(3, column_places[:, None, None].expand(-1, heads, rows.count, -1))
    for route in ROUTES:
        if route == "second_call" and call.lists is not None:
            continue
        actual = gathered(call, rows, columns, route, tile_bytes)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(mask=st.sampled_from(MASKS), seed=st.integers(0, 999))
def test_rows_and_heads_of_a_call_are_those_of_the_whole(mask: str, seed: int) -> None:
    q, k, v = make_inputs(3, 4, 2, (20, 37), 8, seed=seed)
    call = with_lse(AttentionCall(q, k, 0.3, **mask_of(mask, 3, 4, (20, 37), seed)), v)
    part, heads = call.of(range(1, 3), (3, 0)), [3, 0]
    expected = softmax_of(call)[1:3, heads]
    for route in ROUTES:
        if route == "second_call" and part.lists is not None:
            continue
        actual = gathered(part, Tokens(0, 20), Tokens(0, 37), route, 1 << 20)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(kind=st.sampled_from(("lists", "lengths", "rule")), seed=st.integers(0, 999))
def test_pairs_are_the_entries_of_the_mask(kind: str, seed: int) -> None:
    lists = mask_of(kind, 3, 2, (21, 50), seed)["lists"]
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 21, (3, 9), generator=generator)
    columns = torch.randint(0, 50, (1, 11), generator=generator)
    expected = lists.to_dense_bool().expand(3, 2, -1, -1)
    picked = torch.stack([expected[b][:, rows[b]][..., columns[0]] for b in range(3)])
    assert torch.equal(attended_pairs(lists, rows, columns).expand(3, 2, -1, -1), picked)
    some = part_of(lists, range(1, 2), (1,))
    assert torch.equal(
        some.to_dense_bool().expand(1, 1, -1, -1), expected[1:2, 1:2]
    )  # the lists of one row and one head
    if lists.batch == lists.heads == 1 and kind != "rule":
        assert some is lists


@pytest.mark.parametrize("route", ["lse", "chunked"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_operands_lose_nothing(route: Any, dtype: torch.dtype) -> None:
    """Scores that were rounded to 16 bits would be off by a percent and more."""
    q, k, v = make_inputs(2, 4, 2, (70, 90), 64, dtype=dtype)
    q = 3 * q  # far from uniform
    lse = scores_module.tiled_logsumexp(q, k, 0.125) if route == "lse" else None
    call = AttentionCall(q, k, 0.125, lse)
    actual = gathered(call, Tokens(0, 70), Tokens(60, 30), route, 5000)
    expected = softmax_of(call)[..., 60:]
    assert float((actual - expected).abs().max()) < 1e-5
    assert float(((actual - expected) / expected.clamp(min=1e-6)).abs().max()) < 1e-3


def test_the_kernels_own_log_sum_exp_of_bf16_is_good_enough() -> None:
    q, k, v = make_inputs(2, 4, 4, (70, 90), 64, dtype=torch.bfloat16)
    call = with_lse(AttentionCall(q, k, 0.125), v)
    actual = gathered(call, Tokens(0, 70), Tokens(60, 30), "lse", 1 << 20)
    torch.testing.assert_close(actual, softmax_of(call)[..., 60:], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("mask", MASKS)
def test_tiles_of_any_size_give_the_same(mask: str) -> None:
    q, k, v = make_inputs(2, 2, 2, (30, 41), 16)
    call = AttentionCall(2 * q, k, 0.25, **mask_of(mask, 2, 2, (30, 41), 5))
    whole = gathered(call, Tokens(0, 30), Tokens(0, 41), "chunked", 1 << 30)
    for rows in (1, 7, 30):
        for columns in (3, 41):
            tile = gathered(call, Tokens(0, 30), Tokens(0, 41), "chunked", 4 * 2 * 2 * rows * columns)
            torch.testing.assert_close(tile, whole, atol=1e-6, rtol=1e-6)


def test_a_log_sum_exp_without_all_keys_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = make_inputs(1, 2, 2, (30, 41), 16)
    call = AttentionCall(q, k, 0.25)
    expected = softmax_of(call)
    tiles = scores_module.tiles
    monkeypatch.setattr(
        scores_module, "tiles", lambda *args: ((rows, [next(keys)]) for rows, keys in tiles(*args))
    )
    wrong = gathered(call, Tokens(0, 30), Tokens(0, 41), "chunked", 4 * 2 * 7 * 11)
    assert float((wrong - expected).abs().max()) > 0.01


class Largest(TorchDispatchMode):
    """The most bytes that any tensor had that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.bytes = max(self.bytes, *sizes, 0)
        return result


@pytest.mark.parametrize("route", ["lse", "chunked"])
def test_no_tensor_is_larger_than_a_tile(route: Any) -> None:
    q, k, v = make_inputs(1, 4, 4, (1000, 1100), 8)
    call = with_lse(AttentionCall(q, k, 0.3), v)
    tile = 100_000
    with Largest() as largest:
        for _ in weights(call, Tokens(0, 1000), Tokens(0, 1100), route, tile):
            pass
    # The copies of queries and keys, in full, are the most: the scores would have 17.6 MB.
    assert largest.bytes <= max(tile, 4 * k.numel())


def test_the_cheapest_route_is_taken() -> None:
    q, k, v = make_inputs(1, 2, 2, (64, 64), 16)
    dense = AttentionCall(q, k, 0.25)
    assert choose_route(with_lse(dense, v), 64, 5) == "lse"
    assert choose_route(dense, 64, 5) == "one_hot"  # no product of its own
    assert choose_route(dense, 64, 64) == "second_call"  # four calls of one_hot
    half = AttentionCall(q.bfloat16(), k.bfloat16(), 0.25)
    assert choose_route(half, 64, 5) == "second_call"  # one_hot would round to 16 bits
    lists = replace(dense, lists=BlockLists.full((16, 16), (64, 64)))
    assert choose_route(lists, 64, 5) == "one_hot"
    assert choose_route(lists, 4, 5) == "chunked"  # one_hot runs all 64
    grouped = AttentionCall(q, k[:, :, :1], 0.25)  # the fused kernel of a CPU takes no groups
    assert choose_route(grouped, 64, 64) == "chunked"


# --- what is made of weights --------------------------------------------------------------------------------


def collected(spec: CaptureSpec, tile: Tensor, valid: Tensor | None = None, parts: int = 1) -> Tensor:
    """The quantity of weights (B, H, Q, K)."""
    from diffctrl.attention.capture import Part
    from diffctrl.attention.capture.reduce import quantity_shape

    batch, heads, rows, columns = tile.shape
    shape = (batch, *([heads] if spec.heads == "each" else []), *quantity_shape(spec, rows, columns))
    total = torch.zeros(shape)
    cuts = torch.arange(rows).tensor_split(parts)
    accumulate(
        [Part(int(cut[0]), 0, tile[:, :, cut]) for cut in cuts if len(cut)], [Sink(spec, total)], valid, rows
    )
    return total


# Rows: image queries; columns: six text keys, then four image keys (worked example of the specification).
EXAMPLE = torch.tensor(
    [
        [2, 3, 2, 1, 0, 0, 1, 0, 0, 0],
        [2, 0, 0, 1, 3, 0, 0, 1, 0, 0],
        [2, 0, 1, 1, 0, 3, 0, 0, 1, 0],
        [2, 1, 3, 1, 0, 0, 0, 0, 0, 1],
    ]
).double()


def example_call() -> AttentionCall:
    """Queries and keys with the example's scores, text queries after image queries."""
    text = torch.zeros(6, 10, dtype=torch.float64)
    text[:, 0] = 3
    for token in range(1, 6):
        text[token, token] = 1
    scores = torch.cat([EXAMPLE, text])
    return AttentionCall(scores[None, :, None, :], torch.eye(10).double()[None, :, None, :], 1.0)


@pytest.mark.parametrize("route", ["chunked", "one_hot"])
def test_the_worked_example(route: Any) -> None:
    call, image, text = example_call(), Tokens(0, 4), Tokens(4, 6)
    lse = scores_module.tiled_logsumexp(call.query, call.key, 1.0)[0, 0, :4]
    expected = torch.tensor([3.813312, 3.661281, 3.704493, 3.704493]).double()
    torch.testing.assert_close(lse, expected, atol=1e-6, rtol=0)

    def quantity(name: Any, rows: Tokens, columns: Tokens) -> Tensor:
        tile = gathered(call, rows, columns, route, 1 << 20)
        return collected(CaptureSpec(quantity=name), tile)[0]

    def near(actual: Tensor, *expected: float) -> None:
        torch.testing.assert_close(actual, torch.tensor(expected), atol=1e-6, rtol=0)

    near(quantity("row_mass", image, Tokens(0, 6)), 0.873769, 0.853043, 0.859258, 0.859258)
    near(quantity("row_mass", image, Tokens(0, 4)), 0.829619, 0.311153, 0.340286, 0.810032)
    near(quantity("row_mass", image, Tokens(1, 2)), 0.606500, 0.051399, 0.091517, 0.561263)
    mass = quantity("column_mass", image, Tokens(0, 6))
    near(mass, 0.179184, 0.140151, 0.187519, 0.065918, 0.146873, 0.141687)
    # The specification lets every text query have 3 on column 0 and 1 on its own one of tokens 1..5.
    near(quantity("column_mass", text, Tokens(0, 6)), 0.658467, *[0.042080] * 5)
    even = quantity("column_entropy", image, Tokens(0, 6))
    near(even, 0.998896, 0.517757, 0.676436, 0.998896, 0.362702, 0.376616)


@settings(max_examples=25, deadline=None)
@given(
    parts=st.integers(1, 6),
    heads=st.sampled_from(("mean", "sum", "each")),
    padded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_quantities_are_those_of_the_whole_map(parts: int, heads: Any, padded: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tile = torch.softmax(3 * torch.randn(2, 3, 9, 5, generator=generator), -1)
    tile[0, :, :, 2] = 0  # a key that nobody attends
    valid = torch.arange(9) < torch.tensor([[9], [4]]) if padded else None
    w = tile if valid is None else tile * valid[:, None, :, None]
    w = w if heads == "each" else getattr(w, heads)(1)
    count = torch.full((2,), 9.0) if valid is None else valid.sum(1).float()
    count = count.view(-1, *[1] * (w.ndim - 2))
    p = (w / w.sum(-2, keepdim=True)).nan_to_num(0.0)
    expected = {
        "weights": w,
        "row_mass": w.sum(-1),
        "column_mass": w.sum(-2) / count,
        "column_entropy": -torch.xlogy(p, p).sum(-2) / count.log(),
    }
    for quantity, value in expected.items():
        spec: Any = CaptureSpec(quantity=quantity, heads=heads)  # type: ignore[arg-type]
        torch.testing.assert_close(collected(spec, tile, valid, parts), value, atol=1e-5, rtol=1e-5)


def test_the_entropy_of_even_and_single_columns() -> None:
    tile = torch.zeros(1, 1, 8, 3)
    tile[..., 0] = 0.1  # even
    tile[..., 3, 1] = 0.5  # one query
    spec = CaptureSpec(quantity="column_entropy")
    assert collected(spec, tile)[0].tolist() == pytest.approx([1.0, 0.0, 0.0], abs=1e-6)
    assert collected(spec, tile[:, :, :1])[0].tolist() == [0.0, 0.0, 0.0]  # one query tells nothing


# --- the spec -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantity": "map"}, r"quantity='map' is not accepted; quantity is one of weights, row_mass"),
        ({"heads": "max"}, r"heads='max'.*mean, sum, each"),
        ({"rows": 1}, r"rows=1.*cond, uncond, all"),
        ({"only_keys": 3}, r"only_keys=3 is not accepted; give several indices"),
        ({"only_keys": ()}, "at least one index"),
        ({"only_blocks": (1, 1)}, "each once"),
        ({"only_heads": (-1,)}, "from 0"),
        ({"depth": (0.5, 0.2)}, r"depth=\(0.5, 0.2\).*within \[0, 1\]"),
        ({"depth": (0.0, 0.2), "only_blocks": (1,)}, "give one of them"),
        ({"only_frames": (0,), "queries": "text"}, "by their frame"),
        ({"only_frames": (0,), "only_queries": (0,)}, "by their frame"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CaptureSpec(**fields)


def test_blocks_by_depth_are_those_of_the_specification() -> None:
    spec = CaptureSpec(depth=(0.42, 0.95))
    assert spec.chosen_blocks(57) == tuple(range(24, 54))
    assert spec.chosen_blocks(48) == tuple(range(20, 45))
    assert CaptureSpec(depth=(0.5, 1)).chosen_blocks(3) == (1, 2)
    assert CaptureSpec().chosen_blocks(3) == (0, 1, 2)
    with pytest.raises(ValueError, match=r"holds none of 2 blocks"):
        CaptureSpec(depth=(0.4, 0.6)).chosen_blocks(2)
    with pytest.raises(ValueError, match=r"only_blocks holds 9, but there are 4: 0 to 3"):
        CaptureSpec(only_blocks=(1, 9)).chosen_blocks(4)
