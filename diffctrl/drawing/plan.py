"""A request becomes a plan: every value decided and checked, before any weights are loaded."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field
from typing import Any

from diffctrl import methods, settings
from diffctrl.drawing import loras, prompts
from diffctrl.drawing.choices import (
    STOCK,
    choose_device,
    first,
    is_head_set,
    processors,
    read_controls,
    read_head_set,
)
from diffctrl.drawing.recipe import ControlSpec, LoraSpec, Recipe
from diffctrl.drawing.source import ModelSource
from diffctrl.errors import BadRequestError, check_text

DEFAULT_MODEL = "shapes-sd3"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user asked for; None is "not said", and falls to the recipe, then to the model's own defaults.

    Attributes:
        methods: names in order; "none" alone asks for the stock model.
        settings: (name, text) pairs; the name is "option" or "method.option".
        count: pictures, with seeds that follow each other.
        frames: of a clip.
        lora: a length LoRA; "none" for the model without that of the recipe.
    """

    prompt: str | None = None
    model: str | None = None
    methods: tuple[str, ...] | None = None
    settings: tuple[tuple[str, str], ...] = ()
    negative: str | None = None
    seed: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    compare: bool | None = None
    device: str | None = None
    dtype: str | None = None
    count: int = 1
    recipe: Recipe | None = None
    frames: int | None = None
    lora: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What will be drawn; `frames` and `fps` are of clips, and None for pictures."""

    source: ModelSource
    prompt: str
    negative: str | None
    seeds: tuple[int, ...]
    steps: int
    guidance_scale: float
    height: int
    width: int
    max_sequence_length: int | None
    controls: tuple[ControlSpec, ...]
    compare: bool
    device: str
    dtype: str
    threads: int | None
    frames: int | None = None
    fps: int | None = None
    lora: LoraSpec | None = None
    warnings: tuple[str, ...] = field(default=())


def make(request: Request) -> Plan:
    """Decide every value, the cheapest checks first.

    Raises:
        BadRequestError: something cannot be done as asked.
    """
    recipe = request.recipe
    prompt = first(request.prompt, recipe and recipe.prompt)
    if not prompt or not prompt.strip():
        raise BadRequestError('there is no prompt; write one, as in `diffctrl generate "a red star"`')
    check_text(prompt, "the prompt")
    controls = read_controls(
        request.methods,
        request.settings,
        recipe.controls if recipe is not None else (),
        same_model=recipe is None or request.model in (None, recipe.model),
    )
    for spec in controls:
        if (command := methods.METHODS[spec.method].command) != "generate":
            raise BadRequestError(f"{spec.method} changes no picture; it is used by `diffctrl {command}`")
    wanted_lora = first(request.lora, recipe and recipe.lora and recipe.lora.name, STOCK)
    compare = bool(first(request.compare, recipe and recipe.compare))
    if compare and not controls and wanted_lora == STOCK:
        raise BadRequestError(
            "--compare needs a method to set beside the stock model, as in --method softpag"
        )
    seeds = _seeds(first(request.seed, recipe and recipe.seed, 0), request.count)
    source = ModelSource.find(first(request.model, recipe and recipe.model, DEFAULT_MODEL))
    same_model = recipe if recipe is not None and recipe.model == source.name else None
    height, width = _size(request, source, same_model)
    device, dtype = choose_device(
        first(request.device, recipe and recipe.device),
        first(request.dtype, recipe and recipe.dtype),
        small=source.embedded,
    )
    defaults = _call_defaults(source)
    frames = _frames(request, source, same_model, defaults)
    steps = first(request.steps, recipe and recipe.steps, defaults["num_inference_steps"])
    guidance = first(request.guidance_scale, recipe and recipe.guidance_scale, defaults["guidance_scale"])
    longest = first(same_model and same_model.max_sequence_length, defaults.get("max_sequence_length"))
    negative = first(request.negative, recipe and recipe.negative) or None
    _check_numbers(steps, guidance)
    _check_negative(source, negative, guidance)
    warnings = prompts.check(source, prompt, longest)
    if negative:
        warnings += prompts.check(source, negative, longest, what="negative prompt")
    lora = None
    if wanted_lora != STOCK:
        lora, more = loras.choose(source, wanted_lora, controls, [key for key, _ in request.settings])
        warnings += more
    head_sets = [text for key, text in request.settings if is_head_set(key, text)]
    controls = _tried(source, controls, head_sets)
    _check_guidance(source, controls, steps, guidance)
    return Plan(
        source=source,
        prompt=prompt,
        negative=negative,
        seeds=seeds,
        steps=steps,
        guidance_scale=float(guidance),
        height=height,
        width=width,
        max_sequence_length=longest,
        controls=controls,
        compare=compare,
        device=device,
        dtype=dtype,
        threads=recipe.threads if recipe is not None and device == "cpu" else None,
        frames=frames,
        fps=source.kind.fps,
        lora=lora,
        warnings=tuple(warnings),
    )


def _seeds(seed: int, count: int) -> tuple[int, ...]:
    if count < 1:
        raise BadRequestError(f"--num {count} is not a number of pictures; it starts at 1")
    if not 0 <= seed <= 2**63 - count:
        raise BadRequestError(f"--seed {seed} is not in the range of seeds, 0 to 2^63 - 1")
    return tuple(range(seed, seed + count))


def _size(request: Request, source: ModelSource, same_model: Recipe | None) -> tuple[int, int]:
    rule = source.kind.size_rule(source.config)
    own = source.recommended()
    default = own.get("height", rule.default[0]), own.get("width", rule.default[1])
    height = first(request.height, same_model and same_model.height, default[0])
    width = first(request.width, same_model and same_model.width, default[1])
    rule.check(source.name, height=height, width=width)
    return height, width


def _frames(
    request: Request, source: ModelSource, same_model: Recipe | None, defaults: dict[str, Any]
) -> int | None:
    rule = source.kind.frame_rule
    if rule is None:
        if request.frames is not None:
            raise BadRequestError(
                f"--frames {request.frames} is a length of clips, and {source.name} draws pictures"
            )
        return None
    frames = first(request.frames, same_model and same_model.frames, defaults["num_frames"])
    rule(source.config).check(source.name, frames)
    return frames


def _call_defaults(source: ModelSource) -> dict[str, Any]:
    """Arguments that nobody gave: the card's for an embedded model, else the pipeline class's."""
    if own := source.recommended():
        return own
    import diffusers

    call = getattr(diffusers, source.config()["_class_name"]).__call__
    return {name: parameter.default for name, parameter in inspect.signature(call).parameters.items()}


def _check_numbers(steps: int, guidance: float) -> None:
    if steps < 1:
        raise BadRequestError(f"--steps {steps} is not a number of steps; it starts at 1")
    if not (math.isfinite(guidance) and guidance >= 0):
        raise BadRequestError(f"--guidance-scale {guidance} is not a finite number >= 0")


def _check_negative(source: ModelSource, negative: str | None, guidance: float) -> None:
    check_text(negative or "", "the negative prompt")
    if negative and not source.kind.takes_negative:
        raise BadRequestError(
            f"{source.name} is a {source.config()['_class_name']}, which reads no negative prompt"
        )
    if negative and guidance <= 1:
        raise BadRequestError(
            f"a negative prompt has no effect at --guidance-scale {guidance:g}: guidance is on above 1"
        )


def _tried(
    source: ModelSource, controls: tuple[ControlSpec, ...], head_sets: list[str]
) -> tuple[ControlSpec, ...]:
    """The controls after a try on the model's architecture, made without memory for its weights.

    What they read off the model (u and w of its head set) is among their settings.

    Args:
        head_sets: files whose heads the controls name.
    """
    if not controls:
        return ()
    import diffctrl
    from diffctrl.processors.universe import universe_of

    model = source.skeleton(source.kind.denoiser)
    try:
        for path in head_sets:
            read_head_set(path).check(universe_of(model).signature)
        with diffctrl.apply(model, processors(controls)) as handle:
            (context,) = handle.contexts.values()
            used: list[Any] = [control.on(list(context.sites.values())) for control in handle.controls]
    except (ValueError, TypeError) as error:
        raise BadRequestError(f"{source.name}: {error}") from None
    return tuple(
        ControlSpec(method=control.method, settings=settings.as_plain(control.config)) for control in used
    )


def _check_guidance(
    source: ModelSource, controls: tuple[ControlSpec, ...], steps: int, guidance_scale: float
) -> None:
    """Refuse SoftPAG where no step would be guided, and where what it asks for is not known in a pass."""
    from diffctrl.families import load_family

    for processor in processors(controls):
        if processor.guidance is None or processor.config.rests:
            continue
        config = processor.config
        if not config.covers_all:
            count = _schedule_length(source, steps)
            if not any(config.covers(step / count) for step in range(count)):
                raise BadRequestError(
                    f"softpag: the window from start_fraction={config.start_fraction:g} to "
                    f"stop_fraction={config.stop_fraction:g} holds none of the {count} steps, which lie "
                    f"1/{count} apart from 0 on, and nothing would be guided; widen it, or take more --steps"
                )
        family = load_family(source.components()[source.kind.denoiser])
        # Models that read no negative prompt take the scale as an input: one pass.
        twice = family.cfg == "separate" and source.kind.takes_negative and guidance_scale > 1
        if config.rescale and twice:
            raise BadRequestError(
                f"softpag: rescale={config.rescale:g} needs the guided prediction, and {source.name} runs "
                f"the two passes of --guidance-scale {guidance_scale:g} one after the other, so that neither "
                "knows it; leave rescale at 0, or turn guidance off with --guidance-scale 1"
            )


def _schedule_length(source: ModelSource, steps: int) -> int:
    """Steps of the model's sampler: some make more than they are asked for."""
    import diffusers

    kind = getattr(diffusers, source.components()["scheduler"])
    scheduler = kind.from_config(source.config("scheduler"))
    # The shift moves the steps; how many they are does not depend on it.
    scheduler.set_timesteps(steps, **({"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}))
    return len(scheduler.timesteps)
