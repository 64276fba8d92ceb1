"""The test every kernel passes before its first real call in a process: right values, lists and tails.

It exists because kernels were seen to ignore block lists and run dense without a word. Values alone are
compared with the fp64 reference; then a key is changed that some rows list and others do not: the first must
move, the others must not move by a bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from .kernels.base import Kernel, Operands, Request
from .kernels.reference import KERNEL as REFERENCE
from .lists import BlockLists
from .rules import Rule

# Relative Frobenius error per (batch row, head) against fp64 on the same inputs. Correct kernels stay below
# half of these; the faults looked for are above 1e-2.
OUT_BOUND = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
GRAD_FACTOR = 4.0
# With three heads and three query blocks, two blocks and more for each of an H100's 132 processors.
MANY_ROWS = 30
LSE_BOUND = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 1e-3}


@dataclass(frozen=True, slots=True)
class SelfTestResult:
    """reason is None if the kernel may be used; error is the largest relative error seen."""

    reason: str | None
    error: float

    @property
    def ok(self) -> bool:
        return self.reason is None


def self_test(kernel: Kernel, request: Request, device: torch.device) -> SelfTestResult:
    """Runs `kernel` on tiny inputs of the request's kind (dtype, head dim, block, lists' form) on `device`.

    Draws from a generator of its own: the caller's random state, autocast and grad mode are not touched.
    """
    try:
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(request.needs_grad),
            torch.autocast(device.type, enabled=False),
            # Under gradient checkpointing the caller's hooks would compute its block again in our backward.
            torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is),
        ):
            return _tested(kernel, request, device)
    except Exception as error:  # whatever a kernel raises is the reason why it is refused
        return SelfTestResult(f"self-test raised {type(error).__name__}: {_first_line(error)}", math.nan)


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else ""


def _tested(kernel: Kernel, request: Request, device: torch.device) -> SelfTestResult:
    small = small_request(request)
    mask = small_mask(small) if small.sparse else None
    operands = small_operands(small, mask, device)
    out, lse = kernel.run(small, operands)
    expected, expected_lse = _reference(small, operands)
    reason, error = _compare_out(out, expected, small)
    if reason is None and small.needs_lse:
        reason = _compare_lse(lse, expected_lse, small.dtype)
    if reason is None and small.needs_grad:
        reason, grad_error = _compare_grads(kernel, small, operands)
        error = max(error, grad_error)
    if reason is None and mask is not None:
        reason = _perturbed(kernel, small, operands, mask, out)
    if reason is None and getattr(kernel, "specialises", False):
        reason, other_error = _other_form(kernel, small, device)
        error = max(error, other_error)
    return SelfTestResult(reason, error)


def _other_form(kernel: Kernel, small: Request, device: torch.device) -> tuple[str | None, float]:
    """For kernels with `specialises`: what else they compile. Strided inputs; equal lists of whole blocks."""
    request = replace(small, needs_grad=False)
    if small.per_row_lengths or small.rule is not None:
        mask = small_mask(request)
    else:
        bq, bk = small.block if small.sparse else (128, 128)
        request = replace(request, batch=MANY_ROWS, q_len=3 * bq, k_len=3 * bk)
        mask = _equal_lists(request) if small.sparse else None
    operands = strided(small_operands(request, mask, device))
    out, lse = kernel.run(request, operands)
    expected, expected_lse = _reference(request, operands)
    reason, error = _compare_out(out, expected, request)
    if reason is None and request.needs_lse:
        reason = _compare_lse(lse, expected_lse, request.dtype)
    return None if reason is None else f"{reason} (strided inputs)", error


# --- the tiny call ------------------------------------------------------------------------------------------


def small_request(request: Request) -> Request:
    """Three blocks and five rows each way, two batch rows, three heads (or two groups of two)."""
    grouped = request.heads != request.kv_heads
    bq, bk = request.block if request.sparse else (128, 128)
    return replace(
        request,
        batch=2,
        heads=4 if grouped else 3,
        kv_heads=2 if grouped else 3,
        q_len=3 * bq + min(5, bq),
        k_len=3 * bk + min(5, bk),
    )


def small_mask(request: Request) -> BlockLists:
    """4 x 4 blocks: a row with one block, one that ends with the cut block, one without it, one full."""
    rows = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 1], [0, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
    heads = 1 if request.shared_heads else request.heads
    batch = 1 if request.shared_batch else request.batch
    blocks = torch.stack([torch.stack([rows.roll(b + h, 0) for h in range(heads)]) for b in range(batch)])
    if request.allows_empty:
        blocks[:, :, 2] = False
    fields: dict[str, object] = {}
    if request.per_row_lengths:
        fields["n_valid"] = torch.tensor([request.k_len - 2, request.block[1] + 3])
    if request.rule is not None:
        # In every row the first listed block becomes a partial one.
        partial = blocks & (blocks.cumsum(-1) == 1)
        blocks = blocks & ~partial
        lists = BlockLists.from_dense_blocks(
            partial, request.block, (request.q_len, request.k_len), allow_empty=True
        )
        fields |= {
            "partial_counts": lists.counts, "partial_indices": lists.indices, "rule": _small_rule(request),
        }  # fmt: skip
    return BlockLists.from_dense_blocks(
        blocks, request.block, (request.q_len, request.k_len), allow_empty=True, **fields
    )


def _equal_lists(request: Request) -> BlockLists:
    """3 x 3 whole blocks, two in each row."""
    rows = ~torch.eye(3, dtype=torch.bool)
    heads = 1 if request.shared_heads else request.heads
    batch = 1 if request.shared_batch else request.batch
    blocks = torch.stack([torch.stack([rows.roll(b + h, 0) for h in range(heads)]) for b in range(batch)])
    return BlockLists.from_dense_blocks(
        blocks, request.block, (request.q_len, request.k_len), allow_empty=request.allows_empty
    )


def _small_rule(request: Request) -> Rule:
    sq, sk = request.q_len, request.k_len
    if request.rule == "causal":
        return Rule("causal", (torch.tensor([3], dtype=torch.int32),))
    if request.rule == "frame_bands":
        frame = torch.arange(sq, dtype=torch.int32) // 11 - 1
        place = torch.arange(sq, dtype=torch.int32) % 11
        widths = torch.tensor([11, 7, 3, -1], dtype=torch.int32).repeat(sq)[: int(frame.max()) + 2]
        return Rule("frame_bands", (frame, place, widths, torch.tensor([True])))
    if request.rule == "frame_window":
        q_frame, k_frame = (torch.arange(n, dtype=torch.int32) // 11 for n in (sq, sk))
        return Rule("frame_window", (q_frame, k_frame, torch.tensor([2], dtype=torch.int32)))
    valid = torch.arange(sk).expand(request.batch, sk) % 3 != torch.arange(request.batch).unsqueeze(1)
    return Rule("kv_validity", (valid,))


def small_operands(request: Request, mask: BlockLists | None, device: torch.device) -> Operands:
    """Unit normal inputs with one large channel in the keys, in the strides a model gives."""
    generator = torch.Generator().manual_seed(1234)

    def draw(length: int, heads: int) -> torch.Tensor:
        return torch.randn(request.batch, length, heads, request.head_dim, generator=generator)

    query, key = draw(request.q_len, request.heads), draw(request.k_len, request.kv_heads)
    value = draw(request.k_len, request.kv_heads)
    key[..., request.head_dim // 2] *= 5.0
    tensors = [t.to(device, request.dtype).requires_grad_(request.needs_grad) for t in (query, key, value)]
    return Operands(*tensors, scale=1.0 / math.sqrt(request.head_dim), mask=mask)


def strided(operands: Operands) -> Operands:
    """The same values: queries with the heads outermost in memory, keys as a slice of a fused projection."""
    query = operands.query.transpose(1, 2).contiguous().transpose(1, 2)
    heads = operands.key.shape[2]
    fused = operands.key.new_zeros((*operands.key.shape[:2], 3 * heads, operands.key.shape[3]))
    fused[:, :, heads : 2 * heads] = operands.key
    return replace(operands, query=query, key=fused[:, :, heads : 2 * heads])


def _reference(request: Request, operands: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = (t.detach().cpu().double() for t in (operands.query, operands.key, operands.value))
    exact = replace(request, dtype=torch.float64, needs_lse=True)
    out, lse = REFERENCE.run(exact, Operands(q, k, v, operands.scale, operands.mask))
    assert lse is not None
    return out, lse


# --- the verdicts: each returns a reason or None ------------------------------------------------------------


def relative_errors(out: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Relative Frobenius error of each (batch row, head): both (B, S, H, D) -> (B, H), fp64."""
    difference = (out.double() - expected.double()).pow(2).sum((1, 3)).sqrt()
    return difference / expected.double().pow(2).sum((1, 3)).sqrt().clamp(min=1e-30)


