"""Generated worlds: scenes, their pictures with exact masks, and their captions."""

from .captions import CAPTION_UNIFORMS, caption_words, said, to_text, truth
from .facts import ObjectFacts, SceneFacts
from .referring import referring
from .rendering import render
from .sampling import sample
from .scenes import Scenes, concatenate
from .vocabulary import MAX_OBJECTS, MAX_WORDS, WORDS

__all__ = [
    "CAPTION_UNIFORMS",
    "MAX_OBJECTS",
    "MAX_WORDS",
    "WORDS",
    "ObjectFacts",
    "SceneFacts",
    "Scenes",
    "caption_words",
    "concatenate",
    "referring",
    "render",
    "said",
    "sample",
    "to_text",
    "truth",
]
