"""Generated worlds: scenes, their pictures with exact masks, and their captions.

Every fact that a caption can name is drawn so that it can be seen at 128 pixels, also on a small object:

* stripes are white and dots black, both end a little inside the edge: on a small ring either is a few spots,
  and on a white or black background the silhouette must stay closed;
* an outline is white on dark backgrounds and black on the others, and lies mostly outside the shape;
* the diamond is a tall rhombus, the hexagon slightly flat, turns stay below 13 degrees, sizes have a gap;
* the two tones of a texture differ enough on every background, and the noise is smooth;
* objects keep clear of each other and of the frame, except "in front of", where the colours differ;
* a relation is said only where one direction clearly dominates;
* characters have no style, differ in silhouette, and show what they do by limbs and turn, not place alone.

Oblong pictures keep the scene in a central square that is shifted along the longer side.
"""

from .captions import CAPTION_UNIFORMS, caption_words, detailed, said, to_text, truth
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
    "detailed",
    "referring",
    "render",
    "said",
    "sample",
    "to_text",
    "truth",
]
