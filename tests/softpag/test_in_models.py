"""Targets, scopes and strengths inside real models, against the map written down."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import diffctrl
from diffctrl.attention import BlockLists
from diffctrl.control import Context, Contributions, Published
from diffctrl.families import Call, Site
from diffctrl.processors import ControlAttnProcessor, SoftPAGAttnProcessor, SoftPAGConfig
from diffctrl.softpag.reference import perturbed_output
from tests.helpers import CASES, build, example, rows_of, run, shared
from tests.image_models import flux_ids
from tests.softpag.test_targets import SETTINGS

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Watched(SoftPAGAttnProcessor):
    """Keeps the call and the attention output before and after the blend, of each site."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.taken: dict[str, tuple[Site, Call, Tensor, Tensor]] = {}

    def transform_output(self, site: Site, call: Call, output: Tensor) -> Tensor:
        changed = super().transform_output(site, call, output)
        self.taken[site.name] = site, call, output, changed
        return changed


def additive(mask: Tensor | None) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape).masked_fill_(~mask, float("-inf"))


# The layer has a text span and a mask where the model has them; layer 1 of a UNet is a smaller level.
MODELS = ("sd3.5", "flux", "flux-single", "hunyuan_video", "mochi", "cogvideox-1.5", "unet", "wan", "ltx")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("target", SETTINGS)
def test_twin_rows_are_the_map_written_down(name: str, target: str) -> None:
    options = dict(SETTINGS[target])
    if options.get("query_mean") == "txt" and CASES[name].family in ("unet", "wan", "ltx"):
        with pytest.raises(ValueError, match="query_mean='txt' needs text tokens among the queries"):
            diffctrl.apply(shared(name), SoftPAGAttnProcessor("L1", **options))
        return
    processor = Watched("L1H1=0.7", **options)
    model = shared(name)
    with diffctrl.apply(model, processor) as handle:
        run(model, example(name))
        grid = next(iter(handle.contexts.values())).grid()
    ((site, call, before, after),) = processor.taken.values()
    assert before.shape[0] == 4
    assert torch.equal(after[:2], before[:2])
    assert torch.equal(after[:, :, 0], before[:, :, 0])
    twins = slice(2, 4)
    bias = additive(call.attention_mask)
    if bias is not None:
        bias = bias.expand(4, -1, -1, -1)[twins, :1].double()
    weight = torch.zeros(2, before.shape[2]).double()
    weight[:, 1] = 0.7
    parts = (call.query[twins].double(), call.key[twins].double(), call.value[twins].double())
    expected = perturbed_output(
        processor.config,
        *parts,
        weight,
        image=(call.image.start, call.image.stop),
        grid=site.family.site_grid(grid, site),
        bias=bias,
    )
    image = slice(call.image.start, call.image.stop)
    torch.testing.assert_close(after[twins, image].double(), expected[:, image], rtol=1e-4, atol=1e-5)
    if call.text is not None and bias is None:
        text = slice(call.text.start, call.text.stop)
        torch.testing.assert_close(after[twins, text].double(), expected[:, text], rtol=1e-4, atol=1e-5)
        kept = processor.config.scope != "joint" or processor.config.kind == "blur_query"
        assert torch.equal(after[:, text], before[:, text]) == kept


@pytest.mark.parametrize("name", ["sd3.5", "flux", "hunyuan_video", "unet"])
@pytest.mark.parametrize("target", ["uniform", "mean-query", "blur", "argmax", "image-block", "spherical"])
def test_rows_of_a_batch_do_not_see_each_other(name: str, target: str) -> None:
    """The second row's prompt is shorter where the model masks text: its padding must not count."""
    model, inputs = shared(name), example(name)
    with diffctrl.apply(model, SoftPAGAttnProcessor("L1", **SETTINGS[target])):
        together = run(model, inputs)
        alone = [run(model, rows_of(inputs, row)) for row in (0, 1)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["identity", "image-block", "blur", "mean-query-txt"])
def test_sizes_come_from_the_tensors(target: str) -> None:
    """Five text tokens and a latent of 8 x 12."""
    generator = torch.Generator().manual_seed(4)
    sd3, flux = example("sd3"), example("flux")
    sd3["hidden_states"] = torch.randn(2, 4, 8, 12, generator=generator)
    flux["hidden_states"], flux["img_ids"] = torch.randn(2, 24, 8, generator=generator), flux_ids(4, 6)
    flux["txt_ids"] = torch.zeros(5, 3)
    for name, inputs, image in (("sd3", sd3, (0, 24)), ("flux", flux, (5, 29))):
        inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :5]
        processor = Watched("L1", **SETTINGS[target])
        with diffctrl.apply(shared(name), processor):
            run(shared(name), inputs)
        ((_, call, before, after),) = processor.taken.values()
        assert (call.image.start, call.image.stop) == image
        changed = (before != after)[2:].any(-1).any(-1).any(0)
        inside = torch.zeros(29, dtype=torch.bool)
        inside[slice(*image) if target != "identity" else slice(None)] = True
        assert torch.equal(changed, inside)


