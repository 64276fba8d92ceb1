"""From a request to a file of a picture or clip: recipes, sources of models, checks before weights load."""

from diffctrl.drawing.recipe import ControlSpec, LoraSpec, Recipe, Weights

__all__ = ["ControlSpec", "LoraSpec", "Recipe", "Weights"]
