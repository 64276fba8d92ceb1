"""On a card: the embedded model in 16 bits points where it points on the CPU; memory stays bounded."""

import pytest
import torch

from diffctrl.drawing.source import ModelSource
from diffctrl.grounding.plan import grounder_of
from diffctrl.grounding.run import ready_pipeline
from diffctrl.refam.presets import preset
from diffctrl.scripts.grounding_data import world_samples

pytestmark = pytest.mark.gpu


def _pairs(count):
    return [(sample.picture(), sample.expression) for sample in world_samples(count, seed=64_000)]


def test_bfloat16_on_a_card_points_where_the_cpu_points():
    source = ModelSource.find("shapes-sd3")
    config = preset("shapes-sd3").config
    pairs = _pairs(24)
    here = ready_pipeline(source, grounder_of(source), torch.float32).ground(pairs, config=config)
    there = (
        ready_pipeline(source, grounder_of(source), torch.bfloat16).to("cuda").ground(pairs, config=config)
    )
    same = sum(one.point == other.point for one, other in zip(here, there, strict=True))
    assert same >= 20  # two tokens of one object may change places
    for one, other in zip(here, there, strict=True):
        pair = torch.stack([one.heat.flatten(), other.heat.flatten()])
        assert torch.corrcoef(pair)[0, 1] > 0.99


def test_a_batch_in_float32_equals_singles():
    source = ModelSource.find("shapes-sd3")
    pipe = ready_pipeline(source, grounder_of(source), torch.float32).to("cuda")
    config = preset("shapes-sd3").config
    together = pipe.ground(_pairs(12), config=config, batch_size=12)
    for pair, found in zip(_pairs(12), together, strict=True):
        alone = pipe(*pair, config=config)
        torch.testing.assert_close(found.heat, alone.heat, rtol=1e-3, atol=1e-5)
