"""Worked values: grids drawn out, and block counts at the sizes of real videos."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Grid:
    """A small mask: `rows` of it drawn out ('1' is attended), and how many blocks are on."""

    name: str
    frames: int
    tokens: int
    block: int
    kept: int
    rows: dict[int, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    rules: tuple[str, ...] = ("hybrid", "reference")


_T1 = """
11111111111.111.
1111111111111111
1111111111111111
11111111.111.111
111111111111111.
1111111111111111
1111111111111111
111111111111.111
1111111111111111
1111111111111111
1111111111111111
1111111111111111
1111111.11111111
1111111111111111
1111111111111111
1111.11111111111
"""
_NO_SINK = {8: "111.111111111111", 11: ".111111111111111", 12: "111.111.11111111", 15: ".111.11111111111"}
_DECAYED = {0: "1111111111..11..", 1: "11111111111.111."}

GRIDS = (
    Grid("T1", 4, 16, 4, 248, dict(enumerate(_T1.split())), {"sink": True}),
    Grid("T2", 4, 16, 4, 244, {**dict(enumerate(_T1.split())), **_NO_SINK}),
    Grid("T3", 4, 16, 4, 232, _DECAYED, {"sink": True, "decay_factor": 0.5}),
    Grid("T3 floor", 4, 16, 4, 232, _DECAYED, {"sink": True, "decay_factor": 0.25}),
    Grid("T4", 9, 8, 4, 276, {0: "1111111111..11..11", 10: "..1111111111111111"}),
    Grid("T4 sink", 9, 8, 4, 284, {}, {"sink": True}),
    Grid("T5 a", 8, 12, 4, 462, {}, {"sink": True}),
    Grid("T5 b", 6, 20, 4, 660, {}, {"decay_factor": 0.5}),
    Grid("T5 c", 8, 64, 16, 808, {}, {"decay_factor": 0.6, "sink": True}),
    Grid("T5 d", 10, 48, 16, 630),
    Grid("T6", 5, 10, 4, 159, {0: "111111111.11.", 12: ".11.1.1111111"}, {"decay_factor": 0.5}, ("hybrid",)),
    Grid("T6 cover", 5, 10, 4, 165, {}, {"decay_factor": 0.5}, ("cover",)),
)

# (frames, tokens, sink) -> pairs that the paper's equation 4 attends.
PAPER_PAIRS = {
    (4, 16, False): 3664,
    (4, 16, True): 3808,
    (9, 8, False): 3376,
    (9, 8, True): 3640,
    (12, 2, False): 284,
    (12, 2, True): 314,
}


@dataclass(frozen=True)
class Clip:
    """A real size: blocks per side, blocks that "hybrid" keeps, density of "reference"."""

    name: str
    frames: int
    tokens: int
    side: int
    decay_factor: float
    sink: bool
    kept: int
    reference: float


CLIPS = (
    Clip("Wan 480x832x81", 21, 1560, 256, 0.2, True, 22307, 0.34384),
    Clip("Wan 720x1280x81", 21, 3600, 591, 0.2, True, 91678, 0.26467),
    Clip("Wan 720x1280x81, no decay", 21, 3600, 591, 1.0, True, 138458, 0.39856),
    Clip("Wan 768x1280x69", 18, 3840, 540, 0.2, True, 83728, 0.28713),
    Clip("Wan 720x1280x161", 41, 3600, 1154, 1.0, True, 346132, 0.26121),
    Clip("Wan 720x1280x321", 81, 3600, 2279, 1.0, True, 843210, 0.16303),
    Clip("Wan2.2-5B 704x1280x121", 31, 880, 214, 0.2, True, 14354, 0.29937),
    Clip("HunyuanVideo 768x1280x117", 30, 3840, 900, 0.95, False, 222452, 0.27463),
    Clip("HunyuanVideo 720x1280x129", 33, 3600, 929, 0.95, False, 233174, 0.27176),
    Clip("HunyuanVideo 720x1280x253", 64, 3600, 1800, 1.0, False, 575960, 0.17758),
    Clip("HunyuanVideo 720x1280x253, sink", 64, 3600, 1800, 1.0, True, 621658, 0.19169),
    Clip("HunyuanVideo 720x1280x509", 128, 3600, 3600, 1.0, False, 1411400, 0.10881),
    Clip("HunyuanVideo 720x1280x509, sink", 128, 3600, 3600, 1.0, True, 1508146, 0.11628),
    Clip("Mochi 480x848x163", 28, 1590, 348, 1.0, True, 45057, 0.37078),
    Clip("Mochi 480x848x667", 112, 1590, 1392, 1.0, True, 281026, 0.14408),
    Clip("CogVideoX 480x720x49", 13, 1350, 138, 1.0, True, 11600, 0.60675),
    Clip("LTX 512x768x161", 21, 384, 63, 1.0, True, 2015, 0.50768),
)
