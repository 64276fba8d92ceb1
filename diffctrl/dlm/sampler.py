"""What both samplers share: the tokens being decided, forwards of the model, events, results."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from diffctrl.dlm.tokens import Prompts, SpecialTokens

# Positions whose candidates are computed at once, in float64: bounds memory at large vocabularies.
_PIECE = 64

# (step, tokens (B, S) int64, logits (B, S, V)) -> logits.
LogitsHook = Callable[[int, Tensor, Tensor], Tensor]
# (step or None before the first, tokens (B, S) int64, logits (B, S, V) or None) -> tokens.
TokensHook = Callable[[int | None, Tensor, Tensor | None], Tensor]


class StepControl(Protocol):
    """What follows the steps from outside: an attention method's state, for one. Called by the samplers."""

    def begin(
        self, prompt_lengths: Tensor, gen_length: int, steps: int, left_padding: Tensor | None, *, blocks: int
    ) -> None:
        """A generation begins.

        Args:
            prompt_lengths: (rows,) int64, real prompt tokens. With classifier-free guidance the rows are
                [conditional; unconditional], twice the batch.
            gen_length: generated tokens after the prompt.
            steps: denoising steps over all blocks; with a confidence threshold, the largest number.
            left_padding: (rows,) int64, or None where no row is padded.
            blocks: semi-autoregressive blocks, which share the steps equally.
        """
        ...

    def set_step(self, step: int, *, committed: float, block: int) -> None:
        """The next forward belongs to this step.

        Args:
            step: counted over all blocks, none left out.
            committed: share of the tokens to decide that are decided, of the whole batch.
            block: the one that is decoded in.
        """
        ...

    def reset(self) -> None:
        """The generation is over, or was broken off."""
        ...


@dataclass(frozen=True, slots=True)
class StepEvent:
    """What one step decided.

    Attributes:
        step: counted over all blocks, from 0.
        steps: planned.
        block: the block that was decoded in.
        rows: (N,) int64 on the CPU, the batch row of each decided token.
        positions: (N,) int64 on the CPU, counted from the first generated token; negative for a blank inside
            the prompt.
        tokens: (N,) int64 on the CPU.
        masked: positions of the batch that are still undecided.
    """

    step: int
    steps: int
    block: int
    rows: Tensor
    positions: Tensor
    tokens: Tensor
    masked: int


