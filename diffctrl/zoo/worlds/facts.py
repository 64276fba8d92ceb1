"""What a caption names: plain records, the same whether a scene or a sentence is the source."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectFacts:
    """What is named of one object; None where nothing is said. A shape has shape and size, a character the
    rest.

    `hat` is "none", "cap", "cone", "crown", or "any" for a hat of no named kind.
    """

    colour: str | None = None
    pattern: str | None = None
    shape: str | None = None
    size: str | None = None
    body: str | None = None
    hat: str | None = None
    hat_colour: str | None = None
    eyes: str | None = None
    action: str | None = None

    def named(self) -> dict[str, str]:
        """The named fields, by name."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneFacts:
    """What is named of a scene; `objects` in the order of the sentence.

    Attributes:
        kind: "shapes" or "characters".
        relation: holds between the first and the second object.
    """

    kind: str
    objects: tuple[ObjectFacts, ...]
    style: str | None = None
    background: str | None = None
    texture: str | None = None
    relation: str | None = None
