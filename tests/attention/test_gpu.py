"""The kernels of a GPU, bf16: the same properties for each of them, and for the forms that may replace one.

Run with `OMP_NUM_THREADS=2 pytest -m gpu -n 6 tests/attention/test_gpu.py`: most of the time is compilation,
which six processes share (their caches on disk are common).
"""

from __future__ import annotations

import pytest
import torch

from diffctrl.attention import BlockLists, EngineStats, attend, chain, kernel_report, merge
from diffctrl.attention.chain import load, request_for
from diffctrl.attention.kernels.base import Operands, Request
from diffctrl.attention.kernels.flash4 import Flash4Kernel
from diffctrl.attention.kernels.flash4_library import prepared_lists
from diffctrl.attention.kernels.triton_lists import HOPPER_CANDIDATES, TritonListsKernel
from diffctrl.attention.selftest import self_test, strided
from tests.attention.cases import assert_matches, make_inputs, make_rule, random_lists, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

BF16 = torch.bfloat16
LISTS = ("flash4", "triton", "flex", "gathered")
WITH_BACKWARD = ("flash4", "flex", "triton", "gathered")
WITH_RULES = ("flex", "gathered")
DENSE = ("flash4", "cudnn", "sdpa")


def usable(name: str, inputs, mask: BlockLists | None, *, lse: bool = False, grad: bool = False) -> None:
    """Skips, in the kernel's words, where it cannot take the call; never for a failed self-test."""
    kernel = load(name)
    if isinstance(kernel, str):
        pytest.skip(f"{name} {kernel}")
    request = request_for(Operands(*inputs, scale=1.0, mask=mask), needs_lse=lse, needs_grad=grad)
    reason = kernel.why_not(request)
    if reason is not None:
        pytest.skip(f"{name} {reason}")


def cuda_inputs(batch, heads, kv_heads, lengths, dim, **kwargs):
    kwargs.setdefault("dtype", BF16)
    return make_inputs(batch, heads, kv_heads, lengths, dim, device="cuda", **kwargs)


# lengths, head dim, heads, kv heads, block, what is special. Heads as in the self-test.
CASES = {
    "one token": ((1, 1), 64, 3, 3, (128, 128), {}),
    "127": ((127, 127), 64, 3, 3, (128, 128), {}),
    "129": ((129, 129), 64, 3, 3, (128, 128), {}),
    "1001": ((1001, 1001), 128, 3, 3, (128, 128), {}),
    "cross": ((300, 1001), 128, 3, 3, (128, 128), {}),
    "grouped": ((700, 700), 128, 4, 2, (128, 128), {}),
    "shared list": ((700, 700), 128, 3, 3, (128, 128), {"heads": 1}),
    "per batch row": ((700, 700), 128, 3, 3, (128, 128), {"batch": 2}),
    "fine keys": ((1001, 1001), 128, 3, 3, (128, 64), {}),
    "fine both": ((500, 500), 64, 3, 3, (64, 64), {}),
    "dim 32": ((400, 400), 32, 3, 3, (128, 128), {}),
    "dim 72": ((400, 400), 72, 3, 3, (128, 128), {}),
    "dim 96": ((400, 400), 96, 3, 3, (128, 128), {}),
    "dim 256": ((400, 400), 256, 3, 3, (128, 128), {}),
    "lengths": ((400, 400), 128, 3, 3, (128, 128), {"n_valid": [129, 400]}),
    "length 0 and 1": ((400, 400), 128, 3, 3, (128, 128), {"n_valid": [0, 1]}),
    "empty rows": ((700, 700), 128, 3, 3, (128, 128), {"density": 0.15, "allow_empty": True}),
    "causal": ((400, 400), 128, 3, 3, (128, 128), {"rule": "causal"}),
    "frame window": ((400, 400), 128, 3, 3, (128, 128), {"rule": "frame_window"}),
    "key validity": ((400, 400), 128, 3, 3, (128, 128), {"rule": "kv_validity"}),
}


# flex compiles for each kind of mask and head dim.
FEW = {"flex": {"1001", "grouped", "lengths", "causal", "key validity", "dim 72"}}


