"""What each of two processes runs (gloo, on the CPU): shared sequences against the whole ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from torch import Tensor

import diffctrl
from diffctrl.attention import BlockLists, Shard, attend
from diffctrl.control import context_parallel_plan
from diffctrl.processors import ControlAttnProcessor, RadialAttnProcessor, SoftPAGAttnProcessor
from tests.helpers import build, example, run

DEVICES = 2
# Whole models; diffusers splits in equal parts here, so that their videos have an even number of tokens.
MODELS = ("wan", "wan_vace", "hunyuan_video", "hunyuan_video15", "mochi", "cogvideox", "ltx")


def main(rank: int, rendezvous: str, report: str) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    torch.accelerator.device_count = lambda: 1  # diffusers counts accelerators, and there is none
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=DEVICES)
    lines = [*_engine(rank), *_models(), _ring()]
    if rank == 0:
        Path(report).write_text("\n".join(lines))
    dist.barrier()
    dist.destroy_process_group()


def _check(name: str, check: Callable[[], None]) -> str:
    try:
        check()
    except Exception as error:  # the other process goes on: the first one reports
        return f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}"
    return f"{name}: ok"


# --- the engine ---------------------------------------------------------------------------------------------


def _engine(rank: int) -> list[str]:
    """Uneven shares, text on both sides, lists for each head, a mask of keys."""
    group = SimpleNamespace(get_group=lambda: dist.group.WORLD)
    config = SimpleNamespace(context_parallel_config=SimpleNamespace(ring_degree=1, _ulysses_mesh=group))
    generator = torch.Generator().manual_seed(0)
    before, split, after, heads = 3, 21, 4, 4
    total = before + split + after
    query, key, value = (torch.randn(2, total, heads, 8, generator=generator) for _ in range(3))
    blocks = torch.rand(1, heads, -(-total // 4), -(-total // 4), generator=generator) < 0.5
    blocks |= torch.eye(blocks.shape[-1], dtype=torch.bool)
    lists = BlockLists.from_dense_blocks(blocks, (4, 4), (total, total), n_valid=torch.tensor([total, 26]))
    valid = (torch.arange(total) < torch.tensor([total, 26])[:, None])[:, None, None]
    first = 0 if rank == 0 else 11  # 21 tokens are 11 and 10
    share = 11 - rank
    mine = torch.cat(
        [torch.arange(before), before + first + torch.arange(share), before + split + torch.arange(after)]
    )
    shard = Shard(before, before + share, split)

    def check_gradients(mask: BlockLists | None) -> None:
        """Of what is split, its own; of what is on every device, parts that add up."""
        direction = torch.randn(query.shape, generator=torch.Generator().manual_seed(1))
        inputs = [part.clone().requires_grad_() for part in (query, key, value)]
        local = [part[:, mine].clone().requires_grad_() for part in (query, key, value)]
        weight = torch.full((len(mine), 1, 1), 1 / DEVICES)
        weight[before : before + share] = 1
        with torch.enable_grad():
            whole: Any = attend(*inputs, mask=mask)
            got: Any = attend(*local, mask=mask, parallel_config=config, shard=shard)
            wanted = torch.autograd.grad(whole, inputs, direction)
            found = torch.autograd.grad(got, local, direction[:, mine] * weight)
        for one, two in zip(found, wanted, strict=True):
            text = torch.cat([one[:, :before], one[:, before + share :]], dim=1)
            dist.all_reduce(text)
            one = torch.cat([text[:, :before], one[:, before : before + share], text[:, before:]], dim=1)
            torch.testing.assert_close(one, two[:, mine], rtol=0, atol=1e-5)

    def check(**masks: Any) -> None:
        whole: Any = attend(query, key, value, **masks)
        local = {name: m if name == "mask" else m[..., mine] for name, m in masks.items()}
        parts = (part[:, mine] for part in (query, key, value))
        got: Any = attend(*parts, **local, parallel_config=config, shard=shard)
        torch.testing.assert_close(got, whole[:, mine], rtol=0, atol=1e-6)

    return [
        _check("engine, lists for each head", lambda: check(mask=lists)),
        _check("engine, lists on the device", lambda: check(mask=lists.on("cpu"))),
        _check("engine, mask of keys", lambda: check(attn_mask=valid)),
        _check("engine, no mask", lambda: check()),
        _check("gradients, lists for each head", lambda: check_gradients(lists)),
        _check("gradients, no mask", lambda: check_gradients(None)),
    ]


# --- models -------------------------------------------------------------------------------------------------


def _inputs(name: str) -> dict[str, Any]:
    inputs = example(name)
    generator = torch.Generator().manual_seed(3)

    def longer(value: Tensor, axis: int) -> Tensor:
        shape = list(value.shape)
        shape[axis] += 1
        return torch.randn(shape, generator=generator)

    if name == "ltx":
        # With a mask of text tokens, LTX-Video of diffusers 0.42.1 does not run across devices by itself.
        inputs |= {"encoder_attention_mask": None, "num_frames": 4}
        inputs["hidden_states"] = torch.randn(2, 60, 8, generator=generator)
        inputs["encoder_hidden_states"] = longer(inputs["encoder_hidden_states"], 1)
        return inputs
    for latents in ("hidden_states", "control_hidden_states"):
        if latents in inputs:  # four frames instead of three
            inputs[latents] = longer(inputs[latents], 1 if name == "cogvideox" else 2)
    return inputs


def _models() -> list[str]:
    radial = {"block": 4, "dense_steps": 0, "dense_last_steps": 0, "dense_blocks": 1}
    made: list[ControlAttnProcessor] = [RadialAttnProcessor(**radial)]
    lines = [_check(name, lambda name=name: _model(name, made)) for name in MODELS]
    both = [*made, SoftPAGAttnProcessor("L1H1", u=0.5, w=2.0)]
    lines.append(_check("wan with SoftPAG", lambda: _model("wan", both)))
    trained = {
        "under the mask": RadialAttnProcessor(**radial),
        "dense": RadialAttnProcessor(dense_fraction=1.0),
    }
    for name in ("wan", "hunyuan_video"):
        for attention, processor in trained.items():
            check = functools.partial(_gradients, name, processor)
            lines.append(_check(f"gradients of {name}, {attention}", check))
    return lines


def _model(name: str, processors: list[ControlAttnProcessor]) -> None:
    model, inputs = build(name), _inputs(name)
    stock = run(model, inputs)
    with diffctrl.apply(model, processors):
        alone = run(model, inputs)
    config = ContextParallelConfig(ulysses_degree=DEVICES)
    plan = context_parallel_plan(model)
    if name == "mochi":  # the order of the two calls does not matter
        model.enable_parallelism(config=config, cp_plan=plan)
    with diffctrl.apply(model, processors) as handle:
        if name != "mochi":
            model.enable_parallelism(config=config, cp_plan=plan)
        shared = run(model, inputs)
        (stats,) = handle.stats().values()
    assert stats["sparse_calls"], "nothing was sparse"
    assert stats["density"] < 1
    assert not torch.equal(alone, stock)
    torch.testing.assert_close(shared, alone, rtol=0, atol=1e-5)


def _gradients(name: str, processor: ControlAttnProcessor) -> None:
    """Of all parameters, added up over the devices; a loss that each of them has of the gathered output."""
    model, inputs = build(name), _inputs(name)
    parameters = dict(model.named_parameters())

    def found() -> dict[str, Tensor]:
        with torch.enable_grad():
            out = model(**inputs, return_dict=False)[0]
            direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
            grads = torch.autograd.grad(out, list(parameters.values()), direction, allow_unused=True)
        return {name: grad for name, grad in zip(parameters, grads, strict=True) if grad is not None}

    with diffctrl.apply(model, processor):
        wanted = found()
        model.enable_parallelism(
            config=ContextParallelConfig(ulysses_degree=DEVICES), cp_plan=context_parallel_plan(model)
        )
        got = found()
    assert got.keys() == wanted.keys()
    largest = max(float(value.norm()) for value in wanted.values())
    for key, value in got.items():
        dist.all_reduce(value)
        assert float((value - wanted[key]).norm()) <= 1e-5 * largest, key


def _ring() -> str:
    def check() -> None:
        model, inputs = build("wan"), _inputs("wan")
        model.enable_parallelism(config=ContextParallelConfig(ring_degree=DEVICES))
        sparse = RadialAttnProcessor(block=4, dense_steps=0, dense_last_steps=0, dense_blocks=0)
        refused = pytest.raises(ValueError, match="ring_degree=2.*use ulysses_degree alone")
        with diffctrl.apply(model, sparse), refused:
            run(model, inputs)

    return _check("ring", check)
