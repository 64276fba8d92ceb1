"""First stage of the image and of the video model: the loss and the loop of an autoencoder's training."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .training_loop import Clock, StepRunner, say
from .training_optimizer import Optimizer, learning_rate_at

_EDGE_WEIGHT = 0.5

Objective = Callable[[Tensor, Tensor], Tensor]


def vae_objective(
    encode: Callable[[Tensor], tuple[Tensor, Tensor]],
    decode: Callable[[Tensor], Tensor],
    *,
    channels_last: bool = False,
    deviation: Tensor | None = None,
    emphasis: float = 10.0,
) -> Objective:
    """The loss terms (4,) float32 - L1, MSE, edges, KL - of bytes (B, ..., C, H, W); noise as the latents.

    A fourth channel of the bytes is no colour: it says how much more a pixel counts, 255 for `emphasis`.

    Args:
        encode: pictures or clips in [-1, 1] to mean and log variance of their latents.
        decode: the reverse.
        channels_last: pictures in that memory format.
        deviation: of the noise, in the latents' shape but for the batch; None takes the posterior's.
        emphasis: how much more than others a pixel near an object counts, where a pool says which ones are.
    """

    def objective(samples: Tensor, noise: Tensor) -> Tensor:
        target = samples[..., :3, :, :].float() / 127.5 - 1.0
        if channels_last:
            target = target.contiguous(memory_format=torch.channels_last)
        mean, log_variance = (part.float() for part in encode(target))
        log_variance = log_variance.clamp(-30.0, 20.0)
        spread = (0.5 * log_variance).exp() if deviation is None else deviation
        difference = decode(mean + spread * noise).float() - target
        kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance)
        absolute, square = difference.abs(), difference.square()
        down, across = difference.diff(dim=-2).abs(), difference.diff(dim=-1).abs()
        if samples.shape[-3] > 3:
            counts = 1.0 + emphasis / 255 * samples[..., 3:, :, :].float()
            absolute, square = absolute * counts, square * counts
            down, across = down * counts[..., 1:, :], across * counts[..., 1:]
        return torch.stack([absolute.mean(), square.mean(), down.mean() + across.mean(), kl.mean()])

    return objective


def run_vae_training(
    vae: Any, pool: Tensor, objective: Objective, latent_shape: tuple[int, ...], options: Any, since: float
) -> tuple[int, float]:
    """Train on random samples of the pool to the end of the budget.

    Args:
        vae: in training mode, on the pool's device.
        pool: (N, ...) uint8.
        objective: of `vae_objective`.
        latent_shape: of one sample.
        options: of the stage: minutes, batch, learning_rate, kl, compile, graph, smoke.
        since: what the lines of progress count from.

    Returns:
        Steps, and minutes of training.
    """
    device = pool.device
    on_gpu = device.type == "cuda"
    trained = {name: each for name, each in vae.named_parameters() if each.requires_grad}
    optimizer = Optimizer(trained, kind="adamw")
    weights = torch.tensor([1.0, 1.0, _EDGE_WEIGHT, options.kl], device=device)
    totals = torch.zeros(4, device=device)
    clock = Clock(options.minutes * 60)
    if options.compile and on_gpu:
        objective = torch.compile(objective, dynamic=False)

    def step() -> None:
        optimizer.zero_grad()
        index = torch.randint(len(pool), (options.batch,), device=device)
        noise = torch.randn((options.batch, *latent_shape), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            parts = objective(pool.index_select(0, index), noise)
        (parts * weights).sum().backward()
        optimizer.step()
        totals.add_(parts.detach())

    runner = StepRunner(step, device, graph=options.graph)
    optimizer.set_learning_rate(options.learning_rate / 100)
    runner.prepare()
    say("step compiled" + (" and captured" if options.graph else ""), since=since)
    totals.zero_()
    done, chunk = runner.WARM_UP, 2 if options.smoke else 50
    reported, reported_at = done, 0.0
    clock.start()
    while not clock.finished:
        warmup = 4 if options.smoke else 200
        rate = learning_rate_at(clock.fraction, done, peak=options.learning_rate, warmup_steps=warmup)
        optimizer.set_learning_rate(rate)
        weights[3] = options.kl * (1.0 if clock.fraction < 0.7 else 0.5)
        runner.run(chunk)
        done += chunk
        values = totals.tolist()  # waits for the chunk, so the clock is true
        if clock.elapsed_seconds - reported_at > 10 or clock.finished:
            absolute, square, edge, kl = (value / (done - reported) for value in values)
            speed = (done - reported) / (clock.elapsed_seconds - reported_at)
            say(
                f"vae step {done}  L1 {absolute:.4f}  MSE {square:.5f}  edge {edge:.4f}  KL {kl:.2f}  "
                f"lr {rate:.1e}  {speed:.1f} steps/s  {speed * options.batch:.0f} samples/s",
                since=since,
            )
            if not sum(values) < float("inf"):
                raise SystemExit("the loss is not finite; lower --learning-rate")
            totals.zero_()
            reported, reported_at = done, clock.elapsed_seconds
    return done, clock.elapsed_seconds / 60


def float16_weights(vae: Any) -> dict[str, Tensor]:
    """The weights as they are stored.

    Raises:
        SystemExit: float16 cannot hold one of them.
    """
    weights = {name: value.detach().half().cpu().contiguous() for name, value in vae.state_dict().items()}
    if not all(bool(torch.isfinite(value).all()) for value in weights.values()):
        raise SystemExit("the trained autoencoder has weights that float16 cannot hold")
    return weights
