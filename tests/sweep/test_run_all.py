"""scripts/run_all.sh itself: one curve of the paper in miniature, in the lengths that `--mini` gives it."""

import csv
import json
import subprocess
from pathlib import Path

import pytest

RUN_ALL = Path(__file__).parents[2] / "scripts" / "run_all.sh"
IDS = {f"base-r50-gn-{arm}-{schedule}" for arm in ("scratch", "pretrained") for schedule in ("2x", "3x")}


@pytest.mark.slow
def test_both_arms_of_one_curve_end_in_the_report(glyph_cache, tmp_path):
    selection = ["--mini", "--parallel", "2", "--only", "base-r50-gn-*", "--schedules", "2x,3x"]
    command = [RUN_ALL, *selection, "--out", "mine"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "All 5 runs are finished" in done.stdout
    out = tmp_path / "mine"
    made = {path.parent.parent.name for path in out.glob("*/seed1/model_final.pth")}
    assert made == {"imagenet-r50-gn-pretrained-100ep", *IDS}
    for arm in ("scratch", "pretrained"):
        record = json.loads((out / f"base-r50-gn-{arm}-2x" / "seed1" / "run.json").read_text())
        assert (record["parent"]["run_id"], record["parent"]["iteration"]) == (f"base-r50-gn-{arm}-3x", 72)
    assert (out / "report" / "index.html").stat().st_size > 1e6
    with open(out / "report" / "figure_1.csv", newline="") as f:
        drawn = {(row["arm"], row["curve"], row["x"]) for row in csv.DictReader(f)}
    assert {("scratch", "2x", "108"), ("pretrained", "3x", "162"), ("pretrained", "2x", "54")} <= drawn
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "started" not in again.stdout
