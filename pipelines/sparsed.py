"""Pipelines of diffusion language models under SparseD: a prompt in, a text out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from diffctrl.dlm import DreamSampler, DreamSampling, LLaDASampler, LLaDASampling
from diffctrl.pipelines.text import TextPipeline


class LLaDASparseDPipeline(TextPipeline):
    """LLaDA, LLaDA-1.5 and models decoded like them, under SparseD (arXiv 2509.24014).

    ```python
    pipe = LLaDASparseDPipeline.from_pretrained("GSAI-ML/LLaDA-8B-Instruct", dtype=torch.bfloat16)
    pipe.to("cuda")
    pipe("Why is the sky blue?", gen_length=256, steps=256).texts[0]
    pipe("Why is the sky blue?", sparsed=SparseDConfig(select=0.5, block_size=32), temperature=0.5, seed=7)
    ```
    """

    sampler_class, sampling_class, kind = LLaDASampler, LLaDASampling, "llada"
    # Those of SparseD's experiments; LLaDA's own default is one block.
    defaults: ClassVar[Mapping[str, Any]] = {"gen_length": 128, "block_length": 32}


class DreamSparseDPipeline(TextPipeline):
    """Dream and DiffuCoder under SparseD (arXiv 2509.24014).

    ```python
    pipe = DreamSparseDPipeline.from_pretrained("Dream-org/Dream-v0-Instruct-7B", dtype=torch.bfloat16)
    pipe.to("cuda")
    pipe("Write a haiku.", gen_length=64, alg="entropy", temperature=0.2, top_p=0.95, seed=7).texts[0]
    ```
    """

    sampler_class, sampling_class, kind = DreamSampler, DreamSampling, "dream"
    # Those of SparseD's experiments, without their temperature of 0.05.
    defaults: ClassVar[Mapping[str, Any]] = {"gen_length": 128, "alg": "maskgit_plus"}


PIPELINES: dict[str, type[TextPipeline]] = {
    pipeline.kind: pipeline for pipeline in (LLaDASparseDPipeline, DreamSparseDPipeline)
}
