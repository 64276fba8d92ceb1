"""Scores many pictures: how often each named fact holds, with intervals."""

import math
from collections.abc import Sequence

from torch import Tensor

from .checking import Verdict, check
from .parsing import parse

_SCENE_FACTS = ("kind", "count", "background", "texture", "style", "relation")


def wilson(hits: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % Wilson interval of a rate; (0, 1) for no trials."""
    if total == 0:
        return 0.0, 1.0
    rate = hits / total
    middle = rate + z * z / (2 * total)
    half = z * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max((middle - half) / scale, 0.0), min((middle + half) / scale, 1.0)


def _rate(hits: int, total: int) -> dict[str, float | int]:
    low, high = wilson(hits, total)
    return {
        "rate": hits / total if total else math.nan,
        "hits": hits,
        "total": total,
        "low": low,
        "high": high,
    }


def evaluate(images: Tensor | Sequence[Tensor], captions: Sequence[str]) -> dict[str, dict]:
    """Judge pictures against their captions.

    Args:
        images: N pictures (3, H, H), or one tensor (N, 3, H, H), in [0, 1]. captions: N strings of the
        grammar.

    Returns:
        {"exact": rate, "exact_by_kind": {"shapes": {1: rate, 2: rate, ...}, ...}, "facts": {name: rate}}. A
        rate is {"rate", "hits", "total", "low", "high"} with a 95 % Wilson interval. A fact of an object is
        counted once per object that it is named of, a fact of the scene once per picture.
    """
    if len(images) != len(captions):
        raise ValueError(f"as many images as captions are needed, got {len(images)} and {len(captions)}")
    specs = [parse(caption) for caption in captions]
    verdicts = [check(image, spec) for image, spec in zip(images, specs, strict=True)]
    by_kind: dict[str, dict[int, list[bool]]] = {}
    for spec, verdict in zip(specs, verdicts, strict=True):
        by_kind.setdefault(spec.kind, {}).setdefault(len(spec.objects), []).append(verdict.exact)
    return {
        "exact": _rate(sum(verdict.exact for verdict in verdicts), len(verdicts)),
        "exact_by_kind": {
            kind: {count: _rate(sum(each), len(each)) for count, each in sorted(counts.items())}
            for kind, counts in sorted(by_kind.items())
        },
        "facts": fact_rates(verdicts),
    }


def fact_rates(verdicts: Sequence[Verdict]) -> dict[str, dict[str, float | int]]:
    """Rate per named fact; see `evaluate`."""
    counts: dict[str, list[bool]] = {}
    for verdict in verdicts:
        for name, holds in verdict.facts.items():
            if name in _SCENE_FACTS:
                counts.setdefault(name, []).append(holds)
        for one in verdict.objects:
            for name, holds in one.items():
                counts.setdefault(name, []).append(holds)
    return {name: _rate(sum(each), len(each)) for name, each in sorted(counts.items())}
