"""Captions of clips as tensors, and what they name.

As in `diffctrl.zoo.worlds.captions`, one plan, drawn from uniforms with tensor operations, decides which
fields are named; `caption_words` and `said` read it.

    caption := object motion [speed] ["while" object motion [speed]] [ground]
    ground  := "on a" background [texture] "background"
    object  := ("a" | "the") [colour] (shape | "one")
    motion  := a name of MOTIONS | move "behind a gray wall" | move "and back" | move "then" move
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffctrl.zoo.worlds.vocabulary import BACKGROUNDS, COLOURS, FILLERS

from . import vocabulary as v
from .scenes import Clips
from .vocabulary import MAX_OBJECTS, MAX_WORDS, WORD_ID, WORDS

KEEP_COLOUR, KEEP_SHAPE, KEEP_SPEED, KEEP_BACKGROUND, KEEP_TEXTURE = 0.88, 0.88, 0.6, 0.6, 0.5
THE = 0.12
FILLER_SHARE, MAX_FILLERS = 0.08, 4
_FIELDS = ("colour", "shape", "speed", "article")
_GLOBALS = ("background", "texture", "order", "filler", "filler_count")
CAPTION_UNIFORMS = len(_GLOBALS) + MAX_FILLERS + MAX_OBJECTS * len(_FIELDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectFacts:
    """What is named of one object; None where nothing is said. `motion` is the whole phrase."""

    colour: str | None = None
    shape: str | None = None
    motion: str | None = None
    speed: str | None = None

    def named(self) -> dict[str, str]:
        """The named fields, by name."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipFacts:
    """What is named of a clip; `objects` in the order of the sentence."""

    objects: tuple[ObjectFacts, ...]
    background: str | None = None
    texture: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Plan:
    """(B,) and (B, N) tensors; columns follow the sentence."""

    order: Tensor  # (B, N) int64
    keep: dict[str, Tensor]  # (B,) bool: background, texture
    keep_object: dict[str, Tensor]  # (B, N) bool per field of _FIELDS; "article" means "the"
    fillers: Tensor  # (B, MAX_FILLERS) word ids or -1


def _plan(clips: Clips, uniforms: Tensor) -> _Plan:
    if uniforms.shape != (len(clips), CAPTION_UNIFORMS):
        raise ValueError(f"uniforms must be {(len(clips), CAPTION_UNIFORMS)}, got {tuple(uniforms.shape)}")
    head = dict(zip(_GLOBALS, uniforms.unbind(1), strict=False))
    start = len(_GLOBALS) + MAX_FILLERS
    field: dict[str, Tensor] = dict(
        zip(_FIELDS, uniforms[:, start:].reshape(-1, MAX_OBJECTS, len(_FIELDS)).unbind(2), strict=True)
    )
    swapped = ((head["order"] < 0.5) & (clips.count == 2)).long()
    order = torch.arange(MAX_OBJECTS, device=clips.device) ^ swapped[:, None]
    present = clips.present
    background = head["background"] < KEEP_BACKGROUND
    shares = {"colour": KEEP_COLOUR, "shape": KEEP_SHAPE, "speed": KEEP_SPEED, "article": THE}
    keep_object = {name: present & (field[name] < share) for name, share in shares.items()}
    keep_object["speed"] &= clips.speed.gather(1, order) >= 0
    number = 1 + (head["filler_count"] * MAX_FILLERS).long()
    used = (head["filler"] < FILLER_SHARE)[:, None] & (
        torch.arange(MAX_FILLERS, device=clips.device) < number[:, None]
    )
    filler = _table(FILLERS, clips.device)[(uniforms[:, len(_GLOBALS) : start] * len(FILLERS)).long()]
    return _Plan(
        order=order,
        keep={"background": background, "texture": background & (head["texture"] < KEEP_TEXTURE)},
        keep_object=keep_object,
        fillers=torch.where(used, filler, -1),
    )


def detailed(uniforms: Tensor, rows: Tensor) -> Tensor:
    """Uniforms whose captions name everything, in some rows; see `diffctrl.zoo.worlds.detailed`.

    Args:
        uniforms: (B, CAPTION_UNIFORMS) in [0, 1).
        rows: (B,) bool, the rows to change.
    """
    lowest = min(KEEP_COLOUR, KEEP_SHAPE, KEEP_SPEED, KEEP_BACKGROUND, KEEP_TEXTURE)
    scale = torch.ones(CAPTION_UNIFORMS, device=uniforms.device)
    for name in ("background", "texture"):
        scale[_GLOBALS.index(name)] = lowest
    fields = scale[len(_GLOBALS) + MAX_FILLERS :].view(MAX_OBJECTS, len(_FIELDS))
    fields[:, : _FIELDS.index("article")] = lowest
    return torch.where(rows[:, None], uniforms * scale, uniforms)


