"""The same figures as files: PNG and PDF, by matplotlib."""

import hashlib
import io
import textwrap
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Picture
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter

from ..paper import ARMS
from . import figures
from .figures import COLORS, Figure

__all__ = ["DIGEST", "digest", "picture", "render"]

WIDTH, HEIGHT = 4.8, 3.6
DPI = 150
PUBLISHED = {"ls": "", "marker": "D", "fillstyle": "none", "color": "#555", "label": "published"}


# The PNG's note of what it was drawn from.
DIGEST = "Digest"
# What draws, as it is when imported.
CODE = [Path(file).read_bytes() for file in (__file__, figures.__file__)]


def digest(figure: Figure) -> str:
    """Of all that the pictures of a figure depend on: its content, and what draws it."""
    return hashlib.sha256(repr((figure, ARMS, matplotlib.__version__, CODE)).encode()).hexdigest()


def render(figure: Figure) -> dict[str, bytes]:
    """A figure's files by their extension."""
    made, files = picture(figure), {}
    # Without the date, so that the same figure is the same file.
    for kind, metadata in (("pdf", {"CreationDate": None}), ("png", {DIGEST: digest(figure)})):
        buffer = io.BytesIO()
        made.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
        files[kind] = buffer.getvalue()
    return files


def picture(figure: Figure) -> Picture:
    """Draw the panels of a figure side by side."""
    columns = len(figure.panels)
    made = Picture(figsize=(WIDTH * max(columns, 1.25), HEIGHT), layout="constrained")
    FigureCanvasAgg(made)
    for axes, panel in zip(made.subplots(1, columns, squeeze=False)[0], figure.panels, strict=True):
        axes.set_title(panel.title, fontsize=10, loc="left")
        axes.set_xlabel(panel.x_title)
        axes.set_ylabel(panel.y_title)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.7)
        axes.set_axisbelow(True)
        (_draw_bars if panel.bars else _draw_lines)(axes, panel)
    if any(panel.bars for panel in figure.panels):
        handles = [Patch(color=bar.color, label=bar.name) for bar in figure.panels[0].bars]
        if any(panel.marks for panel in figure.panels):
            handles.append(Line2D([], [], **PUBLISHED))
        made.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return made


def _draw_lines(axes, panel):
    for line in panel.lines:
        color = COLORS[line.arm]
        axes.plot(line.x, line.y, color=color, linewidth=1.3)
        if max(line.seeds) > 1:
            axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.12, linewidth=0)
        if line.lone:
            axes.plot(line.x, line.y, "o", color=color, markersize=3.5, fillstyle="none")
        if line.finished:
            axes.plot(line.x[-1], line.y[-1], "o", color=color, markersize=4)
            axes.annotate(
                line.name,
                (line.x[-1], line.y[-1]),
                (3, 4 if line.arm == "pretrained" else -10),  # else labels of close ends cover each other
                textcoords="offset points",
                fontsize=7,
                color=color,
            )
    for mark in panel.marks:
        axes.plot(mark.x, mark.y, "D", color=COLORS[mark.arm], markersize=5, fillstyle="none")
    for drop in panel.drops:
        axes.axvline(drop, ymax=0.025, color="#888", linewidth=1)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    arms = [arm for arm in ARMS if any(line.arm == arm for line in panel.lines)]
    handles = [Line2D([], [], color=COLORS[arm], label=ARMS[arm]) for arm in arms]
    if panel.marks:
        handles.append(Line2D([], [], **PUBLISHED))
    axes.legend(handles=handles, fontsize=8, frameon=False)


def _draw_bars(axes, panel):
    base = dict.fromkeys(panel.categories, 0.0)
    for bar in panel.bars:
        for category, y, noise in zip(panel.categories, bar.y, bar.noise, strict=True):
            if y is None:
                continue
            x = panel.position(category, bar.name)
            bottom = base[category] if panel.stacked else 0
            axes.bar(x, y, panel.width * 0.92, bottom, color=bar.color, yerr=noise)
            base[category] += y
            if panel.stacked:  # others stand too close
                axes.annotate(f"{y:.3g}", (x, bottom + y / 2), ha="center", va="center", fontsize=7)
    for mark in panel.marks:
        axes.plot(
            panel.position(mark.x, mark.name), mark.y, "D", color="#555", markersize=4, fillstyle="none"
        )
    names = ["\n".join(textwrap.wrap(category, 14)) for category in panel.categories]
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.grid(axis="x", visible=False)
