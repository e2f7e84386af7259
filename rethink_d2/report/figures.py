"""What the paper's figures show of one's own runs, before anything is drawn.

Which runs make up a figure, and what was published for them, is the manifest's; each of its families is a
panel. :mod:`~rethink_d2.report.charts` and :mod:`~rethink_d2.report.pictures` draw the same panels.
"""

import csv
import dataclasses
import io
import re
import statistics

from .. import paper
from ..paper import ARMS, samples
from ..solver.schedule import parse
from .noise import mean
from .runs import Runs
from .tables import metric_name
from .verdicts import by_schedule

__all__ = ["COLORS", "Bars", "Figure", "Line", "Mark", "Panel", "figures", "to_csv"]

# Vermilion and blue of Okabe and Ito, which the colour-blind tell apart; legible on white and on black.
COLORS = {"scratch": "#d55e00", "pretrained": "#0072b2"}
# Half way to white.
TINTS = {"scratch": "#eaae80", "pretrained": "#80b9d8"}
COLUMNS = ("panel", "drawn", "arm", "curve", "x", "y", "low", "high", "seeds")

CAPTIONS = {
    "Fig 1": "Mask R-CNN, R50-FPN with GN: box AP on val2017 while training, all schedules overlaid.",
    "Fig 2": "Images, instances and pixels seen: pre-training and 2x, against 6x from random weights.",
    "Fig 3": "As Figure 1, R101-FPN with GN.",
    "Fig 4": "As Figure 1, R50-FPN with SyncBN.",
    "Fig 5": "Enhanced baselines: scale augmentation in training, Cascade R-CNN, test-time augmentation.",
    "Fig 6": "Keypoint AP: Keypoint R-CNN, R50-FPN with GN.",
    "Fig 7": "Fewer images: 35k with the default settings, 35k and 10k with searched ones.",
    "Fig 8": "1k images: training loss, and box AP on val2017.",
}
MINIATURE = "(Here in miniature, on built-in data.)"
BASELINES, ENHANCED = (
    "Table 2",
    ("baseline", "train aug", "cascade + train aug", "cascade + train/test aug"),
)


@dataclasses.dataclass(frozen=True)
class Line:
    """One schedule of a curve: means over its seeds.

    Attributes:
        arm: ``scratch`` or ``pretrained``.
        name: its schedule.
        x, y: iterations done and value.
        low, high: the lowest and the highest seed.
        seeds: how many have got so far.
        notes: what to say beside a point.
        finished: whether all seeds are.
    """

    arm: str
    name: str
    x: tuple[int, ...]
    y: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    seeds: tuple[int, ...]
    notes: tuple[str, ...]
    finished: bool

    @property
    def lone(self) -> bool:
        """Whether it is one point of which no line can be drawn, and no end."""
        return len(self.x) == 1 and not self.finished


@dataclasses.dataclass(frozen=True)
class Mark:
    """A published value: at the end of a schedule, or of a bar."""

    arm: str
    name: str
    x: int | str
    y: float


@dataclasses.dataclass(frozen=True)
class Bars:
    """One bar in each category.

    Attributes:
        arm, name: of the bars.
        y: by category; None for none.
        noise: standard deviation over the seeds; None of one seed.
        seeds: how many; None of what is no run.
        faded: whether they are drawn in a lighter tone.
    """

    arm: str
    name: str
    y: tuple[float | None, ...]
    noise: tuple[float | None, ...]
    seeds: tuple[int | None, ...]
    faded: bool = False

    @property
    def color(self) -> str:
        """Of the bars."""
        return (TINTS if self.faded else COLORS)[self.arm]


