"""Draws the numbers of scenes, always on the CPU: the same (seed, index) is the same on every machine."""

import math

import numpy as np
import torch

from . import sdf
from .scenes import Scenes
from .vocabulary import (
    BACKGROUND_RGB,
    COLOUR_RGB,
    HELD_OUT,
    IN_FRONT_OF,
    MAX_OBJECTS,
)

Array = np.ndarray
SPLITS = ("train", "test", "heldout")
WORLDS = ("mixed", "shapes", "characters")
SHAPES_SHARE = 0.6
COUNT_SHARES = (0.45, 0.40, 0.15)
TEXTURE_SHARES = (0.40, 0.15, 0.15, 0.15, 0.15)
MARGIN = 0.045  # of the side: between an object and the frame, with room for the tips of an outline
GAP = 0.07  # between two objects that are not meant to overlap: wider than two outlines or soft edges
SMALL, LARGE = (0.105, 0.125), (0.17, 0.21)
SIDEWAYS = 0.45  # a relation keeps |offset across| <= 0.45 |offset along|: nobody doubts the direction
TILT = math.radians(13)  # a larger turn would make a square a diamond
HELD_OUT_TABLE = np.zeros((8, 8, 3), dtype=bool)
for _triple in HELD_OUT:
    HELD_OUT_TABLE[_triple] = True


def sample(
    count: int,
    *,
    seed: int,
    index: int = 0,
    world: str = "mixed",
    split: str = "train",
    objects: int | tuple[int, ...] | None = None,
) -> Scenes:
    """Draw `count` scenes; the same arguments give the same scenes.

    Args:
        count: number of scenes.
        seed, index: the stream and the batch within it, both non-negative.
        world: "shapes", "characters", or "mixed" (60 % shapes).
        split: "train"; "test", the same distribution from another stream; or "heldout", shape scenes with a
            (colour, shape, pattern) triple that the other two never contain.
        objects: allowed numbers of objects, out of 1, 2, 3; all of them when None.

    Returns:
        Scenes on the CPU.
    """
    if world not in WORLDS or split not in SPLITS:
        raise ValueError(
            f"world must be one of {WORLDS} and split one of {SPLITS}, got {world!r} and {split!r}"
        )
    if split == "heldout" and world == "characters":
        raise ValueError("split 'heldout' is about shapes: use world 'shapes' or 'mixed', not 'characters'")
    allowed = (1, 2, 3) if objects is None else (objects,) if isinstance(objects, int) else tuple(objects)
    if not allowed or not set(allowed) <= {1, 2, 3}:
        raise ValueError(f"objects must be out of 1, 2, 3, got {objects!r}")
    if count < 1 or seed < 0 or index < 0:
        raise ValueError(f"count must be positive, seed and index not negative; got {count}, {seed}, {index}")
    key = np.array([seed, index * len(SPLITS) + SPLITS.index(split)], dtype=np.uint64)
    rng = np.random.Generator(np.random.Philox(key=key))
    share = np.array([COUNT_SHARES[number - 1] for number in allowed])
    number = rng.choice(allowed, count, p=share / share.sum())
    is_character = rng.random(count) >= SHAPES_SHARE
    if world != "mixed" or split == "heldout":
        is_character[:] = world == "characters"
        world = "characters" if world == "characters" else "shapes"
    values = _attributes(rng, number, is_character, split)
    _place(rng, values, number, is_character)
    return _pack(world, is_character, number, values)


def _attributes(rng: np.random.Generator, number: Array, is_character: Array, split: str) -> dict[str, Array]:
    rows = len(number)
    pair = (rows, MAX_OBJECTS)
    kind = is_character[:, None]
    relation = np.where(is_character, rng.integers(0, 2, rows), rng.integers(0, 5, rows))
    values = {
        "background": rng.integers(0, 6, rows),
        "texture": rng.choice(5, rows, p=TEXTURE_SHARES),
        "style": np.where(is_character, 0, rng.integers(0, 4, rows)),
        "relation": np.where(number == 2, relation, -1),
        "freedom": rng.random((rows, 16)),
        "shift": rng.uniform(-1, 1, rows),
        "shape": np.where(kind, rng.integers(0, 6, pair), rng.integers(0, 8, pair)),
        "colour": rng.integers(0, 8, pair),
        "pattern": rng.choice(3, pair, p=(0.4, 0.3, 0.3)),
        "hat": rng.integers(0, 4, pair),
        "eyes": rng.integers(0, 2, pair),
        "action": rng.integers(0, 3, pair),
        "mirror": np.where(rng.random(pair) < 0.5, -1.0, 1.0),
        "tone_jitter": rng.uniform(-0.02, 0.02, (rows, 1, 3)),
    }
    _settle_triples(rng, values, number, is_character, split)
    # A hat of the body's colour could not be told from the body.
    values["hat_colour"] = (values["colour"] + rng.integers(1, 8, pair)) % 8
    for name in ("colour", "hat_colour"):
        jitter = rng.uniform(-0.03, 0.03, (*pair, 3))
        values[f"{name}_rgb"] = np.clip(np.asarray(COLOUR_RGB)[values[name]] + jitter, 0, 1)
    return values


