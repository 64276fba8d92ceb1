"""The pipelines: stock when dense, else the sampler under SparseD by hand; loading, saving, breaking off."""

import inspect
import json
from dataclasses import fields

import pytest
import torch

import diffctrl
from diffctrl.control.text import state_of
from diffctrl.dlm import (
    DreamSampling,
    GenerationInterrupted,
    LLaDASampler,
    LLaDASampling,
    Prompts,
    SpecialTokens,
    encode,
)
from diffctrl.errors import BadRequestError
from diffctrl.pipelines import DreamSparseDPipeline, LLaDASparseDPipeline
from diffctrl.processors import SparseDAttnProcessor, SparseDConfig
from tests.dlm import layouts

# Small blocks, and sparse although it does not pay at this size.
CONFIG = SparseDConfig(select=0.3, block_size=4, auto_dense=False)
CALL = {"gen_length": 16, "steps": 10, "block_length": 8}
PROMPTS = ["the red cup is on a plate . the cup is red .", "the plate"]


@pytest.fixture(scope="module")
def pipe(llada_folder):
    return LLaDASparseDPipeline.from_pretrained(llada_folder, sparsed=CONFIG)


@pytest.fixture(scope="module")
def dream_pipe(dream_folder):
    return DreamSparseDPipeline.from_pretrained(dream_folder, sparsed=CONFIG)


def _by_hand(pipe, prompts, control=None, **sampling):
    sampler = LLaDASampler(LLaDASampling(**{**CALL, **sampling}), pipe.special)
    rows = encode(pipe.tokenizer, prompts)
    return sampler.generate(pipe.model, Prompts.of(rows, pipe.special.pad), control=control)


def test_dense_is_the_sampler_on_the_stock_model(pipe):
    before = pipe.model.config._attn_implementation
    dense = pipe(PROMPTS, sparsed=False, **CALL)
    assert torch.equal(dense.sequences, _by_hand(pipe, PROMPTS).sequences)
    assert dense.stats == {"steps": 10, "forwards": 10, "control": None}
    assert pipe.model.config._attn_implementation == before
    assert state_of(pipe.model) is None


def test_sparse_is_apply_by_hand(pipe):
    sparse = pipe(PROMPTS, **CALL)
    with diffctrl.apply(pipe.model, SparseDAttnProcessor(CONFIG)) as control:
        wanted = _by_hand(pipe, PROMPTS, control)
        stats = control.controller.stats()
    assert torch.equal(sparse.sequences, wanted.sequences)
    assert sparse.orders == wanted.orders()
    assert sparse.stats["control"]["density"] == stats["density"] < 1
    assert not torch.equal(sparse.sequences, pipe(PROMPTS, sparsed=False, **CALL).sequences)
    assert state_of(pipe.model) is None


@pytest.mark.parametrize("neutral", [{"select": 1.0}, {"skip": 1.0}])
@pytest.mark.parametrize("call", [{}, {"cfg_scale": 0.7}, {"temperature": 1.0, "seed": 3}])
def test_neutral_settings_are_dense(pipe, neutral, call):
    config = SparseDConfig(block_size=4, **neutral)
    for prompt in (PROMPTS, PROMPTS[0]):
        dense = pipe(prompt, sparsed=False, **CALL, **call)
        assert torch.equal(pipe(prompt, sparsed=config, **CALL, **call).sequences, dense.sequences)


@pytest.mark.parametrize("call", [{}, {"cfg_scale": 0.7}, {"temperature": 0.8, "seed": 5}])
def test_a_sparse_row_is_the_row_alone(pipe, call):
    together = pipe(PROMPTS, **CALL, **call)
    for index, prompt in enumerate(PROMPTS):
        alone = pipe(prompt, **CALL, **{**call, **({"seed": 5 + index} if "seed" in call else {})})
        assert alone.texts[0] == together.texts[index]
        assert alone.orders[0] == together.orders[index]


