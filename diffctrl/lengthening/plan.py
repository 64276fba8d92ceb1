"""A request to train a length LoRA becomes a plan: every value decided, before weights are loaded."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from diffctrl import settings as reading
from diffctrl.drawing import prompts
from diffctrl.drawing.choices import choose_device, first
from diffctrl.drawing.kinds import FrameRule
from diffctrl.drawing.source import ModelSource
from diffctrl.errors import BadRequestError
from diffctrl.length.file import METHODS
from diffctrl.lengthening.clips import ClipFolder, Source, World, read_folder
from diffctrl.lengthening.sharing import check_sharing, tokens_of
from diffctrl.lengthening.start import Start

DEFAULT_MODEL = "shapes-wan"
LORA_NAME = "length-lora.safetensors"
DTYPES = ("float32", "bfloat16")
SAMPLINGS = ("logit-normal", "uniform")
# Autoencoders take the frames after the first by fours, and would leave a remainder out.
_ENCODED_TOGETHER = 4
_GENERATED = 2000
# The first two blocks stay dense: the best of 0, 1, 2 and 3 in the paper's ablation.
DENSE_BLOCKS = 2
_MOST_DENSE = 0.95  # of a run


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainable:
    """A pipeline class that can be trained.

    Attributes:
        model: where its `VelocityModel` is, "module:Class".
        joint: whether text has projections of its own in the attention that is adapted.
        scale: what the autoencoder's configuration calls its pixels per latent.
    """

    model: str
    joint: bool
    scale: str

    def velocity_model(self) -> Any:
        module, _, name = self.model.partition(":")
        return getattr(import_module(module), name)


TRAINABLE = {
    "WanPipeline": Trainable(
        model="diffctrl.pipelines.length_models:WanVelocity", joint=False, scale="scale_factor_spatial"
    ),
    "HunyuanVideoPipeline": Trainable(
        model="diffctrl.pipelines.length_models:HunyuanVelocity",
        joint=True,
        scale="spatial_compression_ratio",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRequest:
    """What a user asked for; the command's options say what each is."""

    out: Path
    model: str | None = None
    data: Path | None = None
    clips: int | None = None
    frames: int
    height: int | None = None
    width: int | None = None
    method: str = "radial"
    settings: tuple[tuple[str, str], ...] = ()
    rank: int = 128
    lora_alpha: float | None = None
    start_from: str | None = None
    added: bool | None = None
    cross: bool = False
    steps: int = 1000
    learning_rate: float = 1e-4
    warmup_steps: int = 50
    batch: int = 1
    accumulate: int = 1
    empty_share: float = 0.1
    sampling: str = "logit-normal"
    checkpointing: bool = True
    compile: bool = False
    ulysses_degree: int = 1
    checkpoint_every: int = 50
    keep: int = 2
    seed: int = 0
    device: str | None = None
    dtype: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainPlan:
    """What will be trained.

    Attributes:
        latent_frames: of a clip.
        mask: the settings of `RadialConfig` that make the mask, none open, and the dense part of a run; None
            for dense attention.
        targets: paths of the layers that get an adapter.
        start: the LoRA whose weights it begins with; None for new ones.
        batch: clips of one forward, in each process.
        dtype: of the frozen weights; the adapter's are float32.
        checkpointing: whether activations are computed again in the backward pass.
        compile: whether blocks are compiled. Neither changes what is trained, but for rounding.
        ulysses_degree: processes that share a clip, each with a part of its tokens.
        keep: checkpoints that are left.
        max_sequence_length: tokens that captions are padded to, or None for the pipeline's own.
    """

    source: ModelSource
    kind: Trainable
    clips: Source
    out: Path
    frames: int
    latent_frames: int
    method: str
    mask: dict[str, Any] | None
    targets: tuple[str, ...]
    rank: int
    lora_alpha: float
    start: Start | None
    steps: int
    learning_rate: float
    warmup_steps: int
    batch: int
    accumulate: int
    empty_share: float
    sampling: str
    checkpointing: bool
    compile: bool
    ulysses_degree: int
    checkpoint_every: int
    keep: int
    seed: int
    device: str
    dtype: str
    max_sequence_length: int | None
    warnings: tuple[str, ...] = field(default=())

    @property
    def lora_path(self) -> Path:
        return self.out / LORA_NAME

    def encoding(self) -> dict[str, Any]:
        """What decides latents and embeddings: encoded clips are used again where it is the same."""
        return {
            "model": self.source.name,
            # A hub repository's files may not be here yet; its name stands for them.
            "weights": self.source.weights().sha256 if self.source.folder is not None else None,
            "data": self.clips.identity(),
            "frames": self.frames,
            "height": self.clips.height,
            "width": self.clips.width,
            "dtype": self.dtype,
            "max_sequence_length": self.max_sequence_length,
        }

    def identity(self) -> dict[str, Any]:
        """What decides the trained weights: a checkpoint goes on only where it is the same."""
        names = (
            "method", "mask", "rank", "lora_alpha", "steps", "learning_rate", "warmup_steps", "batch",
            "accumulate", "empty_share", "sampling", "seed",
        )  # fmt: skip
        mine = {name: getattr(self, name) for name in names}
        if self.start is not None:
            mine["start_from"] = self.start.digest
        return {**self.encoding(), **mine, "targets": list(self.targets)}


