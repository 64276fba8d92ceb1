"""Grounding with the real pipelines of four families, tiny and random (rows 3-8, 17-21 of section 8)."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from diffctrl.pipelines import StableDiffusion3RefAMPipeline
from diffctrl.pipelines.refam_input import clip_length, fitted_size, middle_frame_of, pixels_of
from diffctrl.processors import RefAMAttnProcessor, SoftPAGAttnProcessor
from diffctrl.refam import RefAMConfig
from diffctrl.refam.locate import centre, peak, spatial_bias
from diffctrl.refam.scoring import unsettled
from tests.helpers import example, run, shared
from tests.refam.models import PIPELINES, SIZES, flux, mochi, picture, sd3, wan

PHRASE = "the red star left of a blue ring"
NAMES = ("sd3", "flux", "wan", "mochi")


@pytest.mark.parametrize("name", NAMES)
def test_every_family_grounds_pictures_of_any_size(name):
    pipe = PIPELINES[name]()
    found = pipe(picture(), PHRASE, size=SIZES[name])
    rows, columns = (side // pipe.reader.multiple for side in SIZES[name])
    assert found.heat.shape == (rows, columns)
    assert found.mask.shape == (30, 50)
    assert found.size == (30, 50)
    # The middle of the strongest token, not the peak of an enlarged map.
    assert found.point == centre(*peak(found.heat), (rows, columns), (30, 50))
    assert found.mask[int(found.point[1]), int(found.point[0])]
    left, top, right, bottom = found.box
    assert found.mask[top:bottom, left:right].sum() == found.mask.sum()
    assert list(found.word_maps) == ["the", "red", "star", "left", "of", "a", "blue", "ring"]
    # The sum over the kept columns is the sum of their words' maps, where a word is one piece.
    kept = {token.word for token in found.table.tokens if token.kept}
    assert kept == {"red", "star"}
    whole = found.word_maps["red"] + found.word_maps["star"]
    torch.testing.assert_close(found.heat, whole)


@pytest.mark.parametrize("name", NAMES)
def test_a_result_does_not_depend_on_its_batch(name):
    pipe = PIPELINES[name]()
    pictures = [picture(seed) for seed in range(2)]
    pairs = [(pictures[0], PHRASE), (pictures[1], PHRASE), (pictures[1], "the green one")]
    together = pipe.ground(pairs, size=SIZES[name], batch_size=3)
    for pair, found in zip(pairs, together, strict=True):
        alone = pipe(*pair, size=SIZES[name])
        torch.testing.assert_close(found.heat, alone.heat, rtol=1e-4, atol=1e-7)
        assert found.point == alone.point
    assert not torch.allclose(together[0].heat, together[1].heat)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_behind_the_last_that_is_read_do_not_run(name):
    pipe, ran = PIPELINES[name](), []
    _, model = pipe.reader.denoiser(0.5)
    blocks = getattr(model, "blocks", None) or model.transformer_blocks
    hooks = [
        block.register_forward_pre_hook(lambda *_, at=at: ran.append(at)) for at, block in enumerate(blocks)
    ]
    try:
        found = pipe(picture(), PHRASE, size=SIZES[name], blocks="0-0")
        assert ran == [0]
        ran.clear()
        blocks[-1]._hf_hook = None  # as under accelerate's offloading: a forward runs to its end
        whole = pipe(picture(), PHRASE, size=SIZES[name], blocks="0-0")
        assert ran == list(range(len(blocks)))
    finally:
        for hook in hooks:
            hook.remove()
        del blocks[-1]._hf_hook
    assert torch.equal(found.heat, whole.heat)
    assert found.point == whole.point


def test_a_weighted_sum_of_values_would_give_the_same_weights():
    """The columns are those of the model's own softmax: with t2i, i2t and the masses read at once."""
    model = shared("sd3")
    import diffctrl

    processor = RefAMAttnProcessor(blocks="1", direction="t2i")
    captured = {}

    def keep(module, arguments, keywords):
        captured.update(keywords)

    attn = model.transformer_blocks[1].attn
    handle = attn.register_forward_pre_hook(keep, with_kwargs=True)
    with diffctrl.apply(model, processor, batch_layout="cond"):
        run(model, example("sd3"))
    handle.remove()
    image, text = captured["hidden_states"], captured["encoder_hidden_states"]
    queries = torch.cat([attn.to_q(image), attn.add_q_proj(text)], 1).unflatten(-1, (attn.heads, -1))
    keys = torch.cat([attn.to_k(image), attn.add_k_proj(text)], 1).unflatten(-1, (attn.heads, -1))
    scores = torch.einsum("bihd,bjhd->bhij", queries, keys) / queries.shape[-1] ** 0.5
    whole = scores.softmax(-1).mean(1)
    count = image.shape[1]
    for row, found in enumerate(processor.weights()):
        torch.testing.assert_close(found.i2t[0].T, whole[row, :count, count:], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.t2i[0], whole[row, count:, :count], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            found.text_mass[0], whole[row, count:, count:].mean(0), rtol=1e-4, atol=1e-6
        )
    assert found.depth == (0.5,)