def in_turn(kernel: str, case: str) -> bool:
    ruled = "rule" in CASES[case][-1]
    return case in FEW.get(kernel, CASES) and (kernel in WITH_RULES or not ruled)


@pytest.mark.parametrize(("kernel", "case"), [(k, c) for k in LISTS for c in CASES if in_turn(k, c)])
def test_lists_equal_the_reference(kernel, case):
    lengths, dim, heads, kv_heads, block, special = CASES[case]
    fields = {"heads": heads} | special
    if "rule" in fields:
        fields["rule"] = make_rule(fields["rule"], lengths, 2)
    mask = random_lists(block, lengths, **fields)
    inputs = cuda_inputs(2, heads, kv_heads, lengths, dim)
    usable(kernel, inputs, mask, lse=True)
    out, lse = attend(*inputs, mask=mask, kernel=kernel, return_lse=True)
    assert_matches(out, lse, reference(*inputs, mask))


@pytest.mark.parametrize("kernel", LISTS)
def test_a_key_outside_the_lists_does_not_move_a_bit(kernel):
    lengths = (1001, 1001)
    mask = random_lists((128, 128), lengths, density=0.3, heads=3)
    q, k, v = cuda_inputs(1, 3, 3, lengths, 128)
    usable(kernel, (q, k, v), mask, lse=True)
    out, _ = attend(q, k, v, mask=mask, kernel=kernel, return_lse=True)
    listed = mask.to_dense_bool()
    for token in (5, 500, 1000):
        k2, v2 = k.clone(), v.clone()
        k2[:, token], v2[:, token] = 3.0, 50.0
        moved, _ = attend(q, k2, v2, mask=mask, kernel=kernel, return_lse=True)
        changed = (moved != out).any(-1).transpose(1, 2).cpu()
        outside = ~listed[..., token].expand_as(changed)
        assert not bool(changed[outside].any())
        assert bool(changed[~outside].any())


@pytest.mark.parametrize("kernel", LISTS)
def test_the_same_bits_in_every_run_and_batch(kernel):
    lengths = (1001, 1001)
    mask = random_lists((128, 128), lengths, density=0.3, heads=3)
    inputs = cuda_inputs(3, 3, 3, lengths, 128)
    usable(kernel, inputs, mask, lse=True)
    out, lse = attend(*inputs, mask=mask, kernel=kernel, return_lse=True)
    for _ in range(20):
        again, lse_again = attend(*inputs, mask=mask, kernel=kernel, return_lse=True)
        assert torch.equal(out, again)
        assert torch.equal(lse, lse_again)
    alone = attend(*(t[1:2] for t in inputs), mask=mask, kernel=kernel, return_lse=True)
    assert torch.equal(alone[0][0], out[1])


@pytest.mark.parametrize("kernel", LISTS)
def test_strided_inputs(kernel):
    mask = random_lists((128, 128), (700, 700), heads=3)
    inputs = cuda_inputs(2, 3, 3, (700, 700), 128)
    usable(kernel, inputs, mask, lse=True)
    expected = reference(*inputs, mask)
    other = strided(Operands(*inputs, scale=1.0, mask=mask))
    assert not other.query.is_contiguous()
    assert not other.key.is_contiguous()
    odd = torch.cat([inputs[0], inputs[0][..., :1]], -1)[..., :128]  # no stride is a multiple of 16 bytes
    for query in (other.query,) if kernel == "flex" else (other.query, odd):  # flex compiles for each
        out, lse = attend(query, other.key, other.value, mask=mask, kernel=kernel, return_lse=True)
        assert_matches(out, lse, expected)


FORMS = {
    "tail": {"needs_lse": True},
    "grouped, row lengths": {"kv_heads": 2, "heads": 4, "per_row_lengths": True, "needs_lse": True},
    "shared, empty rows": {"shared_heads": True, "shared_batch": True, "allows_empty": True},
}
OTHERS = [*map(TritonListsKernel, HOPPER_CANDIDATES), Flash4Kernel(scheduled=False)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "kernel",
    OTHERS,
    ids=[k.variant.label if isinstance(k, TritonListsKernel) else "flash4 of the library" for k in OTHERS],
)
def test_other_forms_of_a_kernel_pass_the_self_test(kernel, form):
    """What the benchmark may time beside the default; each call is made in two forms by the self-test."""
    base = {"heads": 3, "kv_heads": 3, "sparse": True, "block": (128, 128)} | FORMS[form]
    heads, kv_heads = base.pop("heads"), base.pop("kv_heads")
    arch = chain.arch_of(torch.device("cuda"))
    request = Request("cuda", arch, BF16, 1, heads, kv_heads, 700, 700, 128, **base)
    reason = kernel.why_not(request)
    if reason is not None or arch != 90:
        pytest.skip(reason or "candidates for sm90")
    result = self_test(kernel, request, torch.device("cuda"))
    assert result.ok, result.reason


