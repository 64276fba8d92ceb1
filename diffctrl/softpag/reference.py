"""SoftPAG with every attention map written down: slow, for tests. Nothing in the product calls it.

The targets are those of the specification's section 4, in the words of their definitions; nothing is shared
with the output forms that are checked against it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffctrl.softpag.config import SoftPAGConfig


def attention_map(query: Tensor, key: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """softmax(scale Q K^T + bias), (B, H, Sq, Sk), from (B, S, H, D) and an additive bias."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale
    return (scores if bias is None else scores + bias).softmax(-1)


def perturbed_map(
    config: SoftPAGConfig,
    query: Tensor,
    key: Tensor,
    weight: Tensor,
    *,
    image: tuple[int, int],
    grid: tuple[int, int, int] | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """A', (B, H, S, S), from queries and keys (B, S, H, D) and strengths (B, H)."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    plain = attention_map(query, key, scale, bias)
    if config.path == "spherical":
        changed = _on_the_arc(plain, weight)
    else:
        goal = target_map(config, plain, query, key, image, grid, scale, bias)
        u = weight[:, :, None, None]
        changed = (1 - u) * plain + u * goal
    if config.scope != "joint" or config.kind == "blur_query":
        outside = torch.ones(query.shape[1], dtype=torch.bool)
        outside[image[0] : image[1]] = False
        changed[:, :, outside] = plain[:, :, outside]
    return changed


def target_map(
    config: SoftPAGConfig,
    plain: Tensor,
    query: Tensor,
    key: Tensor,
    image: tuple[int, int],
    grid: tuple[int, int, int] | None,
    scale: float,
    bias: Tensor | None,
) -> Tensor:
    """T, (B, H, S, S); rows that the scope leaves alone may hold anything."""
    count = plain.shape[-1]
    identity = torch.eye(count, dtype=plain.dtype).expand_as(plain)
    valid = torch.ones_like(plain, dtype=torch.bool) if bias is None else (bias > -1000).expand_as(plain)
    if config.scope == "image_block":
        moved = plain.clone()
        moved[..., image[0] : image[1]] = 0
        return moved + plain[..., image[0] : image[1]].sum(-1, keepdim=True) * identity
    if config.scope == "image_block_logit":
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale + (0 if bias is None else bias)
        allowed = torch.eye(count, dtype=torch.bool)
        allowed[:, : image[0]] = allowed[:, image[1] :] = True
        return scores.masked_fill(~allowed, -math.inf).softmax(-1)
    if config.kind == "uniform":
        return valid.to(plain.dtype) / valid.sum(-1, keepdim=True)
    if config.kind == "argmax":
        return torch.nn.functional.one_hot(plain.argmax(-1), count).to(plain.dtype)
    if config.kind == "temperature":
        assert config.temperature is not None
        return attention_map(query, key, scale / config.temperature, bias)
    if config.kind == "zero":
        return torch.zeros_like(plain)
    if config.kind == "mean_query":
        chosen = [
            token
            for token in range(count)
            if config.query_mean in (None, "all")
            or (config.query_mean == "img") == (image[0] <= token < image[1])
        ]
        means = []
        for row in range(query.shape[0]):
            kept = [token for token in chosen if bool(valid[row, 0, :, token].any())]
            means.append(query[row, kept].mean(0))
        return attention_map(torch.stack(means)[:, None].expand_as(query), key, scale, bias)
    if config.kind == "blur_query":
        assert config.sigma is not None
        assert grid is not None
        changed = query.clone()
        changed[:, image[0] : image[1]] = _blurred(query[:, image[0] : image[1]], grid, config.sigma)
        return attention_map(changed, key, scale, bias)
    return identity


def _on_the_arc(plain: Tensor, weight: Tensor) -> Tensor:
    """The great circle between the square roots of A and I, row by row."""
    u = weight[:, :, None, None]
    identity = torch.eye(plain.shape[-1], dtype=plain.dtype).expand_as(plain)
    cosine = plain.diagonal(dim1=-2, dim2=-1).sqrt()[..., None].clamp(0, 1)
    angle = cosine.arccos()
    root = (u * angle).sin() / angle.sin() * identity + ((1 - u) * angle).sin() / angle.sin() * plain.sqrt()
    return root.square()


def _blurred(query: Tensor, grid: tuple[int, int, int], sigma: float) -> Tensor:
    """Each cell is the weighted sum of its neighbours, written out; borders are reflected."""
    frames, rows, columns = grid
    cells = query.unflatten(1, grid)
    width = math.ceil(6 * sigma)
    width += 1 - width % 2

    def reflected(place: int, size: int) -> int:
        place = abs(place)
        return 2 * (size - 1) - place if place >= size else place

    result = torch.zeros_like(cells)
    tall, wide = min(width // 2, rows - 1), min(width // 2, columns - 1)
    weights = {
        (down, across): math.exp(-(down**2 + across**2) / (2 * sigma**2))
        for down in range(-tall, tall + 1)
        for across in range(-wide, wide + 1)
    }
    total = sum(weights.values())
    for row in range(rows):
        for column in range(columns):
            for (down, across), weight in weights.items():
                source = cells[:, :, reflected(row + down, rows), reflected(column + across, columns)]
                result[:, :, row, column] += weight / total * source
    return result.flatten(1, 3)


def perturbed_output(config: SoftPAGConfig, query: Tensor, key: Tensor, value: Tensor, weight: Tensor,
                     **layout: object) -> Tensor:  # fmt: skip
    """A' V, (B, S, H, D); keys and values may have fewer heads than queries."""
    groups = query.shape[2] // key.shape[2]
    key, value = (part.repeat_interleave(groups, dim=2) for part in (key, value))
    return torch.einsum("bhqk,bkhd->bqhd", perturbed_map(config, query, key, weight, **layout), value)  # type: ignore[arg-type]
