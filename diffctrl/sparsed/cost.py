"""What a sparse run is predicted to gain over a dense one, and where it is not worth it.

In floating point operations: a token costs 2 per weight of the linear layers, and 4 S H D per layer in dense
attention. Those of attention are weighted by how well the kernels of a device use it, relative to its dense
kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffctrl.sparsed.config import SparseDConfig
from diffctrl.sparsed.layout import RowBlocks
from diffctrl.sparsed.schedule import Phase, Schedule
from diffctrl.sparsed.selection import quota


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a step costs.

    Attributes:
        layers: attention layers.
        heads, kv_heads, head_dim: of each.
        linear_weights: weights that every token is multiplied with: all but embedding and language head (the
            head runs on few tokens of a step).
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    linear_weights: int

    def linear(self, tokens: int) -> float:
        """Operations of a step outside of attention."""
        return 2.0 * self.linear_weights * tokens

    def attention(self, tokens: int) -> float:
        """Operations of dense attention of a step."""
        return 4.0 * self.layers * self.heads * self.head_dim * float(tokens) ** 2


@dataclass(frozen=True, slots=True)
class Device:
    """Break-even of a kind of device.

    Attributes:
        least_tokens: shorter rows stay dense: launches and lists cost more than the blocks that are left out.
        sparse_rate: speed of the sparse kernel per operation, over the dense kernel's.
        build_share: time of the pattern, lists included, over that of dense attention.
        linear_rate: speed of everything else per operation of its products, over the dense kernel's.
    """

    least_tokens: int
    sparse_rate: float
    build_share: float
    linear_rate: float


# cuda: one H200, bf16, LLaDA-8B's and Dream-7B's shapes, 4k to 64k tokens
# (docs/results/sparsed_speed.json); they predict the gain of a step there within 12 %, never too high by
# more than 2. Break-even: 8k tokens gain 7 % in 128 steps; 4k gained 4, too little to be sure of on another
# card. cpu: one core, float32, 512 to 4096 tokens, lists of density 0.3 and 0.4.
DEVICES = {
    "cuda": Device(least_tokens=8192, sparse_rate=0.9, build_share=1.15, linear_rate=0.6),
    "cpu": Device(least_tokens=2048, sparse_rate=0.55, build_share=1.5, linear_rate=1.0),
}
_APPROXIMATE_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Prediction:
    """What is expected of a run, and whether it should be dense.

    Attributes:
        step_gain: time of a dense step over that of a sparse one.
        run_gain: time of a dense run over that of this one, pattern included.
        reason: why the run should stay dense, or None.
    """

    step_gain: float
    run_gain: float
    reason: str | None


def expected_density(tokens: int, prompt: int, config: SparseDConfig) -> float:
    """Share of the blocks that are kept, from the quotas; an upper bound for mode "authors"."""
    row = RowBlocks.of(prompt, tokens - prompt, config.block_size)
    if config.mode == "strict" and not config.isolated:
        return quota(row.count, config) / row.count
    if config.mode == "authors":
        prompt_part = min(row.split, quota(row.count, config))
    else:
        prompt_part = quota(row.split, config)
    return (prompt_part + quota(row.count - row.split, config)) / row.count


def predict(
    shape: ModelShape, tokens: int, prompt: int, config: SparseDConfig, schedule: Schedule | None, device: str
) -> Prediction:
    """The prediction for one row of `tokens` tokens, `prompt` of them given.

    Args:
        schedule: of the run, or None where the number of steps is not known: then the dense part is taken as
            `skip` of the run, and one pattern as free.
        device: its type; an unknown one counts as "cuda".
    """
    costs = DEVICES.get(device, DEVICES["cuda"])
    linear, attention = shape.linear(tokens) / costs.linear_rate, shape.attention(tokens)
    dense = linear + attention
    sparse = linear + attention * expected_density(tokens, prompt, config) / costs.sparse_rate
    build = attention * (_APPROXIMATE_SHARE if config.approximate else costs.build_share)
    if config.mode == "authors":
        build += attention * costs.build_share * (tokens - prompt) / tokens
    if schedule is None:
        run_gain = dense / (config.skip * dense + (1.0 - config.skip) * sparse)
    else:
        count = schedule.count()
        steps = count[Phase.DENSE] + count[Phase.BUILD]
        run = steps * dense + count[Phase.BUILD] * build + count[Phase.SPARSE] * sparse
        run_gain = schedule.total * dense / run
    return Prediction(dense / sparse, run_gain, _reason(tokens, run_gain, config, costs, device))


def _reason(tokens: int, gain: float, config: SparseDConfig, costs: Device, device: str) -> str | None:
    if tokens < costs.least_tokens:
        return f"{tokens} tokens are below the break-even of {costs.least_tokens} tokens on {device}"
    if gain < 1.0 + config.min_gain:
        return (
            f"the predicted gain of the run is {100 * (gain - 1):.1f} %, below min_gain="
            f"{100 * config.min_gain:g} %"
        )
    return None
