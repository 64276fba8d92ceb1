"""What SoftPAG costs at real size: a control at rest, an active one, and how many forwards are guided.

    python -m diffctrl.scripts.bench.softpag --out docs/results/softpag.json

Full-size models with random weights, 1024 x 1024. At rest the forward is compared with the stock one. Active,
it runs a perturbed row more: it is compared with a stock forward of as many rows, so that what is left is the
work of the processors, of appending rows and of adding the difference.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import diffctrl
from diffctrl.processors import SoftPAGAttnProcessor
from diffctrl.scripts.bench.harness import Clock, Figure, card_state, print_figures, summarise, write_report

BAR = 2.0
STEPS, WINDOW = 10, 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model.

    Attributes:
        name: of the model.
        model_class: of diffusers.
        config: of the full model; small: what is smaller in the dry run.
        heads: what the active control perturbs: single heads of several layers.
        rows: of the stock forward: 2 with classifier-free guidance in one batch.
    """

    name: str
    model_class: str
    config: dict[str, Any]
    small: dict[str, Any]
    heads: str
    rows: int


_SD3 = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "qk_norm": "rms_norm",
}
_SMALL_SD3 = {
    "num_layers": 3,
    "num_attention_heads": 2,
    "caption_projection_dim": 128,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "dual_attention_layers": (0,),
}
CASES = (
    Case(
        name="SD3.5 medium",
        model_class="SD3Transformer2DModel",
        config=_SD3
        | {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
        }
        | {"dual_attention_layers": tuple(range(13))},
        small=_SMALL_SD3,
        heads="L7H1,L8H3,L9H5",
        rows=2,
    ),
    Case(
        name="SD3.5 large",
        model_class="SD3Transformer2DModel",
        config=_SD3
        | {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
        },
        small=_SMALL_SD3 | {"dual_attention_layers": ()},
        heads="L7H1,L8H3,L9H5",
        rows=2,
    ),
    Case(
        name="FLUX.1-dev",
        model_class="FluxTransformer2DModel",
        config={
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
            "axes_dims_rope": (16, 56, 56),
        },
        small={"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 32},
        heads="L7H1,L38H18,L51H23",
        rows=1,
    ),
)


class _Scheduler:
    """Says which step runs; the benchmark moves it."""

    def __init__(self) -> None:
        self.timesteps = torch.linspace(1000, 100, STEPS)
        self.step_index, self.begin_index = 0, None


def build(case: Case, device: str, quick: bool) -> nn.Module:
    """The model with random weights, made without a copy on the CPU."""
    import diffusers

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device("meta"):
        model: Any = getattr(diffusers, case.model_class)(**case.config | (case.small if quick else {}))
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.normal_(std=0.02, generator=generator)
    return model


def inputs_of(model: Any, case: Case, rows: int, device: str, quick: bool) -> dict[str, Any]:
    """A forward of `rows` equal rows at 1024 x 1024."""
    side, text = (8, 7) if quick else (64, 512 if "Flux" in case.model_class else 333)
    config, dtype = model.config, next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(1)

    def made(*size: int) -> Tensor:
        return torch.randn(1, *size, generator=generator).expand(rows, *size).to(device, dtype)

    common = {
        "encoder_hidden_states": made(text, config.joint_attention_dim),
        "pooled_projections": made(config.pooled_projection_dim),
    }
    if "Flux" not in case.model_class:
        latents = made(config.in_channels, 2 * side, 2 * side)
        timestep = torch.full((rows,), 500.0, device=device)
        return {**common, "hidden_states": latents, "timestep": timestep}
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(side).float(), torch.arange(side).float())
    return {
        **common,
        "hidden_states": made(side * side, config.in_channels),
        "timestep": torch.full((rows,), 0.5, device=device, dtype=dtype),
        "guidance": torch.full((rows,), 3.5, device=device),
        "img_ids": grid.to(device),
        "txt_ids": torch.zeros(text, 3, device=device),
    }