def test_heads_have_strengths_of_their_own() -> None:
    model, inputs = shared("sd3"), example("sd3")

    def guided(heads: Any, **settings: Any) -> Tensor:
        with diffctrl.apply(model, SoftPAGAttnProcessor(heads, w=1.0, **settings)):
            return run(model, inputs)

    assert torch.equal(guided("L1H0=0.3,L2", u=0.9), guided({"L1H0": 0.3, "L2": 0.9}, u=0.1))
    assert torch.equal(guided({(1, 0): 0.3, "L2": 0.9}), guided("L1H0=0.3,L2=0.9"))
    assert not torch.equal(guided("L1H0=0.3,L2", u=0.9), guided("L1H0,L2", u=0.9))
    assert torch.equal(guided("L1H0=0.0"), run(model, inputs))
    config = SoftPAGConfig(heads={"L1H0": 0.3, "L2": 0.9})  # type: ignore[arg-type]
    assert ",".join(map(str, config.heads or ())) == "L1H0=0.3,L2=0.9"
    assert SoftPAGConfig(heads="L1H0=0.3,L2=0.9") == config


@pytest.mark.parametrize("target", ["mean-query", "blur", "sharper", "image-block", "image-block-logit"])
def test_a_second_attention_runs_on_the_models_backend(target: str) -> None:
    model, inputs = shared("flux"), example("flux")
    with diffctrl.apply(model, SoftPAGAttnProcessor(**SETTINGS[target])):
        native = run(model, inputs)
        with attention_backend("_native_math"):
            other = run(model, inputs)
    assert not torch.equal(native, run(model, inputs))
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


@pytest.mark.parametrize(
    "target", ["uniform", "mean-query", "blur", "argmax", "sharper", "spherical", "image-block"]
)
def test_no_target_forms_an_attention_map(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # What is counted is a whole map of 4096 tokens; a few rows at a time are allowed by their bytes.
    from diffctrl.attention import scores

    monkeypatch.setattr(scores, "TILE_BYTES", 1 << 20)
    model, inputs = shared("unet"), example("unet")
    inputs["sample"] = torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    with diffctrl.apply(model, SoftPAGAttnProcessor("down:L0", **SETTINGS[target])), _Largest() as largest:
        run(model, inputs)
    assert largest.elements < 4096 * 4096 / 4


class _Sparse(ControlAttnProcessor):
    """Publishes full block lists, as a sparse method would publish others."""

    method = "sparse"
    contributes = Contributions(masks=True)

    def prepare(self, context: Context, previous: Published | None) -> Published | None:
        lists = BlockLists.full((7, 7), (45, 45))
        return Published("sparse", masks={name: lists for name, site in context.sites.items()
                                          if site.kind == "self"})  # fmt: skip


def test_targets_from_the_whole_map_are_refused_beside_block_lists() -> None:
    model, inputs = shared("wan"), example("wan")
    for target in ("mean-query", "argmax", "spherical", "image-block"):
        with pytest.raises(ValueError, match=r"cannot be combined.*whole attention map, and sparse leaves"):
            diffctrl.apply(model, [SoftPAGAttnProcessor(**SETTINGS[target]), _Sparse()])
    for target in ("identity", "uniform", "zero"):
        with diffctrl.apply(model, SoftPAGAttnProcessor(**SETTINGS[target])):
            alone = run(model, inputs)
        with diffctrl.apply(model, [_Sparse(), SoftPAGAttnProcessor(**SETTINGS[target])]):
            torch.testing.assert_close(run(model, inputs), alone, rtol=1e-4, atol=1e-5)


def test_what_is_not_the_default_is_described() -> None:
    processor = SoftPAGAttnProcessor("L1H0=0.3", kind="blur_query", sigma=2.0, mode="sequential")
    assert processor.describe() == (
        "softpag(heads=L1H0=0.3, u=0.5, w=3, scope=joint, kind=blur_query, sigma=2, mode=sequential)"
    )


@pytest.mark.parametrize("target", ["uniform", "mean-query", "blur", "image-block-logit"])
def test_other_strengths_and_heads_cost_no_graph(target: str) -> None:
    torch._dynamo.reset()
    model, inputs = build("sd3"), example("sd3")
    graphs = 0

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    model.transformer_blocks[1].compile(backend=counting, fullgraph=True)
    for heads, u in (("L1H0", 0.5), ("L1H1", 0.9), ("L1H1=0.3", 0.1)):
        processor = SoftPAGAttnProcessor(heads, u=u, **SETTINGS[target])
        with diffctrl.apply(shared("sd3"), processor):
            expected = run(shared("sd3"), inputs)
        with diffctrl.apply(model, processor):
            for _ in range(2):
                torch.testing.assert_close(run(model, inputs), expected, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
    assert graphs == 1
