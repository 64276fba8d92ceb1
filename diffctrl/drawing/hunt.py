"""HeadHunter on pipelines: samples candidates in batches, with the prompt encoded once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from diffctrl.control.install import denoisers
from diffctrl.processors.candidates import Candidates, hunting
from diffctrl.processors.universe import universe_of
from diffctrl.softpag import Head, SoftPAGConfig
from diffctrl.softpag.headhunt import (
    Engine,
    Evaluator,
    Goal,
    HuntConfig,
    InProcess,
    JobLog,
    Pair,
    Search,
    Setting,
    Universe,
)
from diffctrl.softpag.headhunt.scoring import scorer_of
from diffctrl.softpag.headset import HeadSet

# Pixels of a batch that are decoded in one go, and prompts whose embeddings are kept.
_DECODED_AT_ONCE = 1 << 23
_ENCODED = 1024
# prompt -> arguments of the pipeline's call; tensors whose first axis is 1 become the rows of a batch.
Encode = Callable[[str], Mapping[str, Any]]


class PipelineSampler:
    """Pictures of a stock pipeline under candidate head sets.

    Args:
        pipe: a diffusers text-to-image pipeline; stays under the control until `close`.
        config: u, w, scope, guidance scale, and the rows of a batch where they are steady.
        call: further arguments of the pipeline's call: steps, size.
        universe: of the pipeline; read off it where it is not given.
        encode: prompt -> arguments; by default the prompt's embeddings, for pipelines whose encoder diffctrl
            knows how to call, else the prompt itself.
        output_type: of the call; "pt" gives (N, 3, H, W) in [0, 1].
    """

    def __init__(
        self,
        pipe: Any,
        config: HuntConfig,
        call: Mapping[str, Any],
        *,
        universe: Universe | None = None,
        encode: Encode | None = None,
        output_type: str = "pt",
    ) -> None:
        self._pipe, self._call, self._output_type = pipe, dict(call), output_type
        self._guidance_scale = config.guidance_scale
        self._rows = config.batch if config.steady else None  # of every batch; None is any number
        self._encode = encode or _encoder(pipe, config, self._call)
        self._encoded: dict[str, Mapping[str, Any]] = {}
        self.candidates = Candidates()
        self._stack = ExitStack()
        self._vae: Any = getattr(pipe, "vae", None)
        if hasattr(self._vae, "use_slicing"):
            self._stack.callback(setattr, self._vae, "use_slicing", self._vae.use_slicing)
        settings = SoftPAGConfig(**config.settings())
        self._stack.enter_context(hunting(pipe, universe or universe_of(pipe), self.candidates, settings))

    def close(self) -> None:
        """Take the control off."""
        self._stack.close()

    def sample(self, pairs: Sequence[Pair], sets: Sequence[tuple[Head, ...]]) -> Any:
        """One picture per pair of prompt and seed, with the set of perturbed heads at its place.

        Raises:
            ValueError: there are more than fit into a batch of the rows that all must have.
        """
        count = len(pairs)
        if self._rows is not None:
            if count > self._rows:
                raise ValueError(
                    f"{count} pictures in one batch of {self._rows}; raise batch, or steady=False"
                )
            pairs = [*pairs, *[pairs[-1]] * (self._rows - count)]
            sets = [*sets, *[sets[-1]] * (self._rows - count)]
        places = {pair: index for index, pair in enumerate(dict.fromkeys(pairs))}
        self.candidates.begin(sets, [places[pair] for pair in pairs], shared=self._rows is None)
        encoded = [self._encoding(pair.prompt) for pair in pairs]
        arguments = {name: _joined([each[name] for each in encoded]) for name in encoded[0]}
        # On the CPU whatever the device, one generator per row: a seed means the same noise in any batch.
        generators = [torch.Generator("cpu").manual_seed(pair.seed) for pair in pairs]
        if hasattr(
            self._vae, "use_slicing"
        ):  # decoding large pictures at once takes more memory than sampling
            height, width = self._call.get("height") or 1024, self._call.get("width") or 1024
            self._vae.use_slicing = len(pairs) * height * width > _DECODED_AT_ONCE
        with torch.no_grad():
            output = self._pipe(
                **arguments,
                **self._call,
                guidance_scale=self._guidance_scale,
                generator=generators,
                output_type=self._output_type,
                return_dict=False,
            )
        return output[0][:count]

    def _encoding(self, prompt: str) -> Mapping[str, Any]:
        if prompt not in self._encoded:
            while len(self._encoded) >= _ENCODED:
                del self._encoded[next(iter(self._encoded))]
            self._encoded[prompt] = self._encode(prompt)
        return self._encoded[prompt]


def _joined(values: list[Any]) -> Any:
    """One argument for a batch of rows from that of each row."""
    first = values[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(values) if first.ndim and first.shape[0] == 1 else first
    return values if isinstance(first, str) else first


def _encoder(pipe: Any, config: HuntConfig, call: Mapping[str, Any]) -> Encode:
    """How the pipeline's prompts become arguments of its call."""
    if type(pipe).__name__ not in ("StableDiffusion3Pipeline", "StableDiffusion3SoftPAGPipeline"):
        return lambda prompt: {"prompt": prompt}
    length = {name: call[name] for name in ("max_sequence_length",) if name in call}

    def encode(prompt: str) -> Mapping[str, Any]:
        with torch.no_grad():
            embeds, negative, pooled, negative_pooled = pipe.encode_prompt(
                prompt, None, None, do_classifier_free_guidance=config.guidance_scale > 1, **length
            )
        made = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        if negative is not None:
            made |= {"negative_prompt_embeds": negative, "negative_pooled_prompt_embeds": negative_pooled}
        return made

    return encode


