"""Settings of RefAM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from diffctrl.refam.words import NounPhrase

MagnetEncoding = Literal["separate", "joint", "none"]
Sinks = Literal["filter", "suppress", "redirect", "off"]
Direction = Literal["i2t", "t2i"]
Normalise = Literal["full", "text"]
Encoder = Literal["auto", "t5", "clip"]
Padding = Literal["drop", "keep"]
Mask = Literal["region", "mean", "otsu", "sam"]
Combine = Literal["sum", "product"]
Anchor = Literal["first", "best"]
SamChoice = Literal["heat", "score"]

MAGNETS = (".", "with", "a", "the", "pink")
# Blocks that others read: ConceptAttention's of FLUX.1, its later double blocks, Seg4Diff's of SD3.
BLOCK_PRESETS = {"concept": "15-18", "double_late": "10-18", "seg4diff_sd3": "9"}
# Relative depth of the blocks that locate: in Mochi blocks 20 to 44 of 48, in FLUX.1 24 to 53 of 57.
DEPTH = (0.42, 0.95)

_CHOICES: dict[str, Any] = {
    "magnet_encoding": MagnetEncoding,
    "sinks": Sinks,
    "direction": Direction,
    "normalise": Normalise,
    "encoder": Encoder,
    "padding": Padding,
    "mask": Mask,
    "combine": Combine,
    "anchor": Anchor,
    "sam_choice": SamChoice,
    "noun_phrase": NounPhrase,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RefAMConfig:
    """How an expression becomes a heat map and a mask (RefAM, arXiv 2509.22650).

    The paper's body was not available: what it does not show is our choice and marked so in `docs/refam.md`.

    Args:
        magnets: words that draw attention and are thrown away. A colour that the expression says makes way
            for another one.
        magnet_encoding: "separate" encodes each magnet by itself with its own end token (as the paper's
            figures show), "joint" appends them to the text, "none" uses none.
        stop_words: whether articles, prepositions, pronouns, auxiliaries and punctuation are left out.
        noun_phrase: which words are in the sum: the first noun phrase by "rules", by "spacy", by spaCy where
            it is installed ("auto"), or all ("off").
        sinks: what happens to a global attention sink: "filter" leaves its column out, "suppress" also
            shares its weight among the other text columns, "redirect" adds a magnet and runs again where a
            word with content became one (twice at most), "off" nothing.
        tau, least_even, least_depth: a sink is `tau` medians strong, `least_even` uniform, and lies at this
            relative depth or deeper.
        blocks: "auto" for the relative depth `DEPTH`, block numbers as in "24-53" or "3,5,9", or a name of
            `BLOCK_PRESETS`. FLUX counts its double blocks first.
        heads: "all", or head numbers as in "0,3".
        direction: "i2t" reads what image queries give to words, "t2i" where word queries look.
        normalise: "full" takes the softmax over all keys, "text" shares each image query's weights on text
            alone.
        combine: "sum" of the kept columns (the paper), or their "product" (geometric mean of the words' maps,
            each over its mean), which asks for all words at one place.
        encoder: whose tokens are read in models that read a text twice (SD3): "t5", "clip", or "auto", which
            is T5.
        padding: "drop" takes padding rows out of the text where the model allows it, "keep" leaves them.
        sigma: noise level in (0, 1), of the model's own law x = (1 - sigma) x0 + sigma noise.
        n_noise: noise draws that are averaged.
        seed: of the first draw.
        guidance: for models that take an embedded guidance scale.
        spatial_bias: whether "on the left" and such weigh the map with a ramp that ends at `bias_floor`.
        mask: "region" is the part around the point at half of the range, "mean" all above the mean, "otsu"
            all above Otsu's threshold, "sam" asks a segmentation model that `sam` names.
        sam: folder or hub name of SAM, SAM 2 or SAM 2 video weights.
        sam_choice: of SAM's masks, the best "score" among those that are warm inside ("heat"), or simply the
            best score.
        anchor: of a video, the frame that is pointed at: "first", or "best", the one with the most compact
            map.
        pieces: the map of a word is the mean over "all" of its pieces, or the "first".
        caption: what the picture shows, for the pooled text vector; None takes the expression.
        caption_as_prefix: the caption also stands before the expression as context.

    Raises:
        ValueError: a value is out of range, or two of them do not go together.
    """

    magnets: tuple[str, ...] | str = MAGNETS
    magnet_encoding: MagnetEncoding = "separate"
    stop_words: bool = True
    noun_phrase: NounPhrase = "rules"
    sinks: Sinks = "filter"
    tau: float = 4.0
    least_even: float = 0.98
    least_depth: float = 0.35
    blocks: str = "auto"
    heads: str = "all"
    direction: Direction = "i2t"
    normalise: Normalise = "full"
    combine: Combine = "sum"
    encoder: Encoder = "auto"
    padding: Padding = "drop"
    sigma: float = 0.5
    n_noise: int = 1
    seed: int = 0
    guidance: float = 3.5
    spatial_bias: bool = True
    bias_floor: float = 0.1
    mask: Mask = "region"
    sam: str | None = None
    sam_choice: SamChoice = "heat"
    anchor: Anchor = "first"
    pieces: Literal["all", "first"] = "all"
    caption: str | None = None
    caption_as_prefix: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.magnets, str):
            # Text separates them by spaces: a magnet may be a punctuation mark.
            object.__setattr__(self, "magnets", tuple(self.magnets.replace(",", " ").split()))
        else:
            object.__setattr__(self, "magnets", tuple(self.magnets))
        for name, kind in (*_CHOICES.items(), ("pieces", Literal["all", "first"])):
            value = getattr(self, name)
            if value not in get_args(kind):
                raise ValueError(f"{name}={value!r} is not one of {', '.join(get_args(kind))}")
        self._check_ranges()
        parse_numbers("blocks", self._block_numbers, "auto")
        parse_numbers("heads", self.heads, "all")
        if self.magnet_encoding != "none" and not self.magnets:
            raise ValueError("magnets is empty; name some, or say magnet_encoding='none'")
        if self.sinks == "redirect" and self.magnet_encoding == "none":
            raise ValueError("sinks='redirect' adds magnets, so magnet_encoding must not be 'none'")
        if self.direction == "t2i" and self.normalise == "text":
            raise ValueError(
                "normalise='text' shares an image query's weights on text; direction='t2i' has word queries"
            )
        if (self.mask == "sam") != (self.sam is not None):
            raise ValueError(
                "mask='sam' and sam=FOLDER_OR_NAME go together: SAM's weights are not part of this package"
            )
        if self.caption_as_prefix and not self.caption:
            raise ValueError("caption_as_prefix=True needs a caption")

    def _check_ranges(self) -> None:
        for name, low, high in (
            ("tau", 1.0, math.inf),
            ("least_even", 0.0, 1.0),
            ("least_depth", 0.0, 1.0),
            ("guidance", 0.0, math.inf),
            ("bias_floor", 0.0, 1.0),
        ):
            value = getattr(self, name)
            if not (low <= value <= high and math.isfinite(value)):
                raise ValueError(f"{name}={value} is not in [{low:g}, {high:g}]")
        if not 0 < self.sigma < 1:
            raise ValueError(f"sigma={self.sigma} is not between 0 (the picture) and 1 (noise alone)")
        if self.n_noise < 1:
            raise ValueError(f"n_noise={self.n_noise} is not a number of draws; it starts at 1")
        if not 0 <= self.seed < 2**63 - self.n_noise:
            raise ValueError(f"seed={self.seed} is not in the range of seeds, 0 to 2^63 - 1")

    def chosen_blocks(self, count: int) -> tuple[int, ...]:
        """The blocks among `count` that are read.

        Raises:
            ValueError: one of them does not exist.

        >>> RefAMConfig().chosen_blocks(48)[::24], RefAMConfig().chosen_blocks(57)[::29]
        ((20, 44), (24, 53))
        """
        named = parse_numbers("blocks", self._block_numbers, "auto")
        if named is None:
            low, high = (share * (count - 1) for share in DEPTH)
            # A model of two blocks has none in between; it then has its last one.
            return tuple(range(math.ceil(low), math.floor(high) + 1)) or (count - 1,)
        if max(named) >= count:
            raise ValueError(f"blocks={self.blocks!r}: block {max(named)} does not exist, there are {count}")
        return named

    def chosen_heads(self, count: int) -> tuple[int, ...] | None:
        """The heads that are read, None for all.

        Raises:
            ValueError: one of them does not exist.
        """
        named = parse_numbers("heads", self.heads, "all")
        if named is not None and max(named) >= count:
            raise ValueError(f"heads={self.heads!r}: head {max(named)} does not exist, there are {count}")
        return named

    @property
    def _block_numbers(self) -> str:
        return BLOCK_PRESETS.get(self.blocks, self.blocks)

    @property
    def active_magnets(self) -> tuple[str, ...]:
        """The magnets as tuple, () where they are off."""
        return () if self.magnet_encoding == "none" else tuple(self.magnets)

    def as_dict(self) -> dict[str, Any]:
        """Every setting as a value that JSON keeps."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RefAMConfig:
        """What `as_dict` gave, or a part of it.

        Raises:
            ValueError: a name is unknown, or a value is not accepted.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"RefAM has no option {unknown[0]!r}; accepted: {', '.join(known)}")
        return cls(**values)


def parse_numbers(name: str, text: str, everything: str) -> tuple[int, ...] | None:
    """The numbers in "3,5-7", sorted; None for the word that means all of them.

    >>> parse_numbers("blocks", "3,5-7", "auto")
    (3, 5, 6, 7)
    """
    if text == everything:
        return None
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ValueError(f"{name}={text!r} is not {everything!r} nor numbers as in '3,5-7'")
        found.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(found))
