"""Section 5.1 on localization: box AP75 from random weights above that with pre-training, from finished runs.

As in Table 2, each arm counts with the schedule that has the best box AP.
"""

import dataclasses
from pathlib import Path
from statistics import fmean

from ..files import read_json
from .lines import resolved
from .manifest import ARMS, Run, load

__all__ = ["FAMILIES", "Arm", "Localization", "localization", "table"]

FAMILIES = {"localization-r50": "base-r50-gn", "localization-r101": "base-r101-gn"}


@dataclasses.dataclass(frozen=True)
class Arm:
    """The best schedule of one arm.

    Attributes:
        run: it.
        seeds: how many runs of it are finished.
        ap, ap75: box AP and AP75 after the last iteration, mean over the seeds.
    """

    run: Run
    seeds: int
    ap: float
    ap75: float


@dataclasses.dataclass(frozen=True)
class Localization:
    """One backbone.

    Attributes:
        analysis: the manifest's row, with the published difference.
        scratch, pretrained: the best of each arm; None where no run is finished.
        missing: ids of runs without a result after their last iteration.
    """

    analysis: Run
    scratch: Arm | None
    pretrained: Arm | None
    missing: tuple[str, ...]

    @property
    def difference(self) -> float | None:
        """Box AP75 of the arm from random weights minus that of the other; None where one is missing."""
        if self.scratch is None or self.pretrained is None:
            return None
        return self.scratch.ap75 - self.pretrained.ap75


def localization(root) -> list[Localization]:
    """Read the results below an output folder.

    Args:
        root (str or Path): holds ``<run id>/seed<k>/results.json``.

    Returns:
        one for each analysis of the manifest.

    Raises:
        ValueError: a results.json is damaged; names it.
    """
    return [_localization(Path(root), analysis) for analysis in load() if analysis.id in FAMILIES]


def _localization(root, analysis):
    runs = [run for run in load() if run.family == FAMILIES[analysis.id]]
    finished = [arm for run in runs if (arm := _read(root, run))]
    best = {
        name: max((arm for arm in finished if arm.run.arm == name), key=lambda arm: arm.ap, default=None)
        for name in ARMS
    }
    found = {arm.run.id for arm in finished}
    return Localization(analysis, **best, missing=tuple(run.id for run in runs if run.id not in found))


def _read(root, run):
    """The means of a run over its seeds after its last iteration; None if no seed got there."""
    cfg = resolved(run)
    found = []
    for path in sorted(root.glob(f"{run.id}/seed*/results.json")):
        try:
            rows = {(row["iteration"], row["dataset"]): row for row in read_json(path)}
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(
                f"{path} holds no results ({type(e).__name__}: {e}); evaluate the run again"
            ) from e
        row = rows.get((cfg.SOLVER.MAX_ITER, cfg.DATASETS.TEST[0]), {})
        values = row.get("bbox/AP"), row.get("bbox/AP75")
        if None not in values:
            found.append(values)
    if not found:
        return None
    ap, ap75 = map(fmean, zip(*found, strict=True))
    return Arm(run, len(found), ap, ap75)


def table(results) -> str:
    """The results as Markdown; what is missing is named below.

    Args:
        results (list[Localization]): of :func:`localization`.
    """
    head = "analysis", "random init", "its AP75", "pre-training", "its AP75", "difference", "published"
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for result in results:
        cells = [result.analysis.id]
        for arm in (result.scratch, result.pretrained):
            cells += [_best(arm), f"{arm.ap75:.1f}"] if arm else ["-", "-"]
        cells.append("-" if result.difference is None else f"{result.difference:+.1f}")
        cells.append(f"{result.analysis.published:+.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    missing = [id for result in results for id in result.missing]
    if missing:
        lines += ["", f"No result after the last iteration: {', '.join(missing)}"]
    return "\n".join(lines)


def _best(arm):
    seeds = f", {arm.seeds} seeds" if arm.seeds > 1 else ""
    return f"{arm.run.schedule} (AP {arm.ap:.1f}{seeds})"
