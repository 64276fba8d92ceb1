"""Referring phrases: for each object a phrase that is true of no other object of its scene.

A phrase is shortest in the sense that no word of it could be dropped: "the star", "the red one" and "the
striped one" can all be shortest for one object. The fewest words alone would nearly always be the noun.
"""

from itertools import combinations

from .captions import truth
from .facts import ObjectFacts
from .scenes import Scenes

LEVEL = 0.1  # of the side: objects closer than this along x have no left one and no right one
_ADJECTIVES = ("size", "colour", "pattern", "body")


def referring(scenes: Scenes) -> list[list[str | None]]:
    """One phrase per object of each scene, such as "the red star", "the striped one", "the star on the left".

    Where several phrases are shortest, the scene's own numbers choose, so that all forms occur.

    Args:
        scenes: B scenes.

    Returns:
        B lists with one entry per drawn object: a phrase, or None where none fits it alone.
    """
    scenes = scenes.to("cpu")
    draws = scenes.freedom[:, 0].tolist()
    return [
        [
            _phrase(facts.objects, scenes.x[index].tolist(), place, draws[index])
            for place in range(len(facts.objects))
        ]
        for index, facts in enumerate(truth(scenes))
    ]


def _phrase(objects: tuple[ObjectFacts, ...], x: list[float], place: int, draw: float) -> str | None:
    mine = objects[place].named()
    fields = [name for name in _ADJECTIVES if name in mine]
    told = [
        (*chosen, noun)
        for count in range(len(fields) + 1)
        for chosen in combinations(fields, count)
        for noun in (("shape", "one") if "shape" in mine else ("creature",))
        if chosen or noun != "one"
    ]
    same = {names: _called(objects, mine, names) for names in told}
    alone = [names for names in told if same[names] == [place]]
    needed = [set(names) - {"one"} for names in alone]
    phrases = [
        _spell(mine, names)
        for names, need in zip(alone, needed, strict=True)
        if not any(other < need for other in needed)
    ]
    if not phrases:
        sides = ((names, _side(x, place, same[names])) for names in told)
        phrases = [f"{_spell(mine, names)} on the {side}" for names, side in sides if side][:1]
    return phrases[int(draw * len(phrases))] if phrases else None


def _called(objects: tuple[ObjectFacts, ...], mine: dict[str, str], names: tuple[str, ...]) -> list[int]:
    """The objects of which these fields of mine are true too."""
    wanted = {name: mine[name] for name in names if name in mine}
    return [index for index, other in enumerate(objects) if wanted.items() <= other.named().items()]


def _spell(mine: dict[str, str], names: tuple[str, ...]) -> str:
    return " ".join(["the", *(mine.get(name, name) for name in names)])


def _side(x: list[float], place: int, same: list[int]) -> str | None:
    """Whether the object is clearly the leftmost or the rightmost of those that are called the same."""
    others = [x[i] for i in same if i != place]
    if others and x[place] < min(others) - LEVEL:
        return "left"
    return "right" if others and x[place] > max(others) + LEVEL else None