def test_flux_reads_double_and_single_blocks():
    import diffctrl

    processor = RefAMAttnProcessor(blocks="0-3")
    with diffctrl.apply(shared("flux"), processor, batch_layout="cond"):
        run(shared("flux"), example("flux"))
    found = processor.weights()[0]
    assert found.i2t.shape == (4, 7, 35)
    assert found.blocks == (0, 1, 2, 3)


def _rows(pipe, phrase=PHRASE, **settings):
    return pipe.reader.rows(phrase, RefAMConfig(**settings))


@pytest.mark.parametrize("name", NAMES)
def test_separate_magnets_leave_the_expression_as_it_is(name):
    pipe = PIPELINES[name]()
    plain, magnets = _rows(pipe, magnet_encoding="none"), _rows(pipe)
    places = [token.index for token in magnets.table.tokens if token.kind != "magnet"]
    assert torch.equal(magnets.embeds[places], plain.embeds)
    assert len(magnets.table) == len(magnets.embeds)
    joint = _rows(pipe, magnet_encoding="joint")
    joined = [token.index for token in joint.table.tokens if token.kind in ("content", "stop", "outside")]
    first = [t.index for t in plain.table.tokens if t.kind in ("content", "stop", "outside")]
    assert len(joined) == len(first)
    assert not torch.allclose(joint.embeds[joined], plain.embeds[first])  # its encoder looks both ways


def test_magnets_begin_with_no_begin_token_and_keep_their_end():
    pieces = [(t.piece, t.encoder) for t in _rows(sd3()).table.tokens if t.word == "pink"]
    assert pieces == [("pink</w>", "clip"), ("<|endoftext|>", "clip"), ("pink", "t5"), ("</s>", "t5")]
    magnets = [t.word for t in _rows(sd3(), "the pink ring").table.tokens if t.kind == "magnet"]
    assert "pink" not in magnets
    assert "purple" in magnets


@pytest.mark.parametrize("name", ["sd3", "flux", "wan"])
def test_padding_may_stay_or_go(name):
    pipe = PIPELINES[name]()
    dropped, kept = (
        pipe.weigh(
            [(picture(), PHRASE)], RefAMConfig(padding=padding, magnet_encoding="none"), size=SIZES[name]
        )[0]
        for padding in ("drop", "keep")
    )
    pads = list(kept.rows.table.columns("pad"))
    assert pads
    assert not dropped.rows.table.columns("pad")
    content = [list(each.rows.table.columns("content")) for each in (dropped, kept)]
    mass = [
        float(each.weights.i2t[:, columns].sum(1).mean())
        for each, columns in zip((dropped, kept), content, strict=True)
    ]
    assert float(kept.weights.i2t[:, pads].sum(1).mean()) > mass[1]  # padding takes what words would get
    assert mass[0] > mass[1]


def test_flux_does_not_mind_the_order_of_its_text():
    model, inputs = shared("flux"), example("flux")
    order = torch.tensor([3, 0, 6, 1, 2, 5, 4])
    moved = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"][:, order]}
    torch.testing.assert_close(run(model, moved), run(model, inputs), rtol=0, atol=1e-5)


