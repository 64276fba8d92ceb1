"""Clips that several processes share, each with a part of the tokens (Ulysses)."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh

from diffctrl import processes
from diffctrl.control import context_parallel_plan
from diffctrl.drawing.source import ModelSource
from diffctrl.errors import BadRequestError


def tokens_of(source: ModelSource, scale: str, latent_frames: int, height: int, width: int) -> int:
    """Of a clip in the transformer.

    Args:
        scale: what the autoencoder's configuration calls its pixels per latent.
        height, width: in pixels.
    """
    config, pixels = source.config("transformer"), source.config("vae").get(scale, 8)
    patch = config["patch_size"]
    depth, *sides = (config["patch_size_t"], patch, patch) if isinstance(patch, int) else patch
    return latent_frames // depth * (height // (pixels * sides[0])) * (width // (pixels * sides[1]))


def check_sharing(degree: int, source: ModelSource, device: str, tokens: int) -> None:
    """Whether `degree` processes can share a clip of so many tokens.

    Raises:
        BadRequestError: they cannot.
    """
    if degree == 1:
        return
    if (started := processes.count()) % degree:
        raise BadRequestError(
            f"--ulysses-degree {degree}: so many processes share a clip, and {started} run; start them with "
            f"accelerate launch --num_processes {degree} -m diffctrl train-length-lora ..., or a multiple"
        )
    if tokens % degree:
        raise BadRequestError(
            f"--ulysses-degree {degree} does not divide the {tokens} tokens of a clip; give another one, or "
            "another --size"
        )
    heads = source.config("transformer")["num_attention_heads"]
    if heads % degree:
        raise BadRequestError(
            f"--ulysses-degree {degree} does not divide the {heads} heads of {source.name}; accepted: "
            + ", ".join(str(number) for number in range(1, heads + 1) if heads % number == 0)
        )
    if device == "cpu":
        raise BadRequestError(f"--ulysses-degree {degree} wants a GPU for each process, not --device cpu")


def share_clips(transformer: Any, degree: int, groups: int, device: torch.device) -> None:
    """Split the tokens of each clip among `degree` processes in a row, of `groups` such rows."""
    from diffusers import ContextParallelConfig

    mesh = init_device_mesh(device.type, (groups, 1, degree), mesh_dim_names=("group", "ring", "ulysses"))
    config = ContextParallelConfig(ulysses_degree=degree, mesh=mesh)
    transformer.enable_parallelism(config=config, cp_plan=context_parallel_plan(transformer))
