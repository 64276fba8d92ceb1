"""Reads a caption back into the facts that it names."""

from diffctrl.zoo.worlds import vocabulary as words_of
from diffctrl.zoo.worlds.facts import ObjectFacts, SceneFacts

_ARTICLES = ("a", "an", "the")


class _Words:
    """A cursor over the words of one caption."""

    def __init__(self, text: str) -> None:
        self.words = text.lower().replace(",", " , ").replace(".", " ").split()
        for word in self.words:
            if word not in words_of.WORD_ID:
                raise ValueError(
                    f"unknown word {word!r} in caption {text!r}; the world's words are in worlds.WORDS"
                )
        # Fillers at the end name nothing.
        while self.words and self.words[-1] in words_of.FILLERS:
            self.words.pop()
        self.text, self.at = text, 0

    def peek(self, ahead: int = 0) -> str:
        return self.words[self.at + ahead] if self.at + ahead < len(self.words) else ""

    def take(self, *words: str) -> bool:
        """Step over these words if they are next."""
        if tuple(self.words[self.at : self.at + len(words)]) != words:
            return False
        self.at += len(words)
        return True

    def one_of(self, names: tuple[str, ...]) -> str | None:
        if self.peek() not in names:
            return None
        self.at += 1
        return self.words[self.at - 1]

    def fail(self, wanted: str) -> ValueError:
        found = repr(self.peek()) if self.peek() else "the end"
        return ValueError(f"expected {wanted} at word {self.at + 1} of caption {self.text!r}, found {found}")


def parse(text: str) -> SceneFacts:
    """The facts that a caption names.

    Args:
        text: a caption of the world's grammar, such as "a red star left of a blue ring".

    Returns:
        The named facts; objects in the order of the caption.

    Raises:
        ValueError: with the unknown word, or with what was expected where.

    >>> parse("a red star left of a blue ring").relation
    'left of'
    """
    words = _Words(text)
    style = _style(words)
    objects = [_object(words)]
    relation = None
    while words.peek() and words.peek() != "on":
        spoken = _relation(words)
        if spoken is not None and len(objects) > 1:
            raise words.fail("at most one relation, between two objects,")
        relation = relation or spoken
        if spoken is None and not (words.take(",") or words.take("and")):
            raise words.fail("a relation, ',' or 'and'")
        objects.append(_object(words))
    background, texture = _background(words)
    if words.peek():
        raise words.fail("the end of the caption")
    if len(objects) > words_of.MAX_OBJECTS:
        raise ValueError(f"caption {text!r} names {len(objects)} objects; the world has at most three")
    kinds = {kind for kind, _ in objects}
    if len(kinds) > 1:
        raise ValueError(f"caption {text!r} mixes shapes and creatures; the world has one kind per picture")
    return SceneFacts(
        kind=kinds.pop(),
        objects=tuple(facts for _, facts in objects),
        style=style,
        background=background,
        texture=texture,
        relation=relation,
    )


def _style(words: _Words) -> str | None:
    start = words.at
    words.one_of(_ARTICLES)
    style = words.one_of(words_of.STYLES)
    if style is None:
        words.at = start
        return None
    if not words.take("picture", "of"):
        raise words.fail("'picture of'")
    return style


def _relation(words: _Words) -> str | None:
    for name in words_of.RELATIONS:
        if words.take(*name.split()):
            return name
    return None


def _background(words: _Words) -> tuple[str | None, str | None]:
    if not words.take("on"):
        return None, None
    words.one_of(_ARTICLES)
    background = words.one_of(words_of.BACKGROUNDS)
    texture = words.one_of(words_of.TEXTURES)
    if not words.take("background"):
        raise words.fail("'background'")
    return background, texture


def _object(words: _Words) -> tuple[str, ObjectFacts]:
    words.one_of(_ARTICLES)
    size = words.one_of(words_of.SIZES)
    colour = words.one_of(words_of.COLOURS)
    pattern = words.one_of(words_of.PATTERNS)
    body = words.one_of(words_of.BODIES)
    if words.take("creature"):
        if size is not None:
            raise words.fail("no size for a creature")
        return "characters", _creature(words, colour, pattern, body)
    shape = words.one_of(words_of.SHAPES)
    if body is not None or (shape is None and not words.take("one")):
        raise words.fail("a shape, 'one' or 'creature'")
    return "shapes", ObjectFacts(size=size, colour=colour, pattern=pattern, shape=shape)


def _creature(words: _Words, colour: str | None, pattern: str | None, body: str | None) -> ObjectFacts:
    eyes = hat = hat_colour = None
    if words.take("with"):
        eyes = words.one_of(words_of.EYES)
        if eyes is None or not words.take("eyes"):
            raise words.fail("'open eyes' or 'sleepy eyes'")
    if words.take("wearing"):
        if words.take("no", "hat"):
            hat = "none"
        else:
            words.one_of(_ARTICLES)
            hat_colour = words.one_of(words_of.COLOURS)
            hat = "any" if words.take("hat") else words.one_of(words_of.HATS[1:])
            if hat is None:
                raise words.fail("a hat")
    return ObjectFacts(
        colour=colour,
        pattern=pattern,
        body=body,
        eyes=eyes,
        hat=hat,
        hat_colour=hat_colour,
        action=words.one_of(words_of.ACTIONS),
    )
