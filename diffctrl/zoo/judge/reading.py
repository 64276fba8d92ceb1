"""What the judge saw in a picture."""

from dataclasses import dataclass

from diffctrl.zoo.worlds.facts import ObjectFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One object that was seen; positions and radius in pixels of the 128 px picture.

    Attributes:
        facts: every field of the object. likeness: IoU with the template it was taken for.
        front: index of the instance that hides a part of it, or None.
    """

    facts: ObjectFacts
    x: float
    y: float
    radius: float
    likeness: float
    style: str | None = None
    behind: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A picture as the judge reads it; `str()` gives one sentence."""

    kind: str
    background: str
    texture: str
    style: str | None
    objects: tuple[Instance, ...]

    def relation(self, first: int, second: int) -> str | None:
        """How object `first` lies to object `second`: a name of RELATIONS, or None where none is clear."""
        a, b = self.objects[first], self.objects[second]
        if b.behind == first:
            return "in front of"
        if a.behind == second:
            return None
        dx, dy = a.x - b.x, a.y - b.y
        if max(abs(dx), abs(dy)) < 0.6 * (a.radius + b.radius) or abs(abs(dx) - abs(dy)) < 0.1 * max(
            abs(dx), abs(dy)
        ):
            return None
        if abs(dx) > abs(dy):
            return "left of" if dx < 0 else "right of"
        return "above" if dy < 0 else "below"

    def __str__(self) -> str:
        names = [_phrase(instance.facts, self.kind) for instance in self.objects]
        if not names:
            said = "nothing"
        elif len(names) == 2:
            said = f"{names[0]} {self.relation(0, 1) or 'and'} {names[1]}"
        else:
            said = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
        style = f"{_article(self.style)} picture of " if self.style and self.kind == "shapes" else ""
        texture = "" if self.texture == "plain" else f" {self.texture}"
        return f"{style}{said} on {_article(self.background)}{texture} background"


def _article(word: str) -> str:
    return f"{'an' if word[0] in 'aeio' else 'a'} {word}"


def _phrase(facts: ObjectFacts, kind: str) -> str:
    pattern = None if facts.pattern == "plain" else facts.pattern
    words = [facts.size, facts.colour, pattern, facts.body, facts.shape if kind == "shapes" else "creature"]
    text = _article(" ".join(word for word in words if word))
    if kind == "shapes":
        return text
    hat = "no hat" if facts.hat == "none" else _article(" ".join(filter(None, (facts.hat_colour, facts.hat))))
    return f"{text} with {facts.eyes} eyes wearing {hat}, which {facts.action}"
