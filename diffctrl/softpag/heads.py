"""Names of attention heads: L3H1, L3 (a whole layer), attn2:L0H5 (another stack)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_PATTERN = re.compile(r"(?:(?P<stack>[A-Za-z_][A-Za-z0-9_]*):)?L(?P<layer>\d+)(?:H(?P<head>\d+))?")


@dataclass(frozen=True, slots=True, order=True)
class Head:
    """One head, or all heads of a layer.

    Attributes:
        layer: 0-based. Without a stack it counts over all of the model's joint stacks (FLUX: double blocks
            0-18, then single blocks 19-56), with a stack inside it.
        head: 0-based, or None for every head of the layer.
        stack: a stack by name, or None for the flat index.
    """

    layer: int
    head: int | None = None
    stack: str | None = None

    def __str__(self) -> str:
        stack = f"{self.stack}:" if self.stack else ""
        return f"{stack}L{self.layer}" + ("" if self.head is None else f"H{self.head}")


def parse_head(text: str) -> Head:
    """Read 'L3H1', 'L3' or 'attn2:L0H5'.

    Raises:
        ValueError: the text is none of these.
    """
    match = _PATTERN.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"{text!r} names no attention head; write L3H1 (layer 3, head 1), L3 (every head of layer 3) or "
            "attn2:L0H5 (a stack by its name)"
        )
    head = match["head"]
    return Head(int(match["layer"]), None if head is None else int(head), match["stack"])


def parse_heads(heads: str | Iterable[Head | str | tuple[int, int]]) -> tuple[Head, ...]:
    """Heads from 'L3H1,L4H0', or from an iterable of names, (layer, head) pairs and `Head` objects."""
    items = heads.split(",") if isinstance(heads, str) else heads
    parsed = []
    for item in items:
        if isinstance(item, Head):
            parsed.append(item)
        elif isinstance(item, str):
            parsed.append(parse_head(item))
        else:
            layer, head = item
            parsed.append(Head(int(layer), int(head)))
    return tuple(dict.fromkeys(parsed))