def _table(names: tuple[str, ...], device: torch.device) -> Tensor:
    return torch.tensor([WORD_ID[name] if name else -1 for name in names], device=device)


def _named(values: Tensor, names: tuple[str, ...], keep: Tensor) -> Tensor:
    """Word ids of `names[values]` where kept, else -1; the name "" has no word."""
    return torch.where(keep, _table(names, values.device)[values.clamp(0, len(names) - 1)], -1)


def _phrase(phrase: str, keep: Tensor) -> list[Tensor]:
    return [torch.where(keep, WORD_ID[word], -1) for word in phrase.split()]


_VERBS = tuple(name.partition(" ")[0] for name in v.MOTIONS)
_MANNERS = tuple(name.partition(" ")[2] for name in v.MOTIONS)


def _object_slots(clips: Clips, plan: _Plan, place: int) -> list[Tensor]:
    """The word slots, each (B,), of one place of the sentence."""
    row, at = torch.arange(len(clips), device=clips.device), plan.order[:, place]
    keep = {name: value[:, place] for name, value in plan.keep_object.items()}
    present = clips.count > place
    motion, then = clips.motion[row, at], clips.then[row, at]
    followed = present & (clips.form == v.THEN)
    return [
        torch.where(keep["article"], WORD_ID["the"], torch.where(present, WORD_ID["a"], -1)),
        _named(clips.colour[row, at], COLOURS, keep["colour"]),
        torch.where(
            keep["shape"],
            _named(clips.shape[row, at], v.SHAPES, present),
            torch.where(present, WORD_ID["one"], -1),
        ),
        _named(motion, _VERBS, present),
        _named(motion, _MANNERS, present),
        *_phrase(v.WALL_PHRASE, present & (clips.form == v.WALL)),
        *_phrase(v.BACK_PHRASE, present & (clips.form == v.BACK)),
        *_phrase(v.THEN_WORD, followed),
        _named(then, _VERBS, followed),
        _named(then, _MANNERS, followed),
        _named(clips.speed[row, at], v.SPEEDS, keep["speed"]),
    ]


def caption_words(clips: Clips, uniforms: Tensor) -> Tensor:
    """Word ids of one caption per clip.

    Args:
        clips: B clips.
        uniforms: (B, CAPTION_UNIFORMS) float in [0, 1) on the clips' device. Another draw is another caption.

    Returns:
        (B, MAX_WORDS) int64, padded at the end with -1.
    """
    plan = _plan(clips, uniforms)
    background = plan.keep["background"]
    slots = [
        *_object_slots(clips, plan, 0),
        *_phrase("while", clips.count == 2),
        *_object_slots(clips, plan, 1),
        *_phrase("on a", background),
        _named(clips.background, BACKGROUNDS, background),
        _named(clips.texture, v.TEXTURES, plan.keep["texture"]),
        *_phrase("background", background),
        *plan.fillers.unbind(1),
    ]
    words = torch.stack(slots, 1)
    words = words.gather(1, torch.argsort((words < 0).long(), dim=1, stable=True))[:, :MAX_WORDS]
    vowel = torch.tensor([word[0] in "aeio" for word in WORDS], device=words.device)
    follows = torch.cat([words[:, 1:], torch.full_like(words[:, :1], -1)], 1)
    # "one" begins with a consonant when spoken.
    needs_an = (words == WORD_ID["a"]) & (follows >= 0) & vowel[follows.clamp(min=0)]
    return torch.where(needs_an & (follows != WORD_ID["one"]), WORD_ID["an"], words)


def to_text(words: Tensor) -> list[str]:
    """Captions as strings, words joined by single spaces. `words`: (B, any) int64, -1 is padding."""
    return [" ".join(WORDS[word] for word in row if word >= 0) for row in words.tolist()]


def said(clips: Clips, uniforms: Tensor) -> list[ClipFacts]:
    """What the caption of the same arguments names, one record per clip."""
    plan = _plan(clips, uniforms)
    return [_facts(clips, plan, index) for index in range(len(clips))]


