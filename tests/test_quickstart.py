"""The quickstart and the breakdown: what they run, and what they make of it."""

import json
import os
import subprocess
import sys

import pytest

from rethink_d2 import quickstart
from rethink_d2.files import write_json
from rethink_d2.quickstart import FIGURES, table
from rethink_d2.report.runs import find_runs
from rethink_d2.sweep.plan import plan
from rethink_d2.sweep.state import remember


def nodes_of(out, figure, seeds=1):
    mini = FIGURES[figure]
    selection = {"figures": [figure], "schedules": mini.schedules, "seeds": seeds, "options": mini.options}
    return plan(out, mini=True, one_x=mini.one_x, **selection)


def finish(node, ap, loss):
    """What a run leaves behind: nothing detected at 10, then `ap`."""
    end = node.start + node.iterations
    results = [
        {"iteration": i, "dataset": "glyphs_val", "bbox/AP": value} for i, value in ((10, None), (end, ap))
    ]
    write_json(os.path.join(node.folder, "results.json"), results)
    write_json(os.path.join(node.folder, "run.json"), {"state": "done", "identity": node.identity})
    rows = [
        {"iteration": 9, "total_loss": 9.0},
        {"iteration": 14, "lr": 1},
        {"iteration": end - 1, "total_loss": loss},
    ]
    with open(os.path.join(node.folder, "metrics.json"), "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def table_of(out, nodes, **values):
    """The table's rows, as words, once each run has ended with the values given for it."""
    trained = [node for node in nodes if node.kind != "pretrain"]
    remember(out, nodes)
    for node in trained:
        finish(node, **{name: value(node) for name, value in values.items()})
    return [line.split() for line in table(find_runs(out), trained).splitlines()]


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


def test_table(tmp_path):
    nodes = nodes_of(tmp_path, "1", seeds=2)
    rows = table_of(
        tmp_path,
        nodes,
        ap=lambda n: 10 * int(n.run.schedule[0]) + 5 * (n.run.arm == "pretrained") + 2 * (n.seed == 2),
        loss=lambda n: n.seed,
    )
    assert rows[-3:] == [
        ["2x", "21.0", "26.0", "5.0", "1.50", "1.50"],
        ["4x", "41.0", "46.0", "5.0", "1.50", "1.50"],
        ["6x", "61.0", "66.0", "5.0", "1.50", "1.50"],
    ]
    one = [node for node in nodes if node.seed == 2 and node.kind != "pretrain"]
    assert table(find_runs(tmp_path), one).splitlines()[-1].split()[:2] == ["6x", "62.0"]


def test_table_of_schedules_that_differ(tmp_path):
    rows = table_of(
        tmp_path,
        nodes_of(tmp_path, "8"),
        ap=lambda node: None if node.run.arm == "scratch" else 12,
        loss=lambda node: 0.5,
    )
    assert rows[-1] == ["60k", "/", "15k", "0.0", "12.0", "12.0", "0.50", "0.50"]


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
@pytest.mark.timeout(3600)
def test_quickstart_from_end_to_end(glyph_cache, tmp_path):
    """Pre-training leads at the short schedule and no longer at the long one. Then nothing is left to do."""
    command = [sys.executable, "-m", "rethink_d2.quickstart", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    gaps = {row[0]: float(row[3]) for row in rows if row and row[0] in FIGURES["1"].schedules}
    assert list(gaps) == ["2x", "4x", "6x"], done.stdout
    assert gaps["2x"] > 7.5 and abs(gaps["6x"]) <= min(2.5, gaps["2x"] / 3), gaps
    assert (tmp_path / "report" / "index.html").exists()
    assert "All 7 runs are finished" in done.stdout
    assert (tmp_path / "detections.png").stat().st_size > 5000
    trained = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pth")}
    assert len(trained) >= 7
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "started" not in again.stdout
    assert trained == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pth")}
