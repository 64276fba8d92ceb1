"""What Radial Attention will gain on a pipeline at a size, before anything runs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from diffctrl.control.install import denoisers
from diffctrl.families import Family, family_of
from diffctrl.radial import DenseParts, Layout, Pattern, Prediction, density, predict

logger = logging.getLogger("diffctrl.radial")

# What the pipelines call the strides of their video autoencoder.
_SPATIAL = ("vae_scale_factor_spatial", "vae_spatial_scale_factor", "vae_spatial_compression_ratio")
_TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_scale_factor", "vae_temporal_compression_ratio")
# Text tokens as the stock pipelines pad them; in joint models they are part of the sequence.
_TEXT = {"hunyuan_video": 256, "hunyuan_video15": 1985, "mochi": 256, "cogvideox": 226}
_CROSS_TEXT = 512


@dataclass(frozen=True, slots=True)
class Subject:
    """A model at a size: what an estimate is about."""

    family: Family
    model: nn.Module
    layout: Layout
    experts: int


def subject_of(pipe: Any, height: int, width: int, frames: int) -> Subject:
    """The tokens that a pipeline's denoiser will attend at a size.

    Args:
        pipe: a video pipeline of a supported family.
        height, width: in pixels.
        frames: of the video.

    Raises:
        TypeError: the pipeline is none of these.
    """
    models = list(denoisers(pipe).values())
    family, config = family_of(models[0]), getattr(models[0], "config", None)
    spatial, temporal = (_stride(pipe, names) for names in (_SPATIAL, _TEMPORAL))
    patch: Any = getattr(config, "patch_size", 1)
    if not isinstance(patch, (tuple, list)):
        patch = (getattr(config, "patch_size_t", None) or 1, patch, patch)
    # CogVideoX 1.5 pads frames to whole patches.
    latent_frames = -(-((frames - 1) // temporal + 1) // patch[0])
    tokens = (height // spatial // patch[1]) * (width // spatial // patch[2])
    if latent_frames < 1 or tokens < 1:
        raise ValueError(f"{frames} frames of {height} x {width} pixels are less than one token of a model")
    text = _TEXT.get(family.name, 0)
    layout = Layout(
        frames=latent_frames, tokens=tokens, text=text, text_first=bool(text) and family.text_side == "first"
    )
    return Subject(family, models[0], layout, len(models))


def _stride(pipe: Any, names: Sequence[str]) -> int:
    for name in names:
        if isinstance(getattr(pipe, name, None), int):
            return getattr(pipe, name)
    raise TypeError(
        f"{type(pipe).__name__} does not say the strides of its autoencoder ({', '.join(names)}), which an "
        "estimate needs; pass a video pipeline"
    )


def predicted(
    subject: Subject, pattern: Pattern, dense: DenseParts, steps: int, efficiency: float
) -> Prediction:
    """The gain by arithmetic: multiplications of the linear layers and of attention, no time of anything."""
    if steps < 1:
        raise ValueError(f"{steps} steps are no run; it has at least one")
    blocks = sum(len(getattr(subject.model, stack)) for stack in subject.family.stacks)
    found = predict(
        density=density(pattern, subject.layout),
        attention_share=attention_share(subject),
        dense_share=dense.share(steps, blocks),
        efficiency=efficiency,
        tokens=subject.layout.length,
    )
    if not found.worthwhile:
        logger.warning("Radial Attention gains little here: %s", found)
    return found


def attention_share(subject: Subject) -> float:
    """Share of the self-attention of the main blocks in the multiplications of one forward."""
    layout, model = subject.layout, subject.model
    sparse = rest = 0.0
    for stack in {*subject.family.stacks, "vace_blocks"}:
        for block in getattr(model, stack, ()):
            linear, inner = _linear(block, layout)
            attention = 4.0 * layout.length**2 * inner
            rest += linear
            if stack in subject.family.stacks:
                sparse += attention
            else:
                rest += attention
    return sparse / (sparse + rest)


def _linear(block: nn.Module, layout: Layout) -> tuple[float, int]:
    """(multiplications of a block's linear layers, times two; channels of its attention)."""
    video = layout.frames * layout.tokens
    text = layout.text or _CROSS_TEXT
    total, inner = 0.0, 0
    for name, module in block.named_modules():
        size = getattr(module, "in_features", 0) * getattr(module, "out_features", 0)
        parts = name.split(".")
        if parts[-1] == "to_q" and inner == 0:
            inner = getattr(module, "out_features", 0)
        if not size or any(part.startswith("norm") for part in parts):  # modulation: one row a video
            continue
        of_text = any("context" in part or part.startswith(("add_", "to_add")) for part in parts)
        of_text = of_text or (parts[0] == "attn2" and parts[-1] in ("to_k", "to_v"))
        total += 2.0 * size * (text if of_text else video)
    return total, inner