FORM_CASES = {
    "even": ((2304, 2304), 128, 3, 3, {"density": 0.3}),
    "ragged": ((1001, 1001), 128, 3, 3, {"density": 0.4}),
    "lengths": ((700, 700), 128, 3, 3, {"n_valid": [129, 600]}),
    "empty rows": ((700, 700), 128, 3, 3, {"density": 0.2, "allow_empty": True}),
    "grouped, shared": ((700, 700), 128, 4, 2, {"heads": 1}),
    "dim 64": ((700, 700), 64, 3, 3, {}),
}


@pytest.mark.parametrize("case", FORM_CASES)
def test_the_scheduled_form_gives_the_bits_of_the_library(case):
    """Then lists may choose the form, and a seed keeps its latents."""
    lengths, dim, heads, kv_heads, special = FORM_CASES[case]
    mask = random_lists((128, 128), lengths, **{"heads": heads} | special)
    if case == "even":
        mask = equal_lists(lengths[0], heads)
    inputs = cuda_inputs(2, heads, kv_heads, lengths, dim)
    usable("flash4", inputs, mask, lse=True)
    operands = Operands(*inputs, scale=dim**-0.5, mask=mask)
    request = request_for(operands, needs_lse=True)
    if request.arch != 90:
        pytest.skip("forms for sm90")
    kernel = Flash4Kernel()
    assert kernel.is_scheduled(request, prepared_lists(operands, 90))
    stock_out, stock_lse = Flash4Kernel(scheduled=False).run(request, operands)
    out, lse = kernel.run(request, operands)
    assert torch.equal(out, stock_out)
    assert torch.equal(lse, stock_lse)


def equal_lists(length: int, heads: int) -> BlockLists:
    """Every row lists four blocks."""
    blocks = length // 128
    noise = torch.rand(1, heads, blocks, blocks, generator=torch.Generator().manual_seed(3))
    chosen = torch.zeros_like(noise, dtype=torch.bool).scatter_(-1, noise.topk(4).indices, True)
    return BlockLists.from_dense_blocks(chosen, (128, 128), (length, length))


@pytest.mark.parametrize("kernel", LISTS)
def test_all_blocks_equal_dense_attention(kernel):
    inputs = cuda_inputs(2, 3, 3, (1001, 1001), 128)
    mask = BlockLists.full((128, 128), (1001, 1001))
    usable(kernel, inputs, mask, lse=True)
    assert_matches(*attend(*inputs, mask=mask, kernel=kernel, return_lse=True), reference(*inputs))


GRADIENTS = {
    "dim 64": (64, 3, (128, 128), {}),
    "dim 128": (128, 3, (128, 128), {}),
    "blocks of 32": (32, 3, (32, 32), {}),
    "blocks of 16": (64, 3, (16, 16), {}),
    "fine keys, grouped": (128, 1, (128, 64), {}),
    "dim 72, row lengths": (72, 3, (64, 64), {"n_valid": [700]}),
    "empty rows": (64, 3, (64, 64), {"density": 0.05, "allow_empty": True}),
}


