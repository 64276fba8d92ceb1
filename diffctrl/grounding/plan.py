"""A request to ground becomes a plan: every value decided and checked, before any weights are loaded."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffctrl import settings as reading
from diffctrl.drawing import mp4
from diffctrl.drawing.choices import choose_device
from diffctrl.drawing.kinds import KINDS
from diffctrl.drawing.prompts import unknown_words
from diffctrl.drawing.source import ModelSource
from diffctrl.errors import BadRequestError, check_text

if TYPE_CHECKING:
    from diffctrl.refam import RefAMConfig

DEFAULT_MODEL = "shapes-sd3"
_MOST_PIXELS = 100_000_000
_VIDEO_MULTIPLE = 16
_LIBRARIES = ("diffusers", "transformers")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")


@dataclass(frozen=True, slots=True)
class Grounder:
    """What is known of a pipeline class that can ground.

    Attributes:
        ready: the class in `diffctrl.pipelines`.
        tokenizers: encoder -> (tokenizer component, tokens at most).
        video: whether it reads videos.
    """

    ready: str
    tokenizers: dict[str, tuple[str, int]]
    video: bool = False


GROUNDERS = {
    "StableDiffusion3Pipeline": Grounder(
        "StableDiffusion3RefAMPipeline", {"t5": ("tokenizer_3", 256), "clip": ("tokenizer", 77)}
    ),
    "FluxPipeline": Grounder("FluxRefAMPipeline", {"t5": ("tokenizer_2", 512)}),
    "MochiPipeline": Grounder("MochiRefAMPipeline", {"t5": ("tokenizer", 256)}, video=True),
    "WanPipeline": Grounder("WanRefAMPipeline", {"t5": ("tokenizer", 512)}, video=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GroundRequest:
    """What a user asked for; None is "not said".

    Attributes:
        image: a picture, or for the video models a video, a folder of frames or an animated picture.
        phrases: expressions.
        phrases_file: a text file with one expression a line; empty lines and those that begin with # are left
            out.
        settings: (name, text) pairs of `RefAMConfig`.
        size: (height, width) at which the model sees the picture.
        frames: of a video, how many are read at most.
    """

    image: Path
    phrases: tuple[str, ...] = ()
    phrases_file: Path | None = None
    model: str | None = None
    settings: tuple[tuple[str, str], ...] = ()
    size: tuple[int, int] | None = None
    frames: int | None = None
    device: str | None = None
    dtype: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroundPlan:
    """What will be grounded.

    Attributes:
        frames: PIL images, one of a picture; of a video's file those that are decoded.
        count: frames of the picture or video.
        picture_sha256: of the picture's file, or of a folder's files one after the other.
        preset: whether the settings start from those that were measured for an embedded model.
        warnings: one sentence each.
    """

    source: ModelSource
    grounder: Grounder
    image: Path
    frames: list[Any]
    count: int
    picture_sha256: str
    phrases: tuple[str, ...]
    config: RefAMConfig
    preset: bool
    size: tuple[int, int] | None
    most_frames: int | None
    device: str
    dtype: str
    warnings: tuple[str, ...] = ()

    def digest(self, phrase: str) -> str:
        """Eight hexadecimal digits that name the request: the same one gives the same file names."""
        asked = [self.source.name, self.picture_sha256, phrase, self.config.as_dict(), self.size]
        asked += [self.most_frames, self.dtype]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]


def make(request: GroundRequest) -> GroundPlan:
    """Decide every value, the cheapest checks first.

    Raises:
        BadRequestError: something cannot be done as asked.
    """
    phrases = _phrases(request)
    frames, digest = _frames(request.image, request.frames)
    source = ModelSource.find(request.model or DEFAULT_MODEL)
    grounder = grounder_of(source)
    if len(frames) > 1 and not grounder.video:
        raise BadRequestError(
            f"{request.image} has {len(frames)} frames, and {source.name} reads single pictures; use a video "
            f"model ({', '.join(name for name, g in GROUNDERS.items() if g.video)})"
        )
    if request.frames is not None and not grounder.video:
        raise BadRequestError(
            f"--frames {request.frames} is a length of videos, and {source.name} reads single pictures; "
            "leave it out"
        )
    config, preset = _config(source, request.settings)
    device, dtype = choose_device(request.device, request.dtype, small=source.embedded)
    _check_text(source, grounder, config, phrases)
    _check_size(source, request.size)
    _check_sam(config)
    _check_noun_phrase(config, phrases[0])
    _check_blocks(source, config)
    warnings = []
    named = (word for phrase in phrases for word in unknown_words(phrase, clips=grounder.video))
    if source.embedded and (unknown := list(dict.fromkeys(named))):
        words = ", ".join(map(repr, unknown))
        warnings.append(f"{source.name} never saw {words} in training, so that its map says little")
    if source.embedded:
        warnings.append(f"{source.name} knows drawn shapes alone; on photographs its point is a guess")
    return GroundPlan(
        source=source,
        grounder=grounder,
        image=request.image,
        frames=frames,
        count=_count(request.image, len(frames), request.frames),
        picture_sha256=digest,
        phrases=phrases,
        config=config,
        preset=preset,
        size=request.size,
        most_frames=request.frames,
        device=device,
        dtype=dtype,
        warnings=tuple(warnings),
    )


def _phrases(request: GroundRequest) -> tuple[str, ...]:
    phrases = list(request.phrases)
    if request.phrases_file is not None:
        try:
            lines = request.phrases_file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise BadRequestError(f"--phrases {request.phrases_file} cannot be read ({reason})") from None
        phrases += [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    phrases = [" ".join(phrase.split()) for phrase in phrases if phrase.strip()]
    if not phrases:
        raise BadRequestError(
            'there is no expression; write one, as in `diffctrl ground photo.png "the red cup"`, or name '
            "a file with --phrases"
        )
    for phrase in phrases:
        check_text(phrase, "the expression")
    return tuple(dict.fromkeys(phrases))


def _frames(path: Path, most: int | None) -> tuple[list[Any], str]:
    """(PIL images, sha256) of a picture, an animated picture, a video or a folder of frames.

    Of a video's file, `most` frames at most are decoded.
    """
    if path.is_dir():
        files = sorted(
            (file for file in path.iterdir() if file.suffix.lower() in _PICTURES and file.name[0] != "."),
            key=lambda file: (_natural(file.name), file.name),
        )
        if not files:
            raise BadRequestError(f"the folder {path} holds no picture ({', '.join(_PICTURES)})")
        found = [_read(file) for file in files]
        frames = [frames[0] for frames in found]
        if any(frame.size != frames[0].size for frame in frames):
            raise BadRequestError(f"the pictures in {path} have different sizes; frames of a video have one")
    elif path.is_file() and path.suffix.lower() in _VIDEOS:
        files, frames = [path], _decoded(path, most)
    elif path.is_file():
        files, frames = [path], _read(path)
    else:
        raise BadRequestError(f"there is no picture {path}")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return frames, digest.hexdigest()


def _count(path: Path, read: int, most: int | None) -> int:
    """Frames of a picture or video, of which `read` were decoded; of a video's file `most` at most."""
    cut = path.is_file() and path.suffix.lower() in _VIDEOS and read == most
    return mp4.frame_count(path) if cut else read


