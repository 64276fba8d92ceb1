"""A search without a model: pictures are what was asked for, and their value is known."""

from __future__ import annotations

import hashlib
import math
import os
import signal
from dataclasses import dataclass, field

from diffctrl.softpag import Head
from diffctrl.softpag.headhunt import (
    Evaluator,
    Goal,
    HuntConfig,
    InProcess,
    JobLog,
    Pair,
    Search,
    Setting,
    Universe,
)
from diffctrl.softpag.headhunt.scoring import Here
from diffctrl.softpag.headset import Signature

HEADS = tuple(Head(layer, index) for layer in range(3) for index in range(4))
UNIVERSE = Universe(
    HEADS,
    {head: (f"blocks.{head.layer}", head.head or 0) for head in HEADS},
    Signature(model_class="Toy", stacks=(("blocks", 3, (4, 4, 4)),)),
    3,
)
PAIRS = tuple(Pair(f"prompt {index}", index) for index in range(5))
SETTING = Setting(model={"id": "toy", "revision": "1"}, sampling={"steps": 4})


def noise(*parts):
    """A number in [0, 1) that depends on its arguments alone."""
    return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:8], 16) / 2**32


# Worst first.
VALUES = sorted(HEADS, key=lambda head: noise("value", str(head)))


class ToySampler:
    """Hands back what it was asked to sample; kills its own process after some batches, if asked to."""

    def __init__(self, kill_after=math.inf):
        self.asked, self._left = [], kill_after

    def sample(self, pairs, sets):
        if self._left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self._left -= 1
        made = list(zip(pairs, sets, strict=True))
        self.asked += made
        return made


@dataclass
class Additive:
    """Each head has a value of its own, each pair an offset, each picture some noise."""

    name: str = "additive"
    version: str = "1"
    values: dict = field(default_factory=dict)
    nan: frozenset = frozenset()
    seen: list = field(default_factory=list)

    def value(self, head):
        return self.values.get(head, 0.1 * VALUES.index(head))

    def score(self, images, prompts):
        scores = []
        for (pair, heads), prompt in zip(images, prompts, strict=True):
            assert pair.prompt == prompt
            self.seen.append(heads)
            total = math.fsum(self.value(head) for head in heads) + noise(pair.prompt)
            total += 0.001 * noise(pair.prompt, pair.seed, sorted(map(str, heads)))
            scores.append(math.nan if self.nan & set(heads) else total)
        return scores


def factory(index):
    """For workers: importable, and nothing to load."""
    return Evaluator(ToySampler(), Here(Goal((Additive(),))))


def search(folder=None, *, config=None, goal=None, engine=None, make=factory, pairs=PAIRS, setting=SETTING):
    """A finished search; `computed` tells how much of it was new."""
    config = config or HuntConfig(rounds=3, top=2, batch=5)
    goal = goal or Goal((Additive(),))
    with engine or InProcess(make) as running, JobLog(folder, running.writer) as log:
        found = Search(UNIVERSE, pairs, config, setting, goal, running, log)
        headset = found.run()
    return headset, found.computed


def with_goal(goal, sampler=None):
    """A factory of this process for some goal."""
    return lambda index: Evaluator(sampler or ToySampler(), Here(goal))


def killed(folder, batches):
    """Run a search that kills this process after some batches."""
    goal = Goal((Additive(),))
    search(folder, make=with_goal(goal, ToySampler(batches)))


def ranked(folder, out):
    """The same search as one of several ranks."""
    from diffctrl.softpag.headhunt import Ranks

    engine = Ranks(factory)
    headset, computed = search(folder, engine=engine)
    headset.save(f"{out}-{engine.writer}.json")
    print(computed)
