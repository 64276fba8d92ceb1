"""Which length is trained next: short rows until lookups are learnt, then longer and longer ones."""

from dataclasses import dataclass, field

from .training_text_data import EVERY_TASK

# Share of right guesses at masked values of lookups from which on the next length is worth its time.
_LEARNT = 0.95
_FEWEST_LOOKS = 6
_FIRST_FORCED, _LAST_FORCED = 0.45, 0.75
_SMOOTHING = 0.3


@dataclass(slots=True)
class Curriculum:
    """Lengths in rising order; each is unlocked when the longest so far is learnt, or when time presses.

    Lookups appear abruptly, and in short rows first. A run in which they are late must not spend its minutes
    on long rows, and one in which they are early must not wait.

    Args:
        lengths: tokens of a row, ascending.
        unlocked: how many of them are trained.
        seconds: training time of each length.
        accuracy: running share of right guesses in lookups, by length.
        looks: how often `accuracy` was told, by length.
    """

    lengths: tuple[int, ...]
    unlocked: int = 1
    seconds: dict[int, float] = field(default_factory=dict)
    accuracy: dict[int, float] = field(default_factory=dict)
    looks: dict[int, int] = field(default_factory=dict)

    def choose(self, fraction: float) -> int:
        """The length of the next chunk: the one that is furthest behind its share of the time."""
        self._unlock(fraction)
        open_lengths = self.lengths[: self.unlocked]
        weights = {length: 2.0 if length <= EVERY_TASK else 1.0 for length in open_lengths}
        weights[open_lengths[-1]] += 1.0
        return min(open_lengths, key=lambda length: self.seconds.get(length, 0.0) / weights[length])

    def tell(self, length: int, seconds: float, accuracy: float) -> None:
        """What a chunk took and how well its lookups were guessed."""
        self.seconds[length] = self.seconds.get(length, 0.0) + seconds
        before = self.accuracy.get(length, accuracy)
        self.accuracy[length] = before + _SMOOTHING * (accuracy - before)
        self.looks[length] = self.looks.get(length, 0) + 1

    def _unlock(self, fraction: float) -> None:
        if self.unlocked == len(self.lengths):
            return
        longest = self.lengths[self.unlocked - 1]
        learnt = self.looks.get(longest, 0) >= _FEWEST_LOOKS and self.accuracy[longest] >= _LEARNT
        step = (_LAST_FORCED - _FIRST_FORCED) / max(1, len(self.lengths) - 1)
        late = fraction >= _FIRST_FORCED + step * (self.unlocked - 1)
        if learnt or late:
            self.unlocked += 1
            # From now on shares of the time count; what short lengths had alone is no debt of theirs. All
            # begin at zero: from another equal start, those with a large share would first catch up with it.
            self.seconds = dict.fromkeys(self.lengths[: self.unlocked], 0.0)

    def facts(self) -> dict[str, object]:
        """What a checkpoint keeps."""
        return {
            "unlocked": self.unlocked,
            "seconds": {str(length): value for length, value in self.seconds.items()},
            "accuracy": {str(length): value for length, value in self.accuracy.items()},
            "looks": {str(length): value for length, value in self.looks.items()},
        }

    def restore(self, facts: dict[str, dict[str, float] | int]) -> None:
        """Go on from `facts`."""
        self.unlocked = min(int(facts["unlocked"]), len(self.lengths))  # type: ignore[arg-type]
        for name in ("seconds", "accuracy", "looks"):
            table: dict[str, float] = facts[name]  # type: ignore[assignment]
            setattr(self, name, {int(length): value for length, value in table.items()})
