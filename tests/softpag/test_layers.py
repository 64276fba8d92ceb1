"""Targets that act on whole layers: attention or blocks left out, tokens that change places."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffctrl
from diffctrl.control.blocks import block_name
from diffctrl.processors import SoftPAGAttnProcessor
from diffctrl.softpag.headhunt import HuntConfig
from diffctrl.softpag.layers import faded, reordered, shuffled
from tests.helpers import CASES, FixedScheduler, build, example, run, shared
from tests.pipelines import generate, sd3_pipeline

torch.set_num_threads(1)

KINDS = ("skip_attention", "skip_block", "token_shuffle")
# A family each, and the block forms that differ from it.
MODELS = tuple(name for name in CASES if CASES[name].family == name) + ("flux-single", "sdxl", "wan-i2v")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Streams:
    """What a block got and gave in each forward."""

    def __init__(self, block: nn.Module) -> None:
        self.calls: list[tuple[dict[str, Any], Any]] = []
        self._block = block
        self._handle = block.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        import inspect

        names = list(inspect.signature(type(module).forward).parameters)[1:]
        self.calls.append(({**dict(zip(names, args, strict=False)), **kwargs}, output))

    def close(self) -> None:
        self._handle.remove()


def perturbed(name: str, kind: str, heads: str = "L1", **settings: Any) -> tuple[Tensor, Streams, Any]:
    """The prediction of rows that are all twins, and what happened at the block of a layer."""
    model, inputs = shared(name), example(name)
    processor = SoftPAGAttnProcessor(heads, kind=kind, **settings)
    with diffctrl.apply(model, processor, batch_layout="perturbed") as handle:
        sites = next(iter(handle.contexts.values())).sites.values()
        (site,) = [each for each in sites if each.installed is not None]
        streams = Streams(model.get_submodule(block_name(site)))
        result = run(model, inputs)
        streams.close()
    return result, streams, site


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_left_out_and_put_back(name: str, kind: str) -> None:
    model, inputs = shared(name), example(name)
    stock = run(model, inputs)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    result, streams, site = perturbed(name, kind, u=1.0)
    assert not torch.equal(result, stock)
    assert torch.equal(run(model, inputs), stock)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    ((given, output),) = streams.calls
    if kind == "skip_block":
        output = output if isinstance(output, tuple) else (output,)
        for stream, part in zip(site.family.block_streams, output, strict=True):
            assert part is None or torch.equal(part, given[stream])
    with diffctrl.apply(model, SoftPAGAttnProcessor("L1", kind=kind, u=0.0)):
        assert torch.equal(run(model, inputs), stock)
    with diffctrl.apply(model, SoftPAGAttnProcessor("L1", kind=kind, u=1.0, w=1.0)):
        guided = run(model, inputs)
    torch.testing.assert_close(guided, stock + (stock - result), rtol=1e-4, atol=1e-4)


def test_a_skipped_block_is_skip_layer_guidance() -> None:
    """diffusers' own `skip_layers` of SD3 leaves out the same block."""
    model, inputs = shared("sd3"), example("sd3")
    result, _, _ = perturbed("sd3", "skip_block", u=1.0)
    assert torch.equal(result, run(model, {**inputs, "skip_layers": [1]}))


def test_skipped_attention_leaves_the_rest_of_the_block() -> None:
    """Where the output layers of attention give nothing anyway, leaving attention out changes nothing."""
    model, inputs = build("sd3"), example("sd3")
    attn: Any = model.transformer_blocks[1].attn
    for layer in (attn.to_out[0], attn.to_add_out):
        layer.weight.zero_()
        layer.bias.zero_()
    stock = run(model, inputs)
    with diffctrl.apply(
        model, SoftPAGAttnProcessor("L1", kind="skip_attention", u=1.0), batch_layout="perturbed"
    ):
        torch.testing.assert_close(run(model, inputs), stock)
    with diffctrl.apply(
        model, SoftPAGAttnProcessor("L1", kind="skip_block", u=1.0), batch_layout="perturbed"
    ):
        assert (run(model, inputs) - stock).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["skip_attention", "skip_block"])
def test_the_scope_says_whether_text_is_left_out_too(kind: str) -> None:
    joint, image = (perturbed("sd3", kind, u=1.0, scope=scope)[0] for scope in ("joint", "image_rows"))
    assert (joint - image).abs().max() > 1e-4
    # In a single block of FLUX one tensor holds both.
    single, _, _ = perturbed("flux", kind, "L2", u=1.0, scope="image_rows")
    assert not torch.equal(single, perturbed("flux", kind, "L2", u=1.0)[0])


