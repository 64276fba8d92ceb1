"""Second stage of the video model: the Wan transformer, trained jointly with its text encoder.

Training goes from single frames over short clips to whole ones. Colours, shapes and grounds are learnt from
frames of 64 tokens, of which a second of training sees twenty times as many as whole clips of 1088; what is
left for the whole clips is how things move.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffctrl.zoo import clips
from diffctrl.zoo.video import VideoSize, caption_ids, video_parts, video_pipeline

from .training_flow import FlowOptions, FlowTraining, Stage, placed
from .training_loop import say, training_device
from .training_pack import file_hash
from .training_video_forward import VideoForward, encode, to_rows
from .training_video_pack import RECOMMENDED, read_video_pack, write_video_pack
from .training_video_vae import SMOKE_SIZE, load_video_vae, rendered, sample_clips

_STAGES = ((0.0, 1, 16), (0.12, 5, 4), (0.27, 17, 1))
"""From which share of the budget on, how many latent frames, and how many times the batch of whole clips."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoFlowOptions(FlowOptions):
    """Options of the stage; a clip of the pool takes 70 kB on the device. `batch` counts whole clips; shorter
    stages take more.

    Args:
        whole: only whole clips from the start, as when going on from trained weights.
    """

    minutes: float = 12.0
    slice_seconds: float = 560.0
    batch: int = 64
    pool: int = 60_000
    whole: bool = False
    learning_rate: float = 2e-3
    warmup_steps: int = 300
    optimizer: str = "muon"
    chunk: int = 32
    check_minutes: float = 2.5
    check_captions: int = 32


class CaptionedClips:
    """Indices and fresh captions of the next batches, in tensors that a captured step reads.

    Args:
        scenes: clips on the device.
        batch: batch size.
        batches: steps per refill.
        empty_share: share of captions replaced by the empty one.
        detailed_share: share of captions that name everything.
    """

    def __init__(
        self,
        scenes: clips.Clips,
        *,
        batch: int,
        batches: int,
        empty_share: float = 0.1,
        detailed_share: float = 0.5,
    ) -> None:
        self.scenes, self.batches = scenes, batches
        self.empty_share, self.detailed_share = empty_share, detailed_share
        self.index = torch.zeros(batches, batch, dtype=torch.int64, device=scenes.device)
        self.ids = torch.zeros(batches, batch, 32, dtype=torch.int64, device=scenes.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=scenes.device)

    def refill(self) -> None:
        """Draw the next `batches` batches and start again at the first of them."""
        device, total = self.index.device, self.index.numel()
        index = torch.randint(len(self.scenes), (total,), device=device)
        uniforms = torch.rand(total, clips.CAPTION_UNIFORMS, device=device)
        uniforms = clips.detailed(uniforms, torch.rand(total, device=device) < self.detailed_share)
        words = clips.caption_words(self.scenes.select(index), uniforms)
        words = words.masked_fill(torch.rand(total, 1, device=device) < self.empty_share, -1)
        self.index.copy_(index.view_as(self.index))
        self.ids.copy_(caption_ids(words).view_as(self.ids))
        self.position.zero_()

    def next(self) -> tuple[Tensor, Tensor]:
        """(B,) clip indices and (B, 32) token ids at the position, which moves on by one."""
        index, ids = (source.index_select(0, self.position).squeeze(0) for source in (self.index, self.ids))
        self.position.add_(1).remainder_(self.batches)
        return index, ids


def train_video_flow(options: VideoFlowOptions, *, since: float) -> bool:
    """Run one slice of the training; returns whether the whole budget is spent."""
    device = training_device(smoke=options.smoke)
    options.state.mkdir(parents=True, exist_ok=True)
    rows, scenes = _pool(options, device, since)
    return VideoTraining(options, rows, scenes, device).run(since)


