"""PNG files that carry their recipe, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from diffctrl.drawing.recipe import Recipe
from diffctrl.errors import BadRequestError

if TYPE_CHECKING:
    from PIL.Image import Image

CHUNK = "diffctrl"


def write(image: Image, path: Path, recipe: Recipe) -> None:
    """Save the picture with its recipe; an interrupted run leaves nothing behind."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt(CHUNK, recipe.to_json())
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        image.save(unfinished, format="PNG", pnginfo=info)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_recipe(path: Path) -> Recipe:
    """The recipe in a PNG file. The pixels are not decoded.

    Raises:
        BadRequestError: there is no such file, it is no PNG, or it carries no recipe.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=("PNG",)) as image:
            text = image.info.get(CHUNK)
    except FileNotFoundError:
        raise BadRequestError(f"there is no file {path}") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        raise BadRequestError(f"{path} is not a PNG file that can be read") from None
    if text is None:
        raise BadRequestError(
            f"{path} carries no recipe: `diffctrl generate` did not write it, or it was re-saved"
        )
    try:
        return Recipe.from_json(text)
    except BadRequestError as error:
        raise BadRequestError(f"{path} cannot be repeated: {error}") from None
