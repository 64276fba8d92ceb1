"""The state of SparseD on one model: where a generation is, the patterns of its layers, what was done."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffctrl.attention import EngineStats, attend
from diffctrl.sparsed import patterns as storage
from diffctrl.sparsed.builder import Builder
from diffctrl.sparsed.config import SparseDConfig
from diffctrl.sparsed.cost import ModelShape, Prediction, predict
from diffctrl.sparsed.dense_op import dense_op, remember
from diffctrl.sparsed.layout import Layout
from diffctrl.sparsed.patterns import Pattern
from diffctrl.sparsed.record import Record
from diffctrl.sparsed.run import Layer, Run
from diffctrl.sparsed.schedule import CommitTrigger, Phase, Schedule

logger = logging.getLogger("diffctrl.sparsed")
_LOGGED: set[str] = set()


class SparseDController:
    """Follows a generation step by step and attends for the layers of one model.

    Args:
        config: the settings.
        shape: sizes of the model, for the prediction of the gain.
        device: gives the model's device when a generation begins.

    A sampler calls `begin`, then `set_step` before each forward, then `reset`. Nothing is inferred from
    counting calls: guidance, checkpointing and batches break it.
    """

    def __init__(self, config: SparseDConfig, shape: ModelShape, device: Callable[[], torch.device]) -> None:
        self.config, self.shape = config, shape
        self._device = device
        self._given: tuple[Mapping[int, Pattern], Layout] | None = None
        self._run: Run | None = None
        self._layers = [Layer(torch.tensor([index])) for index in range(shape.layers)]
        self.engine = EngineStats()
        remember(self.engine.number, self)
        self.record = Record(config)

    # --- what a sampler calls -------------------------------------------------------------------------------

    def begin(
        self,
        prompt_lengths: Tensor,
        gen_length: int,
        steps: int,
        left_padding: Tensor | None = None,
        *,
        blocks: int = 1,
    ) -> None:
        """A generation begins: everything of the one before is dropped.

        Args:
            prompt_lengths: integer (B,), real prompt tokens; with guidance in one batch, of all its rows.
            gen_length: tokens to generate.
            steps: denoising steps over all blocks; where a confidence threshold ends them earlier, what they
                are at most.
            left_padding: integer (B,), padding tokens before each prompt; None where no row is padded.
            blocks: semi-autoregressive blocks, which share the steps; for refresh="per_block".

        Raises:
            ValueError: sizes that cannot be.
        """
        config = self.config
        layout = Layout.of(prompt_lengths, gen_length, config.block_size, left_padding)
        schedule = Schedule.of(config, steps, blocks)
        trigger = CommitTrigger(config) if config.trigger == "committed" else None
        device = self._device()
        longest = int(layout.valid.max())
        prediction = predict(
            self.shape,
            longest,
            longest - gen_length,
            config,
            schedule if trigger is None else None,
            device.type,
        )
        dense = self._stays_dense(prediction, schedule, trigger)
        self._forget_lists()
        self._run = Run(layout, schedule, trigger, dense, device)
        self.engine.reset()
        self.record = Record(config, layout, prediction, dense)
        if dense is not None and dense == prediction.reason and dense not in _LOGGED:
            _LOGGED.add(dense)
            logger.warning("SparseD stays dense: %s. auto_dense=False makes it sparse all the same.", dense)
        if self._given is not None and dense is None:
            self._take_given(*self._given)

    def set_step(self, step: int, *, committed: float | None = None, block: int | None = None) -> None:
        """The next forwards belong to this step; step 0 starts the run anew.

        Args:
            step: counted over all blocks.
            committed: share of the generation tokens that are decided, for trigger="committed".
            block: the semi-autoregressive block, for refresh="per_block" with that trigger.

        Raises:
            RuntimeError: no generation has begun.
            ValueError: the step is outside of the run, or an argument is missing.
        """
        run = self._running()
        if step == 0 and run.step is not None:
            run.restart(self.config)
            self._forget_lists()
            if self._given is not None and run.dense is None:
                self._take_given(*self._given)
        run.enter(step, committed, block)
        self.record.enter(step, run.phase)

    def reset(self) -> None:
        """The generation is over, or was broken off. Statistics and patterns can still be read."""
        self._forget_lists()
        for pattern in self.patterns.values():
            pattern.lists.free()
        self._run = None

    def _forget_lists(self) -> None:
        for layer in self._layers:
            layer.lists = None

    # --- patterns -------------------------------------------------------------------------------------------

    @property
    def patterns(self) -> Mapping[int, Pattern]:
        """The pattern of each layer, of the running or the last generation."""
        return self.record.patterns

    def save_patterns(self, path: str | Path) -> None:
        """Write the patterns of the running or the last generation as safetensors.

        Raises:
            ValueError: there are none.
        """
        layout = self.record.layout
        if layout is None:
            raise ValueError("there are no patterns to save yet; run a generation first")
        storage.save(path, self.patterns, layout)

    def load_patterns(self, path: str | Path | None) -> None:
        """Use saved patterns in the generations that begin from now on, in place of building them.

        The dense steps stay. None builds patterns again.

        Raises:
            ValueError: the file holds patterns of other layers or heads, or another block size.
        """
        if path is None:
            self._given = None
            return
        found, layout = storage.load(path)
        if layout.block != self.config.block_size or set(found) != set(range(self.shape.layers)):
            raise ValueError(
                f"{path} holds patterns of {len(found)} layers in blocks of {layout.block}; this model has "
                f"{self.shape.layers} layers, and block_size is {self.config.block_size}"
            )
        heads = {pattern.lists.heads for pattern in found.values()}
        if not heads <= {self.shape.heads, self.shape.kv_heads}:
            raise ValueError(
                f"{path} holds patterns of {sorted(heads)} heads; this model has {self.shape.heads}, and "
                f"{self.shape.kv_heads} of keys"
            )
        self._given = found, layout

    def _take_given(self, found: Mapping[int, Pattern], layout: Layout) -> None:
        run = self._running()
        if not layout.equals(run.layout):
            raise ValueError(
                f"the loaded patterns are of other rows: prompts of {layout.prompts.tolist()} "
                f"tokens and {layout.generation} generated ones. They fit these alone; "
                "load_patterns(None) builds new ones"
            )
        run.given = True
        self.record.patterns.update(found)

    # --- what the model calls -------------------------------------------------------------------------------

    def prepare(self, batch: int, tokens: int, device: torch.device, mask: Tensor | None) -> None:
        """A forward begins; outside of compiled code.

        Args:
            batch, tokens: of its input.
            device: of its input.
            mask: bool or integer (B, S), which tokens are real, or None.

        Raises:
            RuntimeError: no generation has begun, or no step was set.
            ValueError: the input is not what `begin` was told.
        """
        run = self._running()
        if run.step is None:
            raise RuntimeError("SparseD: a forward came before set_step(0); the sampler calls it first")
        run.check(batch, tokens, mask)
        run.prepare(device)
        if run.given and self._layers[0].lists is None:
            for index, pattern in self.patterns.items():
                self._layers[index].lists = pattern.lists.on(device)
        self.record.forwards += 1

    def layer(self, index: int) -> Layer:
        """What `attend` is given for a layer."""
        return self._layers[index]

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of one layer in the running step.

        Args:
            layer: of `layer(index)`.
            query: (B, S, H, D), after rotary embedding, in the model's order.
            key, value: (B, S, Hkv, D).
            scale: of the scores.

        Returns:
            (B, S, H, D).
        """
        run = self._run
        if run is None:
            raise RuntimeError(_NOT_BEGUN)
        if run.is_sparse:
            return self._sparse(run, layer, query, key, value, scale)
        if torch.compiler.is_compiling():
            plain = (tensor.detach() for tensor in (query, key, value))
            out = dense_op(*plain, run.token, layer.number, self.engine.number, scale)
            # The operator has no gradient. Who asks for one attends twice; samplers do not ask.
            return self._dense(run, query, key, value, scale, False)[0] if query.requires_grad else out
        return self.dense(int(layer.number), query, key, value, scale)

    def dense(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Dense attention of one layer, (B, S, H, D); in a step that does so, it takes the pattern too.

        Args:
            layer: its index.
            query, key, value, scale: as in `attend`.
        """
        run = self._running()
        if run.phase is not Phase.BUILD or run.given:
            return self._dense(run, query, key, value, scale, False)[0]
        with torch.no_grad():
            builder = Builder.of(self.config, query, key, scale, self.engine)
            out, lse = self._dense(run, query, key, value, scale, builder.wants_lse(scale))
            self._build(run, layer, query, key, scale, lse)
        return out

    def _sparse(
        self, run: Run, layer: Layer, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        if layer.lists is None:
            raise RuntimeError(
                "SparseD: a layer has no pattern in a sparse step: the step that takes it did not run. "
                "set_step() goes through all steps of a generation in order"
            )
        q, k, v = (run.first(t) for t in (query, key, value))
        out: Any = attend(q, k, v, mask=layer.lists, scale=scale, stats=self.engine)
        return run.back(out)

    def _dense(
        self, run: Run, query: Tensor, key: Tensor, value: Tensor, scale: float, needs_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        options: dict[str, Any] = {"scale": scale, "return_lse": needs_lse, "stats": self.engine}
        if run.padded and query.device.type == "cpu":
            options["attn_mask"] = run.mask
        elif run.padded:
            # An element mask would cost the fast kernels; with the real keys first, a length per row does.
            key, value = run.first(key), run.first(value)
            options["mask"] = run.full
        result: Any = attend(query, key, value, **options)
        return result if needs_lse else (result, None)

    def _build(
        self, run: Run, layer: int, query: Tensor, key: Tensor, scale: float, lse: Tensor | None
    ) -> None:
        with self.record.timed(query.device):
            if lse is not None:
                lse = run.first(lse.transpose(1, 2)).transpose(1, 2)
            pattern = self.pattern(run.first(query), run.first(key), run.layout, scale, lse)
        self.record.patterns[layer] = pattern
        self._layers[layer].lists = pattern.lists.on(query.device)

    def pattern(
        self, query: Tensor, key: Tensor, layout: Layout, scale: float, lse: Tensor | None
    ) -> Pattern:
        """The pattern of a layer; what a subclass with another rule overrides.

        Args:
            query: (B, S, H, D), the real tokens of each row first.
            key: (B, S, Hkv, D), likewise.
            layout: of the rows.
            scale: of the attention.
            lse: float32 (B, H, S) of its dense attention, in the same order, or None.
        """
        return Builder.of(self.config, query, key, scale, self.engine).build(query, key, layout, lse)

    # --- what is asked --------------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """What the running or the last generation did; see `Record.as_dict`."""
        return self.record.as_dict() | self.engine.as_dict()

    @property
    def phase(self) -> Phase | None:
        """Of the running step; None outside of a generation."""
        return None if self._run is None or self._run.step is None else self._run.phase

    def _running(self) -> Run:
        if self._run is None:
            raise RuntimeError(_NOT_BEGUN)
        return self._run

    def _stays_dense(
        self, prediction: Prediction, schedule: Schedule, trigger: CommitTrigger | None
    ) -> str | None:
        """Why the run is dense to its end, or None."""
        if self.config.rests:
            name = "select" if self.config.select == 1.0 else "skip"
            return f"{name}=1 is dense attention"
        if trigger is None and not schedule.builds:
            return f"no step of {schedule.total} is left to be sparse"
        return prediction.reason if self.config.auto_dense else None


_NOT_BEGUN = (
    "SparseD: a forward ran outside of a generation. The sampler calls control.begin(prompt_lengths, "
    "gen_length, steps, left_padding) and control.set_step(i) before each forward; "
    "remove() takes SparseD off"
)
__all__ = ["SparseDController"]
