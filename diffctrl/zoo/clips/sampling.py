"""Draws the numbers of clips, always on the CPU: the same (seed, index) is the same on every machine.

Speeds are per frame and do not depend on the length of a clip, so a longer clip shows more of the same world;
only the long-range forms (behind the wall, there and back, one motion then another) span a clip whatever its
length. A move that would leave the picture stops before.
"""

import math

import numpy as np
import torch

from diffctrl.zoo.worlds.vocabulary import BACKGROUND_RGB, COLOUR_RGB

from . import vocabulary as v
from .scenes import Clips

Array = np.ndarray
SPLITS = ("train", "test", "heldout")
FORM_SHARES = (0.46, 0.18, 0.16, 0.12, 0.08)
"""Of FORMS. 36 % long-range items, more than a user asks for: they are the hard ones."""
TEXTURE_SHARES = (0.55, 0.15, 0.15, 0.15)
MARGIN = 0.05  # of the side: between an object and the frame
TILT = math.radians(12)

# (slow, quick) ranges per frame; the gaps keep the classes apart.
MOVE = ((0.008, 0.011), (0.017, 0.023))
BOUNCE = ((1 / 18, 1 / 15), (1 / 9, 1 / 7.5))
ORBIT = ((math.radians(7), math.radians(9)), (math.radians(15), math.radians(19)))
TURN = ((math.radians(2.4), math.radians(3.2)), (math.radians(5.6), math.radians(7.2)))
GROWTH = ((0.0022, 0.0028), (0.0048, 0.0060))
RATES = {
    **dict.fromkeys(range(4), MOVE),
    v.BOUNCES: BOUNCE,
    v.ORBITS: ORBIT,
    v.CLOCKWISE: TURN,
    v.COUNTERCLOCKWISE: TURN,
    v.GROWS: GROWTH,
    v.SHRINKS: GROWTH,
    v.STILL: ((0.0, 0.0), (0.0, 0.0)),
}
LARGE_AT_MOST, SMALL_AT_LEAST = (0.26, 0.155), (0.085, 0.075)  # alone, in a lane
_ALONE = np.arange(11)
_SIDEWAYS = np.array([v.LEFT, v.RIGHT, v.BOUNCES, *range(v.CLOCKWISE, 11)])  # in a lane from left to right
_UPRIGHT = np.array([v.UP, v.DOWN, v.BOUNCES, *range(v.CLOCKWISE, 11)])
_HELD_OUT = np.array(
    [
        (colour, shape, motion)
        for motion in range(11)
        for shape in range(len(v.SHAPES))
        for colour in range(8)
        if v.held_out(colour, shape, motion)
        and not (shape == 0 and motion in (v.CLOCKWISE, v.COUNTERCLOCKWISE))
    ]
)


def sample(
    count: int,
    *,
    seed: int,
    index: int = 0,
    frames: int = 33,
    split: str = "train",
    forms: tuple[str, ...] | None = None,
) -> Clips:
    """Draw `count` clips; the same arguments give the same clips.

    Args:
        count: number of clips.
        seed, index: the stream and the batch within it, both non-negative.
        frames: length of every clip, at least 17.
        split: "train"; "test", the same distribution from another stream; or "heldout", single objects with a
            (colour, shape, motion) triple that the other two never contain.
        forms: allowed FORMS; all of them when None.

    Returns:
        Clips on the CPU.
    """
    allowed = v.FORMS if forms is None else tuple(forms)
    if split not in SPLITS or not allowed or not set(allowed) <= set(v.FORMS):
        raise ValueError(
            f"split must be one of {SPLITS} and forms out of {v.FORMS}, got {split!r} and {forms!r}"
        )
    if count < 1 or seed < 0 or index < 0 or frames < 17:
        raise ValueError(
            f"count must be positive, seed and index not negative, frames at least 17; got {count}, {seed}, "
            f"{index}, {frames}"
        )
    # The length is in the key: clips of another length are others, not stretched ones.
    key = np.array([seed, (index * len(SPLITS) + SPLITS.index(split)) * 65536 + frames], dtype=np.uint64)
    rng = np.random.Generator(np.random.Philox(key=key))
    share = np.array([FORM_SHARES[v.FORMS.index(name)] for name in allowed])
    form = rng.choice([v.FORMS.index(name) for name in allowed], count, p=share / share.sum())
    if split == "heldout":
        form[:] = v.PLAIN
    upright = rng.random(count) < 0.5
    values = _attributes(rng, form, upright, held_out=split == "heldout")
    _move(rng, values, frames)
    return _pack(frames, values)