def _natural(name: str) -> list[str | int]:
    """Sorts 2.png before 10.png."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _decoded(path: Path, most: int | None) -> list[Any]:
    """A video's first frames.

    Raises:
        BadRequestError: it cannot be read, or holds more than is kept at once.
    """
    from PIL import Image

    frames: list[Any] = []
    for frame in itertools.islice(mp4.read_frames(path), most):
        frames.append(Image.fromarray(frame))
        if len(frames) * frame.shape[0] * frame.shape[1] > _MOST_PIXELS:
            raise BadRequestError(
                f"{path} holds more than {_MOST_PIXELS // 10**6} million pixels; read fewer frames: --frames "
                f"{len(frames) - 1} or less"
            )
    return frames


def _read(path: Path) -> list[Any]:
    from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > _MOST_PIXELS:
                raise BadRequestError(
                    f"{path} is {opened.width} x {opened.height}; pictures up to {_MOST_PIXELS // 10**6} "
                    "million pixels are read"
                )
            # Cameras write how a photograph is to be turned; a mask of the unturned pixels would be wrong.
            frames = ImageSequence.Iterator(opened)
            if opened.format == "MPO":  # a photograph; what follows is its gain map or other eye
                frames = itertools.islice(frames, 1)
            turned = [ImageOps.exif_transpose(frame) for frame in frames]
    except BadRequestError:
        raise
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise BadRequestError(f"{path} is no picture that can be read") from None
    from diffctrl.pipelines.refam_input import in_colour

    try:
        return [in_colour(frame) for frame in turned]
    except ValueError as error:
        raise BadRequestError(f"{path}: {error}") from None


def grounder_of(source: ModelSource) -> Grounder:
    """What is known of the pipeline class of a model.

    Raises:
        BadRequestError: it cannot ground, or wants code of its own.
    """
    index = source.config()
    name = str(index.get("_class_name"))
    if name not in GROUNDERS:
        raise BadRequestError(
            f"{source.name} is a {name}; `diffctrl ground` reads pictures with {', '.join(GROUNDERS)}"
        )
    for component, entry in index.items():
        library = entry[0] if isinstance(entry, list) and entry else None
        if not component.startswith("_") and library is not None and library not in _LIBRARIES:
            raise BadRequestError(
                f"{source.name}: its {component} comes from {library!r}; components of diffusers and "
                "transformers are loaded, code of the model's own is not"
            )
    return GROUNDERS[name]


def _config(source: ModelSource, pairs: tuple[tuple[str, str], ...]) -> tuple[Any, bool]:
    """(settings, whether they start from a preset): the preset's, changed by what was given."""
    from diffctrl.refam import RefAMConfig
    from diffctrl.refam.presets import preset

    found = preset(source.name) if source.embedded else None
    base = {} if found is None else found.config.as_dict()
    return reading.parse(RefAMConfig, {**base, **dict(pairs)}, of="refam"), found is not None


