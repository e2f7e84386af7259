"""The paper's tables, yours beside the published numbers, and every published number that they leave out."""

import csv
import dataclasses
import io
import math
import re

from .. import paper
from ..paper.localization import FAMILIES
from .noise import Mean, mean, signed
from .runs import Runs

__all__ = ["HEADER", "Row", "Table", "metric_name", "tables", "to_csv", "to_markdown"]

HEADER = ("run", "arm", "schedule", "metric", "yours", "noise", "published", "difference", "source")
KINDS = {"bbox": "box", "segm": "mask", "keypoints": "keypoint", "classification": "classification"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One number.

    Attributes:
        run: whose it is.
        metric: under the name that Detectron2's evaluators give it.
        yours: None where no seed is finished.
        published: None where the paper has only a picture.
        source: of ``published``.
        mini: whether yours is in miniature, and not comparable with ``published``.
    """

    run: paper.Run
    metric: str
    yours: Mean | None
    published: float | None
    source: str
    mini: bool

    @property
    def difference(self) -> float | None:
        """Yours minus published; None where they cannot be compared."""
        if self.yours is None or self.published is None or self.mini:
            return None
        return self.yours.value - self.published

    @property
    def cells(self) -> tuple[str, ...]:
        """Texts, as in :data:`HEADER`; empty where something is unknown."""
        yours = noise = ""
        if self.yours:
            yours = f"{self.yours.value:.1f}"
            one = self.yours.noise is None
            noise = "one seed" if one else f"± {self.yours.noise:.2f} ({self.yours.seeds} seeds)"
        return (
            self.run.family if self.run.kind != "analysis" else self.run.id,
            paper.ARMS.get(self.run.arm, ""),
            self.run.schedule,
            metric_name(self.metric),
            yours,
            noise,
            "" if self.published is None else f"{self.published:.1f}",
            "" if self.difference is None else signed(self.difference),
            self.source,
        )


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under a title."""

    title: str
    caption: str
    rows: tuple[Row, ...]


CAPTIONS = {
    "Table 1": "Box AP of the schedules from 2x to 6x.",
    "Table 2": "Box and mask AP of the schedule that the paper found best for each arm.",
    "Table 3": "Larger models from random weights.",
}


def metric_name(metric: str) -> str:
    """A metric in words: ``segm_TTA/AP75`` is "mask AP75, test aug"."""
    *before, kind, name = metric.split("/")
    words = f"{KINDS.get(kind.removesuffix('_TTA'), kind)} {name}"
    return ", ".join([words, *(["test aug"] if kind.endswith("_TTA") else []), *before])


def tables(runs: Runs) -> list[Table]:
    """Tables 1 to 3, and the numbers of the text, of figures' captions and of others."""
    shown, made = set(), []
    for title, caption in CAPTIONS.items():
        members = [run for run in paper.load() if title in _figures(run) and run.kind != "analysis"]
        # What is published of each: in Table 1 box AP alone, though more is known of some of its runs.
        common = set.intersection(*({_plain(m) for m in _published(run)} for run in members))
        pairs = [(run, m) for run in members for m in _published(run) if _plain(m) in common]
        made.append(Table(title, caption, tuple(_row(runs, *pair, title) for pair in pairs)))
        shown.update((run.id, metric) for run, metric in pairs)
    rows = []
    for run in paper.load():
        if run.kind == "analysis" and run.published is not None:
            rows.append(_analysis(runs, run))
        elif run.config and run.kind != "search":
            metrics = [m for m, value in _published(run).items() if value is not None or _in_text(run)]
            rows += [_row(runs, run, metric) for metric in metrics if (run.id, metric) not in shown]
    caption = "Of sections 5.1 and 5.2, of figures' captions, and of other implementations."
    return [*made, Table("Numbers of the text", caption, tuple(rows))]


def _figures(run):
    return run.figure.split("; ")


def _in_text(run):
    return any(figure.startswith("section") for figure in _figures(run))


def _plain(metric):
    """Test-time augmentation is a row of a table, not another metric."""
    return metric.replace("_TTA", "")


def _published(run):
    """Published numbers by metric; the run's own metric also where its number is unknown."""
    return {run.metric: run.published, **run.also_published}


def _source(run, metric, title):
    """Where one number stands: a part of the source that begins with the metric is about that one alone."""
    if title and title in run.source:
        return f"paper {title}"
    parts = run.source.split("; ")
    own = [part.removeprefix(f"{metric}: ") for part in parts if part.startswith(f"{metric}: ")]
    return "; ".join(own or [part for part in parts if not re.match(r"\S+/\S+: ", part)])


def _row(runs, run, metric, title=None):
    published = _published(run)[metric]
    source = "" if published is None else _source(run, metric, title)
    return Row(run, metric, mean(runs.finals(run, metric)), published, source, runs.mini(run))


def _analysis(runs, analysis):
    """Section 5.1 on localization: as in Table 2, each arm counts with its schedule of the best box AP."""
    members = [run for run in paper.load() if run.family == FAMILIES[analysis.id]]
    best = {}
    for arm in paper.ARMS:
        finished = {run.id: mean(runs.finals(run, run.metric)) for run in members if run.arm == arm}
        found = [run for run in members if finished.get(run.id) and runs.finals(run, analysis.metric)]
        run = max(found, key=lambda run: finished[run.id].value, default=None)
        best[arm] = mean(runs.finals(run, analysis.metric)) if run else None
    scratch, other = best.values()
    yours = None
    if scratch and other:
        noises = scratch.noise, other.noise
        noise = None if None in noises else math.hypot(*noises)
        yours = Mean(scratch.value - other.value, noise, min(scratch.seeds, other.seeds))
    mini = any(map(runs.mini, members))
    return Row(analysis, analysis.metric, yours, analysis.published, analysis.source, mini)


def to_markdown(made: list[Table]) -> str:
    """Tables for a README."""
    parts = []
    for table in made:
        lines = [f"| {' | '.join(cells)} |" for cells in (HEADER, *(row.cells for row in table.rows))]
        lines.insert(1, "|---" * len(HEADER) + "|")
        parts.append(f"### {table.title}\n\n{table.caption}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def to_csv(made: list[Table]) -> str:
    """All rows with all digits, and the run's id."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["table", "id", "metric", "yours", "noise", "seeds", "published", "difference", "source", "miniature"]
    )
    for table in made:
        for row in table.rows:
            yours = row.yours or Mean(None, None, 0)
            numbers = [yours.value, yours.noise, yours.seeds, row.published, row.difference]
            writer.writerow([table.title, row.run.id, row.metric, *numbers, row.source, row.mini])
    return text.getvalue()
