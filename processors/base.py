"""The template of every attention processor of diffctrl: project, act, attend, act, finish."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from diffctrl.attention import Shard, attend, engine_chooses, gives_lse
from diffctrl.control import Control
from diffctrl.families import Call, Inputs, Site


def _site_of(attn: nn.Module) -> Site:
    site = getattr(attn, "diffctrl_site", None)
    if site is None:
        raise RuntimeError(
            f"this {type(attn).__name__} knows no context: call `diffctrl.attach(model)` before "
            "`model.set_attn_processor(...)`, or use `diffctrl.apply(pipe_or_model, processor)`, which does "
            "both"
        )
    if site.context.info is None:
        raise RuntimeError(
            f"{site.name} ran outside of a forward of its model, so that its context is not known; call the "
            "model"
        )
    return site


class ControlAttnProcessor(Control, AttnProcessor):
    """A diffusers attention processor whose controls act between the model's projections and its output
    layer.

    The signature is the union of the stock processors' keyword names (diffusers inspects it and drops what is
    not named). The object is never written to while it runs.
    """

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(self) -> None:
        self.controls: tuple[Control, ...] = (self,)

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        temb: Tensor | None = None,
        rotary_emb: Any = None,
        ip_hidden_states: Any = None,
    ) -> Any:
        site = _site_of(attn)
        rotary = image_rotary_emb if image_rotary_emb is not None else rotary_emb
        text_length = site.context.info.text_length
        inputs = Inputs(
            hidden_states,
            encoder_hidden_states,
            attention_mask,
            temb,
            rotary,
            text_length,
            ip_hidden_states,
            site.stock if site.route.adapts else None,
        )
        controls = [c for c in self.controls if c.acts_on(site)]
        if not controls:  # a shared processor also lands on sites that the method leaves alone
            return site.stock(attn, **inputs.given(site.route))
        call = site.route.project(attn, inputs)
        for control in controls:
            call = control.transform_inputs(site, call)
        output, lse = self._attend(attn, site, call, any(c.wants_lse(site) for c in controls))
        for control in controls:
            control.observe(site, call, lse)
        for control in controls:
            output = control.transform_output(site, call, output)
        for query, key, value in call.added:
            branch: Any = attend(query, key, value, backend=self._attention_backend, stats=site.context.stats)
            output = output + branch
        result = site.route.finish(attn, call, output)
        for control in controls:
            result = control.transform_result(site, call, result)
        return result

    def _attend(
        self, attn: nn.Module, site: Site, call: Call, wants_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The output, and the log-sum-exp where it is wanted and comes with the very same output."""
        stats = site.context.stats
        shard = None if self._parallel_config is None else _shard(site, call)
        # Block lists carry the valid lengths of the mask themselves: see `diffctrl.control.publish`.
        mask, attn_mask = site.mask, call.attention_mask
        whole = self._parallel_config is None or shard is not None
        if mask is None and whole and engine_chooses(call.query, None, self._attention_backend):
            mask = site.valid_keys  # the stock mask says the same, and loses the fast kernels
        if mask is None and site.route.dense is not None and shard is None:
            if not torch.compiler.is_compiling():  # the engine does not count inside compiled code either
                stats.record("stock")
            return site.route.dense(attn, call, self._attention_backend), None
        if site.mask is not None and call.attention_mask is not None and site.context.info.text_valid is None:
            raise ValueError(
                f"{site.name} got an attention mask of its caller, which cannot be joined with the block "
                "lists of a control; leave the mask out, or take the control off"
            )
        settings = {
            "mask": mask,
            "attn_mask": attn_mask if mask is None else None,
            "backend": self._attention_backend,
            "parallel_config": self._parallel_config if call.parallel else None,
        }
        operands = call.query, call.key, call.value
        if wants_lse and gives_lse(*operands, **settings):
            result: Any = attend(*operands, **settings, return_lse=True, stats=stats)
            return result
        output: Any = attend(*operands, **settings, shard=shard, stats=stats)
        return output, None


def _shard(site: Site, call: Call) -> Shard | None:
    """This device's part of the sequence, where the engine has to exchange it; None for the stock way."""
    info, text = site.context.info, call.text
    # diffusers splits text as well where a model has a plan of its own; a plan of ours leaves it whole.
    whole_text = text is not None and text.length == info.text_length
    if not call.parallel or not (whole_text or site.mask is not None):
        return None
    if text is not None and not whole_text:
        raise RuntimeError(
            f"{site.name}: block lists need the text whole on every device, but the plan of the context "
            "parallelism splits it; pass cp_plan=diffctrl.control.context_parallel_plan(model) to "
            "`model.enable_parallelism`"
        )
    return Shard(call.image.start, call.image.stop, math.prod(site.context.grid()))


class NeutralAttnProcessor(ControlAttnProcessor):
    """Takes every attention of a model apart and puts it together again, unchanged.

    It is the check that a family's route is exact: its output must equal the stock processor's.
    """

    method = "neutral"

    def acts_on(self, site: Site) -> bool:
        return site.kind != "text"


def published(site: Site, control: Control) -> Any:
    """What the control prepared for this site and the running forward, or None where it rests."""
    return site.published.get(control.method)


__all__ = ["ControlAttnProcessor", "NeutralAttnProcessor", "published"]
