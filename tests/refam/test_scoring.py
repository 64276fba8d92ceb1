"""The worked example and the planted oracle (specification 2.5-2.8; rows 1, 2, 12, 13, 26 of section 8)."""

import math

import pytest
import torch

from diffctrl.refam import RefAMConfig, Token, TokenTable, Weights, score, split_words
from diffctrl.refam.metrics import inside_ratio, points_at
from diffctrl.refam.reference import planted_attention, probabilities, summed_columns
from diffctrl.refam.scoring import token_maps, unsettled, vote
from diffctrl.refam.sinks import elected, evenness, flags, importance, median

LOGITS = torch.tensor(
    [
        [2, 3, 2, 1, 0, 0, 1, 0, 0, 0],
        [2, 0, 0, 1, 3, 0, 0, 1, 0, 0],
        [2, 0, 1, 1, 0, 3, 0, 0, 1, 0],
        [2, 1, 3, 1, 0, 0, 0, 0, 0, 1],
    ],
    dtype=torch.float64,
)
EXACT = {"rtol": 0, "atol": 1e-6}


def _rows(kinds, words=("a", "red", "cube")):
    places = iter(range(len(words)))
    tokens = []
    for index, kind in enumerate(kinds):
        place = next(places) if kind in ("content", "outside", "stop") else None
        word = words[place] if place is not None else ""
        tokens.append(Token(index, f"p{index}", word, place, kind, "t5"))
    return TokenTable(" ".join(words), split_words(" ".join(words)), tuple(tokens))


TABLE = _rows(["stop", "content", "content", "special", "magnet", "magnet"])


def _text_mass():
    logits = torch.zeros(6, 10, dtype=torch.float64)
    logits[:, 0] = 3
    logits[range(1, 6), range(1, 6)] = 1
    return logits.softmax(-1)[:, :6].mean(0)


@pytest.fixture
def weights():
    return Weights(LOGITS.softmax(-1)[:, :6].T[None], None, _text_mass()[None], (1,), 2)


def _close(found, wanted):
    torch.testing.assert_close(found.double(), torch.tensor(wanted, dtype=torch.float64), **EXACT)


def test_normaliser_and_text_mass(weights):
    _close(LOGITS.logsumexp(-1), [3.813312, 3.661281, 3.704493, 3.704493])
    parts = torch.logaddexp(LOGITS[:, :6].logsumexp(-1), LOGITS[:, 6:].logsumexp(-1))
    torch.testing.assert_close(parts, LOGITS.logsumexp(-1))
    _close(weights.i2t[0].sum(0), [0.873769, 0.853043, 0.859258, 0.859258])


def test_filtered_sum(weights):
    plain = RefAMConfig(stop_words=False, noun_phrase="off", sinks="off")
    _close(weights.i2t[0, :4].sum(0), [0.829619, 0.311153, 0.340286, 0.810032])
    found = score(weights, TABLE, RefAMConfig(), encoder="t5")
    assert found.table.kept == (1, 2)
    _close(found.heat, [0.606500, 0.051399, 0.091517, 0.561263])
    low, high = found.heat.min(), found.heat.max()
    _close((found.heat - low) / (high - low), [1, 0, 0.072271, 0.918507])
    everything = score(weights, TABLE, plain, encoder="t5")
    assert everything.table.kept == (0, 1, 2)
    assert not torch.allclose(everything.heat, found.heat)


def test_normalised_over_text_and_the_degenerate_map(weights):
    found = score(weights, TABLE, RefAMConfig(normalise="text"), encoder="t5")
    _close(found.heat, [0.694120, 0.060254, 0.106507, 0.653196])
    assert float(found.heat[0] / found.heat[1]) == pytest.approx(11.5199, abs=1e-4)
    # Summed over every text token it would be one everywhere.
    whole = weights.i2t / weights.i2t.sum(1, keepdim=True)
    _close(whole[0].sum(0), [1, 1, 1, 1])


def test_magnets_raise_the_contrast():
    text = LOGITS[:, :4].softmax(-1)
    found = text[:, 1] + text[:, 2]
    _close(found, [0.731059, 0.165189, 0.268941, 0.692890])
    assert float(found[0] / found[1]) == pytest.approx(4.4256, abs=1e-4)


def test_the_sink_statistic(weights):
    image_mass = weights.i2t.mean(-1)
    macro, even = importance(weights.text_mass, image_mass), evenness(weights.i2t)
    _close(image_mass[0], [0.179184, 0.140151, 0.187519, 0.065918, 0.146873, 0.141687])
    _close(macro[0], [0.418826, 0.091115, 0.114800, 0.053999, 0.094476, 0.091883])
    _close(even[0], [0.998896, 0.517757, 0.676436, 0.998896, 0.362702, 0.376616])
    assert float(median(macro)) == pytest.approx(0.093180, abs=1e-6)
    assert float(macro[0, 0] / median(macro)) == pytest.approx(4.494813, abs=1e-6)
    flagged, chosen = vote(weights, RefAMConfig())
    assert flagged[0].tolist() == chosen.tolist() == [True, False, False, False, False, False]


