"""An analytic judge: reads a picture of the worlds back and checks a caption against it. Nothing is learned."""

from .parsing import parse

__all__ = ["parse"]
