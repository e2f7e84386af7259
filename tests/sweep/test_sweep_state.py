import dataclasses
import fcntl
import io
import json
import os
import signal
import time

import pytest
from rich.console import Console
from standin import node

from rethink_d2 import model_zoo
from rethink_d2.sweep import state
from rethink_d2.sweep.process import lock
from rethink_d2.sweep.state import State, node_state, planned, progress, remember

A = "a/seed1"


def write(out, id=A, **files):
    """Files of a run folder; the key names the file, with _ for its dot."""
    folder = out / id
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / name.replace("_", ".")).write_text(text)
    return folder


def run(state, identity=A, error=None):
    return {"state": state, "identity": identity, "last_error": error}


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, State.WAITING),
        ({"launch_json": {"job_id": "7", "identity": None}}, State.WAITING),
        ({"run_json": run("done")}, State.FINISHED),
        ({"run_json": run("preempted")}, State.PREEMPTED),
        ({"run_json": run("failed", error="E: x")}, State.FAILED),
        ({"run_json": run("running")}, State.INTERRUPTED),
        ({"run_json": run("done", identity="other")}, State.CHANGED),
        ({"run_json": run("running", identity="other")}, State.CHANGED),
        ({"launch_json": {"exit": 2}}, State.FAILED),
        ({"launch_json": {"exit": -9}, "run_json": run("running")}, State.FAILED),
        ({"launch_json": {"exit": 2}, "run_json": run("preempted")}, State.FAILED),
        ({"launch_json": {"exit": 75}, "run_json": run("preempted")}, State.PREEMPTED),
        ({"launch_json": {"exit": 75}}, State.PREEMPTED),
        ({"launch_json": {"exit": 0}, "run_json": run("done")}, State.FINISHED),
    ],
)
def test_states(tmp_path, files, expected):
    write(tmp_path, **files)
    assert node_state(str(tmp_path), node(A)) is expected


@pytest.mark.parametrize("name", [".claim", ".lock"])
def test_a_held_lock_means_running_and_looking_disturbs_nobody(tmp_path, name):
    write(tmp_path, run_json=run("running"))
    held = lock(str(tmp_path / A / name))
    assert node_state(str(tmp_path), node(A)) is State.RUNNING
    os.close(held)
    assert node_state(str(tmp_path), node(A)) is State.INTERRUPTED
    held = lock(str(tmp_path / A / name))
    assert held is not None  # nothing is left of the looks
    os.close(held)


def test_two_who_look_do_not_see_each_other(tmp_path):
    path = write(tmp_path) / ".claim"
    path.touch()
    with open(path) as other:
        fcntl.flock(other, fcntl.LOCK_SH)  # what a look takes
        assert not state.held(str(path))


def test_a_job_runs_where_locks_do_not_reach(tmp_path):
    write(tmp_path, launch_json={"job_id": "7"}, run_json=run("running"))
    assert node_state(str(tmp_path), node(A), {"7": "RUNNING"}) is State.RUNNING
    assert node_state(str(tmp_path), node(A), {"7": "PENDING"}) is State.INTERRUPTED
    assert progress(str(tmp_path), node(A), {"7": "PENDING"}).state is State.INTERRUPTED
    write(tmp_path, run_json=run("preempted"))
    assert progress(str(tmp_path), node(A), {"7": "PENDING"}).note == "Slurm job 7 PENDING"


def test_an_evaluation_is_done_when_its_rows_are_there(tmp_path):
    config = model_zoo.get_config_file("mini/scratch_mask_rcnn_R_18_FPN_gn.yaml")
    names = ("glyphs_tiny_val", "glyphs_val_100")
    options = ["SOLVER.SCHEDULE", "50", "DATASETS.TEST", str(names)]
    made = node(A, kind="evaluate", config_file=config, options=options)
    rows = [{"iteration": 50, "dataset": name, "bbox/AP": 1.0} for name in names]
    write(tmp_path, launch_json={"identity": A, "exit": 0}, results_json=rows)
    assert node_state(str(tmp_path), made) is State.FINISHED
    write(tmp_path, results_json=rows[:1])
    assert node_state(str(tmp_path), made) is State.WAITING
    write(tmp_path, results_json=[{**row, "iteration": 40} for row in rows])
    assert node_state(str(tmp_path), made) is State.WAITING
    # The weights have changed since.
    write(tmp_path, launch_json={"identity": "other", "exit": 0}, results_json=rows)
    assert node_state(str(tmp_path), made) is State.WAITING


def test_progress_is_read_from_what_training_writes(tmp_path):
    made = node(A, start=100, iterations=300)
    rows = [{"iteration": i, "time": 0.5, "total_loss": 1.0} for i in (119, 199, 179)]
    text = "\n".join([*map(json.dumps, rows), '{"iteration": 5', json.dumps({"iteration": 159}), ""])
    results = [{"iteration": 150, "dataset": "x", "bbox/AP": 3.0}, {"iteration": 199, "bbox/AP": None}]
    write(tmp_path, run_json=run("running"), metrics_json=text, results_json=results)
    held = lock(str(tmp_path / A / ".claim"))
    found = progress(str(tmp_path), made)
    assert (found.iteration, found.max_iter, found.ap, found.rate) == (200, 400, 3.0, 2.0)
    assert found.left == 100
    os.close(held)
    found = progress(str(tmp_path), made)
    assert found.state is State.INTERRUPTED and found.left is None


def test_a_branch_begins_at_its_branch_point(tmp_path):
    made = node(A, start=100, iterations=300)
    write(tmp_path, launch_json={"exit": 2})  # refused
    assert progress(str(tmp_path), made).iteration == 0
    write(tmp_path, run_json=run("running"))
    assert progress(str(tmp_path), made).iteration == 100