def test_suppress_shares_the_sinks_weight(weights):
    found = score(weights, TABLE, RefAMConfig(sinks="suppress"), encoder="t5")
    _close(found.heat, [0.853437, 0.077508, 0.135102, 0.828564])


def test_early_blocks_have_no_vote():
    macro, even = torch.tensor([[9.0, 1, 1, 1]] * 2), torch.ones(2, 4)
    rule = {"tau": 4.0, "least_even": 0.98, "least_depth": 0.35}
    assert flags(macro, even, (0.0, 0.9), **rule)[:, 0].tolist() == [False, True]
    assert flags(macro, even, (0.1, 0.2), **rule).sum() == 0


def test_a_strong_word_that_lies_on_its_object_is_no_sink():
    """A rule by the mean alone drops it: only evenness tells it from the sink beside it."""
    i2t = torch.full((2, 6, 4), 0.01)
    i2t[:, 1, 2] = 0.8  # "red": one place
    i2t[:, 3] = 0.2  # the end token: everywhere, with the same sum
    weights = Weights(i2t, None, None, (60, 61), 64)
    found = score(weights, TABLE, RefAMConfig(), encoder="t5")
    assert found.sinks == (3,)
    assert found.table.kept == (1, 2)
    assert int(found.heat.argmax()) == 2


def test_sinks_of_early_blocks_are_not_looked_for():
    """The same columns, planted in the first blocks and in late ones."""
    late, table = _sunk(["stop", "content", "content", "special"], 1)
    early = Weights(late.i2t, None, None, (0, 22), late.count)  # 22 of 63 is a depth of 0.349
    assert score(late, table, RefAMConfig(), encoder="t5").sinks == (1,)
    assert score(early, table, RefAMConfig(), encoder="t5").sinks == ()


def test_half_of_the_blocks_elect():
    votes = torch.tensor(
        [[True, True, False], [True, False, False], [False, False, False], [True, True, False]]
    )
    assert elected(votes).tolist() == [True, True, False]


def _sunk(kinds, sink, blocks=2, flagged_in=(0, 1), words=("a", "red", "cube")):
    """Weights in which one column is a sink in some blocks, and the other ones are spread unevenly."""
    table = _rows(kinds, words)
    i2t = torch.zeros(blocks, len(kinds), 4)
    i2t[:, range(len(kinds)), [i % 4 for i in range(len(kinds))]] = 0.01
    for block in flagged_in:
        i2t[block, sink] = 0.5
    return Weights(i2t, None, None, tuple(range(60, 60 + blocks)), 64), table


def test_a_sink_on_a_content_word_is_left_out_where_it_was_flagged():
    weights, table = _sunk(["content", "content", "content", "special"], 1, 4, (0, 1), ("big", "red", "cube"))
    found = score(weights, table, RefAMConfig(), encoder="t5")
    assert found.sinks == (1,)
    assert "red" in found.flags["sink_on_content"]
    assert found.table.tokens[1].votes == 2
    assert found.table.tokens[1].kept  # in the other two blocks
    _close(found.per_block[0], [0.01, 0, 0.01, 0])
    _close(found.per_block[3], [0.01, 0.01, 0.01, 0])
    assert unsettled(found) == (1,)


def test_a_sink_that_is_the_only_content_stays():
    weights, table = _sunk(["content", "special", "magnet", "magnet"], 0, words=("cube",))
    found = score(weights, table, RefAMConfig(), encoder="t5")
    assert found.table.kept == (0,)
    assert "only word" in found.flags["sink_on_content"]
    _close(found.heat, [0.5] * 4)


def test_sinks_may_be_left_alone():
    weights, table = _sunk(["content", "content", "special"], 0, words=("red", "cube"))
    found = score(weights, table, RefAMConfig(sinks="off"), encoder="t5")
    assert found.table.kept == (0, 1)
    assert found.sinks == ()


def test_settled_sinks_need_no_magnet():
    weights, table = _sunk(["stop", "content", "content", "special"], 0)
    assert unsettled(score(weights, table, RefAMConfig(), encoder="t5")) == ()


def test_product_wants_all_words_at_one_place():
    i2t = torch.tensor([[[0.3, 0.3, 0.01, 0.3], [0.01, 0.2, 0.9, 0.01]]])
    weights = Weights(i2t, None, None, (1,), 2)
    table = _rows(["content", "content"], ("red", "cube"))
    config = RefAMConfig(sinks="off")
    assert int(score(weights, table, config, encoder="t5").heat.argmax()) == 2
    both = RefAMConfig(sinks="off", combine="product")
    assert int(score(weights, table, both, encoder="t5").heat.argmax()) == 1


def test_token_maps_are_means_over_blocks(weights):
    found = token_maps(weights, RefAMConfig())
    _close(found[1:3].mean(dim=0), [0.606500 / 2, 0.051399 / 2, 0.091517 / 2, 0.561263 / 2])


