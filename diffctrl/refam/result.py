"""What grounding an expression gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffctrl.refam.config import RefAMConfig
from diffctrl.refam.locate import Box
from diffctrl.refam.tokens import TokenTable


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grounding:
    """Where a referring expression points, in a picture or in the anchor frame of a video.

    Attributes:
        expression: what was asked for.
        point: (x, y) in pixels of the picture that was given, not of the model's.
        mask: (H, W) bool, on the CPU.
        box: (left, top, right, bottom) of the mask in pixels, right and bottom exclusive; None if it is
            empty.
        heat: (h, w) float32 on the token grid, spatial bias included.
        word_maps: (h, w) float32 per word with tokens; the key is the word, "word#2" for its second
            occurrence.
        table: every text token: word, kind, whether its column was summed, how many blocks called it a sink.
        sinks: indices of the sinks in the table.
        flags: what went another way than planned, in words.
        timings: seconds of the host in the parts; what one part starts on a GPU, a later one may wait for.
        size: (height, width) of the picture that was given.
        model_size: (height, width) at which the model saw it.
        config: the settings.
        frame: of a video, the anchor frame; 0 of a picture.
        frame_maps: of a video, (F, h, w) float32 maps of its latent frames; None of a picture.
        track: of a video, (frames, H, W) bool: of each latent frame's own map, or SAM 2's; None of a picture.
    """

    expression: str
    point: tuple[float, float]
    mask: Tensor
    box: Box | None
    heat: Tensor
    word_maps: Mapping[str, Tensor]
    table: TokenTable
    sinks: tuple[int, ...]
    flags: Mapping[str, str]
    timings: Mapping[str, float]
    size: tuple[int, int]
    model_size: tuple[int, int]
    config: RefAMConfig
    frame: int = 0
    frame_maps: Tensor | None = None
    track: Tensor | None = None

    def as_dict(self) -> dict[str, Any]:
        """All but maps and masks, as values that JSON keeps."""
        return {
            "expression": self.expression,
            "point": list(self.point),
            "box": None if self.box is None else list(self.box),
            "mask_pixels": int(self.mask.sum()),
            "grid": list(self.heat.shape),
            "size": list(self.size),
            "model_size": list(self.model_size),
            "frame": self.frame,
            "tokens": [
                {
                    "index": t.index,
                    "piece": t.piece,
                    "word": t.word,
                    "kind": t.kind,
                    "encoder": t.encoder,
                    "kept": t.kept,
                    "sink_votes": t.votes,
                }
                for t in self.table.tokens
            ],
            "sinks": list(self.sinks),
            "flags": dict(self.flags),
            "timings": {name: round(seconds, 4) for name, seconds in self.timings.items()},
            "settings": self.config.as_dict(),
        }
