"""What a run can gain: arithmetic on shares of time, nothing measured."""

from __future__ import annotations

from dataclasses import dataclass

# Below it, thinning costs more quality than it saves time.
WORTHWHILE = 1.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a run is expected to be like.

    Attributes:
        density: attended share of the pairs in sparse calls.
        attention_share: of the dense model's arithmetic that is in the attention that becomes sparse.
        dense_share: of the calls that stay dense (first and last steps, first blocks).
        speed_up: of the whole run over dense attention.
        tokens: of the attention sequence.
    """

    density: float
    attention_share: float
    dense_share: float
    speed_up: float
    tokens: int

    @property
    def worthwhile(self) -> bool:
        return self.speed_up >= WORTHWHILE

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens, density {self.density:.3f} in sparse calls, {self.dense_share:.0%} of "
            f"calls dense, attention {self.attention_share:.0%} of the dense model: {self.speed_up:.2f}x"
        )


def predict(
    *, density: float, attention_share: float, dense_share: float, efficiency: float = 1.0, tokens: int = 0
) -> Prediction:
    """1 / ((1 - a) + a (phi + (1 - phi) rho / eta)).

    Args:
        density: rho.
        attention_share: a.
        dense_share: phi.
        efficiency: eta, the rate of the sparse kernel over that of the dense one.

    >>> f"{predict(density=0.275, attention_share=0.8, dense_share=0.24).speed_up:.2f}"
    '1.79'
    """
    attention = dense_share + (1.0 - dense_share) * density / efficiency
    speed_up = 1.0 / (1.0 - attention_share + attention_share * attention)
    return Prediction(
        density=density,
        attention_share=attention_share,
        dense_share=dense_share,
        speed_up=speed_up,
        tokens=tokens,
    )
