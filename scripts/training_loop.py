"""Running a training step: captured once in a CUDA graph and replayed, under a wall-clock budget."""

import time
from collections.abc import Callable

import torch


class CaptureFailed(RuntimeError):
    """The step could not be captured; the process should start again with eager steps."""


class StepRunner:
    """Repeats a step of device work with no host in between.

    Args:
        step: does one optimiser update; synchronises with nothing and changes only tensors that exist before
        it.
        device: where it runs.
        graph: capture the step; without, or on a CPU, it is called each time.
        stream: where to warm up and capture. Runners whose steps train the same parameters share one, because
            gradient nodes remember the stream on which they were made.
    """

    WARM_UP = 3

    def __init__(
        self,
        step: Callable[[], None],
        device: torch.device,
        *,
        graph: bool,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self._step = step
        self._stream = stream
        self._device = device
        self._capture = graph and device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None

    def prepare(self) -> None:
        """Run `WARM_UP` real steps, which also compiles, then capture one more without running it."""
        if self._device.type != "cuda":
            for _ in range(self.WARM_UP):
                self._step()
            return
        # The same side stream for both.
        stream = self._stream or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UP):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        if not self._capture:
            return
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                self._step()
            torch.cuda.synchronize()
        except Exception as error:
            raise CaptureFailed(
                f"the training step could not be captured in a CUDA graph: {error}"
            ) from error
        self._graph = graph

    def run(self, steps: int) -> None:
        """Queue `steps` steps; returns before the device has finished them."""
        action = self._graph.replay if self._graph is not None else self._step
        for _ in range(steps):
            action()


class Clock:
    """Elapsed training time against a budget, over several slices of one run.

    Args:
        budget_seconds: training time of the whole run.
        elapsed_seconds: training time of earlier slices.
        slice_ends: `time.monotonic()` at which this slice must stop.
    """

    def __init__(
        self, budget_seconds: float, *, elapsed_seconds: float = 0.0, slice_ends: float = float("inf")
    ) -> None:
        self.budget_seconds = budget_seconds
        self.slice_ends = slice_ends
        self._before = elapsed_seconds
        self._started: float | None = None
        self._paused = 0.0

    def start(self) -> None:
        """Training starts now."""
        self._started = time.monotonic()

    def pause(self) -> "_Pause":
        """Context in which time does not count as training, for evaluation."""
        return _Pause(self)

    @property
    def elapsed_seconds(self) -> float:
        """Training time so far, earlier slices included."""
        if self._started is None:
            return self._before
        return self._before + time.monotonic() - self._started - self._paused

    @property
    def fraction(self) -> float:
        """Elapsed share of the budget, at most 1."""
        return min(1.0, self.elapsed_seconds / self.budget_seconds)

    @property
    def finished(self) -> bool:
        """Whether the whole budget is spent."""
        return self.elapsed_seconds >= self.budget_seconds

    @property
    def slice_over(self) -> bool:
        """Whether this slice must stop, finished or not."""
        return time.monotonic() >= self.slice_ends


class _Pause:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._clock._paused += time.monotonic() - self._since


def training_device(*, smoke: bool) -> torch.device:
    """The GPU; a CPU only for the smoke run."""
    if smoke:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit("training needs an NVIDIA GPU; add --smoke for the short CPU run")
    # Matrix products outside autocast (text pooling, evaluation) need no more than TF32.
    torch.set_float32_matmul_precision("high")
    # cuDNN's attention is faster at the training shape (0.8 against 1.1 ms, both passes), but both compiled
    # and captured runs with it diverged (torch 2.11, H100; loss 1.05 at step 515, 1.68 at step 1283), and all
    # with flash fell (0.55 at step 707). Its eager gradients were right; the cause was not isolated further.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda", 0)


def say(message: str, *, since: float) -> None:
    """Print a line with the seconds since `since`, at once even through a pipe."""
    print(f"[{time.monotonic() - since:6.1f} s] {message}", flush=True)
