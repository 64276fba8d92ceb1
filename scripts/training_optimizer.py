"""Optimiser, clipping, weight average and learning rate of the trainings, all without host synchronisation.

Everything that changes while training runs (learning rate, step count, averaging weight) lives in tensors,
so a captured step keeps following it.
"""

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

# Quintic Newton-Schulz coefficients of Muon (Jordan et al. 2024): steep at zero, near one on [0.7, 1.2].
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_AVERAGE_LIMIT = 0.999


def orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly: singular values end between about 0.7 and 1.2.

    Args:
        matrices: (N, R, C) any float dtype; computed in bfloat16, which the iteration tolerates and CPUs are
            slow at: there in float32.
        steps: Newton-Schulz steps.

    Returns:
        (N, R, C) of the dtype that it was computed in.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    work = matrices.mT if tall else matrices
    norm = torch.linalg.vector_norm(work, dim=(1, 2), keepdim=True)
    work = (work / (norm + 1e-7)).to(torch.float32 if work.device.type == "cpu" else torch.bfloat16)
    first, second, third = _NEWTON_SCHULZ
    for _ in range(steps):
        gram = work @ work.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=second, alpha=third)
        work = torch.baddbmm(work, polynomial, work, beta=first)
    return work.mT if tall else work


class Muon:
    """Momentum whose update is orthogonalised, for hidden matrices; same shapes are updated as one stack.

    Update: `W <- (1 - lr wd) W - lr * 0.2 sqrt(max(R, C)) * orthogonalised(nesterov momentum)`; the factor
    gives the update the size of an AdamW update (Liu et al. 2025, "Muon is scalable for LLM training",
    equation 4).

    Args:
        named: parameters of two dimensions.
        learning_rate: 0-dim float32 tensor on the parameters' device, read at every step.
        momentum: Nesterov momentum.
        weight_decay: decoupled weight decay.
    """

    def __init__(
        self,
        named: dict[str, nn.Parameter],
        learning_rate: Tensor,
        *,
        momentum: float = 0.95,
        weight_decay: float,
    ) -> None:
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.weight_decay = weight_decay
        # Any: torch annotates its fused operations for lists of plain tensors only.
        groups: dict[tuple[int, ...], list[Any]] = defaultdict(list)
        for name, parameter in named.items():
            if parameter.dim() != 2:
                raise ValueError(f"Muon takes matrices; {name} has shape {tuple(parameter.shape)}")
            groups[tuple(parameter.shape)].append(parameter)
        self.groups = dict(groups)
        self.buffers = {
            shape: torch.zeros(len(members), *shape, device=learning_rate.device)
            for shape, members in self.groups.items()
        }

    @torch.no_grad()
    def step(self) -> None:
        """One update from the gradients that the parameters hold."""
        shrink = 1.0 - self.learning_rate * self.weight_decay
        for shape, members in self.groups.items():
            gradient = torch.stack([member.grad for member in members])
            buffer = self.buffers[shape]
            buffer.lerp_(gradient, 1.0 - self.momentum)
            direction = orthogonalised(gradient.lerp_(buffer, self.momentum))
            update = direction.float() * (self.learning_rate * (0.2 * math.sqrt(max(shape))))
            torch._foreach_mul_(members, shrink)
            torch._foreach_sub_(members, list(update.unbind(0)))

    def state_tensors(self) -> dict[str, Tensor]:
        """Momentum stacks by name; the same objects, so that a checkpoint can be copied into them."""
        return {f"muon.{'x'.join(map(str, shape))}": buffer for shape, buffer in self.buffers.items()}


