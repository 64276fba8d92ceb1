"""The generated worlds: reproducible, exact masks, captions that say what is there and nothing else."""

import pytest
import torch

from diffctrl.zoo import judge, worlds
from diffctrl.zoo.worlds import vocabulary
from diffctrl.zoo.worlds.sampling import HELD_OUT_TABLE


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small tensors on a shared machine: more threads wait for each other and take many times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _uniforms(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, worlds.CAPTION_UNIFORMS, generator=torch.Generator().manual_seed(seed))


def _same(first: worlds.Scenes, second: worlds.Scenes) -> bool:
    return all(torch.equal(value, second.tensors()[name]) for name, value in first.tensors().items())


def test_same_seed_and_index_same_scenes():
    first = worlds.sample(64, seed=5, index=3)
    assert _same(first, worlds.sample(64, seed=5, index=3))
    for other in ({"seed": 6, "index": 3}, {"seed": 5, "index": 4}, {"seed": 5, "index": 3, "split": "test"}):
        assert not torch.equal(first.x, worlds.sample(64, **other).x)


def test_rendering_twice_and_alone_gives_the_same_picture():
    scenes = worlds.sample(12, seed=1)
    images, masks = worlds.render(scenes)
    again, _ = worlds.render(scenes)
    alone, _ = worlds.render(scenes.select([7]))
    assert torch.equal(images, again)
    assert torch.equal(images[7], alone[0])
    assert images.shape == (12, 3, 128, 128)
    assert masks.shape == (12, 3, 128, 128)
    assert images.dtype == torch.float32
    assert 0 <= float(images.min()) <= float(images.max()) <= 1


def test_shares_of_the_mixed_world():
    scenes = worlds.sample(4000, seed=2)
    assert float(scenes.character.float().mean()) == pytest.approx(0.4, abs=0.03)
    for count, share in ((1, 0.45), (2, 0.40), (3, 0.15)):
        assert float((scenes.count == count).float().mean()) == pytest.approx(share, abs=0.03)
    assert bool(((scenes.relation >= 0) == (scenes.count == 2)).all())


@pytest.mark.parametrize("split", ["train", "test"])
def test_held_out_triples_occur_only_where_they_belong(split):
    table = torch.from_numpy(HELD_OUT_TABLE)
    scenes = worlds.sample(4000, seed=3, split=split, world="shapes")
    assert not bool((table[scenes.colour, scenes.shape, scenes.pattern] & scenes.present).any())
    held = worlds.sample(300, seed=3, split="heldout", objects=1)
    assert bool(table[held.colour[:, 0], held.shape[:, 0], held.pattern[:, 0]].all())
    assert len(vocabulary.HELD_OUT) == len(set(vocabulary.HELD_OUT)) == 10


@pytest.mark.parametrize(("world", "size"), [("shapes", 128), ("characters", 128), ("mixed", (96, 160))])
def test_masks_and_background_sum_to_one_and_show_the_picture(world, size):
    scenes = worlds.sample(24, seed=4, world=world)
    images, masks = worlds.render(scenes, size)
    total = masks.sum(1)
    assert float(total.max()) <= 1 + 1e-5
    assert float(masks.min()) >= 0
    assert not bool(masks[~scenes.present].any())
    # Where no mask is, the picture is the bare background: the same scene without objects.
    bare = worlds.Scenes(world=scenes.world, **{**scenes.tensors(), "count": torch.zeros_like(scenes.count)})
    empty, _ = worlds.render(bare, size)
    assert torch.allclose(images * (total == 0)[:, None], empty * (total == 0)[:, None], atol=1e-6)
    # Every object is inside the frame.
    assert not bool(
        masks[..., :2, :].any() | masks[..., -2:, :].any() | masks[..., :2].any() | masks[..., -2:].any()
    )


def test_pixels_of_a_plain_flat_object_have_its_colour():
    scenes = worlds.sample(400, seed=8, world="shapes")
    plain = (scenes.style == 0) & ((scenes.pattern == 0) | ~scenes.present).all(1)
    scenes = scenes.select(plain)
    assert len(scenes) > 12
    images, masks = worlds.render(scenes)
    for place in range(3):
        inside = (masks[:, place] > 0.999)[:, None]
        difference = (images - scenes.rgb[:, place, :, None, None]).abs() * inside
        assert float(difference.max()) < 1e-3


def test_in_front_of_hides_between_15_and_35_percent():
    scenes = worlds.sample(400, seed=9, world="shapes", objects=2)
    scenes = scenes.select(scenes.relation == vocabulary.IN_FRONT_OF)
    _, masks = worlds.render(scenes)
    swap = torch.tensor([1, 0, 2])
    swapped = {
        name: value[:, swap] if value.ndim > 1 and name not in ("tones", "freedom") else value
        for name, value in scenes.tensors().items()
    }
    _, whole = worlds.render(worlds.Scenes(world=scenes.world, **swapped))
    hidden = 1 - masks[:, 1].sum((1, 2)) / whole[:, 0].sum((1, 2))
    assert float(((hidden > 0.10) & (hidden < 0.42)).float().mean()) > 0.95
    assert 0.20 < float(hidden.mean()) < 0.30