def test_noise_follows_the_models_own_law():
    latents = torch.randn(2, 3, 3)
    config = RefAMConfig(sigma=0.25, seed=5)
    noised = sd3().reader.noised(latents, config, 0)
    noise = (noised - 0.75 * latents) / 0.25
    wanted = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(noise, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.equal(noised, sd3().reader.noised(latents, config, 1))
    # What others call the eighth step from the end of 28 at shift 3 is this noise level.
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(28)
    assert float(scheduler.sigmas[-9]) == pytest.approx(0.5151, abs=1e-4)


def test_noise_draws_are_averaged():
    pairs, config = [(picture(), PHRASE)], RefAMConfig(seed=3)
    both = sd3().weigh(pairs, replace(config, n_noise=2))[0].weights
    first, second = (sd3().weigh(pairs, replace(config, seed=seed))[0].weights for seed in (3, 4))
    torch.testing.assert_close(both.i2t, (first.i2t + second.i2t) / 2)


@pytest.mark.parametrize("name", NAMES)
def test_latents_are_those_that_the_pipeline_decodes(name):
    pipe = PIPELINES[name]()
    pixels = picture(1, SIZES[name])[None] * 2 - 1
    with torch.no_grad():
        latents = pipe.reader.encode(pixels)
        vae, config = pipe.vae, pipe.vae.config
        video = name in ("wan", "mochi")
        wanted = vae.encode(pixels.transpose(0, 1)[None] if video else pixels).latent_dist.mode()[0]
    if video:
        mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
        # Wan decodes z * std + mean, Mochi z * std / scale + mean.
        back = latents * std / (config.scaling_factor if name == "mochi" else 1.0) + mean
    else:
        back = latents / config.scaling_factor + config.shift_factor
    torch.testing.assert_close(back, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "told"), [("sd3", 300.0), ("flux", 0.3), ("wan", 300.0), ("mochi", 700.0)])
def test_the_model_is_told_the_noise_level_and_the_guidance(name, told):
    """Mochi counts noise from the other end; of these FLUX.1-dev alone takes a guidance scale."""
    pipe, seen = PIPELINES[name](), []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, arguments, keywords: seen.append(keywords), with_kwargs=True
    )
    pipe(picture(), PHRASE, size=SIZES[name], sigma=0.3, guidance=2.5)
    handle.remove()
    (call,) = seen
    assert call["timestep"].tolist() == pytest.approx([told])
    guidance = call.get("guidance")
    assert (guidance is None) == (name != "flux")
    assert guidance is None or guidance.tolist() == [2.5]


# --- what users may ask -------------------------------------------------------------------------------------


def test_several_expressions_and_settings_of_a_call():
    found = sd3()(picture(), ["the red star", "the blue ring"], mask="mean", sigma=0.3)
    assert [each.expression for each in found] == ["the red star", "the blue ring"]
    assert all(each.config.mask == "mean" and each.config.sigma == 0.3 for each in found)
    with pytest.raises(ValueError, match="no option 'sigmas'"):
        sd3()(picture(), PHRASE, sigmas=1)


