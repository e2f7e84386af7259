"""The plan of a sweep: which runs, in which order, what they share, what they cost.

Everything follows from the manifest of the paper's runs and from their configs:

- A run whose MODEL.WEIGHTS is the output of another one comes after it: pre-training, and test-time
  augmentation of a trained model.
- The schedules of one curve share their trajectory up to the first rate drop, so only the longest one that is
  planned, the trunk, trains from iteration 0; the others branch off it at the manifest's iteration.
  A run that itself branched off another one in an earlier sweep has no early checkpoints: what would branch
  off there starts from that other one, or, where that is gone, trains from iteration 0.
- A cascade phase branches off the run without cascade. That is planned in its full length, because no shorter
  schedule has the same rate for as long.

A selection brings along what it needs and nothing more: asked for 2x and 3x of a curve, the 3x is the trunk.
"""

import functools
import itertools
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from detectron2.config import CfgNode

from .. import model_zoo, paper, recipe
from ..engine.checkpoint import checkpoints
from ..paper import Run
from ..solver.schedule import ONE_X, REFERENCE_BATCH, parse
from . import costs, miniature
from .records import run_record
from .selection import select

__all__ = ["KINDS", "Node", "Total", "command", "identity", "plan", "resolved", "totals"]

# In the order in which one needs the other.
KINDS = ("pretrain", "train", "branch", "cascade", "evaluate", "search")
# Beside those at which others branch off.
CHECKPOINT_KEEP = 2
SET_BY_PLAN = ("OUTPUT_DIR", "SEED", "MODEL.WEIGHTS", "SOLVER.SCHEDULE", "SOLVER.BRANCH_POINTS")
_OUTPUT = re.compile(r"\./output/([^/]+)/seed1/model_final\.pth")


@dataclass(frozen=True)
class Node:
    """One run of a sweep.

    Attributes:
        id: ``<run id>/seed<k>``, also its folder below the sweep's.
        run: the manifest's row. (SyncBN's pre-training in miniature is not there; it has a row like it.)
        seed: SEED of the config.
        kind: one of :data:`KINDS`.
        config_file: path of its config.
        options: alternating keys and values on top of it.
        parents: ids of the nodes that have to be done first; the one that it continues is the first.
        branch_from: id of the run from whose checkpoint it starts; None where it starts from iteration 0. Not
            among the parents where only an earlier sweep had planned that run.
        start: the iteration at which it starts.
        iterations: how many it trains itself; of a search, those of all trials.
        identity: :func:`identity` at the time of planning.
        gpu_hours: of GPUs, in miniature of CPU cores; see costs.csv.
        disk_gb: of the checkpoints that it keeps.
        selected: False for what came along because others need it.
    """

    id: str
    run: Run
    seed: int
    kind: str
    config_file: str
    options: tuple[str, ...]
    parents: tuple[str, ...]
    branch_from: str | None
    start: int
    iterations: int
    identity: str
    gpu_hours: float
    disk_gb: float
    selected: bool = True

    @property
    def folder(self) -> str:
        """Its run folder."""
        return self.options[self.options.index("OUTPUT_DIR") + 1]


class Total(NamedTuple):
    """Sums over nodes.

    Attributes:
        runs: how many nodes.
        iterations: that they train.
        naive: that they would train if each ran alone from iteration 0.
        gpu_hours, disk_gb: as in :class:`Node`.
    """

    runs: int
    iterations: int
    naive: int
    gpu_hours: float
    disk_gb: float


def plan(
    out: str | os.PathLike,
    *,
    only: Sequence[str] = (),
    figures: Sequence[str | int] = (),
    arm: str | None = None,
    schedules: Sequence[str] = (),
    seeds: int = 1,
    optional: bool = False,
    mini: bool = False,
    one_x: int | None = None,
    num_gpus: int = 1,
    options: Sequence[str] = (),
    measured: Mapping[str, float] | None = None,
) -> list[Node]:
    """List what it takes to run a part of the paper, or all of it. A run is in it if it fits every filter.

    Args:
        out: folder of the sweep.
        only: patterns of run ids, such as ``base-r50-*``; one must fit.
        figures: ``1`` for Fig 1, or as the manifest has it, such as ``Table 3``; one must fit.
        arm: ``scratch`` or ``pretrained``.
        schedules: such as ``2x``; one must fit.
        seeds: every run with seeds 1 to this.
        optional: also what the manifest calls optional (searches, the other reading of VOC, pre-training with
            public weights). Without, ``only`` has to name such a run in full.
        mini: everything in miniature, see :mod:`rethink_d2.sweep.miniature`.
        one_x: iterations of 16 images that 1x means in miniature; None for those of a quick look.
        num_gpus: processes of each run; the identity of some depends on it.
        options: alternating keys and values for all runs, such as ``MODEL.DEVICE cpu``.
        measured: from :func:`rethink_d2.sweep.costs.measure`; counts more than costs.csv.

    Returns:
        the nodes, parents before children.

    Raises:
        ValueError: nothing fits a filter, or an option is wrong.
    """
    if seeds < 1:
        raise ValueError(f"--seeds {seeds}: at least 1 is needed")
    for key in options[::2]:
        if key in SET_BY_PLAN:
            raise ValueError(f"{key}: the sweep sets it for every run")
    if one_x is not None and not mini:
        raise ValueError("--one-x: only with --mini; the paper's 1x is 90k iterations")
    wanted = select(only, figures, arm, schedules, optional)
    if mini and one_x is None:
        one_x = miniature.MINI_ONE_X
    planner = _Planner(os.fspath(out), wanted, one_x, num_gpus, tuple(options), measured or {})
    nodes = [planner.node(run, seed) for run, seed in itertools.product(planner.runs, range(1, seeds + 1))]
    return sorted(nodes, key=lambda node: KINDS.index(node.kind))


