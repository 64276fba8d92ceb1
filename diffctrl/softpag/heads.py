"""Names of attention heads: L3H1, L3 (a whole layer), attn2:L0H5 (another stack), L3H1=0.7 (its strength)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

_PATTERN = re.compile(
    r"(?:(?P<stack>[A-Za-z_][A-Za-z0-9_]*):)?L(?P<layer>\d+)(?:H(?P<head>\d+))?(?:=(?P<u>[^=]+))?"
)


@dataclass(frozen=True, slots=True, order=True)
class Head:
    """One head, or all heads of a layer.

    Attributes:
        layer: 0-based. Without a stack it counts over all of the model's joint stacks (FLUX: double blocks
            0-18, then single blocks 19-56), with a stack inside it.
        head: 0-based, or None for every head of the layer.
        stack: a stack by name, or None for the flat index.
        u: a strength of its own in [0, 1], or None for the common one.
    """

    layer: int
    head: int | None = None
    stack: str | None = None
    u: float | None = None

    def __post_init__(self) -> None:
        if self.u is not None and not 0.0 <= self.u <= 1.0:
            raise ValueError(f"head {self}: its strength is not in [0, 1]")

    def __str__(self) -> str:
        stack = f"{self.stack}:" if self.stack else ""
        head = "" if self.head is None else f"H{self.head}"
        return f"{stack}L{self.layer}{head}" + ("" if self.u is None else f"={self.u!r}")


def parse_head(text: str) -> Head:
    """Read 'L3H1', 'L3', 'attn2:L0H5' or 'L3H1=0.7'.

    Raises:
        ValueError: the text is none of these.
    """
    match = _PATTERN.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"{text!r} names no attention head; write L3H1 (layer 3, head 1), L3 (every head of layer 3) or "
            "attn2:L0H5 (a stack by its name), with =0.7 behind it for a strength of its own"
        )
    head = match["head"]
    try:
        u = None if match["u"] is None else float(match["u"])
    except ValueError:
        raise ValueError(f"{text!r}: {match['u']} is no strength; write a number in [0, 1]") from None
    return Head(int(match["layer"]), None if head is None else int(head), match["stack"], u)


def _one(item: Any) -> Head:
    if isinstance(item, Head):
        return item
    if isinstance(item, str):
        return parse_head(item)
    first, second = item
    if isinstance(first, (Head, str, tuple)):  # an entry of a mapping: head -> strength
        return replace(_one(first), u=float(second))
    return Head(int(first), int(second))


def parse_heads(heads: str | Mapping[Any, float] | Iterable[Any]) -> tuple[Head, ...]:
    """Heads from 'L3H1,L4H0=0.7', from an iterable, or from a mapping head -> strength.

    Entries are names, (layer, head) pairs and `Head` objects.

    Raises:
        ValueError: an entry is none of these, or one head is given two strengths.
    """
    if isinstance(heads, str):
        items: Iterable[Any] = heads.split(",")
    else:
        items = heads.items() if isinstance(heads, Mapping) else heads
    parsed = tuple(dict.fromkeys(_one(item) for item in items))
    strengths: dict[Head, float | None] = {}
    for head in parsed:
        if strengths.setdefault(replace(head, u=None), head.u) != head.u:
            raise ValueError(f"head {replace(head, u=None)} is given two strengths; give one")
    return parsed
