"""From a picture file and expressions to masks on disk: what `diffctrl ground` does."""
