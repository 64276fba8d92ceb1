"""What a search can reward. Higher is better, always; NaN says that a picture could not be scored."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from diffctrl.errors import BadRequestError, nearest
from diffctrl.softpag.headhunt.ranking import Goal, WeightedZ

_SPEC = re.compile(r"(?P<name>[A-Za-z_]+)(?::(?P<argument>[^=]+))?(?:=(?P<weight>[^=:]+))?")


@runtime_checkable
class Objective(Protocol):
    """A score of pictures. The version changes whenever scores do: logs and head sets carry it.

    Two more attributes are read where there are any: `bounds`, its least and largest value, which lets a
    search leave out what cannot be chosen any more, and `apart`, True where it reads one picture after
    another on the CPU, so that several processes score faster than one.
    """

    name: str
    version: str

    def score(self, images: Any, prompts: Sequence[str]) -> list[float]:
        """One number per picture. `images`: (N, 3, H, W) float in [0, 1], or what the sampler makes."""
        ...


class JudgeObjective:
    """The share of the facts a prompt names that the embedded models' judge finds in the picture."""

    name, version = "judge", "1"
    bounds, apart = (0.0, 1.0), True

    def score(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        from diffctrl.zoo import judge

        scores = []
        for image, prompt in zip(images, prompts, strict=True):
            facts = judge.check(image.float().cpu(), judge.parse(prompt)).facts
            scores.append(sum(facts.values()) / len(facts))
        return scores


class StyleObjective:
    """1 where the judge calls the picture this style, whatever the prompt."""

    version = "1"
    bounds, apart = (0.0, 1.0), True

    def __init__(self, style: str) -> None:
        from diffctrl.zoo.worlds import vocabulary

        if style not in vocabulary.STYLES:
            raise BadRequestError(
                f"style:{style} is no style of the world{nearest(style, vocabulary.STYLES)}; accepted: "
                f"{', '.join(vocabulary.STYLES)}"
            )
        self.name, self._style = f"style:{style}", style

    def score(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        from diffctrl.zoo import judge

        return [float(judge.read(image.float().cpu()).style == self._style) for image in images]


class SharpnessObjective:
    """log10 of the variance of the Laplacian of the luminance: fine contrast. Noise is sharp too."""

    name, version = "sharpness", "1"

    def score(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        weights = torch.tensor([0.299, 0.587, 0.114], device=images.device)
        luma = torch.einsum("nchw,c->nhw", images.float(), weights)[:, None]
        kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], device=images.device)[None, None]
        variance = torch.nn.functional.conv2d(luma, kernel).var(dim=(1, 2, 3), unbiased=False)
        return torch.log10(variance.double() + 1e-12).tolist()


class HarmonicMean:
    """The harmonic mean of other objectives, picture by picture; NaN where one of them is not positive."""

    def __init__(self, *parts: Objective) -> None:
        if len(parts) < 2:
            raise ValueError(f"a harmonic mean needs two objectives or more, got {len(parts)}")
        self._parts = parts
        self.name = f"harmonic({','.join(part.name for part in parts)})"
        self.version = ",".join(part.version for part in parts)

    def score(self, images: Any, prompts: Sequence[str]) -> list[float]:
        columns = [part.score(images, prompts) for part in self._parts]
        return [
            len(row) / math.fsum(1 / value for value in row) if all(value > 0 for value in row) else math.nan
            for row in zip(*columns, strict=True)
        ]


_PLAIN = {"judge": JudgeObjective, "sharpness": SharpnessObjective}
_LEARNED = ("pickscore", "clip", "aesthetic")
NAMES = (*_PLAIN, "style", *_LEARNED)


def find(name: str, argument: str | None = None, device: str = "cpu") -> Objective:
    """The objective of this name.

    Args:
        name: one of `NAMES`.
        argument: the style, or the folder of a learned scorer.
        device: where a learned scorer runs.

    Raises:
        BadRequestError: there is none, or its argument is missing or wrong.
    """
    if name not in NAMES:
        raise BadRequestError(
            f"unknown objective {name!r}{nearest(name, NAMES)}; accepted: {', '.join(NAMES)}"
        )
    if name in _PLAIN:
        if argument is not None:
            raise BadRequestError(f"the objective {name} takes nothing after a colon, got {argument!r}")
        return _PLAIN[name]()
    if argument is None:
        what = "a style, as in style:soft" if name == "style" else f"a folder, as in {name}:models/{name}"
        raise BadRequestError(f"the objective {name} needs {what}")
    if name == "style":
        return StyleObjective(argument)
    from diffctrl.softpag.headhunt import learned

    return learned.load(name, argument, device)


def parse_goal(specs: Sequence[str], device: str = "cpu") -> Goal:
    """A goal from text: NAME[:ARGUMENT][=WEIGHT]; several are joined as a weighted z-score.

    Raises:
        BadRequestError: a text is none of these.
    """
    parts: list[Objective] = []
    weights = []
    for text in specs:
        match = _SPEC.fullmatch(text.strip())
        if match is None:
            raise BadRequestError(f"--objective {text} is not NAME[:ARGUMENT][=WEIGHT], as in sharpness=0.5")
        try:
            weights.append(float(match["weight"] or 1.0))
        except ValueError:
            raise BadRequestError(f"--objective {text}: {match['weight']} is not a number") from None
        if not math.isfinite(weights[-1]):
            raise BadRequestError(f"--objective {text}: the weight is not finite")
        parts.append(find(match["name"], match["argument"], device))
    names = [part.name for part in parts]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise BadRequestError(
            f"--objective {twice} is given twice; give each objective once, with one weight"
        )
    if len(parts) == 1:
        if weights != [1.0]:
            raise BadRequestError(f"--objective {specs[0]}: a weight has no effect on a single objective")
        return Goal(tuple(parts))
    return Goal(tuple(parts), WeightedZ(tuple(weights)))