def make(request: TrainRequest) -> TrainPlan:
    """Decide every value, the cheapest checks first.

    Raises:
        BadRequestError: something cannot be done as asked.
    """
    _check_numbers(request)
    source = ModelSource.find(request.model or DEFAULT_MODEL)
    kind = trainable(source)
    frames, latent_frames = _frames(request, source)
    height, width = _size(request, source)
    # A CPU only where it is asked for: no training of use ends on one.
    device, dtype = choose_device(request.device, request.dtype, small=False)
    if dtype not in DTYPES:
        raise BadRequestError(f"--dtype {dtype} is no dtype to train in; accepted: {', '.join(DTYPES)}")
    tokens = tokens_of(source, kind.scale, latent_frames, height, width)
    check_sharing(request.ulysses_degree, source, device, tokens)
    clips = _clips(request, source, frames, height, width)
    if len(clips) < request.batch * request.accumulate:
        raise BadRequestError(
            f"a step takes {request.batch * request.accumulate} clips, and there are {len(clips)}; lower "
            "--batch or --accumulate"
        )
    mask = _mask(request)
    model = source.skeleton("transformer")
    targets = _targets(request, source, model, kind, mask)
    alpha = float(first(request.lora_alpha, request.rank))
    start = None
    if request.start_from is not None:
        start = Start.of(request.start_from, model, targets, rank=request.rank, lora_alpha=alpha)
    return TrainPlan(
        source=source,
        kind=kind,
        clips=clips,
        out=request.out,
        frames=frames,
        latent_frames=latent_frames,
        method=request.method,
        mask=mask,
        targets=targets,
        rank=request.rank,
        lora_alpha=alpha,
        start=start,
        steps=request.steps,
        learning_rate=request.learning_rate,
        warmup_steps=request.warmup_steps,
        batch=request.batch,
        accumulate=request.accumulate,
        empty_share=request.empty_share,
        sampling=request.sampling,
        checkpointing=request.checkpointing,
        compile=request.compile,
        ulysses_degree=request.ulysses_degree,
        checkpoint_every=request.checkpoint_every,
        keep=request.keep,
        seed=request.seed,
        device=device,
        dtype=dtype,
        max_sequence_length=source.recommended().get("max_sequence_length"),
        warnings=(*_warnings(source, latent_frames), *_cut_captions(source, clips)),
    )


def trainable(source: ModelSource) -> Trainable:
    """What is known of training a model's pipeline class.

    Raises:
        BadRequestError: a length LoRA cannot be trained on it, or it wants code of its own.
    """
    name = source.config()["_class_name"]
    if name not in TRAINABLE:
        raise BadRequestError(
            f"{source.name} is a {name}; length LoRAs are trained on {', '.join(TRAINABLE)}, whose objective "
            "is flow matching"
        )
    if "transformer_2" in source.components():
        raise BadRequestError(
            f"{source.name} has two transformers that take turns (Wan 2.2 14B); length LoRAs are trained for "
            "one. Wan 2.1 and Wan 2.2 5B have one"
        )
    from diffctrl.pipelines.length_models import shift_of

    try:
        shift_of(source.config("scheduler"))
    except BadRequestError as error:
        raise BadRequestError(f"{source.name}: {error}") from None
    _ = source.kind  # refuses components of other libraries
    return TRAINABLE[name]


