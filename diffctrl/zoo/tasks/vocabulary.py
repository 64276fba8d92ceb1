"""The words of the embedded text model `scenes-lm`, their ids, and its tokenizer.

A known word is one token wherever it stands alone; anything else is spelt in letters and digits. Numbers and
strings are therefore one token per character, and the text form stays what a person would type:
`add 123 + 456`, `copy k3xq9z0w`, `facts brown cat 7 plum. grey fox 2 lemon. get grey fox`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIALS = ("<pad>", "<mask>", "<bos>", "<eos>", "<sep>", "<unk>")
TASK_WORDS = ("facts", "get", "copy", "reverse", "sort", "add", "scene", "what")
RELATIONS = ("left", "right", "above", "below")
PUNCTUATION = (",", ".", "+")
DIGITS = tuple("0123456789")
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "hexagon")
ADJECTIVES = (
    *COLOURS,
    *("big", "small", "old", "young", "happy", "sad", "fast", "slow", "brave", "calm", "clever", "cold"),
    *("warm", "wild", "tame", "loud", "quiet", "proud", "shy", "kind", "wise", "lazy", "busy", "hungry"),
    *("sleepy", "grey", "brown", "black", "white", "golden", "silver", "tiny", "giant", "round", "soft"),
    *("shiny", "dusty", "lucky", "merry", "plain"),
)
NOUNS = (
    *SHAPES,
    *("cat", "dog", "fox", "owl", "bear", "wolf", "deer", "hare", "frog", "toad", "crow", "duck", "goose"),
    *("swan", "hawk", "eagle", "mouse", "rat", "horse", "cow", "pig", "goat", "sheep", "lion", "tiger"),
    *("zebra", "camel", "panda", "koala", "otter", "seal", "whale", "shark", "crab", "snail", "bee"),
    *("ant", "moth", "wasp", "robin", "raven", "lynx", "mole", "bat", "hen", "calf", "pony", "crane"),
)
FOODS = (
    *("plum", "lemon", "pear", "apple", "peach", "cherry", "grape", "melon", "mango", "fig", "date", "lime"),
    *("berry", "nut", "bean", "pea", "corn", "rice", "bread", "cake", "pie", "soup", "salad", "cheese"),
    *("egg", "honey", "onion", "leek", "carrot", "potato", "tomato", "pepper", "garlic", "olive", "walnut"),
    *("almond", "radish", "turnip", "spinach", "ginger"),
)
FILLER = (
    *("the", "and", "to", "in", "it", "that", "was", "for", "on", "with", "as", "by", "at", "from", "this"),
    *("or", "an", "be", "not", "are", "but", "had", "his", "they"),
)
GRAMMAR = ("of", "is")

TOKENS: tuple[str, ...] = (
    *SPECIALS, *TASK_WORDS, *GRAMMAR, *RELATIONS, *PUNCTUATION, *DIGITS, *LETTERS, *ADJECTIVES, *NOUNS,
    *FOODS, *FILLER,
)  # fmt: skip
"""Every token in the order of the ids."""

VOCABULARY_SIZE = 256
"""Rows of the model's embedding: `TOKENS` and room for more words."""

ID: dict[str, int] = {token: index for index, token in enumerate(TOKENS)}
PAD, MASK, BOS, EOS, SEP, UNKNOWN = (ID[token] for token in SPECIALS)


def ids_of(words: tuple[str, ...]) -> list[int]:
    """Ids of words, in order."""
    return [ID[word] for word in words]


def tokenizer() -> "PreTrainedTokenizerFast":
    """Build the tokenizer: `<bos>` text `<sep>` around what is typed, padded on the left.

    The sign that asks, a trailing `=` or `?`, is dropped: `<sep>` stands for it. Decoding without special
    tokens gives the canonical text: characters of one string together, words apart, no space before a comma
    or a full stop.

    Returns:
        A fast tokenizer that lower-cases; what is neither a letter, a digit, `,`, `.` nor `+` becomes
        `<unk>`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = "|".join(sorted(token for token in TOKENS if token.isalpha() and len(token) > 1))
    marks = "[,.+]"
    # A known word between blanks, marks or ends is one piece; everything else falls to single characters.
    pieces = rf"^(?:{words})(?={marks}|$)|(?<={marks})(?:{words})(?={marks}|$)|."
    single = "[a-z0-9]"
    inside_a_string = rf"(?<!{single}{single})(?<={single}) (?={single}(?!{single}))"

    backend = Tokenizer(models.WordLevel(dict(ID), unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"[\s=?]+$"), "")]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(pieces), "isolated")]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A <sep>", special_tokens=[("<bos>", BOS), ("<sep>", SEP)]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="\0", cleanup=False),  # joins with blanks; no token has this prefix
            decoders.Fuse(),
            decoders.Replace(Regex(inside_a_string), ""),
            decoders.Replace(" ,", ","),
            decoders.Replace(" .", "."),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        mask_token="<mask>",
        bos_token="<bos>",
        eos_token="<eos>",
        sep_token="<sep>",
        unk_token="<unk>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
