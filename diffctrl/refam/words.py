"""Words of a referring expression: stop words, the noun phrase, directions, and colours for magnets.

Everything works on character spans. Which word is which is decided here; which token belongs to which word is
decided in `tokens`, and nothing matches strings against the pieces of a tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from diffctrl.errors import nearest

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*|[^\w\s]|_")


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The paper filters "stop words" without listing them. This list has no content word, and none of `KEPT`.
STOP_WORDS = _set(
    """a an the this that these those
    of in on at to from by for with into onto over under and or but as than
    is are was were am be been being has have had having do does did
    it its he him his she her hers they them their theirs who whom whose which
    i you we me my your our us there here"""
)
# Never stop words: they decide which object is meant.
KEPT = _set(
    """left right top bottom front back behind middle center centre near no not without
    above below upper lower first second third last
    one two three four five six seven eight nine ten"""
)

COLOURS = _set(
    """red orange yellow green blue purple pink brown black white gray grey violet magenta cyan teal olive
    navy beige gold golden silver maroon crimson scarlet turquoise lime indigo tan ivory fuchsia rose salmon
    coral khaki"""
)
# A magnet colour is passed over where the expression says it, or a word for nearly the same.
_NEAR = {
    "pink": {"pink", "magenta", "fuchsia", "rose", "salmon"},
    "purple": {"purple", "violet", "indigo", "magenta"},
    "cyan": {"cyan", "turquoise", "teal"},
    "olive": {"olive", "khaki"},
}
MAGNET_COLOURS = tuple(_NEAR)

_PREPOSITIONS = _set(
    """of in on at to from by for with into onto over under near above below behind beside between beneath
    inside outside around against along across through next left right"""
)
_VERBS = _set("is are was were be has have had does do did can will")
_RELATIVE = _set("that who whom whose which where")
_BEFORE_NOUN = _set("it is and there a an the this that these those")


Direction = Literal["left", "right", "top", "bottom", "middle"]
_DIRECTIONS: dict[str, Direction] = {
    "left": "left",
    "leftmost": "left",
    "right": "right",
    "rightmost": "right",
    "top": "top",
    "upper": "top",
    "bottom": "bottom",
    "lower": "bottom",
    "middle": "middle",
    "center": "middle",
    "centre": "middle",
    "central": "middle",
}


@dataclass(frozen=True, slots=True)
class Word:
    """One word or punctuation mark of a text; start and stop in characters.

    `occurrence` counts equal words, without regard to case, from 0.
    """

    text: str
    start: int
    stop: int
    occurrence: int

    @property
    def key(self) -> str:
        """The word in lower case."""
        return self.text.lower()

    @property
    def is_punctuation(self) -> bool:
        return not any(letter.isalnum() for letter in self.text)


def split_words(text: str) -> tuple[Word, ...]:
    """The words and punctuation marks of a text, in order.

    >>> [word.text for word in split_words("the red one, on the left.")]
    ['the', 'red', 'one', ',', 'on', 'the', 'left', '.']
    """
    seen: dict[str, int] = {}
    words = []
    for match in _WORD.finditer(text):
        key = match.group().lower()
        words.append(Word(match.group(), match.start(), match.end(), seen.get(key, 0)))
        seen[key] = seen.get(key, 0) + 1
    return tuple(words)


def find_word(words: Sequence[Word], text: str, occurrence: int = 0) -> int:
    """Index of a word.

    Raises:
        ValueError: the text has no such word, or not so often.
    """
    places = [index for index, word in enumerate(words) if word.key == text.lower()]
    if not places:
        known = list(dict.fromkeys(word.text for word in words if not word.is_punctuation))
        raise ValueError(
            f"the expression has no word {text!r}{nearest(text, known)}; it has {', '.join(known)}"
        )
    if not 0 <= occurrence < len(places):
        raise ValueError(
            f"the word {text!r} occurs {len(places)} time(s), so occurrence must be below that; got "
            f"{occurrence}"
        )
    return places[occurrence]


def is_stop(words: Sequence[Word], index: int, stop_words: frozenset[str] = STOP_WORDS) -> bool:
    """Whether a word says nothing of the object: punctuation, or in the list and not among `KEPT`.

    "one" is a numeral before a word with content ("one cup") and a pronoun elsewhere ("the red one").
    """
    word = words[index]
    if word.is_punctuation:
        return True
    if word.key in ("one", "ones"):
        return index + 1 == len(words) or is_stop(words, index + 1, stop_words)
    return word.key in stop_words and word.key not in KEPT


NounPhrase = Literal["auto", "rules", "spacy", "off"]


def noun_phrase(words: Sequence[Word], text: str, how: NounPhrase = "rules") -> frozenset[int]:
    """Indices of the words of the first noun phrase: the head noun and what stands before it.

    The paper has such a filter and does not define it. With spaCy and its small English model ("spacy", or
    "auto" where both are installed), the first noun chunk; by rule, the words up to the first preposition,
    verb or relative pronoun, provided that a word with content is among them. Objects of relations are out.

    Raises:
        ImportError: how="spacy" without spaCy or its model en_core_web_sm.
    """
    everything = frozenset(range(len(words)))
    if how == "off":
        return everything
    if how in ("spacy", "auto"):
        found = _chunk(words, text, needed=how == "spacy")
        if found:
            return found
    return _by_rule(words) or everything


def _by_rule(words: Sequence[Word]) -> frozenset[int]:
    start = 0
    # "it is the red star": what leads to the phrase is no end of it.
    while start < len(words) and words[start].key in _BEFORE_NOUN:
        start += 1
    kept: list[int] = []
    for index in range(start, len(words)):
        word = words[index].key
        follows = words[index + 1].key if index + 1 < len(words) else ""
        # "the left cup" has an adjective, "the cup left of the plate" a preposition.
        side = word in ("left", "right")
        ends = word in _VERBS | _RELATIVE or (word in _PREPOSITIONS and (not side or follows == "of"))
        if (ends or words[index].is_punctuation) and any(_is_noun(words, i) for i in kept):
            break
        kept.append(index)
    return frozenset(kept) if any(not is_stop(words, i) for i in kept) else frozenset()


def _is_noun(words: Sequence[Word], index: int) -> bool:
    """Whether a word may be what the phrase is about: "left" alone is not."""
    return not is_stop(words, index) and words[index].key not in _DIRECTIONS


def _chunk(words: Sequence[Word], text: str, *, needed: bool) -> frozenset[int]:
    try:
        import spacy  # pyright: ignore[reportMissingImports]

        chunks = list(spacy.load("en_core_web_sm")(text).noun_chunks)
    except (ImportError, OSError) as error:
        if needed:
            raise ImportError(
                "noun_phrase='spacy' needs spaCy and its model en_core_web_sm (`pip install spacy`, "
                "`python -m "
                "spacy download en_core_web_sm`); use noun_phrase='rules'"
            ) from error
        return frozenset()
    for chunk in chunks:
        inside = [
            index
            for index, word in enumerate(words)
            if word.start < chunk.end_char and word.stop > chunk.start_char
        ]
        if any(not is_stop(words, index) for index in inside):
            return frozenset(inside)
    return frozenset()


# What may stand around a direction after the noun: "on the far left side of the picture".
_TAIL = re.compile(
    rf"(?:(?:(?P<place>on|at|in)|to) )?(?:the )?(?:far |very |extreme )?(?P<first>{'|'.join(_DIRECTIONS)})"
    rf"(?: (?P<second>{'|'.join(_DIRECTIONS)}))?(?: hand)?(?: (?:side|corner|part|half|edge))?"
    r"(?: (?:of|in) (?:the )?(?:image|picture|photo|photograph|screen|frame))?"
)


# Verbs of which a direction says where something goes or looks, and what may stand between the two.
_GOING = re.compile(
    r"(?:bounc|driv|fac|mov|rid|slid)(?:e|es|ing)|fl(?:y|ies|ying)|(?:run|swim)(?:s|ning|ming)?|goes|"
    r"(?:drift|fall|go|head|lean|look|point|roll|travel|turn|walk)(?:s|ing)?"
)
_BETWEEN = frozenset({"and", "back", "from", "off", "the", "then", "to", "toward", "towards"})


def _says_where_to(words: Sequence[Word], index: int) -> bool:
    """Whether a direction belongs to a verb, as in "moves to the left" and "moves right and then up"."""
    for word in reversed(words[:index]):
        if _GOING.fullmatch(word.key):
            return True
        if word.key not in _BETWEEN and word.key not in _DIRECTIONS:
            return False
    return False


def directions(words: Sequence[Word]) -> tuple[Direction, ...]:
    """Where in the picture the expression says the object is; () where it only relates two objects.

    "the left cup", "the cup on the left" and "the cup in the top right corner" say where. "the cup left of
    the plate" and "the cup on the left plate" do not: a ramp would pull the point to the border. Nor do "the
    one that moves left" and "the man looking right".
    """
    phrase = sorted(_by_rule(words)) or range(len(words))
    found: list[Direction] = [
        _DIRECTIONS[words[index].key]
        for index in phrase
        if words[index].key in _DIRECTIONS
        and [word.key for word in words[index + 1 : index + 2]] != ["of"]
        and not _says_where_to(words, index)
    ]
    tail = " ".join(word.key for word in words[phrase[-1] + 1 :] if not word.is_punctuation)
    match = _TAIL.fullmatch(tail)
    if match and (match["place"] or not _GOING.fullmatch(words[phrase[-1]].key)):
        found.extend(_DIRECTIONS[match[name]] for name in ("first", "second") if match[name])
    return tuple(dict.fromkeys(found))


def magnet_colour(colours: Sequence[str], words: Sequence[Word]) -> str:
    """The first of the colours that the expression neither says nor nearly says.

    Raises:
        ValueError: there is none.
    """
    said = {word.key for word in words}
    for colour in colours:
        if not said & (_NEAR.get(colour, set()) | {colour}):
            return colour
    raise ValueError(
        f"the expression says every colour that could be a magnet ({', '.join(colours)}); name magnets "
        f"yourself"
    )


def choose_magnets(magnets: Sequence[str], words: Sequence[Word]) -> tuple[str, ...]:
    """The magnets for an expression: a colour among them that it says makes way for another colour."""
    said = {word.key for word in words}
    chosen = []
    for magnet in magnets:
        near = _NEAR.get(magnet.lower(), {magnet.lower()})
        if magnet.lower() in COLOURS and said & near:
            magnet = magnet_colour([c for c in MAGNET_COLOURS if c not in magnets], words)
        chosen.append(magnet)
    return tuple(chosen)
