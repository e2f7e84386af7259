"""Interactive charts: every panel of a figure becomes data and layout for plotly's script."""

import textwrap
from collections import Counter

import plotly.graph_objects as go

from ..paper import ARMS
from .figures import COLORS, Figure, Panel

__all__ = ["chart", "charts"]

HEIGHT = 420
LEGEND_ROW = 19


def charts(figure: Figure) -> list[dict]:
    """One chart per panel, as plain data for ``Plotly.newPlot``. Colors of text and grid are the page's."""
    return [chart(panel).to_plotly_json() for panel in figure.panels]


def chart(panel: Panel) -> go.Figure:
    """Draw a panel."""
    made = go.Figure(layout=_layout(panel))
    for line in panel.lines:
        _add_line(made, line)
    for bar in panel.bars:
        _add_bars(made, panel, bar)
    for arm in dict.fromkeys(mark.arm for mark in panel.marks):
        _add_marks(made, panel, arm)
    for drop in panel.drops:
        made.add_shape(
            type="line", x0=drop, x1=drop, yref="paper", y0=0, y1=0.025, line={"width": 1.5, "color": "#888"}
        )
    return made


def _layout(panel):
    names = Counter(line.arm for line in panel.lines)
    layout = {
        "template": "none",
        "height": HEIGHT + LEGEND_ROW * max(names.values(), default=0),
        "margin": {"l": 52, "r": 12, "t": 36, "b": 44},
        "title": {"text": panel.title, "x": 0, "xref": "paper", "font": {"size": 14}},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hovermode": "closest",
        # Below: no corner is free of lines in every panel.
        "legend": {"orientation": "h", "groupclick": "toggleitem", "y": -0.19, "yanchor": "top"},
        "xaxis": {"title": {"text": panel.x_title, "standoff": 6}, "zeroline": False},
        "yaxis": {"title": {"text": panel.y_title, "standoff": 6}, "zeroline": False},
        "barmode": "overlay",
    }
    if panel.bars:
        ticks = list(range(len(panel.categories)))
        layout["xaxis"] |= {"tickvals": ticks, "ticktext": _wrapped(panel), "showgrid": False, "tickangle": 0}
    else:
        layout["xaxis"] |= {"tickformat": "~s", "rangemode": "tozero"}
        layout["yaxis"] |= {"rangemode": "tozero"}
    return layout


def _wrapped(panel):
    return ["<br>".join(textwrap.wrap(category, 14)) for category in panel.categories]


def _group(arm):
    return {"legendgroup": arm, "legendgrouptitle": {"text": ARMS[arm]}}


def _add_line(made, line):
    label = f"{ARMS[line.arm]}, {line.name}"
    texts = []
    for y, low, high, seeds, note in zip(line.y, line.low, line.high, line.seeds, line.notes, strict=True):
        spread = f" (mean of {seeds} seeds, {low:.4g} to {high:.4g})" if seeds > 1 else ""
        texts.append(f"<b>{label}</b><br>{y:.4g}{spread}<br>{note}")
    color, points = COLORS[line.arm], len(line.x)
    if max(line.seeds) > 1:
        made.add_scatter(
            x=[*line.x, *reversed(line.x)],
            y=[*line.high, *reversed(line.low)],
            fill="toself",
            fillcolor=color,
            opacity=0.12,
            line={"width": 0},
            mode="lines",
            hoverinfo="skip",
            showlegend=False,
            meta="band",
        )
    made.add_scatter(
        x=list(line.x),
        y=list(line.y),
        name=line.name,
        mode="lines+markers",
        line={"color": color, "width": 1.8},
        # The end of a finished run is a dot, its first point alone an open one; the others are there for the
        # pointer only.
        marker={
            "size": [0] * (points - 1) + [8 if line.finished else 6 if line.lone else 0],
            "symbol": "circle-open" if line.lone else "circle",
            "color": color,
            "opacity": 1,
            "line": {"width": 1.5 if line.lone else 0},
        },
        text=texts,
        hovertemplate="%{text}<extra></extra>",
        **_group(line.arm),
    )


def _add_bars(made, panel, bar):
    noise = None
    if any(value is not None for value in bar.noise):
        noise = {"type": "data", "array": [value or 0 for value in bar.noise], "thickness": 1, "width": 3}
    said = []
    for category, y, spread, seeds in zip(panel.categories, bar.y, bar.noise, bar.seeds, strict=True):
        text = "" if y is None else f"{category}: {y:.3g}"
        over = (
            "" if seeds is None else " (one seed)" if spread is None else f" ± {spread:.2f} ({seeds} seeds)"
        )
        said.append(text + over)
    base = None
    if panel.stacked:
        before = [other.y for other in panel.bars[: panel.bars.index(bar)]]
        base = [sum(y[i] or 0 for y in before) for i in range(len(bar.y))]
    made.add_bar(
        x=[panel.position(category, bar.name) for category in panel.categories],
        y=list(bar.y),
        base=base,
        width=panel.width * 0.92,
        name=bar.name,
        marker={"color": bar.color},
        error_y=noise,
        text=["" if y is None else f"{y:.3g}" for y in bar.y],
        textposition="auto" if panel.stacked else "none",
        textangle=0,
        cliponaxis=False,
        customdata=said,
        hovertemplate="<b>" + bar.name + "</b><br>%{customdata}<extra></extra>",
    )


def _add_marks(made, panel, arm):
    marks = [mark for mark in panel.marks if mark.arm == arm]
    xs = [panel.position(mark.x, mark.name) if panel.bars else mark.x for mark in marks]
    label = f"published, {ARMS[arm]}"
    made.add_scatter(
        x=xs,
        y=[mark.y for mark in marks],
        name="published" if panel.lines else label,
        mode="markers",
        marker={
            "symbol": "diamond-open",
            "size": 10,
            "color": COLORS[arm] if panel.lines else "#888",
            "line": {"width": 1.6},
        },
        text=[f"<b>{label}, {mark.name}</b><br>{mark.y:.1f}" for mark in marks],
        hovertemplate="%{text}<extra></extra>",
        **(_group(arm) if panel.lines else {}),
    )