def truth(clips: Clips) -> list[ClipFacts]:
    """Every fact of each clip, objects in the order of the clip."""
    # The lowest uniforms keep every field; an order draw of 1 keeps the order.
    uniforms = torch.zeros(len(clips), CAPTION_UNIFORMS, device=clips.device)
    uniforms[:, _GLOBALS.index("order")] = 1.0
    return said(clips, uniforms)


def motion_phrase(form: str, motion: str, then: str | None = None) -> str:
    """The motion as a caption says it."""
    if form == "wall":
        return f"{motion} {v.WALL_PHRASE}"
    if form == "back":
        return f"{motion} {v.BACK_PHRASE}"
    return f"{motion} {v.THEN_WORD} {then}" if form == "then" else motion


def _facts(clips: Clips, plan: _Plan, index: int) -> ClipFacts:
    objects = []
    form = v.FORMS[int(clips.form[index])]
    for place in range(int(clips.count[index])):
        at = int(plan.order[index, place])

        def pick(name: str, names: tuple[str, ...], at: int = at, place: int = place) -> str | None:
            kept = bool(plan.keep_object[name][index, place])
            return names[int(getattr(clips, name)[index, at])] if kept else None

        then = int(clips.then[index, at])
        objects.append(
            ObjectFacts(
                colour=pick("colour", COLOURS),
                shape=pick("shape", v.SHAPES),
                motion=motion_phrase(
                    form, v.MOTIONS[int(clips.motion[index, at])], v.MOTIONS[then] if then >= 0 else None
                ),
                speed=pick("speed", v.SPEEDS),
            )
        )
    background = BACKGROUNDS[int(clips.background[index])] if bool(plan.keep["background"][index]) else None
    texture = v.TEXTURES[int(clips.texture[index])] if bool(plan.keep["texture"][index]) else None
    return ClipFacts(objects=tuple(objects), background=background, texture=texture)


def parse(text: str) -> ClipFacts:
    """The facts that a caption names.

    Args:
        text: a caption of the grammar above, such as "a red star moves left slowly on a navy background".

    Raises:
        ValueError: with the unknown word, or with what was expected where.

    >>> parse("a red star moves left and back").objects[0].motion
    'moves left and back'
    """
    words = text.lower().replace(".", " ").replace(",", " ").split()
    for word in words:
        if word not in WORD_ID:
            raise ValueError(f"unknown word {word!r} in caption {text!r}; the known ones are in clips.WORDS")
    while words and words[-1] in FILLERS:
        words.pop()
    reader = _Reader(words, text)
    objects = [reader.object()]
    if reader.take("while"):
        objects.append(reader.object())
    background = texture = None
    if reader.take("on"):
        reader.one_of(("a", "an", "the"))
        background = reader.one_of(BACKGROUNDS)
        texture = reader.one_of(v.TEXTURES)
        reader.need("background")
    if reader.words:
        raise ValueError(f"expected the end of caption {text!r}, found {reader.words[0]!r}")
    return ClipFacts(objects=tuple(objects), background=background, texture=texture)


class _Reader:
    """A cursor over the words of one caption."""

    def __init__(self, words: list[str], text: str) -> None:
        self.words, self.text = words, text

    def take(self, phrase: str) -> bool:
        wanted = phrase.split()
        if self.words[: len(wanted)] != wanted:
            return False
        del self.words[: len(wanted)]
        return True

    def one_of(self, names: tuple[str, ...]) -> str | None:
        return next((name for name in names if self.take(name)), None)

    def need(self, *names: str) -> str:
        found = self.one_of(names)
        if found is None:
            at = repr(self.words[0]) if self.words else "the end"
            raise ValueError(f"expected one of {names} in caption {self.text!r}, found {at}")
        return found

    def object(self) -> ObjectFacts:
        self.one_of(("a", "an", "the"))
        colour = self.one_of(COLOURS)
        shape = self.need(*v.SHAPES, "one")
        motion = self.need(*v.MOTIONS)
        moves = v.MOTIONS[:4]
        if motion in moves:
            if self.take(v.WALL_PHRASE):
                motion = motion_phrase("wall", motion)
            elif self.take(v.BACK_PHRASE):
                motion = motion_phrase("back", motion)
            elif self.take(v.THEN_WORD):
                motion = motion_phrase("then", motion, self.need(*moves))
        return ObjectFacts(
            colour=colour, shape=None if shape == "one" else shape, motion=motion, speed=self.one_of(v.SPEEDS)
        )