# Called after each step; returning True ends the generation there.
OnStep = Callable[[StepEvent], bool | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Decoded tokens.

    Attributes:
        sequences: (B, P + G) int64, the padded prompts and what follows; on the model's device.
        prompt_lengths: (B,) int64, real prompt tokens.
        gen_length: G.
        decided_in: (B, P + G) int64, the step that decided each position; -1 for the prompt and for what is
            still masked.
        steps: planned.
        forwards: of the model that were run; a guided step is one forward of twice the rows.
        finished: every position is decided; False in a generation that was stopped.
    """

    sequences: Tensor
    prompt_lengths: Tensor
    gen_length: int
    decided_in: Tensor
    steps: int
    forwards: int
    finished: bool

    def answers(self) -> list[list[int]]:
        """The generated tokens of each row, G of them."""
        return self.sequences[:, self.sequences.shape[1] - self.gen_length :].tolist()

    def orders(self) -> list[list[int]]:
        """The step that decided each generated token of each row; -1 where it is still masked."""
        return self.decided_in[:, self.decided_in.shape[1] - self.gen_length :].tolist()


class GenerationInterrupted(KeyboardInterrupt):
    """Ctrl-C during a generation. `partial` is what was decoded until then; a pipeline adds its `output`."""

    def __init__(self, partial: Generation) -> None:
        super().__init__("the generation was interrupted; what was decoded is in `partial`")
        self.partial = partial
        self.output: Any = None


class Canvas:
    """The tokens of one generation, prompts and masks, and who may be changed.

    Attributes:
        tokens: (B, S) int64.
        start: column of the first generated token, in every row.
        attention_mask: (B, S) bool, or None where no row is padded.
        position_ids: (B, S) int64, or None where no row is padded.
        padding: (B,) int64.
        steps: planned.
        forwards: run.
    """

    def __init__(self, prompts: Prompts, gen_length: int, special: SpecialTokens) -> None:
        device = prompts.ids.device
        batch, self.start = prompts.ids.shape
        masks = torch.full((batch, gen_length), special.mask, device=device)
        self.tokens = torch.cat([prompts.ids, masks], dim=1)
        self.prompts, self.gen_length, self.mask_id = prompts, gen_length, special.mask
        self.padding = prompts.padding
        columns = torch.arange(self.tokens.shape[1], device=device)
        self.real = columns[None] >= self.padding[:, None]
        self.attention_mask = self.position_ids = None
        if prompts.padded:
            self.attention_mask = self.real
            # As Dream numbers them; what stands at the padding is never attended.
            self.position_ids = torch.where(self.real, columns[None] - self.padding[:, None], 1)
        # A mask token of the prompt is a blank to fill in, not prompt.
        self.prompt = (self.tokens != special.mask) & self.real
        self.decided_in = torch.full_like(self.tokens, -1)
        self.steps, self.forwards = 0, 0

    def masked(self, end: int | None = None) -> Tensor:
        """(B, S) bool: what is undecided, left of column `end`."""
        masked = (self.tokens == self.mask_id) & self.real
        if end is not None:
            masked[:, end:] = False
        return masked

    def update(self, tokens: Tensor, step: int) -> Tensor:
        """Take over tokens and note the step of what they decide; returns which, (B, S) bool."""
        if tokens.shape != self.tokens.shape or tokens.dtype != self.tokens.dtype:
            raise ValueError(
                f"a tokens hook returned {tuple(tokens.shape)} {tokens.dtype}; it must return "
                f"{tuple(self.tokens.shape)} {self.tokens.dtype}"
            )
        before, after = self.tokens == self.mask_id, tokens == self.mask_id
        decided = before & ~after & self.real
        self.tokens = tokens
        self.decided_in = torch.where(decided, step, self.decided_in.masked_fill(after, -1))
        return decided

    def event(self, decided: Tensor, step: int, block: int) -> StepEvent:
        rows, columns = decided.nonzero(as_tuple=True)
        tokens = self.tokens[rows, columns].cpu()
        masked = int(self.masked().sum())
        return StepEvent(step, self.steps, block, rows.cpu(), (columns - self.start).cpu(), tokens, masked)

    def result(self, finished: bool) -> Generation:
        return Generation(
            sequences=self.tokens,
            prompt_lengths=self.prompts.lengths,
            gen_length=self.gen_length,
            decided_in=self.decided_in,
            steps=self.steps,
            forwards=self.forwards,
            finished=finished,
        )


class Forward:
    """The model's logits of chosen columns; with guidance, from one batch of twice the rows.

    Args:
        model: takes `input_ids` (B, S), `attention_mask` and `position_ids`, returns `.logits` (B, S, V).
            Models of transformers compute the head of the wanted columns only (`logits_to_keep`): at 64k
            tokens all of them are 16 GB.
        canvas: the tokens.
        steps: planned, over all blocks.
        blocks: that share the steps equally.
        cfg_scale: w of l_u + (w + 1) (l_c - l_u); 0 is no guidance.
        control: told of the steps, or None.
    """

    def __init__(
        self,
        model: Any,
        canvas: Canvas,
        *,
        steps: int,
        blocks: int = 1,
        cfg_scale: float = 0.0,
        control: StepControl | None = None,
    ) -> None:
        self._model, self._canvas, self._scale, self._control = model, canvas, cfg_scale, control
        canvas.steps = steps
        plain = getattr(model, "_orig_mod", model)  # under a compiled one, which takes anything
        parameters = inspect.signature(getattr(plain, "forward", plain)).parameters
        self._keeps = "logits_to_keep" in parameters
        # The same objects in every forward, so that who checks the mask need not do so again.
        self._mask, self._positions = self._rows(canvas.attention_mask), self._rows(canvas.position_ids)
        if control is not None:
            padding = canvas.padding if canvas.attention_mask is not None else None
            lengths = self._rows(canvas.prompts.lengths)
            control.begin(lengths, canvas.gen_length, steps, self._rows(padding), blocks=blocks)
            self._wanted = int(canvas.masked().sum())

    def _rows(self, tensor: Any) -> Any:
        """Of conditional and unconditional rows."""
        return torch.cat([tensor, tensor]) if self._scale and tensor is not None else tensor

    def __call__(self, block: int, columns: Tensor | None) -> Tensor:
        """Logits (B, C, V) of the columns, or of all where None; one step."""
        canvas = self._canvas
        if self._control is not None:
            committed = 1 - int(canvas.masked().sum()) / max(1, self._wanted)
            # A tokens hook that masks again makes more forwards than were planned.
            step = min(canvas.forwards, canvas.steps - 1)
            self._control.set_step(step, committed=max(0.0, committed), block=block)
        tokens = canvas.tokens
        if self._scale:
            tokens = torch.cat([tokens, tokens.masked_fill(canvas.prompt, canvas.mask_id)])
        keep = {"logits_to_keep": columns} if self._keeps and columns is not None else {}
        logits = self._model(
            input_ids=tokens, attention_mask=self._mask, position_ids=self._positions, **keep
        ).logits
        canvas.forwards += 1
        if columns is not None and not keep:
            logits = logits[:, columns]
        if self._scale:
            cond, uncond = logits.to(torch.promote_types(logits.dtype, torch.float32)).chunk(2)
            logits = uncond + (self._scale + 1) * (cond - uncond)
        return logits


def beside(prompts: Prompts, model: Any) -> Prompts:
    """Prompts on the model's device. Those on a GPU stay: the weights of an offloaded model lie elsewhere."""
    return prompts.to(getattr(model, "device", "cpu")) if prompts.ids.device.type == "cpu" else prompts


def pieces(masked: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(row, columns (n,)) of the masked positions, row by row, few at a time."""
    rows, columns = masked.nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(masked)).tolist()
    for row, mine in enumerate(columns.split(counts)):
        if len(mine):
            yield from ((row, piece) for piece in mine.split(_PIECE))


class Sampler:
    """Base of the samplers: runs one generation and cleans up after it.

    Args:
        sampling: the settings.
        special: token ids.
    """

    def __init__(self, sampling: Any, special: SpecialTokens) -> None:
        self.sampling, self.special = sampling, special

    def _run(
        self,
        prompts: Prompts,
        control: StepControl | None,
        on_step: OnStep | None,
        tokens_hook: TokensHook | None,
        decode: Callable[[Canvas], Iterator[tuple[int, Tensor, Tensor | None]]],
    ) -> Generation:
        """Take the steps of `decode`, which yields (block, tokens, logits) after each forward, to its end."""
        canvas = Canvas(prompts, self.sampling.gen_length, self.special)
        try:
            with torch.no_grad():
                if tokens_hook is not None:
                    canvas.update(tokens_hook(None, canvas.tokens, None), -1)
                for block, tokens, logits in decode(canvas):
                    step = canvas.forwards - 1
                    if tokens_hook is not None:
                        tokens = tokens_hook(step, tokens, logits)
                    decided = canvas.update(tokens, step)
                    if on_step is not None and on_step(canvas.event(decided, step, block)):
                        break
        except KeyboardInterrupt:
            raise GenerationInterrupted(canvas.result(finished=False)) from None
        finally:
            if control is not None:
                control.reset()
        return canvas.result(finished=not bool(canvas.masked().any()))
