"""Whether a model attends in both directions, found out by running it."""

from __future__ import annotations

from typing import Any


def check_bidirectional(model: Any) -> None:
    """Refuse a model whose first token does not see its last one.

    Diffusion language models run as causal architectures with `config.is_causal = False`. A version of
    transformers that passed over it would give fluent first words and noise after them, without an error. Two
    forwards of two rows of three tokens tell, with a padding mask and without one.

    Args:
        model: a transformers model with a language head.

    Raises:
        ValueError: it is causal.
    """
    import torch

    device = model.get_input_embeddings().weight.device
    tokens = torch.tensor([[0, 1, 2], [0, 1, 3]], device=device)
    padded = torch.tensor([[False, True, True]] * 2, device=device)
    for mask, first in ((None, 0), (padded, 1)):
        with torch.no_grad():
            logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits[:, first]
        if torch.equal(logits[0], logits[1]):
            raise ValueError(
                f"{type(model).__name__} is causal: its first token does not see its last. A diffusion "
                "language model has config.is_causal = False, set before the model is made"
            )
