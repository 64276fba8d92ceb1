"""Original layouts load without remote code, strictly, and compute what they computed."""

import json
import re
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from diffctrl.dlm import Checkpoint, SpecialTokens, check_bidirectional
from diffctrl.errors import BadRequestError
from tests.dlm import layouts

TOKENS = torch.tensor([[5, 0, 3, 7, 2, 23, 1], [4, 4, 9, 0, 0, 11, 6]])


def _logits(model, **call):
    with torch.no_grad():
        return model(input_ids=TOKENS, **call).logits


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("layout", "weights", "forward"),
    [
        ("llada", layouts.llada_weights, layouts.llada_forward),
        ("dream", layouts.dream_weights, layouts.dream_forward),
    ],
)
def test_loaded_model_computes_the_original_forward(request, layout, weights, forward, implementation):
    folder = request.getfixturevalue(f"{layout}_folder")
    model = Checkpoint.open(folder).load(attn_implementation=implementation)
    wanted = forward(weights(), TOKENS)
    for mask in (None, torch.ones_like(TOKENS, dtype=torch.bool)):
        torch.testing.assert_close(_logits(model, attention_mask=mask), wanted, atol=2e-5, rtol=2e-5)
    assert model.config.use_cache is False
    assert not model.training


def test_what_the_folder_says_of_itself(llada_folder, dream_folder):
    llada, dream = Checkpoint.open(llada_folder), Checkpoint.open(dream_folder)
    assert (llada.sampler, dream.sampler) == ("llada", "dream")
    assert len(llada.weight_files) == 3
    special = llada.special(llada.tokenizer())
    assert special == SpecialTokens(mask=0, pad=1, eos=1, eot=3)


def test_a_saved_model_is_one_of_transformers_and_loads_again(llada, llada_folder, tmp_path):
    llada.save_pretrained(tmp_path)
    layouts.word_tokenizer().save_pretrained(tmp_path)
    assert "model.layers.0.mlp.down_proj.weight" in load_file(tmp_path / "model.safetensors")
    again = Checkpoint.open(tmp_path)
    assert again.architecture.layout == "transformers"
    assert again.sampler is None  # a Llama does not say how it was trained; diffctrl.json does
    assert again.special(again.tokenizer()).mask == 0
    assert torch.equal(_logits(again.load()), _logits(llada))
    (tmp_path / "diffctrl.json").write_text('{"sampler": "llada", "mask_token_id": 7}')
    again = Checkpoint.open(tmp_path)
    assert (again.sampler, again.special(None).mask) == ("llada", 7)


def test_tied_embeddings_need_no_head(tmp_path):
    weights = layouts.llada_weights()
    del weights["model.transformer.ff_out.weight"]
    folder = layouts.write(tmp_path, {**layouts.LLADA, "weight_tying": True}, weights)
    model = Checkpoint.open(folder).load()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    wanted = layouts.llada_forward(
        {**weights, "model.transformer.ff_out.weight": weights["model.transformer.wte.weight"]}, TOKENS
    )
    torch.testing.assert_close(_logits(model), wanted, atol=2e-5, rtol=2e-5)


def test_dtype_is_the_files_or_what_is_asked_for(llada_folder):
    checkpoint = Checkpoint.open(llada_folder)
    assert checkpoint.load().dtype == torch.float32
    assert checkpoint.load(torch.bfloat16).dtype == torch.bfloat16


NEEDED = """activation_type block_type d_model eos_token_id include_bias include_qkv_bias layer_norm_type
mask_token_id max_sequence_length mlp_hidden_size n_heads n_kv_heads n_layers rms_norm_eps rope rope_theta
weight_tying"""


@pytest.mark.parametrize("key", NEEDED.split())
def test_no_entry_has_a_default(tmp_path, key):
    config = {name: value for name, value in layouts.LLADA.items() if name != key}
    _refused(config, tmp_path, f"lacks {key}")


@pytest.mark.parametrize("key", ["rope_theta", "num_key_value_heads", "tie_word_embeddings", "mask_token_id"])
def test_no_entry_of_dream_has_a_default(tmp_path, key):
    _refused({name: value for name, value in layouts.DREAM.items() if name != key}, tmp_path, f"lacks {key}")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({**layouts.LLADA, "include_bias": True}, "include_bias=True"),
        ({**layouts.LLADA, "layer_norm_type": "default"}, "only 'rms'"),
        ({**layouts.LLADA, "alibi": True}, "alibi=True"),
        ({**layouts.LLADA, "n_layers": 0}, "no positive number"),
        ({**layouts.LLADA, "rope_theta": "big"}, "no positive number"),
        ({**layouts.LLADA, "mask_token_id": -1}, "no token id"),
        ({**layouts.LLADA, "architectures": ["LLaDAMoEModelLM"]}, "a mixture of experts"),
        ({"model_type": "llada2_moe"}, "LLaDA2Pipeline"),
        ({"model_type": "llada", "num_experts": 64}, "a mixture of experts"),
        ({**layouts.DREAM, "rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({**layouts.DREAM, "block_size": 32}, "a Dream of blocks"),
        ({"model_type": "llama"}, "autoregressive"),
        ({"model_type": "gpt2"}, "accepted: llada, Dream"),
        ({}, "'unknown'"),
    ],
)
def test_models_that_are_not_supported_are_named(tmp_path, config, says):
    _refused(config, tmp_path, says)


def _refused(config, folder, says):
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadRequestError, match=re.escape(says)):
        Checkpoint.open(folder)


