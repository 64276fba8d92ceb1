"""The gradients of the Triton kernel over lists without a GPU: compiled, and interpreted
(`tests/triton_kernels.py`)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from diffctrl.attention.chain import request_for
from diffctrl.attention.kernels.base import Operands
from diffctrl.attention.kernels.reference import KERNEL as REFERENCE
from diffctrl.attention.kernels.triton_grad import GradTiles, gradients, table_tiles
from diffctrl.attention.kernels.triton_lists import TritonListsKernel
from diffctrl.attention.selftest import relative_errors, strided
from tests.attention.cases import make_inputs, random_lists, seeded
from tests.triton_kernels import (
    assembled,
    compiled_only,
    interpreted_only,
    needs_triton,
    run_interpreted,
    spilled,
)

pytestmark = needs_triton

TYPES = dict.fromkeys(("q", "k", "v", "go", "out", "dq", "dk", "dv"), "*bf16")
TYPES |= dict.fromkeys(("lse", "lse2", "delta"), "*fp32")
TYPES |= dict.fromkeys(("counts", "indices", "n_valid"), "*i32")
TYPES |= dict.fromkeys(("scale", "scale_log2"), "fp32")


@compiled_only
@pytest.mark.parametrize("arch", [80, 90])  # before Hopper a program may have 99 KB
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("block", [(32, 32), (128, 128), (32, 128), (128, 32)])
@pytest.mark.parametrize("name", ["grad_query", "grad_key_value"])
def test_no_register_spills(name, block, dim, arch, tmp_path):
    from diffctrl.attention.kernels import triton_grad_jit

    tiles = table_tiles(dim, block)
    own = min(block[0 if name == "grad_query" else 1], tiles.rows)
    bm, bn = (own, tiles.tile) if name == "grad_query" else (tiles.tile, own)
    constants = {
        "GROUP": 1, "D": dim, "DP": 1 << (dim - 1).bit_length(), "BQ": block[0], "BM": bm, "BK": block[1],
        "BN": bn, "BATCH_LISTS": True, "HEAD_LISTS": True, "HAS_VALID": True, "UNIT": 8,
    }  # fmt: skip
    kernel, report = assembled(
        getattr(triton_grad_jit, name), TYPES, constants,
        arch=arch, warps=tiles.warps, stages=tiles.stages, folder=tmp_path,
    )  # fmt: skip
    assert "mma" in kernel.asm["ptx"]
    assert "serialized" not in report
    assert spilled(report) == 0
    assert kernel.metadata.shared <= 99 * 1024


@compiled_only
def test_interpreter_process():
    run_interpreted(__file__)


# B, H, Hkv, Sq, Sk, D, block, further arguments of `random_lists`
CALLS = {
    "tail": (1, 2, 2, 261, 293, 32, (128, 128), {"heads": 2}),
    "whole blocks, a list for each row and head": (2, 2, 2, 128, 256, 64, (64, 64), {"heads": 2, "batch": 2}),
    "small blocks": (1, 2, 2, 150, 130, 32, (32, 32), {"heads": 2}),
    "smallest blocks, one list": (2, 2, 2, 70, 90, 16, (16, 16), {"density": 0.3}),
    "groups, padded D, row lengths": (2, 4, 2, 100, 180, 72, (64, 64), {"heads": 4, "n_valid": [180, 70]}),
    "empty rows, no valid key": (
        2, 2, 1, 100, 180, 16, (64, 32),
        {"heads": 2, "allow_empty": True, "density": 0.3, "n_valid": [0, 129]},
    ),
    "few keys": (1, 1, 1, 33, 9, 32, (16, 16), {}),
    "odd key block": (1, 2, 1, 70, 110, 24, (64, 96), {"heads": 2}),
}  # fmt: skip


@interpreted_only
@pytest.mark.parametrize("tiles", [None, GradTiles(rows=32, tile=128)], ids=["table", "wide"])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_gradients(name, tiles, interpreter):
    b, h, hkv, sq, sk, dim, block, options = CALLS[name]
    mask = random_lists(block, (sq, sk), **options)
    inputs = make_inputs(b, h, hkv, (sq, sk), dim, dtype=torch.float16)
    grad = torch.randn(b, sq, h, dim, generator=seeded(7)).half()
    operands = Operands(*inputs, scale=1 / math.sqrt(dim), mask=mask)
    exact = Operands(*(t.double().requires_grad_() for t in inputs), scale=operands.scale, mask=mask)
    request = request_for(exact, needs_lse=True, needs_grad=True)
    out, lse = REFERENCE.run(request, exact)
    expected = torch.autograd.grad(out, (exact.query, exact.key, exact.value), grad.double())
    found = gradients(operands, grad, out.half(), lse.float(), tiles)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == torch.float16
        silent = other == 0
        assert bool((one[silent] == 0).all())  # keys that nobody lists
        assert float(relative_errors(one, other).max()) < 2e-3


@interpreted_only
def test_strided_inputs_give_the_same_bits(interpreter):
    mask = random_lists((32, 32), (70, 70), heads=2)
    inputs = make_inputs(1, 2, 2, (70, 70), 32, dtype=torch.float16)
    operands = Operands(*inputs, scale=0.2, mask=mask)
    out, lse = REFERENCE.run(request_for(operands, needs_lse=True), operands)
    assert lse is not None
    grad = torch.randn(out.shape, generator=seeded(7)).half()
    expected = gradients(operands, grad, out, lse)
    odd = torch.cat([inputs[0], inputs[0][..., :1]], -1)[..., :32]  # no stride is a multiple of 8 elements
    others = [replace(strided(operands), query=query) for query in (strided(operands).query, odd)]
    slices = torch.cat([grad, grad], 1)[:, :70]
    for other in (*others, replace(operands, value=inputs[2].transpose(2, 3).contiguous().transpose(2, 3))):
        found = gradients(other, slices, out, lse)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@interpreted_only
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid")
def test_scores_far_below_zero(interpreter):
    """Where a tile is not full, exp(0 - log-sum-exp) overflows."""
    mask = random_lists((32, 32), (70, 70), heads=2)
    q, k, v = make_inputs(1, 2, 2, (70, 70), 32, dtype=torch.float16)
    q, k = 0.1 * q + 4, 0.1 * k - 4
    grad = torch.randn(q.shape, generator=seeded(7)).half()
    exact = Operands(*(t.double().requires_grad_() for t in (q, k, v)), scale=0.2, mask=mask)
    out, lse = REFERENCE.run(request_for(exact, needs_lse=True, needs_grad=True), exact)
    assert float(lse.max()) < -89  # exp(89) is beyond float32
    expected = torch.autograd.grad(out, (exact.query, exact.key, exact.value), grad.double())
    found = gradients(Operands(q, k, v, scale=0.2, mask=mask), grad, out.half(), lse.float())
    assert all(float(relative_errors(*pair).max()) < 2e-2 for pair in zip(found, expected, strict=True))


@interpreted_only
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_autograd(interpreter):
    """The kernel's own backward is what autograd calls, and a second order is refused."""
    mask = random_lists((32, 32), (70, 70), heads=2)
    inputs = make_inputs(1, 2, 2, (70, 70), 32, dtype=torch.float16, requires_grad=True)
    operands = Operands(*inputs, scale=0.2, mask=mask)
    request = request_for(operands, needs_grad=True)
    kernel = TritonListsKernel()
    assert kernel.why_not(request) is None
    out, lse = kernel.run(request, operands)
    assert lse is None
    grad = torch.randn(out.shape, generator=seeded(7)).half()
    found = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    exact = Operands(*(t.detach().double().requires_grad_() for t in inputs), scale=0.2, mask=mask)
    expected = REFERENCE.run(request_for(exact, needs_grad=True), exact)[0]
    assert float(relative_errors(out.detach(), expected.detach()).max()) < 2e-3
    expected = torch.autograd.grad(expected, (exact.query, exact.key, exact.value), grad.double())
    assert all(float(relative_errors(*pair).max()) < 2e-3 for pair in zip(found, expected, strict=True))
    with pytest.raises(RuntimeError, match="first-order"):
        torch.autograd.grad(out, inputs, grad, create_graph=True)
