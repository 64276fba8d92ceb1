"""Attention control for diffusion models: sparse, quantised, guided, grounded, on one engine that composes."""

from . import _checkout

_checkout.install()

__version__ = "0.1.0"
