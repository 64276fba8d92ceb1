"""SD3 and SD3.5: joint attention, image first; SD3.5 adds an image-only second attention (`attn2`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import (
    Attention,
    FusedJointAttnProcessor2_0,
    JointAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
)
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor, nn

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
    split_name,
    text_projections,
    to_heads,
)
from diffctrl.families.rotary import normed


def _assemble(image_qkv: tuple[Tensor, ...], text_qkv: tuple[Tensor, ...] | None) -> Call:
    query, key, value = image_qkv
    image, text = Span(0, query.shape[1]), None
    if text_qkv is not None:
        query, key, value = (torch.cat(streams, dim=1) for streams in zip(image_qkv, text_qkv, strict=True))
        text = Span(image.stop, query.shape[1])
    # The stock processor drops `attention_mask` too: SD3 passes none.
    return Call(query, key, value, None, image, text)


def _project(attn: nn.Module, inputs: Inputs) -> Call:
    states, text = inputs.hidden_states, inputs.encoder_hidden_states
    return _assemble(projections(attn, states), None if text is None else text_projections(attn, text))


def _project_fused(attn: nn.Module, inputs: Inputs) -> Call:
    # The stock fused processor applies no QK norm, also where the model has one (SD3.5): neutral is stock.
    image_qkv = tuple(to_heads(attn, part) for part in attn.to_qkv(inputs.hidden_states).chunk(3, dim=-1))
    if inputs.encoder_hidden_states is None:
        return _assemble(image_qkv, None)
    fused = attn.to_added_qkv(inputs.encoder_hidden_states)
    return _assemble(image_qkv, tuple(to_heads(attn, part) for part in fused.chunk(3, dim=-1)))


def _project_adapted(attn: nn.Module, inputs: Inputs) -> Call:
    """The joint attention of an IP-Adapter, and beside it the image's attention to the image prompt."""
    states, text, adapter = inputs.hidden_states, inputs.encoder_hidden_states, inputs.adapter
    query, key, value = (to_heads(attn, layer(states)) for layer in (attn.to_q, attn.to_k, attn.to_v))
    image_qkv = normed(attn.norm_q, query), normed(attn.norm_k, key), value
    call = _assemble(image_qkv, None if text is None else text_projections(attn, text))
    prompt = inputs.ip_hidden_states
    if adapter.scale == 0 or prompt is None:
        return call
    prompt = adapter.norm_ip(prompt, temb=inputs.temb)
    prompt_key, prompt_value = (to_heads(attn, layer(prompt)) for layer in (adapter.to_k_ip, adapter.to_v_ip))
    key = torch.cat([adapter.norm_k(key), adapter.norm_ip_k(prompt_key)], dim=1)
    branch = adapter.norm_q(query), key, torch.cat([value, prompt_value], dim=1)
    return replace(call, saved={"branch": branch, "scale": adapter.scale})


def _with_prompt(call: Call, states: Tensor) -> Tensor:
    """The image's tokens (B, S, C) with what an image prompt adds to them."""
    if "branch" not in call.saved:
        return states
    query, key, value = (part.transpose(1, 2) for part in call.saved["branch"])
    added = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2, 3)
    return states + added.to(query.dtype) * call.saved["scale"]


def _finish(attn: nn.Module, call: Call, output: Tensor) -> Any:
    states = output.flatten(2, 3).to(call.query.dtype)
    if call.text is None:
        return output_layer(attn, _with_prompt(call, states))
    states, text = _with_prompt(call, states[:, : call.image.stop]), states[:, call.image.stop :]
    return output_layer(attn, states), text if attn.context_pre_only else attn.to_add_out(text)


class SD3Family(Family):
    """Stable Diffusion 3 and 3.5."""

    name = "sd3"
    title = "Stable Diffusion 3 / 3.5"
    batched = (
        "hidden_states",
        "encoder_hidden_states",
        "pooled_projections",
        "timestep",
        "block_controlnet_hidden_states",
        "joint_attention_kwargs",
    )
    cfg = "batched"
    stacks = ("transformer_blocks",)
    chains = ("transformer_blocks",)
    block_streams = ("encoder_hidden_states", "hidden_states")
    text_side = "last"

    def model_class(self) -> type[nn.Module]:
        return SD3Transformer2DModel

    def routes(self) -> Mapping[tuple[type, type], Route]:
        return {
            (Attention, JointAttnProcessor2_0): Route(_project, _finish),
            (Attention, FusedJointAttnProcessor2_0): Route(_project_fused, _finish),
            (Attention, SD3IPAdapterJointAttnProcessor2_0): Route(_project_adapted, _finish, adapts=True),
        }

    def attention_modules(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        # An IP-Adapter's image encoder is put inside of the model, attention of its own included.
        for name, module in super().attention_modules(model):
            if not name.startswith("image_proj."):
                yield name, module

    def place(self, model: nn.Module, name: str, module: nn.Module) -> Place:
        stack, layer, rest = split_name(name)
        return Place("self", "attn2", layer) if rest == "attn2" else Place("joint", stack, layer)

    def auxiliary(self, call: Mapping[str, Any]) -> bool:
        # The pipeline's skip-layer guidance runs the positive prompt once more.
        return call.get("skip_layers") is not None

    def describe(self, model: nn.Module, call: Mapping[str, Any]) -> ForwardInfo:
        latents, text = call["hidden_states"], call["encoder_hidden_states"]
        patch = model.config.patch_size
        return ForwardInfo(
            batch=latents.shape[0],
            grid=(1, latents.shape[-2] // patch, latents.shape[-1] // patch),
            text_length=None if text is None else text.shape[1],
            text_valid=None,
            timestep=call.get("timestep"),
            device=latents.device,
        )
