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
    awake = float(pixels.white[eyes < -0.6].mean()) > 0.22
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
