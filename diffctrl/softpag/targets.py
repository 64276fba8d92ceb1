"""What each target map makes of the values, T V, from queries, keys and values: no map is formed.

SoftPAG specification, section 4; every function is checked against `reference.py`, which forms the maps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffctrl.attention import attend, logsumexp_of
from diffctrl.softpag.blur import blurred
from diffctrl.softpag.config import SoftPAGConfig
from diffctrl.softpag.rowstats import strongest_key

# Additive masks of stock models write -10000 or the least number for "not attended".
_MASKED = -1000.0
_PADDING = 8  # channels that one more is rounded up to: what fused kernels take


@dataclass(frozen=True, slots=True)
class Chosen:
    """The perturbed batch rows and heads of one attention call.

    Attributes:
        query: (B, S, H, D), every query, as fed to the kernel.
        key, value: (B, S, H, D), with as many heads as the queries.
        mask: bool (True is attended) or additive, (B or 1, H or 1, S or 1, S), or None.
        image: half-open range of the image tokens.
        grid: (frames, rows, columns) of the image tokens, or None where it is not needed.
        scale: of the scores.
        backend: attention backend for what is computed beside the call.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    image: tuple[int, int]
    grid: tuple[int, int, int] | None = None
    scale: float | None = None
    backend: Any = None

    @property
    def scaled(self) -> float:
        return 1.0 / math.sqrt(self.query.shape[-1]) if self.scale is None else self.scale

    def rows_mask(self, rows: tuple[int, int]) -> Tensor | None:
        """The mask of some queries."""
        mask = self.mask
        return mask if mask is None or mask.shape[-2] == 1 else mask[..., rows[0] : rows[1], :]

    def attend(self, query: Tensor, rows: tuple[int, int], **options: Any) -> Any:
        """The engine's attention of other queries, which stand for those of `rows`."""
        settings = {
            "attn_mask": self.rows_mask(rows),
            "scale": self.scaled,
            "backend": self.backend,
            **options,
        }
        return attend(query, self.key, self.value, **settings)


def valid_keys(mask: Tensor) -> Tensor:
    """What a mask attends, bool."""
    return mask if mask.dtype == torch.bool else mask > _MASKED


def perturbed_rows(config: SoftPAGConfig, chosen: Chosen) -> tuple[int, int]:
    """The range of queries that the settings change."""
    whole = config.scope == "joint" and config.kind != "blur_query"
    return (0, chosen.query.shape[1]) if whole else chosen.image


def target(config: SoftPAGConfig, chosen: Chosen, rows: tuple[int, int]) -> Tensor:
    """T V of the queries `rows`: (B, S', H, D), or (B, 1, H, D) where it is the same for all of them."""
    if config.scope == "image_block":
        return image_block(chosen)
    if config.scope == "image_block_logit":
        return image_block_logit(chosen)
    if config.kind == "uniform":
        return uniform(chosen, rows)
    if config.kind == "mean_query":
        return mean_query(chosen, rows, config.query_mean or "all")
    if config.kind == "blur_query" and config.sigma is not None:
        return blur_query(chosen, config.sigma)
    if config.kind == "argmax":
        return argmax(chosen, rows)
    if config.kind == "temperature" and config.temperature is not None:
        query = chosen.query[:, rows[0] : rows[1]]
        return chosen.attend(query, rows, scale=chosen.scaled / config.temperature)
    if config.kind == "zero":
        return chosen.value.new_zeros(()).expand(*chosen.value[:, :1].shape)
    return chosen.value[:, rows[0] : rows[1]]


def uniform(chosen: Chosen, rows: tuple[int, int]) -> Tensor:
    """The mean of the values of the keys that each query may attend; 0 where it may attend none."""
    mask = chosen.rows_mask(rows)
    if mask is None:
        return chosen.value.mean(dim=1, keepdim=True)
    valid = valid_keys(mask).to(chosen.value.dtype)
    share = valid / valid.sum(-1, keepdim=True).clamp(min=1)
    heads = chosen.query.shape[2]
    # (B, H, S' or 1, S) x (B, H, S, D); the mask's queries are expanded only where it tells them apart.
    return (share.expand(-1, heads, -1, -1) @ chosen.value.transpose(1, 2)).transpose(1, 2)


