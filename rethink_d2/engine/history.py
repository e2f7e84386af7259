"""What a run has measured so far, carried over an interruption without a gap or a repeat."""

import json
import os

from detectron2.utils.events import JSONWriter

from ..files import read_json, write_atomically, write_json

# Detectron2's writers show the median of so many iterations.
WINDOW = 20


def save_scalars(storage):
    """The latest values of every scalar but the time of an iteration, as plain data.

    Args:
        storage (EventStorage): of the running training.

    Returns:
        dict[str, dict]: by name, whether it is smoothed, and (value, iteration) pairs.
    """
    hints, saved = storage.smoothing_hints(), {}
    for name, history in storage.histories().items():
        if name == "time":
            # Detectron2 does not time the first iterations after a start: if the next row is among these, the
            # time before them, being of another iteration, would get a row of its own.
            continue
        # The window is of iterations, and a model writes some scalars in each of an iteration's groups.
        count = max(WINDOW, storage.count_samples(name, WINDOW))
        values = [[float(v), int(i)] for v, i in history.values()[-count:]]
        saved[name] = {"smoothed": hints[name], "values": values}
    return saved


def restore_scalars(storage, saved):
    """Put back what :func:`save_scalars` took."""
    for name, scalar in saved.items():
        for value, iteration in scalar["values"]:
            storage.put_scalar(name, value, smoothing_hint=scalar["smoothed"], cur_iter=iteration)


def _rows(path):
    """The rows of a metrics.json; a torn last line is left out."""
    rows = []
    if os.path.exists(path):
        with open(path) as f:
            for line in f:
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError:
                    break
    return rows


def cut_back(folder, iteration, source=None):
    """Take over metrics.json and results.json as they were when a checkpoint was written.

    The checkpoint comes before the evaluation and the row of its own iteration, which are therefore done
    again; results of that evaluation stay, so that it can be skipped if it was complete.

    Args:
        folder (str): the run folder.
        iteration (int): the last one that the checkpoint contains; -1 for none.
        source (str or None): the run folder to take them from; None for the same.
    """
    source = source or folder
    rows = [r for r in _rows(os.path.join(source, "metrics.json")) if r["iteration"] < iteration]
    text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
    write_atomically(os.path.join(folder, "metrics.json"), text)
    results = read_json(os.path.join(source, "results.json"), [])
    write_json(os.path.join(folder, "results.json"), [r for r in results if r["iteration"] <= iteration + 1])


class MetricsWriter(JSONWriter):
    """Detectron2's writer of metrics.json, which goes on after the rows that are there."""

    def __init__(self, path):
        super().__init__(path, WINDOW)
        self._last_write = max((row["iteration"] for row in _rows(path)), default=-1)
