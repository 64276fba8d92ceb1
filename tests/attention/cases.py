"""Shared by the tests of the engine: random masks, inputs, and the reference to compare with."""

from __future__ import annotations

import math

import torch

from diffctrl.attention import BlockLists, Rule
from diffctrl.attention.chain import load, request_for
from diffctrl.attention.kernels.base import Operands
from diffctrl.attention.selftest import OUT_BOUND, relative_errors


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_lists(
    block: tuple[int, int],
    lengths: tuple[int, int],
    *,
    density: float = 0.5,
    heads: int = 1,
    batch: int = 1,
    seed: int = 0,
    allow_empty: bool = False,
    n_valid: list[int] | None = None,
    rule: Rule | None = None,
) -> BlockLists:
    """Random blocks; without allow_empty each row gets its diagonal block. A rule takes half of them."""
    generator = seeded(seed)
    nq, nk = (-(-n // size) for n, size in zip(lengths, block, strict=True))
    blocks = torch.rand(batch, heads, nq, nk, generator=generator) < density
    if not allow_empty:
        rows = torch.arange(nq)
        blocks[:, :, rows, rows % nk] = True
    fields = {}
    if rule is not None:
        partial = blocks & (torch.rand(blocks.shape, generator=generator) < 0.5)
        blocks = blocks & ~partial
        lists = BlockLists.from_dense_blocks(partial, block, lengths, allow_empty=True)
        fields = {"partial_counts": lists.counts, "partial_indices": lists.indices, "rule": rule}
    if n_valid is not None:
        fields["n_valid"] = torch.tensor(n_valid)
    return BlockLists.from_dense_blocks(blocks, block, lengths, allow_empty=True, **fields)


def make_rule(kind: str, lengths: tuple[int, int], batch: int = 1) -> Rule:
    sq, sk = lengths
    if kind == "causal":
        return Rule("causal", (torch.tensor([sk - sq], dtype=torch.int32),))
    if kind == "frame_window":
        q_frame, k_frame = (torch.arange(n, dtype=torch.int32) // 7 for n in lengths)
        return Rule("frame_window", (q_frame, k_frame, torch.tensor([1], dtype=torch.int32)))
    return Rule("kv_validity", (torch.rand(batch, sk, generator=seeded(3)) < 0.6,))


def make_inputs(
    batch: int,
    heads: int,
    kv_heads: int,
    lengths: tuple[int, int],
    dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 1,
    requires_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """query (B, Sq, H, D), key and value (B, Sk, Hkv, D), unit normal."""
    generator = seeded(seed)

    def draw(length: int, n_heads: int) -> torch.Tensor:
        tensor = torch.randn(batch, length, n_heads, dim, generator=generator).to(device, dtype)
        return tensor.requires_grad_(requires_grad)

    return draw(lengths[0], heads), draw(lengths[1], kv_heads), draw(lengths[1], kv_heads)


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: BlockLists | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse in fp64 from the same inputs, on the CPU."""
    exact = Operands(
        *(t.detach().cpu().double() for t in (query, key, value)),
        scale=1 / math.sqrt(query.shape[-1]) if scale is None else scale,
        mask=mask,
    )
    kernel = load("reference")
    assert not isinstance(kernel, str)
    out, lse = kernel.run(request_for(exact, needs_lse=True), exact)
    assert lse is not None
    return out, lse


def assert_matches(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    expected: tuple[torch.Tensor, torch.Tensor],
    factor: float = 1.0,
) -> None:
    """Relative Frobenius error per head below the dtype's bound; rows without keys exactly 0 and -inf."""
    expected_out, expected_lse = expected
    assert out.shape == expected_out.shape
    error = relative_errors(out.detach().cpu(), expected_out)
    bound = factor * OUT_BOUND[out.dtype]
    assert bool((error <= bound).all()), f"relative error {error.max():.2e}, bound {bound:.0e}"
    empty = (expected_lse == float("-inf")).transpose(1, 2)
    assert bool((out.detach().cpu()[empty] == 0).all())
    if lse is not None:
        assert lse.dtype == torch.float32
        assert lse.is_contiguous()
        assert torch.equal(lse.cpu() == float("-inf"), expected_lse == float("-inf"))
        tolerance = 1e-5 if out.dtype in (torch.float32, torch.float64) else 1e-3
        torch.testing.assert_close(lse.cpu(), expected_lse.float(), atol=tolerance, rtol=1e-5)
