"""From a request for a search to a plan: prompts, model, sizes, goal; checked before weights are loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from diffctrl import settings
from diffctrl.drawing import plan as planning
from diffctrl.drawing import prompts as reading
from diffctrl.drawing.plan import Plan
from diffctrl.drawing.source import ModelSource
from diffctrl.errors import BadRequestError
from diffctrl.softpag import SoftPAGConfig
from diffctrl.softpag.headhunt import Evaluator, Goal, HuntConfig, Pair, Setting, Universe, parse_goal

BUILT_IN = "built-in"
_BUILT_IN_COUNT = 8
_MOST_SCORERS = 16
# Captions of another stream than those that the evaluations ask for.
_BUILT_IN_SEED = 2506_10978


@dataclass(frozen=True, slots=True, kw_only=True)
class HuntRequest:
    """What a user asked for; None is "not said".

    Attributes:
        prompts: a text file with one prompt a line, or "built-in".
        limit: how many prompts are used; all of a file, 8 built-in ones.
        num: pictures per prompt.
        objectives: as `parse_goal` reads them.
        settings: (name, text) pairs of SoftPAG's options.
        config: fields of `HuntConfig` that were given.
    """

    prompts: str = BUILT_IN
    limit: int | None = None
    num: int = 1
    seed: int = 0
    objectives: tuple[str, ...] = ("judge",)
    settings: tuple[tuple[str, str], ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    guidance_scale: float | None = None
    steps: int | None = None
    height: int | None = None
    width: int | None = None
    device: str | None = None
    dtype: str | None = None
    scorers: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HuntPlan:
    """What will be searched; small and picklable, so that each worker loads the model by itself."""

    drawing: Plan
    config: HuntConfig
    objectives: tuple[str, ...]
    pairs: tuple[Pair, ...]
    scorers: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of the pipeline's call, besides prompt, seed and guidance."""
        plan = self.drawing
        found = {"height": plan.height, "width": plan.width, "num_inference_steps": plan.steps}
        if plan.max_sequence_length is not None:
            found["max_sequence_length"] = plan.max_sequence_length
        return found

    def universe(self) -> Universe:
        """The heads of the model's architecture, made without memory for its weights."""
        import diffusers
        import torch

        from diffctrl.processors.universe import universe_of

        source = self.drawing.source
        component = source.kind.denoiser
        model_class = getattr(diffusers, source.components()[component])
        with torch.device("meta"):
            return universe_of(model_class.from_config(source.config(component)))

    def goal(self, worker: int = 0) -> Goal:
        return parse_goal(self.objectives, self.device(worker))

    def device(self, worker: int) -> str:
        """The device of a worker: plain `cuda` gives each worker the next card."""
        import torch

        if self.drawing.device != "cuda" or torch.cuda.device_count() < 2:
            return self.drawing.device
        return f"cuda:{worker % torch.cuda.device_count()}"

    def load(self, worker: int = 0) -> Any:
        """The stock pipeline on a worker's device."""
        from diffctrl.drawing import draw

        return draw.load(replace(self.drawing, device=self.device(worker)))


@dataclass(frozen=True, slots=True)
class PlanFactory:
    """Loads the plan's model in the process that evaluates."""

    plan: HuntPlan

    def __call__(self, worker: int) -> Evaluator:
        from diffusers.utils import logging
        from transformers.utils import logging as transformers_logging

        from diffctrl.drawing.hunt import PipelineFactory

        logging.disable_progress_bar()  # a worker's bars would run through the search's own
        transformers_logging.disable_progress_bar()
        plan = self.plan
        pipe = plan.load(worker)
        return PipelineFactory(pipe, plan.goal(worker), plan.config, plan.call, scorers=plan.scorers)(worker)


def setting_of(plan: HuntPlan) -> Setting:
    """What keys and head set record of model and sampling.

    A hub repository is loaded for it, as its weights have no hash before.
    """
    import diffusers

    from diffctrl.drawing.hunt import sampling_of

    source = plan.drawing.source
    if source.folder is None:
        plan.load()
    scheduler_class = getattr(diffusers, source.components()["scheduler"])
    scheduler = scheduler_class.from_config(_scheduler_config(source))
    return Setting(
        model={"id": source.name, "revision": source.weights().sha256},
        sampling=sampling_of(scheduler, plan.call, plan.drawing.dtype),
    )


def _scheduler_config(source: ModelSource) -> dict[str, Any]:
    return dict(source.config("scheduler"))


