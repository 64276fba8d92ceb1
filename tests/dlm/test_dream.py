"""Dream's sampler against a slow one: the shift, the quotas, the orders, the filters."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffctrl.dlm import DreamSampler, DreamSampling, GenerationInterrupted, Prompts, SpecialTokens
from diffctrl.dlm.dream import keep_top_k, keep_top_p
from diffctrl.dlm.noise import categorical
from tests.dlm.stubs import MASK, Spy, Stub, scrambled, slow_dream

SPECIAL = SpecialTokens(mask=MASK, pad=2, eos=1)
PROMPT = [5, 9, 4, 7]


def _sample(model, rows=(PROMPT,), call=None, **sampling):
    prompts = Prompts.of([list(row) for row in rows], SPECIAL.pad)
    return DreamSampler(DreamSampling(**sampling), SPECIAL).generate(model, prompts, **(call or {}))


def following(vocabulary=40):
    """Position i names position i + 1, counted from the row's first token 20."""

    def logits(tokens):
        places = torch.arange(tokens.shape[1])[None] - (tokens == 20).long().argmax(-1)[:, None]
        return 9.0 * torch.nn.functional.one_hot((places + 1).clamp(0, vocabulary - 1), vocabulary).float()

    return Stub(logits)


def fixed(row):
    row = torch.tensor(row, dtype=torch.float32)
    return Stub(lambda tokens: row.expand(*tokens.shape, -1).clone())


@pytest.mark.parametrize("alg", ["origin", "maskgit_plus", "topk_margin", "entropy"])
@pytest.mark.parametrize("call", [{}, {"logits_hook": lambda step, tokens, logits: logits}])
def test_logits_belong_to_the_next_position(alg, call):
    rows = [[20, 21, 22, 23, 24], [20, 21]]
    found = _sample(following(), rows=rows, gen_length=6, steps=6, alg=alg, call={"seeds": 0, **call})
    assert found.answers() == [[5, 6, 7, 8, 9, 10], [2, 3, 4, 5, 6, 7]]


def test_the_first_token_of_a_row_is_read_at_itself():
    """A blank at the start of a padded row must not read the padding before it."""
    model = scrambled()
    alone = _sample(model, rows=[[MASK, 9]], gen_length=4, steps=4, alg="entropy")
    direct = model._logits(torch.tensor([[MASK, 9] + [MASK] * 4]))
    assert direct.shape == (1, 6, 12)

    def logits(tokens):
        found = torch.zeros(*tokens.shape, 12)
        found[:, :, 5] = 1.0
        found[1, 2, 8] = 9.0  # at the second row's padding
        found[1, 3, 6] = 9.0  # at its first token
        return found

    rows = [[5, 5, 5, 5, 5], [MASK, 9]]
    found = _sample(Stub(logits), rows=rows, gen_length=2, steps=2, alg="entropy")
    assert found.sequences[1, 3].item() == 6
    assert alone.finished


@pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "entropy"])
@pytest.mark.parametrize(("gen_length", "steps"), [(12, 12), (12, 5), (12, 20), (9, 1)])
def test_equals_the_slow_sampler(alg, gen_length, steps):
    wanted = slow_dream(scrambled(), PROMPT, gen_length=gen_length, steps=steps, alg=alg)
    assert _sample(scrambled(), gen_length=gen_length, steps=steps, alg=alg).answers() == [wanted]


def test_a_real_model_equals_the_slow_sampler(dream):
    with torch.no_grad():
        wanted = slow_dream(dream, PROMPT, gen_length=16, steps=9, alg="entropy")
    assert _sample(dream, gen_length=16, steps=9, alg="entropy").answers() == [wanted]


def test_quotas_truncate_and_are_each_rows_own():
    """The first step of 128 decides int(128 * 0.999 / 128) = 0; rows with blanks have more to decide."""
    seen = []
    _sample(
        scrambled(), rows=[PROMPT, [5, MASK, MASK, MASK]], gen_length=10, steps=4, alg="entropy",
        call={"on_step": seen.append},
    )  # fmt: skip
    grid = torch.linspace(1, 1e-3, 5)
    for row, left in enumerate((10, 13)):
        for step, event in enumerate(seen):
            quota = left if step == 3 else int(left * (1 - grid[step + 1] / grid[step]))
            assert int((event.rows == row).sum()) == quota
            left -= quota
    counts = []
    _sample(
        scrambled(), gen_length=128, steps=128, alg="entropy",
        call={"on_step": lambda event: counts.append(len(event.rows))},
    )  # fmt: skip
    assert counts[0] == 0
    assert sum(counts) == 128


def test_origin_decides_with_the_probability_of_the_schedule():
    counts = []
    found = _sample(
        scrambled(), rows=[PROMPT] * 8, gen_length=250, steps=4,
        call={"on_step": lambda event: counts.append(len(event.rows)), "seeds": 1},
    )  # fmt: skip
    assert found.finished
    assert sum(counts) == 2000
    for count in counts:  # a quarter of all in each step, within 4 standard deviations
        assert abs(count - 500) < 4 * math.sqrt(2000 * 0.25 * 0.75)


