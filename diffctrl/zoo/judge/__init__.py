"""An analytic judge: reads a picture of the worlds and checks a caption against it. Nothing is learned."""

from .checking import Verdict, check, compare
from .parsing import parse
from .reading import Instance, Reading
from .scoring import evaluate, fact_rates, wilson
from .seeing import read

__all__ = [
    "Instance",
    "Reading",
    "Verdict",
    "check",
    "compare",
    "evaluate",
    "fact_rates",
    "parse",
    "read",
    "wilson",
]
