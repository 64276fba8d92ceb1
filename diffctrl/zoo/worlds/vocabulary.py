"""Names, palettes and the word list of the generated worlds.

The index of a name in its tuple is the integer that a scene stores for it; the index of a word in `WORDS` is
its word id. Colours are RGB in [0, 1].
"""

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "hexagon")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink")
PATTERNS = ("plain", "striped", "dotted")
SIZES = ("small", "large")
STYLES = ("flat", "outlined", "soft", "shaded")
BACKGROUNDS = ("black", "white", "gray", "navy", "beige", "olive")
TEXTURES = ("plain", "checkered", "gradient", "lined", "noisy")
RELATIONS = ("left of", "right of", "above", "below", "in front of")
BODIES = ("round", "boxy", "tall", "pointy", "bumpy", "domed")
HATS = ("none", "cap", "cone", "crown")
EYES = ("open", "sleepy")
ACTIONS = ("stands", "jumps", "lies")
FILLERS = ("in", "at", "it", "is", "that", "this", "to", "and", "with", "of")

INVERSE_RELATION = (
    1,
    0,
    3,
    2,
    4,
)  # said with the objects swapped; "in front of" has no inverse and is never swapped
IN_FRONT_OF = 4

COLOUR_RGB = (
    (0.90, 0.12, 0.12),
    (0.12, 0.70, 0.20),
    (0.20, 0.38, 0.98),
    (0.96, 0.87, 0.10),
    (0.50, 0.14, 0.72),
    (1.00, 0.52, 0.05),
    (0.12, 0.85, 0.90),
    (1.00, 0.47, 0.74),
)
# Two tones per background. The second one is written out instead of 0.75 tone + 0.06, which moves black and
# gray by 0.05 only: such a texture is below what a small model, or an eye, resolves.
BACKGROUND_RGB = (
    ((0.05, 0.05, 0.05), (0.21, 0.21, 0.21)),
    ((0.96, 0.96, 0.96), (0.78, 0.78, 0.78)),
    ((0.53, 0.53, 0.53), (0.38, 0.38, 0.38)),
    ((0.08, 0.10, 0.35), (0.03, 0.04, 0.17)),
    ((0.89, 0.81, 0.65), (0.73, 0.64, 0.47)),
    ((0.38, 0.40, 0.15), (0.25, 0.27, 0.08)),
)
DARK_BACKGROUNDS = (
    True,
    False,
    False,
    True,
    False,
    False,
)  # here an outline is white: a black one is not seen
WHITE = 0.97
BLACK = 0.05

# 10 of the 192 (colour, shape, pattern) triples, 5 %: never in split "train" or "test". Every colour and
# shape is held out once or twice, so that no single value becomes rare.
HELD_OUT = (*((i, (3 * i + 1) % 8, i % 3) for i in range(8)), (1, 2, 2), (5, 3, 1))

_PARTS = (
    ("a", "an", "the", "picture", "of", "on", "background", ",", "and", "one"),
    STYLES,
    SIZES,
    COLOURS,
    PATTERNS,
    SHAPES,
    BACKGROUNDS,
    TEXTURES,
    ("left", "right", "above", "below", "in", "front"),
    BODIES,
    ("creature", "with", "eyes", "wearing", "no", "hat"),
    HATS[1:],
    EYES,
    ACTIONS,
    FILLERS,
)
WORDS: tuple[str, ...] = tuple(dict.fromkeys(word for part in _PARTS for word in part))
WORD_ID: dict[str, int] = {word: index for index, word in enumerate(WORDS)}
MAX_WORDS = 30
MAX_OBJECTS = 3


def ids(names: tuple[str, ...]) -> list[int]:
    """Word ids of `names`; every one must be a single word of the world."""
    return [WORD_ID[name] for name in names]