def test_pictures_of_any_kind_are_the_same_picture():
    array = (picture().permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    image = Image.fromarray(array)
    exact = torch.from_numpy(array).permute(2, 0, 1) / 255
    for given in (image, array, exact):
        torch.testing.assert_close(pixels_of(given), exact[None].float())
    torch.testing.assert_close(pixels_of([image, exact]), torch.stack([exact, exact]).float())
    assert sd3()(image, PHRASE).point == sd3()(exact, PHRASE).point
    for wrong, says in (
        (exact[0], "no picture"),
        ("photo.png", "no picture"),
        (exact * 3, "outside of"),
        ([], "no frames"),
        ([image, image.resize((5, 5))], "one size"),
    ):
        with pytest.raises((TypeError, ValueError), match=says):
            pixels_of(wrong)


def test_grey_of_16_bits_is_scaled_and_what_has_no_white_is_refused():
    grey = np.array([[0, 128, 200], [255, 1, 77]], dtype=np.uint8)
    expected = pixels_of(Image.fromarray(grey))
    deep = grey.astype(np.uint16) * 257
    for mode, data in (("I;16", deep), ("I;16B", deep.byteswap())):
        torch.testing.assert_close(pixels_of(Image.frombytes(mode, (3, 2), data.tobytes())), expected)
    for mode in ("I", "F"):
        with pytest.raises(ValueError, match=f"mode '{mode}' does not say"):
            pixels_of(Image.fromarray(grey).convert(mode))


def test_model_sizes_keep_the_proportions():
    reader = sd3().reader  # 32 px of a side, 64 at most, tokens of 8
    assert fitted_size(500, 500, reader) == (32, 32)
    assert fitted_size(200, 400, reader) == (24, 48)
    assert fitted_size(10, 5000, reader) == (8, 64)
    with pytest.raises(ValueError, match="multiples of 8, up to 64"):
        sd3()(picture(), PHRASE, size=(30, 32))


def test_a_word_that_comes_twice_has_two_maps():
    found = sd3()(picture(), "the red star left of a red ring", noun_phrase="off")
    assert list(found.word_maps) == ["the", "red", "star", "left", "of", "a", "red#2", "ring"]
    assert not torch.allclose(found.word_maps["red"], found.word_maps["red#2"])
    whole = sum(found.word_maps[name] for name in ("red", "star", "left", "red#2", "ring"))
    torch.testing.assert_close(found.heat, whole)


def test_an_expression_of_stop_words_alone_is_read_and_said():
    found = sd3()(picture(), "the one on it")
    assert "empty_filter" in found.flags
    assert [token.piece for token in found.table.tokens if token.kept]
    assert torch.isfinite(found.heat).all()
    assert found.heat.max() > found.heat.min() > 0


@pytest.mark.parametrize("phrase", ["", " ", None])
def test_no_expression(phrase):
    with pytest.raises(ValueError, match="is no expression"):
        sd3()(picture(), phrase)
    assert sd3().ground([]) == []


def test_expressions_beyond_the_tokenizer_are_refused():
    with pytest.raises(ValueError, match="Shorten"):
        sd3()(picture(), "red star " * 30)


def test_an_expression_that_clip_cuts_is_read_by_t5():
    found = flux()(picture(), "the red star and " * 3 + "a ring", size=SIZES["flux"])
    assert found.point


def test_text_encoders_are_named():
    assert {t.encoder for t in sd3()(picture(), PHRASE).table.tokens if t.kept} == {"t5"}
    assert {t.encoder for t in sd3()(picture(), PHRASE, encoder="clip").table.tokens if t.kept} == {"clip"}
    with pytest.raises(ValueError, match="reads text with t5"):
        flux()(picture(), PHRASE, encoder="clip", size=SIZES["flux"])


def test_word_queries_where_there_are_none():
    with pytest.raises(ValueError, match="has none"):
        wan()(picture(), PHRASE, size=SIZES["wan"], direction="t2i")
    found = sd3()(picture(), PHRASE, direction="t2i")
    assert not torch.allclose(found.heat, sd3()(picture(), PHRASE).heat)


def test_memory_is_bounded_before_the_forward():
    import diffctrl

    processor = RefAMAttnProcessor(max_bytes=1000)
    with (
        diffctrl.apply(shared("sd3"), processor, batch_layout="cond"),
        pytest.raises(ValueError, match="max_bytes"),
    ):
        run(shared("sd3"), example("sd3"))


def test_directions_weigh_the_map_and_relations_do_not():
    pairs = [("the star on the left", ["left"]), (PHRASE, []), ("the star above the ring", [])]
    for phrase, wanted in pairs:
        plain, biased = (sd3()(picture(), phrase, spatial_bias=on).heat for on in (False, True))
        torch.testing.assert_close(biased, plain * spatial_bias(wanted, *plain.shape))


def test_processors_come_back_after_an_error():
    """An error of the settings, and one in the middle of the forward; installed controls come back too."""
    pipe = StableDiffusion3RefAMPipeline(**sd3().components)
    blocks = pipe.transformer.transformer_blocks
    before = [block.attn.processor for block in blocks]
    softpag = SoftPAGAttnProcessor("L0", u=1.0)

    def fail(*_):
        raise FloatingPointError("planted")

    for installed in (None, softpag):
        pipe.set_attn_processor(installed)
        hook = blocks[1].register_forward_pre_hook(fail)
        try:
            with pytest.raises(ValueError, match="block 9"):
                pipe(picture(), PHRASE, blocks="9")
            with pytest.raises(FloatingPointError):
                pipe(picture(), PHRASE)
            assert (pipe.control.controls if pipe.control else ()) == ((softpag,) if installed else ())
        finally:
            hook.remove()
            pipe.set_attn_processor(None)
        assert all(block.attn.processor is own for block, own in zip(blocks, before, strict=True))


def test_a_pipeline_may_change_its_dtype_between_calls():
    """Where the model runs, and in what, is looked up once a call and not once for all."""
    pipe = StableDiffusion3RefAMPipeline(**copy.deepcopy(sd3().components))
    seen = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["hidden_states"].dtype), with_kwargs=True
    )
    for dtype in (torch.float32, torch.bfloat16):
        pipe.to(dtype)
        assert pipe(picture(), PHRASE).heat.isfinite().all()
    assert seen == [torch.float32, torch.bfloat16]


