"""Pipelines of diffusion language models under SparseD: a prompt in, a text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from diffctrl.dlm import DreamSampler, DreamSampling, LLaDASampler, LLaDASampling
from diffctrl.pipelines.text import Callback, Prompt, TextOutput, TextPipeline
from diffctrl.processors import SparseDConfig


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

    def __call__(
        self,
        prompt: Prompt | None = None,
        *,
        input_ids: Sequence[Sequence[int]] | Tensor | None = None,
        chat: bool | None = None,
        gen_length: int | None = None,
        steps: int | None = None,
        block_length: int | None = None,
        temperature: float | None = None,
        cfg_scale: float | None = None,
        remasking: str | None = None,
        threshold: float | None = None,
        logits_eos_inf: bool | None = None,
        confidence_eos_eot_inf: bool | None = None,
        stop: Sequence[str] = (),
        sparsed: SparseDConfig | bool | None = None,
        seed: Any = None,
        generator: Any = None,
        callback_on_step_end: Callback | None = None,
        logits_hook: Any = None,
        tokens_hook: Any = None,
    ) -> TextOutput:
        """Answer prompts.

        Args:
            prompt: a text, a chat ([{"role": "user", "content": ...}, ...]), or a list of them, which may
                differ in length.
            input_ids: token ids instead, one list per row; mask tokens among them are blanks to fill in.
            chat: whether a text becomes the user's turn of a chat; None where the tokenizer has a template.
            gen_length, block_length, temperature, cfg_scale, remasking, threshold, logits_eos_inf,
                confidence_eos_eot_inf: as in `LLaDASampling`; None is what the model recommends.
            steps: denoising steps; one for each token where only `gen_length` is given.
            stop: texts at which an answer is cut, when all of it is decoded.
            sparsed: settings of SparseD for this call, True for its defaults, False for dense attention; None
                is what is installed on the pipeline, else its own `sparsed`. With a `threshold`, the dense
                part ends by the share of decided tokens (trigger="committed").
            seed: of the noise: s for rows s, s + 1, ..., or a list; the same noise on every device.
            generator: a torch.Generator, or one per row, instead of a seed.
            callback_on_step_end: called with (pipe, step, block, {"event": StepEvent}); set
                `pipe._interrupt = True` to end the call there.
            logits_hook, tokens_hook: as in `LLaDASampler.generate`.

        Raises:
            ValueError: an argument is out of range.
            GenerationInterrupted: Ctrl-C; its `output` has what was decoded.
        """
        sampling = self.resolve(
            self.recommended,
            {
                "gen_length": gen_length,
                "steps": steps,
                "block_length": block_length,
                "temperature": temperature,
                "cfg_scale": cfg_scale,
                "remasking": remasking,
                "threshold": threshold,
                "logits_eos_inf": logits_eos_inf,
                "confidence_eos_eot_inf": confidence_eos_eot_inf,
            },
        )
        return self._generate(
            prompt,
            input_ids,
            sampling,
            chat=chat,
            stop=stop,
            sparsed=sparsed,
            seed=seed,
            generator=generator,
            callback_on_step_end=callback_on_step_end,
            logits_hook=logits_hook,
            tokens_hook=tokens_hook,
        )


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

    def __call__(
        self,
        prompt: Prompt | None = None,
        *,
        input_ids: Sequence[Sequence[int]] | Tensor | None = None,
        chat: bool | None = None,
        gen_length: int | None = None,
        steps: int | None = None,
        alg: str | None = None,
        alg_temp: float | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        eps: float | None = None,
        stop: Sequence[str] = (),
        sparsed: SparseDConfig | bool | None = None,
        seed: Any = None,
        generator: Any = None,
        callback_on_step_end: Callback | None = None,
        logits_hook: Any = None,
        tokens_hook: Any = None,
    ) -> TextOutput:
        """Answer prompts.

        Args:
            prompt, input_ids, chat, stop, sparsed, seed, generator, callback_on_step_end, logits_hook,
                tokens_hook: as in `LLaDASparseDPipeline`.
            gen_length, alg, alg_temp, temperature, top_p, top_k, eps: as in `DreamSampling`; None is what the
                model recommends.
            steps: denoising steps; one for each token where only `gen_length` is given.

        Raises:
            ValueError: an argument is out of range.
            GenerationInterrupted: Ctrl-C; its `output` has what was decoded.
        """
        sampling = self.resolve(
            self.recommended,
            {
                "gen_length": gen_length,
                "steps": steps,
                "alg": alg,
                "alg_temp": alg_temp,
                "temperature": temperature,
                "top_p": top_p,
                "top_k": top_k,
                "eps": eps,
            },
        )
        return self._generate(
            prompt,
            input_ids,
            sampling,
            chat=chat,
            stop=stop,
            sparsed=sparsed,
            seed=seed,
            generator=generator,
            callback_on_step_end=callback_on_step_end,
            logits_hook=logits_hook,
            tokens_hook=tokens_hook,
        )


PIPELINES: dict[str, type[TextPipeline]] = {
    pipeline.kind: pipeline for pipeline in (LLaDASparseDPipeline, DreamSparseDPipeline)
}
