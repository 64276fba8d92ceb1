"""Capture: exact softmax weights of chosen queries and keys, reduced while a model runs, never S x S.

This package is the mathematics: tensors in, tensors out. What reads them off a model is
`diffctrl.capture(pipe_or_model, spec)`, see `diffctrl/processors/capture.py`.
"""

from .reduce import CaptureResult, Sink, accumulate
from .routes import ROUTES, AttentionCall, Part, Route, choose_route, extra_bytes, weights
from .spec import CaptureSpec
from .tokens import Tokens

__all__ = [
    "ROUTES",
    "AttentionCall",
    "CaptureResult",
    "CaptureSpec",
    "Part",
    "Route",
    "Sink",
    "Tokens",
    "accumulate",
    "choose_route",
    "extra_bytes",
    "weights",
]
