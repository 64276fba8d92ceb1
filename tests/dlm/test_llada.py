"""LLaDA's sampler against a slow one, and everything that must always hold."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffctrl.dlm import GenerationInterrupted, LLaDASampler, LLaDASampling, Prompts, SpecialTokens
from diffctrl.dlm.commit import split_evenly, surest
from tests.dlm.stubs import EOS, EOT, MASK, PAD, Spy, Stub, scrambled, slow_llada

SPECIAL = SpecialTokens(mask=MASK, pad=2, eos=EOS, eot=EOT)
PROMPT = [5, 9, 4, 7]


def _sample(model, rows=(PROMPT,), special=SPECIAL, call=None, **sampling):
    prompts = Prompts.of([list(row) for row in rows], special.pad)
    return LLaDASampler(LLaDASampling(**sampling), special).generate(model, prompts, **(call or {}))


def fixed(row):
    """The same logits at every position."""
    row = torch.tensor(row, dtype=torch.float32)
    return Stub(lambda tokens: row.expand(*tokens.shape, -1).clone())


@pytest.mark.parametrize(
    "sampling",
    [
        {"gen_length": 12, "steps": 12, "block_length": 12},
        {"gen_length": 12, "steps": 6, "block_length": 4},
        {"gen_length": 10, "steps": 4, "block_length": 10},
        {"gen_length": 12, "steps": 6, "block_length": 6, "cfg_scale": 1.5},
        {"gen_length": 12, "steps": 6, "block_length": 6, "logits_eos_inf": True},
        {"gen_length": 12, "steps": 6, "block_length": 6, "threshold": 0.6},
        {"gen_length": 6, "steps": 24, "block_length": 3},
    ],
)
def test_equals_the_slow_sampler(sampling):
    wanted = slow_llada(scrambled(), PROMPT, **sampling)
    assert _sample(scrambled(), **sampling).answers() == [wanted]


def test_a_real_model_equals_the_slow_sampler(llada):
    with torch.no_grad():
        wanted = slow_llada(llada, PROMPT, gen_length=16, steps=8, block_length=8, cfg_scale=0.5)
    found = _sample(llada, gen_length=16, steps=8, block_length=8, cfg_scale=0.5)
    assert found.answers() == [wanted]


def test_quotas_of_ten_masks_in_four_steps():
    counts = []
    _sample(
        scrambled(), gen_length=10, steps=4, block_length=10,
        call={"on_step": lambda event: counts.append(len(event.rows))},
    )  # fmt: skip
    assert counts == [3, 3, 2, 2]


@given(st.lists(st.integers(0, 300), min_size=1, max_size=4), st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_quotas_are_even_and_whole(counts, steps):
    quotas = split_evenly(torch.tensor(counts), steps)
    assert quotas.sum(-1).tolist() == counts
    for row in quotas.tolist():
        assert row == sorted(row, reverse=True)
        assert row[0] - row[-1] <= 1


def test_surest_takes_masked_positions_only_even_without_confidence():
    confidence = torch.tensor([[-math.inf, 0.2, -math.inf, 0.2, math.nan]])
    masked = torch.tensor([[False, True, True, True, True]])
    for quota, wanted in [(1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (9, [1, 2, 3, 4])]:
        chosen = surest(confidence, masked, torch.tensor([quota]))
        assert chosen.nonzero()[:, 1].tolist() == wanted


def test_only_the_block_is_decided_and_decided_tokens_stay():
    seen, tables = [], []

    def keep(step, tokens, logits):
        tables.append(tokens.clone())
        return tokens

    found = _sample(
        scrambled(), rows=[PROMPT, [8]], gen_length=12, steps=6, block_length=4,
        call={"on_step": seen.append, "tokens_hook": keep},
    )  # fmt: skip
    for event in seen:
        assert event.block == event.step // 2
        assert set(event.positions.tolist()) <= set(range(4 * event.block, 4 * event.block + 4))
    for before, after in zip(tables, tables[1:], strict=False):
        decided = before != MASK
        assert torch.equal(before[decided], after[decided])
    assert found.finished
    assert not (found.sequences == MASK).any()
    assert found.sequences[:, :4].tolist() == [PROMPT, [2, 2, 2, 8]]
    assert found.orders()[0] == [found.decided_in[0, 4 + i].item() for i in range(12)]
    assert (found.decided_in[:, :4] == -1).all()
    assert [event.masked for event in seen] == [20, 16, 12, 8, 4, 0]


def test_temperature_0_does_not_depend_on_the_seed():
    runs = [
        _sample(scrambled(), gen_length=8, steps=4, block_length=8, call={"seeds": s}).answers()
        for s in (0, 1)
    ]
    assert runs[0] == runs[1]


def test_no_guidance_is_one_row_and_guidance_hides_the_prompt():
    plain, guided = scrambled(), scrambled()
    _sample(plain, gen_length=4, steps=2, block_length=4)
    assert [call.tokens.shape for call in plain.calls] == [(1, 8)] * 2
    _sample(guided, rows=[PROMPT, [8]], gen_length=4, steps=2, block_length=4, cfg_scale=2.0)
    first = guided.calls[0].tokens
    assert first.tolist() == [
        PROMPT + [MASK] * 4,
        [2, 2, 2, 8] + [MASK] * 4,
        [MASK] * 8,
        [2, 2, 2] + [MASK] * 5,
    ]
    assert torch.equal(guided.calls[0].mask[2:], guided.calls[0].mask[:2])


def test_guidance_formula():
    """Logits 1 and 2 with and without the prompt: l_u + (w + 1) (l_c - l_u)."""

    def logits(tokens):
        cond = (tokens[:, 0] == 5)[:, None, None]
        found = torch.where(
            cond, torch.tensor([0.0, 0, 0, 0, 2.0, 1.0]), torch.tensor([0.0, 0, 0, 0, 3.0, 1.5])
        )
        return found.expand(-1, tokens.shape[1], -1).clone()

    seen = []
    _sample(
        Stub(logits), gen_length=2, steps=1, block_length=2, cfg_scale=2.0,
        call={"logits_hook": lambda step, tokens, found: seen.append(found) or found},
    )  # fmt: skip
    assert seen[0][0, 0].tolist() == [0, 0, 0, 0, 3 + 3 * (2 - 3), 1.5 + 3 * (1 - 1.5)]


@pytest.mark.parametrize(("temperature", "offset"), [(0.7, 0.0), (1.5, 1e4)])
def test_gumbel_frequencies_are_those_of_the_softmax(temperature, offset):
    """Chi-square of 6400 tokens; exp(1e4) overflows in every float."""
    row = torch.tensor([-9.0, 0.3, 1.0, -0.5, 1.7, 0.0]) + offset
    found = _sample(
        fixed(row.tolist()), rows=[PROMPT] * 16, gen_length=400, steps=1, block_length=400,
        temperature=temperature, call={"seeds": 3},
    )  # fmt: skip
    counts = torch.bincount(torch.tensor(found.answers()).flatten(), minlength=6).double()
    row[MASK] = -math.inf
    expected = torch.softmax(row.double() / temperature, -1) * counts.sum()
    assert counts[MASK] == 0
    statistic = ((counts - expected).square() / expected)[1:].sum().item()
    assert statistic < 18.5  # 0.1 % of chi-square with 4 degrees of freedom


def test_confidence_is_free_of_noise():
    """Half a chance each of two tokens beats a fifth each of five, however the noise that chooses falls."""

    def logits(tokens):
        found = torch.full((*tokens.shape, 8), -30.0)
        found[..., 2:7] = 0.0
        found[:, 5, 4:7] = -30.0
        return found

    found = _sample(
        Stub(logits), rows=[PROMPT] * 40, gen_length=4, steps=4, block_length=4, temperature=1.5,
        call={"seeds": 7},
    )  # fmt: skip
    assert {answer[1] for answer in found.answers()} == {2, 3}
    assert {order[1] for order in found.orders()} == {0}


def test_random_remasking_decides_in_any_order_with_the_same_tokens():
    row = [0.0, 0, 0, 0, 5.0, 1.0]
    orders = {
        tuple(_sample(fixed(row), gen_length=8, steps=8, block_length=8, remasking="random",
                      call={"seeds": seed}).orders()[0])
        for seed in range(4)
    }  # fmt: skip
    assert len(orders) == 4
    assert all(sorted(order) == list(range(8)) for order in orders)


def test_ends_of_text():
    row = [0.0, 3.0, 0.0, 2.0, 2.5, 1.0]
    plain = _sample(fixed(row), gen_length=4, steps=2, block_length=4)
    assert plain.answers() == [[EOS] * 4]
    without = _sample(fixed(row), gen_length=4, steps=2, block_length=4, logits_eos_inf=True)
    assert without.answers() == [[4] * 4]


def test_ends_are_decided_last():
    """EOS is the surest at even places, EOT at every fourth; both wait."""

    def logits(tokens):
        found = torch.zeros(*tokens.shape, 6)
        found[..., 4] = 2.0
        found[:, 4::2, EOS] = 9.0
        found[:, 6::4, EOT] = 12.0
        return found

    eager = _sample(Stub(logits), gen_length=8, steps=8, block_length=8)
    late = _sample(Stub(logits), gen_length=8, steps=8, block_length=8, confidence_eos_eot_inf=True)
    assert eager.answers() == late.answers() == [[EOS, 4, EOT, 4, EOS, 4, EOT, 4]]
    assert max(eager.orders()[0][0::2]) < min(eager.orders()[0][1::2])
    assert min(late.orders()[0][0::2]) > max(late.orders()[0][1::2])
    with pytest.raises(ValueError, match="end of text"):
        LLaDASampler(LLaDASampling(logits_eos_inf=True), SpecialTokens(mask=0, pad=1))


def test_threshold_decides_what_is_sure_and_at_least_one():
    def logits(tokens):
        found = torch.zeros(*tokens.shape, 6)
        found[:, 4:8, 4] = 9.0  # sure
        found[:, 8:, 5] = 1.0  # unsure
        return found

    seen, spy = [], Spy()
    found = _sample(
        Stub(logits), gen_length=8, steps=2, block_length=4, threshold=0.9,
        call={"on_step": seen.append, "control": spy},
    )  # fmt: skip
    assert [len(event.rows) for event in seen] == [4, 1, 1, 1, 1]
    assert found.forwards == 5
    assert found.answers() == [[4] * 4 + [5] * 4]
    # The largest number of steps is announced, and how much is decided before each.
    assert spy.begun == [([4], 8, 8, None, 2)]
    assert spy.steps == [event.step for event in seen] == [0, 1, 2, 3, 4]
    assert spy.told == [(0, 0), (0.5, 1), (0.625, 1), (0.75, 1), (0.875, 1)]


def test_mask_token_is_never_chosen():
    found = _sample(fixed([50.0, 0, 0, 0, 1, 2]), gen_length=6, steps=3, block_length=6)
    assert found.answers() == [[5] * 6]
    assert found.finished


def test_blanks_in_the_prompt_are_filled_with_the_first_block():
    seen = []
    found = _sample(
        scrambled(), rows=[[5, MASK, MASK, 4], [7]], gen_length=8, steps=4, block_length=4,
        call={"on_step": seen.append},
    )  # fmt: skip
    assert not (found.sequences[0] == MASK).any()
    assert found.sequences[0, [0, 3]].tolist() == [5, 4]
    assert found.finished
    inside = [p for e in seen for r, p in zip(e.rows.tolist(), e.positions.tolist(), strict=True) if p < 0]
    assert sorted(inside) == [-3, -2]
    assert [sum((e.rows == 0).tolist()) for e in seen] == [3, 3, 2, 2]  # 6 masks, then 4
    assert [sum((e.rows == 1).tolist()) for e in seen] == [2, 2, 2, 2]


def test_a_control_is_told_of_rows_steps_and_the_end():
    spy = Spy()
    _sample(
        scrambled(), rows=[PROMPT, [8]], gen_length=8, steps=4, block_length=4, cfg_scale=1.0,
        call={"control": spy},
    )  # fmt: skip
    assert spy.begun == [([4, 1, 4, 1], 8, 4, [0, 3, 0, 3], 2)]
    assert spy.steps == [0, 1, 2, 3]
    assert spy.told == [(0, 0), (0.25, 0), (0.5, 1), (0.75, 1)]
    assert spy.resets == 1
    spy = Spy()
    _sample(scrambled(), gen_length=8, steps=64, block_length=4, call={"control": spy})
    assert spy.begun == [([4], 8, 8, None, 2)]  # 32 steps for 4 tokens would be 28 that decide nothing
    assert spy.steps == list(range(8))


def test_ctrl_c_leaves_what_was_decided():
    spy, model = Spy(), scrambled()
    whole = _sample(scrambled(), gen_length=8, steps=8, block_length=8)

    def interrupted(event):
        if event.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        _sample(model, gen_length=8, steps=8, block_length=8, call={"on_step": interrupted, "control": spy})
    assert isinstance(caught.value, GenerationInterrupted)
    partial = caught.value.partial
    assert not partial.finished
    assert spy.resets == 1
    early = torch.tensor(whole.orders()) <= 2
    assert torch.equal(torch.tensor(partial.answers()) != MASK, early)
    assert torch.equal(torch.tensor(partial.answers())[early], torch.tensor(whole.answers())[early])


def test_a_callback_may_end_it():
    found = _sample(
        scrambled(), gen_length=8, steps=8, block_length=8, call={"on_step": lambda event: event.step == 2}
    )
    assert not found.finished
    assert found.forwards == 3
    assert sum(token == MASK for token in found.answers()[0]) == 5


def test_an_error_of_the_model_resets_the_control():
    spy = Spy()

    def broken(tokens):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        _sample(Stub(broken), gen_length=4, steps=4, block_length=4, call={"control": spy})
    assert spy.resets == 1


def test_hooks_see_whole_logits_and_may_mask_again():
    shapes, again = [], []

    def logits_hook(step, tokens, logits):
        shapes.append(tuple(logits.shape))
        logits[..., 9] = 99.0
        return logits

    def tokens_hook(step, tokens, logits):
        if step == 0 and not again:
            again.append(int((tokens != MASK).nonzero()[-1, 1]))
            tokens[:, again[0]] = MASK
        return tokens

    found = _sample(
        scrambled(), gen_length=6, steps=3, block_length=6,
        call={"logits_hook": logits_hook, "tokens_hook": tokens_hook},
    )  # fmt: skip
    assert set(shapes) == {(1, 10, 12)}
    assert found.answers() == [[9] * 6]
    assert found.decided_in[0, again[0]] > 0

    def stubborn(step, tokens, logits):
        tokens[:, -1] = MASK
        return tokens

    with pytest.raises(RuntimeError, match="keeps masking"):
        _sample(scrambled(), gen_length=6, steps=3, block_length=6, call={"tokens_hook": stubborn})
    with pytest.raises(ValueError, match="must return"):
        _sample(
            scrambled(), gen_length=6, steps=3, block_length=6,
            call={"tokens_hook": lambda step, tokens, logits: tokens[:, 1:]},
        )  # fmt: skip


def test_the_head_is_computed_for_the_block_only(llada):
    asked = []

    class Watched:
        device = torch.device("cpu")

        def forward(self, input_ids, attention_mask=None, position_ids=None, logits_to_keep=0):
            asked.append(logits_to_keep.tolist())
            return llada(input_ids=input_ids, logits_to_keep=logits_to_keep)

        __call__ = forward

    class Without:
        device = torch.device("cpu")

        def forward(self, input_ids, attention_mask=None, position_ids=None):
            return llada(input_ids=input_ids)

        __call__ = forward

    sampling = {"gen_length": 8, "steps": 4, "block_length": 4}
    assert _sample(Watched(), **sampling).answers() == _sample(Without(), **sampling).answers()
    assert asked == [[4, 5, 6, 7]] * 2 + [[8, 9, 10, 11]] * 2


@pytest.mark.parametrize(
    ("sampling", "says"),
    [
        ({"gen_length": 100, "block_length": 32}, "not a multiple of block_length"),
        ({"gen_length": 128, "block_length": 32, "steps": 30}, "the nearest is 32"),
        ({"steps": 0}, "steps=0"),
        ({"temperature": -1.0}, "temperature"),
        ({"cfg_scale": math.inf}, "cfg_scale"),
        ({"remasking": "low"}, "low_confidence, random"),
        ({"threshold": 0.0}, "threshold"),
        ({"threshold": 0.9, "remasking": "random"}, "random confidences"),
    ],
)
def test_settings_out_of_range_are_refused(sampling, says):
    with pytest.raises(ValueError, match=says):
        LLaDASampling(**sampling)


def test_padding_must_not_be_the_mask():
    with pytest.raises(ValueError, match="is the mask token"):
        SpecialTokens(mask=PAD, pad=PAD)
