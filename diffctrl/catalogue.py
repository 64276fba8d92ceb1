"""The model families by name, readable without importing torch or diffusers. A test compares it with the classes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FamilyEntry:
    """What `diffctrl info` prints of a family.

    Attributes:
        title: the models, for people.
        model: the denoiser's class in diffusers.
    """

    title: str
    model: str


FAMILIES: dict[str, FamilyEntry] = {
    "sd3": FamilyEntry("Stable Diffusion 3 / 3.5", "SD3Transformer2DModel"),
}
