"""What a clip is, and where its objects are at each frame."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch import TensorBatch, joined
from .vocabulary import (
    BACK,
    BOUNCES,
    CLOCKWISE,
    COUNTERCLOCKWISE,
    DIRECTIONS,
    GROWS,
    ORBITS,
    SHRINKS,
    THEN,
    WALL,
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Clips(TensorBatch):
    """A batch of B clips with N = 2 object places each; the first axis of every tensor is the clip.

    Lengths are fractions of the side, y down; rates are per frame. Object 0 lies in front. Places at or past
    `count` hold arbitrary values and are not drawn.

    Attributes:
        frames: frames of every clip of the batch.
        form, count, background, texture: (B,) int64; `form` is an index into FORMS.
        tones: (B, 2, 3) float, both background tones. freedom: (B, 16) float, the texture's free numbers.
        wall: (B, 2) float, left and right edge of the wall, both negative where there is none.
        shape, colour, motion, then, speed: (B, N) int64; `then` is the second motion of form "then". `speed`
            is an index into SPEEDS, -1 where the motion has none to tell.
        rgb: (B, N, 3) float.
        x, y, radius, angle: (B, N) float at the first frame; of an orbit x and y are the centre. `angle` is
            in radians clockwise.
        rate: (B, N) float: way or growth per frame, bounces per frame, or radians per frame.
        reach: (B, N) float: the longest way, a bounce's height, an orbit's radius, the whole growth.
        phase: (B, N) float: where an orbit starts, radians.
    """

    frames: int
    form: Tensor
    count: Tensor
    background: Tensor
    texture: Tensor
    tones: Tensor
    freedom: Tensor
    wall: Tensor
    shape: Tensor
    colour: Tensor
    motion: Tensor
    then: Tensor
    speed: Tensor
    rgb: Tensor
    x: Tensor
    y: Tensor
    radius: Tensor
    angle: Tensor
    rate: Tensor
    reach: Tensor
    phase: Tensor


def concatenate(parts: list[Clips]) -> Clips:
    """One batch out of several of the same length, in their order."""
    if not parts or len({part.frames for part in parts}) != 1:
        lengths = sorted({part.frames for part in parts})
        raise ValueError(f"concatenate needs clips of one length, got lengths {lengths}")
    return Clips(frames=parts[0].frames, **joined(parts))


class Poses(NamedTuple):
    """(B, T, N) float each: place, radius and angle of every object at every frame."""

    x: Tensor
    y: Tensor
    radius: Tensor
    angle: Tensor


def poses(clips: Clips, times: Tensor | None = None) -> Poses:
    """Where the objects are.

    Args:
        clips: B clips.
        times: (T,) float frame numbers on the clips' device; all frames when None.
    """
    if times is None:
        times = torch.arange(clips.frames, device=clips.device, dtype=clips.x.dtype)
    t = times[None, :, None]
    motion, then, rate, reach = (
        value[:, None] for value in (clips.motion, clips.then, clips.rate, clips.reach)
    )
    form = clips.form[:, None, None]
    part = times[None, :, None] / max(clips.frames - 1, 1)
    way = torch.minimum(rate * t, reach)  # a move ends where it would leave the picture
    way = torch.where(form == BACK, reach * (1 - (2 * part - 1).abs()), way)
    way = torch.where(form == WALL, reach * part, way)
    way = torch.where(form == THEN, reach * (2 * part).clamp(max=1), way)
    after = torch.where(form == THEN, reach * (2 * part - 1).clamp(min=0), torch.zeros_like(way))
    steps = torch.tensor((*DIRECTIONS, (0.0, 0.0)), device=clips.device, dtype=clips.x.dtype)
    first, second = steps[motion.clamp(max=4)], steps[then.clamp(max=4)]
    dx, dy = (way * first[..., axis] + after * second[..., axis] for axis in (0, 1))
    dy = dy - torch.where(motion == BOUNCES, reach * (math.pi * rate * t).sin().abs(), 0.0)
    turn = clips.phase[:, None] + rate * t
    dx = dx + torch.where(motion == ORBITS, reach * turn.cos(), 0.0)
    dy = dy + torch.where(motion == ORBITS, reach * turn.sin(), 0.0)
    turning = (motion == CLOCKWISE).to(dx.dtype) - (motion == COUNTERCLOCKWISE).to(dx.dtype)
    growing = (motion == GROWS).to(dx.dtype) - (motion == SHRINKS).to(dx.dtype)
    return Poses(
        x=clips.x[:, None] + dx,
        y=clips.y[:, None] + dy,
        radius=clips.radius[:, None] + growing * way,
        angle=clips.angle[:, None] + turning * rate * t,
    )
