"""Which scaled-dot-product kernel is fastest here for the training shape."""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def choose_attention(wanted: str, batch: int, heads: int, tokens: int, head_dim: int) -> str:
    """Allow one fused kernel; compiled code takes the one that is allowed when it is traced.

    Args:
        wanted: "flash", "cudnn", "efficient", or "auto": flash unless another is at least 15 % faster.
        batch: of the training shape (B, H, S, D), as the next three.
        heads: H.
        tokens: S.
        head_dim: D.

    Returns:
        One line that says what was measured and chosen.
    """
    if wanted not in ("auto", *_BACKENDS):
        raise ValueError(f"attention must be 'auto' or one of {tuple(_BACKENDS)}, got {wanted!r}")
    times: dict[str, float] = {}
    refused = []
    for name, backend in _BACKENDS.items() if wanted == "auto" else ():
        try:
            times[name] = _milliseconds(backend, (batch, heads, tokens, head_dim))
        except RuntimeError as error:
            refused.append(f"{name}: {str(error).splitlines()[0]}")
    chosen = wanted if wanted != "auto" else "flash"
    if times:
        best = min(times, key=lambda name: times[name])
        flash = times.get("flash", float("inf"))
        chosen = best if times[best] < 0.85 * flash else "flash"
    torch.backends.cuda.enable_flash_sdp(chosen == "flash")
    torch.backends.cuda.enable_cudnn_sdp(chosen == "cudnn")
    # Float32 evaluation needs a kernel, too; beside cuDNN the efficient one would be taken first.
    torch.backends.cuda.enable_mem_efficient_sdp(chosen != "cudnn")
    torch.backends.cuda.enable_math_sdp(True)
    measured = ", ".join(f"{name} {value:.2f} ms" for name, value in times.items())
    return f"attention: {chosen} ({'; '.join([measured or 'as asked', *refused])})"


def _milliseconds(backend: SDPBackend, shape: tuple[int, int, int, int], repeats: int = 10) -> float:
    """Forward and backward time of one attention call in bfloat16."""
    query, key, value = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )
    upstream = torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    def once() -> None:
        with sdpa_kernel(backend):
            mixed = F.scaled_dot_product_attention(query, key, value)
        torch.autograd.grad(mixed, (query, key, value), upstream)

    for _ in range(3):
        once()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        once()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / repeats