def _compare_out(out: torch.Tensor, expected: torch.Tensor, request: Request) -> tuple[str | None, float]:
    if out.shape != expected.shape or out.dtype != request.dtype:
        return f"self-test: output is {out.dtype} {tuple(out.shape)}, not {tuple(expected.shape)}", math.nan
    error = float(relative_errors(out.detach().cpu(), expected).max())
    bound = OUT_BOUND[request.dtype]
    if request.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        bound = OUT_BOUND[torch.float16]
    if not error <= bound:  # also true for NaN
        return f"self-test: relative error {error:.1e} against the reference, allowed is {bound:.0e}", error
    return None, error


def _compare_lse(lse: torch.Tensor | None, expected: torch.Tensor, dtype: torch.dtype) -> str | None:
    if lse is None or lse.shape != expected.shape or lse.dtype != torch.float32:
        return f"self-test: log-sum-exp must be float32 {tuple(expected.shape)}"
    lse = lse.detach().cpu()
    empty = expected == float("-inf")
    if not torch.equal(lse == float("-inf"), empty):
        return "self-test: log-sum-exp must be -inf for the rows without keys, and for no others"
    error = float((lse - expected)[~empty].abs().max())
    bound = LSE_BOUND[dtype]
    if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        bound = 1e-2
    return None if error <= bound else f"self-test: log-sum-exp is off by {error:.1e}, allowed is {bound:.0e}"


