"""One step of training a length LoRA at real size: under the radial mask against the best dense attention.

    python -m diffctrl.scripts.bench.length --out docs/results/length_training.json [--part wan,hunyuan]

Forward with gradient checkpointing, backward and update, bf16, one clip, a LoRA of rank 128. A whole model's
step is put together from steps with one and with two blocks of each kind: what a block adds, times their
number, and what one block more takes that stays dense. Dense attention runs through the same processor with
the best dense kernel that has a backward. `--dry-run` times tiny models, on a CPU as well.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import diffctrl
from diffctrl.lengthening.plan import DENSE_BLOCKS
from diffctrl.lengthening.targets import targets
from diffctrl.lengthening.train import add_adapter, processor
from diffctrl.radial import Layout, density
from diffctrl.scripts.bench.forwards import Bench, Times, peak, ratio, timed
from diffctrl.scripts.bench.harness import Figure, card_state, print_table, write_report
from diffctrl.scripts.bench.video_models import HUNYUAN, HUNYUAN_LONG, QUICK, WAN, VideoModel

RANK = 128
ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Case:
    """One model at one length.

    Attributes:
        paper: the speed-up of training that the paper reports.
    """

    model: VideoModel
    paper: float


CASES = {
    "wan": Case(replace(WAN, name="Wan2.1-14B 720p 161 frames", latents=(41, 90, 160)), 1.93),
    "hunyuan2x": Case(replace(HUNYUAN, name="HunyuanVideo 720p 253 frames", latents=(64, 90, 160)), 2.78),
    "hunyuan4x": Case(HUNYUAN_LONG, 4.37),
}
_TINY = {"wan": QUICK[WAN.name], "hunyuan2x": QUICK[HUNYUAN.name], "hunyuan4x": QUICK[HUNYUAN_LONG.name]}


def mask_of(bench: Bench) -> dict[str, Any]:
    """The mask of training, no block and no noise level dense."""
    block = 16 if bench.quick else 128
    return {"decay_factor": 1.0, "sink": True, "dense_blocks": 0, "dense_fraction": 0.0, "block": block}


class Step:
    """A training step of a model with so many blocks of each kind.

    Args:
        bench: where it runs.
        subject: the model, its `blocks` as many as are wanted.
    """

    def __init__(self, bench: Bench, subject: VideoModel) -> None:
        model: Any = subject.make(bench.device, bench.dtype)
        joint = subject.text > 0
        adapter = add_adapter(
            model, targets(model, added=joint, cross=False), rank=4 if bench.quick else RANK,
            lora_alpha=RANK, seed=0,
        )  # fmt: skip
        model.to(bench.device).train().enable_gradient_checkpointing()
        self.model = model
        self.inputs = subject.inputs(model, bench.device, bench.dtype, subject.latents)
        if "encoder_attention_mask" in self.inputs:  # one clip has no padding: see `VelocityModel.trimmed`
            valid = int(self.inputs["encoder_attention_mask"].sum())
            for name in ("encoder_hidden_states", "encoder_attention_mask"):
                self.inputs[name] = self.inputs[name][:, :valid]
        self.optimizer = torch.optim.AdamW(adapter.values(), lr=1e-4, fused=bench.device == "cuda")

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.model(**self.inputs, return_dict=False)[0].float().square().mean().backward()
        self.optimizer.step()


def measured(bench: Bench, subject: VideoModel) -> dict[str, dict[str, Times]]:
    """Contender -> counts of blocks ("one", or the stack that has two) -> its times."""
    contenders = {"dense": processor(None), "radial": processor(mask_of(bench))}
    wanted = {"one": dict.fromkeys(subject.blocks, 1)}
    wanted |= {stack: {**wanted["one"], stack: 2} for stack in subject.blocks}
    found: dict[str, dict[str, Times]] = {name: {} for name in contenders}
    for label, blocks in wanted.items():
        step = Step(bench, replace(subject, blocks=blocks))
        for name in contenders:
            found[name][label] = Times([], 0.0)
        for turn in range(ROUNDS + 1):
            for name, control in contenders.items():
                with diffctrl.apply(step.model, control):
                    _once(bench, found[name][label], step, keep=turn > 0)
        last = ", ".join(f"{name} {found[name][label].median:.3f} s" for name in contenders)
        print(f"  two of {label}: {last}" if label != "one" else f"  one of each: {last}", flush=True)
        del step
        gc.collect()
        if bench.device == "cuda":
            torch.cuda.empty_cache()
    return found


def _once(bench: Bench, times: Times, step: Callable[[], None], keep: bool) -> None:
    taken: list[float] = []
    memory = peak(bench, lambda: taken.append(timed(bench, step)))
    times.memory = max(times.memory, memory)
    if keep:  # the first round compiles
        times.seconds.append(taken[0])


def whole(found: dict[str, dict[str, Times]], counts: dict[str, int], sparse: bool) -> Times:
    """A step of the whole model; under the mask its first blocks are dense."""
    name = "radial" if sparse else "dense"
    first = next(iter(counts))
    made = []
    for turn in range(ROUNDS):
        one = found[name]["one"].seconds[turn]
        each = {stack: found[name][stack].seconds[turn] - one for stack in counts}
        total = one + sum(each[stack] * (count - 1) for stack, count in counts.items())
        if sparse:
            dense = found["dense"][first].seconds[turn] - found["dense"]["one"].seconds[turn]
            total += min(DENSE_BLOCKS, counts[first]) * (dense - each[first])
        made.append(total)
    return Times(made, max(times.memory for times in found[name].values()))


def figures_of(bench: Bench, part: str) -> list[Figure]:
    """The step of one model, dense and radial, and their ratio."""
    case = CASES[part]
    subject = _TINY[part] if bench.quick else case.model
    found = measured(bench, subject)
    dense, radial = (whole(found, subject.blocks, sparse) for sparse in (False, True))
    figures = []
    for name, times in (("dense", dense), ("radial", radial)):
        note = f"peak {times.memory:.1f} GB with two blocks of a kind" if times.memory else ""
        figures.append(times.figure(f"{part}: training step, {name}", note))
    frames, tokens = subject.tokens
    made, _ = processor(mask_of(bench)).resolved(subject.name, frames)  # nothing of it is left to a preset
    share = density(made, Layout(frames=frames, tokens=tokens, text=subject.text))
    note = (
        f"{subject.name}, {frames * tokens} tokens, density {share:.3f} but for {DENSE_BLOCKS} dense blocks; "
        f"the paper reports {case.paper:g}x on 8 cards"
    )
    return [*figures, ratio(f"{part}: training step, speed-up of radial", dense, radial, None, note)]


def main(arguments: list[str] | None = None) -> list[Figure]:
    """Entry point; `arguments` as on the command line. Returns the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--part", default="wan,hunyuan2x", help=f"some of {', '.join(CASES)}")
    parser.add_argument(
        "--quick",
        "--dry-run",
        dest="dry_run",
        action="store_true",
        help="tiny models, on a CPU where there is no GPU",
    )
    options = parser.parse_args(arguments)
    parts = options.part.split(",")
    if unknown := sorted(set(parts) - set(CASES)):
        parser.error(f"--part {unknown[0]} is not one of {', '.join(CASES)}")
    cuda = torch.cuda.is_available()
    if not cuda and not options.dry_run:
        parser.error("there is no GPU here; --dry-run times tiny models on a CPU")
    if cuda:
        torch.set_float32_matmul_precision("high")  # as in training
    bench = Bench("cuda" if cuda else "cpu", torch.bfloat16 if cuda else torch.float32, options.dry_run)
    figures: list[Figure] = []
    states = [card_state()]
    for part in parts:
        print(f"{part}:", flush=True)
        start = time.perf_counter()
        figures += figures_of(bench, part)
        states.append(card_state())
        write_report(options.out, "length_training", figures, seeds=[0], card=states)
        print(f"  {time.perf_counter() - start:.0f} s", flush=True)
    print_table(["figure", "value", "note"], [[f.name, f"{f.value:.3f} {f.unit}", f.note] for f in figures])
    return figures


if __name__ == "__main__":
    main()