def test_frequencies_of_tokens_are_those_of_the_kept_ones():
    row = [0.0, 0.4, 1.0, -0.5, 1.7, 0.2]
    found = _sample(
        fixed(row), rows=[PROMPT] * 8, gen_length=500, steps=1, alg="maskgit_plus", temperature=0.8,
        top_k=3, call={"seeds": 5},
    )  # fmt: skip
    counts = torch.bincount(torch.tensor(found.answers()).flatten(), minlength=6).double()
    assert counts[[0, 3, 5]].tolist() == [0, 0, 0]
    expected = torch.softmax(torch.tensor([0.4, 1.0, 1.7]).double() / 0.8, -1) * 4000
    assert ((counts[[1, 2, 4]] - expected).square() / expected).sum() < 13.8  # 0.1 %, 2 degrees of freedom


def test_order_is_drawn_from_the_softmax_of_the_confidence():
    """One of three positions is decided first, with the chances softmax(p / alg_temp)."""
    chances = torch.tensor([0.9, 0.6, 0.7], dtype=torch.float64)

    def logits(tokens):
        found = torch.full((*tokens.shape, 6), -math.inf)
        found[..., 4] = 0.0
        found[:, 3:6, 4], found[:, 3:6, 5] = chances.log().float(), (1 - chances).log().float()
        return found

    seen = []
    _sample(
        Stub(logits), rows=[PROMPT] * 2000, gen_length=3, steps=2, alg="maskgit_plus", alg_temp=0.3,
        call={"on_step": lambda event: seen.append(event) or True, "seeds": 2},
    )  # fmt: skip
    counts = torch.bincount(seen[0].positions, minlength=3).double()
    expected = torch.softmax(chances / 0.3, -1) * 2000  # int(3 * 0.4995) = 1 in each row
    assert ((counts - expected).square() / expected).sum() < 13.8


def test_mask_token_is_never_chosen():
    for sampling in ({}, {"temperature": 1.0, "top_k": 1}, {"temperature": 1.0, "top_p": 0.5}):
        found = _sample(fixed([50.0, 0, 0, 0, 1, 9]), gen_length=6, steps=3, alg="maskgit_plus", **sampling)
        assert found.answers() == [[5] * 6]
        assert found.finished


def test_tokens_hook_is_called_before_the_first_step():
    steps = []

    def hook(step, tokens, logits):
        steps.append((step, None if logits is None else tuple(logits.shape)))
        if step is None:
            tokens = tokens.clone()
            tokens[:, -1] = 11
        return tokens

    found = _sample(scrambled(), gen_length=5, steps=2, alg="entropy", call={"tokens_hook": hook})
    assert steps == [(None, None), (0, (1, 9, 12)), (1, (1, 9, 12))]
    assert found.answers()[0][-1] == 11


def test_control_and_ctrl_c():
    spy = Spy()
    _sample(scrambled(), gen_length=6, steps=4, alg="entropy", call={"control": spy})
    assert spy.begun == [([4], 6, 4, None, 1)]
    assert spy.steps == [0, 1, 2, 3]
    assert spy.resets == 1

    def interrupted(event):
        raise KeyboardInterrupt

    with pytest.raises(GenerationInterrupted) as caught:
        _sample(scrambled(), gen_length=6, steps=2, alg="entropy", call={"on_step": interrupted})
    assert sum(token != MASK for token in caught.value.partial.answers()[0]) == 3 - 1  # int(6 * 0.4995) = 2


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8), st.floats(0.05, 0.99), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_filters_keep_the_likeliest(row, top_p, top_k):
    logits = torch.tensor([row], dtype=torch.float64)
    kept = torch.isfinite(keep_top_p(logits, top_p))[0]
    chances = torch.softmax(logits, -1)[0]
    inside = chances[kept].sort(descending=True).values
    assert inside[:-1].sum() <= top_p + 1e-9  # without the last one it is not reached
    if (~kept).any():
        assert inside[-1] >= chances[~kept].max() - 1e-12
        assert inside.sum() > top_p - 1e-9
    kept = torch.isfinite(keep_top_k(logits, top_k))[0]
    assert int(kept.sum()) >= min(top_k, len(row))
    assert (logits[0][kept] >= logits[0].sort(descending=True).values[min(top_k, len(row)) - 1]).all()


def test_inversion_never_takes_what_has_no_chance():
    chances = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]], dtype=torch.float64)
    noise = torch.tensor([0.0, 0.4999, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert categorical(chances.expand(4, -1), noise).tolist() == [1, 1, 3, 3]
    third = torch.full((1, 3), 1 / 3, dtype=torch.float64) * 7
    assert categorical(third, torch.tensor([1 - 2**-53]).double()).tolist() == [2]


@pytest.mark.parametrize(
    ("sampling", "says"),
    [
        ({"alg": "entropie"}, "origin, maskgit_plus"),
        ({"alg_temp": 0.1}, "no effect with alg='origin'"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"temperature": math.nan}, "temperature"),
        ({"eps": 1.0}, "eps"),
        ({"gen_length": 0}, "gen_length"),
    ],
)
def test_settings_out_of_range_are_refused(sampling, says):
    with pytest.raises(ValueError, match=says):
        DreamSampling(**sampling)
