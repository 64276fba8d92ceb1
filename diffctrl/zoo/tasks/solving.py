"""The true answer of an exercise, read off its text alone: what the model's answers are checked against."""

import re

from . import vocabulary as v

_STRING = re.compile(r"[a-z0-9]+")
_INVERSE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def solve(prompt: str) -> str:
    """The one right answer to a prompt, as canonical text.

    Args:
        prompt: an exercise as a user types it, for instance `add 123 + 456`.

    Raises:
        ValueError: the text is no exercise of a known form; says which forms there are.

    >>> solve("facts big cat 7 plum. shy owl 2 fig. get shy owl, big cat")
    'shy owl 2 fig, big cat 7 plum'
    >>> solve("scene red star left of blue ring. what is right of red star ?")
    'blue ring'
    >>> solve("add 58 + 67 ="), solve("sort k2b0a")
    ('125', '02abk')
    """
    words = re.findall(r"[a-z0-9]+|[,.+]", re.sub(r"[\s=?]+$", "", prompt.lower()))
    task, rest = (words[0], words[1:]) if words else ("", [])
    solver = _SOLVERS.get(task)
    if solver is None or not rest:
        raise ValueError(
            f"{prompt[:60]!r} is no exercise of scenes-lm. Accepted are: facts ... get ..., scene ... what "
            "is ..., copy ..., reverse ..., sort ..., add ... + ..."
        )
    try:
        return solver(rest)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{prompt[:60]!r} cannot be answered: {error}") from error


def is_right(prompt: str, answer: str) -> bool:
    """Whether an answer is exactly the right one; spaces at its ends do not count."""
    return answer.strip() == solve(prompt)


def _facts(words: list[str]) -> str:
    border = len(words) - 1 - words[::-1].index("get")
    values: dict[tuple[str, str], str] = {}
    body = words[:border]
    for place, word in enumerate(body):
        fact = body[place : place + 4]
        if word in v.ADJECTIVES and len(fact) == 4 and fact[1] in v.NOUNS and fact[3] in v.FOODS:
            values[fact[0], fact[1]] = f"{fact[2]} {fact[3]}"
    asked = " ".join(words[border + 1 :]).split(" , ")
    keys = [tuple(key.split(" ")) for key in asked]
    return ", ".join(f"{key[0]} {key[1]} {values[key[0], key[1]]}" for key in keys)


def _scene(words: list[str]) -> str:
    border = words.index("what")
    sentences = " ".join(words[:border]).split(" .")
    relation, *known = (word for word in words[border + 2 :] if word != "of")
    for sentence in sentences:
        parts = [word for word in sentence.split() if word != "of"]
        if len(parts) != 5:
            continue
        first, told, second = parts[:2], parts[2], parts[3:]
        if told == relation and second == known:
            return " ".join(first)
        if _INVERSE[told] == relation and first == known:
            return " ".join(second)
    raise ValueError(f"no sentence tells what is {relation} of {' '.join(known)}")


def _string(words: list[str]) -> list[str]:
    """The symbols of what is copied: words, or the characters of one string."""
    if len(words) == 1 and words[0] not in v.ID:
        return list(words[0])
    return words


def _joined(symbols: list[str]) -> str:
    together = all(len(symbol) == 1 for symbol in symbols)
    return ("" if together else " ").join(symbols)


def _copy(words: list[str]) -> str:
    return _joined(_string(words))


def _reverse(words: list[str]) -> str:
    return _joined(_string(words)[::-1])


def _sort(words: list[str]) -> str:
    return _joined(sorted("".join(words)))


def _add(words: list[str]) -> str:
    first, mark, second = words
    if mark != "+":
        raise ValueError(f"a sum has a +, not {mark!r}")
    return str(int(first) + int(second))


_SOLVERS = {
    "facts": _facts,
    "scene": _scene,
    "copy": _copy,
    "reverse": _reverse,
    "sort": _sort,
    "add": _add,
}
