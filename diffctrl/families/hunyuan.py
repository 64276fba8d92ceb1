"""What HunyuanVideo 1.0 and 1.5 share: attention over [video, text], and a refiner of the text tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from diffctrl.families.base import Call, Family, Inputs, Place, output_layer, projections, split_name


def turned_projections(attn: nn.Module, inputs: Inputs, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`projections` with positions turned into the video tokens; text, behind them, has none."""
    if inputs.image_rotary_emb is None:
        return projections(attn, states)
    cos, sin = (part[None, :, None, :].to(states.device) for part in inputs.image_rotary_emb)
    return projections(attn, states, cos, sin, stop=cos.shape[1])


def finish(attn: nn.Module, call: Call, output: Tensor) -> tuple[Tensor, Tensor]:
    """Video and text apart again, each through its output layer; single blocks have none of their own."""
    states = output.flatten(2, 3).to(call.query.dtype)
    video, text = states[:, : call.image.stop], states[:, call.image.stop :]
    if attn.to_out is not None:
        video = output_layer(attn, video)
    return video, text if attn.to_add_out is None else attn.to_add_out(text)


def token_grid(config: Any, latents: Tensor) -> tuple[int, int, int]:
    """(frames, rows, columns) of tokens for latents (B, C, F, H, W)."""
    frames, rows, columns = latents.shape[2:]
    return frames // config.patch_size_t, rows // config.patch_size, columns // config.patch_size


class HunyuanFamily(Family):
    """Base of both: two forwards under classifier-free guidance, and text behind the video."""

    cfg = "separate"
    block_streams = ("hidden_states", "encoder_hidden_states")
    text_side = "last"

    def place(self, model: nn.Module, name: str, module: nn.Module) -> Place:
        if name.startswith("context_embedder."):
            return Place("text", "refiner")
        stack, layer, _ = split_name(name)
        return Place("joint", stack, layer)
