"""An analytic judge: reads a picture or a clip of the worlds and checks a caption. Nothing is learned."""

from .checking import Verdict, check, compare
from .clips import ClipReading, ClipVerdict, check_clip, clip_rates, compare_clip, read_clip
from .parsing import parse
from .reading import Instance, Reading
from .scoring import evaluate, fact_rates, wilson
from .seeing import read

__all__ = [
    "ClipReading",
    "ClipVerdict",
    "Instance",
    "Reading",
    "Verdict",
    "check",
    "check_clip",
    "clip_rates",
    "compare",
    "compare_clip",
    "evaluate",
    "fact_rates",
    "parse",
    "read",
    "read_clip",
    "wilson",
]
