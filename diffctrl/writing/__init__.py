"""From a request to a text and its file: recipes, checks before any weights are loaded, the answer."""

from diffctrl.writing.recipe import TextRecipe, Written

__all__ = ["TextRecipe", "Written"]
