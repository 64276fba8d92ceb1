"""Which sizes the pipelines of the command line take."""

import pytest

from diffctrl.drawing.kinds import KINDS
from diffctrl.errors import BadRequestError

VAE = {"block_out_channels": [1, 2, 3, 4]}


def _rule(pipeline, **configs):
    return KINDS[pipeline].size_rule({"vae": VAE, **configs}.__getitem__)


def test_sd3_ends_at_its_position_table():
    transformer = {"patch_size": 2, "sample_size": 128, "pos_embed_max_size": 192}
    rule = _rule("StableDiffusion3Pipeline", transformer=transformer)
    assert (rule.multiple, rule.largest, rule.default) == (16, 3072, (1024, 1024))
    rule.check("sd3", height=3072, width=16)
    with pytest.raises(BadRequestError, match="nearest is 3072"):
        rule.check("sd3", height=3088, width=1024)


def test_flux_and_unets_have_no_end():
    assert _rule("FluxPipeline", transformer={}).multiple == 16
    rule = _rule("StableDiffusionXLPipeline", unet={"sample_size": 128})
    assert (rule.multiple, rule.largest, rule.default) == (8, None, (1024, 1024))
    rule.check("sdxl", height=8, width=8000)
    with pytest.raises(BadRequestError, match="width=1001 .* nearest is 1000"):
        rule.check("sdxl", height=1024, width=1001)


def test_kinds_are_classes_of_diffusers_and_known_families():
    import diffusers

    from diffctrl.catalogue import FAMILIES

    for name, kind in KINDS.items():
        assert hasattr(diffusers, name)
        assert kind.family in FAMILIES
