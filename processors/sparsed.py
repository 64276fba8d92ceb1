"""SparseD: head-specific block-sparse attention for diffusion language models."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from diffctrl.control import Contributions
from diffctrl.control.text import TextControl
from diffctrl.errors import nearest
from diffctrl.families.text import TextModel
from diffctrl.sparsed import ModelShape, SparseDConfig, SparseDController


class SparseDAttnProcessor(TextControl):
    """Dense attention for the first steps of a generation, then only the key blocks that each head looked at.

    Args:
        config: the settings; keywords change single fields, as in `SparseDAttnProcessor(select=0.5)`.

    Applied to a language model with `diffctrl.apply`, which returns a handle with `begin`, `set_step` and
    `reset` for the sampler, and `controller` for the patterns. The object itself keeps no state: one may be
    applied to several models.

    Raises:
        ValueError: a setting is unknown or out of range.

    Source: arXiv 2509.24014. The pattern is taken in one extra pass over Q K^T, from the dense step's own
    log-sum-exp, and not from a second softmax over strips of rows as in the authors' code.
    """

    method = "sparsed"
    families = ("llada", "dream")
    contributes = Contributions(masks=True, whole=True)

    def __init__(self, config: SparseDConfig | None = None, **settings: Any) -> None:
        known = [field.name for field in fields(SparseDConfig)]
        for name in settings:
            if name not in known:
                raise ValueError(
                    f"sparsed has no option {name!r}{nearest(name, known)}; accepted: {', '.join(known)}"
                )
        config = config or SparseDConfig()
        self.config = replace(config, **settings) if settings else config

    def state(self, model: TextModel) -> SparseDController:
        shape = ModelShape(
            len(model.sites), model.heads, model.kv_heads, model.head_dim, model.linear_weights
        )
        return SparseDController(self.config, shape, lambda: model.device)

    def describe(self) -> str:
        config = self.config
        parts = [f"select={config.select:g}", f"block_size={config.block_size}", f"skip={config.skip:g}"]
        for field in fields(config):
            value = getattr(config, field.name)
            if field.name not in ("select", "block_size", "skip") and value != field.default:
                parts.append(f"{field.name}={value}")
        return f"sparsed({', '.join(parts)})"


__all__ = ["SparseDAttnProcessor"]
