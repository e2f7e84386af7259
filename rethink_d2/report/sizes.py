"""Runs of one size: a report is of full-size runs, or of miniatures of which 1x is the same length."""

import os
import shlex
from collections import Counter

from ..solver.schedule import ONE_X
from ..sweep.state import State
from .folders import RunFolder

__all__ = ["one_size"]

# More folders than these are not worth a command each.
FEW = 3


def one_size(out: str, folders: list[RunFolder], one_x: int | None = None) -> tuple[list[RunFolder], str]:
    """Leave out runs that are not comparable with the others.

    Miniatures are left out where a run of the paper has begun in full size. Of several kinds of miniatures
    those count that lie nearest to the output folder; of equals, those of most runs.

    Args:
        out: the output folder.
        folders: in it.
        one_x: the size to take, if there are runs of it; in iterations of 16 images.

    Returns:
        those that count, and a line about the others; "" where there is none.
    """
    units = [(f.unit, f) for f in folders if f.unit and f.run and f.state is not State.WAITING]
    counts = Counter(unit for unit, _ in units)
    depths = {unit: min(f.path.count("/") for other, f in units if other == unit) for unit in counts}
    best = min(counts, key=lambda unit: (unit != ONE_X, depths[unit], -counts[unit], unit), default=None)
    chosen = one_x if one_x in counts else best
    if chosen is None:
        return folders, ""
    wrong = {f.path for f in folders if (f.run or f.mini) and f.unit not in (chosen, None)}
    if chosen == ONE_X:
        wrong |= {f.path for f in folders if f.mini}
    right = {part for f in folders if f.unit == chosen and f.path not in wrong for part in _upwards(f.path)}
    # The uppermost folders without the others; what of unknown size is in them, as pre-training, goes along.
    places = {next((part for part in _upwards(path) if part not in right), path) for path in wrong}
    kept = [f for f in folders if f.path not in wrong and places.isdisjoint(_upwards(f.path))]
    return kept, _line(out, chosen, len(folders) - len(kept), sorted(places)) if places else ""


def _upwards(path):
    """A path and those above it, the uppermost first."""
    parts = path.split("/")
    return ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]


def _line(out, chosen, count, places):
    size = "in full size" if chosen == ONE_X else f"of which 1x is {chosen} iterations"
    more = f" and {len(places) - FEW} more folders" if len(places) > FEW else ""
    runs = "run" if count == 1 else "runs"
    text = f"Only runs {size} are shown. Left out: {count} {runs} in {', '.join(places[:FEW])}{more}. "
    if more:
        return text + "For a report of these, move them to a folder of their own."
    commands = [f"python -m rethink_d2.report {shlex.quote(os.path.join(out, place))}" for place in places]
    return text + f"Their own report: {' or '.join(commands)}"