def test_the_end_of_a_long_file_is_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "TAIL", 200)
    rows = "\n".join(json.dumps({"iteration": i, "time": 1.0}) for i in range(1000))
    write(tmp_path, metrics_json=rows)
    assert progress(str(tmp_path), node(A, iterations=2000)).iteration == 1000


def test_the_last_line_of_the_error_is_shown(tmp_path):
    write(tmp_path, run_json=run("failed", error="Diverged: first\nlast line\n"))
    assert progress(str(tmp_path), node(A)).note == "last line"
    write(tmp_path, "b/seed1", launch_json={"exit": 2}, launch_log="much\nerror: no such data\n\n")
    assert progress(str(tmp_path), node("b/seed1")).note == "error: no such data"


@pytest.mark.parametrize(
    "number, text",
    [(signal.SIGKILL, "killed by SIGKILL (out of memory?)"), (signal.SIGSEGV, "killed by SIGSEGV")],
)
def test_a_run_that_a_signal_killed_says_so(tmp_path, number, text):
    write(tmp_path, run_json=run("running"), launch_json={"exit": -number}, launch_log="iter: 19\n")
    assert progress(str(tmp_path), node(A)).note == text
    write(tmp_path, run_json=run("failed", error="E: why"))
    assert progress(str(tmp_path), node(A)).note == "E: why"


def test_the_plan_is_kept_and_grows(tmp_path):
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match="no sweep's folder"):
        planned(out)
    (tmp_path / "sweep.json").write_text("[]")
    with pytest.raises(ValueError, match="no sweep's folder"):
        planned(str(tmp_path))
    first, second = node("z/seed1"), node(A, ["z/seed1"], options=("KEY", "1"))
    remember(out, [first])
    remember(out, [second])
    assert planned(out) == [first, second]
    changed = node("z/seed1", identity="new")
    remember(out, [changed])
    assert planned(out) == [changed, second]


def shown(out, width=200):
    made, finished = state.table(str(out))
    console = Console(file=io.StringIO(), width=width)
    console.print(made)
    return console.file.getvalue(), finished


@pytest.mark.parametrize(
    "files",
    [
        {"run_json": '{"sta'},
        {"run_json": ""},
        {"run_json": []},
        {"run_json": {"state": "done"}},
        {"run_json": {"state": "lost", "identity": A}},
        {"launch_json": "5"},
        {"run_json": run("done"), "results_json": ["x"]},
    ],
)
def test_a_damaged_file_is_said_in_the_line_of_its_run(tmp_path, files):
    remember(str(tmp_path), [node(A), node("b/seed1")])
    path = write(tmp_path, **files) / [*files][-1].replace("_", ".")
    write(tmp_path, "b/seed1", run_json=run("done", "b/seed1"))
    text, finished = shown(tmp_path, 500)
    assert "1 of 2 finished" in text and "unreadable" in text and not finished
    assert f"{A}: {path} cannot be read: " in text
    with pytest.raises(ValueError, match="cannot be read"):
        progress(str(tmp_path), node(A))


def test_foreign_lines_of_metrics_are_passed_over(tmp_path):
    write(tmp_path, metrics_json='5\n[1]\n{"iteration": 9}\n')
    assert progress(str(tmp_path), node(A)).iteration == 10


@pytest.mark.parametrize("text", ['{"a', "7", '[{"id": "x"}]', '[{"id": "x", "run": {}, "config_file": ""}]'])
def test_a_damaged_plan_is_named(tmp_path, text):
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(ValueError, match="sweep.json cannot be read"):
        planned(str(tmp_path))


def test_a_plan_of_another_installation_is_read(tmp_path, monkeypatch):
    made = node(A, kind="evaluate", config_file=model_zoo.get_config_file("mini/imagenet_R_18_FPN_gn.yaml"))
    monkeypatch.setattr(model_zoo, "config_dir", lambda: tmp_path / "theirs")
    theirs = dataclasses.replace(made, config_file=str(tmp_path / "theirs/mini/imagenet_R_18_FPN_gn.yaml"))
    remember(str(tmp_path), [theirs])
    monkeypatch.undo()
    assert planned(str(tmp_path)) == [made]
    # A config of one's own is where it is, or was.
    lost = node("b/seed1", kind="evaluate", config_file="/gone/x.yaml")
    remember(str(tmp_path), [lost])
    write(tmp_path, "b/seed1", launch_json={"identity": "b/seed1"}, results_json=[])
    assert "b/seed1: " in shown(tmp_path)[0]


def test_the_table_shows_every_run(tmp_path):
    remember(str(tmp_path), [node(A), node("b/seed1")])
    write(tmp_path, run_json=run("done"), results_json=[{"dataset": "x", "iteration": 40, "bbox/AP": 41.26}])
    write(tmp_path, "b/seed1", run_json=run("failed", "b/seed1", "RuntimeError: [x] broke"))
    text, finished = shown(tmp_path)
    assert "1 of 2 finished" in text and not finished
    assert "41.3" in text and "40 / 40" in text and "RuntimeError: [x] broke" in text
    write(tmp_path, "b/seed1", run_json=run("done", "b/seed1"))
    assert shown(tmp_path)[1]


def test_watching_ends_with_the_last_run(tmp_path, monkeypatch):
    remember(str(tmp_path), [node(A)])
    looks = []

    def finish(seconds):
        if seconds == 3:  # others sleep, too
            looks.append(seconds)
            write(tmp_path, run_json=run("done"))

    monkeypatch.setattr(time, "sleep", finish)
    console = Console(file=io.StringIO(), width=100)
    state.watch(str(tmp_path), console, seconds=3)
    assert looks == [3] and "finished" in console.file.getvalue()
