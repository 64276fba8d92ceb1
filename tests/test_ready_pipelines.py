"""The ready pipelines: stock at u=0, `diffctrl.apply` by hand otherwise."""

import inspect
from dataclasses import fields

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

import diffctrl
from diffctrl.pipelines import (
    FluxSoftPAGPipeline,
    StableDiffusion3SoftPAGPipeline,
    StableDiffusionXLSoftPAGPipeline,
    WanSoftPAGPipeline,
)
from diffctrl.processors import NeutralAttnProcessor, SoftPAGAttnProcessor, SoftPAGConfig
from diffctrl.softpag import Head
from diffctrl.softpag.headset import Chosen, HeadSet
from tests import tiny
from tests.pipelines import flux_pipeline, generate, sd3_pipeline, sdxl_pipeline, wan_pipeline


@pytest.fixture(scope="module")
def stock():
    return tiny.sd3_pipeline()


@pytest.fixture
def guided(stock):
    return StableDiffusion3SoftPAGPipeline(**stock.components)


def _by_hand(pipe, processor, **call):
    with diffctrl.apply(pipe, processor):
        return tiny.latents(pipe, **call)


def test_no_strength_is_stock(stock, guided):
    assert torch.equal(tiny.latents(guided, u=0.0), tiny.latents(stock))


def test_settings_of_a_call_equal_apply_by_hand(stock, guided):
    processor = SoftPAGAttnProcessor("L1", u=0.7, w=2.0)
    wanted = _by_hand(stock, processor)
    assert torch.equal(tiny.latents(guided, heads="L1", u=0.7, w=2.0), wanted)
    assert not torch.equal(wanted, tiny.latents(stock))


def test_a_bare_call_guides_with_the_defaults(stock, guided):
    assert torch.equal(tiny.latents(guided), _by_hand(stock, SoftPAGAttnProcessor()))


def test_installed_processor_stays_until_it_is_taken_off(guided):
    fresh = tiny.sd3_pipeline()  # the same weights in objects of its own
    processor = SoftPAGAttnProcessor("L0H1", u=1.0)
    before = {name: module.processor for name, module in _attention(guided)}
    guided.set_attn_processor(processor)
    assert torch.equal(tiny.latents(guided), _by_hand(fresh, processor))
    assert guided.control is not None
    guided.set_attn_processor(None)
    assert guided.control is None
    assert {name: module.processor for name, module in _attention(guided)} == before
    assert torch.equal(tiny.latents(guided, u=0.0), tiny.latents(fresh))


def test_settings_of_a_call_change_the_installed_processor_once(guided):
    guided.set_attn_processor(SoftPAGAttnProcessor("L1", u=0.3))
    try:
        usual = tiny.latents(guided)
        other = tiny.latents(guided, u=0.9)
        assert not torch.equal(usual, other)
        assert torch.equal(tiny.latents(guided), usual)
        assert guided.control.controls[0].config == SoftPAGConfig(heads="L1", u=0.3)
    finally:
        guided.set_attn_processor(None)


def test_refused_processor_leaves_the_installed_one(guided):
    processor = SoftPAGAttnProcessor("L1")
    guided.set_attn_processor(processor)
    try:
        with pytest.raises(ValueError, match="L9"):
            guided.set_attn_processor(SoftPAGAttnProcessor("L9"))
        assert guided.control.controls == (processor,)
    finally:
        guided.set_attn_processor(None)


def test_a_handle_that_was_removed_is_no_control(guided, stock):
    guided.set_attn_processor(SoftPAGAttnProcessor("L1", u=0.3))
    controlled, handle = tiny.latents(guided), guided.control
    handle.remove()
    assert guided.control is None
    handle.resume()
    assert guided.control is handle
    assert torch.equal(tiny.latents(guided), controlled)
    handle.remove()
    assert torch.equal(tiny.latents(guided), _by_hand(stock, SoftPAGAttnProcessor()))  # as without one
    other = SoftPAGAttnProcessor("L0")
    guided.set_attn_processor(other)
    assert guided.control.controls == (other,)
    guided.set_attn_processor(None)
    assert guided.control is None


