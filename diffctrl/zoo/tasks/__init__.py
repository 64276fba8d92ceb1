"""Exercises of the embedded text model: words and tokenizer, generated batches, true answers."""

from .sampling import FACT_TOKENS, SHORTEST, TASKS, Draw, Examples, is_held_out_sum, sample
from .solving import is_right, solve
from .vocabulary import TOKENS, VOCABULARY_SIZE, tokenizer

__all__ = [
    "FACT_TOKENS",
    "SHORTEST",
    "TASKS",
    "TOKENS",
    "VOCABULARY_SIZE",
    "Draw",
    "Examples",
    "is_held_out_sum",
    "is_right",
    "sample",
    "solve",
    "tokenizer",
]
