"""The picture of docs/refam.md: `diffctrl ground` on ten scenes of the referring set, none of them picked.

python -m diffctrl.scripts.grounding_pictures --out docs/pictures/refam.png
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from diffctrl.grounding import plan as planning
from diffctrl.grounding import run
from diffctrl.grounding.overlay import overlay
from diffctrl.zoo import worlds
from diffctrl.zoo.worlds.referring_set import referring_set

SEED = 63_000
# The first scenes of each split.
WANTED = {"colour": 2, "conjunction": 2, "size": 1, "position": 2, "relation": 2, "occlusion": 1}
_COLUMNS, _GAP, _COLOURS = 5, 8, 96
_RIGHT, _WRONG, _PAPER = (40, 150, 60), (200, 40, 40), (250, 250, 250)


def main(arguments: list[str] | None = None) -> list[bool]:
    """Entry point; returns which points lie on their object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=planning.DEFAULT_MODEL)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    tiles, hits, pipe = [], [], None
    with tempfile.TemporaryDirectory() as folder:
        for name, picture, expression, truth in _scenes():
            path = Path(folder) / f"{name}.png"
            picture.save(path)
            request = planning.GroundRequest(image=path, phrases=(expression,), model=options.model)
            plan = planning.make(request)
            pipe = pipe or run.load(plan)
            (found,) = run.ground(plan, pipe)
            x, y = found.point
            hits.append(bool(truth[int(y), int(x)]))
            tiles.append(_framed(overlay(plan.frames[0], found), _RIGHT if hits[-1] else _WRONG))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    _sheet(tiles).quantize(_COLOURS).save(options.out, optimize=True)
    print(f"{options.out}: {sum(hits)} of {len(hits)} points on their object")
    return hits


def _scenes() -> Any:
    """(name, PIL image, expression, (H, W) bool of the target)."""
    from PIL import Image

    for place, (split, number) in enumerate(WANTED.items()):
        made = referring_set(split, number, seed=SEED + place)
        pictures, masks = worlds.render(made.scenes, 128)
        for item in made.items:
            pixels = (pictures[item.scene] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            name = f"{split}-{item.scene}"
            yield name, Image.fromarray(pixels), item.expression, masks[item.scene, item.target] > 0.5


def _framed(picture: Any, colour: tuple[int, int, int]) -> Any:
    from PIL import ImageOps

    return ImageOps.expand(picture, border=3, fill=colour)


def _sheet(tiles: list[Any]) -> Any:
    from PIL import Image

    width, height = max(t.width for t in tiles), max(t.height for t in tiles)
    rows = -(-len(tiles) // _COLUMNS)
    size = (_COLUMNS * (width + _GAP) + _GAP, rows * (height + _GAP) + _GAP)
    sheet = Image.new("RGB", size, _PAPER)
    for index, tile in enumerate(tiles):
        place = (index % _COLUMNS, index // _COLUMNS)
        sheet.paste(tile, (_GAP + place[0] * (width + _GAP), _GAP + place[1] * (height + _GAP)))
    return sheet


if __name__ == "__main__":
    main()
