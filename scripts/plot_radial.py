"""Draw the mask of Radial Attention for a model and a size.

    python -m diffctrl.scripts.plot_radial --model hunyuan_video --size 720x1280 --frames 129 --out mask.png

Needs matplotlib (`pip install 'diffctrl[plots]'`).
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from diffctrl.radial import Layout, RadialConfig, block_lists, plot, preset
from diffctrl.radial.presets import NATIVE_FRAMES, resolve


@dataclass(frozen=True, slots=True)
class Grid:
    """Pixels along the side of a token, video frames in it, text tokens of a joint sequence."""

    side: int
    frames: int
    text: int = 0
    text_first: bool = False


# Of the published models; CogVideoX as 1.0.
GRIDS = {
    "wan": Grid(16, 4),
    "wan_vace": Grid(16, 4),
    "hunyuan_video": Grid(16, 4, text=256),
    "hunyuan_video15": Grid(16, 4, text=1985),
    "mochi": Grid(16, 6, text=256),
    "cogvideox": Grid(16, 4, text=226, text_first=True),
    "ltx": Grid(32, 8),
}


def layout_of(model: str, height: int, width: int, frames: int) -> Layout:
    """The tokens of a video of this size in a published model."""
    grid = GRIDS[model]
    return Layout(
        frames=(frames - 1) // grid.frames + 1,
        tokens=(height // grid.side) * (width // grid.side),
        text=grid.text,
        text_first=grid.text_first,
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=sorted(NATIVE_FRAMES), default="hunyuan_video")
    parser.add_argument("--size", default="720x1280", help="HEIGHTxWIDTH in pixels")
    parser.add_argument("--frames", type=int, default=129)
    parser.add_argument("--decay-factor", type=float, default=None)
    parser.add_argument("--pattern", choices=("reference", "paper"), default="reference")
    parser.add_argument("--out", type=Path, default=Path("mask.png"))
    options = parser.parse_args(arguments)
    size = re.fullmatch(r"(\d+)x(\d+)", options.size)
    if size is None:
        parser.error(f"--size {options.size} is not HEIGHTxWIDTH, as in 720x1280")
    layout = layout_of(options.model, int(size[1]), int(size[2]), options.frames)
    if layout.frames < 1 or layout.tokens < 1:
        parser.error(f"--size {options.size} with --frames {options.frames} is less than one token")
    config = RadialConfig(pattern=options.pattern, decay_factor=options.decay_factor)
    pattern, _ = resolve(config, preset(options.model, frames=layout.frames))
    lists = block_lists(pattern, layout)
    import matplotlib

    matplotlib.use("Agg")
    ax = plot(lists, layout=layout)
    ax.figure.savefig(options.out, dpi=100)
    print(f"{options.out}: {layout.frames} frames of {layout.tokens} tokens, density {lists.density():.4f}")


if __name__ == "__main__":
    main()