def test_installed_controls_rest_while_grounding():
    pipe = StableDiffusion3RefAMPipeline(**sd3().components)
    wanted = pipe(picture(), PHRASE)
    pipe.set_attn_processor(SoftPAGAttnProcessor("L0", u=1.0))
    try:
        assert torch.equal(pipe(picture(), PHRASE).heat, wanted.heat)
        assert pipe.control is not None
    finally:
        pipe.set_attn_processor(None)


def test_redirect_adds_magnets_where_content_is_a_sink():
    # In a random model everything is uniform: with low bars some word is a sink.
    settings = {"tau": 1.0, "least_even": 0.5, "least_depth": 0.0, "blocks": "0-1", "encoder": "t5"}
    filtered = sd3()(picture(), PHRASE, sinks="off", **settings)
    found = sd3()(picture(), PHRASE, sinks="redirect", **settings)
    more = [t.word for t in found.table.tokens if t.kind == "magnet"]
    usual = [t.word for t in filtered.table.tokens if t.kind == "magnet"]
    assert len(more) > len(usual)
    assert "sink_unsettled" in found.flags
    assert {t.word for t in found.table.tokens if t.kept} == {"red", "star"}  # nothing is left out


def test_a_caption_feeds_the_pooled_vector_and_may_stand_before():
    plain, captioned = _rows(sd3()), _rows(sd3(), caption="a picture of stars")
    assert torch.equal(plain.embeds, captioned.embeds)
    assert not torch.equal(plain.pooled, captioned.pooled)
    before = _rows(sd3(), caption="a flat picture", caption_as_prefix=True, magnet_encoding="none")
    kinds = [t.kind for t in before.table.tokens if t.encoder == "t5"]
    assert kinds[:3] == ["context"] * 3
    assert kinds.count("content") == 2
    assert "caption" in _rows(wan(), caption="a picture").flags


def test_concluding_from_read_attention_equals_grounding():
    pipe, pairs = sd3(), [(picture(), PHRASE)]
    read = pipe.weigh(pairs, RefAMConfig(blocks="0-1"))[0]
    for settings in (
        {"blocks": "0", "mask": "otsu"},
        {"blocks": "1", "noun_phrase": "off"},
        {"blocks": "0-1", "stop_words": False, "sinks": "off"},
    ):
        config = RefAMConfig(**settings)
        torch.testing.assert_close(pipe.conclude(read, config).heat, pipe(*pairs[0], config=config).heat)
    assert unsettled(read and _scored(pipe, read)) == ()


def _scored(pipe, read):
    from diffctrl.refam import score

    return score(read.weights, read.rows.table, RefAMConfig(sinks="off"), encoder="t5")


# --- video --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "length", "latent"), [("wan", 5, 3), ("mochi", 7, 2)])
def test_videos(name, length, latent):
    pipe = PIPELINES[name]()
    video = torch.stack([picture(seed) for seed in range(8)])
    found = pipe(video, PHRASE, size=SIZES[name])
    assert found.frame_maps.shape == (latent, 3, 5)
    assert found.track.shape == (length, 30, 50)
    assert found.frame == 0
    assert torch.equal(found.heat, found.frame_maps[0])
    assert torch.equal(found.track[0], found.mask)
    best = pipe(video, PHRASE, size=SIZES[name], anchor="best")
    from diffctrl.refam.locate import best_frame

    place = best_frame(best.frame_maps)
    assert torch.equal(best.heat, best.frame_maps[place])
    assert best.frame == middle_frame_of(place, pipe.reader.frame_step)
    short = pipe(video, PHRASE, size=SIZES[name], frames=1)
    assert short.frame_maps.shape[0] == 1


