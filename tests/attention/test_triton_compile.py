"""The Triton kernel over lists without a GPU: compiled, and interpreted (`tests/triton_kernels.py`)."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffctrl.attention.kernels import triton_lists
from diffctrl.attention.kernels.base import Operands, Request
from diffctrl.attention.kernels.reference import KERNEL as REFERENCE
from diffctrl.attention.kernels.triton_lists import (
    HOPPER_CANDIDATES,
    TritonListsKernel,
    Variant,
    table_variant,
)
from diffctrl.attention.lists import BlockLists
from tests.triton_kernels import (
    assembled,
    compiled_only,
    interpreted_only,
    needs_triton,
    run_interpreted,
    spilled,
)

pytestmark = needs_triton

TYPES = {"lse": "*fp32", "counts": "*i32", "indices": "*i32", "n_valid": "*i32", "order": "*i32"}
TYPES |= {"scale_log2": "fp32"} | dict.fromkeys(("q", "k", "v", "out"), "*bf16")


def compiled(
    variant: Variant, arch: int, dim: int, block: tuple[int, int], *, tail: bool, tmp_path: Path,
    lengths: bool = False,
):  # fmt: skip
    """(compiled kernel, what ptxas -v says)."""
    from diffctrl.attention.kernels import triton_lists_jit

    function = triton_lists_jit.lists_descriptor if variant.descriptor else triton_lists_jit.lists_pointer
    variant, (dp, bm, qsub, bn, split) = triton_lists.fitted(variant, block, 1 << 20, dim)
    constants = {
        "GROUP": 1, "D": dim, "DP": dp, "BM": bm, "QSUB": qsub, "BN": bn, "SPLIT": split,
        "BATCH_LISTS": False, "HEAD_LISTS": True, "HAS_LSE": True, "HAS_VALID": lengths, "TAIL": tail,
        "HAS_ORDER": False, "UNIT": 8, "SAME_KV": not variant.descriptor, "SPECIALIZE": variant.specialize,
    }  # fmt: skip
    return assembled(
        function, TYPES, constants, arch=arch, warps=variant.warps, stages=variant.stages, folder=tmp_path
    )


@compiled_only
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize(
    ("dim", "block", "spill"),
    [
        (64, (128, 128), 0), (128, (128, 128), 32), (128, (128, 64), 32), (128, (64, 64), 0),
        (256, (128, 128), 0),
    ],
)  # fmt: skip
def test_table_on_hopper(dim, block, spill, tail, tmp_path):
    variant = table_variant(90, dim, block)
    kernel, report = compiled(variant, 90, dim, block, tail=tail, tmp_path=tmp_path)
    assert "wgmma.mma_async" in kernel.asm["ptx"]
    assert "serialized" not in report
    assert spilled(report) <= spill
    assert kernel.metadata.shared <= 227 * 1024


@compiled_only
@pytest.mark.parametrize("tail", [False, True])
def test_table_of_small_blocks(tail, tmp_path):
    variant = table_variant(90, 32, (32, 32))
    assert variant.warps == 2
    kernel, report = compiled(variant, 90, 32, (32, 32), tail=tail, tmp_path=tmp_path)
    assert "mma" in kernel.asm["ptx"]
    assert spilled(report) == 0


@compiled_only
@pytest.mark.parametrize("arch", [80, 89])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_table_before_hopper(arch, dim, tmp_path):
    variant = table_variant(arch, dim, (128, 128))
    kernel, report = compiled(variant, arch, dim, (128, 128), tail=True, tmp_path=tmp_path)
    assert spilled(report) == 0
    assert kernel.metadata.shared <= 99 * 1024


@compiled_only
@pytest.mark.slow
@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("variant", HOPPER_CANDIDATES, ids=lambda v: v.label)
def test_candidates_compile_as_named(variant, lengths, tmp_path):
    kernel, report = compiled(variant, 90, 128, (128, 128), tail=True, tmp_path=tmp_path, lengths=lengths)
    assert "serialized" not in report
    assert kernel.metadata.shared <= 227 * 1024
    # The pass that specialises warps gives up without a word; then there is one group less of each kind.
    assert kernel.metadata.num_warps == (12 if variant.specialize else variant.warps)
    if variant.specialize:
        assert_second_group_stores_its_own_rows(kernel.asm["ttgir"])


def assert_second_group_stores_its_own_rows(code: str) -> None:
    """Rows 64 .. 128 of a block are counted from the block's start, not from the start that Q is loaded at.

    Every tensor that begins as make_range(64, 128) is added to splats of scalars, none of which is a sum with
    64 already.
    """
    code = re.sub(r" loc\(.*\)", "", code)
    shifted = set(re.findall(r"(%\S+) = arith\.addi %\S+, %c64_i32", code))
    ranges = set(re.findall(r"(%\S+) = tt\.make_range .*start = 64 ", code))
    splats = dict(re.findall(r"(%\S+) = tt\.splat (%\S+) ", code))
    sums = re.findall(r"arith\.(?:addi|subi) (%\S+), (%\S+) ", code)
    starts = {splats[other] for pair in sums for one, other in (pair, pair[::-1])
              if one in ranges and other in splats}  # fmt: skip
    assert ranges
    assert starts
    assert not starts & shifted


@compiled_only
def test_interpreter_process():
    run_interpreted(__file__)


KINDS = (
    Variant(),
    Variant(descriptor=True),
    Variant(descriptor=True, rows=64, stages=1),
    Variant(descriptor=True, specialize=True, tile=128),
)
# B, H, Hkv, Sq, Sk, D, block, further arguments of `lists`
CALLS = {
    "tail": (1, 2, 2, 261, 293, 32, (128, 128), {}),
    "whole blocks": (1, 2, 2, 128, 256, 64, (128, 128), {}),
    "groups, padded D, row lengths": (
        2,
        4,
        2,
        100,
        180,
        72,
        (64, 64),
        {"shared": True, "n_valid": [180, 70]},
    ),
    "empty rows, no valid key": (2, 2, 1, 100, 180, 16, (64, 128), {"empty": True, "n_valid": [0, 129]}),
    "large blocks": (1, 1, 1, 300, 270, 16, (256, 256), {}),
    "few keys": (1, 1, 1, 33, 9, 32, (16, 16), {}),
    "odd key block": (1, 2, 1, 70, 110, 24, (64, 96), {}),
}


def lists(b, h, sq, sk, block, *, shared=False, n_valid=None, empty=False) -> BlockLists:
    generator = torch.Generator().manual_seed(b + h + sq)
    nq, nk = -(-sq // block[0]), -(-sk // block[1])
    blocks = torch.rand(1, 1 if shared else h, nq, nk, generator=generator) < 0.5
    blocks[..., 0] |= ~blocks.any(-1)
    if empty:
        blocks[:, :, -1] = False
    fields = {} if n_valid is None else {"n_valid": torch.tensor(n_valid)}
    return BlockLists.from_dense_blocks(blocks, block, (sq, sk), allow_empty=True, **fields)


@interpreted_only
@pytest.mark.parametrize("variant", KINDS, ids=lambda v: v.label)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_arithmetic(variant, name, interpreter):
    b, h, hkv, sq, sk, d, block, options = CALLS[name]
    mask = lists(b, h, sq, sk, block, **options)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(b, n, heads, d, generator=generator).half()
        for n, heads in ((sq, h), (sk, hkv), (sk, hkv))
    )
    request = Request(
        "cpu", None, torch.float16, b, h, hkv, sq, sk, d, needs_lse=True, sparse=True, block=block
    )
    operands = Operands(q, k, v, 1 / math.sqrt(d), mask)
    kernel = TritonListsKernel(variant)
    assert kernel.why_not(request) is None
    out, lse = kernel.run(request, operands)
    exact = replace(operands, query=q.float(), key=k.float(), value=v.float())
    expected, expected_lse = REFERENCE.run(replace(request, dtype=torch.float32), exact)
    empty = expected_lse == float("-inf")
    assert torch.equal(lse == float("-inf"), empty)
    torch.testing.assert_close(lse[~empty], expected_lse[~empty], atol=1e-4, rtol=0)
    assert float((out.float() - expected).norm() / expected.norm()) < 1e-3
