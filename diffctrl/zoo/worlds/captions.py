"""Captions as tensors: which fields of a scene are named, and the words that name them.

Everything is drawn from one tensor of uniforms, with tensor operations only, so a training loop can give a
scene a fresh caption on the device each time it is used. `_plan` decides what is named; `caption_words` and
`said` both read that plan, and nothing else decides.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import vocabulary as words_of
from .facts import ObjectFacts, SceneFacts
from .scenes import Scenes
from .vocabulary import IN_FRONT_OF, INVERSE_RELATION, MAX_OBJECTS, MAX_WORDS, WORD_ID, WORDS, ids

KEEP_STYLE, KEEP_BACKGROUND, KEEP_TEXTURE = 0.5, 0.7, 0.5
KEEP_SHAPE_FIELD = 0.5  # size and pattern
KEEP_SHAPE_NOUN = 0.96  # else "one": the word of a referring phrase must not be new to the model
KEEP_CHARACTER_FIELD = 0.6
KEEP_CHARACTER_RELATION = 0.5
THE = 0.12
FILLER_SHARE, MAX_FILLERS = 0.1, 4
_FIELDS = ("article", "noun", "size", "colour", "pattern", "body", "eyes", "hat", "hat_colour", "action")
_GLOBALS = ("style", "background", "texture", "order", "relation", "filler", "filler_count")
CAPTION_UNIFORMS = len(_GLOBALS) + MAX_FILLERS + MAX_OBJECTS * len(_FIELDS)

_ORDERS = ((0, 1, 2), (1, 0, 2), (0, 2, 1), (1, 2, 0), (2, 0, 1), (2, 1, 0))
# Words that a kept optional field of a character costs; the hat phrase counts its colour.
_COSTS = {"colour": 1, "pattern": 1, "body": 1, "eyes": 3, "hat": 4, "action": 1}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Plan:
    """Which fields are named. (B,) tensors, and (B, N) tensors whose columns follow the sentence."""

    order: Tensor  # (B, N) int64, the scene's object at each place of the sentence
    relation: Tensor  # (B,) int64 as spoken, -1 for none
    keep: dict[str, Tensor]  # (B,) bool: style, background, texture
    keep_object: dict[str, Tensor]  # (B, N) bool per field of _FIELDS; "article" means "the"
    fillers: Tensor  # (B, MAX_FILLERS) word ids or -1


def _plan(scenes: Scenes, uniforms: Tensor) -> _Plan:
    if uniforms.shape != (len(scenes), CAPTION_UNIFORMS):
        raise ValueError(f"uniforms must be {(len(scenes), CAPTION_UNIFORMS)}, got {tuple(uniforms.shape)}")
    head = dict(zip(_GLOBALS, uniforms.unbind(1), strict=False))
    start = len(_GLOBALS) + MAX_FILLERS
    field: dict[str, Tensor] = dict(
        zip(_FIELDS, uniforms[:, start:].reshape(-1, MAX_OBJECTS, len(_FIELDS)).unbind(2), strict=True)
    )
    character = scenes.character
    order, relation = _order(scenes, head["order"], head["relation"])
    keep = {
        "style": (head["style"] < KEEP_STYLE) & ~character,
        "background": head["background"] < KEEP_BACKGROUND,
    }
    keep["texture"] = keep["background"] & (head["texture"] < KEEP_TEXTURE)
    present = scenes.present
    shape, figure = ~character[:, None] & present, character[:, None] & present
    keep_object = {name: figure & (field[name] < KEEP_CHARACTER_FIELD) for name in _FIELDS[3:]}
    has_hat = scenes.hat.gather(1, order) > 0
    keep_object["hat_colour"] &= has_hat
    keep_object = _within_budget(keep_object, field, scenes, keep["background"], keep["texture"])
    keep_object["colour"] = torch.where(shape, shape, keep_object["colour"])
    keep_object["pattern"] = torch.where(shape, field["pattern"] < KEEP_SHAPE_FIELD, keep_object["pattern"])
    keep_object["size"] = shape & (field["size"] < KEEP_SHAPE_FIELD)
    keep_object["noun"] = shape & (field["noun"] < KEEP_SHAPE_NOUN)
    keep_object["article"] = present & (field["article"] < THE)
    return _Plan(
        order=order,
        relation=relation,
        keep=keep,
        keep_object=keep_object,
        fillers=_fillers(head["filler"], head["filler_count"], uniforms[:, len(_GLOBALS) : start]),
    )


def _order(scenes: Scenes, order_draw: Tensor, relation_draw: Tensor) -> tuple[Tensor, Tensor]:
    """The order of the objects in the sentence (B, N), and the relation as spoken in that order (B,)."""
    device = scenes.device
    three = torch.tensor(_ORDERS, device=device)[(order_draw * 6).long()]
    swapped = (order_draw < 0.5) & (scenes.relation != IN_FRONT_OF)
    two = torch.tensor(_ORDERS, device=device)[swapped.long()]
    identity = torch.arange(MAX_OBJECTS, device=device).expand_as(two)
    count = scenes.count[:, None]
    order = torch.where(count == 3, three, torch.where(count == 2, two, identity))
    inverse = torch.tensor((*INVERSE_RELATION, -1), device=device)
    relation = torch.where(swapped, inverse[scenes.relation], scenes.relation)
    spoken = (scenes.relation >= 0) & (~scenes.character | (relation_draw < KEEP_CHARACTER_RELATION))
    return order, torch.where(spoken, relation, -1)


def _within_budget(
    keep: dict[str, Tensor], field: dict[str, Tensor], scenes: Scenes, background: Tensor, texture: Tensor
) -> dict[str, Tensor]:
    """Drop fields of characters, those with the largest uniforms first, until the caption fits MAX_WORDS."""
    fixed = 2 * scenes.count + 2 * (scenes.count - 1) + 4 * background.long() + texture.long()
    either = {**keep, "hat": keep["hat"] | keep["hat_colour"]}
    priority = {**field, "hat": torch.minimum(field["hat"], field["hat_colour"])}
    names = list(_COSTS)
    kept = torch.cat([either[name] for name in names], 1)
    rank = torch.where(kept, torch.cat([priority[name] for name in names], 1), 2.0)
    cost = torch.tensor([_COSTS[name] for name in names], device=kept.device).repeat_interleave(MAX_OBJECTS)
    order = rank.argsort(1)
    spent = (kept * cost).gather(1, order).cumsum(1)
    fits = torch.zeros_like(kept).scatter(1, order, spent <= (MAX_WORDS - fixed)[:, None])
    allowed = dict(zip(names, fits.split(MAX_OBJECTS, 1), strict=True))
    allowed["hat_colour"] = allowed["hat"]
    return {name: value & allowed[name] for name, value in keep.items()}


def _fillers(draw: Tensor, count_draw: Tensor, word_draw: Tensor) -> Tensor:
    table = torch.tensor(ids(words_of.FILLERS), device=draw.device)
    words = table[(word_draw * len(table)).long()]
    number = 1 + (count_draw * MAX_FILLERS).long()
    used = (draw < FILLER_SHARE)[:, None] & (torch.arange(MAX_FILLERS, device=draw.device) < number[:, None])
    return torch.where(used, words, -1)


def _named(values: Tensor, names: tuple[str, ...], keep: Tensor) -> Tensor:
    """Word ids of `names[values]` where kept, else -1."""
    table = torch.tensor(ids(names), device=values.device)
    return torch.where(keep, table[values.clamp(0, len(names) - 1)], -1)


def _fixed(word: str, keep: Tensor) -> Tensor:
    return torch.where(keep, WORD_ID[word], -1)


def _object_slots(scenes: Scenes, plan: _Plan, place: int) -> list[Tensor]:
    """The word slots, each (B,), of the object at one place of the sentence."""
    at = plan.order[:, place]
    row = torch.arange(len(scenes), device=scenes.device)
    keep = {name: value[:, place] for name, value in plan.keep_object.items()}
    present = scenes.count > place
    shape, figure = present & ~scenes.character, present & scenes.character
    hat = scenes.hat[row, at]
    hat_phrase = keep["hat"] | keep["hat_colour"]
    wears = hat_phrase & (hat > 0)
    noun = torch.where(
        keep["noun"], _named(scenes.shape[row, at], words_of.SHAPES, shape), _fixed("one", shape)
    )
    return [
        torch.where(keep["article"], _fixed("the", present), _fixed("a", present)),
        _named(scenes.size[row, at], words_of.SIZES, keep["size"]),
        _named(scenes.colour[row, at], words_of.COLOURS, keep["colour"]),
        _named(scenes.pattern[row, at], words_of.PATTERNS, keep["pattern"]),
        _named(scenes.shape[row, at], words_of.BODIES, keep["body"]),
        torch.where(shape, noun, _fixed("creature", figure)),
        _fixed("with", keep["eyes"]),
        _named(scenes.eyes[row, at], words_of.EYES, keep["eyes"]),
        _fixed("eyes", keep["eyes"]),
        _fixed("wearing", hat_phrase),
        torch.where(wears, WORD_ID["a"], _fixed("no", hat_phrase)),
        _named(scenes.hat_colour[row, at], words_of.COLOURS, keep["hat_colour"]),
        torch.where(
            wears & keep["hat"],
            _named(hat, ("hat", *words_of.HATS[1:]), hat_phrase),
            _fixed("hat", hat_phrase),
        ),
        _named(scenes.action[row, at], words_of.ACTIONS, keep["action"]),
    ]


def _joint_slots(scenes: Scenes, plan: _Plan) -> list[Tensor]:
    """Between the first and the second object: a relation, "and" in a pair, a comma in a triple."""
    related = plan.relation >= 0
    first = _named(plan.relation, ("left", "right", "above", "below", "in"), related)
    plain = torch.where(scenes.count == 2, WORD_ID["and"], _fixed(",", scenes.count == 3))
    front = plan.relation == IN_FRONT_OF
    of = front | ((plan.relation >= 0) & (plan.relation < 2))
    return [torch.where(related, first, plain), _fixed("front", front), _fixed("of", of)]


def detailed(uniforms: Tensor, rows: Tensor) -> Tensor:
    """Uniforms whose captions name everything that the budget of words has room for, in some rows.

    A caption that leaves a field open teaches nothing about it; a training that knows only full captions
    could not draw from part of them. A mixture has both.

    Args:
        uniforms: (B, CAPTION_UNIFORMS) in [0, 1).
        rows: (B,) bool, the rows to change.

    Returns:
        (B, CAPTION_UNIFORMS); what decides on names is scaled below the lowest share that is kept, which
        leaves the order in which the budget drops fields.
    """
    lowest = min(KEEP_STYLE, KEEP_BACKGROUND, KEEP_TEXTURE, KEEP_SHAPE_FIELD, KEEP_CHARACTER_RELATION)
    scale = torch.ones(CAPTION_UNIFORMS, device=uniforms.device)
    for name in ("style", "background", "texture", "relation"):
        scale[_GLOBALS.index(name)] = lowest
    fields = scale[len(_GLOBALS) + MAX_FILLERS :].view(MAX_OBJECTS, len(_FIELDS))
    fields[:, _FIELDS.index("article") + 1 :] = lowest
    return torch.where(rows[:, None], uniforms * scale, uniforms)


def caption_words(scenes: Scenes, uniforms: Tensor) -> Tensor:
    """Word ids of one caption per scene.

    Args:
        scenes: B scenes.
        uniforms: (B, CAPTION_UNIFORMS) float in [0, 1) on the scenes' device. Another draw is another
            caption.

    Returns:
        (B, MAX_WORDS) int64, padded at the end with -1.
    """
    plan = _plan(scenes, uniforms)
    style, background = plan.keep["style"], plan.keep["background"]
    slots = [
        _fixed("a", style),
        _named(scenes.style, words_of.STYLES, style),
        _fixed("picture", style),
        _fixed("of", style),
        *_object_slots(scenes, plan, 0),
        *_joint_slots(scenes, plan),
        *_object_slots(scenes, plan, 1),
        _fixed("and", scenes.count == 3),
        *_object_slots(scenes, plan, 2),
        _fixed("on", background),
        _fixed("a", background),
        _named(scenes.background, words_of.BACKGROUNDS, background),
        _named(scenes.texture, words_of.TEXTURES, plan.keep["texture"]),
        _fixed("background", background),
        *plan.fillers.unbind(1),
    ]
    words = torch.stack(slots, 1)
    words = words.gather(1, torch.argsort((words < 0).long(), dim=1, stable=True))[:, :MAX_WORDS]
    # "an" where a vowel follows: decided last, because any field can be the next word.
    vowel = torch.tensor([word[0] in "aeio" for word in WORDS], device=words.device)
    follows = torch.cat([words[:, 1:], torch.full_like(words[:, :1], -1)], 1)
    needs_an = (words == WORD_ID["a"]) & (follows >= 0) & vowel[follows.clamp(min=0)]
    return torch.where(needs_an, WORD_ID["an"], words)


def to_text(words: Tensor) -> list[str]:
    """Captions as strings, words joined by single spaces. `words`: (B, any) int64, -1 is padding."""
    return [" ".join(WORDS[word] for word in row if word >= 0) for row in words.tolist()]


def said(scenes: Scenes, uniforms: Tensor) -> list[SceneFacts]:
    """What the caption of the same arguments names, one record per scene."""
    plan = _plan(scenes, uniforms)
    return [_facts(scenes, plan, index) for index in range(len(scenes))]


def truth(scenes: Scenes) -> list[SceneFacts]:
    """Every fact of each scene, as if its caption named all of them; objects in the order of the scene."""
    present, figure = scenes.present, scenes.character[:, None] & scenes.present
    shape = present & ~figure
    every = torch.ones_like(scenes.character)
    keep_object = {"noun": shape, "size": shape, "colour": present, "pattern": present}
    keep_object |= dict.fromkeys(("body", "eyes", "hat", "action"), figure)
    keep_object["hat_colour"] = figure & (scenes.hat > 0)
    plan = _Plan(
        order=torch.arange(MAX_OBJECTS, device=scenes.device).expand(len(scenes), -1),
        relation=scenes.relation,
        keep={"style": ~scenes.character, "background": every, "texture": every},
        keep_object=keep_object,
        fillers=torch.full((len(scenes), MAX_FILLERS), -1, device=scenes.device),
    )
    return [_facts(scenes, plan, index) for index in range(len(scenes))]


def _facts(scenes: Scenes, plan: _Plan, index: int) -> SceneFacts:
    character = bool(scenes.character[index])

    def pick(name: str, place: int, names: tuple[str, ...]) -> str | None:
        if not bool(plan.keep_object[name][index, place]):
            return None
        field = "shape" if name in ("noun", "body") else name
        return names[int(getattr(scenes, field)[index, int(plan.order[index, place])])]

    objects = []
    for place in range(int(scenes.count[index])):
        hat = pick("hat", place, words_of.HATS)
        hat_colour = pick("hat_colour", place, words_of.COLOURS)
        objects.append(
            ObjectFacts(
                colour=pick("colour", place, words_of.COLOURS),
                pattern=pick("pattern", place, words_of.PATTERNS),
                shape=pick("noun", place, words_of.SHAPES),
                size=pick("size", place, words_of.SIZES),
                body=pick("body", place, words_of.BODIES) if character else None,
                hat="any" if hat is None and hat_colour is not None else hat,
                hat_colour=hat_colour,
                eyes=pick("eyes", place, words_of.EYES),
                action=pick("action", place, words_of.ACTIONS),
            )
        )
    kept = {name: bool(value[index]) for name, value in plan.keep.items()}
    relation = int(plan.relation[index])
    return SceneFacts(
        kind="characters" if character else "shapes",
        objects=tuple(objects),
        style=words_of.STYLES[int(scenes.style[index])] if kept["style"] else None,
        background=words_of.BACKGROUNDS[int(scenes.background[index])] if kept["background"] else None,
        texture=words_of.TEXTURES[int(scenes.texture[index])] if kept["texture"] else None,
        relation=words_of.RELATIONS[relation] if relation >= 0 else None,
    )