def _without(weights):
    del weights["model.transformer.blocks.1.up_proj.weight"]


def _with_more(weights):
    weights["model.transformer.blocks.0.q_proj.bias"] = torch.zeros(32)


def _of_another_shape(weights):
    weights["model.transformer.ff_out.weight"] = torch.zeros(23, 32)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_without, "1 missing (model.layers.1.mlp.up_proj.weight)"),
        (_with_more, "1 unknown (model.layers.0.self_attn.q_proj.bias)"),
        (_of_another_shape, "lm_head.weight is (23, 32) instead of (24, 32)"),
    ],
)
def test_weights_are_compared_before_they_are_loaded(llada_folder, tmp_path, monkeypatch, change, says):
    weights = layouts.llada_weights()
    change(weights)
    folder = layouts.write(tmp_path, layouts.LLADA, weights)
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", None)
    with pytest.raises(BadRequestError, match=re.escape(says)):
        Checkpoint.open(folder).load()


def test_pickles_and_foreign_files_are_not_read(llada_folder, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(llada_folder / "config.json", folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(BadRequestError, match=r"has no model\.safetensors"):
        Checkpoint.open(folder).load()
    index = {"metadata": {}, "weight_map": {"a": "../llada/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadRequestError, match=r"has no \.\./llada"):
        Checkpoint.open(folder).load()
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(BadRequestError, match="lacks weight_map"):
        _ = Checkpoint.open(folder).weight_files
    with pytest.raises(BadRequestError, match="no tokenizer"):
        Checkpoint.open(folder).tokenizer()


@pytest.mark.parametrize(
    ("name", "says"),
    [("no such model", "no hub repository"), ("owner/name", "no folder owner/name here")],
)
def test_models_that_are_not_there(name, says):
    with pytest.raises(BadRequestError, match=says):
        Checkpoint.open(name)


def test_dream_tokenizer_is_built_from_its_vocabulary(tmp_path):
    """Dream ships vocab.json and merges.txt, and a class of its own that is not needed."""
    letters = "abcdehiorstuĠ"
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    for pair in ("re", "red", "Ġc"):
        vocabulary[pair] = len(vocabulary)
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nr e\nre d\nĠ c\n")
    special = {
        str(len(vocabulary) + index): {"content": text, "special": True, "lstrip": False, "rstrip": False,
                                       "normalized": False, "single_word": False}
        for index, text in enumerate(["<|endoftext|>", "<|im_end|>", "<|mask|>"])
    }  # fmt: skip
    settings = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": special,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps(layouts.DREAM))
    (tmp_path / "tokenization_dream.py").write_text("raise RuntimeError('remote code ran')")
    tokenizer = Checkpoint.open(tmp_path).tokenizer()
    ids = tokenizer("red cat<|mask|>").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["red", "Ġc", "a", "t", "<|mask|>"]
    found = SpecialTokens.find(tokenizer)
    assert tokenizer.convert_ids_to_tokens([found.mask, found.eos, found.eot]) == [
        "<|mask|>", "<|endoftext|>", "<|im_end|>",
    ]  # fmt: skip


def test_a_causal_model_is_refused(llada):
    check_bidirectional(llada)
    config = LlamaConfig(**{**llada.config.to_dict(), "is_causal": True})
    causal = LlamaForCausalLM(config).eval()
    with pytest.raises(ValueError, match="is causal"):
        check_bidirectional(causal)


def test_a_version_of_transformers_that_stays_causal_is_noticed(llada_folder, monkeypatch):
    from transformers.models.llama import modeling_llama

    stock = modeling_llama.create_causal_mask

    def causal(config, **arguments):
        config = LlamaConfig(**{**config.to_dict(), "is_causal": True})
        config._attn_implementation = "eager"
        return stock(config=config, **arguments)

    monkeypatch.setattr(modeling_llama, "create_causal_mask", causal)
    with pytest.raises(ValueError, match="is causal"):
        Checkpoint.open(llada_folder).load(attn_implementation="eager")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_holds_about_one_copy(tmp_path):
    config = {**layouts.LLADA, "d_model": 256, "mlp_hidden_size": 8192, "n_layers": 8}
    weights = {name: weight.to(torch.bfloat16) for name, weight in layouts.llada_weights(config).items()}
    total = sum(weight.numel() * 2 for weight in weights.values())
    folder = layouts.write(tmp_path, config, weights, shards=2)
    del weights
    checkpoint = Checkpoint.open(folder)
    before, peak, done = _own_memory(), [0], threading.Event()

    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], _own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        # Another type than the files', so that the weights are not just the files mapped into memory.
        model = checkpoint.load(torch.float16)
    finally:
        done.set()
        watcher.join()
    assert model.num_parameters() * 2 == total
    assert peak[0] - before < 1.4 * total


def _own_memory():
    """Without pages of mapped files, which the system may drop at any time."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def test_saved_weights_of_another_architecture_are_not_mixed_up(tmp_path):
    """ff_out is the head at the top and the down projection inside a block."""
    weights = layouts.llada_weights()
    folder = layouts.write(tmp_path, layouts.LLADA, weights)
    model = Checkpoint.open(folder).load()
    assert torch.equal(model.lm_head.weight, weights["model.transformer.ff_out.weight"])
    assert torch.equal(
        model.model.layers[1].mlp.down_proj.weight, weights["model.transformer.blocks.1.ff_out.weight"]
    )
    save_file(layouts.dream_weights(), folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadRequestError, match="6 unknown"):
        Checkpoint.open(folder).load()
