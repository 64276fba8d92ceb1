"""SoftPAG's mathematics: worked values, scopes, grouped heads; and its processor in models."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import diffctrl
from diffctrl.attention import attend
from diffctrl.families import Call, Site
from diffctrl.processors import SoftPAGAttnProcessor, SoftPAGConfig
from diffctrl.processors.universe import universe_of
from diffctrl.softpag import Head, blend_identity, guide, parse_head, parse_heads, perturbation_delta
from tests.helpers import build, example, run, shared

torch.set_num_threads(1)

EXACT = {"rtol": 0.0, "atol": 1e-9}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def float64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def heads_last(*heads: Any) -> Tensor:
    """(S, D) per head -> (1, S, H, D)."""
    return torch.stack([float64(head) for head in heads], dim=1)[None]


def close(actual: Tensor, expected: Any) -> None:
    torch.testing.assert_close(actual, float64(expected), **EXACT)


# --- the worked example of the specification, 2.5 -----------------------------------------------------------

QUERY = math.log(2.0) * heads_last(
    [[0, 0, 1], [1, 0, 0], [0, 1, 0]],
    [[1, 1, 0], [0, 0, 0], [0, 2, 1]],
)
KEY = heads_last(torch.eye(3).tolist(), torch.eye(3).tolist())
VALUE = heads_last(
    [[1, 0, 0], [0, 2, 0], [0, 0, 4]],
    [[2, 0, 1], [0, 1, 0], [4, 4, 0]],
)
OUTPUT = heads_last(
    [[0.25, 0.5, 2], [0.5, 0.5, 1], [0.25, 1, 1]],
    [[1.6, 1.2, 0.4], [2, 5 / 3, 1 / 3], [10 / 7, 12 / 7, 1 / 7]],
)


def blended(u: tuple[float, float], rows: tuple[int, int] | None = None) -> Tensor:
    return blend_identity(OUTPUT, VALUE, float64([u]), rows)[0]


def test_the_example_is_the_attention_of_the_engine() -> None:
    torch.testing.assert_close(attend(QUERY, KEY, VALUE, scale=1.0), OUTPUT, **EXACT)


def test_joint_scope() -> None:
    result = blended((0.0, 0.25))
    assert torch.equal(result[:, 0], OUTPUT[0, :, 0])
    close(result[:, 1], [[1.7, 0.9, 0.55], [1.5, 1.5, 0.25], [29 / 14, 16 / 7, 3 / 28]])
    result = blended((0.5, 0.5))
    close(result[:, 0], [[0.625, 0.25, 1], [0.25, 1.25, 0.5], [0.125, 0.5, 2.5]])
    close(result[:, 1], [[1.8, 0.6, 0.7], [1, 4 / 3, 1 / 6], [19 / 7, 20 / 7, 1 / 14]])
    assert torch.equal(blended((1.0, 1.0)), VALUE[0])
    assert torch.equal(blended((0.0, 0.0)), OUTPUT[0])


def test_image_rows_where_the_image_comes_first() -> None:
    result = blended((0.0, 0.25), rows=(0, 2))
    close(result[:2, 1], [[1.7, 0.9, 0.55], [1.5, 1.5, 0.25]])
    assert torch.equal(result[2], OUTPUT[0, 2])
    assert torch.equal(result[:, 0], OUTPUT[0, :, 0])


def test_image_rows_where_the_text_comes_first() -> None:
    result = blended((0.0, 0.25), rows=(1, 3))
    close(result[1:, 1], [[1.5, 1.5, 0.25], [29 / 14, 16 / 7, 3 / 28]])
    assert torch.equal(result[0], OUTPUT[0, 0])


def test_guidance() -> None:
    e, c, p = float64([1, 0, 2]), float64([2, 1, 0]), float64([1.5, 2, -1])
    close(guide(c, p, 3.0), [3.5, -2, 3])
    close(guide(c, p, 3.0, uncond=e, s=5.0), [7.5, 2, -5])
    close(perturbation_delta(c, p, 3.0), [1.5, -3, 3])
    # What a pipeline computes from predictions that both got the difference.
    delta = perturbation_delta(c, p, 3.0)
    close((e + delta) + 5.0 * ((c + delta) - (e + delta)), [7.5, 2, -5])


def test_guidance_of_half_precision_predictions_is_in_float32() -> None:
    c, p = torch.tensor([60000.0], dtype=torch.float16), torch.tensor([-60000.0], dtype=torch.float16)
    delta = perturbation_delta(c, p, 8.0)
    assert delta.dtype == torch.float32
    assert delta.item() == 8.0 * 2 * c.float().item()


# --- the blend ----------------------------------------------------------------------------------------------


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [None, (2, 7)])
def test_the_output_form_is_the_blended_map(rows: tuple[int, int] | None) -> None:
    """Against A' = (1 - W) A + W I, formed in full, with two query heads for each value head."""
    scores = random(3, 4, 9, 9).double()
    attention, value = scores.softmax(dim=-1), random(3, 9, 2, 5, seed=1).double()
    weight = torch.rand(3, 4, generator=torch.Generator().manual_seed(2)).double()
    repeated = value.repeat_interleave(2, dim=2)

    def applied(maps: Tensor) -> Tensor:
        return torch.einsum("bhqk,bkhd->bqhd", maps, repeated)

    strength = weight[:, :, None, None].expand(-1, -1, 9, -1).clone()
    if rows is not None:
        strength[:, :, : rows[0]], strength[:, :, rows[1] :] = 0, 0
    target = (1 - strength) * attention + strength * torch.eye(9).double()
    torch.testing.assert_close(target.sum(-1), torch.ones(3, 4, 9).double())
    actual = blend_identity(applied(attention), value, weight, rows)
    torch.testing.assert_close(actual, applied(target), **EXACT)


