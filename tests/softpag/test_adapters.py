"""IP-Adapter, ControlNet residuals and other backends beside SoftPAG."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
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