def test_word_queries_need_text_queries(weights):
    with pytest.raises(ValueError, match="does not have"):
        score(weights, TABLE, RefAMConfig(direction="t2i", sinks="off"), encoder="t5")


def test_some_of_the_blocks():
    weights, table = _sunk(["content", "special"], 0, 3, (1,), ("cube",))
    part = weights.only((61,))
    assert part.blocks == (61,)
    assert part.depth == (61 / 63,)
    torch.testing.assert_close(part.i2t, weights.i2t[1:2])
    with pytest.raises(ValueError, match="block 7 was not read"):
        weights.only((60, 7))


# --- the planted oracle -------------------------------------------------------------------------------------

OBJECT = (slice(3, 8), slice(9, 14))


def _oracle(magnets, filtered):
    attention, names = planted_attention(16, OBJECT, magnets=magnets)
    kinds = ["content", "stop", "special", *(["magnet"] * 2 if magnets else [])]
    table = _rows(kinds, ("cube", "with"))
    config = RefAMConfig(stop_words=filtered, noun_phrase="rules" if filtered else "off")
    weights = Weights(attention[None], None, None, (1,), 2)
    heat = score(weights, table, config, encoder="t5").heat
    if not filtered:  # a plain map takes the end token too
        heat = attention[[0, 1, 2]].sum(0)
    truth = torch.zeros(16, 16, dtype=torch.bool)
    truth[OBJECT] = True
    return inside_ratio(heat.view(16, 16), truth), points_at(heat.view(16, 16), truth)


@pytest.mark.parametrize(
    ("magnets", "filtered", "ratio", "hit"),
    [(False, False, 0.8654, False), (False, True, 7.6832, True), (True, True, 8.9151, True)],
)
def test_planted_oracle(magnets, filtered, ratio, hit):
    found, inside = _oracle(magnets, filtered)
    assert found == pytest.approx(ratio, abs=1e-4)
    assert inside is hit


def test_scoring_equals_the_slow_reference():
    generator = torch.Generator().manual_seed(3)
    query, key = torch.randn(2, 11, 2, 8, generator=generator)
    whole = probabilities(query, key)  # 5 text tokens, then 6 image tokens
    weights = Weights(whole.mean(0)[5:, :5].T[None], None, whole.mean(0)[:5, :5].mean(0)[None], (1,), 2)
    table = _rows(["stop", "content", "content", "special", "magnet"])
    found = score(weights, table, RefAMConfig(sinks="off"), encoder="t5")
    torch.testing.assert_close(found.heat, summed_columns(whole, range(5, 11), [1, 2]))


# --- settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sigma": 0.0}, "between 0"),
        ({"sigma": math.nan}, "between 0"),
        ({"n_noise": 0}, "starts at 1"),
        ({"tau": 0.5}, "tau"),
        ({"blocks": "late"}, "3,5-7"),
        ({"blocks": "7-3"}, "3,5-7"),
        ({"direction": "both"}, "i2t, t2i"),
        ({"direction": "t2i", "normalise": "text"}, "word queries"),
        ({"mask": "sam"}, "go together"),
        ({"sam": "folder"}, "go together"),
        ({"sinks": "redirect", "magnet_encoding": "none"}, "adds magnets"),
        ({"magnets": ""}, "magnets is empty"),
        ({"caption_as_prefix": True}, "needs a caption"),
        ({"seed": -1}, "range of seeds"),
    ],
)
def test_settings_that_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        RefAMConfig(**settings)


def test_settings_survive_as_values():
    config = RefAMConfig(blocks="3-5", magnets=". with", sigma=0.3)
    assert config.magnets == (".", "with")
    assert RefAMConfig.from_dict(config.as_dict()) == config
    with pytest.raises(ValueError, match="no option 'sigmas'"):
        RefAMConfig.from_dict({"sigmas": 1})


def test_blocks_by_depth_and_by_name():
    assert RefAMConfig().chosen_blocks(48) == tuple(range(20, 45))
    assert RefAMConfig().chosen_blocks(57) == tuple(range(24, 54))
    assert RefAMConfig().chosen_blocks(2) == (1,)
    assert RefAMConfig(blocks="1,3").chosen_blocks(4) == (1, 3)
    assert RefAMConfig(blocks="concept").chosen_blocks(57) == (15, 16, 17, 18)
    assert RefAMConfig(blocks="double_late").chosen_blocks(57) == tuple(range(10, 19))
    assert RefAMConfig(blocks="seg4diff_sd3").chosen_blocks(24) == (9,)
    with pytest.raises(ValueError, match="block 9 does not exist"):
        RefAMConfig(blocks="9").chosen_blocks(4)
    assert RefAMConfig(heads="0,2").chosen_heads(4) == (0, 2)
    with pytest.raises(ValueError, match="head 2"):
        RefAMConfig(heads="2").chosen_heads(2)
