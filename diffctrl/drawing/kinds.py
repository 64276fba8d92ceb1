"""The pipelines that the command line draws with: which sizes, lengths and arguments each takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diffctrl.errors import BadRequestError

Configs = Callable[[str], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class SizeRule:
    """Which heights and widths a model takes, in pixels.

    Attributes:
        multiple: both must be multiples of it.
        largest: of either side, or None where the model sets no end.
        default: (height, width) where the user asks for none.
    """

    multiple: int
    largest: int | None
    default: tuple[int, int]

    def check(self, model: str, **sides: int) -> None:
        """Refuse a height or width that the model cannot draw.

        Raises:
            BadRequestError: with the nearest size that it can.
        """
        for name, side in sides.items():
            if side < self.multiple or side % self.multiple or (self.largest and side > self.largest):
                near = max(self.multiple, round(side / self.multiple) * self.multiple)
                if self.largest:
                    near = min(near, self.largest // self.multiple * self.multiple)
                limit = f" up to {self.largest}" if self.largest else ""
                raise BadRequestError(
                    f"{name}={side} is not a size that {model} draws: it takes multiples of {self.multiple}"
                    f"{limit}; the nearest is {near}"
                )


@dataclass(frozen=True, slots=True)
class FrameRule:
    """How many frames the clips of a video model have: one, then `stride` for each further latent frame."""

    stride: int

    def check(self, model: str, frames: int) -> None:
        """Refuse a length that the model cannot draw.

        Raises:
            BadRequestError: with the nearest length that it can.
        """
        if frames < 1 or (frames - 1) % self.stride:
            near = max(0, round((frames - 1) / self.stride)) * self.stride + 1
            raise BadRequestError(
                f"--frames {frames} is not a length of {model}: it takes multiples of {self.stride} and one "
                f"more; the nearest is {near}"
            )

    def latent(self, frames: int) -> int:
        """Latent frames of a clip."""
        return (frames - 1) // self.stride + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineKind:
    """One pipeline class.

    Attributes:
        family: the model family, as in `diffctrl.families`.
        denoiser: the component under control.
        size_rule: (configs of components) -> sizes.
        long_tokenizer: the tokenizer whose limit is `max_sequence_length`; the others have their own.
        takes_negative: whether the call reads a negative prompt when its guidance is on.
        frame_rule: (configs of components) -> lengths of clips; None for pipelines that draw pictures.
        fps: frames a second of its clips.
    """

    family: str
    denoiser: str
    size_rule: Callable[[Configs], SizeRule]
    long_tokenizer: str | None = None
    takes_negative: bool = True
    frame_rule: Callable[[Configs], FrameRule] | None = None
    fps: int | None = None


def _vae_scale(configs: Configs) -> int:
    return 2 ** (len(configs("vae")["block_out_channels"]) - 1)


def _sd3_sizes(configs: Configs) -> SizeRule:
    transformer, scale = configs("transformer"), _vae_scale(configs)
    multiple = scale * transformer["patch_size"]
    side = transformer["sample_size"] * scale
    # The position table has this many patches along a side, and the picture is cut out of its middle.
    return SizeRule(multiple, transformer["pos_embed_max_size"] * multiple, (side, side))


def _flux_sizes(configs: Configs) -> SizeRule:
    scale = _vae_scale(configs)
    return SizeRule(2 * scale, None, (128 * scale, 128 * scale))


def _unet_sizes(configs: Configs) -> SizeRule:
    scale, sample = _vae_scale(configs), configs("unet")["sample_size"]
    height, width = (sample, sample) if isinstance(sample, int) else sample
    return SizeRule(8, None, (height * scale, width * scale))


def _wan_sizes(configs: Configs) -> SizeRule:
    scale = configs("vae").get("scale_factor_spatial", 8) * configs("transformer")["patch_size"][-1]
    return SizeRule(math.lcm(16, scale), None, (480, 832))


def _wan_frames(configs: Configs) -> FrameRule:
    return FrameRule(configs("vae").get("scale_factor_temporal", 4))


def _hunyuan_video_sizes(configs: Configs) -> SizeRule:
    scale = configs("vae").get("spatial_compression_ratio", 8) * configs("transformer")["patch_size"]
    return SizeRule(math.lcm(16, scale), None, (720, 1280))


def _hunyuan_video_frames(configs: Configs) -> FrameRule:
    return FrameRule(configs("vae").get("temporal_compression_ratio", 4))


KINDS: dict[str, PipelineKind] = {
    "StableDiffusion3Pipeline": PipelineKind(
        family="sd3", denoiser="transformer", size_rule=_sd3_sizes, long_tokenizer="tokenizer_3"
    ),
    "FluxPipeline": PipelineKind(
        family="flux",
        denoiser="transformer",
        size_rule=_flux_sizes,
        long_tokenizer="tokenizer_2",
        takes_negative=False,  # only with true_cfg_scale, which this command does not offer
    ),
    "StableDiffusionPipeline": PipelineKind(family="unet", denoiser="unet", size_rule=_unet_sizes),
    "StableDiffusionXLPipeline": PipelineKind(family="unet", denoiser="unet", size_rule=_unet_sizes),
    "WanPipeline": PipelineKind(
        family="wan",
        denoiser="transformer",
        size_rule=_wan_sizes,
        long_tokenizer="tokenizer",
        frame_rule=_wan_frames,
        fps=16,
    ),
    "HunyuanVideoPipeline": PipelineKind(
        family="hunyuan_video",
        denoiser="transformer",
        size_rule=_hunyuan_video_sizes,
        long_tokenizer="tokenizer",
        takes_negative=False,  # as FLUX
        frame_rule=_hunyuan_video_frames,
        fps=15,
    ),
}