def test_failing_call_restores_the_model(guided):
    before = {name: module.processor for name, module in _attention(guided)}
    with pytest.raises(ValueError, match="divisible"):
        tiny.latents(guided, u=0.5, height=33)
    assert {name: module.processor for name, module in _attention(guided)} == before


def test_apply_from_outside_rules(guided):
    processor = NeutralAttnProcessor()
    with diffctrl.apply(guided, processor):
        assert torch.equal(tiny.latents(guided), _by_hand(tiny.sd3_pipeline(), processor))


def test_saved_pipeline_is_a_stock_one(guided, stock, tmp_path):
    guided.save_pretrained(tmp_path)
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is StableDiffusion3Pipeline
    again = StableDiffusion3SoftPAGPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(tiny.latents(again, u=0.0), tiny.latents(stock))


SETTINGS = [field.name for field in fields(SoftPAGConfig)]
READY = [
    (StableDiffusion3SoftPAGPipeline, sd3_pipeline, {"guidance_scale": 3.0}),
    (FluxSoftPAGPipeline, flux_pipeline, {"true_cfg_scale": 3.0}),
    (StableDiffusionXLSoftPAGPipeline, sdxl_pipeline, {"guidance_scale": 3.0}),
    (WanSoftPAGPipeline, wan_pipeline, {"guidance_scale": 3.0}),
]


@pytest.mark.parametrize(("ready", "make", "call"), READY)
def test_every_ready_pipeline_is_stock_at_no_strength_and_apply_by_hand_else(ready, make, call):
    stock = make()
    guided = ready(**stock.components, **{k: v for k, v in stock.config.items() if k in ("boundary_ratio",)})
    guided.set_progress_bar_config(disable=True)
    plain = generate(stock, steps=2, **call)
    assert torch.equal(generate(guided, steps=2, u=0.0, **call), plain)
    w = 8.0 if ready is FluxSoftPAGPipeline else 3.0
    with diffctrl.apply(stock, SoftPAGAttnProcessor(w=w)):
        wanted = generate(stock, steps=2, **call)
    assert torch.equal(generate(guided, steps=2, **call), wanted)
    assert not torch.equal(wanted, plain)
    with diffctrl.apply(stock, SoftPAGAttnProcessor("L0", w=2.0, kind="uniform", mode="sequential")):
        wanted = generate(stock, steps=2, **call)
    heard = {"heads": "L0", "w": 2.0, "kind": "uniform", "mode": "sequential"}
    assert torch.equal(generate(guided, steps=2, **heard, **call), wanted)


def test_a_head_set_keeps_its_own_scale_on_flux():
    stock = flux_pipeline()
    guided = FluxSoftPAGPipeline(**stock.components)
    guided.set_progress_bar_config(disable=True)
    heads = (Chosen(Head(0, 1)),)
    known, unknown = HeadSet(chosen=heads, use={"w": 1.5}), HeadSet(chosen=heads)
    for given, w in (({"heads": known}, 1.5), ({"heads": known, "w": 2.0}, 2.0), ({"heads": unknown}, 8.0)):
        with diffctrl.apply(stock, SoftPAGAttnProcessor("L0H1", w=w)):
            wanted = generate(stock, steps=2)
        assert torch.equal(generate(guided, steps=2, **given), wanted)


@pytest.mark.parametrize(("ready", "make", "call"), READY)
def test_signature_names_the_stock_arguments_and_the_settings(ready, make, call):
    parameters = inspect.signature(ready.__call__).parameters
    stock = list(inspect.signature(ready.stock_class.__call__).parameters)
    assert [name for name in parameters if name not in SETTINGS] == stock
    assert [name for name in parameters if name in SETTINGS] == SETTINGS
    assert not set(stock) & set(SETTINGS)
    assert parameters["w"].default == (8.0 if ready is FluxSoftPAGPipeline else None)  # as the head set says


def _attention(pipe):
    return [
        (name, module) for name, module in pipe.transformer.named_modules() if hasattr(module, "processor")
    ]
