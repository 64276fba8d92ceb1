"""Running a model from a later block on: the blocks before it answer what they answered last time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


class _Stand(nn.Module):
    """Stands where a block did. The block stays its child, so that the model can still be moved."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def __getattr__(self, name: str) -> Any:
        # Models read attributes of their blocks (SD3: context_pre_only).
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


class _Tap(_Stand):
    """Runs the block and keeps its output."""

    output: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.block(*args, **kwargs)
        self.__dict__["output"] = output
        return output


class _Replay(_Stand):
    """Answers without running the block."""

    def __init__(self, block: nn.Module, output: Any) -> None:
        super().__init__(block)
        self.__dict__["output"] = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["output"]


def has_diffusers_hooks(module: nn.Module) -> bool:
    """Whether hooks of diffusers (a step cache, group offloading) are on this very module.

    An empty registry stays behind where there were some, and where a run has ended.
    """
    registry = vars(module).get("_diffusers_hook")  # a module is slow to say that it has no such attribute
    return bool(registry is not None and registry.hooks)


class Prefix:
    """The blocks of a model before the first perturbed one.

    Args:
        model: the denoiser.
        chains: names of its lists of blocks, in the order in which they run (`Family.chains`).
        sites: names of the perturbed attention modules.

    What is the same for every block (text, time and position embeddings) is computed again: it costs little,
    and only the model's own forward knows how. A block that answers from memory stands in the list for each
    one that is skipped; all of a list give the last one's output, as only that reaches the first real block.
    """

    def __init__(self, model: nn.Module, chains: Sequence[str], sites: Sequence[str]) -> None:
        self._lists: list[Any] = [getattr(model, name) for name in chains]
        first = min(_place(name, chains) for name in sites)
        # Blocks to skip in each list.
        self._counts = [
            len(blocks) if index < first[0] else first[1] if index == first[0] else 0
            for index, blocks in enumerate(self._lists)
        ]
        self._changed: list[tuple[Any, int, nn.Module]] = []
        self._taps: dict[int, _Tap] = {}
        for blocks in self._lists:
            for block in blocks:
                if has_diffusers_hooks(block):
                    raise RuntimeError(
                        "mode='prefix' skips blocks, but the blocks of this model carry hooks of diffusers "
                        "(a step cache or group offloading) that count on each one; use "
                        "mode='sequential', or turn them off"
                    )

    @property
    def skipped(self) -> int:
        """Blocks that the replay does not run."""
        return sum(self._counts)

    def listen(self) -> None:
        """Keep the output of the last block before the perturbed ones, of each list, in the next forward."""
        for index, (blocks, count) in enumerate(zip(self._lists, self._counts, strict=True)):
            if count:
                self._taps[index] = tap = _Tap(blocks[count - 1])
                self._put(blocks, count - 1, tap)

    def restore(self) -> None:
        """Put the blocks themselves back."""
        for blocks, index, block in reversed(self._changed):
            blocks[index] = block
        self._changed = []

    @contextmanager
    def replayed(self, select: Callable[[Any], Any]) -> Iterator[None]:
        """Inside, a forward runs from the first perturbed block on.

        Args:
            select: takes the rows of the next forward out of a block's output.
        """
        self.restore()
        outputs = {index: select(tap.output) for index, tap in self._taps.items()}
        self._taps = {}
        try:
            for index, output in outputs.items():
                blocks = self._lists[index]
                for place in range(self._counts[index]):
                    self._put(blocks, place, _Replay(blocks[place], output))
            yield
        finally:
            self.restore()

    def _put(self, blocks: Any, index: int, module: nn.Module) -> None:
        module.train(blocks[index].training)
        self._changed.append((blocks, index, blocks[index]))
        blocks[index] = module


def _place(site: str, chains: Sequence[str]) -> tuple[int, int]:
    """(list, block) that an attention module belongs to."""
    for index, chain in enumerate(chains):
        if site.startswith(f"{chain}."):
            return index, int(site[len(chain) + 1 :].split(".", 1)[0])
    raise KeyError(f"{site} lies in none of the lists {', '.join(chains)}")


def map_kept(model: nn.Module, change: Callable[[Any], Any]) -> None:
    """Change what a model that listens has kept, for a caller that ran its forward on other rows."""
    for module in model.modules():
        if isinstance(module, _Tap):
            module.__dict__["output"] = change(module.__dict__["output"])
