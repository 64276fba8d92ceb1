"""HeadHunter: the search for the attention heads that a goal wants perturbed.

Source: arXiv 2506.10978, section 3. Implemented from the paper, not from its code.
"""

from diffctrl.softpag.headhunt.engines import Engine, Evaluator, InProcess, Processes, Ranks, Sampler
from diffctrl.softpag.headhunt.joblog import JobLog
from diffctrl.softpag.headhunt.jobs import HuntConfig, Job, Pair, Setting, Unit
from diffctrl.softpag.headhunt.objectives import HarmonicMean, Objective, parse_goal
from diffctrl.softpag.headhunt.ranking import Goal, Threshold, WeightedZ
from diffctrl.softpag.headhunt.search import Cost, Search, cost
from diffctrl.softpag.headhunt.universe import Universe

__all__ = [
    "Cost",
    "Engine",
    "Evaluator",
    "Goal",
    "HarmonicMean",
    "HuntConfig",
    "InProcess",
    "Job",
    "JobLog",
    "Objective",
    "Pair",
    "Processes",
    "Ranks",
    "Sampler",
    "Search",
    "Setting",
    "Threshold",
    "Unit",
    "Universe",
    "WeightedZ",
    "cost",
    "parse_goal",
]