def timed(call: Callable[[], Any], device: str) -> float:
    """Milliseconds of one call."""
    if device == "cpu":
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure(case: Case, device: str, options: argparse.Namespace) -> list[Figure]:
    """Overheads of one model: the two of a pair are timed in turn, and their ratio is taken each time."""
    model = build(case, device, options.quick)
    scheduler = _Scheduler()
    few, more = (inputs_of(model, case, rows, device, options.quick) for rows in (case.rows, case.rows + 1))
    heads = "L0H1" if options.quick else case.heads
    layout: Any = "uncond_cond" if case.rows == 2 else "cond"

    def control(start: float) -> Any:
        processor = SoftPAGAttnProcessor(heads, u=0.5, w=3.0, start_fraction=start)
        return diffctrl.apply(model, processor, scheduler=scheduler, batch_layout=layout)

    def forward(inputs: dict[str, Any]) -> Tensor:
        return model(**inputs, return_dict=False)[0]

    pairs = {"at rest": (few, lambda: control(0.9), few), "active": (more, lambda: control(0.0), few)}
    figures, clock = [], Clock()
    with torch.no_grad():
        for name, (stock_inputs, make, inputs) in pairs.items():
            times: dict[str, list[float]] = {"stock": [], "control": []}
            for turn in range(options.rounds + 1):
                stock = timed(lambda given=stock_inputs: forward(given), device)
                with make():
                    forward(inputs)  # the first one builds what the next ones read
                    ours = timed(lambda given=inputs: forward(given), device)
                if turn:
                    times["stock"].append(stock)
                    times["control"].append(ours)
            ratios = [100 * (b / a - 1) for a, b in zip(times["stock"], times["control"], strict=True)]
            ratio, stock = summarise(ratios), summarise(times["stock"])
            rows = len(stock_inputs["hidden_states"])
            note = f"stock {stock.median:.1f} ms with {rows} rows; {clock.mhz()} MHz"
            figures.append(
                Figure(
                    f"{case.name}: overhead, control {name}",
                    ratio.median,
                    ratio.low,
                    ratio.high,
                    "%",
                    BAR,
                    "<=",
                    note,
                )
            )
        figures += _counted(case, model, few, scheduler, control_of=heads, layout=layout)
    return figures


def _counted(
    case: Case,
    model: nn.Module,
    inputs: dict[str, Any],
    scheduler: _Scheduler,
    *,
    control_of: str,
    layout: Any,
) -> list[Figure]:
    """Forwards of ten steps whose first three are guided, each perturbed row in a forward of its own."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    per_step = []
    processor = SoftPAGAttnProcessor(control_of, mode="sequential", stop_fraction=WINDOW)
    with diffctrl.apply(model, processor, scheduler=scheduler, batch_layout=layout):
        handle = model.register_forward_pre_hook(count)
        for step in range(STEPS):
            scheduler.step_index, calls = step, 0
            model(**inputs, return_dict=False)
            per_step.append(calls - 1)
        handle.remove()
    scheduler.step_index = 0
    inside, outside = per_step[: int(STEPS * WINDOW)], per_step[int(STEPS * WINDOW) :]
    note = f"{STEPS} steps, window [0, {WINDOW})"
    return [
        Figure(
            f"{case.name}: extra forwards of a guided step",
            max(inside),
            min(inside),
            max(inside),
            "",
            1.0,
            "<=",
            note,
        ),
        Figure(
            f"{case.name}: extra forwards outside of the window",
            sum(outside),
            None,
            None,
            "",
            0.0,
            "<=",
            note,
        ),
    ]


def main(arguments: list[str] | None = None) -> list[Figure]:
    """Entry point; `arguments` as on the command line. Returns the figures."""
    options = _parser().parse_args(arguments)
    device = "cpu" if options.quick or not torch.cuda.is_available() else "cuda"
    if options.quick:
        options.rounds = 2
    elif device == "cpu":
        raise SystemExit("full-size models need a GPU; --quick runs small ones on a CPU")
    figures: list[Figure] = []
    states = [card_state()]
    for case in CASES:
        if options.models and case.name not in options.models.split(","):
            continue
        began = time.monotonic()
        figures += measure(case, device, options)
        states.append(card_state())
        write_report(options.out, "softpag", figures, seeds=[0, 1], card=states)
        print(f"{case.name}: {time.monotonic() - began:.0f} s", flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    print_figures(figures)
    return figures


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", help=f"comma-separated, of {', '.join(case.name for case in CASES)}")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--quick", action="store_true", help="small models on a CPU: does it run?")
    parser.add_argument("--out", type=Path)
    return parser


if __name__ == "__main__":
    main()
