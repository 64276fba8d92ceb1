"""What a scene is: integers and floats that the renderer and the captions read."""

from dataclasses import dataclass

from torch import Tensor

from ..batch import TensorBatch, joined


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scenes(TensorBatch):
    """A batch of B scenes with N = 3 object places each; the first axis of every tensor is the scene.

    Positions and radii are fractions of the shorter image side, in the central square of the image, y down.
    Objects are in z-order: object 0 lies in front of object 1, which lies in front of object 2. Object
    places at or past `count` hold arbitrary values and are not drawn.

    Attributes:
        world: "shapes", "characters" or "mixed"; says which drawing code a batch can need.
        character: (B,) bool, a scene of characters (5c) instead of shapes (5a).
        count, background, texture, style, relation: (B,) int64. `relation` holds between objects 0 and 1,
            and is -1 unless the scene has two objects.
        tones: (B, 2, 3) float, both background tones. freedom: (B, 16) float in [0, 1), the texture's free
        numbers. shift: (B,) float in [-1, 1], where the central square lies on the longer axis of an oblong
        image. shape: (B, N) int64, index into SHAPES, or into BODIES for characters.
        colour, pattern, size, hat, hat_colour, eyes, action: (B, N) int64.
        rgb, hat_rgb: (B, N, 3) float, jittered palette colours.
        x, y, radius, angle, mirror: (B, N) float; angle in radians, clockwise on the picture; mirror is +1
            or -1.
    """

    world: str
    character: Tensor
    count: Tensor
    background: Tensor
    texture: Tensor
    style: Tensor
    relation: Tensor
    tones: Tensor
    freedom: Tensor
    shift: Tensor
    shape: Tensor
    colour: Tensor
    pattern: Tensor
    size: Tensor
    hat: Tensor
    hat_colour: Tensor
    eyes: Tensor
    action: Tensor
    rgb: Tensor
    hat_rgb: Tensor
    x: Tensor
    y: Tensor
    radius: Tensor
    angle: Tensor
    mirror: Tensor


def concatenate(parts: list[Scenes]) -> Scenes:
    """One batch out of several, in their order."""
    if not parts:
        raise ValueError("concatenate needs at least one batch of scenes, got an empty list")
    worlds = {part.world for part in parts}
    return Scenes(world=worlds.pop() if len(worlds) == 1 else "mixed", **joined(parts))
