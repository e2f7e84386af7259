"""Does training from random weights catch up? Answered by a rule, from finished runs alone."""

import dataclasses
import statistics

from .. import paper
from ..solver.schedule import REFERENCE_BATCH, parse
from .noise import Difference, difference
from .runs import Runs

__all__ = [
    "FLOOR",
    "LOSS_RULE",
    "MARGIN",
    "RULE",
    "Comparison",
    "Verdict",
    "by_schedule",
    "verdicts",
]

# AP. With it, the paper's Table 1 gives 5x for both networks, as its section 5.1 says.
MARGIN = 0.5
# AP that pre-training has to reach before anything is compared with it.
FLOOR = 1.0
# By how much a training loss may be above the other one and still has caught up, and the part of the run,
# at its end, whose rows are summed up.
LOSS_MARGIN, LOSS_TAIL = 1.05, 0.1
ROUNDING = 1e-6

RULE = (
    "Training from random weights has caught up at its shortest schedule whose AP is less than "
    f"{MARGIN} below the best that pre-training reaches at any of its schedules. AP is that of the "
    "evaluation after the last iteration, the mean over seeds; only finished runs count. Where pre-training "
    f"reaches less than {FLOOR} nothing was learned, and nothing is decided. ± is half of the "
    "95% interval of the difference, by Welch's t-test over the seeds, which takes two of each arm."
)
LOSS_RULE = (
    f"A training loss has caught up if it ends at most {LOSS_MARGIN - 1:.0%} above the one with "
    f"pre-training, in the median over the last {LOSS_TAIL:.0%} of the iterations."
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One schedule from random weights.

    Attributes:
        run: it.
        to_partner: AP minus that of the run which the paper compares it with; None if one is missing.
        to_best: AP minus that of the best schedule with pre-training; None if one is missing.
    """

    run: paper.Run
    to_partner: Difference | None
    to_best: Difference | None

    @property
    def catches_up(self) -> bool | None:
        """Whether it does; None where a run is missing."""
        return None if self.to_best is None else self.to_best.value > ROUNDING - MARGIN

    @property
    def sure(self) -> bool:
        """Whether the whole interval is on one side of the rule's border, if there is one."""
        margin = self.to_best.margin
        return margin is None or abs(self.to_best.value + MARGIN) > margin


@dataclasses.dataclass(frozen=True)
class Verdict:
    """On one experiment, a pair of curves.

    Attributes:
        family: of the manifest.
        figure: where the paper shows it.
        metric: that is compared.
        best: the best finished schedule with pre-training; None if there is none.
        best_value: what it reaches.
        comparisons: the schedules from random weights, shortest first.
        missing: begun or planned runs of which not all seeds are finished.
        losses: training loss at the end from random weights and with pre-training, where the paper shows it.
    """

    family: str
    figure: str
    metric: str
    best: paper.Run | None
    best_value: float | None
    comparisons: tuple[Comparison, ...]
    missing: tuple[paper.Run, ...]
    losses: tuple[float, float] | None = None

    @property
    def caught_up(self) -> Comparison | None:
        """The shortest schedule that has."""
        return next((c for c in self.comparisons if c.catches_up), None)

    @property
    def learned(self) -> bool:
        """Whether pre-training has reached anything to catch up with."""
        return self.best_value is not None and self.best_value >= FLOOR

    @property
    def undecided(self) -> list[paper.Run]:
        """The missing runs that could change the verdict."""
        return [run for run in self.missing if self._could_change(run)]

    def _could_change(self, run):
        if run.arm == "pretrained":
            # Another schedule can only raise the best, which a scratch that is behind does not catch up with.
            return bool(self.caught_up or not self.learned or run is self.best)
        return self.learned and not (self.caught_up and by_schedule(run) > by_schedule(self.caught_up.run))

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        if self.best is None:
            return "not known yet: no finished run of pre-training"
        so_far, end = "", ""
        if self.undecided:
            so_far, end = "so far ", f"; unfinished: {_schedules(self.undecided)}"
        if not self.learned:
            known = "not known yet: so far" if so_far else "not known:"
            return f"{known} with pre-training nothing was learned (AP {self.best_value:.1f}){end}"
        judged = [c for c in self.comparisons if c.to_best]
        if not judged:
            return "not known yet: no finished run of scratch"
        shown = self.caught_up or max(judged, key=lambda c: c.to_best.value)
        at = f"at {shown.run.schedule}"
        if self.caught_up:
            text = f"{so_far}scratch catches up {at} (difference {shown.to_best})"
        else:
            longest = judged[-1] is self.comparisons[-1]
            text = f"{so_far}scratch does not catch up" if longest else "scratch has not caught up yet"
            text += f" (difference {shown.to_best}; best {at})"
        if not shown.sure:
            text += f"; the interval reaches over -{MARGIN}, so more seeds may change this"
        return text + end

    @property
    def loss_sentence(self) -> str:
        """The same for the training loss; "" where the paper does not show it."""
        if self.losses is None:
            return ""
        scratch, other = self.losses
        what = "has caught up" if scratch <= LOSS_MARGIN * other else "has not caught up"
        so_far = "so far " if self.missing else ""
        return (
            f"{so_far}training loss {what} ({scratch:.3g} from random weights, {other:.3g} with pre-training)"
        )


def _schedules(runs):
    """Runs of one family in words: "scratch 4x, 6x and pre-training 6x"."""
    names = {"scratch": "scratch", "pretrained": "pre-training"}
    found = {names[arm]: [run.schedule for run in runs if run.arm == arm] for arm in names}
    return " and ".join(f"{name} {', '.join(schedules)}" for name, schedules in found.items() if schedules)


def by_schedule(run):
    """Sorts runs by their length."""
    return parse(run.schedule, REFERENCE_BATCH).max_iter


def verdicts(runs: Runs) -> list[Verdict]:
    """Judge every experiment of the manifest of which runs have begun, in the manifest's order."""
    families = {}
    for run in paper.load():
        if run.partner:
            families.setdefault(run.family, []).append(run)
    return [_verdict(runs, family) for family in families.values() if any(map(runs.seeds, family))]


def _verdict(runs, family):
    arms = {arm: [run for run in family if run.arm == arm] for arm in paper.ARMS}
    metric = family[0].metric
    values = {run.id: runs.finals(run, metric) for run in family}
    finished = [run for run in arms["pretrained"] if values[run.id]]
    best = max(finished, key=lambda run: statistics.fmean(values[run.id]), default=None)
    best_value = statistics.fmean(values[best.id]) if best else None
    comparable = best and best_value >= FLOOR
    comparisons = tuple(
        Comparison(
            run,
            difference(values[run.id], values[run.partner]),
            difference(values[run.id], values[best.id]) if comparable else None,
        )
        for run in sorted(arms["scratch"], key=by_schedule)
        if runs.seeds(run)
    )
    return Verdict(
        family=family[0].family,
        figure=family[0].figure,
        metric=metric,
        best=best,
        best_value=best_value,
        comparisons=comparisons,
        missing=tuple(run for run in family if len(values[run.id]) < len(runs.seeds(run))),
        losses=_losses(runs, arms) if "Fig 8" in family[0].figure else None,
    )


def _losses(runs, arms):
    """The training loss at the end of both arms, the mean over seeds; None if one has none."""
    ends = []
    for members in arms.values():
        found = []
        for folder in (folder for run in members for folder in runs.seeds(run) if folder.final):
            rows = runs.losses(folder)
            begin = (1 - LOSS_TAIL) * folder.final.iteration
            found += [statistics.median(tail)] if (tail := [v for i, v in rows.items() if i >= begin]) else []
        ends += [statistics.fmean(found)] if found else []
    return tuple(ends) if len(ends) == len(arms) else None
