"""What `evaluate_grounding.py` measures besides the ladder: paraphrases, absent objects, attention's shares.

Each function takes a ready pipeline, its settings, the size of the evaluation, expressions in a forward, and
the arguments of `world_samples` that suit the model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from diffctrl.refam import RefAMConfig, metrics
from diffctrl.scripts import grounding_ladder as ladder
from diffctrl.scripts.bench.harness import Figure
from diffctrl.scripts.grounding_data import TEST_SEED, VALIDATION_SEED, world_samples


def stop_words(pipe: Any, base: RefAMConfig, count: int, batch: int, world: dict[str, Any]) -> list[Figure]:
    """How much a map changes with 0, 3 and 8 words around the same phrase."""
    samples = world_samples(max(4, count // 8), seed=TEST_SEED, splits=("stop words",), **world)
    chosen = ladder.rungs_of(base)
    figures = []
    for rung in (chosen[0], chosen[-1]):
        correlations, overlaps, scenes = [], [], []
        weighed = pipe.weigh([(s.picture(), s.expression) for s in samples], rung.config, batch_size=batch)
        found = [pipe.conclude(each, rung.config) for each in weighed]
        if rung.plain:
            found = [
                ladder.plain_grounding(w, f, rung.config, pipe) for w, f in zip(weighed, found, strict=True)
            ]
        for start in range(0, len(samples), 3):
            three = found[start : start + 3]
            for one, other in ((0, 1), (0, 2), (1, 2)):
                pair = torch.stack([three[one].heat.flatten(), three[other].heat.flatten()])
                correlations.append(float(torch.corrcoef(pair)[0, 1]))
                overlaps.append(metrics.iou(*metrics.overlap(three[one].mask, three[other].mask)))
                scenes.append(start)
        for name, values in (("map correlation", correlations), ("mask IoU", overlaps)):
            kept = metrics.bootstrap(scenes, lambda i, v=values: float(sum(v[k] for k in i) / len(i)))
            figures.append(
                Figure(
                    f"paraphrases with 0, 3, 8 stop words, {rung.name}: {name}",
                    kept.value,
                    kept.low,
                    kept.high,
                    note="mean over pairs",
                )
            )
            print(f"{figures[-1].name}: {kept.value:.3f} [{kept.low:.3f}, {kept.high:.3f}]")
    return figures


def nothing_meant(
    pipe: Any, base: RefAMConfig, count: int, batch: int, world: dict[str, Any]
) -> list[Figure]:
    """Whether the largest value of the map tells an object that is there from one that is not.

    RefAM always points somewhere. As a test of rejection, a threshold keeps 95 % of the present objects.
    """
    number = max(4, count // 8)
    peaks = {}
    for split in ("conjunction", "none"):
        samples = world_samples(number, seed=TEST_SEED + 100, splits=(split,), **world)
        pairs = [(s.picture(), s.expression) for s in samples]
        found = pipe.ground(pairs, config=base, batch_size=batch)
        peaks[split] = torch.tensor([float(each.heat.max()) for each in found])
    threshold = peaks["conjunction"].quantile(0.05)
    rejected = (peaks["none"] < threshold).double()
    kept = metrics.bootstrap(range(number), lambda i: 100 * float(rejected[list(i)].mean()))
    above = (peaks["conjunction"][:, None] > peaks["none"][None, :]).double().mean()
    print(f"nothing meant: {kept.value:.0f} % rejected where 95 % of present objects are kept; ", end="")
    print(f"ranked right {100 * float(above):.0f} %")
    return [
        Figure(
            "nothing meant: rejected (N-acc) where 95 % of present objects are kept",
            kept.value,
            kept.low,
            kept.high,
            "%",
            note="by the largest value of the map; 5 % would be chance",
        ),
        Figure(
            "nothing meant: pairs ranked right by the largest value",
            100 * float(above),
            unit="%",
            note="50 % would be chance",
        ),
    ]


def shares(pipe: Any, base: RefAMConfig, count: int, batch: int, world: dict[str, Any]) -> list[Figure]:
    """What image queries give to each kind of text token, over all blocks, with and without magnets.

    Where padding takes more than words, it is a magnet that the model was trained with.
    """
    samples = world_samples(max(6, count // 12), seed=VALIDATION_SEED, **world)
    pairs = [(s.picture(), s.expression) for s in samples]
    blocks = f"0-{pipe.weigh(pairs[:1], replace(base, blocks='0'))[0].weights.count - 1}"
    figures = []
    for magnets in ("none", "separate"):
        config = replace(base, blocks=blocks, magnet_encoding=magnets)
        kinds: dict[str, list[float]] = {}
        for each in pipe.weigh(pairs, config, batch_size=batch):
            for kind in ("content", "outside", "stop", "special", "pad", "magnet"):
                columns = list(each.rows.table.columns(kind))
                kinds.setdefault(kind, []).append(100 * float(each.weights.i2t[:, columns].sum(dim=1).mean()))
        for kind, values in kinds.items():
            found = metrics.bootstrap(range(len(values)), lambda i, v=values: sum(v[k] for k in i) / len(i))
            name = f"weight of image queries on {kind} tokens, magnets {magnets}"
            note = f"mean over {len(values)} expressions, blocks and heads"
            figures.append(Figure(name, found.value, found.low, found.high, "%", note=note))
        print(f"weight of image queries, magnets {magnets}: ", end="")
        print(", ".join(f"{kind} {sum(v) / len(v):.1f} %" for kind, v in kinds.items()))
    return figures
