"""IP-Adapter, LoRA, ControlNet residuals and other backends beside SoftPAG."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import (
    IPAdapterAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
)
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterTimeImageProjection,
    MultiIPAdapterImageProjection,
)
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from peft import LoraConfig
from torch import Tensor, nn

import diffctrl
from diffctrl.processors import NeutralAttnProcessor, SoftPAGAttnProcessor
from tests.helpers import build, example, run

torch.set_num_threads(1)

TOKENS, WIDTH = 4, 12


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def with_ip_adapter() -> tuple[nn.Module, dict[str, Any]]:
    """A UNet whose cross-attention also looks at an image prompt, as `load_ip_adapter` leaves it."""
    model, inputs = build("unet"), example("unet")
    torch.manual_seed(0)
    for module in model.modules():
        if getattr(module, "is_cross_attention", False) and hasattr(module, "set_processor"):
            width = module.to_q.in_features
            module.set_processor(IPAdapterAttnProcessor2_0(width, 24, num_tokens=(TOKENS,), scale=0.8))
    projection = ImageProjection(WIDTH, 24, num_image_text_embeds=TOKENS)
    model.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    model.config["encoder_hid_dim_type"] = "ip_image_proj"
    model.register_to_config(encoder_hid_dim_type="ip_image_proj")
    inputs["added_cond_kwargs"] = {"image_embeds": [torch.randn(2, 1, WIDTH)]}
    return model, inputs


def with_joint_adapter(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """An MMDiT whose joint attention runs an IP-Adapter's processors, as `load_ip_adapter` leaves it."""
    model, inputs = build(name), example(name)
    generator, encoder = torch.Generator().manual_seed(3), None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "flux":
            processors = {
                path: FluxIPAdapterAttnProcessor(32, 20, num_tokens=(TOKENS, 3), scale=[0.8, 0.5])
                if path.startswith("transformer_blocks")
                else processor
                for path, processor in model.attn_processors.items()
            }
            layers = [ImageProjection(WIDTH, 20, num_image_text_embeds=count) for count in (TOKENS, 3)]
            model.encoder_hid_proj = MultiIPAdapterImageProjection(layers)
            prompts: Any = [torch.randn(2, 1, WIDTH, generator=generator) for _ in layers]
        else:
            processors = {
                path: SD3IPAdapterJointAttnProcessor2_0(32, 20, 16, timesteps_emb_dim=24, scale=0.8)
                for path in model.attn_processors
            }
            encoder = IPAdapterTimeImageProjection(
                WIDTH, 20, hidden_dim=24, depth=1, dim_head=12, heads=2, num_queries=TOKENS, timestep_in_dim=8
            )
            prompts = torch.randn(2, 5, WIDTH, generator=generator)
    model.set_attn_processor(processors)
    if encoder is not None:  # it has attention of its own
        model.image_proj = encoder
    inputs["joint_attention_kwargs"] = {"ip_adapter_image_embeds": prompts}
    return model.eval(), inputs


