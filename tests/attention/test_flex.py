"""FlexAttention, compiled, on a CPU: one compilation here; test_gpu.py has the rest."""

from __future__ import annotations

import pytest
import torch

from diffctrl.attention import EngineStats, attend
from tests.attention.cases import assert_matches, make_inputs, make_rule, random_lists, reference


def test_compiled_flex_keeps_to_the_lists():
    stats = EngineStats()
    for length in (150, 201):
        lengths = (length, length)
        mask = random_lists((64, 64), lengths, density=0.4, heads=3, batch=2, seed=length)
        q, k, v = make_inputs(2, 3, 3, lengths, 32)  # the self-test's batch and heads: one compilation
        out = attend(q, k, v, mask=mask, kernel="flex", stats=stats)
        assert_matches(out, None, reference(q, k, v, mask))
    assert stats.calls == {"flex": 2}


def test_an_eager_flex_is_refused():
    """Uncompiled, FlexAttention ignores the lists and attends all: the self-test does not let it through."""
    from torch.nn.attention.flex_attention import flex_attention

    lengths, dim = (150, 150), 80  # a head dim of its own: what the self-test finds is kept
    mask = random_lists((64, 64), lengths, density=0.4, heads=3, batch=2)
    q, k, v = make_inputs(2, 3, 3, lengths, dim)
    dense = attend(q, k, v)
    eager = flex_attention(*(part.transpose(1, 2) for part in (q, k, v)), block_mask=mask.to_flex())
    torch.testing.assert_close(eager.transpose(1, 2), dense, atol=1e-5, rtol=1e-5)
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(RuntimeError, match="'flex' is refused: self"),
    ):
        attend(q, k, v, mask=mask, kernel="flex")


def test_what_flex_cannot_do_on_a_cpu_is_said():
    lengths = (40, 40)
    q, k, v = make_inputs(1, 2, 2, lengths, 32, requires_grad=True)
    mask = random_lists((8, 8), lengths)
    with pytest.raises(ValueError, match="kernel 'flex' has no backward on a CPU"):
        attend(q, k, v, mask=mask, kernel="flex")
    with torch.no_grad(), pytest.raises(ValueError, match="no log-sum-exp on a CPU"):
        attend(q, k, v, mask=mask, kernel="flex", return_lse=True)
    ruled = random_lists((8, 8), lengths, rule=make_rule("causal", lengths), n_valid=[30])
    with torch.no_grad(), pytest.raises(ValueError, match="one element rule"):
        attend(q, k, v, mask=ruled, kernel="flex")
    with pytest.raises(ValueError, match="block lists only"):
        attend(q, k, v, kernel="flex")
