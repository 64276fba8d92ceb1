"""The embedded text model: a stock model that loads by name and gives right answers."""

import pytest
import torch

from diffctrl.dlm import LLaDASampler, LLaDASampling, Prompts, SpecialTokens, decode
from diffctrl.zoo import registry
from diffctrl.zoo.tasks import TASKS, Draw, is_right, sample
from diffctrl.zoo.text import TextModel, TextSize, text_config


@pytest.fixture(scope="module")
def shipped() -> TextModel:
    return registry.load("scenes-lm")


def test_the_architecture_is_small_bidirectional_and_uncached():
    config = text_config()
    assert config.is_causal is False
    assert config.use_cache is False
    assert config.tie_word_embeddings is True
    size = TextSize()
    layer = 4 * size.width * size.heads * size.head_dim + 3 * size.width * size.mlp
    assert 2 * (size.layers * layer + 256 * size.width) < 6_100_000  # bytes in float16


@torch.no_grad()
def test_it_answers(shipped):
    torch.set_num_threads(1)
    model, tokenizer, settings = shipped
    assert model.dtype == torch.float32
    special = SpecialTokens.find(tokenizer, model.config, settings)
    counts = dict.fromkeys(TASKS, 6) | {"facts": 12}
    examples = sample(counts, tokens=96, draw=Draw("cpu", 31), split="test")
    rows = [ids[:start].tolist() for ids, start in zip(examples.ids, examples.start, strict=True)]
    asked = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    call = {"gen_length": 64, "steps": 32, "block_length": 64}
    generation = LLaDASampler(LLaDASampling(**call), special).generate(model, Prompts.of(rows, special.pad))
    answers = [decode(tokenizer, ids, special) for ids in generation.answers()]
    right = [is_right(prompt, answer) for prompt, answer in zip(asked, answers, strict=True)]
    assert sum(right) / len(right) >= 0.85, list(zip(asked, answers, strict=True))
