"""A row gives the same tokens alone and beside others; prompts and texts."""

import pytest
import torch

from diffctrl.dlm import (
    BLANK,
    DreamSampler,
    DreamSampling,
    LLaDASampler,
    LLaDASampling,
    Prompts,
    SpecialTokens,
    as_batch,
    decode,
    encode,
)
from diffctrl.dlm.noise import row_generators
from diffctrl.errors import BadRequestError
from tests.dlm.layouts import word_tokenizer

SPECIAL = SpecialTokens(mask=0, pad=2, eos=1)
ROWS = [[5, 9, 4, 7, 12, 6, 8], [11], [4, 4, 10]]
LLADA = [
    {"gen_length": 12, "steps": 6, "block_length": 6},
    {"gen_length": 12, "steps": 6, "block_length": 6, "cfg_scale": 1.0},
    {"gen_length": 12, "steps": 6, "block_length": 6, "temperature": 1.0},
    {"gen_length": 12, "steps": 6, "block_length": 6, "remasking": "random", "temperature": 0.5},
    {"gen_length": 12, "steps": 12, "block_length": 6, "threshold": 0.2},
]
DREAM = [
    {"gen_length": 12, "steps": 6, "alg": "entropy"},
    {"gen_length": 12, "steps": 6, "alg": "origin", "temperature": 1.0, "top_p": 0.9},
    {"gen_length": 12, "steps": 6, "alg": "maskgit_plus", "temperature": 0.7, "top_k": 9, "alg_temp": 0.5},
]
CASES = [("llada", LLaDASampler, LLaDASampling(**s)) for s in LLADA] + [
    ("dream", DreamSampler, DreamSampling(**s)) for s in DREAM
]


@pytest.mark.parametrize(("layout", "sampler", "sampling"), CASES)
def test_a_padded_row_gives_the_tokens_of_the_row_alone(request, layout, sampler, sampling):
    model = request.getfixturevalue(layout)
    together = sampler(sampling, SPECIAL).generate(model, Prompts.of(ROWS, SPECIAL.pad), seeds=7)
    for index, row in enumerate(ROWS):
        alone = sampler(sampling, SPECIAL).generate(model, Prompts.of([row], SPECIAL.pad), seeds=7 + index)
        assert alone.answers()[0] == together.answers()[index]
        if (
            getattr(sampling, "threshold", None) is None
        ):  # else the batch goes on until its slowest row is done
            assert alone.orders()[0] == together.orders()[index]
    assert together.finished


def test_without_the_mask_padding_would_matter(llada):
    """What the test above can see: the same model, deaf to its mask."""

    class Deaf:
        device = torch.device("cpu")

        def forward(self, input_ids, attention_mask=None, position_ids=None, logits_to_keep=0):
            return llada(input_ids=input_ids, logits_to_keep=logits_to_keep)

        __call__ = forward

    sampler = LLaDASampler(LLaDASampling(**LLADA[0]), SPECIAL)
    batch = Prompts.of(ROWS, SPECIAL.pad)
    assert sampler.generate(Deaf(), batch).answers() != sampler.generate(llada, batch).answers()


def test_seeds():
    def draws(seeds, rows):
        return [torch.rand(2, generator=each).tolist() for each in row_generators(seeds, rows)]

    assert draws(7, 3)[1:] == draws(8, 2) == draws([8, 9], 2)
    assert draws(torch.Generator().manual_seed(1), 2) == draws(torch.Generator().manual_seed(1), 2)
    assert draws(torch.Generator().manual_seed(1), 2)[0] != draws(torch.Generator().manual_seed(2), 2)[0]
    mine = [torch.Generator().manual_seed(8), torch.Generator().manual_seed(9)]
    assert draws(mine, 2) == draws(8, 2)
    assert draws(None, 1) != draws(None, 1)
    with pytest.raises(ValueError, match="2 seeds or generators for 3 prompts"):
        row_generators([1, 2], 3)


def test_prompts_are_padded_at_the_left():
    prompts = Prompts.of([[5, 6, 7], [], [8]], pad=2)
    assert prompts.ids.tolist() == [[5, 6, 7], [2, 2, 2], [2, 2, 8]]
    assert prompts.padding.tolist() == [0, 3, 2]
    assert prompts.padded
    assert not Prompts.of(torch.tensor([[1, 2]]), pad=2).padded
    for bad in ([], torch.tensor([1, 2]), torch.tensor([[0.5]])):
        with pytest.raises(ValueError, match="prompt"):
            Prompts.of(bad, pad=2)


def test_a_prompt_may_be_empty(llada):
    sampler = LLaDASampler(LLaDASampling(gen_length=4, steps=4, block_length=4), SPECIAL)
    assert sampler.generate(llada, Prompts.of([[]], 2)).finished


def test_prompts_of_every_kind():
    chat = [{"role": "user", "content": "red"}]
    assert as_batch("red") == ["red"]
    assert as_batch(["red", chat]) == ["red", chat]
    assert as_batch(chat) == [chat]
    for bad in ([], [[]], 5, [5], ["red", []]):
        with pytest.raises(ValueError, match="a prompt is a text, a chat"):
            as_batch(bad)


def test_texts_become_chats_where_the_tokenizer_has_a_template():
    tokenizer = word_tokenizer()
    turn = encode(tokenizer, [[{"role": "user", "content": "red cup"}]])
    assert tokenizer.convert_ids_to_tokens(turn[0]) == ["the", "red", "cup", "<|eot_id|>", "a"]
    assert encode(tokenizer, ["red cup"]) == turn
    assert encode(tokenizer, ["red cup"], chat=False) == [[5, 6]]
    plain = word_tokenizer(template=False)
    assert encode(plain, ["red cup"]) == [[5, 6]]
    with pytest.raises(BadRequestError, match="no chat template"):
        encode(plain, ["red cup"], chat=True)


def test_answers_are_cut_at_their_end_and_at_stop_words():
    tokenizer = word_tokenizer()
    special = SpecialTokens(mask=0, pad=2, eos=1, eot=3)
    ids = tokenizer("the cup is on a plate <|eot_id|> red red", add_special_tokens=False).input_ids
    assert decode(tokenizer, ids, special) == "the cup is on a plate"
    assert decode(tokenizer, ids, special, stop=["on", " is"]) == "the cup"
    assert decode(tokenizer, ids, special, stop=["", "blue"]) == "the cup is on a plate"
    assert decode(tokenizer, [4, 0, 0, 6, 1, 5], special) == f"the{BLANK}{BLANK}cup"


def test_special_tokens_come_from_settings_then_config_then_tokenizer():
    tokenizer = word_tokenizer()

    class Config:
        mask_token_id, eos_token_id = 9, [7, 8]

    assert SpecialTokens.find(tokenizer) == SpecialTokens(mask=0, pad=2, eos=1, eot=3)
    found = SpecialTokens.find(tokenizer, Config, {"mask_token_id": 10, "eot_token_id": 11})
    assert (found.mask, found.eos, found.pad, found.eot) == (10, 7, 2, 11)
    assert SpecialTokens.find(tokenizer, None, {"pad_token_id": 0}).pad == 1  # the mask cannot be the padding
    assert SpecialTokens.find(None, Config).ends == (7,)
    with pytest.raises(ValueError, match="names a mask token"):
        SpecialTokens.find(None, None)
