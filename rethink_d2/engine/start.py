"""Where a run starts: from its config, its own checkpoint, or a checkpoint of a run it branches off."""

import dataclasses
import json
import logging
import os

from detectron2.utils import comm

from .. import recipe
from ..files import read_json
from ..solver.schedule import parse
from . import checkpoint

__all__ = ["CASCADE_CHANGE", "Start", "agree_on", "find_start", "find_weights"]

logger = logging.getLogger(__name__)

# What the cascade phase of a run changes (paper, section 5.1); everything else stays its trunk's.
CASCADE_CHANGE = (
    "SOLVER.CASCADE_FROM",
    "MODEL.ROI_HEADS.NAME",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG",
    "MODEL.ROI_BOX_CASCADE_HEAD.",
)


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        kind (str): "fresh", "resume", "branch" or "cascade" (a branch that changes its heads).
        path (str or None): the checkpoint.
        iteration (int): the last one that the checkpoint contains; -1 for none.
        sha256 (str or None): of the checkpoint.
        parent (dict or None): for run.json, of a branch.
    """

    kind: str = "fresh"
    path: str | None = None
    iteration: int = -1
    sha256: str | None = None
    parent: dict | None = None


def find_start(cfg, *, resume=False, branch_from=None, allow=()):
    """Decide where a run starts and prove that it may.

    Args:
        cfg (CfgNode): the resolved config.
        resume (bool): go on from the newest whole checkpoint of OUTPUT_DIR if there is any.
        branch_from (str or None): the run folder of a run whose trajectory this one shares at first.
        allow (iterable[str]): keys that may differ all the same.

    Returns:
        Start: the decision; nothing is loaded yet.

    Raises:
        ValueError: there is something in OUTPUT_DIR already, or nothing to branch from, or the other
            config trains something else; names the folder, or the keys.
    """
    folder = cfg.OUTPUT_DIR
    own = checkpoint.checkpoints(folder)
    if resume and own:
        return _resume(cfg, own, allow)
    if own:
        raise ValueError(
            f"OUTPUT_DIR {folder} holds a run of {max(own) + 1} iterations already; add --resume to go on "
            "with it, or set another OUTPUT_DIR"
        )
    if branch_from:
        return _branch(cfg, branch_from, allow)
    if cfg.SOLVER.CASCADE_FROM:
        raise ValueError(
            f"SOLVER.CASCADE_FROM {cfg.SOLVER.CASCADE_FROM}: this run starts from another one's checkpoint; "
            "give --branch-from and the folder of that run"
        )
    return Start()


def find_weights(cfg, *, resume=False, allow=()):
    """Decide which weights an evaluation alone is of, and prove that its results may go where they would.

    Args:
        cfg (CfgNode): the resolved config.
        resume (bool): take the newest whole checkpoint of OUTPUT_DIR if there is any, not MODEL.WEIGHTS.
        allow (iterable[str]): keys that may differ from those of a run in OUTPUT_DIR.

    Returns:
        str: a path or name, as MODEL.WEIGHTS.

    Raises:
        ValueError: there are no weights, or OUTPUT_DIR holds a run, whose results.json it would change,
            and they are another run's or its settings are not these.
    """
    folder, weights = cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS
    own = checkpoint.checkpoints(folder)
    newest = _newest_whole(own.values())
    if resume and newest:
        weights = newest
    if not weights:
        hint = f", or give --resume for the newest checkpoint of OUTPUT_DIR {folder}" if newest else ""
        raise ValueError(f"--eval-only: there are no weights to evaluate; set MODEL.WEIGHTS{hint}")
    if newest:
        if os.path.realpath(os.path.dirname(weights)) != os.path.realpath(folder):
            raise ValueError(
                f"MODEL.WEIGHTS {weights}: results of another model would be among those of the run in "
                f"OUTPUT_DIR {folder}; set another OUTPUT_DIR"
            )
        differing = recipe.differences(_settings(newest), recipe.settings(cfg))
        cure = "set them back, set another OUTPUT_DIR, or accept one with --allow-config-change KEY"
        # The run's own weights, and further data sets, change nothing that it says already.
        _refuse(differing, (*allow, "MODEL.WEIGHTS", "DATASETS."), folder, cure)
    return weights


def _resume(cfg, own, allow):
    path = _newest_whole(own.values())
    if path is None:
        raise ValueError(f"OUTPUT_DIR {cfg.OUTPUT_DIR}: none of its {len(own)} checkpoints is whole")
    then, now = _settings(path), recipe.settings(cfg)
    iteration = next(i for i, p in own.items() if p == path)
    _refuse(recipe.differences(then, now), allow, path)
    shared = recipe.shared_iterations(then, now)
    if iteration >= shared and not set(allow) & recipe.SCHEDULE:
        raise ValueError(
            f"SOLVER.SCHEDULE: {path} has trained {iteration + 1} iterations, but its schedule agrees with "
            f"the new one for {shared} only; train the new one in another OUTPUT_DIR with --branch-from "
            f"{cfg.OUTPUT_DIR}"
        )
    return Start("resume", path, iteration, checkpoint.digest(path))


def _branch(cfg, trunk, allow):
    found = checkpoint.checkpoints(trunk)
    newest = _newest_whole(found.values())
    if newest is None:
        raise ValueError(
            f"--branch-from {trunk}: no whole checkpoint there; give the run folder of the other run"
        )
    then, now = _settings(newest), recipe.settings(cfg)
    cascade = cfg.SOLVER.CASCADE_FROM
    declared = CASCADE_CHANGE if cascade else ()
    _refuse(recipe.differences(then, now), (*allow, *declared), trunk)
    shared = recipe.shared_iterations(then, now)
    if cascade:
        begin = parse(cascade, cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ONE_X).max_iter
        if begin > shared:
            raise ValueError(
                f"SOLVER.CASCADE_FROM {cascade}: the schedules agree for {shared} iterations only"
            )
        usable = [path for i, path in found.items() if i + 1 == begin]
        wanted = f"the one after {begin} iterations (SOLVER.BRANCH_POINTS keeps it)"
    else:
        usable = [path for i, path in found.items() if i + 1 <= shared]
        wanted = f"one of at most {shared} iterations, up to which the schedules agree"
    path = _newest_whole(usable)
    if path is None:
        raise ValueError(f"--branch-from {trunk}: no whole checkpoint to start from; needed is {wanted}")
    iteration = next(i for i, p in found.items() if p == path)
    record = read_json(os.path.join(trunk, "run.json"), {})
    parent = {
        "run_id": record.get("run_id"),
        "identity": record.get("identity"),
        "folder": os.path.relpath(trunk, cfg.OUTPUT_DIR),
        "iteration": iteration + 1,
        "sha256": checkpoint.digest(path),
    }
    return Start("cascade" if cascade else "branch", path, iteration, parent["sha256"], parent)


def _newest_whole(paths):
    """The first whole file; says which ones are passed over."""
    for path in paths:
        if checkpoint.is_whole(path):
            return path
        logger.warning("%s is damaged or incomplete: falling back to an earlier checkpoint", path)
    return None


def _settings(path):
    """The settings of the run that wrote a checkpoint."""
    text = checkpoint.read(path).get("settings")
    if text is None:
        raise ValueError(
            f"{path} does not say how it was trained, so it was not written by this project; to start "
            "from its weights set MODEL.WEIGHTS"
        )
    return json.loads(text)


def _refuse(
    differing,
    allow,
    where,
    cure="set them back, or accept a run that is not one recipe with --allow-config-change KEY",
):
    """Raise for keys that change what was trained already."""
    wrong = [
        f"{key}: {old!r} there, {new!r} now"
        for key, (old, new) in differing.items()
        if recipe.classify(key) == "trajectory"
        and not any(key == a or (a.endswith(".") and key.startswith(a)) for a in allow)
    ]
    if wrong:
        raise ValueError(
            f"{where} was trained with other settings:\n  " + "\n  ".join(wrong) + f"\nWhat helps: {cure}"
        )


def agree_on(start):
    """Let the main process's decision count for all, and make sure that all read the same file.

    Args:
        start (Start): this process's decision.

    Returns:
        Start: the main process's.

    Raises:
        CheckpointError: a process cannot read the checkpoint, or reads another one.
    """
    start = comm.all_gather(start)[0]
    if start.path is None or comm.get_world_size() == 1:
        return start
    same = os.path.isfile(start.path) and checkpoint.digest(start.path) == start.sha256
    wrong = [rank for rank, ok in enumerate(comm.all_gather(same)) if not ok]
    if wrong:
        raise checkpoint.CheckpointError(
            f"{start.path} is not the main process's file on the processes {wrong}; OUTPUT_DIR must be one "
            "folder that all of them share"
        )
    return start