def test_strength_is_continuous() -> None:
    states, without = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    weight = torch.tensor([0.0, 0.25, 1.0])
    result = faded(states, without, weight)
    assert torch.equal(result[0], states[0])
    assert torch.equal(result[2], without[2])
    torch.testing.assert_close(result[1], 0.75 * states[1] + 0.25 * without[1])
    assert torch.equal(faded(states, None, weight)[2], torch.zeros(5, 4))
    part = faded(states, without, weight, rows=(1, 3))
    assert torch.equal(part[:, [0, 3, 4]], states[:, [0, 3, 4]])
    assert torch.equal(part[:, 1:3], result[:, 1:3])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_shuffle_is_a_permutation_of_a_share(share: float) -> None:
    order = shuffled(40, share, seed=5)
    assert sorted(order.tolist()) == list(range(40))
    assert int((order != torch.arange(40)).sum()) == round(40 * share)
    assert torch.equal(order, shuffled(40, share, seed=5))
    assert share == 0.0 or not torch.equal(order, shuffled(40, share, seed=6))
    states = torch.randn(2, 40, 3)
    moved = reordered(states, torch.stack([order, torch.arange(40)]))
    assert torch.equal(moved[1], states[1])
    assert torch.equal(moved[0], states[0][order])


def test_tokens_change_places_in_the_twin_alone_and_anew_in_each_step() -> None:
    model, inputs, scheduler = shared("flux"), example("flux"), FixedScheduler(4)
    block = Streams(model.transformer_blocks[1])
    before = Streams(model.transformer_blocks[0])
    orders = []
    with diffctrl.apply(model, SoftPAGAttnProcessor("L1", kind="token_shuffle", u=1.0), scheduler=scheduler):
        for step in (0, 1, 0):
            scheduler.step_index = step
            run(model, inputs)
            given, left = block.calls[-1][0], before.calls[-1][1]
            assert torch.equal(given["encoder_hidden_states"], left[0])  # text stays
            assert torch.equal(given["hidden_states"][:2], left[1][:2])
            distance = torch.cdist(given["hidden_states"][2], left[1][2])
            orders.append(distance.argmin(1))
            assert sorted(orders[-1].tolist()) == list(range(35))
    block.close()
    before.close()
    assert torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["sequential", "prefix"])
def test_modes_give_one_result(kind: str, mode: Any) -> None:
    pipe, latents = sd3_pipeline(), []
    for each in ("batched", mode):
        with diffctrl.apply(pipe, SoftPAGAttnProcessor("L1", kind=kind, u=0.7, mode=each)):
            latents.append(generate(pipe, steps=2, guidance_scale=3.0))
    torch.testing.assert_close(*latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_blocks_keep_one_graph_for_every_strength(kind: str) -> None:
    torch._dynamo.reset()
    model, inputs, scheduler, graphs = build("sd3"), example("sd3"), FixedScheduler(4), 0
    scheduler.step_index = 0

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    model.transformer_blocks[1].compile(backend=counting, fullgraph=True)
    counts = []
    for strength in (0.4, 0.7, 1.0):
        processor = SoftPAGAttnProcessor("L1", kind=kind, u=strength)
        with diffctrl.apply(shared("sd3"), processor, scheduler=scheduler):
            expected = run(shared("sd3"), inputs)
        with diffctrl.apply(model, processor, scheduler=scheduler):
            for step in (1, 2, 0):
                scheduler.step_index = step
                result = run(model, inputs)
        counts.append(graphs)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
    assert counts[0] == counts[-1]


def test_single_heads_and_stacks_inside_a_block_are_refused() -> None:
    for kind in KINDS:
        with pytest.raises(ValueError, match=r"acts on whole layers; write L1 instead of L1H0"):
            SoftPAGAttnProcessor("L1H0", kind=kind)
        with pytest.raises(ValueError, match="a search chooses single heads"):
            HuntConfig(kind=kind)
    with pytest.raises(
        ValueError, match=r"acts on blocks, and the stack attn2 .* name the block by its layer, L1"
    ):
        diffctrl.apply(shared("sd3.5"), SoftPAGAttnProcessor("attn2:L1", kind="skip_block"))
    result, _, _ = perturbed("sd3.5", "skip_attention", u=1.0)
    with diffctrl.apply(
        shared("sd3.5"),
        SoftPAGAttnProcessor("attn2:L1", kind="skip_attention", u=1.0),
        batch_layout="perturbed",
    ):
        assert not torch.equal(run(shared("sd3.5"), example("sd3.5")), result)
