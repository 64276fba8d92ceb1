"""Length LoRAs: what a LoRA that makes a video model longer was trained with, and whether a mask fits it.

Source: section 4.3 of arXiv 2506.19852, which trains a LoRA of rank 128 on the query, key, value and output
projections under the radial mask. Neither that code nor its weights were published.
"""

from diffctrl.length.file import Base, LengthLoRA, read, read_weights, write
from diffctrl.length.marks import Loaded, at_work, mark, marked, merged, unmark
from diffctrl.length.masks import MASK_FIELDS, tuned

__all__ = [
    "MASK_FIELDS",
    "Base",
    "LengthLoRA",
    "Loaded",
    "at_work",
    "mark",
    "marked",
    "merged",
    "read",
    "read_weights",
    "tuned",
    "unmark",
    "write",
]