def command(node: Node, num_gpus: int = 1, out: str | os.PathLike | None = None) -> list[str]:
    """The command that runs a node, or goes on with it where it was interrupted.

    Args:
        node: from :func:`plan`.
        num_gpus: processes.
        out: folder of the sweep; None for the plan's.
    """
    root = node.folder.removesuffix(node.id) if out is None else os.fspath(out)
    words = [sys.executable, "-m", "rethink_d2.search" if node.kind == "search" else "rethink_d2.train"]
    words += ["--num-gpus", str(num_gpus), "--config-file", node.config_file]
    options = list(node.options)
    if node.kind == "search":
        at = options.index("OUTPUT_DIR")  # every trial gets its own
        return [*words, "--output", node.folder, *options[:at], *options[at + 2 :]]
    # A free port for each, because several may run on one machine.
    words += ["--dist-url", "auto", "--eval-only" if node.kind == "evaluate" else "--resume"]
    if node.branch_from:
        words += ["--branch-from", os.path.join(root, node.branch_from)]
    return [*words, *options]


def identity(node: Node, num_gpus: int = 1) -> str:
    """What a node computes, as its run.json will say.

    Weights enter by their content, or by their path as long as they are not there; so it changes once, when
    the parent that makes them is done. In miniature and with SyncBN it depends on the number of processes.
    """
    return recipe.identity(resolved(node, num_gpus))


def resolved(node: Node, processes: int) -> CfgNode:
    """The config that a node's processes train with."""
    return _resolved(node.config_file, node.options, processes)


def totals(nodes: Iterable[Node]) -> dict[str, Total]:
    """Sums by what is done: ``detection``, ``pre-training``, ``evaluation``, ``search``, if there is any.

    Only detection can share: the naive plan of the others is the plan.
    """
    groups = {"pretrain": "pre-training", "evaluate": "evaluation", "search": "search"}
    found = {}
    for node in nodes:
        row = Total(1, node.iterations, node.start + node.iterations, node.gpu_hours, node.disk_gb)
        name = groups.get(node.kind, "detection")
        found[name] = Total(*map(sum, zip(found.get(name, (0,) * len(row)), row, strict=True)))
    return {name: found[name] for name in ("detection", *groups.values()) if name in found}


def _resolved(config_file, options, processes):
    return recipe.resolve(recipe.load(config_file, options), processes)


_resolved_once = functools.cache(_resolved)


def _curve(run):
    """What the schedules of one curve have in common."""
    return run.trunk or run.id


def _trials(run, options, cfg):
    """The lengths of all trials of a search."""
    from ..search import default_grid  # here, because it takes optuna along

    grid = default_grid(model_zoo.get_config_file(run.config), options)
    solver = cfg.SOLVER
    lengths = [
        parse(text, solver.IMS_PER_BATCH, solver.ONE_X).max_iter
        for text in grid.pop("SOLVER.SCHEDULE", (solver.SCHEDULE,))
    ]
    return lengths * math.prod(map(len, grid.values()))


