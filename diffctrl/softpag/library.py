"""Head sets by name: those that the package ships, found by `diffctrl headhunt` on embedded models.

They lie in `headsets/<model>/<name>.json`; the file `style-soft.json` is called `style:soft`.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from diffctrl.errors import nearest
from diffctrl.softpag.headset import HeadSet, Signature

FOLDER = Path(__file__).resolve().with_name("headsets")
# The set that is taken where no heads are named.
DEFAULT = "quality"
_NAME = re.compile(r"[a-z]+(:[a-z0-9_]+)?")


def is_name(text: str) -> bool:
    """Whether the text has the form of a set's name; heads are written L3, L3H1 or attn2:L0H5.

    >>> is_name("quality"), is_name("style:soft"), is_name("attn2:L0H5"), is_name("L3")
    (True, True, False, False)
    """
    return _NAME.fullmatch(text.strip()) is not None


def names() -> list[str]:
    """The names of all shipped sets."""
    return sorted({path.stem.replace("-", ":", 1) for path in FOLDER.glob("*/*.json")})


def check_name(name: str) -> None:
    """Refuse a name that no shipped set has.

    Raises:
        ValueError: there is none.
    """
    if name not in names():
        known = ", ".join(names()) or "none"
        raise ValueError(
            f"there is no head set {name!r}{nearest(name, names())}; shipped: {known}. Name heads as in "
            "'L3H1,L4', or load a file of your own with HeadSet.load"
        )


def find(name: str, signature: Signature) -> HeadSet:
    """The shipped set of this name for a model of this shape.

    Raises:
        ValueError: there is none of this name, or none for such a model, or the search for it found no head.
    """
    found = stored(name, signature)
    if not len(found):
        raise ValueError(
            f"the head set {name!r} is empty: in the search for it no head did better than no guidance, and "
            "nothing would be perturbed; name heads as in 'L3H1,L4', or another set"
        )
    return found


def stored(name: str, signature: Signature) -> HeadSet:
    """The same, also where the search found no head: a record of it.

    Raises:
        ValueError: there is none of this name, or none for such a model.
    """
    check_name(name)
    sets = _named(name)
    for each in sets:
        if each.signature == signature:
            return each
    shapes = "; ".join(str(each.signature) for each in sets)
    raise ValueError(
        f"the head set {name!r} was found on {shapes}, and the model is {signature}: its heads mean nothing "
        "there; run `diffctrl headhunt` on this model"
    )


def default(signature: Signature) -> HeadSet | None:
    """The set for a model of this shape where no heads are named, or None."""
    return next((each for each in _named(DEFAULT) if each.signature == signature and len(each)), None)


def _named(name: str) -> list[HeadSet]:
    return [_load(path) for path in sorted(FOLDER.glob(f"*/{name.replace(':', '-', 1)}.json"))]


@lru_cache(maxsize=64)
def _load(path: Path) -> HeadSet:
    return HeadSet.load(path)
