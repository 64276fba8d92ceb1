"""diffusers' LLaDA2Pipeline over a model of transformers: what a control can do there, and what it refuses.

The pipeline takes any model with `.logits`; LLaDA2's own classes are remote code, which is refused. It
recomputes a window that grows by one block, so that a generation of ours is one window.
"""

import pytest
import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline

import diffctrl
from diffctrl.processors import SparseDAttnProcessor, SparseDConfig
from tests.sparsed.examples import SETTINGS, tiny_llama, tokens

BLOCK, PROMPT, STEPS = 16, 48, 4
MASK = 60


@pytest.fixture(scope="module")
def pipe():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[MASK] = 0  # a random head may well propose the mask itself
    pipe = LLaDA2Pipeline(model=model, scheduler=BlockRefinementScheduler(), tokenizer=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, control=None):
    """Two windows of 64 and 80 tokens; with a control each of them begins anew."""

    def begin(window, step):
        generated = BLOCK * (window + 1)
        if step == 0:
            control.begin(torch.tensor([PROMPT]), generated, STEPS + 1)
        control.set_step(step)

    def before(module, args, kwargs):
        length = (args[0] if args else kwargs["input_ids"]).shape[1]
        if control is not None:
            window = (length - PROMPT) // BLOCK - 1
            seen[window] = seen.get(window, -1) + 1
            begin(window, seen[window])

    seen: dict[int, int] = {}
    hook = pipe.model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        return pipe(
            input_ids=tokens(1, PROMPT), gen_length=2 * BLOCK, block_length=BLOCK, num_inference_steps=STEPS,
            mask_token_id=MASK, threshold=2.0, editing_threshold=None, eos_early_stop=False,
            output_type="seq",
        ).sequences  # fmt: skip
    finally:
        hook.remove()


def on(pipe, **changes):
    return diffctrl.apply(pipe, SparseDAttnProcessor(SparseDConfig(**SETTINGS | changes)))


def test_dense_is_stock(pipe):
    expected = run(pipe)
    assert not (expected == MASK).any()
    with on(pipe, skip=1.0) as control:
        assert torch.equal(run(pipe, control), expected)


def test_a_pattern_for_each_window(pipe):
    with on(pipe) as control:
        out = run(pipe, control)
        stats = control.controller.stats()
    assert out.shape == (1, 2 * BLOCK)
    assert stats["steps"]["sparse"] > 0
    assert stats["pattern_density"] < 1


def test_a_grown_window_is_refused(pipe):
    with on(pipe) as control:
        control.begin(torch.tensor([PROMPT]), BLOCK, STEPS + 1)
        control.set_step(0)
        with pytest.raises(ValueError, match="call begin\\(\\) for each new one"):
            run(pipe)
