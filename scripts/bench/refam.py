"""What a grounding costs: a whole call on FLUX.1 in its real size at 1024 px, over one forward of the model.

    python -m diffctrl.scripts.bench.refam --out docs/results/refam_speed.json [--quick] [--profile]
    python -m diffctrl.scripts.bench.refam --out docs/results/refam_speed_compiled.json --compile

Weights of transformer, autoencoder and both text encoders are random (bf16, made on the card); words are cut
by the embedded model's tokenizers, padded to FLUX's 512. A call goes from a PIL picture and an expression to
heat map, mask, box and point: both text encoders, autoencoder, forward with captures up to the last block
that is read, scoring, mask. Magnets are encoded once, in the first call. Compared is a forward of the stock
transformer with 512 text tokens, as it is sampled with; both begin and end with an idle card. In further
rounds the parts of the call are waited for one by one; in a call some of them overlap. The picture is noise,
whose mask is as ragged as they get. `--compile` has both text encoders and the autoencoder compiled, as a
user of many pictures would; the transformer stays as it is, in the call and in the forward that it is
compared with. On a CPU, or with --quick, a tiny model without bars: does it run?
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

import diffctrl
from diffctrl.pipelines import FluxRefAMPipeline
from diffctrl.pipelines import refam as grounding
from diffctrl.scripts.bench.capture import REAL, TINY, flux, flux_inputs, run
from diffctrl.scripts.bench.harness import Figure, card_state, print_figures, summarise, write_report
from diffctrl.zoo import tokenizers, worlds

SEED = 20264
EXPRESSION = "the large red dotted star left of the small blue striped ring on the gray background"


def filled(make: Callable[[], nn.Module], device: str) -> Any:
    """A module made where it runs: matrices of small random numbers, ones in norms, zeros elsewhere."""
    with torch.device("meta"):
        module = make()
    module = module.to(torch.bfloat16).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        for buffer in module.buffers():  # positions
            buffer.copy_(torch.arange(buffer.numel(), device=device).view(buffer.shape))
    return module.eval()


def pipeline(device: str, quick: bool) -> FluxRefAMPipeline:
    """FLUX.1 with the sizes of its published configurations."""
    t5: dict[str, Any] = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    clip: dict[str, Any] = {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    }  # fmt: skip
    channels: Any = (128, 256, 512, 512)
    shape = REAL
    if quick:
        t5 = {"d_model": TINY.text_width, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        clip |= {"num_hidden_layers": 1}
        channels, shape = (32, 32, 32, 32), TINY
    words_t5, words_clip = tokenizers.t5_tokenizer(worlds.WORDS), tokenizers.clip_tokenizer(worlds.WORDS)
    words_t5.model_max_length, words_clip.model_max_length = 512, 77
    down: Any = ("DownEncoderBlock2D",) * len(channels)
    up: Any = ("UpDecoderBlock2D",) * len(channels)
    transformer: Any = flux(shape, device)
    pipe = FluxRefAMPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=filled(
            lambda: AutoencoderKL(
                block_out_channels=channels, latent_channels=16, layers_per_block=2,
                down_block_types=down,
                up_block_types=up,
                use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159,
            ),
            device,
        ),
        text_encoder=filled(
            lambda: CLIPTextModel(CLIPTextConfig(vocab_size=4096, bos_token_id=0, eos_token_id=1, **clip)),
            device,
        ),
        tokenizer=words_clip,
        text_encoder_2=filled(
            lambda: T5EncoderModel(
                T5Config(vocab_size=4096, feed_forward_proj="gated-gelu", dropout_rate=0.0, **t5)
            ),
            device,
        ),
        tokenizer_2=words_t5,
        transformer=transformer,
    )  # fmt: skip
    pipe.default_sample_size = 128 * shape.side // REAL.side
    pipe.set_progress_bar_config(disable=True)
    return pipe


def compile_beside(pipe: FluxRefAMPipeline) -> None:
    """Compile all but the transformer, in place; the small kernels of text encoders are replayed."""
    pipe.text_encoder.compile(mode="reduce-overhead")
    pipe.text_encoder_2.compile(mode="reduce-overhead")
    pipe.vae.encoder.compile()


def timed(call: Callable[[], Any], device: str) -> tuple[float, Any]:
    """(milliseconds by the host's clock, what was returned): a call ends with its result on the host."""
    start = idle(device)
    found = call()
    return 1e3 * (idle(device) - start), found


def parts(pipe: FluxRefAMPipeline, call: Callable[[], Any], device: str) -> dict[str, float]:
    """Milliseconds of one call by part, each begun and ended with an idle card; CLIP and T5 are text's."""
    reader = pipe.reader
    places: dict[str, tuple[Any, str]] = {
        "picture to tensor": (grounding, "frames_of"),
        "autoencoder": (reader, "encode"),
        "text": (reader, "learn"),
        "text: CLIP": (pipe, "_get_clip_prompt_embeds"),
        "text: T5": (pipe, "_get_t5_prompt_embeds"),
        "processors put on": (diffctrl, "apply"),
        "noise": (reader, "noised"),
        "forward": (reader, "forward"),
        "score": (grounding, "score"),
        "maps of tokens": (grounding, "token_maps"),
        "mask": (grounding, "finish"),
    }
    found: dict[str, float] = defaultdict(float)

    def watched(name: str, stock: Callable[..., Any]) -> Callable[..., Any]:
        def run_watched(*args: Any, **kwargs: Any) -> Any:
            began = idle(device)
            try:
                return stock(*args, **kwargs)
            finally:  # a forward ends with an exception, after the last block that is read
                found[name] += 1e3 * (idle(device) - began)

        return run_watched

    with ExitStack() as stack:
        for name, (owner, attribute) in places.items():
            stack.enter_context(patch.object(owner, attribute, watched(name, getattr(owner, attribute))))
        whole, _ = timed(call, device)
    return {**found, "the rest": whole - sum(each for name, each in found.items() if ":" not in name)}


def idle(device: str) -> float:
    """The host's clock once the card has nothing to do."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--compile", action="store_true", help="text encoders and autoencoder compiled")
    parser.add_argument("--quick", action="store_true", help="a tiny model, few rounds")
    parser.add_argument("--profile", action="store_true", help="print what one call spends its time on")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    quick = args.quick or device == "cpu"
    pipe, inputs = pipeline(device, quick), flux_inputs(TINY if quick else REAL, device)
    if args.compile:
        compile_beside(pipe)
    side = pipe.default_sample_size * pipe.vae_scale_factor
    pixels = np.random.default_rng(SEED).integers(0, 256, (side, side, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    model: Any = pipe.transformer
    times: dict[str, list[float]] = defaultdict(list)
    rounds = 2 if quick else args.rounds
    found: Any = None

    def ground() -> Any:
        return pipe(picture, EXPRESSION)

    warm = 4 if args.compile else 2  # replayed graphs are recorded in the third run
    for turn in range(rounds + warm):
        forward, _ = timed(lambda: run(model, inputs), device)
        call, found = timed(ground, device)
        if turn < warm:  # kernels compile and are tested, and magnets are encoded
            continue
        times["forward"].append(forward)
        times["call"].append(call)
        for name, seconds in found.timings.items():
            times[f"host in {name}"].append(1e3 * seconds)
    if not bool(found.heat.isfinite().all()) or found.box is None:
        raise RuntimeError("the random model found nothing: its weights are badly scaled")
    for _ in range(rounds):
        for name, milliseconds in parts(pipe, ground, device).items():
            times[f"alone: {name}"].append(milliseconds)
    what = f"{len(found.table)} text tokens, a mask of {float(found.mask.float().mean()):.0%}"
    forward, call = (summarise(times[name]) for name in ("forward", "call"))
    figures = [
        Figure("stock forward", forward.median, forward.low, forward.high, "ms", note=f"{side} px"),
        Figure("grounding call", call.median, call.low, call.high, "ms", note=what),
        *(
            Figure(name, summarise(each).median, unit="ms")
            for name, each in times.items()
            if name not in ("forward", "call")
        ),
        Figure(
            "grounding call over forward", call.median / forward.median, call.low / forward.high,
            call.high / forward.low, "x", None if quick else 1.3, "<=",
        ),
    ]  # fmt: skip
    print_figures(figures)
    topic = "refam_speed_compiled" if args.compile else "refam_speed"
    write_report(args.out, topic, figures, seeds=[SEED], card=card_state())
    if args.profile:
        with torch.profiler.profile() as profile:
            ground()
        for order in ("self_cuda_time_total", "self_cpu_time_total"):
            print(profile.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60))


if __name__ == "__main__":
    main()
