"""Stock pipelines that find what an expression means in a picture or a video (RefAM, arXiv 2509.22650)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from diffusers import FluxPipeline, MochiPipeline, StableDiffusion3Pipeline, WanPipeline
from torch import Tensor

import diffctrl
from diffctrl.pipelines.base import ControlledPipelineMixin
from diffctrl.pipelines.refam_finish import Seen, finish
from diffctrl.pipelines.refam_input import check_size, clip_length, fitted_size, frames_of, resized, unit
from diffctrl.pipelines.refam_models import FluxReader, MochiReader, SD3Reader, WanReader
from diffctrl.pipelines.refam_readers import Reader, is_offloaded
from diffctrl.pipelines.refam_weighed import Weighed, batches
from diffctrl.processors.capture import EverythingRead
from diffctrl.processors.refam import RefAMAttnProcessor
from diffctrl.refam import Grounding, RefAMConfig, score, token_maps
from diffctrl.refam.sam import Segmenter
from diffctrl.refam.scoring import unsettled

# What sinks="redirect" adds, one at a time.
_MORE_MAGNETS = ("of", "and")


@dataclass(frozen=True, slots=True, eq=False)
class Drawing:
    """A picture or video and the maps that were read while it was drawn.

    Attributes:
        output: what the stock pipeline returned.
        grounding: where the expression is in it.
    """

    output: Any
    grounding: Grounding


class RefAMPipelineMixin(ControlledPipelineMixin):
    """A stock pipeline that is called with a picture and an expression, and still draws with `draw`.

    ```python
    pipe = FluxRefAMPipeline.from_pretrained(...)
    found = pipe(photo, "the red cup left of the plate")
    found.point, found.mask, found.box, found.word_maps["cup"], found.table, found.flags
    drawn = pipe.draw("a red cup left of a plate", "a red cup", num_inference_steps=28)
    ```

    Controls that `set_attn_processor` installed act while drawing and rest while grounding.
    """

    reader_class: ClassVar[type[Reader]]
    # What is used where nothing is said; an object's own value goes before.
    refam: RefAMConfig = RefAMConfig()
    _reader: Reader | None = None
    _segmenter: Segmenter | None = None

    @property
    def reader(self) -> Reader:
        """What knows this pipeline's latents and text."""
        if self._reader is None:
            self._reader = self.reader_class(self)
        return self._reader

    def __call__(
        self,
        image: Any,
        expression: str | Sequence[str],
        *,
        config: RefAMConfig | None = None,
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        batch_size: int = 8,
        **settings: Any,
    ) -> Any:
        """Find what one or several expressions mean.

        Args:
            image: a picture, or a video for the video models; see `refam_input.pixels_of`.
            expression: one, or a list, which gives a list of results.
            config: settings; without it, `self.refam`.
            size: (height, width) at which the model sees the picture; by default its own area in the
                picture's proportions.
            frames: of a video, how many are read at most; by default 7 latent frames.
            batch_size: expressions in one forward.
            settings: fields of `RefAMConfig` for this call.

        Returns:
            A `Grounding`, or a list of them.

        Raises:
            TypeError, ValueError: an argument cannot be used; says what can.
        """
        if isinstance(expression, str) or not isinstance(expression, Sequence):
            pairs = [(image, expression)]
            return self.ground(pairs, config=config, size=size, frames=frames, batch_size=1, **settings)[0]
        pairs = [(image, each) for each in expression]
        return self.ground(pairs, config=config, size=size, frames=frames, batch_size=batch_size, **settings)

    def ground(
        self,
        pairs: Sequence[tuple[Any, str]],
        *,
        config: RefAMConfig | None = None,
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        batch_size: int = 8,
        **settings: Any,
    ) -> list[Grounding]:
        """The same for many (picture, expression) pairs, several in a forward. A result does not depend on
        what else is in its batch.
        """
        if not pairs:
            return []
        config = self._settings(config, settings)
        segmenter = self._sam(config)
        with self._reading(pairs, config, size, frames) as (tasks, processor):
            for batch in batches(tasks, batch_size):
                self._forward(batch, config, processor)
                if config.sinks == "redirect":
                    self._redirect(batch, config, processor)
                for task in batch:  # maps of all blocks take megabytes, and leave the card for no sum
                    self._score(task, config)
                    task.weights = None
        return [self._finished(task, config, segmenter) for task in tasks]

    def weigh(
        self,
        pairs: Sequence[tuple[Any, str]],
        config: RefAMConfig,
        *,
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        batch_size: int = 8,
    ) -> list[Weighed]:
        """The attention of many pairs, for `conclude` under several settings that need the same forward.

        In place of a picture stands what an earlier call made of it, which is not encoded again.
        """
        with self._reading(pairs, config, size, frames) as (tasks, processor):
            for batch in batches(tasks, batch_size):
                self._forward(batch, config, processor)
                for task in batch:
                    assert task.weights is not None
                    task.weights = task.weights.cpu()
        return tasks

    def conclude(self, weighed: Weighed, config: RefAMConfig) -> Grounding:
        """The result of attention that `weigh` read, of all of its blocks or of some.

        Only settings of what is made of the attention may differ from `weigh`'s.
        """
        assert weighed.weights is not None
        blocks = config.chosen_blocks(weighed.weights.count)
        part = replace(weighed, weights=weighed.weights.only(blocks), seconds=dict(weighed.seconds))
        self._score(part, config)
        return self._finished(part, config, self._sam(config))

    def draw(
        self,
        prompt: str,
        expression: str | None = None,
        *,
        config: RefAMConfig | None = None,
        settings: Mapping[str, Any] | None = None,
        **call: Any,
    ) -> Drawing:
        """Draw with the stock pipeline and read where the words go meanwhile, averaged over the steps.

        Args:
            prompt: what to draw.
            expression: a part of the prompt, word for word; None takes all of it.
            config, settings: as for grounding. Magnets, padding, noise and caption have no meaning here: the
                text is the prompt as the pipeline pads it.
            call: arguments of the stock pipeline's call.

        Raises:
            ValueError: the expression is not in the prompt.
        """
        prompt = " ".join(prompt.split())
        expression = prompt if expression is None else " ".join(expression.split())
        if not expression or expression not in prompt:
            raise ValueError(
                f"{expression!r} is not a part of the prompt {prompt!r}, word for word; maps are of words "
                f"in it"
            )
        chosen = self._settings(config, dict(settings or {}))
        chosen = replace(
            chosen, magnet_encoding="none", padding="keep", caption=None, caption_as_prefix=False
        )
        processor = RefAMAttnProcessor(chosen)
        installed = () if self.control is None else self.control.controls
        began = time.perf_counter()
        with self._controlled([*installed, processor]):
            output = self.stock_class.__call__(self, prompt, **call)  # pyright: ignore[reportCallIssue]
        seconds = time.perf_counter() - began
        # Of Wan 2.2's two models the first one runs through the noisy half, where the places are decided.
        name = next(iter(processor.contexts_read()))
        weights, grid = processor.weights(model=name)[0], processor.grid(model=name)
        table = self.reader.prompt_table(prompt, expression, chosen, weights.i2t.shape[1])
        pixels = _drawn_pixels(output)
        size = (pixels.shape[-2], pixels.shape[-1]) if pixels is not None else (grid[1], grid[2])
        shown = pixels if pixels is not None else torch.zeros(1, 3, *size)
        seen = Seen(expression, shown, size, self.reader.frame_step)
        scored = score(weights, table, chosen, encoder=self.reader.encoder(chosen.encoder)).cpu()
        tokens = token_maps(weights, chosen).cpu()
        found = finish(
            seen, scored, tokens, grid, chosen, self._sam(chosen), {}, {"draw": seconds}, self.reader
        )
        return Drawing(output, found)

    # --- parts ----------------------------------------------------------------------------------------------

    def _settings(self, config: RefAMConfig | None, settings: Mapping[str, Any]) -> RefAMConfig:
        base = config if config is not None else self.refam
        return RefAMConfig.from_dict({**base.as_dict(), **settings}) if settings else base

    def _sam(self, config: RefAMConfig) -> Segmenter | None:
        if config.sam is None:
            return None
        if self._segmenter is None or self._segmenter.name != config.sam:
            device = self._execution_device  # type: ignore[attr-defined]
            self._segmenter = Segmenter(config.sam, device=device)
        return self._segmenter

    @contextmanager
    def _reading(
        self,
        pairs: Sequence[tuple[Any, str]],
        config: RefAMConfig,
        size: tuple[int, int] | None,
        frames: int | None,
    ) -> Iterator[tuple[list[Weighed], RefAMAttnProcessor]]:
        """The pairs as the model takes them, and the processor that is on the denoiser of this noise level
        instead of what is installed.
        """
        reader = self.reader
        reader.settle()
        expressions = [_checked(expression) for _, expression in pairs]
        # First, as it keeps a card busy while the host does the rest.
        pictures = self._pictures([picture for picture, _ in pairs], size, frames)
        _, model = reader.denoiser(config.sigma)
        moves = is_offloaded(model)
        processor = RefAMAttnProcessor(config, ends_forwards=not moves)
        installed = self._take_off()
        try:
            with diffctrl.apply(model, processor, batch_layout="cond"):
                began = time.perf_counter()
                with reader.beside():
                    reader.learn([text for each in expressions for text in reader.texts(each, config)])
                    rows = {each: reader.rows(each, config) for each in dict.fromkeys(expressions)}
                    reader.forget(keep=config.active_magnets)
                text_seconds = (time.perf_counter() - began) / len(pairs)
                tasks = []
                for (picture, _), expression in zip(pairs, expressions, strict=True):
                    seen, latents, seconds = pictures[id(picture)]
                    seconds = {"encode": seconds, "text": text_seconds}
                    seen = replace(seen, expression=expression)
                    tasks.append(Weighed(seen, latents, rows[expression], seconds))
                yield tasks, processor
        finally:
            self._put_back(installed)
            if moves or getattr(self, "_all_hooks", None):  # else a walk over all modules for nothing
                self.maybe_free_model_hooks()  # type: ignore[attr-defined]

    def _pictures(
        self, pictures: Sequence[Any], size: tuple[int, int] | None, frames: int | None
    ) -> dict[int, tuple[Seen, Tensor, float]]:
        """(picture, latents, seconds) of each by its id."""
        reader = self.reader
        found: dict[int, tuple[Seen, Tensor, float]] = {}
        for picture in pictures:
            if id(picture) in found:
                continue
            if isinstance(picture, Weighed):
                found[id(picture)] = picture.seen, picture.latents, 0.0
                continue
            began = time.perf_counter()
            pixels = frames_of(picture)
            if len(pixels) > 1 and not reader.frame_step:
                raise ValueError(f"{type(self).__name__} reads single pictures; got {len(pixels)} frames")
            height, width = pixels.shape[-2:]
            fitted = check_size(size, reader) if size else fitted_size(height, width, reader)
            read = pixels[: clip_length(len(pixels), reader, frames)]
            if tuple(read.shape[-2:]) == fitted:
                read = read.to(reader.device)  # where eight bits are fewer to carry than floats
            with torch.no_grad():
                seen_by_model = resized(unit(read), fitted).to(reader.device) * 2 - 1
                # Channels last, as pictures come, would mix two layouts all through the autoencoder.
                latents = reader.encode(seen_by_model.contiguous())
            seen = Seen("", pixels, fitted, reader.frame_step)
            found[id(picture)] = seen, latents, time.perf_counter() - began
        return found

    def _forward(self, tasks: Sequence[Weighed], config: RefAMConfig, processor: RefAMAttnProcessor) -> None:
        """Fill in the weights, on the device; the tasks have one shape."""
        reader = self.reader
        began = time.perf_counter()
        embeds = reader.place(torch.stack([task.rows.embeds for task in tasks]))
        pooled = [task.rows.pooled for task in tasks]
        stacked = (
            None if pooled[0] is None else reader.place(torch.stack([p for p in pooled if p is not None]))
        )
        processor.reset()
        for draw in range(config.n_noise):  # the processor averages over forwards
            noised = torch.stack([reader.noised(task.latents, config, draw) for task in tasks])
            with torch.no_grad(), suppress(EverythingRead):
                reader.forward(noised, embeds, stacked, config)
        found = processor.weights()
        seconds = (time.perf_counter() - began) / len(tasks)
        for task, weights in zip(tasks, found, strict=True):
            task.weights = weights
            task.seconds["forward"] = task.seconds.get("forward", 0.0) + seconds

    def _redirect(self, tasks: Sequence[Weighed], config: RefAMConfig, processor: RefAMAttnProcessor) -> None:
        """Add a magnet where a word with content is a sink, and run again; twice at most."""
        encoder = self.reader.encoder(config.encoder)
        for count in range(1, len(_MORE_MAGNETS) + 1):
            again = []
            for task in tasks:
                assert task.weights is not None
                if unsettled(score(task.weights, task.rows.table, config, encoder=encoder)):
                    task.rows = self.reader.rows(task.seen.expression, config, _MORE_MAGNETS[:count])
                    again.append(task)
            for batch in batches(again, len(tasks)):
                self._forward(batch, config, processor)

    def _score(self, task: Weighed, config: RefAMConfig) -> None:
        assert task.weights is not None
        began = time.perf_counter()
        encoder = self.reader.encoder(config.encoder)
        scored = score(task.weights, task.rows.table, config, encoder=encoder)
        task.scored = scored.cpu(), token_maps(task.weights, config).cpu()
        task.seconds["score"] = time.perf_counter() - began

    def _finished(self, task: Weighed, config: RefAMConfig, segmenter: Segmenter | None) -> Grounding:
        assert task.scored is not None
        scored, tokens = task.scored
        flags = dict(task.rows.flags)
        if config.sinks == "redirect" and (left := unsettled(scored)):
            words = ", ".join(scored.table.tokens[i].word for i in left)
            flags["sink_unsettled"] = f"{words}: still a sink after {len(_MORE_MAGNETS)} more magnets"
        height, width = (side // self.reader.multiple for side in task.seen.model_size)
        grid = scored.heat.numel() // (height * width), height, width
        return finish(task.seen, scored, tokens, grid, config, segmenter, flags, task.seconds, self.reader)


def _checked(expression: Any) -> str:
    if not isinstance(expression, str) or not expression.strip():
        raise ValueError(f"{expression!r} is no expression; write one, as in 'the red cup left of the plate'")
    return " ".join(expression.split())


def _drawn_pixels(output: Any) -> Tensor | None:
    """What a stock pipeline drew, or None of latents."""
    first = (
        output[0] if isinstance(output, tuple) else getattr(output, "images", getattr(output, "frames", None))
    )
    if first is None or (isinstance(first, Tensor) and first.shape[-3] != 3):
        return None
    return frames_of(first[0])


class StableDiffusion3RefAMPipeline(RefAMPipelineMixin, StableDiffusion3Pipeline):
    """Grounding with Stable Diffusion 3 and 3.5."""

    stock_class = StableDiffusion3Pipeline
    reader_class = SD3Reader


class FluxRefAMPipeline(RefAMPipelineMixin, FluxPipeline):
    """Grounding with FLUX.1."""

    stock_class = FluxPipeline
    reader_class = FluxReader


class MochiRefAMPipeline(RefAMPipelineMixin, MochiPipeline):
    """Grounding with Mochi 1, in videos and pictures."""

    stock_class = MochiPipeline
    reader_class = MochiReader


class WanRefAMPipeline(RefAMPipelineMixin, WanPipeline):
    """Grounding with Wan 2.1 and 2.2 text to video; of two transformers, the one of the noise level."""

    stock_class = WanPipeline
    reader_class = WanReader