def test_words_are_known_short_and_plain():
    scenes = worlds.sample(12_000, seed=10)
    words = worlds.caption_words(scenes, _uniforms(len(scenes)))
    assert words.shape == (len(scenes), worlds.MAX_WORDS)
    assert int(words.max()) < len(worlds.WORDS)
    padding = words < 0
    assert bool((padding[:, 1:] | ~padding[:, :-1]).all()), "padding is only at the end"
    used = {worlds.WORDS[index] for index in words[~padding].unique().tolist()}
    assert used == set(worlds.WORDS)
    assert len(set(worlds.WORDS)) == len(worlds.WORDS)
    assert all(word == "," or (word.isalpha() and word.islower()) for word in worlds.WORDS)


def test_captions_are_fresh_and_reproducible():
    scenes = worlds.sample(500, seed=11)
    first = worlds.caption_words(scenes, _uniforms(500, 1))
    assert torch.equal(first, worlds.caption_words(scenes, _uniforms(500, 1)))
    differs = (first != worlds.caption_words(scenes, _uniforms(500, 2))).any(1)
    assert float(differs.float().mean()) > 0.9


@pytest.mark.parametrize("world", ["shapes", "characters"])
def test_detailed_captions_name_more_and_leave_other_rows_alone(world):
    scenes, uniforms = worlds.sample(400, seed=5, world=world), _uniforms(400, 5)
    rows = torch.arange(400) % 2 == 0
    words = worlds.caption_words(scenes, worlds.detailed(uniforms, rows))
    plain = worlds.caption_words(scenes, uniforms)
    assert torch.equal(words[~rows], plain[~rows])
    assert (words[rows] >= 0).sum() > 1.15 * (plain[rows] >= 0).sum()
    single = rows & (scenes.count == 1)
    facts = worlds.said(scenes.select(single), worlds.detailed(uniforms, rows)[single])
    named = ("colour", "pattern", "body", "eyes", "action") if world == "characters" else ("size", "pattern")
    assert facts
    assert all(getattr(f.objects[0], name) is not None for f in facts for name in named)
    assert all(f.background is not None for f in facts)


def test_parsing_a_caption_gives_what_it_was_meant_to_say():
    scenes = worlds.sample(1500, seed=12)
    uniforms = _uniforms(1500, 3)
    texts = worlds.to_text(worlds.caption_words(scenes, uniforms))
    for text, facts in zip(texts, worlds.said(scenes, uniforms), strict=True):
        assert judge.parse(text) == facts, text


def test_what_is_said_is_true():
    scenes = worlds.sample(500, seed=13)
    inverse = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for facts, whole in zip(worlds.said(scenes, _uniforms(500, 4)), worlds.truth(scenes), strict=True):
        assert facts.kind == whole.kind
        assert len(facts.objects) == len(whole.objects)
        for name in ("style", "background", "texture"):
            assert getattr(facts, name) in (None, getattr(whole, name))
        assert facts.relation in (None, whole.relation, inverse.get(whole.relation or ""))


def test_the_articles_fit():
    texts = worlds.to_text(worlds.caption_words(worlds.sample(800, seed=14), _uniforms(800, 5)))
    for text in texts:
        words = text.split()
        for article, word in zip(words, words[1:], strict=False):
            if article in ("a", "an"):
                assert (article == "an") == (word[0] in "aeio"), text


def test_referring_phrases_fit_one_object_only():
    scenes = worlds.sample(400, seed=15, world="shapes")
    phrases = worlds.referring(scenes)
    assert len({phrase for one in phrases for phrase in one}) > 30
    for one, facts, x in zip(phrases, worlds.truth(scenes), scenes.x.tolist(), strict=True):
        assert len(one) == len(facts.objects)
        for place, phrase in enumerate(one):
            assert phrase is not None
            words = phrase.removesuffix(" on the left").removesuffix(" on the right").split()[1:]
            told = set(words) - {"one"}
            same = [i for i, each in enumerate(facts.objects) if told <= set(each.named().values())]
            if phrase.endswith("left") or phrase.endswith("right"):
                side = min if phrase.endswith("left") else max
                same = [side(same, key=lambda i: x[i])]
            assert same == [place], phrase


def test_rendering_and_captions_are_one_graph():
    scenes = worlds.sample(4, seed=16)
    uniforms = _uniforms(4)
    render = torch.compile(worlds.render, backend="eager", fullgraph=True)
    caption = torch.compile(worlds.caption_words, backend="eager", fullgraph=True)
    assert torch.allclose(render(scenes, 24)[0], worlds.render(scenes, 24)[0], atol=1e-5)
    assert torch.equal(caption(scenes, uniforms), worlds.caption_words(scenes, uniforms))


@pytest.mark.parametrize(
    "wrong",
    [
        {"world": "videos"},
        {"split": "validation"},
        {"objects": 4},
        {"objects": ()},
        {"world": "characters", "split": "heldout"},
    ],
)
def test_unknown_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match="got|heldout"):
        worlds.sample(2, seed=0, **wrong)


def test_scenes_select_and_concatenate():
    scenes = worlds.sample(10, seed=17)
    both = worlds.concatenate([scenes.select([0, 1]), scenes.select(slice(2, 10))])
    assert _same(both, scenes)
    assert len(scenes.select(scenes.character)) == int(scenes.character.sum())
