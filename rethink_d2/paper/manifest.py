"""The list of the paper's runs, one row each in manifest.csv beside this file."""

import csv
import dataclasses
import difflib
import functools
import os
from pathlib import Path

# As the paper's figures call them.
ARMS = {"scratch": "random init", "pretrained": "w/ pre-training"}

_CSV = Path(__file__).with_name("manifest.csv")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of the paper, or one number that it computes from runs.

    Attributes:
        id: ``<family>-<arm>-<schedule>``, e.g. ``base-r50-gn-scratch-6x``, without what is "" here.
            Analyses have names of their own.
        family: the experiment; its runs differ in arm and schedule only.
        figure: where the paper shows it, e.g. ``Fig 1; Table 1``.
        arm: ``scratch`` or ``pretrained``; "" for an analysis.
        kind: ``train``; ``cascade``, a training that starts from its trunk's state with cascade heads;
            ``evaluate``, no training but another evaluation of its trunk's final weights; ``pretrain``,
            which makes the weights that other runs start from; ``search`` of hyper-parameters; or
            ``analysis``, computed from finished runs.
        schedule: its SOLVER.SCHEDULE (of an ``evaluate`` run, its trunk's), the epochs of a
            ``pretrain`` run, or "".
        config: path of its config below ``configs/``, with forward slashes; "" for an analysis. A
            search starts from the config of another run.
        partner: id of the run of the other arm that it is compared with; None if it has none.
        trunk: id of the run whose state it continues: a longer one of the same curve, for a ``cascade``
            the run without one, for ``evaluate`` the run it evaluates; None if it has none.
        branch_iteration: iterations of 16 images that it shares with the trunk, which end where its own
            rate first drops, or at the trunk's last checkpoint before that; None if there are none.
        metric: which number ``published`` is, under the name that Detectron2's evaluators give it.
        published: the paper's number (AP is 0-100); None where the paper has only a picture.
        source: where ``published`` and ``also_published`` stand; "" if there is nothing.
        also_published: more published numbers of the same run, by metric.
        optional: whether a sweep leaves it out unless asked for it.
    """

    id: str
    family: str
    figure: str
    arm: str
    kind: str
    schedule: str
    config: str
    partner: str | None
    trunk: str | None
    branch_iteration: int | None
    metric: str
    published: float | None
    source: str
    also_published: dict[str, float] = dataclasses.field(hash=False)
    optional: bool


def load() -> list[Run]:
    """All runs, in the order of the file."""
    return list(_runs())


def find(id: str) -> Run:
    """The run with this id.

    Raises:
        KeyError: there is none; the message names the ids nearest to it.
    """
    runs = {run.id: run for run in _runs()}
    if id not in runs:
        near = difflib.get_close_matches(id, runs, n=3)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise KeyError(f"no run '{id}' in {_CSV.name}{hint}")
    return runs[id]


def for_config(path: str | os.PathLike) -> Run | None:
    """The run that a config file is for.

    Args:
        path: the config, given as a path that ends like ``Run.config`` (absolute, or from any
            folder), or as its bare file name. ``.yaml`` may be left out.

    Returns:
        None if the paper has no such run. A file of the same name in a folder other than the arm's
        is somebody's own, and is not taken for the paper's. A search is never returned: the config
        that it starts from is another run's.
    """
    parts = Path(path).parts
    if not parts:
        return None
    if not parts[-1].endswith(".yaml"):
        parts = (*parts[:-1], parts[-1] + ".yaml")
    for run in _runs():
        if not run.config or run.kind == "search":
            continue
        config = tuple(run.config.split("/"))
        # Names are unique over all folders, so a bare one is enough.
        if parts[-len(config) :] == config or parts == config[-1:]:
            return run
    return None


@functools.cache
def _runs() -> tuple[Run, ...]:
    with open(_CSV, newline="", encoding="utf-8") as f:
        return tuple(_parse(row) for row in csv.DictReader(f))


def _parse(row: dict[str, str]) -> Run:
    """Turn the texts of one row into the types of :class:`Run`; an empty cell means None there."""
    also = (item.rsplit(" ", 1) for item in row["also_published"].split("; ") if item)
    return Run(
        **{
            **row,
            "partner": row["partner"] or None,
            "trunk": row["trunk"] or None,
            "branch_iteration": int(row["branch_iteration"]) if row["branch_iteration"] else None,
            "published": float(row["published"]) if row["published"] else None,
            "also_published": {metric: float(value) for metric, value in also},
            "optional": row["optional"] == "yes",
        }
    )
