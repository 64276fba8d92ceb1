"""Log-sum-exp: merging parts of an attention, and the second pass that computes it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffctrl.attention import attend, logsumexp_of, merge
from tests.attention.cases import make_inputs, random_lists, reference


@settings(max_examples=30, deadline=None)
@given(
    parts=st.integers(2, 5), seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.bfloat16])
)
def test_parts_over_disjoint_keys_merge_into_one_call(parts, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = make_inputs(2, 3, 3, (21, 50), 16, dtype=dtype, seed=seed)
    cuts = sorted(torch.randperm(49, generator=generator)[: parts - 1].add(1).tolist())
    bounds = list(zip([0, *cuts], [*cuts, 50], strict=True))
    pieces = [attend(q, k[:, a:b], v[:, a:b], return_lse=True) for a, b in bounds]
    out, lse = merge([p[0] for p in pieces], [p[1] for p in pieces], dtype=torch.float32)
    expected, expected_lse = reference(q, k, v)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # 16-bit parts: one more rounding each
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)


def test_sparse_video_and_dense_text_merge_into_the_joint_mask():
    q, k, v = make_inputs(1, 2, 2, (96, 96), 16)
    video = random_lists((16, 16), (96, 80), density=0.3, heads=2, allow_empty=True)
    parts = [
        attend(q, k[:, :80], v[:, :80], mask=video, return_lse=True),
        attend(q, k[:, 80:], v[:, 80:], return_lse=True),
    ]
    out, lse = merge(*zip(*parts, strict=True))
    blocks = torch.cat([video.to_dense_blocks(), torch.ones(1, 2, 6, 1, dtype=torch.bool)], -1)
    joint = type(video).from_dense_blocks(blocks, (16, 16), (96, 96))
    expected, expected_lse = reference(q, k, v, joint)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)


def test_rows_that_are_empty_in_some_or_all_parts():
    inf = float("inf")
    outs = [torch.zeros(1, 3, 1, 2), torch.full((1, 3, 1, 2), 4.0)]
    lses = [torch.tensor([[[-inf, -inf, 0.0]]]), torch.tensor([[[-inf, 2.0, 0.0]]])]
    out, lse = merge(outs, lses)
    assert out[0, :, 0, 0].tolist() == [0.0, 4.0, 2.0]
    torch.testing.assert_close(lse, torch.tensor([[[-inf, 2.0, 0.6931472]]]))
    huge, _ = merge(outs, [lses[0] + 1e4, lses[1] + 1e4])
    assert bool(huge.isfinite().all())


def test_merge_refuses_what_does_not_fit():
    out, lse = torch.zeros(1, 3, 2, 4), torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="as many outs as lses"):
        merge([out], [])
    with pytest.raises(ValueError, match=r"lses \(B, H, S\)"):
        merge([out, out], [lse, lse.transpose(1, 2)])


def test_the_second_pass_equals_the_kernel():
    q, k, v = make_inputs(2, 4, 2, (300, 60), 16)
    _, lse = reference(q, k, v)
    torch.testing.assert_close(logsumexp_of(q, k, 0.25), lse, atol=1e-5, rtol=1e-5)


def test_the_second_pass_is_in_full_precision_under_autocast():
    q, k, _ = make_inputs(2, 4, 2, (30, 60), 16)
    expected = logsumexp_of(q, k, 0.25)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logsumexp_of(q, k, 0.25), expected)
