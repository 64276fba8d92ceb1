"""What the embedded models' judge sees in a picture, and whether that is what the prompt asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class Reading:
    """One picture, read.

    Attributes:
        sentence: what the judge sees, in words.
        obeys: whether every fact of the prompt is there; None where the judge cannot parse the prompt.
        wrong: the facts that are not.
    """

    sentence: str
    obeys: bool | None
    wrong: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """The verdict in words."""
        if self.obeys is None:
            return "not judged: the judge does not read this prompt or size"
        return "as asked" if self.obeys else f"not as asked: {', '.join(self.wrong)}"


def read(image: Image, prompt: str) -> Reading:
    """Read a picture of an embedded image model."""
    import numpy as np
    import torch

    from diffctrl.zoo import judge

    if image.width != image.height:
        return Reading("the judge reads square pictures only", None)
    pixels = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)
    try:
        spec = judge.parse(prompt)
    except ValueError:
        return Reading(str(judge.read(pixels)), None)
    verdict = judge.check(pixels, spec)
    wrong = tuple(fact for fact, holds in verdict.facts.items() if not holds)
    return Reading(str(verdict.reading), verdict.exact, wrong)
