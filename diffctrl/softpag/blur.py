"""Gaussian blur of queries over their token grid (SEG, arXiv 2408.00760), as two small matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def half_width(size: int, sigma: float) -> int:
    """Tokens on each side that the blur reads: 6 sigma rounded up to odd, cut to what can be reflected."""
    full = math.ceil(6 * sigma)
    full += 1 - full % 2
    return min(full // 2, size - 1)


def blur_matrix(size: int, sigma: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(size, size) rows of a Gaussian with reflected borders; each row sums to 1."""
    half = half_width(size, sigma)
    offsets = torch.arange(-half, half + 1, device=device)
    kernel = torch.exp(-0.5 * (offsets.to(dtype) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    places = (torch.arange(size, device=device)[:, None] + offsets).abs()  # reflected at the first token
    places = torch.where(places >= size, 2 * (size - 1) - places, places)  # and at the last one
    return torch.zeros(size, size, dtype=dtype, device=device).scatter_add_(
        1, places, kernel.expand(size, -1).contiguous()
    )


def blurred(query: Tensor, grid: tuple[int, int, int], sigma: float) -> Tensor:
    """Each frame's queries, blurred over rows and columns.

    Args:
        query: (B, F * rows * columns, H, D), in row-major order of the grid.
        grid: (frames, rows, columns).
        sigma: standard deviation in tokens.
    """
    frames, rows, columns = grid
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    cells = query.unflatten(1, (frames, rows, columns)).to(wide)
    down = blur_matrix(rows, sigma, wide, query.device)
    across = blur_matrix(columns, sigma, wide, query.device)
    cells = torch.einsum("yr,bfrchd->bfychd", down, cells)
    cells = torch.einsum("xc,bfychd->bfyxhd", across, cells)
    return cells.flatten(1, 3).to(query.dtype)