class Optimizer:
    """AdamW for everything, or Muon for hidden matrices and AdamW for the rest; clips first.

    Args:
        named: every trained parameter by name.
        kind: "adamw" or "muon".
        weight_decay: decoupled decay of matrices; biases, norms and embeddings have none.
        max_norm: gradients are scaled down to this total norm.
    """

    def __init__(
        self, named: dict[str, nn.Parameter], *, kind: str, weight_decay: float = 0.01, max_norm: float = 1.0
    ) -> None:
        if kind not in ("adamw", "muon"):
            raise ValueError(f"optimizer kind must be 'adamw' or 'muon', got {kind!r}")
        self.named = named
        self.parameters = list(named.values())
        self.max_norm = max_norm
        device = self.parameters[0].device
        self.learning_rate = torch.zeros((), device=device)
        hidden = {
            name: value for name, value in named.items() if kind == "muon" and _is_hidden_matrix(name, value)
        }
        self.muon = Muon(hidden, self.learning_rate, weight_decay=weight_decay) if hidden else None
        rest = {name: value for name, value in named.items() if name not in hidden}
        decayed = [value for name, value in rest.items() if _decays(name, value)]
        kept = [value for name, value in rest.items() if not _decays(name, value)]
        self.adamw = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}],
            lr=self.learning_rate,
            betas=(0.9, 0.99),
            fused=True,
            capturable=device.type == "cuda",
        )
        for value in rest.values():  # made now, not at the first step, so that a checkpoint can fill it
            self.adamw.state[value] = {
                "step": torch.zeros((), device=device),
                "exp_avg": torch.zeros_like(value),
                "exp_avg_sq": torch.zeros_like(value),
            }

    def set_learning_rate(self, value: float) -> None:
        """Takes effect at the next step, captured or not."""
        self.learning_rate.fill_(value)

    def zero_grad(self) -> None:
        """Drop the gradients, so that the next backward pass writes instead of adding."""
        for parameter in self.parameters:
            parameter.grad = None

    def step(self) -> None:
        """Clip and update."""
        nn.utils.clip_grad_norm_(self.parameters, self.max_norm, foreach=True)
        self.adamw.step()
        if self.muon is not None:
            self.muon.step()

    def state_tensors(self) -> dict[str, Tensor]:
        """Every state tensor by name; the same objects, so that a checkpoint can be copied into them."""
        tensors = self.muon.state_tensors() if self.muon is not None else {}
        for name, value in self.named.items():
            for key, state in self.adamw.state.get(value, {}).items():
                tensors[f"adamw.{name}.{key}"] = state
        return tensors


class WeightAverage:
    """Exponential average of parameters with the ramp `(1 + k) / (10 + k)`, at most 0.999.

    Args:
        parameters: the trained parameters.
        averages: as many tensors, equal to the parameters at the start.
    """

    def __init__(self, parameters: list[Tensor], averages: list[Tensor]) -> None:
        self.parameters = parameters
        self.averages = averages
        self.count = torch.zeros((), device=parameters[0].device)

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the parameters."""
        self.count.add_(1.0)
        weight = 1.0 - ((1.0 + self.count) / (10.0 + self.count)).clamp_max(_AVERAGE_LIMIT)
        difference = torch._foreach_sub(self.parameters, self.averages)
        torch._foreach_mul_(difference, weight)
        torch._foreach_add_(self.averages, difference)


def learning_rate_at(
    fraction: float, step: int, *, peak: float, warmup_steps: int, last: float = 1e-5
) -> float:
    """Linear warm-up by steps, constant to 60 % of the budget, then cosine down to `last`.

    Args:
        fraction: elapsed share of the training budget, in [0, 1].
        step: steps done so far.
        peak: learning rate after the warm-up.
        warmup_steps: length of the warm-up.
        last: learning rate at the end of the budget.
    """
    rate = peak * min(1.0, (step + 1) / max(1, warmup_steps))
    if fraction > 0.6:
        part = min(1.0, (fraction - 0.6) / 0.4)
        rate = min(rate, last + 0.5 * (peak - last) * (1.0 + math.cos(math.pi * part)))
    return rate


def _is_hidden_matrix(name: str, value: Tensor) -> bool:
    """Attention and feed-forward matrices of a layer; embeddings, modulation and output are not."""
    inside = any(part in name for part in ("transformer_blocks.", ".blocks.", ".layers.", ".block."))
    outside = "norm" in name or "embed" in name or "relative_attention_bias" in name
    return value.dim() == 2 and inside and not outside


def _decays(name: str, value: Tensor) -> bool:
    table = any(
        part in name
        for part in ("token_embedding", "embed_tokens", "position_embedding", "shared", "relative_attention")
    )
    return value.dim() >= 2 and not table