def _check_text(source: ModelSource, grounder: Grounder, config: Any, phrases: tuple[str, ...]) -> None:
    """Count tokens with the tokenizer that the maps are read of, alone."""
    import transformers

    components = source.components()
    names = {name: place for name, place in grounder.tokenizers.items() if place[0] in components}
    encoder = config.encoder
    if encoder == "auto":
        encoder = "t5" if "t5" in names else next(iter(names))
    if encoder not in names:
        raise BadRequestError(f"{source.name} has no text encoder {encoder!r}; it has {', '.join(names)}")
    component, limit = names[encoder]
    where = str(source.folder) if source.folder is not None else source.name
    try:
        tokenizer = getattr(transformers, components[component]).from_pretrained(
            where, subfolder=component, local_files_only=not source.asks_hub
        )
    except (OSError, ValueError) as error:
        raise BadRequestError(f"{source.name}: its {component} cannot be loaded ({error})") from None
    limit = min(limit, int(tokenizer.model_max_length))
    for phrase in phrases:
        tokens = len(tokenizer(phrase).input_ids)
        if tokens > limit:
            raise BadRequestError(
                f"the expression {phrase[:40]!r}... is too long for {source.name}: {tokens} tokens, of "
                f"{limit} "
                "at most"
            )


def _check_size(source: ModelSource, size: tuple[int, int] | None) -> None:
    if size is None:
        return
    height, width = size
    kind = KINDS.get(str(source.config()["_class_name"]))
    if kind is not None:
        kind.size_rule(source.config).check(source.name, height=height, width=width)
    elif min(size) < _VIDEO_MULTIPLE or height % _VIDEO_MULTIPLE or width % _VIDEO_MULTIPLE:
        raise BadRequestError(
            f"{source.name} reads sizes that are multiples of {_VIDEO_MULTIPLE}; got {height}x{width}"
        )


def _check_sam(config: Any) -> None:
    """Read the segmentation model's configuration alone."""
    if config.sam is not None:
        from diffctrl.refam.sam import Segmenter

        try:
            Segmenter(config.sam)
        except ValueError as error:
            raise BadRequestError(str(error)) from None


def _check_noun_phrase(config: Any, phrase: str) -> None:
    """Find one, for which spaCy may be wanted and not there."""
    from diffctrl.refam import noun_phrase, split_words

    try:
        noun_phrase(split_words(phrase), phrase, config.noun_phrase)
    except ImportError as error:
        raise BadRequestError(str(error)) from None


def _check_blocks(source: ModelSource, config: Any) -> None:
    """Try the settings on the model's architecture, made without memory for its weights."""
    import diffusers
    import torch

    import diffctrl
    from diffctrl.processors import RefAMAttnProcessor

    model_class = getattr(diffusers, source.components()["transformer"])
    with torch.device("meta"):
        model = model_class.from_config(source.config("transformer"))
    try:
        diffctrl.apply(model, RefAMAttnProcessor(config)).remove()
    except (ValueError, TypeError) as error:
        raise BadRequestError(f"{source.name}: {error}") from None