# flex compiles for each kind of mask and head dim.
@pytest.mark.parametrize(
    ("kernel", "case"), [(k, c) for k in WITH_BACKWARD for c in GRADIENTS if k != "flex" or c == "dim 128"]
)
def test_gradients_over_lists(kernel, case):
    dim, kv_heads, block, options = GRADIENTS[case]
    lengths = (1001, 1001)
    mask = random_lists(block, lengths, **{"density": 0.4, "heads": 3, **options})
    inputs = cuda_inputs(1, 3, kv_heads, lengths, dim, requires_grad=True)
    usable(kernel, inputs, mask, grad=True)
    direction = torch.randn(1, 1001, 3, dim, device="cuda")
    exact = [t.detach().cpu().double().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(
        attend(*exact, mask=mask, kernel="reference"), exact, direction.to(BF16).double().cpu()
    )
    got = torch.autograd.grad(attend(*inputs, mask=mask, kernel=kernel), inputs, direction.to(BF16))
    for one, two in zip(got, expected, strict=True):
        assert float((one.double().cpu() - two).norm() / two.norm()) < 2e-2


@pytest.mark.parametrize(("block", "allowed"), [(128, {"flex", "gathered"}), (32, {"triton", "gathered"})])
def test_deterministic_gradients_go_past_flash4(block, allowed):
    inputs = cuda_inputs(1, 3, 3, (700, 700), 128, requires_grad=True)
    mask = random_lists((block, block), (700, 700), density=0.4, heads=3)
    direction = torch.ones(1, 700, 3, 128, device="cuda", dtype=BF16)
    stats = EngineStats()
    torch.use_deterministic_algorithms(True)
    try:
        runs = [
            torch.autograd.grad(attend(*inputs, mask=mask, stats=stats), inputs, direction) for _ in range(3)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    assert set(stats.calls) <= allowed
    assert all(torch.equal(one, two) for run in runs[1:] for one, two in zip(run, runs[0], strict=True))


@pytest.mark.parametrize(("lengths", "dim"), [((1001, 1001), 128), ((4096, 77), 64), ((129, 500), 72)])
@pytest.mark.parametrize("kernel", DENSE)
def test_dense_kernels(kernel, lengths, dim):
    for outermost in (False, True):
        inputs = cuda_inputs(2, 3, 3, lengths, dim)
        if outermost:  # heads outermost in memory, as after a fused projection that was split by heads
            inputs = tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs)
        usable(kernel, inputs, None, lse=True)
        out, lse = attend(*inputs, kernel=kernel, return_lse=True)
        expected = reference(*inputs)
        assert_matches(out, lse, expected)
        assert_matches(attend(*inputs, kernel=kernel), None, expected)


def test_dense_gradients_of_the_default_choice():
    inputs = cuda_inputs(1, 3, 3, (1001, 1001), 64, requires_grad=True)
    exact = [t.detach().cpu().double().requires_grad_() for t in inputs]
    direction = torch.randn(1, 1001, 3, 64, device="cuda").to(BF16)
    got = torch.autograd.grad(attend(*inputs), inputs, direction)
    expected = torch.autograd.grad(attend(*exact, kernel="reference"), exact, direction.double().cpu())
    for one, two in zip(got, expected, strict=True):
        assert float((one.double().cpu() - two).norm() / two.norm()) < 2e-2


def test_the_default_choice_is_within_rounding_of_the_stock_call_and_a_backend_is_obeyed():
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    inputs = cuda_inputs(2, 3, 3, (1001, 1001), 128)
    stats = EngineStats()
    stock = dispatch_attention_fn(*inputs)
    assert_matches(attend(*inputs, stats=stats), None, reference(*inputs))
    assert set(stats.calls) <= set(DENSE)
    assert torch.equal(attend(*inputs, backend="native"), stock)
    attn_mask = torch.rand(2, 1, 1001, 1001, device="cuda") < 0.9
    assert torch.equal(
        attend(*inputs, attn_mask=attn_mask), dispatch_attention_fn(*inputs, attn_mask=attn_mask)
    )
    full = [t.float() for t in inputs]
    assert torch.equal(attend(*full), dispatch_attention_fn(*full))


def test_fp32_runs_gathered_blocks():
    stats = EngineStats()
    mask = random_lists((128, 128), (700, 700), heads=3)
    inputs = cuda_inputs(1, 3, 3, (700, 700), 64, dtype=torch.float32)
    out, lse = attend(*inputs, mask=mask, return_lse=True, stats=stats)
    assert_matches(out, lse, reference(*inputs, mask))
    assert stats.calls == {"gathered": 1}


@pytest.mark.parametrize("kernel", ["flash4", "triton"])
def test_offsets_past_two_to_the_31(kernel):
    """B * H * S * D > 2^31: the last head of the last row is compared."""
    length, heads, dim, batch = 32768, 24, 128, 22
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of free GPU memory")
    mask = BlockLists.from_dense_blocks(torch.eye(256).bool()[None, None], (128, 128), (length, length))
    inputs = [torch.randn(batch, length, heads, dim, device="cuda", dtype=BF16) for _ in range(3)]
    usable(kernel, inputs, mask)
    out = attend(*inputs, mask=mask, kernel=kernel)
    small = random_lists((128, 128), (128, 128))
    part = [t[-1:, -128:, -1:] for t in inputs]
    assert_matches(out[-1:, -128:, -1:], None, reference(*part, small))


@pytest.mark.parametrize("kernel", ["flash4", "triton"])
def test_poisoned_memory_and_two_streams_do_not_show(kernel):
    lengths = (700, 700)
    mask = random_lists((128, 128), lengths, density=0.3, heads=3)
    inputs = cuda_inputs(2, 3, 3, lengths, 128)
    usable(kernel, inputs, mask)
    expected = attend(*inputs, mask=mask, kernel=kernel)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for step in range(40):
        poison = torch.full((8 << 20,), float("nan"), device="cuda")
        del poison
        with torch.cuda.stream(streams[step % 2]):
            out = attend(*inputs, mask=mask, kernel=kernel)
        streams[step % 2].synchronize()
        assert torch.equal(out, expected)


def test_compiled_calls_take_the_same_kernel():
    stats = EngineStats()
    layer = torch.compile(lambda q, k, v, m: attend(q, k, v, mask=m, stats=stats), fullgraph=True)
    for length in (700, 700, 1001):
        mask = random_lists((128, 128), (length, length), density=0.4, heads=3).pin("cuda")
        inputs = cuda_inputs(1, 3, 3, (length, length), 128)
        assert torch.equal(layer(*inputs, mask.on("cuda")), attend(*inputs, mask=mask, stats=stats))
    assert len(stats.calls) == 1
    with pytest.raises((ValueError, torch._dynamo.exc.TorchDynamoException)):
        layer(*inputs, random_lists((128, 128), (1001, 1001), heads=3, seed=9))


@pytest.mark.parametrize("block", [None, 32, 128])
def test_gradients_in_compiled_code(block):
    """Dense, over lists that the Triton backward takes, and over lists that any takes."""
    inputs = cuda_inputs(1, 3, 3, (1001, 1001), 64, requires_grad=True)
    mask = None if block is None else random_lists((block, block), (1001, 1001), heads=3).pin("cuda")
    lists = None if mask is None else mask.on("cuda")
    layer = torch.compile(lambda q, k, v, m: attend(q, k, v, mask=m), fullgraph=True)
    direction = torch.randn(1, 1001, 3, 64, device="cuda").to(BF16)
    exact = [t.detach().cpu().double().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(
        attend(*exact, mask=mask, kernel="reference"), exact, direction.double().cpu()
    )
    out = layer(*inputs, lists)
    assert_matches(out.detach(), None, reference(*inputs, mask))
    for one, two in zip(torch.autograd.grad(out, inputs, direction), expected, strict=True):
        assert float((one.double().cpu() - two).norm() / two.norm()) < 2e-2


def test_parts_of_different_kernels_merge():
    inputs = cuda_inputs(1, 3, 3, (700, 777), 128)
    q, k, v = inputs
    video = random_lists((128, 128), (700, 700), density=0.3, heads=3)
    parts = [
        attend(q, k[:, :700], v[:, :700], mask=video, return_lse=True),
        attend(q, k[:, 700:], v[:, 700:], return_lse=True),
    ]
    out, lse = merge(*zip(*parts, strict=True))
    left, left_lse = reference(q, k[:, :700], v[:, :700], video)
    right, right_lse = reference(q, k[:, 700:], v[:, 700:])
    expected = merge([left.float(), right.float()], [left_lse, right_lse])
    assert_matches(out, lse, (expected[0].double(), expected[1]), factor=2)


def test_the_report_of_this_card():
    for row in kernel_report("cuda", head_dim=128):
        print(f"{row.name:10s} {'works' if row.works else 'no'}  {row.reason or ''}  {row.error}")
        assert row.works or row.reason
