"""What the embedded models' judges see in a picture or clip, and whether the prompt asked for that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

_SHORTEST_CLIP = 17  # frames from which a motion is read


@dataclass(frozen=True, slots=True)
class Reading:
    """One picture or clip, read.

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


def read_clip(frames: np.ndarray, prompt: str) -> Reading:
    """Read a clip (T, H, W, 3) uint8 of an embedded video model."""
    import numpy as np
    import torch

    from diffctrl.zoo import clips, judge

    length, height, width, _ = frames.shape
    if height != width or length < _SHORTEST_CLIP:
        return Reading(f"the judge reads square clips of at least {_SHORTEST_CLIP} frames only", None)
    video = torch.from_numpy(frames.astype(np.float32) / 255).permute(0, 3, 1, 2)
    reading = judge.read_clip(video)
    try:
        wanted = clips.parse(prompt)
    except ValueError:
        return Reading(str(reading), None)
    verdict = judge.compare_clip(reading, wanted)
    wrong = tuple(fact for fact, holds in verdict.facts.items() if not holds)
    return Reading(str(verdict.reading), verdict.exact, wrong)
