"""The quickstart and the breakdown: what they run, and what they make of it."""

import json
import math
import os
import subprocess
import sys

import pytest

from rethink_d2 import quickstart
from rethink_d2.files import write_json
from rethink_d2.quickstart import FIGURES, ap_points, by_schedule, curves, loss_points, mean_points, table
from rethink_d2.sweep.plan import plan


def nodes_of(out, figure, seeds=1):
    mini = FIGURES[figure]
    selection = {"figures": [figure], "schedules": mini.schedules, "seeds": seeds, "options": mini.options}
    return plan(out, mini=True, one_x=mini.one_x, **selection)


def finish(node, ap, loss):
    """What a run leaves behind: nothing detected at 10, then `ap`."""
    results = [
        {"iteration": i, "dataset": "glyphs_val", "bbox/AP": value} for i, value in ((10, None), (20, ap))
    ]
    write_json(os.path.join(node.folder, "results.json"), results)
    rows = [
        {"iteration": 9, "total_loss": 9.0},
        {"iteration": 14, "lr": 1},
        {"iteration": 19, "total_loss": loss},
    ]
    with open(os.path.join(node.folder, "metrics.json"), "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def finished(tmp_path):
    """Figure 1 with two seeds: AP is 10 times the schedule, 5 more with pre-training, 2 more with seed 2."""
    nodes = nodes_of(tmp_path, "1", seeds=2)
    for node in nodes:
        if node.kind != "pretrain":
            ap = 10 * int(node.run.schedule[0]) + 5 * (node.run.arm == "pretrained") + 2 * (node.seed == 2)
            finish(node, ap, loss=node.seed)
    return by_schedule(nodes)


def test_schedules_are_branches_of_one_trunk_per_arm():
    kinds = {(node.run.arm, node.run.schedule): node.kind for node in nodes_of("OUT", "1")}
    for arm in ("scratch", "pretrained"):
        assert [kinds[arm, schedule] for schedule in ("2x", "4x", "6x")] == ["branch", "branch", "train"]


def test_the_breakdown_is_both_arms_and_the_pretraining():
    assert {(n.run.arm, n.run.schedule) for n in nodes_of("OUT", "8")} == {
        ("scratch", "60k"),
        ("pretrained", "15k"),
        ("pretrained", "100ep"),
    }


def test_a_run_s_points(finished):
    folder = finished["scratch"]["4x"][0].folder
    assert ap_points(folder) == [(10, 0.0), (20, 40)]
    assert loss_points(folder) == [(10, 9.0), (20, 1)]


def test_points_are_averaged_over_seeds(finished):
    assert mean_points(finished["pretrained"]["2x"], ap_points) == [(10, 0.0), (20, 26)]


def test_table(finished):
    rows = [line.split() for line in table(finished).splitlines()[-3:]]
    assert rows == [
        ["2x", "21.0", "26.0", "5.0", "1.50", "1.50"],
        ["4x", "41.0", "46.0", "5.0", "1.50", "1.50"],
        ["6x", "61.0", "66.0", "5.0", "1.50", "1.50"],
    ]


def test_table_of_schedules_that_differ(tmp_path):
    nodes = [node for node in nodes_of(tmp_path, "8") if node.kind != "pretrain"]
    for node in nodes:
        finish(node, 7 if node.run.arm == "scratch" else 12, 0.5)
    assert table(by_schedule(nodes)).splitlines()[-1].split()[:6] == ["60k", "/", "15k", "7.0", "12.0", "5.0"]


def test_curves_break_between_schedules(finished):
    found = curves(finished, ap_points)
    assert list(found) == ["pre-trained", "from random weights"]
    values = [value for _, value in found["pre-trained"]]
    assert [v for v in values if not math.isnan(v)] == [0, 26, 0, 46, 0, 66]
    assert [math.isnan(v) for v in values] == [False, False, True] * 3


@pytest.mark.parametrize(
    "args, seeds", [([], {1}), (["--seed", "3"], {3}), (["--seeds", "2"], {1, 2})], ids=str
)
def test_seeds(args, seeds, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(quickstart, "preflight", lambda out, nodes: asked.extend(nodes) or ["a problem"])
    assert quickstart.cli(["--output", str(tmp_path), *args]) == 2
    assert {node.seed for node in asked} == seeds
    assert "nothing was started:\n- a problem" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "args, text",
    [(["SEED", "3"], "SEED: the sweep sets it"), (["--seed", "0"], "at least 1"), (["--seeds", "0"], "1")],
)
def test_wrong_arguments_are_refused(args, text, tmp_path, capsys):
    assert quickstart.cli(["--output", str(tmp_path), *args]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.slow
def test_quickstart_from_end_to_end(glyph_cache, tmp_path):
    """With trainings that are too short to learn anything; and again, when nothing is left to do."""
    command = [sys.executable, "-m", "rethink_d2.quickstart", "--output", str(tmp_path)]
    command += ["SOLVER.ONE_X", "1", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.WARMUP_ITERS", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "report" / "index.html").exists()
    assert "All 7 runs are finished" in done.stdout
    for name in ("ap_curve.png", "loss_curve.png", "detections.png"):
        assert (tmp_path / name).stat().st_size > 5000
    trained = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pth")}
    assert len(trained) >= 7
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "started" not in again.stdout
    assert trained == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pth")}