@dataclasses.dataclass(frozen=True)
class Panel:
    """One pair of axes, with lines or with bars.

    Attributes:
        title, x_title, y_title: of it.
        lines, marks: of a curve; marks also of bars.
        drops: iterations at which the rate drops.
        categories, bars: of a panel of bars.
        stacked: whether bars of one category stand on each other.
    """

    title: str
    x_title: str
    y_title: str
    lines: tuple[Line, ...] = ()
    marks: tuple[Mark, ...] = ()
    drops: tuple[int, ...] = ()
    categories: tuple[str, ...] = ()
    bars: tuple[Bars, ...] = ()
    stacked: bool = False

    def position(self, category: str, name: str) -> float:
        """Where on the x axis a bar stands; categories are at 0, 1, 2, ..."""
        number = self.categories.index(category)
        if self.stacked:
            return number
        index = [bar.name for bar in self.bars].index(name)
        return number + self.width * (index - (len(self.bars) - 1) / 2)

    @property
    def width(self) -> float:
        """Of a bar, on the x axis."""
        return 0.5 if self.stacked else 0.84 / len(self.bars)


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure of the paper; without panels where there is nothing to draw yet."""

    number: int
    caption: str
    panels: tuple[Panel, ...]


def figures(runs: Runs) -> list[Figure]:
    """Every figure of the manifest."""
    special = {"Fig 2": _seen, "Fig 5": _enhanced, "Fig 8": _with_loss}
    made = []
    for name, caption in CAPTIONS.items():
        if runs.miniature and name != "Fig 2":  # which shows no runs
            caption = f"{caption} {MINIATURE}"
        members = [r for r in paper.load() if name in r.figure.split("; ") and r.kind != "search"]
        panels = special.get(name, _curves)(runs, members)
        made.append(Figure(int(name.split()[1]), caption, tuple(panels)))
    return made


def _families(members):
    found = {}
    for run in members:
        found.setdefault(run.family, []).append(run)
    return found.items()


def _curves(runs, members):
    """A panel per family: its AP while training."""
    for family, members_of in _families(members):
        metric = members_of[0].metric
        yield from _panel(runs, members_of, family, metric_name(metric), lambda f, m=metric: runs.curve(f, m))


def _with_loss(runs, members):
    yield from _panel(runs, members, "training loss", "loss", runs.losses, publish=False)
    yield from _curves(runs, members)


def _panel(runs, members, title, y_title, read, publish=True):
    members = sorted(members, key=lambda run: (run.arm != "scratch", by_schedule(run)))
    lines = [line for run in members if (line := _line(runs, run, read))]
    if not lines:
        return
    folders = [folder for run in members for folder in runs.seeds(run)]
    marks = []
    if publish and not any(folder.mini for folder in folders):
        batch = folders[0].batch
        marks = [
            Mark(run.arm, run.schedule, parse(run.schedule, batch).max_iter, run.published)
            for run in members
            if run.published is not None
        ]
    drops = sorted({drop for folder in folders for drop in folder.drops})
    yield Panel(title, "iterations", y_title, tuple(lines), tuple(marks), tuple(drops))


def _line(runs, run, read):
    """The mean over seeds of what `read` gives for a folder."""
    folders = [folder for folder in runs.seeds(run) if folder.iteration]
    rows = [read(folder) for folder in folders]
    values = {x: [row[x] for row in rows if x in row] for x in sorted(set().union(*rows))}
    if not values:
        return None
    first, points = folders[0], values.values()
    return Line(
        run.arm,
        run.schedule,
        tuple(values),
        tuple(map(statistics.fmean, points)),
        tuple(map(min, points)),
        tuple(map(max, points)),
        tuple(map(len, points)),
        tuple(f"{x:,} iterations, {x / first.one_x:.2f}x, {x * first.batch:,} images" for x in values),
        all(folder.final for folder in runs.seeds(run)),
    )


def _seen(runs, members):
    """Figure 2, the paper's own arithmetic: no run is needed."""
    phases = samples.paper_reading()
    units = {
        "images": (1e6, "10⁶ images"),
        "instances": (1e6, "10⁶ instances"),
        "pixels": (1e12, "10¹² pixels"),
    }
    arms = ("pretrained", "pretrained", "scratch")
    for name, (unit, axis) in units.items():
        bars = []
        for arm, (phase, seen) in zip(arms, phases.items(), strict=True):
            value = getattr(seen, name) / unit
            y = tuple(value if arm == each else None for each in ARMS)
            none = (None,) * len(y)
            bars.append(Bars(arm, phase, y, none, none, faded=phase.startswith("ImageNet")))
        yield Panel(name, "", axis, categories=tuple(ARMS.values()), bars=tuple(bars), stacked=True)


def _enhanced(runs, members):
    """Figure 5: a panel per backbone, which begins with the baseline of Table 2."""
    if not any(runs.finals(run, run.metric) for run in members):
        return
    backbones = dict.fromkeys(_backbone(run) for run in members)
    baselines = [run for run in paper.load() if BASELINES in run.figure.split("; ") and run.arm]
    for backbone in backbones:
        group = [run for run in (*baselines, *members) if _backbone(run) == backbone]
        families = [dict((run.arm, run) for run in of) for _, of in _families(group)]
        categories = tuple(name for name, _ in zip(ENHANCED, families, strict=True))
        bars, marks = [], []
        for kind, (arm, label) in ((kind, item) for kind in ("bbox", "segm") for item in ARMS.items()):
            name, numbers = f"{metric_name(f'{kind}/AP')}, {label}", []
            for category, arms in zip(categories, families, strict=True):
                run = arms[arm]
                metric = f"{kind}_TTA/AP" if "_TTA" in run.metric else f"{kind}/AP"
                numbers.append(mean(runs.finals(run, metric)))
                published = {run.metric: run.published, **run.also_published}.get(metric)
                if published is not None and not any(map(runs.mini, group)):
                    marks.append(Mark(arm, name, category, published))
            y = tuple(number and number.value for number in numbers)
            noise = tuple(number and number.noise for number in numbers)
            seeds = tuple(number and number.seeds for number in numbers)
            bars.append(Bars(arm, name, y, noise, seeds, faded=kind == "segm"))
        yield Panel(backbone.upper(), "", "AP", marks=tuple(marks), categories=categories, bars=tuple(bars))


def _backbone(run):
    return re.search(r"[rx]\d+", run.family)[0]


def to_csv(figure: Figure) -> str:
    """All points and bars of a figure, and its published values."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for panel in figure.panels:
        for line in panel.lines:
            for point in zip(line.x, line.y, line.low, line.high, line.seeds, strict=True):
                writer.writerow([panel.title, "yours", line.arm, line.name, *point])
        for bar in panel.bars:
            for x, y, noise, seeds in zip(panel.categories, bar.y, bar.noise, bar.seeds, strict=True):
                if y is not None:
                    low, high = (None, None) if noise is None else (y - noise, y + noise)
                    writer.writerow([panel.title, "yours", bar.arm, bar.name, x, y, low, high, seeds])
        for mark in panel.marks:
            writer.writerow([panel.title, "published", mark.arm, mark.name, mark.x, mark.y, None, None, None])
    return text.getvalue()
