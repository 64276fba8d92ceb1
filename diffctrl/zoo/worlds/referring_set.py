"""The referring set: scenes with an expression, the words in it, and the object that it is true of alone.

Scenes come from the stream "test", which no embedded model was trained on. A scene is kept where it holds
what the split is about, distractors included, and where the expression's own predicate, evaluated on all
objects, names the target and nothing else. (version, split, seed) gives the same items everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch

from .expressions import RELATIONS, SIDES, WORDINGS, Expression, Layout, Wording, layouts, word_spans
from .sampling import sample
from .scenes import Scenes, concatenate
from .vocabulary import COLOURS, SHAPES

VERSION = 1
SPLITS = ("colour", "conjunction", "size", "position", "relation", "occlusion", "stop words", "none")
POINTED = SPLITS[:6]  # those with one expression and one target per scene
# Around a bare phrase: 0, 3 and 8 words without content.
PARAPHRASES = ("{}", "it is the {}", "and this is it and that is the {}")
_BATCH = 256
_MOST_BATCHES = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferringItem:
    """One expression for one scene.

    Attributes:
        scene: which of the set's scenes; the paraphrases of a target share it.
        words: (start, stop) of each word, in characters.
        target: the object's place in the scene, or None where the scene has no such object.
    """

    split: str
    scene: int
    expression: str
    words: tuple[tuple[int, int], ...]
    target: int | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReferringSet:
    """Scenes and the items about them, made by `referring_set`."""

    version: int
    split: str
    seed: int
    wording: Wording
    scenes: Scenes
    items: tuple[ReferringItem, ...]

    def to_json(self) -> str:
        """Everything, scenes included: what is read back needs no sampler."""
        rows = [
            {name: _plain(value[index]) for name, value in self.scenes.tensors().items()}
            for index in range(len(self.scenes))
        ]
        items = [{f.name: getattr(item, f.name) for f in fields(item)} for item in self.items]
        head = {"version": self.version, "split": self.split, "seed": self.seed, "wording": self.wording}
        return json.dumps({**head, "scenes": rows, "items": items})

    @classmethod
    def from_json(cls, text: str) -> ReferringSet:
        """What `to_json` wrote.

        Raises:
            ValueError: it is of another version.
        """
        found = json.loads(text)
        if found.get("version") != VERSION:
            raise ValueError(f"this referring set has version {found.get('version')!r}; {VERSION} is read")
        whole = sample(1, seed=0, world="shapes").tensors()  # names the dtypes
        scenes = Scenes(
            world="shapes",
            **{
                name: torch.tensor([row[name] for row in found["scenes"]], dtype=value.dtype)
                for name, value in whole.items()
            },
        )
        items = tuple(
            ReferringItem(**{**item, "words": tuple(tuple(span) for span in item["words"])})
            for item in found["items"]
        )
        head = {name: found[name] for name in ("version", "split", "seed", "wording")}
        return cls(**head, scenes=scenes, items=items)


def referring_set(split: str, count: int, *, seed: int, wording: Wording = "world") -> ReferringSet:
    """`count` scenes of one split; "stop words" has three items for each, the others one.

    Args:
        split: one of SPLITS.
        count: scenes.
        seed: the stream.
        wording: "world" keeps to the words of the embedded models ("the red one", "the large star"),
            "english" says what people would ("the red shape", "the largest star"), and adds "behind".

    Raises:
        ValueError: an argument is not accepted.
    """
    if split not in SPLITS or wording not in WORDINGS:
        raise ValueError(
            f"split must be one of {', '.join(SPLITS)} and wording one of {', '.join(WORDINGS)}; "
            f"got {split!r}, {wording!r}"
        )
    if count < 1 or seed < 0:
        raise ValueError(f"count must be positive and seed not negative; got {count}, {seed}")
    kept: list[Scenes] = []
    items: list[ReferringItem] = []
    total = 0
    for batch in range(_MOST_BATCHES):
        if total == count:
            break
        scenes = sample(_BATCH, seed=seed, index=batch, world="shapes", split="test", objects=(2, 3))
        chosen = []
        for index, (layout, draw) in enumerate(
            zip(layouts(scenes), scenes.freedom[:, 15].tolist(), strict=True)
        ):
            found = list(_CANDIDATES[split](layout, wording))
            if found and total < count:
                expression, target = found[int(draw * len(found))]
                items += _items(split, total, expression, target, wording)
                chosen.append(index)
                total += 1
        if chosen:
            kept.append(scenes.select(chosen))
    if total < count:
        raise ValueError(f"split {split!r} gave {total} of {count} scenes; ask for fewer")
    return ReferringSet(
        version=VERSION,
        split=split,
        seed=seed,
        wording=wording,
        scenes=concatenate(kept),
        items=tuple(items),
    )


def _items(
    split: str, scene: int, expression: Expression, target: int | None, wording: Wording
) -> list[ReferringItem]:
    text = expression.say(wording)
    texts = [text]
    if split == "stop words":
        texts = [paraphrase.format(text.removeprefix("the ")) for paraphrase in PARAPHRASES]
    return [
        ReferringItem(split=split, scene=scene, expression=each, words=word_spans(each), target=target)
        for each in texts
    ]


def _plain(value: torch.Tensor) -> Any:
    return value.tolist()


# --- what each split asks for: (expression, target) pairs of a scene ----------------------------------------

_Found = Iterator[tuple[Expression, int | None]]


def _shape(layout: Layout, index: int) -> str:
    return SHAPES[layout.shape[index]]


def _colour(layout: Layout, index: int) -> str:
    return COLOURS[layout.colour[index]]


def _others(layout: Layout, index: int) -> list[int]:
    return [i for i in range(len(layout)) if i != index]


def _unique(layout: Layout, expression: Expression, target: int) -> _Found:
    if expression.only(layout) == target:
        yield expression, target


def _by_colour(layout: Layout, wording: Wording) -> _Found:
    for target in range(len(layout)):
        yield from _unique(layout, Expression(colour=_colour(layout, target)), target)


def _by_conjunction(layout: Layout, wording: Wording) -> _Found:
    """Neither the colour nor the shape alone would do."""
    for target in range(len(layout)):
        others = _others(layout, target)
        same_colour = any(layout.colour[i] == layout.colour[target] for i in others)
        same_shape = any(layout.shape[i] == layout.shape[target] for i in others)
        if same_colour and same_shape:
            both = Expression(colour=_colour(layout, target), shape=_shape(layout, target))
            yield from _unique(layout, both, target)


def _has_twin(layout: Layout, target: int) -> bool:
    """Another object of the same shape: the noun alone would not do."""
    return any(layout.shape[i] == layout.shape[target] for i in _others(layout, target))


def _by_size(layout: Layout, wording: Wording) -> _Found:
    for target in range(len(layout)):
        if _has_twin(layout, target):
            for size in ("small", "large"):
                yield from _unique(layout, Expression(size=size, shape=_shape(layout, target)), target)


def _by_side(layout: Layout, wording: Wording) -> _Found:
    sides = SIDES[:2] if wording == "world" else SIDES
    for target in range(len(layout)):
        if _has_twin(layout, target):
            for side in sides:
                yield from _unique(layout, Expression(side=side, shape=_shape(layout, target)), target)


def _by_relation(layout: Layout, wording: Wording) -> _Found:
    for target in range(len(layout)):
        if not _has_twin(layout, target) or layout.overlaps:
            continue
        for anchor in _others(layout, target):
            named = Expression(colour=_colour(layout, anchor), shape=_shape(layout, anchor))
            for relation in RELATIONS[:4]:
                said = Expression(shape=_shape(layout, target), relation=relation, anchor=named)
                yield from _unique(layout, said, target)


def _by_depth(layout: Layout, wording: Wording) -> _Found:
    """Two overlapping shapes of one kind: the anchor's colour and the depth tell them apart."""
    if not layout.overlaps or not _has_twin(layout, 0):
        return
    for target, relation in ((0, "in front of"), (1, "behind")):
        if relation == "behind" and wording == "world":
            continue  # no such word there
        anchor = Expression(colour=_colour(layout, 1 - target), shape=_shape(layout, 1 - target))
        said = Expression(shape=_shape(layout, target), relation=relation, anchor=anchor)
        yield from _unique(layout, said, target)


def _by_both(layout: Layout, wording: Wording) -> _Found:
    for target in range(len(layout)):
        both = Expression(colour=_colour(layout, target), shape=_shape(layout, target))
        yield from _unique(layout, both, target)


def _absent(layout: Layout, wording: Wording) -> _Found:
    """Nothing fits, though one object has the colour and another one the shape."""
    for first in range(len(layout)):
        for second in _others(layout, first):
            both = Expression(colour=_colour(layout, first), shape=_shape(layout, second))
            if both.referents(layout) == ([], []):
                yield both, None


_CANDIDATES = dict(
    zip(
        SPLITS,
        (_by_colour, _by_conjunction, _by_size, _by_side, _by_relation, _by_depth, _by_both, _absent),
        strict=True,
    )
)
