"""HeadHunter on tiny pipelines: batches of candidates equal the loop, and leave nothing behind."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import diffctrl
from diffctrl.drawing.hunt import PipelineSampler, hunt
from diffctrl.processors import SoftPAGAttnProcessor
from diffctrl.processors.universe import universe_of
from diffctrl.softpag import Head
from diffctrl.softpag.headhunt import Goal, HuntConfig, Pair, objectives, report
from diffctrl.softpag.headhunt.learned import load as load_learned
from tests import tiny
from tests.pipelines import denoiser, flux_pipeline, prompts, sd3_pipeline, sd_pipeline

CALL = {"num_inference_steps": 4, "height": 80, "width": 48}
PIPELINES = {
    "sd3": lambda: sd3_pipeline("sd3"),
    "sd3.5": lambda: sd3_pipeline("sd3.5"),
    "flux": flux_pipeline,
    "sd": sd_pipeline,
}


def _encoder(pipe, cfg):
    made = {name: value for name, value in prompts(pipe).items() if cfg or not name.startswith("negative")}
    return lambda prompt: made


def _loop(pipe, encode, pair, sets, config):
    """What the candidates replace: one picture after another, through the ordinary processor."""
    found = []
    for heads in sets:
        arguments = {
            **encode(pair.prompt),
            **CALL,
            "guidance_scale": config.guidance_scale,
            "generator": torch.Generator().manual_seed(pair.seed),
            "output_type": "latent",
            "return_dict": False,
        }
        if not heads:
            found.append(pipe(**arguments)[0][0])
            continue
        settings = {**config.settings(), "mode": "batched"}
        with diffctrl.apply(pipe, SoftPAGAttnProcessor(heads, **settings)):
            found.append(pipe(**arguments)[0][0])
    return torch.stack(found)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sd3", {}),
        ("sd3.5", {"guidance_scale": 3.0, "u": 0.5}),
        ("sd3.5", {"scope": "image_rows"}),
        ("flux", {"guidance_scale": 0.0, "w": 8.0}),
        ("sd", {}),
        ("sd", {"guidance_scale": 5.0}),
    ],
)
def test_a_batch_of_candidates_equals_the_loop(name, settings):
    pipe, config = PIPELINES[name](), HuntConfig(steady=False, **settings)
    encode, pair = _encoder(pipe, config.guidance_scale > 1), Pair("x", 5)
    heads = universe_of(pipe).heads
    sets = [(), *[(head,) for head in heads[:6]], (heads[0], heads[-1], heads[3])]
    stock = [module.processor for module in denoiser(pipe).modules() if hasattr(module, "processor")]
    expected = _loop(pipe, encode, pair, sets, config)
    sampler = PipelineSampler(pipe, config, CALL, encode=encode, output_type="latent")
    found = sampler.sample([pair] * len(sets), sets)
    again = sampler.sample([pair] * len(sets), sets[::-1]).flip(0)
    counts = sampler.candidates
    sampler.close()
    scale = expected.abs().max()
    assert (found - expected).abs().max() < 1e-5 * scale
    assert (again - expected).abs().max() < 1e-5 * scale
    spread = (expected[1:] - expected[0]).abs().amax(dim=tuple(range(1, expected.ndim)))
    assert (spread > 1e-3 * scale).all()  # each head does something
    left = [module.processor for module in denoiser(pipe).modules() if hasattr(module, "processor")]
    assert all(one is other for one, other in zip(stock, left, strict=True))
    assert not any(module._forward_pre_hooks for module in denoiser(pipe).modules())
    # Two runs; each step has rows for e (with CFG), c and p, and the first one shares e and c.
    cfg = config.guidance_scale > 1
    blocks = sum(layers for name, layers, _ in universe_of(pipe).signature.stacks if name != "attn2")
    rows = 4 * len(sets) * (2 + cfg) - (len(sets) - 1) * (1 + cfg)
    assert counts.block_rows == 2 * blocks * rows
    assert counts.block_calls == 2 * blocks * 4
    naive = 4 * len(sets) * (2 + cfg) * blocks
    print(f"{name}: {blocks * 4} block calls of {blocks * rows} rows in all; one by one {naive} rows")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sd3", {"kind": "uniform"}),
        ("sd3.5", {"kind": "temperature", "options": {"temperature": 0.5}}),
        ("flux", {"scope": "image_block", "guidance_scale": 0.0}),
        ("sd3", {"mode": "sequential", "guidance_scale": 3.0}),
        ("flux", {"mode": "prefix", "guidance_scale": 0.0}),
        ("sd3.5", {"mode": "prefix", "guidance_scale": 3.0}),
        ("sd3", {"options": {"start_fraction": 0.5}}),
        ("sd3", {"mode": "prefix", "options": {"start_fraction": 0.5, "stop_fraction": 0.75}}),
        ("sd3.5", {"mode": "prefix", "kind": "mean_query"}),
    ],
)
def test_every_target_and_mode_can_be_searched(name, settings):
    pipe, config = PIPELINES[name](), HuntConfig(steady=False, **settings)
    encode, pair = _encoder(pipe, config.guidance_scale > 1), Pair("x", 5)
    heads = universe_of(pipe).heads
    for sets in ([(heads[2],), (heads[3],), (), (heads[2], heads[3])], [(heads[0],), (heads[-1],)], [()]):
        expected = _loop(pipe, encode, pair, sets, config)
        sampler = PipelineSampler(pipe, config, CALL, encode=encode, output_type="latent")
        found = sampler.sample([pair] * len(sets), sets)
        sampler.close()
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_prefixes_are_not_computed_twice(name):
    pipe = PIPELINES[name]()
    encode, universe = _encoder(pipe, False), universe_of(pipe)
    for layer in range(universe.layers):
        sets = [(head,) for head in universe.heads if head.layer == layer]
        config = HuntConfig(mode="prefix", guidance_scale=0.0, steady=False)
        sampler = PipelineSampler(pipe, config, CALL, encode=encode, output_type="latent")
        sampler.sample([Pair("x", 1)] * len(sets), sets)
        sampler.close()
        # The first conditional prediction is shared, and perturbed passes start at their block.
        rows = len(sets) * 4 * (2 * universe.layers - layer) - (len(sets) - 1) * universe.layers
        assert sampler.candidates.block_rows == rows
        print(f"{name} L{layer}: {rows} block rows, {len(sets) * 4 * 2 * universe.layers} one by one")


@pytest.fixture
def rows_decide_the_rounding(monkeypatch):
    """As on a GPU, where products of another number of rows go to another kernel: sums in another order."""
    plain = torch.nn.functional.linear

    def linear(states, weight, bias=None):
        if states.ndim < 3 or (states.shape[0] // 4) % 2 == 0:
            return plain(states, weight, bias)
        return plain(states.flip(-1), weight.flip(-1), bias)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)


@pytest.mark.parametrize("mode", ["prefix", "batched"])
@pytest.mark.parametrize("name", ["sd3.5", "flux"])
def test_a_picture_does_not_depend_on_its_batch(name, mode, rows_decide_the_rounding):
    """To the bit, in batches of one number of rows; without, the planted kernel shows."""
    pipe = PIPELINES[name]()
    encode, heads = _encoder(pipe, False), universe_of(pipe).heads
    config = HuntConfig(mode=mode, guidance_scale=0.0, batch=5)
    pair, other, own = Pair("x", 1), Pair("y", 2), (heads[3],)
    # Alone, beside others of its pair, and last among deeper and shallower ones of another.
    batches = [
        [(pair, own)],
        [(pair, own), (pair, (heads[4],)), (pair, (heads[2], heads[-1]))],
        [(other, (heads[-1],)), (other, (heads[0],)), (other, ()), (pair, own)],
    ]

    def drawn(config):
        sampler = PipelineSampler(pipe, config, CALL, encode=encode, output_type="latent")
        found = []
        for batch in batches:
            pairs, sets = zip(*batch, strict=True)
            found.append(sampler.sample(pairs, sets)[batch.index((pair, own))])
        sampler.close()
        return found, sampler.candidates

    found, counts = drawn(config)
    assert all(torch.equal(found[0], each) for each in found[1:])
    loose, fewer = drawn(replace(config, steady=False))
    assert not all(torch.equal(loose[0], each) for each in loose[1:])
    assert fewer.block_rows < counts.block_rows  # rows that fill a batch up are counted
    with pytest.raises(ValueError, match="6 pictures in one batch of 5"):
        PipelineSampler(pipe, config, CALL, encode=encode).sample([pair] * 6, [own] * 6)


class _Fine:
    """Reads the last bits of a picture, and has bounds."""

    name, version, bounds = "fine", "1", (0.0, 1.0)

    def score(self, images, prompts):
        return [0.5 + 0.5 * float(torch.sin(30 * image.double().sum())) for image in images]


@pytest.mark.parametrize("steady", [True, False])
def test_a_search_that_leaves_out_sees_the_pictures_of_one_that_does_not(steady, rows_decide_the_rounding):
    pipe, call = sd3_pipeline("sd3"), {**CALL, "num_inference_steps": 2}
    pairs, encode = [Pair("x", seed) for seed in range(7)], _encoder(pipe, False)
    full, pruned = (
        hunt(
            pipe,
            pairs,
            Goal((_Fine(),)),
            HuntConfig(rounds=2, top=1, u=1.0, mode="prefix", batch=4, steady=steady, prune=prune),
            call=call,
            encode=encode,
            output_type="latent",
        )
        for prune in (False, True)
    )
    values = [
        {
            (entry["round"], each["head"]): each["mean"]
            for entry in found.rounds
            for each in entry["candidates"]
        }
        for found in (full, pruned)
    ]
    scored = {key for key, mean in values[1].items() if mean is not None}
    assert len(scored) < len(values[0])
    same = all(values[1][key] == values[0][key] for key in scored)
    assert same == steady  # to the bit; without steady batches the planted kernel shows
    if steady:
        assert full.chosen == pruned.chosen


def test_rows_that_start_apart_are_noticed():
    pipe = sd3_pipeline("sd3")
    embeds = {name: value.repeat(2, 1, 1) if value.ndim == 3 else value.repeat(2, 1) for name, value in
              prompts(pipe).items() if not name.startswith("negative")}  # fmt: skip
    embeds["prompt_embeds"][1] += 1
    config = HuntConfig(steady=False)
    sampler = PipelineSampler(pipe, config, CALL, encode=lambda prompt: embeds, output_type="latent")
    with pytest.raises(RuntimeError, match="start from different values"):
        sampler.sample([Pair("x", 0)] * 2, [(Head(0, 0),), (Head(0, 1),)])
    sampler.close()


class _Nearness:
    """Rewards the picture that a planted head makes."""

    name, version = "nearness", "1"

    def __init__(self, targets):
        self._targets = targets

    def score(self, images, prompts):
        return [
            -float((image - self._targets[prompt]).square().mean())
            for image, prompt in zip(images, prompts, strict=True)
        ]


@pytest.mark.parametrize("planted", [Head(1, 1), Head(0, 1, "attn2")])
def test_planted_head_is_found_first_on_a_model(planted, tmp_path):
    pipe, config = sd3_pipeline("sd3.5"), HuntConfig(rounds=2, top=1, batch=7)
    encode, pairs = _encoder(pipe, False), [Pair("one", 0), Pair("two", 1)]
    targets = {pair.prompt: _loop(pipe, encode, pair, [(planted,)], config)[0] for pair in pairs}
    headset = hunt(
        pipe,
        pairs,
        Goal((_Nearness(targets),)),
        config,
        call=CALL,
        model={"id": "tiny", "revision": "0"},
        log=str(tmp_path),
        encode=encode,
        output_type="latent",
    )
    assert headset.heads[0] == planted
    assert headset.rounds[0]["candidates"][headset_index(headset, planted)]["mean"] == pytest.approx(
        0, abs=1e-6
    )
    assert (
        headset.check(universe_of(pipe).signature).sampling["scheduler"]["class"]
        == "FlowMatchEulerDiscreteScheduler"
    )
    with diffctrl.apply(pipe, SoftPAGAttnProcessor(headset.first(1), u=1.0)):
        pass


def headset_index(headset, head):
    return [each["head"] for each in headset.rounds[0]["candidates"]].index(str(head))


def test_a_log_needs_to_know_the_weights(tmp_path):
    pipe = sd3_pipeline("sd3")
    with pytest.raises(ValueError, match="revision"):
        hunt(pipe, [Pair("x", 0)], Goal((_Nearness({}),)), call=CALL, log=str(tmp_path))


def test_pictures_of_a_whole_pipeline_are_scored_in_memory():
    call = {name: value for name, value in tiny.CALL.items() if name != "guidance_scale"}
    pairs = [Pair("a red star", 0)]
    goal = Goal((objectives.SharpnessObjective(),))
    headset = hunt(tiny.sd3_pipeline(), pairs, goal, HuntConfig(top=1), call=call)
    assert len(headset) == 1
    picture = report.heat_map(headset)
    assert picture.width > 100
    (row,) = report.rows(headset)
    assert row.head == str(headset.heads[0])
    assert row.difference == pytest.approx(row.score - headset.rounds[0]["current"]["mean"])
    grid = report.sample_grid(["a", "b"], [("a prompt " * 40, [Image.new("RGB", (32, 32))] * 2)])
    assert grid.width > grid.height


def test_sharpness_prefers_edges():
    flat = torch.full((1, 3, 16, 16), 0.5)
    edges = torch.from_numpy(np.indices((16, 16)).sum(0) % 2).float().expand(1, 3, 16, 16)
    low, high = objectives.SharpnessObjective().score(torch.cat([flat, edges]), ["", ""])
    assert low < high


def test_judge_and_style_read_the_world():
    from diffctrl.zoo import worlds

    scenes = worlds.sample(24, seed=3, world="shapes", objects=1)
    uniforms = torch.rand(24, worlds.CAPTION_UNIFORMS, generator=torch.Generator().manual_seed(0))
    captions = worlds.to_text(worlds.caption_words(scenes, uniforms))
    images, _ = worlds.render(scenes)
    right = objectives.JudgeObjective().score(images, captions)
    wrong = objectives.JudgeObjective().score(images, captions[1:] + captions[:1])
    assert sum(right) > 0.9 * 24
    assert sum(right) > sum(wrong) + 3
    truths = [facts.style for facts in worlds.truth(scenes)]
    found = objectives.find("style", "shaded").score(images, captions)
    agreed = [(style == "shaded") == bool(score) for style, score in zip(truths, found, strict=True)]
    assert sum(agreed) > 20


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny random CLIP, saved as a user's folder would be."""
    from safetensors.torch import save_file
    from transformers import CLIPConfig, CLIPModel

    from diffctrl.zoo.tokenizers import clip_tokenizer

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = clip_tokenizer(("a", "red", "star"))
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 32, "bos_token_id": 0}
    text |= {"eos_token_id": 1, "pad_token_id": 1}
    vision = {**tower, "image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    head = {"layers.0.weight": torch.randn(4, 8), "layers.0.bias": torch.zeros(4)}
    head |= {"layers.2.weight": torch.randn(1, 4), "layers.2.bias": torch.zeros(1)}
    save_file(head, folder / "aesthetic.safetensors")
    return folder


def test_learned_scorers_read_a_folder(clip_folder):
    images, texts = torch.rand(3, 3, 40, 56), ["a red star", "a star", "red"]
    clip = load_learned("clip", str(clip_folder), "cpu")
    pick = load_learned("pickscore", str(clip_folder), "cpu")
    aesthetic = load_learned("aesthetic", str(clip_folder), "cpu")
    first = clip.score(images, texts)
    assert len(first) == 3
    assert first[1] == pytest.approx(clip.score(images[1:2], texts[1:2])[0], abs=1e-3)
    scale = clip._model.logit_scale.exp().item() / 100
    assert pick.score(images, texts) == pytest.approx([scale * value for value in first], rel=1e-4)
    assert len(set(aesthetic.score(images, texts))) == 3
    assert clip.version == pick.version != ""


def test_learned_scorers_say_what_they_miss(tmp_path):
    with pytest.raises(ValueError, match=r"needs config.json and aesthetic.safetensors"):
        load_learned("aesthetic", str(tmp_path), "cpu")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match="holds no CLIP model"):
        load_learned("clip", str(tmp_path), "cpu")