def test_rows_stay_distributions() -> None:
    ones = torch.ones(2, 6, 3, 4)
    for rows in (None, (1, 4)):
        assert torch.equal(blend_identity(ones, ones, torch.rand(2, 3), rows), ones)


def test_a_weight_of_zero_gives_the_output_bit_for_bit_whatever_the_values_are() -> None:
    output, value = random(3, 6, 2, 4), random(3, 6, 2, 4, seed=1)
    value[0], output[1, 2] = math.nan, math.nan
    weight = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.7]])
    for rows in (None, (0, 5)):
        result = blend_identity(output, value, weight, rows)
        torch.testing.assert_close(result[:2], output[:2], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(result[2, :, 0], output[2, :, 0])
        assert not torch.equal(result[2, :, 1], output[2, :, 1])


def test_a_weight_of_one_gives_the_values() -> None:
    output, value = random(2, 6, 2, 4), random(2, 6, 2, 4, seed=1)
    output[0, 1] = math.inf  # the output of a padded query
    full = blend_identity(output.nan_to_num(posinf=1e30), value, torch.ones(2, 2))
    assert torch.equal(full, value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_a_float32_blend(dtype: torch.dtype) -> None:
    output, value, weight = random(2, 6, 2, 4), random(2, 6, 2, 4, seed=1), torch.full((2, 2), 0.3)
    actual = blend_identity(output.to(dtype), value.to(dtype), weight)
    expected = blend_identity(output.to(dtype).float(), value.to(dtype).float(), weight)
    assert actual.dtype == dtype
    # The rounding of the weight and of the result, each half a unit of values up to 4.
    bound = 4 * 3 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual.float(), expected, rtol=0, atol=bound)


def test_no_input_is_edited() -> None:
    tensors = random(2, 6, 2, 4), random(2, 6, 2, 4, seed=1), torch.rand(2, 2)
    copies = [tensor.clone() for tensor in tensors]
    blend_identity(*tensors)
    blend_identity(*tensors, (1, 3))
    assert all(torch.equal(now, then) for now, then in zip(tensors, copies, strict=True))


# --- names of heads, settings -------------------------------------------------------------------------------


def test_heads_are_read_and_written() -> None:
    assert parse_head("L3H1") == Head(3, 1)
    assert parse_head(" L12 ") == Head(12)
    assert parse_head("attn2:L0H5") == Head(0, 5, "attn2")
    assert parse_heads("L3H1,L4,L3H1") == (Head(3, 1), Head(4))
    assert parse_heads([(3, 1), "L4", Head(0, stack="mid")]) == (Head(3, 1), Head(4), Head(0, stack="mid"))
    for text in ("L3H1", "L12", "attn2:L0H5"):
        assert str(parse_head(text)) == text
    for wrong in ("3,1", "H1", "L-1", "L1H", "a.b:L1", "blocks.1"):
        with pytest.raises(ValueError, match=r"names no attention head; write L3H1"):
            parse_head(wrong)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"u": 1.5}, r"u=1\.5 is not in \[0, 1\]"),
        ({"w": -1.0}, r"w=-1\.0 is not a finite number >= 0"),
        ({"w": math.inf}, "not a finite number"),
        ({"scope": "image"}, r"scope='image' is unknown; accepted: joint, image_rows"),
        ({"heads": []}, "heads is empty"),
        ({"start_fraction": 0.5, "stop_fraction": 0.5}, "is empty"),
        ({"stop_fraction": 1.5}, r"not inside \[0, 1\)"),
    ],
)
def test_settings_are_checked_where_they_are_made(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SoftPAGConfig(**settings)
    with pytest.raises(ValueError, match=message):
        SoftPAGAttnProcessor(**settings)


def controlled(model: Any, processor: SoftPAGAttnProcessor) -> list[str]:
    """Names of the modules that carry the processor after `apply`."""
    with diffctrl.apply(model, processor):
        return [
            n for n, m in model.named_modules() if isinstance(getattr(m, "processor", None), type(processor))
        ]


def test_a_layer_is_one_module_and_flat_indices_run_over_both_stacks() -> None:
    model = build("flux")
    model.transformer_blocks.extend([build("flux", 1).transformer_blocks[0] for _ in range(17)])
    model.single_transformer_blocks.extend([build("flux", 1).single_transformer_blocks[0] for _ in range(36)])
    assert controlled(model, SoftPAGAttnProcessor("L1")) == ["transformer_blocks.1.attn"]
    assert controlled(model, SoftPAGAttnProcessor("L38H1")) == ["single_transformer_blocks.19.attn"]
    named = SoftPAGAttnProcessor("single_transformer_blocks:L19H1")
    assert controlled(model, named) == ["single_transformer_blocks.19.attn"]
    assert controlled(model, SoftPAGAttnProcessor("L0H0,L56")) == [
        "transformer_blocks.0.attn",
        "single_transformer_blocks.37.attn",
    ]
    for wrong in ("L57", "L38H2", "single_transformer_blocks:L38", "attn2:L0"):
        with pytest.raises(
            ValueError, match=rf"head {wrong} does not exist in this FLUX\.1 model: layers L0-L56"
        ):
            diffctrl.apply(model, SoftPAGAttnProcessor(wrong))


def test_layers_and_heads_of_published_models() -> None:
    """Of SD3-medium and FLUX.1-dev, without their weights: a layer's number matches no other layer's."""
    with torch.device("meta"):
        sd3 = SD3Transformer2DModel(num_layers=24, num_attention_heads=24, caption_projection_dim=1536)
        flux = FluxTransformer2DModel()
    assert controlled(sd3, SoftPAGAttnProcessor("L1")) == ["transformer_blocks.1.attn"]
    assert len(universe_of(sd3).heads) == 576
    universe = universe_of(flux)
    assert (universe.layers, len(universe.heads)) == (57, 1368)
    assert universe.places[Head(38, 18)] == ("single_transformer_blocks.19.attn", 18)
    assert universe.places[Head(18, 23)] == ("transformer_blocks.18.attn", 23)


@pytest.mark.parametrize(
    ("name", "heads", "expected"),
    [
        ("sd3.5", None, ["transformer_blocks.1.attn"]),
        ("sd3.5", "attn2:L1", ["transformer_blocks.1.attn2"]),
        ("sdxl", None, [f"mid_block.attentions.0.transformer_blocks.{layer}.attn1" for layer in (0, 1)]),
        ("unet", "up:L0,down:L1H1", [
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1",
            "up_blocks.1.attentions.0.transformer_blocks.0.attn1",
        ]),
        ("wan", None, ["blocks.0.attn1"]),
    ],
)  # fmt: skip
def test_which_modules_a_head_set_names(name: str, heads: str | None, expected: list[str]) -> None:
    assert controlled(shared(name), SoftPAGAttnProcessor(heads)) == expected


# --- the processor in models --------------------------------------------------------------------------------


class Watched(SoftPAGAttnProcessor):
    """Keeps the attention output before and after the blend, and the call, of each site."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.taken: dict[str, tuple[Call, Tensor, Tensor]] = {}

    def transform_output(self, site: Site, call: Call, output: Tensor) -> Tensor:
        changed = super().transform_output(site, call, output)
        self.taken[site.name] = call, output, changed
        return changed


@pytest.mark.parametrize("name", ["sd3.5", "flux", "flux-single", "hunyuan_video", "mochi", "cogvideox-1.5"])
@pytest.mark.parametrize("scope", ["joint", "image_rows"])
def test_only_the_named_head_of_the_twin_rows_changes(name: str, scope: Any) -> None:
    processor = Watched("L1H1", u=0.25, scope=scope)
    model = shared(name)
    with diffctrl.apply(model, processor):
        run(model, example(name))
    ((call, before, after),) = processor.taken.values()
    assert before.shape[0] == 4
    assert torch.equal(after[:2], before[:2])
    assert torch.equal(after[:, :, 0], before[:, :, 0])
    twins = slice(2, 4)
    expected = before[twins, :, 1] + 0.25 * (call.value[twins, :, 1] - before[twins, :, 1])
    image, text = (slice(span.start, span.stop) for span in (call.image, call.text))
    torch.testing.assert_close(after[twins, image, 1], expected[:, image], rtol=1e-5, atol=1e-6)
    if scope == "joint":
        torch.testing.assert_close(after[twins, text, 1], expected[:, text], rtol=1e-5, atol=1e-6)
        assert not torch.equal(after[twins, text, 1], before[twins, text, 1])
    else:
        assert torch.equal(after[:, text], before[:, text])
    assert not torch.equal(after[twins, image, 1], before[twins, image, 1])


@pytest.mark.parametrize("name", ["sd3.5", "unet", "wan", "ltx"])
def test_full_strength_on_every_head_takes_the_values(name: str) -> None:
    processor = Watched(u=1.0)
    model = shared(name)
    with diffctrl.apply(model, processor):
        run(model, example(name))
    for call, before, after in processor.taken.values():
        assert torch.equal(after[2:], call.value[2:])
        assert torch.equal(after[:2], before[:2])


def test_strength_and_scale_are_two_things() -> None:
    model, inputs = shared("sd3"), example("sd3")
    stock = run(model, inputs)

    def change(**settings: Any) -> Tensor:
        with diffctrl.apply(model, SoftPAGAttnProcessor("L0", **settings)):
            return run(model, inputs) - stock

    once = change(u=0.5, w=1.0)
    torch.testing.assert_close(change(u=0.5, w=4.0), 4.0 * once, rtol=1e-4, atol=1e-5)
    stronger = change(u=1.0, w=1.0)
    cosine = torch.nn.functional.cosine_similarity(stronger.flatten(), once.flatten(), dim=0)
    assert stronger.norm() > once.norm()
    assert cosine < 0.9999


@pytest.mark.parametrize("backend", ["_native_math", "flex"])
def test_the_blend_is_the_same_under_another_backend_and_never_missing(backend: str) -> None:
    model, inputs = shared("flux"), example("flux")
    stock = run(model, inputs)
    with diffctrl.apply(model, SoftPAGAttnProcessor(u=0.7)):
        native = run(model, inputs)
        with attention_backend(backend):
            other = run(model, inputs)
    assert not torch.equal(native, stock)
    torch.testing.assert_close(native, other, rtol=1e-4, atol=1e-5)


class _Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_no_attention_map_is_formed() -> None:
    model, inputs = shared("unet"), example("unet")
    inputs["sample"] = random(2, 4, 64, 64)
    with diffctrl.apply(model, SoftPAGAttnProcessor("down:L0")), _Largest() as largest:
        run(model, inputs)
    assert largest.elements < 4096 * 4096 / 4
