"""RefAM (arXiv 2509.22650): from the attention of a text-to-picture model to where an expression points.

Tensors in, tensors out. What runs a model is `diffctrl.processors.refam` and `diffctrl.pipelines.refam`.
"""

from diffctrl.refam.config import DEPTH, MAGNETS, RefAMConfig
from diffctrl.refam.result import Grounding
from diffctrl.refam.scoring import Scored, Weights, score, token_maps
from diffctrl.refam.tokens import Encoded, Piece, Token, TokenTable, encode, token_table
from diffctrl.refam.words import STOP_WORDS, Word, choose_magnets, directions, noun_phrase, split_words

__all__ = [
    "DEPTH",
    "MAGNETS",
    "STOP_WORDS",
    "Encoded",
    "Grounding",
    "Piece",
    "RefAMConfig",
    "Scored",
    "Token",
    "TokenTable",
    "Weights",
    "Word",
    "choose_magnets",
    "directions",
    "encode",
    "noun_phrase",
    "score",
    "split_words",
    "token_maps",
    "token_table",
]
