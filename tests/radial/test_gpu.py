"""On a GPU: the lists of real videos in the kernels that take them, and whole models in 16 bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import diffctrl
from diffctrl.attention import attend
from diffctrl.processors import RadialAttnProcessor
from diffctrl.radial import Layout, Pattern, block_lists
from tests.helpers import build, example, run

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("rule", ["hybrid", "exact"])
@pytest.mark.parametrize("text", [0, 100])
def test_kernels_over_lists_of_a_video(rule: str, text: int) -> None:
    layout = Layout(frames=9, tokens=390, text=text)
    pattern = Pattern(block_rule=rule, decay_factor=0.3)  # type: ignore[arg-type]
    lists = block_lists(pattern, layout)
    if text:
        lists = replace(lists, n_valid=torch.tensor([layout.length - 60, layout.length]))
    generator = torch.Generator().manual_seed(0)
    size = (2, layout.length, 3, 128)
    query, key, value = (torch.randn(size, generator=generator).cuda().bfloat16() for _ in range(3))
    found = attend(query, key, value, mask=lists)
    mask = lists.to_dense_bool().cuda()
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(part.transpose(1, 2).float() for part in (query, key, value)), attn_mask=mask
    ).transpose(1, 2)
    assert isinstance(found, torch.Tensor)
    assert float((found.float() - wanted).norm() / wanted.norm()) < 8e-3


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "hunyuan_video15", "mochi", "cogvideox", "ltx"])
def test_models_in_16_bits_are_near_the_cpu(name: str) -> None:
    sparse = RadialAttnProcessor(
        block=16, adjacent="decay", sink=False, dense_steps=0, dense_last_steps=0, dense_blocks=0
    )
    model, inputs = build(name), example(name)
    for processor in (sparse, RadialAttnProcessor(dense_fraction=1.0)):
        with diffctrl.apply(model.float().cpu(), processor):
            wanted = run(model, inputs)
        moved = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        with diffctrl.apply(model.cuda(), processor), torch.autocast("cuda", torch.bfloat16):
            found = run(model, moved)
        assert float((found.float().cpu() - wanted).norm() / wanted.norm()) < 5e-2
