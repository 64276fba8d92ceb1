"""What the pipelines of diffusion language models share: loading, prompts, attention control, texts."""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

from diffctrl import settings
from diffctrl.control.text import state_of
from diffctrl.dlm import (
    Chat,
    Checkpoint,
    Generation,
    GenerationInterrupted,
    Prompts,
    SpecialTokens,
    StepEvent,
    as_batch,
    check_bidirectional,
    decode,
    encode,
    is_embedded,
    open_checkpoint,
)
from diffctrl.errors import BadRequestError
from diffctrl.pipelines.base import ControlledPipelineMixin, joined_signature
from diffctrl.processors import SparseDAttnProcessor, SparseDConfig

logger = logging.getLogger("diffctrl.pipelines")

Prompt = str | Chat | Sequence[str | Chat]
# (pipe, step, block, {"event": StepEvent}); its result is not read. `pipe._interrupt = True` ends the call.
Callback = Callable[[Any, int, int, dict[str, Any]], Any]


@dataclass
class TextOutput(BaseOutput):
    """What a pipeline of texts returns.

    Attributes:
        texts: one answer per prompt, cut at its end token and at the stop words.
        sequences: (B, P + G) int64, padded prompts and answers.
        orders: the step that decided each of the G generated tokens of each row.
        finished: every token is decided; False where a callback ended the call.
        stats: "steps", "forwards", and under "control" what SparseD did, None for dense attention.
    """

    texts: list[str]
    sequences: Tensor
    orders: list[list[int]]
    finished: bool
    stats: dict[str, Any]


