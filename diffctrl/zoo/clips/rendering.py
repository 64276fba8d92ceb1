"""Draws clips with the renderer of the pictures, frame by frame, and the wall over them."""

import torch
from torch import Tensor

from diffctrl.zoo import worlds

from .scenes import Clips, poses
from .vocabulary import MAX_OBJECTS, PICTURE_SHAPE, WALL_RGB


def render(clips: Clips, size: int = 64, times: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Draw a batch of clips on the clips' device.

    Args:
        clips: B clips.
        size: side in pixels.
        times: (T,) float frame numbers to draw; all frames when None.

    Returns:
        Frames (B, T, 3, H, W) float32 in [0, 1], and visible masks (B, T, 2, H, W) float32 in [0, 1]: what of
        each object can be seen, the wall taken off.
    """
    pose = poses(clips, times)
    length = pose.x.shape[1]
    images, masks = worlds.render(_pictures(clips, length, pose._asdict()), size, places=MAX_OBJECTS)
    images, masks = images.unflatten(0, (-1, length)), masks.unflatten(0, (-1, length))
    centre = torch.arange(size, device=clips.device) + 0.5
    left, right = (clips.wall * size).unbind(1)
    # How much of each pixel column the wall covers.
    cover = torch.minimum(centre - left[:, None], right[:, None] - centre).add(0.5).clamp(0, 1)
    cover = cover[:, None, None, None, :]
    gray = torch.tensor(WALL_RGB, device=clips.device)[:, None, None]
    return images + (gray - images) * cover, masks * (1 - cover)


def _pictures(clips: Clips, length: int, pose: dict[str, Tensor]) -> worlds.Scenes:
    """Every frame as a picture of two flat, plain shapes: (B T) scenes."""

    def repeated(value: Tensor) -> Tensor:
        return value.repeat_interleave(length, 0)

    rows = len(clips) * length
    none = torch.zeros(rows, dtype=torch.int64, device=clips.device)
    nothing = none[:, None].expand(-1, MAX_OBJECTS)
    shapes = torch.tensor(PICTURE_SHAPE, device=clips.device)
    return worlds.Scenes(
        world="shapes",
        character=none.bool(),
        count=repeated(clips.count),
        background=repeated(clips.background),
        texture=repeated(clips.texture),
        style=none,
        relation=none - 1,
        tones=repeated(clips.tones),
        freedom=repeated(clips.freedom),
        shift=none.float(),
        shape=repeated(shapes[clips.shape]),
        colour=repeated(clips.colour),
        rgb=repeated(clips.rgb),
        hat_rgb=repeated(clips.rgb),
        **{name: value.flatten(0, 1) for name, value in pose.items()},
        mirror=nothing.float() + 1,
        **dict.fromkeys(("pattern", "size", "hat", "hat_colour", "eyes", "action"), nothing),
    )