class _Planner:
    """Makes nodes of runs.

    Args:
        out, num_gpus, options, measured: as :func:`plan`.
        one_x (int or None): 1x of the miniature in iterations of 16 images; None for full size.
        wanted (list[Run]): what was asked for.
    """

    def __init__(self, out, wanted, one_x, num_gpus, options, measured):
        self._out, self._mini, self._one_x = out, one_x is not None, one_x
        self._num_gpus = num_gpus
        self._options, self._measured = options, measured
        self._wanted = frozenset(run.id for run in wanted)
        self.runs = []
        for run in wanted:
            self._add(run)
        self._trunks = {}
        for run in self.runs:
            if run.kind == "train":
                if self._shorter(self._trunks.setdefault(_curve(run), run), run):
                    self._trunks[_curve(run)] = run

    def _add(self, run):
        """Add a run after those that it needs, once."""
        if run not in self.runs:
            for parent in self._needs(run):
                self._add(parent)
            self.runs.append(run)

    def _needs(self, run):
        """The runs that a run starts from, whatever else is planned."""
        weights = self._weights(run)
        continues = [paper.find(run.trunk)] if run.kind in ("cascade", "evaluate") else []
        return [*continues, *([weights] if weights and weights not in continues else [])]

    def _weights(self, run):
        """The run whose output is MODEL.WEIGHTS; None for random or published ones."""
        made = _OUTPUT.fullmatch(self._config(run).MODEL.WEIGHTS)
        if self._mini and run.kind != "evaluate":
            return miniature.pretraining(run)
        return paper.find(made[1]) if made else None

    def _shared(self, run):
        """The options that a run has with every seed."""
        return (*(miniature.mini_options(run, self._one_x) if self._mini else ()), *self._options)

    def _config(self, run):
        return _resolved_once(model_zoo.get_config_file(run.config), self._shared(run), self._num_gpus)

    def _shorter(self, run, other):
        return self._config(run).SOLVER.MAX_ITER < self._config(other).SOLVER.MAX_ITER

    def _trunk(self, run):
        """The run from whose checkpoint a run starts, if any."""
        if run.kind == "cascade":
            return paper.find(run.trunk)
        trunk = self._trunks.get(_curve(run)) if run.kind == "train" else None
        return None if trunk == run else trunk

    def _source(self, run, seed):
        """The id of the node from whose checkpoint a run starts; None where it starts from iteration 0."""
        trunk = self._trunk(run)
        if trunk is None:
            return None
        source = planned = f"{trunk.id}/seed{seed}"
        if run.kind == "cascade":
            return source
        start = self._at(run, run.branch_iteration)
        while parent := run_record(os.path.join(self._out, source)).get("parent"):
            if parent["iteration"] <= start:
                break
            source = os.path.normpath(os.path.join(source, parent["folder"]))
        kept = checkpoints(os.path.join(self._out, source))
        return source if source == planned or start - 1 in kept else None

    def _at(self, run, iteration):
        """An iteration of 16 images at full size, as the config counts."""
        solver = self._config(run).SOLVER
        return int(Fraction(iteration * solver.ONE_X * REFERENCE_BATCH, ONE_X * solver.IMS_PER_BATCH))

    def _branch_points(self, run):
        """Where others may branch off a trunk: not only those that are planned, so that a later sweep, which
        asks for more of the curve, finds its checkpoints."""
        if run.kind != "train" or self._trunk(run):
            return ()
        points = {
            other.branch_iteration
            for other in paper.load()
            if (other.kind == "cascade" and other.trunk == run.id)
            or (other.kind == "train" and _curve(other) == _curve(run) and self._shorter(other, run))
        }
        return tuple(self._at(run, point) for point in sorted(points))

    def node(self, run, seed):
        """The node of a run, which is one of ``self.runs``, with a seed."""

        def id_of(other):
            return f"{other.id}/seed{seed}"

        source, weights = self._source(run, seed), self._weights(run)
        needed = (source, id_of(weights) if weights else None)
        points = self._branch_points(run)
        own = {"OUTPUT_DIR": os.path.join(self._out, id_of(run)), "SEED": seed}
        if weights:
            own["MODEL.WEIGHTS"] = os.path.join(self._out, id_of(weights), "model_final.pth")
        if run.kind != "evaluate":
            own["SOLVER.CHECKPOINT_KEEP"] = CHECKPOINT_KEEP
        if points:
            own["SOLVER.BRANCH_POINTS"] = points
        options = (*self._shared(run), *(str(word) for item in own.items() for word in item))
        cfg = self._config(run).clone()
        cfg.merge_from_list([word for item in own.items() for word in item])
        start = self._at(run, run.branch_iteration) if source else 0
        lengths = [cfg.SOLVER.MAX_ITER - start]
        if run.kind == "evaluate":
            lengths = []
        elif run.kind == "search":
            lengths = _trials(run, options, cfg)
        iterations = sum(lengths)
        return Node(
            id=id_of(run),
            run=run,
            seed=seed,
            kind="branch" if run.kind == "train" and source else run.kind,
            config_file=model_zoo.get_config_file(run.config),
            options=options,
            parents=tuple(id for id in needed if id in map(id_of, self.runs)),
            branch_from=source,
            start=start,
            iterations=iterations,
            identity=recipe.identity(cfg),
            gpu_hours=self._hours(run, iterations),
            disk_gb=(CHECKPOINT_KEEP * len(lengths) + len(points)) * costs.checkpoint_gb(cfg),
            selected=run.id in self._wanted,
        )

    def _hours(self, run, iterations):
        if iterations and run.family in self._measured:
            return self._measured[run.family] * iterations / 3600
        return costs.find(run, self._mini).hours(iterations)
