"""Capture on a GPU in bf16: the kernels' log-sum-exp leaves their outputs alone and gives the softmax.

pytest -m gpu tests/control/test_capture_gpu.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import diffctrl
from diffctrl import CaptureSpec
from diffctrl.attention import attend, gives_lse
from diffctrl.attention.capture import AttentionCall, Tokens, weights
from diffctrl.attention.scores import scores
from tests.attention.cases import make_inputs, random_lists
from tests.helpers import CASES, build, example, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

# Query and key tokens, heads, head dim: FLUX and SD3 at 1024 px, Wan's text, a short one.
SHAPES = {
    "flux": ((4608, 4608), 24, 128),
    "sd3": ((4429, 4429), 24, 64),
    "cross": ((5120, 512), 12, 128),
    "short": ((1101, 1101), 8, 128),
}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def inputs_of(shape: str, batch: int = 1) -> Any:
    lengths, heads, dim = SHAPES[shape]
    return make_inputs(batch, heads, heads, lengths, dim, dtype=torch.bfloat16, device="cuda")


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "lists"])
@pytest.mark.parametrize("shape", SHAPES)
def test_where_the_log_sum_exp_comes_with_the_output_the_output_is_the_same(shape: str, sparse: bool) -> None:
    query, key, value = inputs_of(shape)
    lengths, heads, _ = SHAPES[shape]
    mask = random_lists((128, 128), lengths, density=0.3, heads=heads) if sparse else None
    if not gives_lse(query, key, value, mask=mask):
        pytest.skip("the kernel gives none, so that a capture never asks it")
    out, lse = attend(query, key, value, mask=mask, return_lse=True)
    assert torch.equal(out, attend(query, key, value, mask=mask))
    assert lse.dtype == torch.float32


@pytest.mark.parametrize("route", ["lse", "second_call", "chunked"])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_are_the_softmax(shape: str, route: Any) -> None:
    query, key, value = inputs_of(shape)
    query = 2 * query
    scale = 1 / math.sqrt(query.shape[-1])
    lse: Any = attend(query, key, value, return_lse=True)[1] if route == "lse" else None
    call = AttentionCall(query, key, scale, lse)
    rows, columns = Tokens(100, 700), Tokens.at(torch.tensor([3, 400, 17], device="cuda"))
    got = torch.cat([part.weights for part in weights(call, rows, columns, route, 1 << 20)], 2)
    whole = torch.softmax(
        query[:, 100:800].double().transpose(1, 2) @ key.double().permute(0, 2, 3, 1) * scale, -1
    )
    expected = whole[..., [3, 400, 17]]
    # A kernel's log-sum-exp of 16-bit operands is good to some 1e-4.
    assert float((got - expected).abs().max()) < (1e-5 if route == "chunked" else 5e-5)
    assert float(((got - expected) / expected).abs().max()) < 1e-3


def test_scores_are_not_rounded_to_16_bits() -> None:
    query, key, _ = inputs_of("short")
    exact = query.double().transpose(1, 2) @ key.double().permute(0, 2, 3, 1)
    torch.testing.assert_close(scores(query, key, 1.0).double(), exact, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["flux", "sd3", "mochi", "wan", "cogvideox", "hunyuan_video", "ltx", "sdxl"])
def test_models_draw_the_same_with_a_capture(name: str) -> None:
    from diffctrl.processors import NeutralAttnProcessor

    model = build(name, dtype=torch.bfloat16).cuda()
    inputs = {key: _on_gpu(value) for key, value in example(name, model).items()}
    with diffctrl.apply(model, NeutralAttnProcessor()):
        expected = run(model, inputs)
    with diffctrl.capture(model, CaptureSpec()) as maps:
        assert torch.equal(run(model, inputs), expected)
        (stats,) = maps.stats().values()
    values = maps.result().values
    assert values.device.type == "cuda"
    assert bool(values.isfinite().all())
    assert 0 < float(values.sum(-1).max()) <= 1 + 1e-3
    assert sum(stats["captures"].values()) == len(maps.result().sites)
    assert CASES[name].text_length == values.shape[-1]


def _on_gpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.cuda()
    if isinstance(value, dict):
        return {key: _on_gpu(inner) for key, inner in value.items()}
    return type(value)(_on_gpu(inner) for inner in value) if isinstance(value, (list, tuple)) else value


def test_what_a_capture_needs_beyond_its_totals_is_bounded() -> None:
    query, key, value = inputs_of("flux")
    lse: Any = attend(query, key, value, return_lse=True)[1]
    call, tile = AttentionCall(query, key, 1 / math.sqrt(128), lse), 32 << 20
    for route in ("lse", "chunked"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in weights(call, Tokens(512, 4096), Tokens(0, 512), route, tile):  # type: ignore[arg-type]
            pass
        assert torch.cuda.max_memory_allocated() - before < 4 * tile
