"""Reads characters: body, limbs and hat from the silhouette, the rest from pixels of the fitted figure."""

import numpy as np
import torch

from diffctrl.zoo.worlds import sdf
from diffctrl.zoo.worlds.facts import ObjectFacts
from diffctrl.zoo.worlds.vocabulary import BODIES, COLOURS, EYES, HATS, PATTERNS

from .ground import Ground
from .pixels import Pixels
from .reading import Instance
from .regions import grow, shrink
from .templates import Match, character_bank, located, overlaps

Array = np.ndarray
LOBES_FROM = -0.12


def match_figure(pixels: Pixels, ground: Ground, region: Array, colours: list[int]) -> Match:
    """The best figure for a silhouette (H, W) whose second colour, if there is one, is the hat's."""
    hat = region & (pixels.colour == colours[1]) if len(colours) > 1 else np.zeros_like(region)
    bank = character_bank()
    scores, place = overlaps(bank, _soft(pixels, ground, region, colours), hat)
    best = int(scores.argmax())
    return located(bank, best, float(scores[best]), place)


def _soft(pixels: Pixels, ground: Ground, region: Array, colours: list[int]) -> Array:
    """The silhouette (H, W) with a soft edge: half a pixel more would hide the lobes of a small body."""
    own = region & (pixels.colour == colours[0])
    strength = float(np.median(ground.distance[own]))
    edge = grow(region) & ~shrink(region)
    return np.where(edge, (ground.distance / strength).clip(0, 1), region.astype(np.float32))


def read_figure(pixels: Pixels, region: Array, colours: list[int], match: Match) -> Instance:
    """One character whose palette colours, body first, and silhouette are known."""
    body, hat, action = match.names
    x, y = match.frame(*region.shape)
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    if body in ("round", "bumpy") and (lobes := _lobes(region, match, x, y)) is not None:
        body = "bumpy" if lobes > LOBES_FROM else "round"
    which = BODIES.index(body)
    hat_area = sdf.hat_distances(x, y - sdf.HAT_LINE[which])[HATS.index(hat)].numpy() * match.radius
    eyes = (
        sdf.eye_distances(x.abs() - sdf.EYE_OFFSET[which], y - sdf.EYE_LINE[which])[0].numpy() * match.radius
    )
    torso = sdf.body_distances(x, y)[which].numpy() * match.radius
    skin = region & (torso < -1.8) & (eyes > sdf.FACE * match.radius + 1) & (hat_area > 1)
    total = max(int(skin.sum()), 1)
    striped = float(pixels.white[skin].sum()) / total / 0.10
    dotted = float(pixels.black[skin].sum()) / total / 0.05
    pattern = 0 if max(striped, dotted) < 1 else 1 if striped > dotted else 2
    whites = eyes < -0.6
    awake = bool(whites.any()) and float(pixels.white[whites].mean()) > 0.22
    facts = ObjectFacts(
        colour=COLOURS[colours[0]],
        pattern=PATTERNS[pattern],
        body=body,
        hat=hat,
        hat_colour=COLOURS[colours[1]] if len(colours) > 1 else None,
        eyes=EYES[0 if awake else 1],
        action=action,
    )
    return Instance(facts=facts, x=match.x, y=match.y, radius=match.radius, likeness=match.iou)


def _lobes(region: Array, match: Match, x: torch.Tensor, y: torch.Tensor) -> float | None:
    """How a silhouette fills the pixels in which a round and a bumpy body differ: -1 as round, 1 as bumpy.

    On small, blurred pictures whole silhouettes differ too little. None where limbs and hat hide them.
    """
    body, hat, action = match.names
    bodies = sdf.body_distances(x, y)
    disc, lobed = (bodies[BODIES.index(name)] for name in ("round", "bumpy"))
    limbs = sdf.limb_distance(x, y, torch.tensor(action == "jumps"))
    hats = sdf.hat_distances(x, y - sdf.HAT_LINE[BODIES.index(body)])[HATS.index(hat)]
    clear = (torch.minimum(limbs, hats) > 1.2 / match.radius).numpy()
    cover = [(0.5 - distance.numpy() * match.radius).clip(0, 1) for distance in (disc, lobed)]
    change = (cover[1] - cover[0]) * clear
    total = np.abs(change).sum()
    if total < 5:
        return None
    return float((change * (2 * region - cover[0] - cover[1])).sum() / np.square(change).sum())
