"""The report: one page that holds everything, and beside it pictures, data and tables."""

import datetime
import functools
import glob
import os
import sys
import time
from collections import Counter
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from plotly.offline import get_plotlyjs

from ..files import replace_atomically, write_atomically
from ..sweep.state import State
from . import figures, tables
from .charts import charts
from .folders import is_number
from .pictures import DIGEST, digest, render
from .runs import find_runs
from .verdicts import LOSS_RULE, RULE, verdicts

__all__ = ["FOLDER", "PAGE", "write_report"]

FOLDER, PAGE = "report", "index.html"
MINIATURE = "in miniature, on built-in data: published numbers are of COCO and not comparable"
FILES = (
    "log.txt",
    "launch.log",
    "config.yaml",
    "run.json",
    "results.json",
    "metrics.json",
    "divergence.json",
    "best.yaml",
    "trials.csv",
)
RECIPE = (
    "SOLVER.SCHEDULE",
    "SOLVER.MAX_ITER",
    "SOLVER.STEPS",
    "SOLVER.BASE_LR",
    "SOLVER.GAMMA",
    "SOLVER.WARMUP_ITERS",
    "SOLVER.WEIGHT_DECAY",
    "SOLVER.IMS_PER_BATCH",
    "SOLVER.AMP.ENABLED",
    "MODEL.WEIGHTS",
    "MODEL.INIT.POLICY",
    "MODEL.BACKBONE.NAME",
    "MODEL.BACKBONE.FREEZE_AT",
    "MODEL.RESNETS.DEPTH",
    "MODEL.RESNETS.NORM",
    "INPUT.MIN_SIZE_TRAIN",
    "INPUT.MAX_SIZE_TRAIN",
    "DATASETS.TRAIN",
    "DATASETS.TEST",
)


def write_report(out: str) -> str:
    """Make the report of an output folder in its folder ``report``.

    Beside the page there are ``figure_<n>`` as PNG, PDF and CSV, ``tables.md`` and ``tables.csv``. The page
    is written last, and every file whole or not at all. Runs that are left out are named on stderr.

    Args:
        out: the output folder; running, failed and damaged runs may be in it.

    Returns:
        path of the page.

    Raises:
        ValueError: there is no run in the folder.
    """
    runs = find_runs(out)
    if runs.left_out:
        _say(runs.left_out)
    folder = os.path.join(out, FOLDER)
    drawn = figures.figures(runs)
    for figure in drawn:
        if figure.panels:
            _write_figure(folder, figure)
    judged, made = verdicts(runs), tables.tables(runs)
    lines = [f"- {v.family} ({tables.metric_name(v.metric)}): {v.sentence}" for v in judged]
    parts = [
        *([f"*Runs are {MINIATURE}.*"] if runs.miniature else []),
        *(["\n".join(lines)] if lines else []),
    ]
    write_atomically(os.path.join(folder, "tables.md"), "\n\n".join([*parts, tables.to_markdown(made)]))
    write_atomically(os.path.join(folder, "tables.csv"), tables.to_csv(made))
    states = Counter(folder.state for folder in runs.folders)
    page = _template().render(
        title=os.path.basename(os.path.abspath(out)),
        made=time.strftime("%Y-%m-%d %H:%M"),
        states=[(state.value, states[state]) for state in State if states[state]],
        mini=MINIATURE if runs.miniature else "",
        left_out=runs.left_out,
        problems=runs.problems,
        galleries=[
            (os.path.splitext(name)[0], quote(f"gallery/{name}"))
            for name in sorted(map(os.path.basename, glob.glob(f"{glob.escape(folder)}/gallery/*.html")))
        ],
        verdicts=judged,
        rule=RULE,
        loss_rule=LOSS_RULE,
        figures=[(figure, charts(figure)) for figure in drawn if figure.panels],
        missing=[figure.number for figure in drawn if not figure.panels],
        tables=made,
        header=tables.HEADER,
        metric_name=tables.metric_name,
        runs=_rows(runs),
        plotly=get_plotlyjs(),
    )
    path = os.path.join(folder, PAGE)
    # Names of folders and texts of files may hold what has no UTF-8.
    write_atomically(path, page.encode(errors="replace").decode())
    return path


@functools.cache
def _say(line):
    """On stderr, once: the report may be made every few seconds."""
    print(line, file=sys.stderr, flush=True)


def _template():
    loader = FileSystemLoader(os.path.dirname(__file__))
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return made.get_template("page.html")


def _write_figure(folder, figure):
    """Pictures take longest, so they are drawn only where they would change; the PNG, written last, tells."""
    stem = os.path.join(folder, f"figure_{figure.number}")
    others = f"{stem}.csv", f"{stem}.pdf"
    if all(map(os.path.exists, others)) and _digest(f"{stem}.png") == digest(figure):
        return
    write_atomically(others[0], figures.to_csv(figure))
    for kind, content in render(figure).items():
        with replace_atomically(f"{stem}.{kind}") as f:
            f.write(content)


def _digest(path):
    """What a PNG was drawn from; None where there is none, or another program's."""
    try:
        with Image.open(path) as image:
            return image.info.get(DIGEST)
    except OSError:
        return None


def _rows(runs):
    """The runs as the page shows them, those first that need a look."""
    order = [*State]
    folders = sorted(runs.folders, key=lambda folder: (order.index(folder.state), folder.path))
    anchors = {folder.path: f"run-{number}" for number, folder in enumerate(folders)}
    return [_row(runs, folder, anchors) for folder in folders]


def _row(runs, folder, anchors):
    record, trunk = folder.record, runs.trunk(folder)
    metric = folder.run.metric if folder.run else "bbox/AP"
    values = [e.metrics[metric] for e in folder.evaluations if metric in e.metrics]
    parent = record.get("parent")
    if isinstance(parent, dict):
        parent = f"{parent.get('run_id')}, after {parent.get('iteration')} iterations"
    names = [name for name in FILES if name in folder.files]
    names += sorted(name for name in folder.files if name.endswith(".png"))
    versions = record.get("versions")
    many = record.get("world_size", 1) != 1
    processes = f", {record['world_size']} processes" if many else ""
    return {
        "anchor": anchors[folder.path],
        "folder": folder,
        "progress": f"{folder.iteration:,}" + (f" / {folder.max_iter:,}" if folder.max_iter else ""),
        "left": _duration(folder.left),
        "value": f"{values[-1]:.1f}" if values else "",
        "metric": metric,
        "time": _duration(record.get("seconds")),
        "hardware": f"{record.get('hardware', '')}{processes}",
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else "",
        "started": record.get("started", ""),
        "parent": parent or "",
        "parent_anchor": anchors[trunk.path] if trunk else "",
        "links": [(name, quote(os.fsencode(f"../{folder.path}/{name}"))) for name in names],
        "recipe": [(key, folder.config[key]) for key in RECIPE if key in folder.config],
    }


def _duration(seconds):
    if not is_number(seconds) or not 0 <= seconds < 1e9:
        return ""
    return str(datetime.timedelta(seconds=round(seconds)))
