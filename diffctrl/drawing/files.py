"""Files of pictures and clips, with their recipes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diffctrl.drawing import mp4, png
from diffctrl.drawing.recipe import Recipe

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


def suffix(recipe: Recipe) -> str:
    """The ending of the file's name."""
    return ".png" if recipe.frames is None else ".mp4"


def write(drawn: Image | np.ndarray, path: Path, recipe: Recipe) -> None:
    """Save a picture, or a clip (T, H, W, 3) uint8, with its recipe; an interrupted run leaves nothing."""
    if recipe.frames is None:
        png.write(drawn, path, recipe)  # type: ignore[arg-type]
    else:
        mp4.write(drawn, path, recipe)  # type: ignore[arg-type]


def read_recipe(path: Path) -> Recipe:
    """The recipe in a file of `diffctrl generate`.

    Raises:
        BadRequestError: there is no such file, it cannot be read, or it carries no recipe.
    """
    return (mp4 if path.suffix.lower() == ".mp4" else png).read_recipe(path)