def _attributes(rng: np.random.Generator, form: Array, upright: Array, *, held_out: bool) -> dict[str, Array]:
    rows, pair = len(form), (len(form), v.MAX_OBJECTS)
    is_pair = (form == v.PAIR)[:, None]
    background = rng.integers(0, 6, rows)
    walled = form == v.WALL
    # A gray wall on a gray ground would not be seen.
    background = np.where(
        walled & (background == v.GRAY), (background + 1 + rng.integers(0, 5, rows)) % 6, background
    )
    motion = _ALONE[rng.integers(0, len(_ALONE), pair)]
    lane = np.where(
        upright[:, None],
        _UPRIGHT[rng.integers(0, len(_UPRIGHT), pair)],
        _SIDEWAYS[rng.integers(0, len(_SIDEWAYS), pair)],
    )
    motion = np.where(is_pair, lane, motion)
    motion = np.where(walled[:, None], rng.integers(0, 2, pair), motion)
    motion = np.where(np.isin(form, (v.BACK, v.THEN))[:, None], rng.integers(0, 4, pair), motion)
    across = np.where(motion < 2, rng.integers(2, 4, pair), rng.integers(0, 2, pair))
    values = {
        "form": form,
        "upright": upright,
        "count": np.where(form == v.PAIR, 2, 1),
        "background": background,
        "texture": rng.choice(len(v.TEXTURES), rows, p=TEXTURE_SHARES),
        "freedom": rng.random((rows, 16)),
        "shape": rng.integers(0, len(v.SHAPES), pair),
        "colour": rng.integers(0, 8, pair),
        "motion": motion,
        "then": np.where((form == v.THEN)[:, None], across, -1),
        "class": rng.integers(0, 2, pair),
    }
    if held_out:
        chosen = _HELD_OUT[rng.integers(0, len(_HELD_OUT), rows)]
        values["colour"][:, 0], values["shape"][:, 0], values["motion"][:, 0] = chosen.T
    _settle(rng, values, fixed=held_out)
    timed = np.isin(form, (v.WALL, v.BACK, v.THEN))[:, None] | (values["motion"] == v.STILL)
    values["speed"] = np.where(timed, -1, values["class"])
    tones = np.asarray(BACKGROUND_RGB)[background] + rng.uniform(-0.02, 0.02, (rows, 1, 3))
    values["tones"] = np.clip(tones, 0, 1)
    values["rgb"] = np.clip(
        np.asarray(COLOUR_RGB)[values["colour"]] + rng.uniform(-0.03, 0.03, (*pair, 3)), 0, 1
    )
    return values


def _settle(rng: np.random.Generator, values: dict[str, Array], *, fixed: bool) -> None:
    """Redraw until no circle rotates, no triple is held out, and two objects differ in colour."""
    shape, colour, motion = values["shape"], values["colour"], values["motion"]
    while True:
        unseen = (shape == 0) & np.isin(motion, (v.CLOCKWISE, v.COUNTERCLOCKWISE))
        bad = unseen | ((colour + 3 * shape + 7 * motion) % 20 == 0)
        if fixed:
            bad[:, 0] = False
        bad[:, 1] |= colour[:, 0] == colour[:, 1]
        rows, columns = np.nonzero(bad)
        if not len(rows):
            return
        colour[rows, columns] = rng.integers(0, 8, len(rows))
        shape[rows, columns] = rng.integers(0, len(v.SHAPES), len(rows))


