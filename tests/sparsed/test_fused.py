"""The fused block scores without a GPU: compiled, and interpreted (`tests/triton_kernels.py`)."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffctrl.sparsed import Builder, Layout, SparseDConfig, fused
from diffctrl.sparsed.fused import CANDIDATES, Form, table_form
from diffctrl.sparsed.pooling import chunked_scores
from tests.sparsed.examples import kept_sets
from tests.triton_kernels import (
    WITH_TRITON,
    assembled,
    compiled_only,
    interpreted_only,
    needs_triton,
    run_interpreted,
    spilled,
)


def compiled(form: Form, arch: int, dim: int, block: int, tmp_path: Path):
    """(compiled kernel, what ptxas -v says)."""
    from diffctrl.sparsed import fused_jit

    constants = {
        "GROUP": 1, "D": dim, "DP": max(16, 1 << (dim - 1).bit_length()), "BM": max(form.rows, block),
        "BLOCK": block, "BN": min(block, form.tile), "UNIT": 8, "DESCRIPTOR": form.descriptor,
    }  # fmt: skip
    types = {"q": "*bf16", "k": "*bf16", "lse": "*fp32", "w": "*fp32", "q_valid": "*i32", "k_valid": "*i32"}
    types["scale_log2"] = "fp32"
    return assembled(
        fused_jit.pool, types, constants, arch=arch, warps=form.warps, stages=form.stages, folder=tmp_path
    )


@needs_triton
@compiled_only
@pytest.mark.parametrize(("dim", "block"), [(64, 128), (128, 128), (128, 32), (256, 128)])
def test_table_on_hopper(dim, block, tmp_path):
    kernel, report = compiled(table_form(90, dim), 90, dim, block, tmp_path)
    assert "wgmma.mma_async" in kernel.asm["ptx"]
    assert "serialized" not in report
    assert spilled(report) == 0
    # Two programs share an SM where the head dim is the usual one.
    assert kernel.metadata.shared <= (113 if dim <= 128 else 227) * 1024


@needs_triton
@compiled_only
@pytest.mark.parametrize(("arch", "dim"), [(80, 128), (89, 64), (89, 256)])
def test_table_before_hopper(arch, dim, tmp_path):
    kernel, report = compiled(table_form(arch, dim), arch, dim, 128, tmp_path)
    assert spilled(report) <= 16
    assert kernel.metadata.shared <= 99 * 1024


@needs_triton
@compiled_only
@pytest.mark.slow
@pytest.mark.parametrize("form", CANDIDATES, ids=lambda form: form.label)
def test_candidates_compile(form, tmp_path):
    kernel, report = compiled(form, 90, 128, 128, tmp_path)
    assert "serialized" not in report
    assert spilled(report) == 0
    assert kernel.metadata.shared <= 227 * 1024


@needs_triton
@compiled_only
def test_interpreter_process():
    run_interpreted(__file__)


FORMS = (Form(), Form(descriptor=True), Form(tile=128, warps=8))
# batch rows, tokens, real tokens of each row, H, Hkv, D, block
CALLS = {
    "tail": (1, 300, [300], 2, 2, 64, 128),
    "whole blocks": (1, 256, [256], 1, 1, 32, 128),
    "seven to one, row lengths": (2, 150, [150, 97], 7, 1, 32, 64),
    "padded D, small blocks": (1, 100, [93], 2, 1, 24, 32),
    "one block": (1, 17, [17], 1, 1, 16, 16),
    "one token": (1, 1, [1], 1, 1, 16, 32),
}


def half(tokens, heads, dim, batch, seed):
    return torch.randn(batch, tokens, heads, dim, generator=torch.Generator().manual_seed(seed)).half()


@interpreted_only
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.label)
@pytest.mark.parametrize("name", CALLS)
def test_scores(form, name, interpreter):
    batch, tokens, valid, heads, kv_heads, dim, block = CALLS[name]
    query, key = half(tokens, heads, dim, batch, 0), half(tokens, kv_heads, dim, batch, 1)
    scale = 1 / math.sqrt(dim)
    assert fused.why_not(query, block) is None
    lse = fused.reference_lse(query, key, valid, scale)
    got = fused.fused_scores(query, key, valid, valid, scale, block, lse, form)
    expected = chunked_scores(query, key, valid, valid, scale, block)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


@interpreted_only
def test_strided_inputs(interpreter):
    """As models give them: heads outermost in memory, keys as a slice of a fused projection."""
    query, key = half(100, 4, 32, 1, 0), half(100, 2, 32, 1, 1)
    lse = fused.reference_lse(query, key, [100], 0.2)
    expected = chunked_scores(query, key, [100], [100], 0.2, 32)
    wide = torch.zeros(1, 100, 6, 32, dtype=torch.float16)
    wide[:, :, 2:4] = key
    strided = query.transpose(1, 2).contiguous().transpose(1, 2)
    for form in FORMS:
        got = fused.fused_scores(strided, wide[:, :, 2:4], [100], [100], 0.2, 32, lse, form)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


@interpreted_only
def test_self_test_and_its_faults(interpreter, monkeypatch):
    assert fused.self_test(torch.device("cpu"), torch.float16, 32, 32, True) is None
    right = fused.fused_scores
    faults = {
        "off by": lambda *a, **k: right(*a, **k) * 1.01,
        "nan": lambda *a, **k: right(*a, **k) * float("nan"),
        "raised RuntimeError: no": None,
    }
    for said, fault in faults.items():

        def broken(*args, fault=fault, **kwargs):
            if fault is None:
                raise RuntimeError("no")
            return fault(*args, **kwargs)

        monkeypatch.setattr(fused, "fused_scores", broken)
        assert said in (fused.self_test(torch.device("cpu"), torch.float16, 32, 32, True) or "")


@interpreted_only
@pytest.mark.parametrize("mode", ["strict", "authors"])
@pytest.mark.parametrize("score_scale", ["head_dim", "authors"])
def test_patterns_are_those_of_the_chunked_builder(mode, score_scale, interpreter):
    """With the log-sum-exp of the dense step, and with one of its own for other scales and sets of keys."""
    query, key = half(160, 4, 32, 2, 0), half(160, 2, 32, 2, 1)
    layout = Layout.of(torch.tensor([112, 70]), 48, 32, torch.tensor([0, 42]))
    scale = 1 / math.sqrt(32)
    lse = fused.reference_lse(query, key, layout.valid.tolist(), scale)
    kept = {}
    for name in ("fused", "chunked"):
        config = SparseDConfig(block_size=32, mode=mode, score_scale=score_scale, builder=name)
        builder = Builder.of(config, query, key, scale, None)
        assert builder.wants_lse(scale) == (name == "fused" and score_scale == "head_dim")
        # The engine's sparse kernel for half on a CPU is the gathered one, whose log-sum-exp is exact.
        pattern = builder.build(query, key, layout, lse if builder.wants_lse(scale) else None)
        assert pattern.builder == name
        kept[name] = kept_sets(pattern.lists)
    assert kept["fused"] == kept["chunked"]


@compiled_only
def test_refusals():
    query = torch.zeros(1, 64, 2, 32, dtype=torch.bfloat16)
    config = SparseDConfig(builder="fused", block_size=32)
    reason = fused.why_not(query, 32) or ""
    assert ("triton" in reason) if not WITH_TRITON else ("runs on CUDA GPUs, not on cpu" in reason)
    with pytest.raises(ValueError, match="builder='exact' takes chunks"):
        Builder.of(config, query, query, 0.2, None)
    assert Builder.of(replace(config, builder="exact"), query, query, 0.2, None).name == "chunked"
