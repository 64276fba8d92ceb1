"""A request for a text becomes a plan: every value decided and checked, before any weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diffctrl.drawing.choices import choose_device, first, processors, read_controls
from diffctrl.drawing.recipe import ControlSpec
from diffctrl.errors import BadRequestError, check_text
from diffctrl.writing.recipe import TextRecipe

if TYPE_CHECKING:
    from diffctrl.dlm import Checkpoint

DEFAULT_MODEL = "scenes-lm"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest:
    """What a user asked for; None is "not said", and falls to the recipe, then to what the model recommends.

    Attributes:
        methods: names in order; "none" alone asks for dense attention.
        settings: (name, text) pairs; the name is "option" or "method.option".
        sampling: options of the sampler that were given; None is "not said" here too.
    """

    prompt: str | None = None
    model: str | None = None
    methods: tuple[str, ...] | None = None
    settings: tuple[tuple[str, str], ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    device: str | None = None
    dtype: str | None = None
    recipe: TextRecipe | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPlan:
    """What will be written.

    Attributes:
        sampling: the sampler's settings, as a frozen object.
        ids: the prompt's tokens.
        warnings: one sentence each.
    """

    checkpoint: Checkpoint
    embedded: bool
    sampler: str
    prompt: str
    ids: tuple[int, ...]
    seed: int
    sampling: Any
    controls: tuple[ControlSpec, ...]
    device: str
    dtype: str
    threads: int | None
    warnings: tuple[str, ...] = ()


def make(request: TextRequest) -> TextPlan:
    """Decide every value, the cheapest checks first.

    Raises:
        BadRequestError: something cannot be done as asked.
    """
    recipe = request.recipe
    prompt = first(request.prompt, recipe and recipe.prompt)
    if not prompt or not prompt.strip():
        raise BadRequestError('there is no prompt; write one, as in `diffctrl text "copy k3xq9z0w"`')
    check_text(prompt, "the prompt")
    controls = read_controls(request.methods, request.settings, recipe.controls if recipe is not None else ())
    seed = first(request.seed, recipe and recipe.seed, 0)
    if not 0 <= seed < 2**63:
        raise BadRequestError(f"--seed {seed} is not in the range of seeds, 0 to 2^63 - 1")
    # Here, and not above: a misspelt method is answered before torch is imported.
    from diffctrl.dlm import is_embedded, open_checkpoint

    checkpoint = open_checkpoint(first(request.model, recipe and recipe.model, DEFAULT_MODEL))
    embedded = is_embedded(checkpoint.name)
    device, dtype = choose_device(
        first(request.device, recipe and recipe.device),
        first(request.dtype, recipe and recipe.dtype),
        small=embedded,
    )
    sampler, sampling = _sampling(request, checkpoint)
    ids = _encode(checkpoint, prompt)
    _check_controls(checkpoint, controls, device, dtype)
    return TextPlan(
        checkpoint=checkpoint,
        embedded=embedded,
        sampler=sampler,
        prompt=prompt,
        ids=ids,
        seed=seed,
        sampling=sampling,
        controls=controls,
        device=device,
        dtype=dtype,
        threads=recipe.threads if recipe is not None and device == "cpu" else None,
        warnings=tuple(_warnings(checkpoint, prompt)),
    )


def _sampling(request: TextRequest, checkpoint: Checkpoint) -> tuple[str, Any]:
    """The sampler's name, and its settings: as asked for, else the recipe's, else the recommended ones."""
    from diffctrl.pipelines.sparsed import PIPELINES

    name = checkpoint.sampler
    if name not in PIPELINES:
        raise BadRequestError(
            f"nothing says how {checkpoint.name} was trained to decode; write "
            f'{{"sampler": ...}} with one of {", ".join(PIPELINES)} into its diffctrl.json'
        )
    recipe = request.recipe
    known = recipe is not None and recipe.sampler == name
    before = recipe.sampling if known and recipe is not None else checkpoint.settings.get("call", {})
    given = {option: value for option, value in request.sampling.items() if value is not None}
    return name, PIPELINES[name].resolve(before, given)


def _encode(checkpoint: Checkpoint, prompt: str) -> tuple[int, ...]:
    from diffctrl.dlm import encode

    tokenizer = checkpoint.tokenizer()
    try:
        checkpoint.special(tokenizer)
    except ValueError as error:
        raise BadRequestError(f"{checkpoint.name}: {error}") from None
    return tuple(encode(tokenizer, [prompt])[0])


def _warnings(checkpoint: Checkpoint, prompt: str) -> list[str]:
    """Words that the tokenizer has no tokens for: the model reads that there is one, and not which."""
    tokenizer = checkpoint.tokenizer()
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None:
        return []
    read = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    words = [
        repr(prompt[start:end])
        for token, (start, end) in zip(read.input_ids, read.offset_mapping, strict=True)
        if token == unknown
    ]
    return [f"{checkpoint.name} does not know {', '.join(dict.fromkeys(words))}"] if words else []


def _check_controls(
    checkpoint: Checkpoint, controls: tuple[ControlSpec, ...], device: str, dtype: str
) -> None:
    """Try the controls on the model's architecture, made without memory for its weights."""
    import torch

    import diffctrl
    from diffctrl.families.text import text_model
    from diffctrl.sparsed import fused

    if not controls:
        return
    used, model = processors(controls), checkpoint.empty()
    try:
        diffctrl.apply(model, used).remove()
    except (ValueError, TypeError) as error:
        raise BadRequestError(f"{checkpoint.name}: {error}") from None
    config = used[0].config
    if config.builder == "fused":
        shape = (1, 1, 1, text_model(model).head_dim)
        query = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        if (reason := fused.why_not(query, config.block_size)) is not None:
            raise BadRequestError(f"sparsed: builder=fused {reason}; write builder=chunked, or leave it out")
