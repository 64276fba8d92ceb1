"""Words, tokens and which of them are read (specification 2.2, 2.4, 5.3; rows 8-11, 25, 26 of section 8)."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffctrl.refam import RefAMConfig, choose_magnets, directions, noun_phrase, split_words, token_table
from diffctrl.refam.scoring import kept_columns
from diffctrl.refam.tokens import Piece, encode, word_of_each
from diffctrl.refam.words import find_word, is_stop
from tests.refam.text import TOKENIZER, cut

MAGNETS = (".", "with", "a", "the", "pink")


def table(expression, magnets=(), **options):
    runs = [Piece(encoded=cut(expression), role="expression", encoder="t5")]
    runs += [Piece(encoded=cut(m), role="magnet", encoder="t5") for m in magnets]
    return token_table(expression, runs, **options)


def words_kept(expression, config=None, **options):
    found = table(expression, **options)
    kept, _ = kept_columns(found, config or RefAMConfig(), "t5")
    return [found.tokens[i].piece for i in kept]


def test_the_teaser_of_the_paper():
    found = table("a largest orange gold fish", MAGNETS)
    pieces = [token.piece for token in found.tokens]
    assert pieces[:7] == ["▁", "a", "▁largest", "▁orange", "▁gold", "▁fish", "</s>"]
    assert len(found) == 7 + 12 == 19
    assert found.counts()["magnet"] == 12
    # Every end token is special or part of a magnet, so that none is ever summed.
    ends = [t.kind for t in found.tokens if t.piece == "</s>"]
    assert ends == ["special", *["magnet"] * 5]
    assert [t.kind for t in found.tokens[:2]] == ["stop", "stop"]  # the bare piece goes with its "a"
    assert found.tokens[16].piece == "</s>"  # of "the", the paper's second sink
    assert found.tokens[15].word == "the"


def test_content_is_the_same_rows_with_and_without_separate_magnets():
    plain, with_magnets = table("red cube"), table("red cube", MAGNETS)
    assert with_magnets.tokens[: len(plain)] == plain.tokens


def test_spans_and_bare_pieces():
    encoded = cut("a red cube")
    assert encoded.pieces == ("▁", "a", "▁red", "▁cube", "</s>")
    assert encoded.spans == ((0, 1), (0, 1), (2, 5), (6, 10), (0, 0))
    assert word_of_each(encoded, split_words("a red cube")) == (0, 0, 1, 2, None)


def test_a_word_of_several_pieces_and_a_dot_after_a_word():
    found = table("goldfish on the left.")
    assert [t.piece for t in found.tokens if t.word == "goldfish"] == ["▁gold", "fish"]
    left = [t for t in found.tokens if t.word == "left"]
    assert [t.piece for t in left] == ["▁left"]
    assert [(t.word, t.kind) for t in found.tokens if t.piece == "."] == [(".", "stop")]
    assert found.of_word("goldfish", encoder="t5", pieces="first") == (0,)


def test_filtering_is_by_position_and_keeps_what_decides():
    # "a" inside of "lamp" stays; articles and prepositions go.
    lamp = table("a lamp")
    kept, flags = kept_columns(lamp, RefAMConfig(), "t5")
    assert {lamp.tokens[i].word for i in kept} == {"lamp"}
    assert not flags
    whole = RefAMConfig(noun_phrase="off")
    assert words_kept("the no two left cup", whole, phrase="off") == ["▁no", "▁two", "▁left", "▁cup"]
    assert words_kept("the red cup", RefAMConfig(stop_words=False)) == ["▁the", "▁red", "▁cup"]


def test_what_is_a_stop_word_and_what_never_is():
    """The lists of the specification, 2.4; what decides which object is meant stays."""
    stopped = (
        "a an the this that these those of in on at to from by for with and or as than is are was were be "
        "been being has have had do does it its he she they them his her their who which . , ! ? ( ) -"
    )
    never = (
        "left right top bottom front behind middle near no not without one two three ten red pink olive "
        "lamp another cathedral"
    )
    for text in stopped.split():
        assert is_stop(split_words(text), 0), text
    for text in never.split():
        assert not is_stop(split_words(f"{text} cup"), 0), text


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("the man in the black vest", {"man"}),
        ("the red cup left of the plate", {"red", "cup"}),
        ("the left cup", {"left", "cup"}),
        ("the square on the left", {"square"}),
        ("it is the red star", {"red", "star"}),
        ("and this is it and that is the red star", {"red", "star"}),
        ("the cat, which sleeps", {"cat"}),
        ("the red one", {"red"}),
        ("the one cup", {"one", "cup"}),
        ("left of the plate", {"left", "plate"}),
    ],
)
def test_the_first_noun_phrase(text, kept):
    words = split_words(text)
    inside = noun_phrase(words, text)
    assert {words[i].text for i in inside if not is_stop(words, i)} == kept


def test_an_expression_without_content_is_read_whole_and_says_so():
    found = table("the one on it")
    kept, flags = kept_columns(found, RefAMConfig(), "t5")
    assert "empty_filter" in flags
    assert [found.tokens[i].word for i in kept] == ["the", "one", "on", "it"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("the square on the left", ("left",)),
        ("man in the top right corner", ("top", "right")),
        ("the left cup", ("left",)),
        ("guy left", ("left",)),
        ("left side of the photo", ("left",)),
        ("the middle one", ("middle",)),
        ("the cup left of the plate", ()),
        ("the cup to the left of the plate", ()),
        ("the cup on the left plate", ()),
        ("the circle above the green cross", ()),
        ("the second cup from the left", ()),
        ("left of the plate", ()),
        ("the one that moves left", ()),
        ("the one that moves right then up", ()),
        ("the man running to the left", ()),
        ("the man looking right", ()),
        ("the left man looking right", ("left",)),
        ("the falling leaf on the left", ("left",)),
        ("the turn signal on the left", ("left",)),
        ("the man walking on the left", ("left",)),
        ("the man to the left", ("left",)),
        ("the man running left", ()),
    ],
)
def test_directions_say_where_and_relations_do_not(text, wanted):
    assert directions(split_words(text)) == wanted


def test_a_magnet_never_has_the_colour_that_is_asked_for():
    def colour(text):
        return choose_magnets(MAGNETS, split_words(text))[-1]

    assert colour("the red cup") == "pink"
    assert colour("the Pink cup") == "purple"
    assert colour("the magenta cup") == "cyan"  # nearly pink, nearly purple
    assert colour("the pink and purple and teal cup") == "olive"
    with pytest.raises(ValueError, match="name magnets yourself"):
        colour("pink purple cyan olive")
    assert choose_magnets(("with", "blue"), split_words("the blue cup")) == ("with", "pink")


def test_joined_magnets_and_a_caption_before_are_not_the_expression():
    text = "red cup. the red cup with the pink"
    runs = [Piece(encoded=cut(text), role="expression", encoder="t5", padding=2)]
    found = token_table("the red cup", runs)
    kinds = [(t.piece, t.kind) for t in found.tokens]
    assert kinds[:3] == [("▁red", "context"), ("▁cup", "context"), (".", "context")]
    assert kinds[3:6] == [("▁the", "stop"), ("▁red", "content"), ("▁cup", "content")]
    assert [kind for _, kind in kinds[6:]] == ["magnet", "magnet", "magnet", "special", "pad", "pad"]


def test_words_that_are_not_there_are_named_with_those_that_are():
    words = split_words("a red cup and a red plate")
    assert find_word(words, "Red", 1) == 5
    with pytest.raises(ValueError, match=r"no word 'plat'.*did you mean plate"):
        find_word(words, "plat")
    with pytest.raises(ValueError, match=r"occurs 2 time"):
        find_word(words, "red", 2)


def test_text_beyond_the_limit_is_refused():
    with pytest.raises(ValueError, match="Shorten"):
        encode(TOKENIZER, "red " * 20, limit=16)


def test_a_tokenizer_without_offsets_is_refused():
    with pytest.raises(TypeError, match="tokenizer.json"):
        encode(object(), "red")


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "red", "cube,", "goldfish", "the", "left.", "x"]), min_size=1, max_size=8)
)
def test_every_piece_of_text_belongs_to_the_word_that_holds_it(parts):
    text = "  ".join(parts)
    encoded, words = cut(text), split_words(text)
    for span, special, owner in zip(
        encoded.spans, encoded.special, word_of_each(encoded, words), strict=True
    ):
        if special:
            assert owner is None
        elif text[slice(*span)].strip():
            assert words[owner].start < span[1]
            assert words[owner].stop > span[0]
