"""What a run costs: time by costs.csv beside this file or by finished runs, disk by its model's size."""

import csv
import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from .. import recipe
from ..disk import checkpoint_bytes
from ..modeling.inspection import build_meta
from ..paper import Run
from .records import run_record

__all__ = ["Cost", "checkpoint_gb", "find", "measure"]

_CSV = Path(__file__).with_name("costs.csv")


@dataclass(frozen=True)
class Cost:
    """One row of the table.

    Attributes:
        scale: ``paper``, or ``mini`` for the miniatures.
        runs: patterns of ``family/arm``, separated by spaces, of which one must fit.
        seconds: of one iteration of the config's batch.
        fixed: seconds that a run takes besides: of an evaluation all of it.
        processes: how many share the work: GPUs of the V100's class, in miniature CPU cores.
        basis: ``measured`` or ``estimate``.
        source: who measured it, or how it is derived.
    """

    scale: str
    runs: str
    seconds: float
    fixed: float
    processes: int
    basis: str
    source: str

    def hours(self, iterations: int) -> float:
        """Of one process for as many iterations, or of as many processes for a part of them."""
        return (self.seconds * iterations + self.fixed) * self.processes / 3600


@functools.cache
def load() -> tuple[Cost, ...]:
    """All rows, in the order of the file."""
    with open(_CSV, newline="", encoding="utf-8") as f:
        return tuple(
            Cost(
                **{
                    **row,
                    "seconds": float(row["seconds"]),
                    "fixed": float(row["fixed"]),
                    "processes": int(row["processes"]),
                }
            )
            for row in csv.DictReader(f)
        )


@functools.cache
def find(run: Run, mini: bool = False) -> Cost:
    """The first row that is about a run.

    Raises:
        KeyError: there is none.
    """
    name, scale = f"{run.family}/{run.arm}", "mini" if mini else "paper"
    for cost in load():
        if cost.scale == scale and any(fnmatchcase(name, pattern) for pattern in cost.runs.split()):
            return cost
    raise KeyError(f"{_CSV.name} has no row for {name} ({scale})")


def measure(nodes: Iterable) -> dict[str, float]:
    """Seconds of one process per iteration, evaluations included, of the finished runs of a plan.

    Args:
        nodes: from :func:`rethink_d2.sweep.plan.plan`, with the identities that they have now; their folders
            are read. A folder of another recipe, such as the miniature's, does not count.

    Returns:
        the mean by family, for those of which a run is finished.
    """
    spent = {}
    for node in nodes:
        record = run_record(node.folder)
        # What was a branch when it ran may be the trunk of another plan.
        start = (record.get("parent") or {}).get("iteration", 0)
        iterations = node.start + node.iterations - start
        done = record.get("state") == "done" and record["identity"] == node.identity
        if done and iterations > 0:
            cores = record["threads"] if " CPU, " in record["hardware"] else 1  # the table's unit on a CPU
            seconds = record["seconds"] * record["world_size"] * cores
            before = spent.get(node.run.family, (0, 0))
            spent[node.run.family] = before[0] + seconds, before[1] + iterations
    return {family: seconds / iterations for family, (seconds, iterations) in spent.items()}


def checkpoint_gb(cfg) -> float:
    """Size of one checkpoint; models that are built alike are measured once."""
    leaves = recipe.flatten(cfg.MODEL).items()
    key = json.dumps([leaf for leaf in leaves if leaf[0] not in ("WEIGHTS", "DEVICE")])
    if key not in _sizes:
        _sizes[key] = checkpoint_bytes(build_meta(cfg)) / 1e9
    return _sizes[key]


_sizes: dict[str, float] = {}