def _settle_triples(
    rng: np.random.Generator, values: dict[str, Array], number: Array, is_character: Array, split: str
) -> None:
    """Redraw objects until the split's rule on triples holds and no two objects of a scene are confusable."""
    shape, colour, pattern = values["shape"], values["colour"], values["pattern"]
    fixed = np.zeros(len(number), dtype=np.int64)
    if split == "heldout":
        chosen = np.asarray(HELD_OUT)[rng.integers(0, len(HELD_OUT), len(number))]
        colour[:, 0], shape[:, 0], pattern[:, 0] = chosen.T
        fixed[:] = 1
    while True:
        bad = HELD_OUT_TABLE[colour, np.minimum(shape, 7), pattern] & ~is_character[:, None]
        bad[fixed == 1, 0] = False
        for first in range(MAX_OBJECTS):
            for second in range(first + 1, MAX_OBJECTS):
                same = colour[:, first] == colour[:, second]
                # One colour for two overlapping objects would leave no edge between them; one colour and one
                # shape would leave nothing to call them by.
                overlap = values["relation"] == IN_FRONT_OF
                bad[:, second] |= same & (overlap | (shape[:, first] == shape[:, second]))
        rows, columns = np.nonzero(bad)
        if not len(rows):
            return
        colour[rows, columns] = rng.integers(0, 8, len(rows))
        pattern[rows, columns] = rng.choice(3, len(rows), p=(0.4, 0.3, 0.3))
        shape[rows, columns] = rng.integers(0, np.where(is_character[rows], 6, 8))


def _place(rng: np.random.Generator, values: dict[str, Array], number: Array, is_character: Array) -> None:
    """Add size, x, y, radius and angle."""
    rows = len(number)
    pair = (rows, MAX_OBJECTS)
    # Three objects: one large at most, or they would not fit.
    large = rng.random(pair) < 0.5
    crowded = np.arange(MAX_OBJECTS) == rng.integers(0, MAX_OBJECTS, (rows, 1))
    large = np.where((number == 3)[:, None], large & crowded, large)
    radius = np.where(large, rng.uniform(*LARGE, pair), rng.uniform(*SMALL, pair))
    figure = np.array([(0.20, 0.30), (0.185, 0.225), (0.144, 0.150)])[number - 1]
    figure_radius = figure[:, :1] + rng.random(pair) * (figure[:, 1:] - figure[:, :1])
    radius = np.where(is_character[:, None], figure_radius, radius)
    tilt = rng.uniform(-TILT, TILT, pair)
    # A character that lies is turned by a quarter to the side that its mirror says.
    quarter = np.where(is_character[:, None] & (values["action"] == 2), values["mirror"] * math.pi / 2, 0.0)
    values.update(
        size=large.astype(np.int64),
        radius=radius,
        angle=tilt * np.where(is_character, 0.7, 1)[:, None] + quarter,
    )
    low, high = radius + MARGIN, 1 - radius - MARGIN
    x, y = rng.uniform(low, high), rng.uniform(low, high)
    values.update(x=x, y=y)
    _place_pairs(rng, values, number == 2)
    overlapping = np.nonzero((number == 2) & (values["relation"] == IN_FRONT_OF))[0]
    if len(overlapping):
        _place_overlap(rng, values, overlapping)
    _place_rows(rng, values, np.nonzero((number == 3) & is_character)[0])
    _place_three(rng, values, np.nonzero((number == 3) & ~is_character)[0])


def _place_pairs(rng: np.random.Generator, values: dict[str, Array], chosen: Array) -> None:
    """Left of, right of, above, below: apart along one axis, nearly level on the other."""
    radius, relation = values["radius"], values["relation"]
    rows = len(relation)
    reach = radius[:, 0] + radius[:, 1]
    free = 1 - 2 * MARGIN - reach
    nearest = reach + np.minimum(GAP, free - reach)
    along = nearest + rng.random(rows) * (free - nearest)
    before = np.where((relation == 0) | (relation == 2), 0, 1)  # which object comes first along the axis
    row = np.arange(rows)
    first_radius = radius[row, before]
    start = MARGIN + first_radius + rng.random(rows) * (free - along)
    axis = np.empty((rows, 2))
    axis[row, before], axis[row, 1 - before] = start, start + along
    low, high = radius + MARGIN, 1 - radius - MARGIN
    across = rng.uniform(low, high)[:, :2]
    offset = rng.uniform(-SIDEWAYS, SIDEWAYS, rows) * along
    across[:, 1] = np.clip(across[:, 0] + offset, low[:, 1], high[:, 1])
    sideways = np.clip(across[:, 1] - across[:, 0], -SIDEWAYS * along, SIDEWAYS * along)
    across[:, 0] = across[:, 1] - sideways
    horizontal = relation < 2
    for place in range(2):
        new_x = np.where(horizontal, axis[:, place], across[:, place])
        new_y = np.where(horizontal, across[:, place], axis[:, place])
        values["x"][:, place] = np.where(chosen, new_x, values["x"][:, place])
        values["y"][:, place] = np.where(chosen, new_y, values["y"][:, place])