def _compare_grads(kernel: Kernel, request: Request, operands: Operands) -> tuple[str | None, float]:
    inputs = (operands.query, operands.key, operands.value)
    out, _ = kernel.run(request, operands)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
    got = torch.autograd.grad(out, inputs, direction)
    q, k, v = (t.detach().cpu().double().requires_grad_() for t in inputs)
    reference = replace(request, dtype=torch.float64)
    expected_out, _ = REFERENCE.run(reference, Operands(q, k, v, operands.scale, operands.mask))
    expected = torch.autograd.grad(expected_out, (q, k, v), direction.cpu().double())
    bound = GRAD_FACTOR * OUT_BOUND[request.dtype]
    errors = [float(relative_errors(g.cpu(), e).max()) for g, e in zip(got, expected, strict=True)]
    for name, error in zip(("query", "key", "value"), errors, strict=True):
        if not error <= bound:
            return (
                f"self-test: gradient of {name} has relative error {error:.1e}, allowed is {bound:.0e}",
                error,
            )
    return None, max(errors)


def _perturbed(
    kernel: Kernel, request: Request, operands: Operands, mask: BlockLists, out: torch.Tensor
) -> str | None:
    """Changes one key and value in a middle block, then in the cut one: just the rows with it must move."""
    element_mask = mask.to_dense_bool()
    for token in (request.block[1] + 1, request.k_len - 1):
        key, value = operands.key.detach().clone(), operands.value.detach().clone()
        key[:, token] = -key[:, token] + 1.0
        value[:, token] = -value[:, token] + 1.0
        moved, _ = kernel.run(request, replace(operands, key=key, value=value))
        changed = (moved.detach() != out.detach()).any(-1).transpose(1, 2).cpu()  # (B, H, Sq)
        listed = element_mask[..., token].expand_as(changed)
        if bool((changed & ~listed).any()):
            return f"self-test: key {token} changed rows whose lists do not hold it (are the lists ignored?)"
        if not _moved_somewhere(changed, listed, request):
            return f"self-test: key {token} did not change rows whose lists hold it"
    return None


def _moved_somewhere(changed: torch.Tensor, listed: torch.Tensor, request: Request) -> bool:
    """Per (batch row, head), some row that lists the key moved; 16 bits may round a small weight away."""
    wanted = listed.any(-1)
    return bool((changed.any(-1) | ~wanted).all())