def test_dream(dream_pipe):
    call = {"gen_length": 12, "steps": 8, "alg": "entropy"}
    dense, sparse = dream_pipe(PROMPTS, sparsed=False, **call), dream_pipe(PROMPTS, **call)
    assert sparse.finished
    assert sparse.stats["control"]["density"] < 1
    assert not torch.equal(dense.sequences, sparse.sequences)
    neutral = SparseDConfig(select=1.0, block_size=4)
    assert torch.equal(dream_pipe(PROMPTS, sparsed=neutral, **call).sequences, dense.sequences)
    drawn = [
        dream_pipe(PROMPTS[0], seed=s, temperature=1.0, top_p=0.9, **call).sequences.tolist()
        for s in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_threshold_ends_the_dense_part_by_what_is_decided(pipe):
    found = pipe(PROMPTS, threshold=0.2, **CALL)
    assert found.finished
    assert found.stats["forwards"] < 16
    assert found.stats["control"]["density"] < 1


def test_every_way_to_pass_a_prompt(pipe):
    text = pipe("red cup", **CALL)
    chat = [{"role": "user", "content": "red cup"}]
    assert pipe(chat, **CALL).sequences.tolist() == text.sequences.tolist()
    assert pipe([chat], **CALL).sequences.tolist() == text.sequences.tolist()
    ids = [[4, 5, 6, 3, 9]]
    assert pipe(input_ids=ids, **CALL).sequences.tolist() == text.sequences.tolist()
    assert pipe(input_ids=torch.tensor(ids), **CALL).sequences.tolist() == text.sequences.tolist()
    plain = pipe("red cup", chat=False, **CALL)
    assert plain.sequences.shape[1] == 18
    blank = pipe(input_ids=[[4, 0, 6]], **CALL)
    assert blank.finished
    assert blank.sequences[0, 1] != 0


def test_installed_processors_and_those_from_outside(pipe):
    config = SparseDConfig(select=0.6, block_size=4, auto_dense=False)
    wanted = pipe(PROMPTS, sparsed=config, **CALL).sequences
    pipe.set_attn_processor(SparseDAttnProcessor(config))
    try:
        assert torch.equal(pipe(PROMPTS, **CALL).sequences, wanted)
        assert not torch.equal(pipe(PROMPTS, sparsed=False, **CALL).sequences, wanted)
        assert pipe.control is not None
    finally:
        pipe.set_attn_processor(None)
    with diffctrl.apply(pipe, SparseDAttnProcessor(config)) as control:
        assert torch.equal(pipe(PROMPTS, **CALL).sequences, wanted)
        assert control.stats()
        for other in (False, CONFIG):
            with pytest.raises(RuntimeError, match="remove"):
                pipe(PROMPTS, sparsed=other, **CALL)
    assert state_of(pipe.model) is None


def test_callbacks_see_each_step_and_may_end_the_call(pipe):
    seen = []

    def callback(pipe, step, block, tensors):
        seen.append((step, block, len(tensors["event"].tokens)))
        pipe._interrupt = step == 5

    found = pipe(PROMPTS, callback_on_step_end=callback, **CALL)
    assert not found.finished
    assert [step for step, _, _ in seen] == list(range(6))
    assert "░" in found.texts[0]
    assert pipe(PROMPTS[0], **CALL).finished  # the next call is not ended


def test_ctrl_c_leaves_a_text_and_a_stock_model(pipe):
    def callback(pipe, step, block, tensors):
        if step == 8:
            raise KeyboardInterrupt

    with pytest.raises(GenerationInterrupted) as caught:
        pipe(PROMPTS, callback_on_step_end=callback, **CALL)
    output = caught.value.output
    assert not output.finished
    assert len(output.texts) == 2
    assert output.stats["control"]["density"] < 1
    assert state_of(pipe.model) is None


def test_stop_words_cut_the_text_only(pipe):
    whole = pipe(PROMPTS[0], **CALL)
    word = whole.texts[0].split()[1]
    cut = pipe(PROMPTS[0], stop=word, **CALL)
    assert torch.equal(cut.sequences, whole.sequences)
    assert cut.texts[0] == whole.texts[0][: whole.texts[0].index(word)]


def test_it_can_be_printed(pipe):
    assert '"_class_name": "LLaDASparseDPipeline"' in repr(pipe)


def test_saved_and_loaded_again(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = LLaDASparseDPipeline.from_pretrained(tmp_path, sparsed=CONFIG)
    assert again.special == pipe.special
    assert torch.equal(again(PROMPTS, **CALL).sequences, pipe(PROMPTS, **CALL).sequences)
    settings = json.loads((tmp_path / "diffctrl.json").read_text())
    assert settings["call"] == {"gen_length": 128, "block_length": 32}
    settings["call"] = {"gen_length": 24, "steps": 6, "block_length": 12}
    (tmp_path / "diffctrl.json").write_text(json.dumps(settings))
    again = LLaDASparseDPipeline.from_pretrained(tmp_path)
    assert again("red cup").stats["forwards"] == 6
    assert again("red cup", gen_length=8).stats["forwards"] == 8
    with pytest.raises(BadRequestError, match="decodes as 'llada'"):
        DreamSparseDPipeline.from_pretrained(tmp_path)
    settings["call"] = {"length": 24}
    (tmp_path / "diffctrl.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"llada has no option 'length' \(did you mean"):
        LLaDASparseDPipeline.from_pretrained(tmp_path)


def test_the_parts_of_a_pipeline(pipe):
    assert set(pipe.components) == {"model", "tokenizer"}
    assert pipe.to("cpu") is pipe
    other = LLaDASparseDPipeline(**pipe.components)
    assert other.special == SpecialTokens(mask=0, pad=1, eos=1, eot=3)
    assert other.sparsed == SparseDConfig()
    with pytest.raises(ValueError, match="outside of the model's vocabulary of 24"):
        LLaDASparseDPipeline(**pipe.components, special=SpecialTokens(mask=24, pad=1))


@pytest.mark.parametrize(
    ("pipeline", "sampling"), [(LLaDASparseDPipeline, LLaDASampling), (DreamSparseDPipeline, DreamSampling)]
)
def test_calls_take_every_option_of_the_sampling(pipeline, sampling):
    taken = inspect.signature(pipeline.__call__).parameters
    assert {field.name for field in fields(sampling)} <= set(taken)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({}, "either prompt or input_ids"),
        ({"prompt": "a", "input_ids": [[4]]}, "either prompt or input_ids"),
        ({"prompt": "a", "seed": 1, "generator": torch.Generator()}, "either seed or generator"),
        ({"prompt": "a", "gen_length": 100, "block_length": 32}, "not a multiple"),
        ({"prompt": 5}, "a prompt is a text"),
        ({"input_ids": [[4, 24]]}, "outside of 0 to 23"),
        ({"input_ids": [[-1]]}, "outside of 0 to 23"),
    ],
)
def test_what_cannot_be_is_refused(pipe, call, says):
    with pytest.raises(ValueError, match=says):
        pipe(**call)


def test_texts_longer_than_the_model_was_trained_for_are_told(pipe, caplog):
    pipe("red cup", gen_length=64, steps=2, block_length=32)
    assert "69 tokens are more than the 64" in caplog.text


def test_embedded_models_of_another_kind_are_refused():
    with pytest.raises(BadRequestError, match="kind 'image', not of text"):
        LLaDASparseDPipeline.from_pretrained("shapes-sd3")


def test_plain_tokenizers_need_no_template(llada_folder, tmp_path):
    folder = layouts.write(tmp_path, layouts.LLADA, layouts.llada_weights(), template=False)
    plain = LLaDASparseDPipeline.from_pretrained(folder, sparsed=None)
    assert plain("red cup", **CALL).sequences[0, :2].tolist() == [5, 6]
    with pytest.raises(BadRequestError, match="no chat template"):
        plain([{"role": "user", "content": "red cup"}], **CALL)
