"""From a request to a picture file: recipes, sources of models, checks before any weights are loaded."""

from diffctrl.drawing.recipe import ControlSpec, Recipe, Weights

__all__ = ["ControlSpec", "Recipe", "Weights"]