def _place_overlap(rng: np.random.Generator, values: dict[str, Array], rows: Array, steps: int = 16) -> None:
    """In front of: object 0 covers 15-35 % of object 1. Which distance does that is searched."""
    direction = rng.uniform(0, 2 * math.pi, len(rows))
    goal = rng.uniform(0.17, 0.33, len(rows))
    reach = values["radius"][rows, :2].sum(1)
    candidates = np.linspace(0.25, 1.0, steps)
    covered = np.stack(
        [_covered_share(values, rows, share * reach, direction) for share in candidates], axis=1
    )
    best = np.abs(covered - goal[:, None]).argmin(1)
    apart = candidates[best] * reach
    offset = np.stack([np.cos(direction), np.sin(direction)], 1) * apart[:, None]
    radius = values["radius"][rows]
    for axis, name in enumerate("xy"):
        back_low = np.maximum(MARGIN + radius[:, 1], MARGIN + radius[:, 0] - offset[:, axis])
        back_high = np.minimum(1 - MARGIN - radius[:, 1], 1 - MARGIN - radius[:, 0] - offset[:, axis])
        back = back_low + rng.random(len(rows)) * (back_high - back_low)
        values[name][rows, 1] = back
        values[name][rows, 0] = back + offset[:, axis]


def _covered_share(values: dict[str, Array], rows: Array, apart: Array, direction: Array) -> Array:
    """Share of object 1 that object 0 covers when it sits `apart` in `direction`: (len(rows),)."""
    line = torch.linspace(-1, 1, 19)
    y, x = (grid[None] for grid in torch.meshgrid(line, line, indexing="ij"))
    part = {
        name: torch.from_numpy(values[name][rows])[:, :2, None, None].to(x.dtype if name != "shape" else None)
        for name in ("shape", "radius", "angle")
    }
    ratio = part["radius"][:, 1] / part["radius"][:, 0]
    step = torch.from_numpy(apart / values["radius"][rows, 0]).float()[:, None, None]
    heading = torch.from_numpy(direction).float()[:, None, None]
    frames = ((x * ratio - step * torch.cos(heading), y * ratio - step * torch.sin(heading)), (x, y))
    inside = []
    for place, (px, py) in enumerate(frames):
        cosine, sine = torch.cos(part["angle"][:, place]), torch.sin(part["angle"][:, place])
        turned = sdf.shape_distances(px * cosine + py * sine, py * cosine - px * sine)
        inside.append(sdf.select(turned, part["shape"][:, place]) < 0)
    both = (inside[0] & inside[1]).float().mean((1, 2))
    return (both / inside[1].float().mean((1, 2))).numpy()


def _place_rows(rng: np.random.Generator, values: dict[str, Array], rows: Array) -> None:
    """Three characters stand in one row with random gaps, each at its own height."""
    if not len(rows):
        return
    order = rng.permuted(np.tile(np.arange(MAX_OBJECTS), (len(rows), 1)), axis=1)
    radius = np.take_along_axis(values["radius"][rows], order, 1)
    margin, gap = 0.015, 0.02
    free = 1 - 2 * margin - 2 * gap - 2 * radius.sum(1)
    cuts = np.sort(rng.random((len(rows), MAX_OBJECTS)), axis=1) * free[:, None]
    x = margin + np.cumsum(2 * radius, 1) - radius + cuts + gap * np.arange(MAX_OBJECTS)
    values["x"][rows[:, None], order] = x


def _place_three(rng: np.random.Generator, values: dict[str, Array], rows: Array) -> None:
    """Three shapes: redraw the places until no two come close."""
    while len(rows):
        radius = values["radius"][rows]
        low, high = radius + MARGIN, 1 - radius - MARGIN
        x, y = rng.uniform(low, high), rng.uniform(low, high)
        clear = np.ones(len(rows), dtype=bool)
        for first, second in ((0, 1), (0, 2), (1, 2)):
            apart = np.hypot(x[:, first] - x[:, second], y[:, first] - y[:, second])
            clear &= apart > radius[:, first] + radius[:, second] + 0.05
        values["x"][rows[clear]], values["y"][rows[clear]] = x[clear], y[clear]
        rows = rows[~clear]


def _pack(world: str, is_character: Array, number: Array, values: dict[str, Array]) -> Scenes:
    def whole(name: str) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values[name], dtype=np.int64))

    def real(name: str) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values[name], dtype=np.float32))

    values["tones"] = np.clip(np.asarray(BACKGROUND_RGB)[values["background"]] + values["tone_jitter"], 0, 1)
    integers = ("background", "texture", "style", "relation", "shape", "colour", "pattern", "size", "hat")
    floats = ("tones", "freedom", "shift", "x", "y", "radius", "angle", "mirror")
    return Scenes(
        world=world,
        character=torch.from_numpy(is_character),
        count=torch.from_numpy(number.astype(np.int64)),
        rgb=real("colour_rgb"),
        hat_rgb=real("hat_colour_rgb"),
        **{name: whole(name) for name in (*integers, "hat_colour", "eyes", "action")},
        **{name: real(name) for name in floats},
    )
