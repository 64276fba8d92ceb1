"""From scored weights to a `Grounding`: maps on the grid, point, mask, box and, of a video, the track."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffctrl.pipelines.refam_input import middle_frame_of
from diffctrl.pipelines.refam_readers import Reader
from diffctrl.refam import Grounding, RefAMConfig, Scored, directions
from diffctrl.refam.locate import best_frame, box_of, centre, mask_of, peak, spatial_bias
from diffctrl.refam.sam import Segmenter


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """A picture as it was given and as the model saw it.

    Attributes:
        expression: about it.
        pixels: (F, 3, H, W) as `frames_of` gives them.
        model_size: (height, width) of what the model saw.
        frame_step: see `Reader`.
    """

    expression: str
    pixels: Tensor
    model_size: tuple[int, int]
    frame_step: int

    @property
    def size(self) -> tuple[int, int]:
        return self.pixels.shape[-2], self.pixels.shape[-1]

    def pictures(self) -> list[Any]:
        """The frames as PIL images."""
        from PIL import Image

        frames = self.pixels
        if frames.dtype != torch.uint8:
            frames = (frames * 255).round().to(torch.uint8)
        return [Image.fromarray(frame) for frame in frames.movedim(1, -1).numpy()]


def finish(
    seen: Seen,
    scored: Scored,
    tokens: Tensor,
    grid: tuple[int, int, int],
    config: RefAMConfig,
    segmenter: Segmenter | None,
    flags: Mapping[str, str],
    seconds: Mapping[str, float],
    reader: Reader,
) -> Grounding:
    """Everything after the heat map.

    Args:
        seen: the picture.
        scored: the heat map and the tokens it was made of.
        tokens: (T, I) the map of each token, for those of single words.
        grid: (frames, rows, columns) of the image tokens.
        config: settings.
        segmenter: where masks come from, or None.
        flags, seconds: of the steps before.
        reader: of the pipeline.
    """
    began = time.perf_counter()
    frames, rows, columns = grid
    encoder = reader.encoder(config.encoder)
    words = scored.table.words
    bias = torch.ones(rows, columns)
    if config.spatial_bias:
        bias = spatial_bias(directions(words), rows, columns, config.bias_floor)
    maps = scored.heat.view(frames, rows, columns) * bias
    anchor = best_frame(maps) if config.anchor == "best" and frames > 1 else 0
    heat = maps[anchor]
    flags = {**flags, **scored.flags}
    if heat.min() == heat.max():
        flags["flat_map"] = "the map has no peak, so the point says nothing"
    size = seen.size
    point = centre(*peak(heat), (rows, columns), size)
    frame = middle_frame_of(anchor, seen.frame_step)
    frame = min(frame, len(seen.pixels) - 1)
    if segmenter is None or config.mask != "sam":
        mask = mask_of(heat, point, size, mask_rule(config))
        video = len(seen.pixels) > 1
        track = map_track(maps, size, config, seen.frame_step)[: len(seen.pixels)] if video else None
    elif len(seen.pixels) > 1:
        track = segmenter.track(seen.pictures(), point, frame)
        mask = track[frame]
    else:
        mask, track = segmenter.mask(seen.pictures()[0], point, heat, config.sam_choice), None
    named = {}
    for word in words:
        found = scored.table.of_word(
            word.text, encoder=encoder, occurrence=word.occurrence, pieces=config.pieces
        )
        if found and not word.is_punctuation:
            name = word.text if word.occurrence == 0 else f"{word.text}#{word.occurrence + 1}"
            named[name] = tokens[list(found)].mean(dim=0).view(frames, rows, columns)[anchor]
    timings = {**seconds, "mask": time.perf_counter() - began}
    return Grounding(
        expression=seen.expression,
        point=point,
        mask=mask,
        box=box_of(mask),
        heat=heat,
        word_maps=named,
        table=scored.table,
        sinks=scored.sinks,
        flags=flags,
        timings=timings,
        size=size,
        model_size=seen.model_size,
        config=config,
        frame=frame,
        frame_maps=maps if len(seen.pixels) > 1 else None,
        track=track,
    )


def mask_rule(config: RefAMConfig) -> Any:
    """The rule of masks that are made without SAM."""
    return "region" if config.mask == "sam" else config.mask


def map_track(maps: Tensor, size: tuple[int, int], config: RefAMConfig, frame_step: int) -> Tensor:
    """(F, H, W) masks of the frames that were read, of each latent frame's own map.

    Args:
        maps: (latent frames, rows, columns).
        size: (H, W).
        config: settings.
        frame_step: frames of a latent frame after the first one.
    """
    grid = (maps.shape[1], maps.shape[2])
    masks = [mask_of(heat, centre(*peak(heat), grid, size), size, mask_rule(config)) for heat in maps]
    return torch.stack([masks[0], *(mask for mask in masks[1:] for _ in range(frame_step))])
