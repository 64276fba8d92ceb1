"""Stock pipelines around the tiny models: no text encoder, no VAE, embeddings in and latents out."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
)
from torch import Tensor, nn

from tests.helpers import TEXT, build


def _randn(seed: int, *size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd3_pipeline(case: str = "sd3.5") -> Any:
    parts = dict.fromkeys(
        ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    )
    return _quiet(
        StableDiffusion3Pipeline(
            transformer=build(case), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **parts
        )
    )


def flux_pipeline() -> Any:
    parts = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return _quiet(FluxPipeline(transformer=build("flux"), scheduler=scheduler, **parts))


def wan_pipeline(two: bool = False) -> Any:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return _quiet(
        WanPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            scheduler=scheduler,
            transformer=build("wan"),
            transformer_2=build("wan", seed=1) if two else None,
            boundary_ratio=0.875 if two else None,
        )
    )


def cogvideox_pipeline() -> Any:
    return _quiet(
        CogVideoXPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            transformer=build("cogvideox"),
            scheduler=CogVideoXDDIMScheduler(),
        )
    )


def sd_pipeline() -> Any:
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    return _quiet(
        StableDiffusionPipeline(
            unet=build("unet"),
            scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
            requires_safety_checker=False,
            **parts,
        )
    )


def sdxl_pipeline() -> Any:
    parts = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    pipe = StableDiffusionXLPipeline(unet=build("sdxl"), scheduler=scheduler, add_watermarker=False, **parts)
    return _quiet(pipe)


def denoiser(pipe: Any) -> nn.Module:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def prompts(pipe: Any, batch: int = 1, seed: int = 3) -> dict[str, Tensor]:
    """Embeddings of a positive and a negative prompt, as the pipeline's call takes them."""
    config = denoiser(pipe).config
    width = config.get("joint_attention_dim") or config.get("text_dim") or config.get("text_embed_dim")
    width = width or config.cross_attention_dim
    made = {
        "prompt_embeds": _randn(seed, batch, TEXT, width),
        "negative_prompt_embeds": _randn(seed + 1, batch, TEXT, width),
    }
    if "pooled_projection_dim" in config:
        made["pooled_prompt_embeds"] = _randn(seed + 2, batch, config.pooled_projection_dim)
        made["negative_pooled_prompt_embeds"] = _randn(seed + 3, batch, config.pooled_projection_dim)
    if isinstance(pipe, StableDiffusionXLPipeline):
        made["pooled_prompt_embeds"] = _randn(seed + 2, batch, 20)
        made["negative_pooled_prompt_embeds"] = _randn(seed + 3, batch, 20)
    return made


def generate(pipe: Any, steps: int = 4, batch: int = 1, seed: int = 0, **arguments: Any) -> Tensor:
    """The latents of one run."""
    sizes = {"height": 80, "width": 48}
    if isinstance(pipe, WanPipeline | CogVideoXPipeline):
        sizes["num_frames"] = 9
    output = pipe(
        **prompts(pipe, batch),
        **sizes,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        return_dict=False,
        **arguments,
    )
    return output[0]
