"""The chain: what it picks, what it refuses, and that the self-test catches kernels that are wrong."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from diffctrl.attention import EngineStats, attend, chain, kernel_report, select_kernel
from diffctrl.attention.kernels import table
from diffctrl.attention.kernels.base import Request, density_class
from diffctrl.attention.kernels.gathered import KERNEL as GATHERED
from diffctrl.attention.kernels.reference import KERNEL as REFERENCE
from diffctrl.attention.selftest import self_test, small_mask, small_request
from tests.attention.cases import make_inputs, random_lists

REQUEST = Request(
    "cpu",
    None,
    torch.float32,
    1,
    2,
    2,
    100,
    100,
    32,
    needs_lse=True,
    sparse=True,
    block=(32, 32),
    allows_empty=True,
)


class Fake:
    """The reference with one fault."""

    name = "fake"

    def __init__(self, fault):
        self.fault = fault

    def why_not(self, request):
        return None

    def run(self, request, operands):
        return self.fault(request, operands)


def dense(request, operands):
    return REFERENCE.run(request, replace(operands, mask=None))


def zeros(request, operands):
    out, lse = REFERENCE.run(request, operands)
    return torch.zeros_like(out), lse


def nan(request, operands):
    out, lse = REFERENCE.run(request, operands)
    return out * math.nan, lse


def one_nan_row(request, operands):
    out, lse = REFERENCE.run(request, operands)
    out = out.clone()
    out[0, 3, 0] = math.nan
    return out, lse


def padded_tail_attended(request, operands):
    """Keys past the end count as zeros with weight exp(0): what an unmasked tail does."""
    bk = operands.mask.block[1]
    missing = -operands.key.shape[1] % bk
    key, value = (
        torch.nn.functional.pad(t, (0, 0, 0, 0, 0, missing)) for t in (operands.key, operands.value)
    )
    blocks = operands.mask.to_dense_blocks()
    lengths = (operands.mask.lengths[0], key.shape[1])
    mask = type(operands.mask).from_dense_blocks(blocks, operands.mask.block, lengths, allow_empty=True)
    return REFERENCE.run(request, replace(operands, key=key, value=value, mask=mask))


def tail_block_dropped(request, operands):
    mask = operands.mask
    blocks = mask.to_dense_blocks()
    blocks[..., -1] = False
    short = type(mask).from_dense_blocks(blocks, mask.block, mask.lengths, allow_empty=True)
    return REFERENCE.run(request, replace(operands, mask=short))


def first_head_for_all(request, operands):
    blocks = operands.mask.to_dense_blocks()[:, :1]
    mask = type(operands.mask).from_dense_blocks(
        blocks, operands.mask.block, operands.mask.lengths, allow_empty=True
    )
    return REFERENCE.run(request, replace(operands, mask=mask))


def a_little_leak(request, operands):
    """Right within any value bound, but one key that no list holds moves the output."""
    out, lse = REFERENCE.run(request, operands)
    return out + 1e-6 * operands.key[:, 33:34, :1, :1], lse


def wrong_lse(request, operands):
    out, lse = REFERENCE.run(request, operands)
    return out, None if lse is None else lse / math.log(2)


def finite_lse_for_empty_rows(request, operands):
    out, lse = REFERENCE.run(request, operands)
    return out, lse.masked_fill(lse == float("-inf"), 0.0)


def no_lse(request, operands):
    return REFERENCE.run(request, operands)[0], None


def wrong_dtype(request, operands):
    out, lse = REFERENCE.run(request, operands)
    return out.double(), lse


def raises(request, operands):
    raise RuntimeError("unsupported architecture\nand a long traceback")


FAULTS = [
    dense, zeros, nan, one_nan_row, padded_tail_attended, tail_block_dropped, first_head_for_all,
    a_little_leak,
    wrong_lse, finite_lse_for_empty_rows, no_lse, wrong_dtype, raises,
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_the_self_test_catches(fault):
    result = self_test(Fake(fault), REQUEST, torch.device("cpu"))
    assert not result.ok
    assert result.reason.startswith("self-test")
    assert "\n" not in result.reason


def ignores_lengths(request, operands):
    return REFERENCE.run(request, replace(operands, mask=replace(operands.mask, n_valid=None)))


def ignores_rule(request, operands):
    mask = operands.mask
    blocks = mask.to_dense_blocks()
    plain = type(mask).from_dense_blocks(blocks, mask.block, mask.lengths, allow_empty=True)
    return REFERENCE.run(request, replace(operands, mask=plain))


def dense_gradients(request, operands):
    out, lse = REFERENCE.run(request, operands)
    if not request.needs_grad:
        return out, lse
    other, _ = dense(request, operands)
    return out.detach() + other - other.detach(), lse


@pytest.mark.parametrize(
    ("fault", "change"),
    [
        (ignores_lengths, {"per_row_lengths": True}),
        (ignores_rule, {"rule": "causal"}),
        (ignores_rule, {"rule": "frame_window"}),
        (ignores_rule, {"rule": "kv_validity"}),
        (dense_gradients, {"needs_grad": True}),
    ],
)
def test_the_self_test_covers_what_the_request_asks_for(fault, change):
    request = replace(REQUEST, allows_empty=False, **change)
    assert self_test(Fake(fault), REQUEST, torch.device("cpu")).ok or fault is ignores_lengths
    assert not self_test(Fake(fault), request, torch.device("cpu")).ok
    assert self_test(GATHERED, request, torch.device("cpu")).ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("block", [(1, 1), (3, 2), (16, 8), (128, 128)])
def test_right_kernels_pass_with_room(dtype, grouped, shared, block):
    request = replace(
        REQUEST, dtype=dtype, kv_heads=1 if grouped else 2, shared_heads=shared, shared_batch=shared,
        needs_grad=True, block=block,
    )  # fmt: skip
    for kernel in (GATHERED, REFERENCE):
        result = self_test(kernel, request, torch.device("cpu"))
        assert result.ok, result.reason


def test_the_small_mask_has_every_kind_of_row():
    request = small_request(REQUEST)
    mask = small_mask(replace(request, allows_empty=False))
    assert {1, 2, 4} == set(mask.counts.flatten().tolist())
    assert mask.lengths == (101, 101)
    assert mask.counts.shape == (2, 3, 4)


def test_the_self_test_leaves_the_random_state_and_modes_alone():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    with torch.inference_mode():
        assert self_test(GATHERED, replace(REQUEST, needs_grad=True), torch.device("cpu")).ok
    assert torch.equal(torch.get_rng_state(), state)


# --- choice -------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_first(monkeypatch):
    """Puts a kernel named "fake" before the others of the table."""

    def install(kernel):
        monkeypatch.setitem(chain.KERNEL_MODULES, "fake", "fake")
        monkeypatch.setattr(chain, "kernel_order", lambda request: ("fake", *table.kernel_order(request)))
        monkeypatch.setattr(chain, "_LOGGED", set())
        chain.register("fake", kernel)

    yield install
    chain.register("fake", None)


def test_a_wrong_kernel_is_passed_over_counted_and_logged_once(fake_first, caplog):
    fake_first(Fake(dense))
    q, k, v = make_inputs(1, 2, 2, (100, 100), 32)
    mask = random_lists((32, 32), (100, 100), heads=2)
    stats = EngineStats()
    with caplog.at_level(logging.WARNING, logger="diffctrl.attention"):
        outs = [attend(q, k, v, mask=mask, stats=stats) for _ in range(3)]
    assert torch.equal(outs[0], attend(q, k, v, mask=mask, kernel="gathered"))
    assert stats.calls == {"gathered": 3}
    ((reason, count),) = stats.fallbacks.items()
    assert count == 3
    assert reason.startswith("gathered instead of fake, which self-test: relative error")
    assert [record.message for record in caplog.records] == [f"Attention runs on {reason}"]


def test_a_right_kernel_is_taken_and_tested_once_per_kind(fake_first):
    runs = []
    fake_first(Fake(lambda request, operands: runs.append(request.q_len) or REFERENCE.run(request, operands)))
    stats = EngineStats()
    for length in (100, 120, 100):
        mask = random_lists((32, 32), (length, length), heads=2)
        attend(*make_inputs(1, 2, 2, (length, length), 32), mask=mask, stats=stats)
    assert stats.calls == {"fake": 3}
    assert not stats.fallbacks
    assert runs == [101, 101, 101, 100, 120, 100]


def test_what_a_kernel_compiles_beside_the_small_call_is_tested_too():
    def wrong_where_strided(request, operands):
        out, lse = REFERENCE.run(request, operands)
        return (out if operands.query.is_contiguous() else out + 1), lse

    def wrong_on_whole_blocks(request, operands):
        out, lse = REFERENCE.run(request, operands)
        return (out if request.k_len % request.block[1] else out + 1), lse

    for fault in (wrong_where_strided, wrong_on_whole_blocks):
        kernel = Fake(fault)
        assert self_test(kernel, REQUEST, torch.device("cpu")).ok
        kernel.specialises = True
        assert "strided" in self_test(kernel, REQUEST, torch.device("cpu")).reason
    right = Fake(REFERENCE.run)
    right.specialises = True
    for changes in ({}, {"kv_heads": 1}, {"per_row_lengths": True}, {"sparse": False, "block": (0, 0)}):
        assert self_test(right, replace(REQUEST, **changes), torch.device("cpu")).ok


def test_a_forced_kernel_is_that_one_or_an_error(fake_first):
    q, k, v = make_inputs(1, 2, 2, (100, 100), 32)
    mask = random_lists((32, 32), (100, 100), heads=2)
    with pytest.raises(ValueError, match="kernel 'cudnn' needs an NVIDIA GPU"):
        attend(q, k, v, kernel="cudnn")
    with pytest.raises(ValueError, match="dense only: cannot take block lists"):
        attend(q, k, v, mask=mask, kernel="sdpa")
    with pytest.raises(ValueError, match="'warp' is not known; accepted are flash4, cudnn"):
        attend(q, k, v, mask=mask, kernel="warp")
    fake_first(Fake(dense))
    with pytest.raises(RuntimeError, match="kernel 'fake' is refused: self-test: relative error"):
        attend(q, k, v, mask=mask, kernel="fake")


def test_without_any_usable_kernel_all_reasons_are_named(monkeypatch):
    monkeypatch.setattr(chain, "kernel_order", lambda request: ("sdpa", "cudnn"))
    chain.register("sdpa", None)  # forgets selections
    q, k, v = make_inputs(1, 2, 2, (100, 100), 32)
    with pytest.raises(RuntimeError, match="sdpa dense only: .*; cudnn needs an NVIDIA GPU"):
        attend(q, k, v, mask=random_lists((32, 32), (100, 100), heads=2))
    chain.register("sdpa", None)


def test_the_choice_ignores_the_batch_and_the_order_is_documented():
    for device_type, arch in (("cpu", None), ("cuda", 80), ("cuda", 90), ("cuda", 100)):
        for sparse in (True, False):
            for length in (512, 4608, 32768):
                request = replace(
                    REQUEST, device_type=device_type, arch=arch, sparse=sparse, q_len=length, k_len=length,
                    heads=24,
                    block=(128, 128) if sparse else (0, 0), dtype=torch.bfloat16,
                )  # fmt: skip
                order = table.kernel_order(request)
                assert order == table.kernel_order(replace(request, batch=7))
                assert set(order) <= set(chain.KERNEL_MODULES) - {"reference"}
                assert order[-1] == ("gathered" if sparse else "sdpa")
    assert density_class(0.0) == 0.05
    assert density_class(0.25) == 0.25
    assert density_class(0.251) == 0.35
    assert density_class(1.0) == 1.0


def test_the_report_says_what_works_and_why_not(monkeypatch):
    monkeypatch.delitem(chain.KERNEL_MODULES, "flex")  # compiles for half a minute; test_flex.py does it once
    rows = {row.name: row for row in kernel_report("cpu")}
    assert rows["gathered"].works
    assert rows["gathered"].error < 1e-5
    assert rows["sdpa"].works
    assert rows["cudnn"].reason == "needs an NVIDIA GPU"
    assert not rows["flash4"].works
    assert "reference" not in rows
    assert all(row.works or row.reason for row in rows.values())


def test_selection_names_the_kernel():
    selection = select_kernel(REQUEST, "cpu")
    assert selection.kernel.name == "gathered"
    assert selection.rejected == ()


# --- errors of the entry ------------------------------------------------------------------------------------


def test_calls_that_do_not_fit_are_refused():
    q, k, v = make_inputs(2, 4, 2, (40, 40), 16)
    mask = random_lists((8, 8), (40, 40))
    for kwargs, message in (
        ({"mask": mask, "attn_mask": torch.zeros(1, 1, 40, 40)}, "cannot be given together"),
        ({"precision": "int8"}, "accepted is 'native'"),
        ({"mask": random_lists((8, 8), (40, 48))}, r"for \(40, 48\) \(query, key\) tokens, the tensors have"),
        ({"mask": random_lists((8, 8), (40, 40), heads=3)}, "3 heads, the query has 4"),
        ({"mask": random_lists((8, 8), (40, 40), n_valid=[1, 2, 3])}, "3 batch rows, the query has 2"),
    ):
        with pytest.raises(ValueError, match=message):
            attend(q, k, v, **kwargs)
    for bad in (
        (q[0], k, v), (q, k[:1], v[:1]), (q, k[..., :8], v[..., :8]), (q[:, :, :3], k, v), (q, k, v[:, :3]),
        (q.double(), k, v), (q, k[:, :0], v[:, :0]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="given were|one dtype|at least one"):
            attend(*bad)


def test_the_first_call_of_a_process_may_be_under_gradient_checkpointing():
    mask = random_lists((8, 8), (40, 40))

    def gradient(checkpointed):
        chain.register("gathered", None)  # as if it had never been tested
        q, k, v = (x.requires_grad_() for x in make_inputs(1, 2, 2, (40, 40), 16))
        run = lambda *qkv: attend(*qkv, mask=mask)  # noqa: E731
        out = checkpoint(run, q, k, v, use_reentrant=False) if checkpointed else run(q, k, v)
        return torch.autograd.grad(out.square().sum(), (q, k, v))

    for found, wanted in zip(gradient(True), gradient(False), strict=True):
        assert torch.equal(found, wanted)


def test_a_dense_backend_with_block_lists_is_noted():
    q, k, v = make_inputs(1, 2, 2, (40, 40), 16)
    stats = EngineStats()
    mask = random_lists((8, 8), (40, 40))
    out = attend(q, k, v, mask=mask, backend="_native_math", stats=stats)
    assert torch.equal(out, attend(q, k, v, mask=mask))
    assert list(stats.fallbacks) == [
        "the kernel chain instead of backend '_native_math', which takes no lists"
    ]


def test_stats_add_up():
    q, k, v = make_inputs(1, 2, 2, (64, 64), 16)
    stats = EngineStats()
    eye = torch.eye(4).bool()[None, None]
    from diffctrl.attention import BlockLists

    quarter = BlockLists.from_dense_blocks(eye, (16, 16), (64, 64))
    attend(q, k, v, mask=quarter, stats=stats)
    attend(q, k, v, stats=stats)
    attend(q, k, v, mask=BlockLists.full((16, 16), (64, 64)), stats=stats)
    assert stats.as_dict() == {
        "calls": {"gathered": 1, "sdpa": 2}, "dense_calls": 2, "sparse_calls": 1, "density": 0.75,
        "sparse_density": 0.25, "kernel_density": 0.25, "fallbacks": {}, "captures": {},
    }  # fmt: skip
    stats.reset()
    assert stats.as_dict()["density"] is None


def test_importing_the_engine_imports_torch_only():
    code = (
        "import sys, diffctrl.attention\n"
        "heavy = {'diffusers', 'triton', 'flash_attn', 'xformers', 'torch._dynamo', 'torch._inductor'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
