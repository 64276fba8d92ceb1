"""The tokenizers of the embedded image model: one word is one token, and the tables equal the tokenizers."""

import pytest
import torch

from diffctrl.zoo import worlds
from diffctrl.zoo.tokenizers import MAX_TOKENS, WordTokens, clip_tokenizer, t5_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def clip():
    return clip_tokenizer(worlds.WORDS)


@pytest.fixture(scope="module")
def t5():
    return t5_tokenizer(worlds.WORDS)


@pytest.fixture(scope="module")
def tokens():
    return WordTokens.of(worlds.WORDS)


def _captions(count: int, seed: int) -> torch.Tensor:
    scenes = worlds.sample(count, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    return worlds.caption_words(scenes, torch.rand(count, worlds.CAPTION_UNIFORMS, generator=draw))


def _padded(tokenizer, texts: list[str]) -> torch.Tensor:
    """As the SD3 pipeline calls its tokenizers."""
    return tokenizer(
        texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def test_tables_equal_tokenizers_on_ten_thousand_captions(clip, t5, tokens):
    words = _captions(10_000, seed=7)
    texts = worlds.to_text(words)
    assert torch.equal(tokens.clip_ids(words), _padded(clip, texts))
    assert torch.equal(tokens.t5_ids(words), _padded(t5, texts))


def test_empty_caption_and_longest_caption(clip, t5, tokens):
    words = torch.full((2, worlds.MAX_WORDS), -1)
    words[1] = torch.arange(worlds.MAX_WORDS) % len(worlds.WORDS)
    texts = worlds.to_text(words)
    assert texts[0] == ""
    assert torch.equal(tokens.clip_ids(words), _padded(clip, texts))
    assert torch.equal(tokens.t5_ids(words), _padded(t5, texts))


@pytest.mark.parametrize("form", [str.lower, str.upper, str.capitalize])
def test_every_word_is_one_token_after_save_and_reload(clip, t5, tmp_path, form):
    from transformers import CLIPTokenizer, PreTrainedTokenizerFast

    clip.save_pretrained(tmp_path / "clip")
    t5.save_pretrained(tmp_path / "t5")
    for original, reloaded in (
        (clip, CLIPTokenizer.from_pretrained(tmp_path / "clip", local_files_only=True)),
        (t5, PreTrainedTokenizerFast.from_pretrained(tmp_path / "t5", local_files_only=True)),
    ):
        for word in worlds.WORDS:
            ids = reloaded(form(word), add_special_tokens=False).input_ids
            assert ids == original(word, add_special_tokens=False).input_ids
            assert len(ids) == 1, word
        assert reloaded.model_max_length == MAX_TOKENS


def test_special_ids(clip, t5):
    assert (clip.bos_token_id, clip.eos_token_id, clip.pad_token_id) == (0, 1, 1)
    assert (t5.pad_token_id, t5.eos_token_id, t5.unk_token_id) == (0, 1, 2)


def test_unknown_words_fall_to_pieces_and_stay_readable(clip, t5):
    ids = clip("a zebra", add_special_tokens=False).input_ids
    assert clip.decode(ids) == "a zebra"
    pieces = t5.convert_ids_to_tokens(t5("zx7", add_special_tokens=False).input_ids)
    assert pieces == ["z", "x", "7"]


def test_the_order_of_the_word_list_does_not_change_clip_merges():
    forward, backward = clip_tokenizer(worlds.WORDS), clip_tokenizer(worlds.WORDS[::-1])
    assert forward.get_vocab() == backward.get_vocab()


def test_words_that_no_tokenizer_could_keep_whole_are_refused():
    with pytest.raises(ValueError, match="two words"):
        clip_tokenizer(("a", "two words"))


def test_too_many_words_are_refused(tokens):
    with pytest.raises(ValueError, match="N <= 30"):
        tokens.clip_ids(torch.zeros(1, 31, dtype=torch.int64))
