"""Video models of real size with random weights, for benchmarks: built on the device, one block's weights for
all.

A block's weights are those of the first block of its kind, in modules of their own. Each is larger than the
cache of a GPU, so that a forward takes as long as with weights of its own for each block, in a fraction of
the memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
from torch import Tensor, nn

# Parts of Wan that `from_pretrained` leaves in float32.
_WIDE = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")


@dataclass(frozen=True, slots=True)
class VideoModel:
    """One model at one size.

    Attributes:
        name: for the report.
        build: makes it with so many blocks of each stack.
        blocks: real number of blocks of each stack.
        heads, head_dim: of its attention.
        latents: (frames, rows, columns) of the latent video.
        patch: rows and columns of a token.
        text: text tokens of the joint sequence; 0 where there is none.
        inputs: (model, device, dtype, latents) -> keyword arguments of a forward.
    """

    name: str
    build: Callable[[dict[str, int]], nn.Module]
    blocks: dict[str, int]
    heads: int
    head_dim: int
    latents: tuple[int, int, int]
    text: int
    inputs: Callable[[nn.Module, str, torch.dtype, tuple[int, int, int]], dict[str, Any]]
    patch: int = 2

    @property
    def tokens(self) -> tuple[int, int]:
        """(frames, tokens of a frame)."""
        frames, rows, columns = self.latents
        return frames, (rows // self.patch) * (columns // self.patch)

    def make(self, device: str, dtype: torch.dtype, *, only_one: bool = False) -> nn.Module:
        """The model with random weights in `dtype`.

        Args:
            only_one: build one block of each stack, for times to be multiplied.
        """
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model = self.build(dict.fromkeys(self.blocks, 1))
        finally:
            torch.set_default_dtype(default)
        if not only_one:
            for stack, count in self.blocks.items():
                blocks = getattr(model, stack)
                blocks.extend([_sharing(blocks[0]) for _ in range(count - 1)])
        for name, parameter in model.named_parameters():
            if isinstance(model, WanTransformer3DModel) and any(part in name for part in _WIDE):
                parameter.data = parameter.data.float()
        return model.eval().requires_grad_(False)


def _sharing(block: nn.Module) -> nn.Module:
    """A block of its own modules with the same parameters."""
    return copy.deepcopy(block, {id(parameter): parameter for parameter in block.parameters()})


def _randn(device: str, dtype: torch.dtype, *size: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(*size, generator=generator, device=device, dtype=torch.float32).to(dtype)


def _hunyuan_inputs(
    model: nn.Module, device: str, dtype: torch.dtype, latents: tuple[int, int, int]
) -> dict[str, Any]:
    config: Any = model.config
    text = 256 if config.text_embed_dim > 1000 else 20
    valid = torch.arange(text, device=device) < text // 3  # a prompt is shorter than its padding
    return {
        "hidden_states": _randn(device, dtype, 1, config.in_channels, *latents),
        "timestep": torch.tensor([500.0], device=device, dtype=dtype),
        "encoder_hidden_states": _randn(device, dtype, 1, text, config.text_embed_dim),
        "encoder_attention_mask": valid[None].to(torch.int64),
        "pooled_projections": _randn(device, dtype, 1, config.pooled_projection_dim),
        "guidance": torch.tensor([6000.0], device=device, dtype=dtype),
    }


def _wan_inputs(
    model: nn.Module, device: str, dtype: torch.dtype, latents: tuple[int, int, int]
) -> dict[str, Any]:
    config: Any = model.config
    return {
        "hidden_states": _randn(device, dtype, 1, config.in_channels, *latents),
        "timestep": torch.tensor([500], device=device),
        "encoder_hidden_states": _randn(device, dtype, 1, 512, config.text_dim),
    }


def _hunyuan(blocks: dict[str, int], **config: Any) -> nn.Module:
    return HunyuanVideoTransformer3DModel(
        num_layers=blocks["transformer_blocks"],
        num_single_layers=blocks["single_transformer_blocks"],
        guidance_embeds=True,
        **config,
    )


def _wan(blocks: dict[str, int], **config: Any) -> nn.Module:
    return WanTransformer3DModel(num_layers=blocks["blocks"], **config)


_HUNYUAN_BLOCKS = {"transformer_blocks": 20, "single_transformer_blocks": 40}

HUNYUAN = VideoModel(
    "HunyuanVideo 720p 129 frames", _hunyuan, _HUNYUAN_BLOCKS, 24, 128, (33, 90, 160), 256, _hunyuan_inputs
)
HUNYUAN_LONG = VideoModel(
    "HunyuanVideo 720p 509 frames", _hunyuan, _HUNYUAN_BLOCKS, 24, 128, (128, 90, 160), 256, _hunyuan_inputs
)
WAN = VideoModel("Wan2.1-14B 720p 81 frames", _wan, {"blocks": 40}, 40, 128, (21, 90, 160), 0, _wan_inputs)


def _tiny_hunyuan(blocks: dict[str, int]) -> nn.Module:
    return _hunyuan(
        blocks,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_refiner_layers=1,
        text_embed_dim=24,
        pooled_projection_dim=20,
        rope_axes_dim=(4, 6, 6),
    )


def _tiny_wan(blocks: dict[str, int]) -> nn.Module:
    return _wan(
        blocks,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        text_dim=16,
        freq_dim=32,
        ffn_dim=64,
    )


_TINY_BLOCKS = {"transformer_blocks": 2, "single_transformer_blocks": 3}
QUICK = {
    HUNYUAN.name: VideoModel(
        "tiny HunyuanVideo", _tiny_hunyuan, _TINY_BLOCKS, 2, 16, (9, 16, 24), 20, _hunyuan_inputs
    ),
    HUNYUAN_LONG.name: VideoModel(
        "tiny long HunyuanVideo", _tiny_hunyuan, _TINY_BLOCKS, 2, 16, (30, 16, 24), 20, _hunyuan_inputs
    ),
    WAN.name: VideoModel("tiny Wan", _tiny_wan, {"blocks": 3}, 2, 16, (9, 16, 24), 0, _wan_inputs),
}
