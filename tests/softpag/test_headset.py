"""HeadSet: what is written is read again, and a set of another model is refused."""

import json

import pytest

from diffctrl.processors import SoftPAGAttnProcessor
from diffctrl.processors.universe import universe_of
from diffctrl.softpag import Head
from diffctrl.softpag.headhunt import HuntConfig
from diffctrl.softpag.headset import Chosen, HeadSet, Signature
from tests.helpers import build
from tests.softpag.hunting import UNIVERSE, search


@pytest.fixture(scope="module")
def headset():
    return search(config=HuntConfig(rounds=2, top=3))[0]


def test_json_holds_everything_of_the_specification(headset, tmp_path):
    path = tmp_path / "heads.json"
    headset.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["heads.json"]
    values = json.loads(path.read_text())
    assert values["format"] == "diffctrl.headset"
    assert values["schema"] == 1
    assert values["model"]["id"] == "toy"
    assert values["model"]["revision"] == "1"
    assert values["model"]["signature"]["stacks"] == [{"name": "blocks", "layers": 3, "heads": [4, 4, 4]}]
    assert values["perturbation"] == {"kind": "identity", "scope": "joint", "u": 1.0, "w": 3.0, "s": 1.0}
    assert values["sampling"]["steps"] == 4
    assert values["objective"] == {"name": "additive", "version": "1"}
    assert values["pairs"][0] == {"prompt": "prompt 0", "seed": 0}
    assert [len(entry["candidates"]) for entry in values["rounds"]] == [12, 9]
    assert {"head", "mean", "error", "difference", "difference_error"} < set(
        values["rounds"][0]["candidates"][0]
    )
    assert [entry["round"] for entry in values["heads"]] == [1, 1, 1, 2, 2, 2]
    assert HeadSet.load(path) == headset


def test_parts_of_a_set(headset):
    assert list(headset.first(4)) == list(headset)[:4]
    assert headset.up_to_round(1).heads == headset.heads[:3]
    assert len(headset.up_to_round(1).rounds) == 1
    assert len(headset.up_to_round(2)) == 6
    with pytest.raises(ValueError, match="has 6 heads"):
        headset.first(7)
    with pytest.raises(ValueError, match="rounds 1, 2"):
        headset.up_to_round(3)


def test_union_keeps_order_and_strengths(headset):
    other = HeadSet(chosen=(Chosen(headset.heads[1]), Chosen(Head(9, 9), u=0.25)))
    joined = headset.first(2) | other
    assert joined.heads == (*headset.heads[:2], Head(9, 9))
    assert joined.weights()[Head(9, 9)] == 0.25
    assert joined.signature == headset.signature
    foreign = HeadSet(chosen=other.chosen, signature=Signature(model_class="X", stacks=()))
    with pytest.raises(ValueError, match="two models"):
        headset.union(foreign)


def test_strengths_of_single_heads(headset, tmp_path):
    first = headset.heads[0]
    changed = headset.with_weights({first: 0.25, str(headset.heads[1]): 0.5})
    assert list(changed.weights().values())[:3] == [0.25, 0.5, None]
    assert [head.u for head in SoftPAGAttnProcessor(changed, u=0.75).config.heads][:3] == [0.25, 0.5, None]
    changed.save(tmp_path / "heads.json")
    assert HeadSet.load(tmp_path / "heads.json") == changed
    assert changed.with_weights({first: None, headset.heads[1]: None}) == headset
    with pytest.raises(ValueError, match="not in the set"):
        headset.with_weights({Head(9, 9): 0.5})
    with pytest.raises(ValueError, match=r"not in \[0, 1\]"):
        headset.with_weights({first: 1.5})


def test_plain_lines_of_the_authors(tmp_path):
    path = tmp_path / "heads.txt"
    path.write_text("# darker\n1,2\n\n 1, 10\n11,15\n")
    assert HeadSet.load(path).heads == (Head(1, 2), Head(1, 10), Head(11, 15))
    path.write_text("1,2\nL3H4\n")
    with pytest.raises(ValueError, match="line 2"):
        HeadSet.load(path)
    path.write_text("1,2\n1,2\n")
    with pytest.raises(ValueError, match="twice"):
        HeadSet.load(path)


def test_is_taken_wherever_heads_are(headset):
    processor = SoftPAGAttnProcessor(headset, u=0.5)
    assert tuple(processor.config.heads) == headset.heads
    assert Head(*_numbers(str(headset.heads[0]))) in headset


def _numbers(name):
    return [int(number) for number in name[1:].split("H")]


def test_a_set_of_another_model_is_refused(headset):
    assert headset.check(UNIVERSE.signature) is headset
    with pytest.raises(ValueError, match=r"found on Toy\(blocks 3 x 4\).*SD3Transformer2DModel"):
        headset.check(universe_of(build("sd3")).signature)
    own = HeadSet(chosen=headset.chosen, signature=universe_of(build("sd3")).signature)
    assert own.check(universe_of(build("sd3")).signature) is own
    with pytest.raises(ValueError, match=r"attn2"):  # SD3.5 has a stack more
        own.check(universe_of(build("sd3.5")).signature)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"schema": 2},
        {"heads": None},
        {"heads": [{"head": "L0H0"}]},
        {"model": []},
        {"pairs": [{"prompt": "x"}]},
    ],
)
def test_damaged_files_are_refused(headset, change):
    with pytest.raises(ValueError, match=r"head set"):
        HeadSet.from_dict({**headset.to_dict(), **change})


def test_universes_of_real_models():
    def heads(name):
        return [str(head) for head in universe_of(build(name)).heads]

    assert heads("flux") == [f"L{layer}H{head}" for layer in range(4) for head in range(2)]
    with_second = heads("sd3.5")
    assert with_second[:2] == ["L0H0", "L0H1"]
    assert with_second[-4:] == ["attn2:L0H0", "attn2:L0H1", "attn2:L1H0", "attn2:L1H1"]
    assert len(heads("wan")) == 4  # cross-attention is never perturbed
    for name in ("unet", "cogvideox", "hunyuan_video", "mochi", "ltx"):
        universe = universe_of(build(name))
        assert (
            len(universe.heads)
            == len(set(universe.heads))
            == sum(sum(each) for _, _, each in universe.signature.stacks)
        )
