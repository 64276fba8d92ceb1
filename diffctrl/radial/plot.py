"""A picture of a mask."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffctrl.attention import BlockLists
from diffctrl.radial.layout import Layout


def plot(mask: BlockLists, *, layout: Layout | None = None, ax: Any = None) -> Any:
    """Draw which blocks of keys each block of queries attends.

    Args:
        mask: lists shared by all heads and rows; of others, the first head of the first row is drawn.
        layout: draws the borders of frames as well.
        ax: axes of matplotlib to draw on; new ones by default.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ImportError("plot() needs matplotlib: pip install 'diffctrl[plots]'") from None
    if ax is None:
        _, ax = plt.subplots(figsize=(6, 6), layout="constrained")
    grid = mask.to_dense_blocks()[0, 0].numpy()
    lengths, (rows, columns) = mask.lengths, mask.block
    extent = (0, grid.shape[1] * columns, grid.shape[0] * rows, 0)
    ax.imshow(~grid, cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="nearest", aspect="equal")
    if layout is not None:
        borders = layout.offset + np.arange(layout.frames + 1) * layout.tokens
        style = {"color": "tab:red", "linewidth": 0.3, "alpha": 0.7}
        ax.hlines(borders, 0, lengths[1], **style)
        ax.vlines(borders, 0, lengths[0], **style)
    ax.set(
        xlim=(0, lengths[1]),
        ylim=(lengths[0], 0),
        xlabel="key token",
        ylabel="query token",
        title=f"density {mask.density():.3f}, {mask.block[0]} x {mask.block[1]} blocks",
    )
    return ax
