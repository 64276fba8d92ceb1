"""A real, very small StableDiffusion3Pipeline with random weights: for wiring, not for pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffctrl.zoo import models

SIZE = models.ImageSize(
    latent_size=8,
    latent_channels=4,
    vae_channels=(8, 8, 8),
    layers=2,
    heads=2,
    head_dim=16,
    positions=8,
    text_width=16,
    text_layers=2,
)
SIDE = 32  # pixels: 8 latent pixels, 4 patches
CALL: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 3.0, "height": SIDE, "width": SIDE}
CALL["max_sequence_length"] = 32


def sd3_pipeline(size: models.ImageSize = SIZE) -> Any:
    """The pipeline; its zero-initialised layers are opened, so that attention reaches the picture."""
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    parts = models.image_parts(size)
    for _, module in parts.items():
        for weight in module.parameters():
            if not weight.any():
                nn.init.normal_(weight, std=0.2)
    torch.random.set_rng_state(state)
    pipe = models.image_pipeline(parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, prompt: str = "a red star", seed: int = 0, **call: Any) -> torch.Tensor:
    """The final latents (1, C, h, w) of one seed."""
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, generator=generator, output_type="latent", return_dict=False, **{**CALL, **call})[0]
