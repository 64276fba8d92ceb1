"""Checks the facts that a caption names against what a picture shows."""

from dataclasses import dataclass
from itertools import permutations

from torch import Tensor

from diffctrl.zoo.worlds.facts import ObjectFacts, SceneFacts

from .reading import Instance, Reading
from .seeing import read


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether a picture shows what its caption names.

    Attributes:
        exact: every named fact holds, the kind and the number of objects included.
        facts: per named fact, whether it holds for every object that it is named of.
        objects: the same per named object, in the order of the caption.
        reading: what the picture shows.
    """

    exact: bool
    facts: dict[str, bool]
    objects: tuple[dict[str, bool], ...]
    reading: Reading

    def __str__(self) -> str:
        wrong = [name for name, holds in self.facts.items() if not holds]
        return f"{self.reading}: " + (f"wrong: {', '.join(wrong)}" if wrong else "as asked")


def _holds(name: str, wanted: str, seen: ObjectFacts) -> bool:
    if name == "hat" and wanted == "any":
        return seen.hat not in (None, "none")
    return getattr(seen, name) == wanted


def _object_facts(wanted: ObjectFacts, seen: Instance | None) -> dict[str, bool]:
    return {
        name: seen is not None and _holds(name, value, seen.facts) for name, value in wanted.named().items()
    }


def _assignments(named: int, seen: int) -> list[tuple[int | None, ...]]:
    """Every way to give each named object another seen one, or none where there are too few."""
    places: list[int | None] = [*range(seen), *([None] * max(named - seen, 0))]
    return list(dict.fromkeys(permutations(places, named)))


def _related(reading: Reading, places: tuple[int | None, ...], relation: str) -> bool:
    first, second = places
    return first is not None and second is not None and reading.relation(first, second) == relation


def check(image: Tensor, spec: SceneFacts) -> Verdict:
    """Check a picture against named facts.

    Named objects are assigned to seen ones so that as many facts as possible hold; a fact of an object that
    is not there does not hold.

    Args:
        image: (3, H, H) float in [0, 1]. spec: from `parse`, or from `worlds.said`.
    """
    return compare(read(image), spec)


def compare(reading: Reading, spec: SceneFacts) -> Verdict:
    """The same for a picture that has been read."""
    facts = {"kind": reading.kind == spec.kind, "count": len(reading.objects) == len(spec.objects)}
    for name in ("background", "texture", "style"):
        wanted = getattr(spec, name)
        if wanted is not None:
            facts[name] = getattr(reading, name) == wanted
    best: tuple[int, tuple[dict[str, bool], ...], bool] | None = None
    # More than six objects are noise; the largest six are enough to say so, and keep the search small.
    for places in _assignments(len(spec.objects), min(len(reading.objects), 6)):
        seen = [None if place is None else reading.objects[place] for place in places]
        each = tuple(_object_facts(wanted, one) for wanted, one in zip(spec.objects, seen, strict=True))
        related = spec.relation is None or _related(reading, places[:2], spec.relation)
        score = sum(sum(one.values()) for one in each) + related
        if best is None or score > best[0]:
            best = (score, each, related)
    assert best is not None
    _, each, related = best
    for one in each:
        for name, holds in one.items():
            facts[name] = facts.get(name, True) and holds
    if spec.relation is not None:
        facts["relation"] = related
    return Verdict(exact=all(facts.values()), facts=facts, objects=each, reading=reading)
