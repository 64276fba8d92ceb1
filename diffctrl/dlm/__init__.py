"""Diffusion language models: checkpoints without remote code, and the exact samplers of LLaDA and Dream.

Knows no attention method; `StepControl` is where one listens.
"""

from diffctrl.dlm.bidirectional import check_bidirectional
from diffctrl.dlm.checkpoints import Checkpoint
from diffctrl.dlm.dream import DreamSampler, DreamSampling
from diffctrl.dlm.embedded import is_embedded, open_checkpoint
from diffctrl.dlm.llada import LLaDASampler, LLaDASampling
from diffctrl.dlm.noise import Seeds
from diffctrl.dlm.sampler import Generation, GenerationInterrupted, Sampler, StepControl, StepEvent
from diffctrl.dlm.tokens import BLANK, Chat, Prompts, SpecialTokens, as_batch, decode, encode

__all__ = [
    "BLANK",
    "Chat",
    "Checkpoint",
    "DreamSampler",
    "DreamSampling",
    "Generation",
    "GenerationInterrupted",
    "LLaDASampler",
    "LLaDASampling",
    "Prompts",
    "Sampler",
    "Seeds",
    "SpecialTokens",
    "StepControl",
    "StepEvent",
    "as_batch",
    "check_bidirectional",
    "decode",
    "encode",
    "is_embedded",
    "open_checkpoint",
]
