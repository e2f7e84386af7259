"""What a Slurm job decides, without Slurm; test_slurm.py has the real one."""

import json
import os
import subprocess
import sys
import types

import pytest
import standin
import submitit
from standin import node, starts

from rethink_d2 import model_zoo
from rethink_d2.sweep import slurm
from rethink_d2.sweep.plan import resolved
from rethink_d2.sweep.process import current
from rethink_d2.sweep.slurm import Job, SlurmSweep
from rethink_d2.sweep.state import State, progress, recorded_state

MINI = model_zoo.get_config_file("mini/scratch_mask_rcnn_R_18_FPN_gn.yaml")


@pytest.fixture
def requeued(monkeypatch, tmp_path):
    """Jobs as if Slurm ran them; a list of those that have been put back."""
    back = []

    def run(argv, **_):
        if argv[:2] == ["scontrol", "requeue"]:
            back.append(argv[2])
            monkeypatch.setenv("SLURM_RESTART_COUNT", str(len(back)))

    task = types.SimpleNamespace(num_tasks=1, global_rank=0, job_id="7")
    monkeypatch.setattr(submitit, "JobEnvironment", lambda: task)
    monkeypatch.setattr(slurm, "queue", lambda: {"7": "RUNNING"})
    monkeypatch.setattr(slurm, "subprocess", types.SimpleNamespace(run=run, Popen=subprocess.Popen))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    # A job's process would hold the claim to its end.
    monkeypatch.setattr(Job, "_claim", lambda self: os.open(os.devnull, os.O_RDONLY))
    (tmp_path / ".slurm").mkdir()
    return back


def evaluation(out, code=""):
    """One of weights that its parent makes, planned before these are there; and its job."""
    weights = out / "a/seed1/model_final.pth"
    options = ("MODEL.WEIGHTS", weights, "DATASETS.TEST", "('glyphs_tiny_val',)", "SOLVER.SCHEDULE", "50")
    made = node("b/seed1", ["a/seed1"], kind="evaluate", config_file=MINI, options=options)
    made = current(made, 2)
    for id in ("a/seed1", "b/seed1"):
        (out / id).mkdir(parents=True)
    (out / "a/seed1/run.json").write_text(json.dumps({"identity": "a/seed1", "state": "done"}))
    weights.write_bytes(b"weights")
    return made, Job(str(out), made, [sys.executable, "-S", "-c", code], 2)


def test_an_evaluation_submitted_with_its_parents_is_finished_after_one_start(tmp_path, requeued):
    rows = [{"iteration": 50, "dataset": "glyphs_tiny_val", "bbox/AP": 1.0}]
    path = tmp_path / "b/seed1/results.json"
    made, job = evaluation(tmp_path, f"import json; json.dump({rows}, open('{path}', 'w'))")
    assert resolved(made, 2).SOLVER.MAX_ITER == 50
    job()
    assert requeued == []
    assert recorded_state(str(tmp_path), current(made, 2)) is State.FINISHED
    path.chmod(0o444)
    job()  # queued again all the same, it does nothing
    assert recorded_state(str(tmp_path), current(made, 2)) is State.FINISHED


def test_an_evaluation_that_time_limits_interrupt_is_given_up(tmp_path, requeued):
    made, job = evaluation(tmp_path)
    for chained in (1, 2):
        again = job.checkpoint()
        job = again.function
        assert job.chained == chained
    with pytest.raises(RuntimeError, match="3 times.*--slurm time"):
        job.checkpoint()
    look = progress(str(tmp_path), current(made, 2))
    assert look.state is State.FAILED and "--slurm time" in look.note


def test_trainings_chain_for_as_long_as_they_take(tmp_path):
    job = Job(str(tmp_path), node("a/seed1"), [], 1)
    for _ in range(9):
        job = job.checkpoint().function


@pytest.mark.parametrize("gain, count", [(20, 6), (0, 3)])
def test_crashes_are_counted_anew_from_each_checkpoint_on(tmp_path, requeued, gain, count):
    made = node("a/seed1", options=("CODES", [-9] * 5, "GAIN", gain))
    job = Job(str(tmp_path), made, standin.command(made, 1, str(tmp_path)), 1)
    (tmp_path / made.id).mkdir(parents=True)
    for _ in range(count - 1):
        job()
    assert len(requeued) == count - 1
    if gain:
        job()
        assert recorded_state(str(tmp_path), made) is State.FINISHED
    else:
        with pytest.raises(RuntimeError, match="ended with -9: killed by SIGKILL"):
            job()
    assert len(starts(tmp_path, "a/seed1")) == count and len(requeued) == count - 1


@pytest.mark.parametrize(
    "options, gpus", [({}, 8), ({"gpus_per_node": "0"}, None), ({"gpus_per_node": "a100:8"}, "a100:8")]
)
def test_gpus_are_asked_for_as_sbatch_takes_them(tmp_path, options, gpus):
    sweep = SlurmSweep(os.fspath(tmp_path), [], num_gpus=8, options={"nodes": "2", "time": "0.5", **options})
    asked = sweep._parameters(node("a/seed1"))
    assert asked["slurm_additional_parameters"].get("gpus_per_node") == gpus
    assert (asked["nodes"], asked["timeout_min"], asked["tasks_per_node"]) == (2, 30, 8)
    assert asked["slurm_additional_parameters"].keys() <= {"gpus_per_node", "requeue"}
