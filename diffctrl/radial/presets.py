"""Which settings go with which model: those published, and the nearest of them for the others."""

from __future__ import annotations

from dataclasses import dataclass

from diffctrl.radial.config import DenseParts, Pattern, RadialConfig

# Latent frames of the longest clips that a model was made for.
NATIVE_FRAMES = {
    "wan": 21,
    "wan_vace": 21,
    "hunyuan_video": 33,
    "hunyuan_video15": 31,
    "mochi": 28,
    "cogvideox": 21,  # of CogVideoX 1.5, in its patches of two; 1.0 was made for 13
    "ltx": 33,
}
# From this many times the native length on, a clip counts as extended.
_EXTENDED = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """What `RadialConfig` leaves open.

    Attributes:
        fraction: of the run's steps that stay dense at its beginning.
        blocks: at the model's input that stay dense.
    """

    decay_factor: float
    sink: bool
    fraction: float
    blocks: int


_FRACTION = 0.24  # 12 of 50 steps; 2 of 8 and 1 of 4 for distilled models
_PRESETS = {
    "wan": Preset(decay_factor=0.2, sink=True, fraction=_FRACTION, blocks=1),
    "wan 2.2": Preset(decay_factor=0.8, sink=True, fraction=0.275, blocks=1),  # 11 of 40
    "hunyuan_video": Preset(decay_factor=0.95, sink=False, fraction=_FRACTION, blocks=0),
    "other": Preset(decay_factor=1.0, sink=True, fraction=_FRACTION, blocks=1),
    "extended": Preset(decay_factor=1.0, sink=True, fraction=0.04, blocks=2),  # 2 of 50
}


def is_extended(family: str, frames: int) -> bool:
    """Whether a clip of so many latent frames is longer than the model was made for."""
    return frames > _EXTENDED * NATIVE_FRAMES.get(family, frames)


def preset(family: str, *, frames: int, experts: int = 1, tuned: bool = False) -> Preset:
    """The published settings of a model.

    Args:
        family: its name in diffctrl.
        frames: latent frames of the clip.
        experts: denoisers of the pipeline; two are Wan 2.2's.
        tuned: whether the model has a length LoRA, for which the settings of longer clips are published.

    Source: the scripts of the published code for Wan 2.1 and 2.2 and HunyuanVideo, the paper's section on
    length extension for longer clips. Mochi, CogVideoX, LTX and HunyuanVideo 1.5 have no published settings:
    HunyuanVideo 1.5 gets HunyuanVideo's, the others full-width bands with the sink. Blocks of Wan 2.2 are of
    128 tokens as everywhere, where its script has 64 (which users of it measured to be slower).
    """
    if tuned or is_extended(family, frames):
        return _PRESETS["extended"]
    if family == "wan" and experts > 1:
        return _PRESETS["wan 2.2"]
    return (
        _PRESETS.get({"wan_vace": "wan", "hunyuan_video15": "hunyuan_video"}.get(family, family))
        or (_PRESETS["other"])
    )


def resolve(config: RadialConfig, known: Preset) -> tuple[Pattern, DenseParts]:
    """The settings with nothing left open."""
    paper = config.pattern == "paper"
    decay = config.decay_factor if config.decay_factor is not None else known.decay_factor
    pattern = Pattern(
        pattern=config.pattern,
        block_rule=config.block_rule or ("cover" if paper else "hybrid"),
        decay_factor=1.0 if paper else decay,
        sink=known.sink if config.sink is None else config.sink,
        adjacent=config.adjacent,
        width_base=config.width_base,
        block=config.block,
    )
    dense = DenseParts(
        steps=config.dense_steps,
        fraction=known.fraction if config.dense_fraction is None else config.dense_fraction,
        published=config.dense_fraction is None,
        last_steps=config.dense_last_steps,
        blocks=known.blocks if config.dense_blocks is None else config.dense_blocks,
    )
    return pattern, dense