def _move(rng: np.random.Generator, values: dict[str, Array], frames: int) -> None:
    """Add size, place, rate, reach, phase and the wall."""
    form, motion = values["form"][:, None], values["motion"]
    pair = motion.shape
    lane = form == v.PAIR

    def between(low: Array | float, high: Array | float) -> Array:
        return low + rng.random(pair) * (np.maximum(high, low) - low)

    table = np.array([RATES[name] for name in range(len(v.MOTIONS))])[motion, values["class"]]
    rate = between(table[..., 0], table[..., 1])
    most = np.where(lane, LARGE_AT_MOST[1], LARGE_AT_MOST[0])
    least = np.where(lane, SMALL_AT_LEAST[1], SMALL_AT_LEAST[0])
    radius = np.where(lane, between(0.095, 0.12), between(0.12, 0.17))
    radius = np.where(motion == v.ORBITS, between(0.09, 0.115), radius)
    radius = np.where(form == v.WALL, between(0.085, 0.1), radius)
    radius = np.where(motion == v.GROWS, between(least, least * 1.15), radius)
    radius = np.where(motion == v.SHRINKS, between(most * 0.88, most), radius)
    growth = np.minimum(rate * (frames - 1), np.where(motion == v.GROWS, most - radius, radius - least))
    widest = radius + np.where(motion == v.GROWS, growth, 0)
    # The box of each centre: the whole picture, or one half of it where there are two objects.
    half = np.arange(v.MAX_OBJECTS) ^ rng.integers(0, 2, (pair[0], 1))
    box = np.zeros((*pair, 2, 2))
    box[..., 1] = 1
    narrow = (~values["upright"]).astype(int)  # the axis that the lanes divide
    row, column = np.indices(pair)
    box[row, column, narrow[:, None], 0] = np.where(lane, half * 0.5, 0)
    box[row, column, narrow[:, None], 1] = np.where(lane, half * 0.5 + 0.5, 1)
    low = box[..., 0] + (widest + MARGIN)[..., None]
    high = box[..., 1] - (widest + MARGIN)[..., None]
    room = high - low
    start = low + rng.random((*pair, 2)) * room
    axis = np.where(motion < 2, 0, 1)
    along = room[row, column, axis]
    way = np.minimum(rate * (frames - 1), along)
    way = np.where(form == v.BACK, along * between(0.62, 0.95), way)
    way = np.where(form == v.THEN, along * between(0.62, 0.85), way)
    way = np.where(form == v.WALL, along, way)
    for moves, order in ((motion < 4, motion), (form == v.THEN, values["then"])):
        axis, forward = np.where(order < 2, 0, 1), order % 2 == 1
        first, last = low[row, column, axis], high[row, column, axis] - way
        begin = np.where(forward, between(first, last), between(first + way, last + way))
        start[row, column, axis] = np.where(moves, begin, start[row, column, axis])
    height = np.minimum(room[..., 1] * between(0.8, 1.0), 0.5)
    bounces, orbits = motion == v.BOUNCES, motion == v.ORBITS
    start[..., 1] = np.where(bounces, between(low[..., 1] + height, high[..., 1]), start[..., 1])
    start = np.where(orbits[..., None], 0.5 + rng.uniform(-0.04, 0.04, (*pair, 2)), start)
    reach = np.where(np.isin(motion, (v.GROWS, v.SHRINKS)), growth, way)
    reach = np.where(bounces, height, np.where(orbits, between(0.21, 0.26), reach))
    rate = np.where(orbits & (rng.random(pair) < 0.5), -rate, rate)
    width, middle = rng.uniform(0.30, 0.34, len(form)), 0.5 + rng.uniform(-0.02, 0.02, len(form))
    wall = np.stack([middle - width / 2, middle + width / 2], 1)
    values.update(
        x=start[..., 0],
        y=start[..., 1],
        radius=radius,
        angle=rng.uniform(-TILT, TILT, pair),
        rate=rate,
        reach=reach,
        phase=rng.uniform(0, 2 * math.pi, pair),
        wall=np.where(form == v.WALL, wall, -1.0),
    )


def _pack(frames: int, values: dict[str, Array]) -> Clips:
    integers = ("form", "count", "background", "texture", "shape", "colour", "motion", "then", "speed")
    floats = ("tones", "freedom", "wall", "rgb", "x", "y", "radius", "angle", "rate", "reach", "phase")
    return Clips(
        frames=frames,
        **{name: torch.from_numpy(np.ascontiguousarray(values[name], dtype=np.int64)) for name in integers},
        **{name: torch.from_numpy(np.ascontiguousarray(values[name], dtype=np.float32)) for name in floats},
    )
