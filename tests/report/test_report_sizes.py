"""A report is of full-size runs, or of miniatures of one length."""

import dataclasses

import pytest
from made_runs import make_run, node

from rethink_d2 import paper
from rethink_d2.report import write_report
from rethink_d2.report.figures import figures
from rethink_d2.report.runs import find_runs
from rethink_d2.report.verdicts import verdicts
from rethink_d2.sweep.state import remember

SCRATCH, PRETRAINED = "base-r50-gn-scratch-", "base-r50-gn-pretrained-"


def full_size(out):
    make_run(out, f"{SCRATCH}2x", {180_000: 36.8})
    make_run(out, f"{PRETRAINED}2x", {180_000: 40.3})


def miniature(out, one_x, schedules=("2x", "4x", "6x"), folder="", value=70.0):
    for arm in (SCRATCH, PRETRAINED):
        for schedule in schedules:
            end = 2 * one_x * int(schedule[0])
            options = {"SOLVER__ONE_X": one_x, "SOLVER__IMS_PER_BATCH": 8, "DATASETS__TEST": ["glyphs_val"]}
            path = f"{folder}{arm}{schedule}/seed1"
            make_run(out, f"{arm}{schedule}", {end: value}, folder=path, dataset="glyphs_val", **options)


def pre_training(out, folder):
    path = f"{folder}imagenet-r50-gn/seed1"
    make_run(out, "imagenet-r50-gn", {100: 90.0}, folder=path, DATASETS__TEST=["glyphs_characters_val"])


def paths(runs):
    return sorted(folder.path.split("/")[0] for folder in runs.folders)


def test_miniatures_in_a_folder_below_are_no_part_of_full_size_curves(tmp_path, capsys):
    full_size(tmp_path)
    miniature(tmp_path, 72, folder="quickstart/")
    pre_training(tmp_path, "quickstart/")
    write_report(str(tmp_path))
    runs = find_runs(str(tmp_path))
    (panel,) = figures(runs)[0].panels
    assert [(line.arm, line.x) for line in panel.lines] == [
        ("scratch", (180_000,)),
        ("pretrained", (180_000,)),
    ]
    (verdict,) = verdicts(runs)
    assert verdict.sentence.startswith("scratch does not catch up (difference -3.5")
    line = (
        "Only runs in full size are shown. Left out: 7 runs in quickstart. "
        f"Their own report: python -m rethink_d2.report {tmp_path}/quickstart"
    )
    assert runs.left_out == line and runs.problems == [] and len(runs.folders) == 2
    page = (tmp_path / "report/index.html").read_text()
    assert page.count(line) == 1 and "Runs are in miniature" not in page
    write_report(str(tmp_path))
    assert capsys.readouterr().err == f"{line}\n"  # once, though made twice


def test_left_out_runs_have_the_report_that_is_named(tmp_path):
    full_size(tmp_path)
    miniature(tmp_path, 72, folder="quickstart/")
    pre_training(tmp_path, "quickstart/")
    runs = find_runs(str(tmp_path / "quickstart"))
    assert len(runs.folders) == 7 and runs.left_out == "" and runs.miniature


def test_of_two_miniatures_the_nearest_counts(tmp_path):
    miniature(tmp_path, 27, ("2x", "3x"), value=20.0)
    pre_training(tmp_path, "")
    miniature(tmp_path, 72, folder="quickstart/")
    pre_training(tmp_path, "quickstart/")
    runs = find_runs(str(tmp_path))
    assert "quickstart" not in paths(runs) and "imagenet-r50-gn" in paths(runs)
    assert runs.left_out.startswith("Only runs of which 1x is 27 iterations are shown. Left out: 7 runs in")
    lines = figures(runs)[0].panels[0].lines
    assert [(line.name, line.y) for line in lines] == 2 * [("2x", (20.0,)), ("3x", (20.0,))]


def test_of_two_equally_near_the_one_with_more_runs_counts(tmp_path):
    miniature(tmp_path, 72, folder="quickstart/")
    miniature(tmp_path, 2250, ("2x",), folder="breakdown/")
    assert set(paths(find_runs(str(tmp_path)))) == {"quickstart"}
    assert set(paths(find_runs(str(tmp_path), one_x=2250))) == {"breakdown"}
    assert set(paths(find_runs(str(tmp_path), one_x=5))) == {"quickstart"}


def test_side_by_side_in_one_folder(tmp_path):
    make_run(tmp_path, f"{SCRATCH}6x", {540_000: 41.3})
    make_run(tmp_path, f"{SCRATCH}6x", {324: 70.0}, seed=2, SOLVER__ONE_X=27)
    runs = find_runs(str(tmp_path))
    assert runs.finals(paper.find(f"{SCRATCH}6x"), "bbox/AP") == [41.3]
    assert f"1 run in {SCRATCH}6x/seed2. Their own report: " in runs.left_out
    miniature(tmp_path, 27, ("2x", "3x"))
    runs = find_runs(str(tmp_path))
    assert "Left out: 5 runs in" in runs.left_out and "and 2 more folders" in runs.left_out
    assert runs.left_out.endswith("move them to a folder of their own.")


def test_a_run_that_has_only_begun_decides_and_ones_own_does_not(tmp_path):
    miniature(tmp_path, 72, folder="quickstart/")
    make_run(tmp_path, "mine", {10: 12.3})
    runs = find_runs(str(tmp_path))
    assert runs.miniature and paths(runs)[0] == "mine" and runs.left_out == ""
    begun = make_run(tmp_path, f"{SCRATCH}6x", {20: 1.0}, max_iter=540_000, state="running")
    assert not find_runs(str(tmp_path)).miniature
    # Its config is not written yet, nor is an evaluation: nothing tells its size.
    for name in ("config.yaml", "results.json"):
        (begun / name).unlink()
    assert find_runs(str(tmp_path)).miniature


@pytest.mark.parametrize("full", [True, False])
def test_planned_runs_have_the_size_of_their_plan(tmp_path, full):
    if full:
        full_size(tmp_path)
    else:
        miniature(tmp_path, 27, ("2x",))
    options = ("SOLVER.ONE_X", "72", "DATASETS.TEST", "('glyphs_val',)")
    planned = node(f"{SCRATCH}4x/seed1")
    remember(str(tmp_path / "quickstart"), [dataclasses.replace(planned, options=options)])
    remember(str(tmp_path), [planned])
    kept = paths(find_runs(str(tmp_path)))
    assert "quickstart" not in kept and (f"{SCRATCH}4x" in kept) is full
