"""The world of clips: one or two shapes that move, their frames with exact masks, and their captions.

What a caption names can be seen in 33 frames of 64 pixels:

* speeds are two classes with a gap, per frame and not per clip;
* a move stops before the frame's edge; two objects keep to their halves of the picture and differ in colour;
* nothing that could rotate unseen rotates; every angle, size and place changes steadily;
* the wall is gray and never on a gray ground, wide enough to hide the object for several frames, and
  leaves it whole on both sides;
* there-and-back ends where it began, and a bounce comes down at least twice.
"""

from .captions import (
    CAPTION_UNIFORMS,
    ClipFacts,
    ObjectFacts,
    caption_words,
    detailed,
    parse,
    said,
    to_text,
    truth,
)
from .rendering import render
from .sampling import sample
from .scenes import Clips, Poses, concatenate, poses
from .vocabulary import FORMS, MAX_OBJECTS, MAX_WORDS, MOTIONS, SHAPES, SPEEDS, WORDS

__all__ = [
    "CAPTION_UNIFORMS",
    "FORMS",
    "MAX_OBJECTS",
    "MAX_WORDS",
    "MOTIONS",
    "SHAPES",
    "SPEEDS",
    "WORDS",
    "ClipFacts",
    "Clips",
    "ObjectFacts",
    "Poses",
    "caption_words",
    "concatenate",
    "detailed",
    "parse",
    "poses",
    "render",
    "said",
    "sample",
    "to_text",
    "truth",
]