def mean_query(chosen: Chosen, rows: tuple[int, int], of: str) -> Tensor:
    """The attention of one query, the mean of all, image or text queries (SEG with sigma -> infinity).

    Padding is left out of the mean: a key that no query attends is padding, and so is its query.
    """
    start, stop = chosen.image
    count = chosen.query.shape[1]
    inside = torch.ones(count, dtype=torch.bool, device=chosen.query.device)
    if of != "all":
        inside[:] = of == "txt"
        inside[start:stop] = of == "img"
    counted = inside[None, None, :]  # (B, H, S)
    if chosen.mask is not None:
        counted = counted & valid_keys(chosen.mask).any(-2)
    weight = counted.transpose(1, 2)[..., None].to(chosen.query.dtype)  # (B, S, H, 1)
    query = (chosen.query * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
    mask = chosen.rows_mask(rows)
    if mask is None or mask.shape[-2] == 1:
        return chosen.attend(query, rows)
    return chosen.attend(query.expand(-1, rows[1] - rows[0], -1, -1), rows)


def blur_query(chosen: Chosen, sigma: float) -> Tensor:
    """The attention of the image queries after a Gaussian blur over their grid, frame by frame (SEG)."""
    if chosen.grid is None:
        raise RuntimeError("kind='blur_query' needs the token grid of this attention, which is not known")
    start, stop = chosen.image
    return chosen.attend(blurred(chosen.query[:, start:stop], chosen.grid, sigma), chosen.image)


def argmax(chosen: Chosen, rows: tuple[int, int]) -> Tensor:
    """The value of each query's strongest key."""
    query = chosen.query[:, rows[0] : rows[1]]
    strongest = strongest_key(query, chosen.key, chosen.rows_mask(rows), chosen.scaled)
    index = strongest.transpose(1, 2)[..., None].expand(-1, -1, -1, chosen.value.shape[-1])
    return chosen.value.gather(1, index)


def image_block(chosen: Chosen) -> Tensor:
    """Each image query's mass on the image goes to its own token; its mass on the text stays (spec. 4.1).

    One attention over values that are 0 on the image and carry the image's mass in one more channel.
    """
    start, stop = chosen.image
    own = chosen.value[:, start:stop]
    if (start, stop) == (0, chosen.value.shape[1]):
        return own
    size = own.shape[-1]
    value = F.pad(chosen.value, (0, _PADDING))
    mass = torch.zeros_like(value)
    mass[:, start:stop, :, size] = 1.0
    inside = torch.zeros(value.shape[1], dtype=torch.bool, device=value.device)
    inside[start:stop] = True
    value = torch.where(inside[:, None, None], mass, value)
    # Queries and keys get channels of zeros, which change no score, as kernels want one size for all.
    query, key = (F.pad(part, (0, _PADDING)) for part in (chosen.query[:, start:stop], chosen.key))
    out: Any = attend(
        query,
        key,
        value,
        attn_mask=chosen.rows_mask(chosen.image),
        scale=chosen.scaled,
        backend=chosen.backend,
    )
    return out[..., :size] + out[..., size : size + 1] * own


def image_block_logit(chosen: Chosen) -> Tensor:
    """Each image query chooses between the text and its own token alone (spec. 4.1; diffusers' PAG of SD3).

    The text part is an attention over the text; how much of the row goes to the token itself is a sigmoid of
    its score against the text's log-sum-exp.
    """
    start, stop = chosen.image
    own, query = chosen.value[:, start:stop], chosen.query[:, start:stop]
    length = chosen.value.shape[1]
    if (start, stop) == (0, length):
        return own
    mask = chosen.rows_mask(chosen.image)

    def text(part: Tensor, dim: int) -> Tensor:
        return torch.cat([part.narrow(dim, 0, start), part.narrow(dim, stop, length - stop)], dim=dim)

    key, value = text(chosen.key, 1), text(chosen.value, 1)
    mask = None if mask is None else text(mask, 3)
    if mask is not None and mask.dtype == torch.bool:
        # A row without any valid text would be NaN in some kernels; its text part gets no weight below.
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(
            ~mask, torch.finfo(query.dtype).min
        )
    out: Any = attend(query, key, value, attn_mask=mask, scale=chosen.scaled, backend=chosen.backend)
    share = torch.sigmoid(
        _self_score(query, chosen.key[:, start:stop], chosen.scaled)
        - logsumexp_of(query, key, chosen.scaled, mask)
    )
    return torch.lerp(out, own, share.transpose(1, 2)[..., None].to(out.dtype))


def spherical_weight(u: Tensor, chosen: Chosen, rows: tuple[int, int]) -> Tensor:
    """(B, S', H) strength of each query along the arc between the roots of A and I (spec. 4.2).

    It is SoftPAG with 1 - (sin((1 - u) t) / sin t)^2 in place of u, where t = arccos sqrt(A_ii).

    Args:
        u: (B, H).
    """
    query = chosen.query[:, rows[0] : rows[1]]
    score = _self_score(query, chosen.key[:, rows[0] : rows[1]], chosen.scaled)
    mask = chosen.rows_mask(rows)
    if mask is not None:
        index = torch.arange(rows[0], rows[1], device=mask.device)
        across = torch.zeros_like(index) if mask.shape[-2] == 1 else index - rows[0]
        own = mask[..., across, index]  # (B or 1, H or 1, S')
        score = score.masked_fill(~own, float("-inf")) if own.dtype == torch.bool else score + own
    own_mass = torch.exp(score - logsumexp_of(query, chosen.key, chosen.scaled, mask)).clamp(0.0, 1.0)
    angle = torch.arccos(own_mass.sqrt())
    strength = u[..., None].to(angle.dtype)
    sine = angle.sin()
    left = torch.where(sine > 1e-6, ((1 - strength) * angle).sin() / sine.clamp(min=1e-6), 1 - strength)
    return (1 - left.square()).transpose(1, 2)


def _self_score(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """(B, H, S) score of each token with itself."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return (query.to(wide) * key.to(wide)).sum(-1).transpose(1, 2) * scale