def make(request: HuntRequest) -> HuntPlan:
    """Decide every value, the cheapest checks first.

    Raises:
        BadRequestError: something cannot be done as asked.
    """
    parsed = settings.parse(SoftPAGConfig, {"u": 1.0, **dict(request.settings)}, of="softpag")
    if parsed.heads is not None:
        raise BadRequestError("--set heads=... has no place in a search: it finds the heads")
    goal = parse_goal(request.objectives)  # refuses what cannot be read before anything is loaded
    texts = _texts(request, [part.name for part in goal.parts])
    source = ModelSource.find(request.model or planning.DEFAULT_MODEL)
    if source.kind.frame_rule is not None:
        raise BadRequestError(f"{source.name} draws clips; a search scores pictures")
    _check_reach(source, request, [part.name for part in goal.parts])
    scale = request.guidance_scale
    if scale is None:  # no guidance by default, as published: 0 is off where the scale is an input
        scale = 0.0 if source.kind.family == "flux" else 1.0
    config = _config(request, parsed, scale, _mode(request, source, parsed))
    drawing = planning.make(
        planning.Request(
            prompt=texts[0],
            model=request.model,
            methods=("softpag",),
            settings=request.settings,
            seed=request.seed,
            steps=request.steps,
            guidance_scale=scale,
            height=request.height,
            width=request.width,
            device=request.device,
            dtype=request.dtype,
        )
    )
    warnings = list(drawing.warnings)
    for text in texts[1:]:
        warnings += reading.check(source, text, drawing.max_sequence_length)
    if request.num < 1:
        raise BadRequestError(f"--num {request.num} is not a number of pictures; it starts at 1")
    pairs = tuple(
        Pair(text, request.seed + index * request.num + repeat)
        for index, text in enumerate(texts)
        for repeat in range(request.num)
    )
    plan = HuntPlan(
        drawing=drawing,
        config=config,
        objectives=request.objectives,
        pairs=pairs,
        scorers=_scorers(request, drawing.device),
        warnings=tuple(dict.fromkeys(warnings)),
    )
    heads = len(plan.universe().heads)
    if config.rounds * config.top > heads:
        raise BadRequestError(
            f"--rounds {config.rounds} --top {config.top} choose more than the {heads} heads of {source.name}"
        )
    return plan


def _scorers(request: HuntRequest, device: str) -> int:
    """Processes that score: beside a GPU, the free cores; on a CPU the sampling needs them itself."""
    if request.scorers is not None:
        if request.scorers < 0:
            raise BadRequestError(f"--scorers {request.scorers} is not a number of processes; 0 is none")
        return request.scorers
    return 0 if device == "cpu" else max(1, min(_MOST_SCORERS, (os.cpu_count() or 1) - 1))


def _mode(request: HuntRequest, source: ModelSource, parsed: SoftPAGConfig) -> str:
    """How twins run: from their first perturbed block on where the model allows it, or as asked."""
    from diffctrl.families import load_family

    if "mode" in dict(request.settings):
        return parsed.mode
    family = load_family(source.components()[source.kind.denoiser])
    return "prefix" if family.chains else "batched"


def _config(request: HuntRequest, parsed: SoftPAGConfig, scale: float, mode: str) -> HuntConfig:
    own = {each.name for each in fields(HuntConfig)}
    given = {each.name: getattr(parsed, each.name) for each in fields(parsed) if each.name != "heads"}
    given = {name: value for name, value in given.items() if value is not None}
    defaults = SoftPAGConfig()
    options = {
        name: value for name, value in given.items() if name not in own and value != getattr(defaults, name)
    }
    named = {name: value for name, value in given.items() if name in own} | {"mode": mode}
    try:
        return HuntConfig(**named, options=options, guidance_scale=scale, **request.config)
    except ValueError as error:
        raise BadRequestError(f"headhunt: {error}") from None


def _texts(request: HuntRequest, objectives: Sequence[str]) -> list[str]:
    if request.limit is not None and request.limit < 1:
        raise BadRequestError(f"--limit {request.limit} is not a number of prompts; it starts at 1")
    if request.prompts == BUILT_IN:
        named = not any(name.startswith("style:") for name in objectives)
        return built_in_prompts(request.limit or _BUILT_IN_COUNT, name_style=named)
    path = Path(request.prompts)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise BadRequestError(
            f"--prompts {request.prompts} cannot be read ({reason}); give a text file with one prompt a "
            f"line, or {BUILT_IN}"
        ) from None
    texts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not texts:
        raise BadRequestError(f"--prompts {request.prompts} has no prompt in it")
    return texts[: request.limit]


def built_in_prompts(count: int, *, name_style: bool = True) -> list[str]:
    """Captions of the embedded models' world, different from those that evaluations use.

    Args:
        count: how many.
        name_style: whether a caption may ask for a style.
    """
    import torch

    from diffctrl.zoo import worlds
    from diffctrl.zoo.worlds import vocabulary

    # One draw of a fixed size, so that a shorter list is the beginning of a longer one.
    size = 16 * max(64, count)
    scenes = worlds.sample(size, seed=_BUILT_IN_SEED, world="shapes", objects=(1, 2))
    generator = torch.Generator().manual_seed(_BUILT_IN_SEED)
    uniforms = torch.rand(size, worlds.CAPTION_UNIFORMS, generator=generator)
    texts = worlds.to_text(worlds.caption_words(scenes, uniforms))
    found = dict.fromkeys(
        text
        for text, facts in zip(texts, worlds.said(scenes, uniforms), strict=True)
        if (name_style or facts.style is None) and text.split()[-1] not in vocabulary.FILLERS
    )
    return list(found)[:count]


def _check_reach(source: ModelSource, request: HuntRequest, objectives: Sequence[str]) -> None:
    """The judge and the built-in prompts belong to the embedded models' world."""
    if source.embedded:
        return
    worldly = [name for name in objectives if name == "judge" or name.startswith("style:")]
    if worldly:
        raise BadRequestError(
            f"the objective {worldly[0]} reads pictures of the embedded models only; for {source.name} take "
            "sharpness, or pickscore:FOLDER, clip:FOLDER, aesthetic:FOLDER"
        )
    if request.prompts == BUILT_IN:
        raise BadRequestError(
            f"the built-in prompts are of the embedded models' world; give {source.name} its "
            "own: --prompts FILE"
        )
