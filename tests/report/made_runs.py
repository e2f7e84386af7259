"""Run folders for the tests of the report, written by what writes them in a training."""

import os

import yaml
from detectron2.utils.events import EventStorage, JSONWriter

from rethink_d2 import paper
from rethink_d2.engine.record import RunRecord, append_result
from rethink_d2.solver.schedule import parse
from rethink_d2.sweep.plan import Node

METRICS = ("bbox/AP", "bbox/AP50", "bbox/AP75", "segm/AP", "segm/AP50", "segm/AP75")


def config_tree(max_iter, steps=(), **options):
    """What the report reads of a config; options by dotted key with __ for its dots."""
    flat = {
        "SOLVER.MAX_ITER": max_iter,
        "SOLVER.STEPS": list(steps),
        "SOLVER.IMS_PER_BATCH": 16,
        "SOLVER.ONE_X": 90_000,
        "SOLVER.BASE_LR": 0.02,
        "DATASETS.TEST": ["coco_2017_val"],
        "SEED": 1,
        **{key.replace("__", "."): value for key, value in options.items()},
    }
    tree = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def make_run(
    out,
    run_id,
    evaluations,
    *,
    seed=1,
    folder=None,
    state="done",
    metric="bbox/AP",
    dataset="coco_2017_val",
    max_iter=None,
    parent=None,
    losses=None,
    **options,
):
    """A run folder.

    Args:
        out (Path): the output folder.
        run_id (str): also its folder, unless `folder` is given.
        evaluations (dict): value of `metric`, or all metrics, by iteration.
        losses (dict or None): total loss by (0-based) iteration.
        max_iter (int or None): the last evaluation's iteration.
        options: for :func:`config_tree`.
    """
    path = out / (folder or f"{run_id}/seed{seed}")
    path.mkdir(parents=True)
    max_iter = max_iter or max(evaluations)
    (path / "config.yaml").write_text(yaml.safe_dump(config_tree(max_iter, SEED=seed, **options)))
    record = RunRecord(str(path), run_id=run_id, identity=f"{run_id} {seed}", seed=seed, parent=parent)
    for iteration, values in evaluations.items():
        values = values if isinstance(values, dict) else {metric: values}
        append_result(str(path), iteration, dataset, values)
    if losses:
        with EventStorage() as storage:
            writer = JSONWriter(str(path / "metrics.json"), window_size=1)
            for iteration, loss in losses.items():
                storage.iter = iteration
                storage.put_scalar("total_loss", loss)
                writer.write()
            writer.close()
    if isinstance(state, Exception):
        record.fail(state)
    else:
        record.write(state)
    return path


def branch_of(run_id, iteration, seed=1):
    """``parent`` of a branch, as training records it."""
    folder = os.path.join("..", "..", run_id, f"seed{seed}")
    return {"run_id": run_id, "identity": "", "folder": folder, "iteration": iteration, "sha256": ""}


def make_paper(out):
    """The whole manifest, two seeds 0.5 below and above what was published; where nothing was, around 30."""
    for run in paper.load():
        if not run.config or run.kind == "search":
            continue
        length = 100 if run.kind == "pretrain" else parse(run.schedule, 16).max_iter
        known = {metric: 30.0 for metric in (*METRICS, "bbox_TTA/AP", "segm_TTA/AP")}
        known |= {run.metric: 30.0 if run.published is None else run.published, **run.also_published}
        losses = {length // 2: 1.0, length - 1: 0.5} if "Fig 8" in run.figure else None
        for seed, offset in ((1, -0.5), (2, 0.5)):
            final = {metric: value + offset for metric, value in known.items()}
            if run.kind == "evaluate":
                path = out / run.id / f"seed{seed}"
                path.mkdir(parents=True)
                append_result(str(path), length, "coco_2017_val", final)
            else:
                half = {metric: value / 2 for metric, value in final.items()}
                make_run(out, run.id, {length // 2: half, length: final}, seed=seed, losses=losses)


def node(id):
    """A planned run."""
    run_id = id.split("/")[-2]
    run = next((run for run in paper.load() if run.id == run_id), paper.load()[0])
    return Node(
        id=id,
        run=run,
        seed=1,
        kind=run.kind,
        config_file="",
        options=(),
        parents=(),
        branch_from=None,
        start=0,
        iterations=100,
        identity="planned",
        gpu_hours=1.0,
        disk_gb=0.0,
    )