def _check_numbers(request: TrainRequest) -> None:
    least = {"steps": 1, "rank": 1, "batch": 1, "accumulate": 1, "checkpoint_every": 1,
             "keep": 1, "ulysses_degree": 1, "warmup_steps": 0, "seed": 0, "frames": 1}  # fmt: skip
    for name, low in least.items():
        if getattr(request, name) < low:
            raise BadRequestError(
                f"--{name.replace('_', '-')} {getattr(request, name)} is out of range; it starts at {low}"
            )
    if request.seed >= 2**31:
        raise BadRequestError(f"--seed {request.seed} is out of range; it ends below 2^31")
    for name in ("learning_rate", "lora_alpha"):
        value = getattr(request, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise BadRequestError(f"--{name.replace('_', '-')} {value} is not a positive number")
    if not 0 <= request.empty_share < 1:
        raise BadRequestError(f"--empty-share {request.empty_share} is not in [0, 1)")
    for name, accepted in (("method", METHODS), ("sampling", SAMPLINGS)):
        if getattr(request, name) not in accepted:
            raise BadRequestError(f"--{name} {getattr(request, name)} is not one of {', '.join(accepted)}")
    if request.out.exists() and not (request.out.is_dir() and os.access(request.out, os.W_OK)):
        raise BadRequestError(f"--out {request.out} is no folder that can be written to")
    if request.method == "dense" and request.settings:
        raise BadRequestError(f"--set {request.settings[0][0]} changes a mask; --method dense has none")


def _frames(request: TrainRequest, source: ModelSource) -> tuple[int, int]:
    assert source.kind.frame_rule is not None
    rule = source.kind.frame_rule(source.config)
    FrameRule(math.lcm(_ENCODED_TOGETHER, rule.stride)).check(source.name, request.frames)
    return request.frames, rule.latent(request.frames)


def _size(request: TrainRequest, source: ModelSource) -> tuple[int, int]:
    rule, own = source.kind.size_rule(source.config), source.recommended()
    height = first(request.height, own.get("height"), rule.default[0])
    width = first(request.width, own.get("width"), rule.default[1])
    rule.check(source.name, height=height, width=width)
    return height, width


def _clips(request: TrainRequest, source: ModelSource, frames: int, height: int, width: int) -> Source:
    if request.data is not None and request.clips is not None:
        raise BadRequestError("--clips says how many to generate, and --data has clips; give one of them")
    if request.data is not None:
        found = read_folder(request.data, frames)
        return ClipFolder(found, frames=frames, height=height, width=width)
    if not source.recommended():  # only the package's own models have a card
        raise BadRequestError(
            f"--data is missing: {source.name} needs clips with captions; the generated world is for "
            f"{DEFAULT_MODEL}"
        )
    if height != width or frames < 17:
        raise BadRequestError("the generated world has square clips of at least 17 frames; give --data")
    count = first(request.clips, _GENERATED)
    if count < 1:
        raise BadRequestError(f"--clips {count} is not a number of clips; it starts at 1")
    return World(count, seed=request.seed, frames=frames, pixels=height)


def _mask(request: TrainRequest) -> dict[str, Any] | None:
    if request.method == "dense":
        return None
    from diffctrl.length.masks import DENSE, MASK_FIELDS
    from diffctrl.radial import RadialConfig
    from diffctrl.radial.presets import preset, resolve

    config = reading.parse(RadialConfig, dict(request.settings), of="radial")
    for name in ("dense_steps", "dense_last_steps"):
        if name in dict(request.settings):
            raise BadRequestError(
                f"--set {name}: there are no steps in training, but noise levels; give {DENSE}, the part of "
                "a run that starts dense"
            )
    if (config.dense_fraction or 0.0) > _MOST_DENSE:
        raise BadRequestError(
            f"--set {DENSE}={config.dense_fraction:g} leaves no noise level to the mask; give at most "
            f"{_MOST_DENSE}, or --method dense"
        )
    pattern, dense = resolve(config, preset("wan", frames=1, tuned=True))
    made = {**asdict(pattern), "dense_blocks": first(config.dense_blocks, DENSE_BLOCKS)}
    return {**{name: made[name] for name in MASK_FIELDS}, DENSE: dense.fraction}


def _targets(
    request: TrainRequest, source: ModelSource, model: Any, kind: Trainable, mask: dict[str, Any] | None
) -> tuple[str, ...]:
    """Paths of the adapted layers, read off the architecture made without memory for weights (`model`)."""
    import diffctrl
    from diffctrl.families import family_of
    from diffctrl.lengthening.targets import targets
    from diffctrl.processors import RadialAttnProcessor

    if request.added and not kind.joint:
        raise BadRequestError(
            f"--added: {source.name} has no projections of text beside those of the video; leave it out"
        )
    family = family_of(model)
    if request.cross and not any(site.kind == "cross" for site in family.sites(model)):
        raise BadRequestError(f"--cross: {source.name} has no cross-attention; leave it out")
    try:
        if mask is not None:
            diffctrl.apply(model, RadialAttnProcessor(**mask)).remove()
    except (ValueError, TypeError) as error:
        raise BadRequestError(f"{source.name}: {error}") from None
    added = kind.joint if request.added is None else request.added
    return targets(model, added=added, cross=request.cross)


def _cut_captions(source: ModelSource, clips: Source) -> list[str]:
    if not isinstance(clips, ClipFolder):
        return []
    captions = [clip.caption for clip in clips.clips]
    cut = prompts.unread(source, captions, source.recommended().get("max_sequence_length"))
    return [f"{source.name} does not read to the end of {cut} of {len(captions)} captions"] if cut else []


def _warnings(source: ModelSource, latent_frames: int) -> list[str]:
    from diffctrl.radial.presets import NATIVE_FRAMES

    native = NATIVE_FRAMES[source.kind.family]
    own = source.recommended().get("num_frames")
    if own is not None and source.kind.frame_rule is not None:
        native = source.kind.frame_rule(source.config).latent(own)
    if latent_frames > native:
        return []
    return [f"{latent_frames} latent frames are no more than the {native} that the model was made for"]