@dataclass(frozen=True, slots=True)
class PipelineFactory:
    """Makes the evaluator around a pipeline of this process, for the in-process engine."""

    pipe: Any
    goal: Goal
    config: HuntConfig
    call: Mapping[str, Any]
    universe: Universe | None = None
    encode: Encode | None = None
    output_type: str = "pt"
    scorers: int | Executor = 0

    def __call__(self, index: int) -> Evaluator:
        sampler = PipelineSampler(
            self.pipe,
            self.config,
            self.call,
            universe=self.universe,
            encode=self.encode,
            output_type=self.output_type,
        )
        evaluator = Evaluator(sampler, scorer_of(self.goal, self.scorers))
        evaluator.closing.callback(sampler.close)
        return evaluator


def hunt(
    pipe: Any,
    pairs: Sequence[Pair],
    goal: Goal,
    config: HuntConfig | None = None,
    *,
    call: Mapping[str, Any],
    model: Mapping[str, Any] | None = None,
    log: str | None = None,
    encode: Encode | None = None,
    output_type: str = "pt",
    engine: Callable[[PipelineFactory], Engine] = InProcess,
    scorers: int | Executor = 0,
    **progress: Any,
) -> HeadSet:
    """Search the heads of a pipeline in this process.

    Args:
        pipe: a diffusers text-to-image pipeline under no control.
        pairs: prompts with seeds, the same for every candidate.
        goal: what is maximised.
        config: settings.
        call: the pipeline's arguments, "num_inference_steps" and sizes.
        model: {"id", "revision"}; the revision must identify the weights where a log is kept.
        log: a folder that makes the search resumable.
        encode, output_type: as in `PipelineSampler`.
        engine: who runs it.
        scorers: processes that score beside this one, or a pool of them, for objectives that read pictures
            on the CPU.
        progress: `on_progress` of `Search`.
    """
    config = config or HuntConfig()
    if log is not None and not (model and model.get("revision")):
        raise ValueError(
            "a log needs model={'id': ..., 'revision': ...}: scores of other weights must not be read"
        )
    universe = universe_of(pipe)
    setting = Setting(model=dict(model or {}), sampling=sampling_of(pipe.scheduler, call, _dtype(pipe)))
    factory = PipelineFactory(pipe, goal, config, call, universe, encode, output_type, scorers)
    with engine(factory) as running, JobLog(log, running.writer) as jobs:
        return Search(universe, pairs, config, setting, goal, running, jobs, **progress).run()


def _dtype(pipe: Any) -> str:
    (model,) = denoisers(pipe).values()
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def sampling_of(scheduler: Any, call: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """What of the sampling decides a picture: for keys and head sets."""
    plain: dict[str, Any] = {
        name: value for name, value in call.items() if isinstance(value, (int, float, str, bool))
    }
    plain["steps"] = plain.pop("num_inference_steps", None)
    kept = {
        name: value
        for name, value in scheduler.config.items()
        if not name.startswith("_") and isinstance(value, (int, float, str, bool))
    }
    return {**plain, "scheduler": {"class": type(scheduler).__name__, **kept}, "dtype": dtype}
