"""Mochi: joint attention over [video, valid text]; the stock processor attends each batch row for itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import MochiAttention, MochiAttnProcessor2_0
from diffusers.models.transformers.transformer_mochi import MochiTransformer3DModel
from torch import Tensor, nn

from diffctrl.attention import attend
from diffctrl.families.base import (
    Call,
    Family,
    ForwardInfo,
    Inputs,
    Place,
    Route,
    Span,
    output_layer,
    projections,
    row_lengths,
    split_name,
    text_projections,
)
from diffctrl.families.parallel import video_plan


def _project(attn: nn.Module, inputs: Inputs) -> Call:
    halves = inputs.image_rotary_emb or ()  # (S, H, D / 2), one angle for both channels of a pair
    tables = (part[None].repeat_interleave(2, dim=-1) for part in halves)
    query, key, value = projections(attn, inputs.hidden_states, *tables)
    video = query.shape[1]

    valid = inputs.attention_mask.bool()  # (B, T)
    # Valid tokens move to the front, where the stock processor leaves their outputs.
    order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)
    text = [
        part.gather(1, order[:, :, None, None].expand_as(part))
        for part in text_projections(attn, inputs.encoder_hidden_states)
    ]
    query, key, value = (torch.cat(pair, dim=1) for pair in zip((query, key, value), text, strict=True))

    lengths = video + valid.sum(dim=1)
    attended = torch.arange(query.shape[1], device=query.device) < lengths[:, None]  # (B, S)
    return Call(
        query,
        key,
        value,
        attended[:, None, None, :],
        image=Span(0, video),
        text=Span(video, query.shape[1]),
        text_order=order,
        saved={"lengths": lengths, "attended": attended},
    )


def _dense(attn: nn.Module, call: Call, backend: Any) -> Any:
    """One kernel call per batch row over its own tokens, as the stock processor, which knows no backend."""
    if torch.compiler.is_compiling():  # the loop has shapes that depend on data; the mask says the same
        return attend(call.query, call.key, call.value, attn_mask=call.attention_mask, backend=backend)
    total = call.query.shape[1]
    rows = []
    for row, length in enumerate(call.saved["lengths"].tolist()):
        query, key, value = (
            part[row : row + 1, :length].transpose(1, 2) for part in (call.query, call.key, call.value)
        )
        output = F.scaled_dot_product_attention(query, key, value)
        rows.append(F.pad(output, (0, 0, 0, total - length)))
    return torch.cat(rows, dim=0).transpose(1, 2)


def _finish(attn: nn.Module, call: Call, output: Tensor) -> tuple[Tensor, Tensor]:
    # The stock processor leaves zeros at padding, whatever a kernel put there.
    states = torch.where(call.saved["attended"][..., None], output.flatten(2, 3), 0)
    video, text = states[:, : call.image.stop], states[:, call.image.stop :]
    return output_layer(attn, video), text if attn.context_pre_only else attn.to_add_out(text)


class MochiFamily(Family):
    """Mochi 1."""

    name = "mochi"
    title = "Mochi 1"
    batched = (
        "hidden_states",
        "encoder_hidden_states",
        "timestep",
        "encoder_attention_mask",
        "attention_kwargs",
    )
    cfg = "batched"
    stacks = ("transformer_blocks",)
    chains = ("transformer_blocks",)
    block_streams = ("hidden_states", "encoder_hidden_states")
    text_side = "last"

    def model_class(self) -> type[nn.Module]:
        return MochiTransformer3DModel

    def routes(self) -> Mapping[tuple[type, type], Route]:
        return {(MochiAttention, MochiAttnProcessor2_0): Route(_project, _finish, dense=_dense)}

    def place(self, model: nn.Module, name: str, module: nn.Module) -> Place:
        stack, layer, _ = split_name(name)
        return Place("joint", stack, layer)

    def parallel_plan(self, model: nn.Module) -> dict[str, Any]:
        return video_plan("transformer_blocks.0", dims=3)

    def describe(self, model: nn.Module, call: Mapping[str, Any]) -> ForwardInfo:
        latents, patch = call["hidden_states"], model.config.patch_size
        frames, rows, columns = latents.shape[2:]
        return ForwardInfo(
            batch=latents.shape[0],
            grid=(frames, rows // patch, columns // patch),
            text_length=call["encoder_hidden_states"].shape[1],
            text_valid=row_lengths(call["encoder_attention_mask"]),
            timestep=call["timestep"],
            device=latents.device,
        )
