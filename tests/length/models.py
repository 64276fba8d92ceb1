"""A real, very small WanPipeline with random weights, autoencoder and text encoder included; LoRAs for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffctrl.length import MASK_FIELDS, LengthLoRA, write
from diffctrl.lengthening.targets import targets
from diffctrl.pipelines.length import base_of
from diffctrl.radial import RadialConfig
from diffctrl.zoo.video import VideoSize, video_parts, video_pipeline

# Three blocks: the first two stay dense under a length LoRA's mask.
SIZE = VideoSize(pixels=32, vae_width=4, layers=3, heads=2, head_dim=16, mlp=32, text_width=16, text_layers=1)
FRAMES = 17  # 9 latent frames of 16 tokens
CALL: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 3, "max_sequence_length": 32}
MASK = RadialConfig(
    block_rule="hybrid", decay_factor=1.0, sink=True, adjacent="decay", block=16, dense_blocks=2
)
RANK = 4


def wan(seed: int = 0) -> Any:
    """The pipeline; its zero-initialised layers are opened, so that attention reaches the clip."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = video_parts(SIZE)
        for _, module in parts.items():
            module.eval().requires_grad_(False)
            for weight in module.parameters():
                if not weight.any():
                    nn.init.normal_(weight, std=0.2)
    pipe = video_pipeline(parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(folder: Path) -> Path:
    """The pipeline as a folder, with the card of the package's own video models."""
    wan().save_pretrained(folder)
    call = {**CALL, "num_frames": FRAMES, "guidance_scale": 1.0}
    (folder / "diffctrl.json").write_text(json.dumps({"call": call}))
    return folder


def latents(pipe: Any, frames: int = FRAMES, **call: Any) -> torch.Tensor:
    """The final latents (1, C, F, h, w) of one seed."""
    generator = torch.Generator().manual_seed(0)
    given = {**CALL, "num_frames": frames, "guidance_scale": 1.0, "output_type": "latent", **call}
    return pipe("a red circle moves right", generator=generator, return_dict=False, **given)[0]


def lora_file(path: Path, pipe: Any, *, method: str = "radial", std: float = 0.1, **changes: Any) -> Path:
    """A LoRA with random weights for this pipeline, alpha twice the rank."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name in targets(pipe.transformer, added=False, cross=False):
        layer = pipe.transformer.get_submodule(name)
        down = torch.randn(RANK, layer.in_features, generator=generator) * std
        up = torch.randn(layer.out_features, RANK, generator=generator) * std
        tensors[name] = down, up
    fields: dict[str, Any] = {
        "method": method,
        "rank": RANK,
        "lora_alpha": 2.0 * RANK,
        "frames": (FRAMES, FRAMES),
        "latent_frames": (9, 9),
        "radial": {name: getattr(MASK, name) for name in MASK_FIELDS} if method == "radial" else None,
        "base": base_of(pipe.transformer, "tiny-wan"),
    }
    write(path, tensors, LengthLoRA(**{**fields, **changes}))
    return path