def fresh(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with a dictionary of their own: the models take the image prompt out of it."""
    return {**inputs, "joint_attention_kwargs": dict(inputs["joint_attention_kwargs"])}


@pytest.mark.parametrize("name", ["sd3", "sd3.5", "flux"])
@pytest.mark.parametrize("mode", ["batched", "sequential", "prefix"])
def test_a_joint_ip_adapter_stays_on(name: str, mode: Any) -> None:
    model, inputs = with_joint_adapter(name)
    stock = run(model, fresh(inputs))
    without = run(model, example(name)) if name != "flux" else None
    assert without is None or (stock - without).abs().max() > 1e-3
    processors, weights = dict(model.attn_processors), list(model.state_dict())
    with diffctrl.apply(model, NeutralAttnProcessor()):
        assert torch.equal(run(model, fresh(inputs)), stock)
        assert len(model.state_dict()) == len(weights)  # an adapter still moves with its model
    with diffctrl.apply(model, SoftPAGAttnProcessor("L1H0", u=0.7, w=1.0, mode=mode)):
        guided = run(model, fresh(inputs))
    with diffctrl.apply(model, SoftPAGAttnProcessor("L1H0", u=0.7), batch_layout="perturbed"):
        p = run(model, fresh(inputs))
    assert dict(model.attn_processors) == processors
    assert list(model.state_dict()) == weights
    assert torch.equal(run(model, fresh(inputs)), stock)
    torch.testing.assert_close(guided, stock + (stock - p), rtol=1e-5, atol=1e-5)
    assert (stock - p).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_the_image_prompt_is_added_after_the_blend(name: str) -> None:
    """What it adds to the output of an attention module is the same, however much that is perturbed."""
    model, inputs = with_joint_adapter(name)
    attn, taken = model.transformer_blocks[1].attn, []
    for path, processor in model.attn_processors.items():
        if hasattr(processor, "to_k_ip"):
            strength = 0.9 if path.startswith("transformer_blocks.1.") else 0.0
            processor.scale = [strength] * 2 if name == "flux" else strength
    attn.register_forward_hook(lambda _, args, output: taken.append(output))

    def added(u: float) -> Tensor:
        shares = []
        for given in (fresh(inputs), {**inputs, "joint_attention_kwargs": None}):
            if name == "flux" and given["joint_attention_kwargs"] is None:
                continue  # a block of its own adds it: the third output
            with diffctrl.apply(model, SoftPAGAttnProcessor("L1", u=u), batch_layout="perturbed"):
                run(model, given)
            shares.append(taken[-1][2 if name == "flux" else 0])
        return shares[0] - shares[1] if name == "sd3" else shares[0]

    torch.testing.assert_close(added(1.0), added(0.3), rtol=1e-4, atol=1e-5)
    assert added(1.0).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["batched", "sequential"])
def test_an_ip_adapter_stays_on(mode: Any) -> None:
    model, inputs = with_ip_adapter()
    stock = run(model, inputs)
    other = {
        **inputs,
        "added_cond_kwargs": {"image_embeds": [-inputs["added_cond_kwargs"]["image_embeds"][0]]},
    }
    assert not torch.equal(run(model, other), stock)
    with diffctrl.apply(model, SoftPAGAttnProcessor(u=0.0, mode=mode)):
        assert torch.equal(run(model, inputs), stock)
    processors = dict(model.attn_processors)
    with diffctrl.apply(model, SoftPAGAttnProcessor(u=0.7, w=1.0, mode=mode)) as handle:
        guided = run(model, inputs)
        (context,) = handle.contexts.values()
        # The image prompt reaches the perturbed pass too: c + (c - p) with each pass by itself.
        sites = [site for site in context.sites.values() if site.installed is not None]
    assert dict(model.attn_processors) == processors
    assert {site.stack for site in sites} == {"mid"}
    with diffctrl.apply(model, SoftPAGAttnProcessor(u=0.7), batch_layout="perturbed"):
        p = run(model, inputs)
    torch.testing.assert_close(guided, stock + (stock - p), rtol=1e-5, atol=1e-5)
    assert (stock - p).abs().max() > 1e-4


@pytest.mark.parametrize("mode", ["batched", "sequential", "prefix"])
def test_a_lora_stays_on(mode: Any) -> None:
    """In both predictions of the guidance, and where nothing is perturbed."""
    model, inputs = build("sd3"), example("sd3")
    without = run(model, inputs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    stock = run(model, inputs)
    assert (stock - without).abs().max() > 1e-3
    with diffctrl.apply(model, SoftPAGAttnProcessor("L1H0", u=0.0, mode=mode)):
        assert torch.equal(run(model, inputs), stock)
    with diffctrl.apply(model, SoftPAGAttnProcessor("L1H0", u=0.7), batch_layout="perturbed"):
        p = run(model, inputs)
    with diffctrl.apply(model, SoftPAGAttnProcessor("L1H0", u=0.7, w=1.0, mode=mode)):
        torch.testing.assert_close(run(model, inputs), stock + (stock - p), rtol=1e-5, atol=1e-5)
    assert (stock - p).abs().max() > 1e-4


def test_what_acts_on_cross_attention_refuses_an_adapter_there() -> None:
    model, _ = with_ip_adapter()
    with pytest.raises(
        TypeError, match=r"neutral acts on .*attn2, which runs IPAdapterAttnProcessor2_0; unload"
    ):
        diffctrl.apply(model, NeutralAttnProcessor())


def test_perturbed_rows_alone_are_the_twins() -> None:
    model, inputs = build("sd3"), example("sd3")
    taken: list[Tensor] = []
    with diffctrl.apply(model, SoftPAGAttnProcessor("L1", w=1.0)):
        guided = run(model, inputs)
    c = run(model, inputs)
    handle = diffctrl.apply(model, SoftPAGAttnProcessor("L1"), batch_layout="perturbed")
    taken.append(run(model, inputs))
    handle.remove()
    assert torch.equal(run(model, inputs), c)
    handle.resume()
    with pytest.raises(RuntimeError, match="this control is on"):
        handle.resume()
    taken.append(run(model, inputs))
    handle.remove()
    assert torch.equal(*taken)
    torch.testing.assert_close(guided, c + (c - taken[0]), rtol=1e-5, atol=1e-5)
    with diffctrl.apply(model, NeutralAttnProcessor()), pytest.raises(RuntimeError, match="another control"):
        handle.resume()
    model.fuse_qkv_projections()
    with pytest.raises(RuntimeError, match=r"carries another FusedJointAttnProcessor2_0.*apply` again"):
        handle.resume()
    assert not any(hasattr(module, "diffctrl_site") for module in model.modules())