class VideoTraining(FlowTraining):
    """The training of the video model."""

    trained = ("transformer", "text_encoder")
    vae_facts = (
        "decoder_width",
        "latents_mean",
        "latents_std",
        "psnr_mean_db",
        "psnr_5th_percentile_db",
    )
    recorded = (*FlowTraining.recorded, "whole")

    def __init__(
        self, options: VideoFlowOptions, rows: Tensor, scenes: clips.Clips, device: torch.device
    ) -> None:
        torch.manual_seed(options.seed)
        parts = video_parts(SMOKE_SIZE if options.smoke else VideoSize())
        if options.start_from is not None:
            parts, _ = read_video_pack(options.start_from)
        parts.vae = load_video_vae(options.vae)
        super().__init__(options, placed(parts, self.trained, device), device)
        self.rows, self.scenes = rows, scenes
        self.forward = VideoForward(self.parts, compiled=options.compile and device.type == "cuda")
        self._judged: list[str] = []

    def stage_at(self, fraction: float) -> int:
        if self.options.whole:
            return len(_STAGES) - 1
        return max(index for index, (start, *_) in enumerate(_STAGES) if fraction >= start)

    def stage(self, number: int) -> Stage:
        """The first latent frames of clips."""
        _, frames, times = _STAGES[number]
        batch = self.options.batch * times
        batches = CaptionedClips(self.scenes, batch=batch, batches=self.options.chunk)

        def loss() -> Tensor:
            index, ids = batches.next()
            rows = self.rows[:, :frames].index_select(0, index)
            noise = torch.randn(rows.shape, device=self.device)
            return self.forward.loss(rows, ids, noise, self.noise_levels(batch))

        return Stage(batches, loss, batch, f"{frames} latent frame{'s' * (frames > 1)}  ")

    def check(self, label: str) -> None:
        """Draw unseen captions with the averaged weights and let the judge read the clips."""
        from .evaluation_video import judged_line, video_suite

        if not self.options.check_captions:
            return
        suite = video_suite(self.options.check_captions, seed=991)
        size = SMOKE_SIZE if self.options.smoke else VideoSize()
        pipeline: Any = video_pipeline(self.averaged, shift=self.options.shift)
        pipeline.set_progress_bar_config(disable=True)
        call = RECOMMENDED | {"num_inference_steps": 2} if self.options.smoke else RECOMMENDED
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            videos = pipeline(
                suite.captions,
                height=size.pixels,
                width=size.pixels,
                generator=torch.Generator().manual_seed(0),
                output_type="pt",
                **call,
            ).frames
        self._judged.append(f"{label}: {judged_line(videos.float().cpu(), suite)}")

    def news(self, *, wait: bool = False) -> Iterable[str]:
        lines, self._judged = self._judged, []
        return lines

    def write_pack(self, path: Path, facts: dict[str, Any]) -> None:
        write_video_pack(self.averaged, path, facts)


@torch.no_grad()
def encoded_rows(vae: Any, scenes: clips.Clips, *, device: torch.device, size: int) -> Tensor:
    """(N, F, P, 4 C) float16 on the device: posterior means of whole clips, scaled, as patches."""
    vae.to(device)
    shift, scale = (
        torch.tensor(values, device=device)[:, None, None, None]
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    rows: Tensor | None = None
    start = 0
    for videos, _ in rendered(scenes, device=device, size=size):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            mean = encode(vae, videos * 2 - 1)[0].float().transpose(1, 2)
        part = to_rows((mean - shift) / scale).half()
        if rows is None:
            rows = torch.empty(len(scenes), *part.shape[1:], dtype=torch.float16, device=device)
        rows[start : start + len(part)] = part
        start += len(part)
    if rows is None or not bool(torch.isfinite(rows).all()):
        raise ValueError("the encoded pool holds no finite latents; check the autoencoder's weights")
    return rows


def _pool(options: VideoFlowOptions, device: torch.device, since: float) -> tuple[Tensor, clips.Clips]:
    """Encoded clips and the clips; the latents come from the state folder when an earlier slice left them."""
    path = options.state / "pool.safetensors"
    source = f"{file_hash(options.vae)} {options.pool} {options.seed}"
    scenes = sample_clips(options.pool, seed=options.seed + 2)
    if path.is_file():
        with safe_open(path, framework="pt", device=str(device)) as file:
            if (file.metadata() or {}).get("source") == source:
                say(f"{options.pool} encoded clips loaded", since=since)
                return file.get_tensor("rows"), scenes.to(device)
    size = (SMOKE_SIZE if options.smoke else VideoSize()).pixels
    rows = encoded_rows(load_video_vae(options.vae), scenes, device=device, size=size)
    part = rows[:: max(1, len(rows) // 512)].float()
    say(
        f"{len(rows)} clips encoded, mean {part.mean().item():.3f}, deviation {part.std().item():.3f}",
        since=since,
    )
    if options.keep_pool:
        save_file({"rows": rows.cpu()}, path, metadata={"source": source})
        say("pool saved", since=since)
    return rows, scenes.to(device)
