"""Names and the word list of the world of clips.

The index of a name in its tuple is the integer that a clip stores for it. Colours and backgrounds are those
of `diffctrl.zoo.worlds`.
"""

from diffctrl.zoo.worlds.vocabulary import BACKGROUNDS, COLOURS, FILLERS
from diffctrl.zoo.worlds.vocabulary import SHAPES as PICTURE_SHAPES
from diffctrl.zoo.worlds.vocabulary import TEXTURES as PICTURE_TEXTURES

SHAPES = ("circle", "square", "triangle", "star", "cross")
TEXTURES = PICTURE_TEXTURES[:4]  # without the noise
PICTURE_SHAPE = tuple(PICTURE_SHAPES.index(name) for name in SHAPES)
"""For each shape its index in the renderer's list."""

MOTIONS = (
    "moves left",
    "moves right",
    "moves up",
    "moves down",
    "bounces",
    "orbits",
    "rotates clockwise",
    "rotates counterclockwise",
    "grows",
    "shrinks",
    "stands still",
)
LEFT, RIGHT, UP, DOWN, BOUNCES, ORBITS, CLOCKWISE, COUNTERCLOCKWISE, GROWS, SHRINKS, STILL = range(11)
DIRECTIONS = ((-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0))  # of the first four, y down
FORMS = ("plain", "pair", "wall", "back", "then")
PLAIN, PAIR, WALL, BACK, THEN = range(5)
"""One object; two; one that passes behind a wall; there and back; one motion after another."""
SPEEDS = ("slowly", "quickly")

WALL_PHRASE, BACK_PHRASE, THEN_WORD = "behind a gray wall", "and back", "then"
WALL_RGB = (0.53, 0.53, 0.53)
GRAY = BACKGROUNDS.index("gray")

MAX_OBJECTS = 2
MAX_WORDS = 30

_PARTS = (
    ("a", "an", "the", "one", "on", "background", "while", "then", "behind", "wall", "and", "back"),
    COLOURS,
    SHAPES,
    tuple(word for motion in MOTIONS for word in motion.split()),
    SPEEDS,
    BACKGROUNDS,
    TEXTURES,
    FILLERS,
)
WORDS: tuple[str, ...] = tuple(dict.fromkeys(word for part in _PARTS for word in part))
WORD_ID: dict[str, int] = {word: index for index, word in enumerate(WORDS)}


def held_out(colour: int, shape: int, motion: int) -> bool:
    """Whether a (colour, shape, motion) triple is kept from training: 5 % of them, of every name some."""
    return (colour + 3 * shape + 7 * motion) % 20 == 0
