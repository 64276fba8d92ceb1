"""Draws scenes: one vectorised, anti-aliased, pass of signed distances for a whole batch.

Lengths that belong to the drawing and not to an object (outline, soft edge, rim) are in units of 1/128 of the
shorter image side, so a picture keeps its look at every size.
"""

import math

import torch
from torch import Tensor

from . import sdf
from .scenes import Scenes
from .vocabulary import BLACK, DARK_BACKGROUNDS, MAX_OBJECTS, STYLES, WHITE

OUTLINE_OUTSIDE, OUTLINE_INSIDE = 1.6, 0.8
SOFT_RAMP = 6.0
RIM = (
    1.2  # a pattern ends this far inside the edge: the silhouette stays closed on a white or black background
)
STRIPE_PITCH, STRIPE_HALF = 0.64, 0.16
DOT_PITCH, DOT_RADIUS = 0.56, 0.17
BODY_STRIPE_PITCH, BODY_STRIPE_HALF = 0.40, 0.10
BODY_DOT_PITCH, BODY_DOT_RADIUS = 0.36, 0.105
OUTLINED, SOFT, SHADED = STYLES.index("outlined"), STYLES.index("soft"), STYLES.index("shaded")


def _size(size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if height < 8 or width < 8:
        raise ValueError(f"size must be at least 8 pixels on both sides, got {(height, width)}")
    return height, width


def _column(values: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1), to broadcast over pixels."""
    return values[:, None, None]


def _coverage(distance_px: Tensor) -> Tensor:
    return (0.5 - distance_px).clamp(0, 1)


def _over(below: Tensor, colour: Tensor | float, alpha: Tensor) -> Tensor:
    """Blend a colour, (B, 3, 1, 1) or a gray value, over `below` (B, 3, H, W) by `alpha` (B, H, W)."""
    return below + (colour - below) * alpha[:, None]


def texture_mix(texture: Tensor, freedom: Tensor, x: Tensor, y: Tensor, pixel: float) -> Tensor:
    """How much of the second background tone each pixel gets.

    Args:
        texture: (B,) int64. freedom: (B, 16) float in [0, 1).
        x, y: (H, W) or (B, H, W) float, pixel centres in units of the shorter side. pixel: one pixel in that
            unit.

    Returns:
        (B, H, W) float in [0, 1].
    """
    free = freedom[:, :, None, None].unbind(1)
    pitch = 0.11 + 0.05 * free[0]
    # The sawtooth distance to the nearest cell edge, in pixels, gives anti-aliased cells.
    cell_x = (x / (2 * pitch) + free[1]) % 1.0
    cell_y = (y / (2 * pitch) + free[2]) % 1.0
    edge_x = (0.25 - (cell_x - 0.5).abs()) * 2 * pitch / pixel
    edge_y = (0.25 - (cell_y - 0.5).abs()) * 2 * pitch / pixel
    on_x, on_y = (0.5 + edge_x).clamp(0, 1), (0.5 + edge_y).clamp(0, 1)
    checkered = on_x + on_y - 2 * on_x * on_y
    lined = torch.where(free[3] < 0.5, on_x, on_y)
    angle = 2 * math.pi * free[4]
    gradient = (0.5 + 0.9 * ((x - 0.5) * torch.cos(angle) + (y - 0.5) * torch.sin(angle))).clamp(0, 1)
    # Four plane waves: smooth, never periodic, and few numbers, which a small model can learn (a per-pixel
    # noise cannot pass the autoencoder at all).
    noise = torch.zeros_like(gradient)
    for wave in range(4):
        turn = math.pi * (wave + 0.8 * free[5 + wave]) / 4
        cycles = 2 * math.pi * (3.2 + 2.6 * free[9 + wave])
        phase = 2 * math.pi * free[(13 + wave) % 16]
        noise = noise + torch.sin(cycles * (x * torch.cos(turn) + y * torch.sin(turn)) + phase)
    noisy = (0.5 + 0.32 * noise).clamp(0, 1)
    options = (torch.zeros_like(gradient), checkered, gradient, lined, noisy)
    return sdf.select(options, _column(texture))


def _pattern(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    pattern: Tensor,
    stripe: tuple[float, float],
    dot: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """(stripe alpha, dot alpha) of a local frame; `scale` is pixels per unit. Stripes are white, dots black.

    The two patterns differ in tone and not only in form: on a small ring both are a few spots.
    """
    diagonal = (x + y) * math.sqrt(0.5)
    to_stripe = (diagonal - stripe[0] * torch.round(diagonal / stripe[0])).abs() - stripe[1]
    to_dot = torch.hypot(x - dot[0] * torch.round(x / dot[0]), y - dot[0] * torch.round(y / dot[0])) - dot[1]
    striped, dotted = (pattern == 1).to(x.dtype), (pattern == 2).to(x.dtype)
    return _coverage(to_stripe * scale) * striped, _coverage(to_dot * scale) * dotted


def _draw_shape(
    part: dict[str, Tensor], x: Tensor, y: Tensor, scale: Tensor, unit: float
) -> tuple[Tensor, Tensor]:
    """Colour (B, 3, H, W) and coverage (B, H, W) of one shape per scene.

    Args:
        part: one object place of the scenes. x, y: (B, H, W), in radii, upright. scale: pixels per radius.
        unit: pixels in 1/128 of the shorter side.
    """
    turn_x, turn_y = _rotate(x, y, part["angle"])
    distance = sdf.select(sdf.shape_distances(turn_x, turn_y), _column(part["shape"])) * scale
    style = _column(part["style"])
    outlined, soft = style == OUTLINED, style == SOFT
    inside = torch.where(outlined, distance + unit * OUTLINE_INSIDE, distance)
    stripes, dots = _pattern(
        turn_x, turn_y, scale, _column(part["pattern"]), (STRIPE_PITCH, STRIPE_HALF), (DOT_PITCH, DOT_RADIUS)
    )
    interior = _coverage(inside + unit * RIM)
    colour = part["rgb"][:, :, None, None].expand(-1, -1, *distance.shape[1:])
    colour = _over(colour, WHITE, stripes * interior)
    colour = _over(colour, BLACK, dots * interior)
    light = (1.12 - 0.36 * torch.hypot(x + 0.4, y + 0.4)).clamp(0.5, 1.1)
    colour = torch.where((style == SHADED)[:, None], (colour * light[:, None]).clamp(max=1.0), colour)
    dark = torch.tensor(DARK_BACKGROUNDS, device=x.device)[part["background"]]
    ink = torch.where(dark, WHITE, BLACK)[:, None, None, None]
    colour = _over(colour, ink, (1 - _coverage(inside)) * outlined)
    sharp = _coverage(torch.where(outlined, distance - unit * OUTLINE_OUTSIDE, distance))
    return colour, torch.where(soft, (0.5 - distance / (unit * SOFT_RAMP)).clamp(0, 1), sharp)


def _draw_character(
    part: dict[str, Tensor], x: Tensor, y: Tensor, scale: Tensor, unit: float
) -> tuple[Tensor, Tensor]:
    """The same for one character per scene: body with pattern, limbs, eyes, hat."""
    x, y = _rotate(x, y, part["angle"])
    x = x * _column(part["mirror"])
    which = _column(part["shape"])
    tables = torch.tensor((sdf.HAT_LINE, sdf.EYE_LINE, sdf.EYE_OFFSET), dtype=x.dtype, device=x.device)
    hat_line, eye_line, eye_offset = (_column(row[part["shape"] % len(sdf.HAT_LINE)]) for row in tables)
    body = sdf.select(sdf.body_distances(x, y), which) * scale
    limbs = sdf.limb_distance(x, y, _column(part["action"]) == 1) * scale
    hat = sdf.select(sdf.hat_distances(x, y - hat_line), _column(part["hat"])) * scale
    eyes = sdf.eye_distances(x.abs() - eye_offset, y - eye_line)
    white, pupil, lid = (_coverage(distance * scale) for distance in eyes)
    stripes, dots = _pattern(
        x,
        y - eye_line - sdf.DOT_ROW,
        scale,
        _column(part["pattern"]),
        (BODY_STRIPE_PITCH, BODY_STRIPE_HALF),
        (BODY_DOT_PITCH, BODY_DOT_RADIUS),
    )
    interior = _coverage(body + unit * RIM)
    awake = (_column(part["eyes"]) == 0).to(x.dtype)
    colour = part["rgb"][:, :, None, None].expand(-1, -1, *body.shape[1:])
    # A patch of plain body colour around the eyes keeps them readable on a pattern.
    face = 1 - _coverage((eyes[0] - sdf.FACE) * scale)
    colour = _over(colour, WHITE, stripes * interior * face)
    colour = _over(colour, BLACK, dots * interior * face)
    colour = _over(colour, WHITE, white * awake)
    colour = _over(colour, BLACK, torch.where(awake > 0, pupil, lid))
    hat_cover = _coverage(hat)
    colour = _over(colour, part["hat_rgb"][:, :, None, None], hat_cover)
    return colour, torch.maximum(_coverage(torch.minimum(body, limbs)), hat_cover)


def _rotate(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates in a frame that is turned clockwise on the picture by `angle` (B,)."""
    cosine, sine = _column(torch.cos(angle)), _column(torch.sin(angle))
    return x * cosine + y * sine, y * cosine - x * sine


_PLACE = ("shape", "pattern", "hat", "eyes", "action", "rgb", "hat_rgb", "angle", "mirror")


def render(
    scenes: Scenes, size: int | tuple[int, int] = 128, *, places: int = MAX_OBJECTS
) -> tuple[Tensor, Tensor]:
    """Draw a batch of scenes on the scenes' device.

    Args:
        scenes: B scenes.
        size: side in pixels, or (height, width).
        places: object places to draw, N; fewer save time where no scene has more objects.

    Returns:
        Images (B, 3, H, W) float32 in [0, 1], and visible masks (B, N, H, W) float32 in [0, 1]: what of each
        object can be seen; with the visible background they sum to one.
    """
    height, width = _size(size)
    side = min(height, width)
    unit = side / 128
    device = scenes.device
    free_x, free_y = (width - side) / side / 2, (height - side) / side / 2
    grid_x = ((torch.arange(width, device=device) + 0.5) / side - free_x)[None, None, :]
    grid_y = ((torch.arange(height, device=device) + 0.5) / side - free_y)[None, :, None]
    image, remaining, masks = None, None, []
    for place in range(places):
        part = {name: getattr(scenes, name)[:, place] for name in _PLACE}
        part["style"], part["background"] = scenes.style, scenes.background
        scale = _column(scenes.radius[:, place]) * side
        x = (grid_x - _column(scenes.x[:, place] + scenes.shift * free_x)) * side / scale
        y = (grid_y - _column(scenes.y[:, place] + scenes.shift * free_y)) * side / scale
        x, y = torch.broadcast_tensors(x, y)
        colour, cover = _draw(scenes.world, scenes.character, part, x, y, scale, unit)
        cover = cover * _column(scenes.count > place)
        mask = cover if remaining is None else cover * remaining
        image = mask[:, None] * colour if image is None else image + mask[:, None] * colour
        remaining = 1 - cover if remaining is None else remaining * (1 - cover)
        masks.append(mask)
    assert image is not None
    assert remaining is not None
    mix = texture_mix(scenes.texture, scenes.freedom, grid_x, grid_y, 1 / side)
    tones = scenes.tones[:, :, :, None, None]
    background = _over(tones[:, 0].expand(-1, -1, height, width), tones[:, 1], mix)
    return image + remaining[:, None] * background, torch.stack(masks, dim=1)


def _draw(
    world: str, character: Tensor, part: dict[str, Tensor], x: Tensor, y: Tensor, scale: Tensor, unit: float
) -> tuple[Tensor, Tensor]:
    if world == "shapes":
        return _draw_shape(part, x, y, scale, unit)
    if world == "characters":
        return _draw_character(part, x, y, scale, unit)
    shape_colour, shape_cover = _draw_shape(part, x, y, scale, unit)
    figure_colour, figure_cover = _draw_character(part, x, y, scale, unit)
    return (
        torch.where(character[:, None, None, None], figure_colour, shape_colour),
        torch.where(_column(character), figure_cover, shape_cover),
    )
