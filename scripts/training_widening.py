"""A wider decoder for a trained autoencoder, which draws the same until it is trained further."""

from typing import Any

import torch
from torch import Tensor

_UNEVEN = 0.5
"""Deviation of how unevenly a channel's twins are weighed, in parts of the weights' own size."""


@torch.no_grad()
def widened(vae: Any, width: int) -> Any:
    """The same autoencoder with more channels in its decoder, in evaluation mode; encoder and latents stay.

    Each channel becomes several equal ones, and what reads them divides its weights among them (Net2Wider,
    arXiv 1511.05641, section 2.2): unevenly, as equal twins would be trained alike for ever.

    Args:
        vae: of diffusers' Wan, trained.
        width: of the decoder's outermost level, a multiple of the present one.

    Raises:
        ValueError: it is none.
    """
    config = dict(vae.config)
    present = config["decoder_base_dim"] or config["base_dim"]
    if width < present or width % present:
        raise ValueError(f"a decoder of width {present} can be widened to a multiple of it; got {width}")
    wide = type(vae).from_config({**config, "decoder_base_dim": width})
    stock = vae.state_dict()
    for name, value in wide.state_dict().items():
        value.copy_(_grown(name, stock[name], value.shape))
    return wide.eval()


def _grown(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """One parameter in its wider shape: outputs first, inputs second, as in every convolution."""
    copies = shape[0] // value.shape[0]
    value = value.repeat_interleave(copies, 0)
    if ".to_qkv." in name:  # `copies` times the products of queries and keys, under the root of it
        value[: len(value) // 3] *= copies**-0.5
    if value.shape == shape:
        return value
    twins = shape[1] // value.shape[1]
    uneven = torch.randn(len(value), value.shape[1], twins, *value.shape[2:])
    uneven = _UNEVEN * value.square().mean().sqrt() * (uneven - uneven.mean(2, keepdim=True))
    return ((value.unsqueeze(2) + uneven) / twins).flatten(1, 2)