def test_frames_that_latents_hold():
    reader = wan().reader
    assert [clip_length(n, reader, None) for n in (1, 2, 5, 8, 99)] == [1, 1, 5, 5, 13]
    assert clip_length(99, reader, 12) == 9
    assert clip_length(99, mochi().reader, None) == 37
    assert [middle_frame_of(n, 4) for n in (0, 1, 2)] == [0, 3, 7]
    with pytest.raises(ValueError, match="single pictures"):
        sd3()(torch.stack([picture()] * 3), PHRASE)


def test_wan_of_two_models_reads_with_the_one_of_the_noise_level():
    from diffctrl.pipelines import WanRefAMPipeline
    from tests.helpers import build

    pipe = WanRefAMPipeline(**wan().components | {"transformer_2": build("wan", seed=1)}, boundary_ratio=0.6)
    assert pipe.reader.denoiser(0.5)[0] == "transformer_2"
    assert pipe.reader.denoiser(0.7)[0] == "transformer"
    found = pipe(picture(), PHRASE, size=SIZES["wan"], sigma=0.5)
    assert not torch.allclose(found.heat, wan()(picture(), PHRASE, size=SIZES["wan"], sigma=0.5).heat)


# --- while drawing ------------------------------------------------------------------------------------------

DRAW = {"num_inference_steps": 2, "height": 32, "width": 32, "max_sequence_length": 32}


def _draw(pipe, *words, seed=0, **call):
    return pipe.draw(*words, generator=torch.Generator().manual_seed(seed), **{**DRAW, **call})


def test_maps_of_what_is_being_drawn():
    pipe = sd3()
    drawn = _draw(pipe, "a red star left of a blue ring", "blue ring", guidance_scale=3.0)
    stock = pipe.stock_class.__call__(
        pipe,
        "a red star left of a blue ring",
        generator=torch.Generator().manual_seed(0),
        guidance_scale=3.0,
        **DRAW,
    )
    assert np.array_equal(np.asarray(drawn.output.images[0]), np.asarray(stock.images[0]))
    found = drawn.grounding
    assert found.size == (32, 32)
    assert {t.word for t in found.table.tokens if t.kept} == {"blue", "ring"}
    assert list(found.word_maps) == ["blue", "ring"]
    assert not found.table.columns("magnet")
    with pytest.raises(ValueError, match="word for word"):
        _draw(pipe, "a red star", "a blue star")


def test_maps_are_of_the_positive_prompt():
    one = _draw(sd3(), "a red star", num_inference_steps=1, guidance_scale=1.0)
    for negative in ("a blue ring", "a green cross on a white background"):
        both = _draw(sd3(), "a red star", num_inference_steps=1, guidance_scale=4.0, negative_prompt=negative)
        torch.testing.assert_close(both.grounding.heat, one.grounding.heat, rtol=1e-4, atol=1e-6)


def test_maps_of_drawn_videos():
    drawn = wan().draw(
        "a red star", num_inference_steps=1, height=16, width=32, num_frames=5, guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert drawn.grounding.frame_maps.shape == (3, 4, 8)
    assert drawn.grounding.size == (16, 32)


def test_what_was_weighed_is_read_again_without_the_autoencoder(monkeypatch):
    pipe, picture = sd3(), torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(3))
    config = RefAMConfig(encoder="clip", blocks="0-1")
    other = replace(config, sigma=0.7)
    (first,) = pipe.weigh([(picture, "a red star")], config)
    (wanted,) = pipe.weigh([(picture, "a red star")], other)
    monkeypatch.setattr(pipe.reader, "encode", None)
    (again,) = pipe.weigh([(first, "a red star")], other)
    assert torch.equal(again.weights.i2t, wanted.weights.i2t)
    assert not torch.equal(again.weights.i2t, first.weights.i2t)
    assert torch.equal(pipe.conclude(again, other).heat, pipe.conclude(wanted, other).heat)