class TextPipeline(ControlledPipelineMixin, DiffusionPipeline):
    """Base of the pipelines of texts; a class of its own says which sampler decodes, and with which defaults.

    A `DiffusionPipeline` of a model and a tokenizer, as diffusers' own LLaDA2Pipeline is, so that `to` and
    offload work as they do there. Only folders differ: `from_pretrained` and `save_pretrained` read and write
    a plain folder of transformers, since that is what the published models are.

    Args:
        model: `LlamaForCausalLM` or `Qwen2ForCausalLM` with config.is_causal = False.
        tokenizer: of transformers.
        special: ids of mask, padding and ends; those of the config and the tokenizer where none are given.
        sampling: how calls decode where they say nothing.
        sparsed: how calls attend where they say nothing; None is dense attention.
        longest: tokens of prompt and answer that the model was trained for; more are told. The config's
            `max_position_embeddings` where nothing is said.

    Raises:
        ValueError: the model is causal, or no mask token of its vocabulary is known.
    """

    sampler_class: ClassVar[type]
    sampling_class: ClassVar[type]
    defaults: ClassVar[Mapping[str, Any]]
    kind: ClassVar[str]
    model_cpu_offload_seq = "model"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        special: SpecialTokens | None = None,
        sampling: Mapping[str, Any] | None = None,
        sparsed: SparseDConfig | None = SparseDConfig(),  # noqa: B008 - frozen
        longest: int | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(model=model, tokenizer=tokenizer)
        if state_of(model) is None:
            check_bidirectional(model)
        self.special = special or SpecialTokens.find(tokenizer, model.config)
        if self.special.mask >= model.config.vocab_size:
            raise ValueError(
                f"the mask token {self.special.mask} is outside of the model's vocabulary of "
                f"{model.config.vocab_size}; pass special=SpecialTokens(mask=..., pad=...)"
            )
        self.recommended = dict(sampling or {})
        self.resolve(self.recommended, {})  # say now what of it is wrong
        self.sparsed = sparsed
        self.longest = longest or model.config.max_position_embeddings
        self._interrupt = False

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        sparsed: SparseDConfig | None = SparseDConfig(),  # noqa: B008 - frozen
        **options: Any,
    ) -> Any:
        """Load an embedded model, a folder, or a hub repository; never code of the model's own.

        Args:
            pretrained_model_name_or_path: a name of `diffctrl.zoo.registry`, a folder in the layout of LLaDA,
                Dream or transformers, or owner/name.
            dtype: of the weights; None for that of the files, float32 for an embedded model.
            revision: of a repository.
            sparsed: as in the class.
            options: of transformers' `from_pretrained`: `device_map`, `attn_implementation`,
                `quantization_config`.

        Raises:
            BadRequestError: there is no such model, or it cannot be loaded, or it is decoded otherwise.
        """
        checkpoint = open_checkpoint(pretrained_model_name_or_path, revision=revision)
        if checkpoint.sampler not in (None, cls.kind):
            raise BadRequestError(
                f"{checkpoint.name} decodes as {checkpoint.sampler!r}, and {cls.__name__} as {cls.kind!r}"
            )
        if dtype is None and is_embedded(checkpoint.name):
            dtype = torch.float32  # stored as float16, which CPUs compute slowly
        return cls.from_checkpoint(checkpoint, dtype=dtype, sparsed=sparsed, **options)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, *, dtype: Any = None, sparsed: SparseDConfig | None, **options: Any
    ) -> Any:
        """The pipeline of an opened checkpoint, with the sampling that its folder recommends."""
        tokenizer = checkpoint.tokenizer()
        return cls(
            model=checkpoint.load(dtype, **options),
            tokenizer=tokenizer,
            special=checkpoint.special(tokenizer),
            sampling=checkpoint.settings.get("call"),
            sparsed=sparsed,
            longest=checkpoint.settings.get("longest"),
        )

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:  # type: ignore[override]
        """Write model, tokenizer and diffctrl.json into one folder, which `from_pretrained` reads."""
        folder = Path(save_directory)
        self.model.save_pretrained(folder, **options)
        self.tokenizer.save_pretrained(folder)
        ids = {f"{name}_token_id": value for name, value in asdict(self.special).items() if value is not None}
        table = {"kind": "text", "sampler": self.kind, **ids, "longest": self.longest}
        table["call"] = self.recommended or dict(self.defaults)
        (folder / "diffctrl.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")

    # --- one call -------------------------------------------------------------------------------------------

    @classmethod
    def resolve(cls, recommended: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
        """The sampling of a call: what it says, else what the model recommends, else the class's defaults.

        Raises:
            BadRequestError: an option is unknown or out of range.
        """
        said = {name: value for name, value in given.items() if value is not None}
        options = {**cls.defaults, **recommended, **said}
        if "gen_length" in said and "steps" not in said:
            options["steps"] = said["gen_length"]
        options.setdefault("steps", options["gen_length"])
        if "block_length" in options and "block_length" not in said:
            options["block_length"] = min(options["block_length"], options["gen_length"])
        return settings.parse(cls.sampling_class, options, of=cls.kind)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "sampling_class" not in vars(cls):
            return  # made from one that has it

        def __call__(self: Any, *args: Any, **kwargs: Any) -> TextOutput:  # noqa: N807 - it is the class's call
            return TextPipeline.__call__(self, *args, **kwargs)

        # What a call takes is read off the class of the sampling, so that neither can forget an option.
        common = inspect.signature(TextPipeline.__call__)
        joined = joined_signature(TextPipeline.__call__, cls.sampling_class)
        __call__.__signature__ = joined.replace(  # type: ignore[attr-defined]
            parameters=[
                each if name in common.parameters else each.replace(default=None)
                for name, each in joined.parameters.items()
                if name != "options"
            ]
        )
        __call__.__doc__ = (TextPipeline.__call__.__doc__ or "").replace(
            "the class of the sampling", f"`{cls.sampling_class.__name__}`"
        )
        cls.__call__ = __call__  # type: ignore[method-assign]

    def __call__(
        self,
        prompt: Prompt | None = None,
        *,
        input_ids: Sequence[Sequence[int]] | Tensor | None = None,
        chat: bool | None = None,
        stop: Sequence[str] = (),
        sparsed: SparseDConfig | bool | None = None,
        seed: Any = None,
        generator: Any = None,
        callback_on_step_end: Callback | None = None,
        logits_hook: Any = None,
        tokens_hook: Any = None,
        **options: Any,
    ) -> TextOutput:
        """Answer prompts.

        Args:
            prompt: a text, a chat ([{"role": "user", "content": ...}, ...]), or a list of them, which may
                differ in length.
            input_ids: token ids instead, one list per row; mask tokens among them are blanks to fill in.
            chat: whether a text becomes the user's turn of a chat; None where the tokenizer has a template.
            stop: texts at which an answer is cut, when all of it is decoded.
            sparsed: settings of SparseD for this call, True for its defaults, False for dense attention; None
                is what is installed on the pipeline, else its own `sparsed`. With a `threshold`, the dense
                part ends by the share of decided tokens (trigger="committed").
            seed: of the noise: s for rows s, s + 1, ..., or a list; the same noise on every device.
            generator: a torch.Generator, or one per row, instead of a seed.
            callback_on_step_end: called with (pipe, step, block, {"event": StepEvent}); set
                `pipe._interrupt = True` to end the call there.
            logits_hook, tokens_hook: as in the sampler's `generate`.
            options: gen_length, temperature and whatever else the class of the sampling takes; None is what
                the model recommends. Without `steps`, a given `gen_length` has a step for each token.

        Raises:
            ValueError: an argument is unknown or out of range.
            GenerationInterrupted: Ctrl-C; its `output` has what was decoded.
        """
        sampling = self.resolve(self.recommended, options)
        if (prompt is None) == (input_ids is None):
            raise ValueError("pass either prompt or input_ids")
        if seed is not None and generator is not None:
            raise ValueError("pass either seed or generator; both say which noise is drawn")
        if isinstance(stop, str):
            stop = (stop,)
        if prompt is not None:
            input_ids = encode(self.tokenizer, as_batch(prompt), chat=chat)
        prompts = Prompts.of(input_ids, self.special.pad)  # type: ignore[arg-type]
        self._check(prompts, sampling)
        prompts = prompts.to(self._execution_device)
        self._interrupt = False

        def on_step(event: StepEvent) -> bool:
            if callback_on_step_end is not None:
                callback_on_step_end(self, event.step, event.block, {"event": event})
            return self._interrupt

        with self._attending(sparsed, sampling) as state:
            sampler = self.sampler_class(sampling, self.special)
            try:
                found = sampler.generate(
                    self.model,
                    prompts,
                    seeds=seed if generator is None else generator,
                    control=state,
                    on_step=on_step if callback_on_step_end is not None else None,
                    logits_hook=logits_hook,
                    tokens_hook=tokens_hook,
                )
            except GenerationInterrupted as interrupted:
                interrupted.output = self._output(interrupted.partial, stop, state)
                raise
            finally:
                self.maybe_free_model_hooks()
            return self._output(found, stop, state)

    def _output(self, found: Generation, stop: Sequence[str], state: Any) -> TextOutput:
        control = None if state is None else state.stats()
        return TextOutput(
            texts=[decode(self.tokenizer, answer, self.special, stop) for answer in found.answers()],
            sequences=found.sequences,
            orders=found.orders(),
            finished=found.finished,
            stats={"steps": found.steps, "forwards": found.forwards, "control": control},
        )

    @contextmanager
    def _attending(self, sparsed: SparseDConfig | bool | None, sampling: Any) -> Iterator[Any]:
        """The state of the control for this call, or None for dense attention."""
        if sparsed is None and (self.control is not None or self._controlled_from_outside()):
            yield state_of(self.model)
            return
        config = self.sparsed if sparsed is None else sparsed
        if config is True:
            config = SparseDConfig()
        if not config:
            with self._stock():
                yield None
            return
        # How many steps there will be is not known with a threshold; how much is decided is.
        if getattr(sampling, "threshold", None) is not None and config.trigger == "step":
            config = replace(config, trigger="committed")
        with self._controlled([SparseDAttnProcessor(config)]):
            yield state_of(self.model)

    @contextmanager
    def _stock(self) -> Iterator[None]:
        """Stock attention for one call."""
        if self._controlled_from_outside():
            raise RuntimeError(
                "sparsed=False cannot take off what diffctrl.apply put on this model; call "
                "`remove()` on its handle"
            )
        previous = self._take_off()
        try:
            yield
        finally:
            self._put_back(previous)

    def _controlled_from_outside(self) -> bool:
        return self.control is None and state_of(self.model) is not None

    def _check(self, prompts: Prompts, sampling: Any) -> None:
        vocabulary = self.model.config.vocab_size
        if prompts.ids.numel() and not 0 <= int(prompts.ids.min()) <= int(prompts.ids.max()) < vocabulary:
            raise ValueError(
                f"the prompt has token ids outside of 0 to {vocabulary - 1}, the model's vocabulary"
            )
        longest = prompts.ids.shape[1] + sampling.gen_length
        if longest > self.longest:
            logger.warning(
                "%d tokens are more than the %d that this model was trained for", longest, self.longest
            )
