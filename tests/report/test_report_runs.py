import json
import os

import pytest
from filelock import FileLock
from made_runs import branch_of, make_run, node

from rethink_d2 import paper
from rethink_d2.report.runs import find_runs
from rethink_d2.sweep.state import State, remember

SCRATCH = "base-r50-gn-scratch-6x"
BRANCH = "base-r50-gn-scratch-2x"


def find(out, path):
    runs = find_runs(str(out))
    return runs, next(folder for folder in runs.folders if folder.path == path)


def test_a_finished_run(tmp_path):
    make_run(tmp_path, SCRATCH, {20_000: 10.0, 540_000: 41.3}, steps=[480_000, 520_000])
    runs, folder = find(tmp_path, f"{SCRATCH}/seed1")
    assert folder.run == paper.find(SCRATCH) and folder.state is State.FINISHED and folder.seed == 1
    assert folder.final.metrics == {"bbox/AP": 41.3} and folder.final.iteration == folder.max_iter == 540_000
    assert folder.drops == [480_000, 520_000] and folder.one_x == 90_000 and not folder.mini
    assert runs.finals(folder.run, "bbox/AP") == [41.3] and runs.finals(folder.run, "segm/AP") == []
    assert runs.problems == []


def test_how_far_a_running_run_is(tmp_path):
    path = make_run(tmp_path, SCRATCH, {20: 1.0}, max_iter=100, state="running", losses={19: 2.0, 39: 1.0})
    with FileLock(path / ".lock"):
        _, folder = find(tmp_path, f"{SCRATCH}/seed1")
        assert folder.state is State.RUNNING
    runs, folder = find(tmp_path, f"{SCRATCH}/seed1")
    assert folder.state is State.INTERRUPTED
    assert folder.iteration == 40 and folder.final is None and runs.finals(folder.run, "bbox/AP") == []


@pytest.mark.parametrize("state, expected", [("preempted", State.PREEMPTED), (OSError("x"), State.FAILED)])
def test_other_states(tmp_path, state, expected):
    make_run(tmp_path, SCRATCH, {20: 1.0}, max_iter=100, state=state)
    _, folder = find(tmp_path, f"{SCRATCH}/seed1")
    assert folder.state is expected
    assert folder.note == ("OSError: x" if expected is State.FAILED else "")


def test_an_evaluation_has_no_record(tmp_path):
    path = make_run(tmp_path, "tta-r50-scratch-9x", {810_000: 41.6}, metric="segm_TTA/AP", max_iter=900_000)
    os.unlink(path / "run.json")
    runs, folder = find(tmp_path, "tta-r50-scratch-9x/seed1")
    assert folder.run.id == "tta-r50-scratch-9x" and folder.state is State.FINISHED
    assert runs.finals(folder.run, "segm_TTA/AP") == [41.6]


def test_a_branch_has_its_trunks_past(tmp_path):
    make_run(tmp_path, SCRATCH, {20: 1.0, 40: 2.0, 50: 3.0, 60: 4.0}, losses={19: 9.0, 39: 8.0, 49: 7.0})
    branch = {"parent": branch_of(SCRATCH, 40), "losses": {59: 5.0}}
    make_run(tmp_path, BRANCH, {60: 5.0}, **branch)
    runs, folder = find(tmp_path, f"{BRANCH}/seed1")
    assert runs.trunk(folder).run_id == SCRATCH
    assert runs.curve(folder, "bbox/AP") == {20: 1.0, 40: 2.0, 60: 5.0}
    assert runs.losses(folder) == {20: 9.0, 40: 8.0, 60: 5.0}


def test_a_branch_of_a_branch_and_one_that_says_it_is_its_own(tmp_path):
    make_run(tmp_path, "a", {10: 1.0, 20: 2.0})
    make_run(tmp_path, "b", {20: 3.0, 30: 4.0}, parent=branch_of("a", 10))
    make_run(tmp_path, "c", {30: 5.0}, parent=branch_of("b", 20))
    make_run(tmp_path, "self", {30: 6.0}, parent=branch_of("self", 20))
    runs, folder = find(tmp_path, "c/seed1")
    assert runs.curve(folder, "bbox/AP") == {10: 1.0, 20: 3.0, 30: 5.0}
    assert runs.curve(find(tmp_path, "self/seed1")[1], "bbox/AP") == {30: 6.0}


def test_a_trunk_outside_of_the_folder_is_not_read(tmp_path):
    make_run(tmp_path, "elsewhere", {10: 1.0})
    parent = {"run_id": None, "folder": "../../../elsewhere/seed1", "iteration": 10}
    make_run(tmp_path / "out", BRANCH, {20: 2.0}, parent=parent)
    runs, folder = find(tmp_path / "out", f"{BRANCH}/seed1")
    assert runs.trunk(folder) is None and runs.curve(folder, "bbox/AP") == {20: 2.0}


def test_of_several_data_sets_the_end_is_judged_by_the_one_evaluated_there_only(tmp_path):
    path = make_run(tmp_path, "own", {10: 1.0, 20: 2.0}, dataset="small")
    rows = json.loads((path / "results.json").read_text())
    (path / "results.json").write_text(
        json.dumps([*rows, {"iteration": 20, "dataset": "large", "bbox/AP": 1.5}])
    )
    runs, folder = find(tmp_path, "own/seed1")
    assert folder.final.dataset == "large" and runs.curve(folder, "bbox/AP") == {10: 1.0, 20: 1.5}


@pytest.mark.parametrize(
    "options",
    [
        {"SOLVER__ONE_X": 27},
        {"dataset": "glyphs_val", "DATASETS__TEST": []},
        {"DATASETS__TEST": ["glyphs_x"]},
    ],
)
def test_miniature_is_recognized(tmp_path, options):
    make_run(tmp_path, SCRATCH, {20: 70.0}, **options)
    runs, folder = find(tmp_path, f"{SCRATCH}/seed1")
    assert folder.mini and runs.mini(folder.run)


def test_of_two_folders_with_one_seed_the_furthest_counts(tmp_path):
    make_run(tmp_path, SCRATCH, {20: 1.0}, max_iter=40, state="preempted", folder="old/seed1")
    make_run(tmp_path, SCRATCH, {40: 2.0}, folder="new/seed1")
    runs = find_runs(str(tmp_path))
    assert runs.finals(paper.find(SCRATCH), "bbox/AP") == [2.0]
    assert runs.problems == ["old/seed1 repeats new/seed1: in the table of runs only"]


def test_seeds_that_differ_in_more_are_named(tmp_path):
    make_run(tmp_path, SCRATCH, {20: 1.0}, MODEL__WEIGHTS="a")
    make_run(tmp_path, SCRATCH, {20: 2.0}, seed=2, MODEL__WEIGHTS="b", TEST__EVAL_PERIOD=5)
    assert find_runs(str(tmp_path)).problems == []
    make_run(tmp_path, SCRATCH, {20: 3.0}, seed=3, SOLVER__BASE_LR=0.5)
    problem = f"{SCRATCH}/seed1 and {SCRATCH}/seed3 differ in more than the seed: MODEL.WEIGHTS"
    assert find_runs(str(tmp_path)).problems == [problem.replace("MODEL.WEIGHTS", "SOLVER.BASE_LR")]


def test_trials_reports_and_hidden_folders_are_left_out(tmp_path):
    make_run(tmp_path, SCRATCH, {20: 1.0})
    for folder in (f"search-x/seed1/trials/{SCRATCH}", "report/seed1", ".hidden/seed1"):
        make_run(tmp_path, SCRATCH, {20: 9.0}, folder=folder)
    os.symlink(tmp_path / SCRATCH, tmp_path / "again")
    assert [folder.path for folder in find_runs(str(tmp_path)).folders] == [f"{SCRATCH}/seed1"]


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        find_runs(str(tmp_path))
    with pytest.raises(ValueError, match="holds no run"):
        find_runs(str(tmp_path / "missing"))


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("run.json", '{"state": ', "run.json cannot be read: JSONDecodeError"),
        ("run.json", "[1]", "run.json cannot be read: it is no dict"),
        ("results.json", '[{"iteration": 5}, 3]', "results.json: 2 of 2 rows have no iteration or data set"),
        ("results.json", "{}", "results.json cannot be read: it is no list"),
        ("config.yaml", "a: [", "config.yaml cannot be read: ParserError"),
        ("config.yaml", "a: &a {b: *a}", "config.yaml cannot be read: RecursionError"),
        ("config.yaml", "[1]", "config.yaml cannot be read: it is no dict"),
        (
            "config.yaml",
            "!!python/object/apply:os.system [ls]",
            "config.yaml cannot be read: ConstructorError",
        ),
        ("metrics.json", '{"iteration": 1}\nnonsense\n{"iteration": 2}\n', "metrics.json: a line is damaged"),
        ("results.json", b"\xff\xfe", "results.json cannot be read: UnicodeDecodeError"),
        ("run.json", "[" * 100_000, "run.json cannot be read: RecursionError"),
    ],
)
def test_a_damaged_file_is_named_and_the_rest_is_read(tmp_path, name, content, words):
    make_run(tmp_path, BRANCH, {20: 1.0})
    path = make_run(tmp_path, SCRATCH, {20: 2.0})
    (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    runs = find_runs(str(tmp_path))
    assert len(runs.folders) == 2 and len(runs.problems) == 1
    assert runs.problems[0].startswith(f"{SCRATCH}/seed1/{words}")
    assert runs.finals(paper.find(BRANCH), "bbox/AP") == [1.0]


def test_a_torn_last_line_and_values_that_are_not_numbers_are_no_damage(tmp_path):
    path = make_run(tmp_path, SCRATCH, {20: 2.0}, losses={9: 1.0})
    with open(path / "metrics.json", "a") as f:
        f.write('{"iteration": 14, "total_loss": NaN}\n{"iteration": 15}\n{"iteration": 19, "tot')
    rows = [
        {"iteration": 20, "dataset": "d", "bbox/AP": float("nan"), "segm/APs": None, "a": True, "b": 1e400}
    ]
    (path / "results.json").write_text(json.dumps(rows))
    runs, folder = find(tmp_path, f"{SCRATCH}/seed1")
    assert runs.problems == [] and folder.final.metrics == {}
    assert runs.losses(folder) == {10: 1.0} and folder.iteration == 20


def test_nothing_detected_is_no_ap(tmp_path):
    path = make_run(tmp_path, SCRATCH, {20: 2.0})
    metrics = {"bbox/AP": None, "bbox/AP50": None, "bbox/AP75": None, "bbox/APl": None}
    (path / "results.json").write_text(json.dumps([{"iteration": 20, "dataset": "d", **metrics}]))
    _, folder = find(tmp_path, f"{SCRATCH}/seed1")
    assert folder.final.metrics == {"bbox/AP": 0.0, "bbox/AP50": 0.0, "bbox/AP75": 0.0}


@pytest.mark.parametrize(
    "record",
    [
        {"run_id": ["x"], "seed": "1", "state": {}, "parent": 3, "versions": 3, "seconds": "x"},
        {"run_id": "<b>", "seed": 10**400, "state": None, "parent": {"folder": None, "iteration": "x"}},
        {"run_id": 7, "parent": {"folder": "../../../../etc", "run_id": {}}, "last_error": 5},
    ],
)
def test_absurd_values_do_no_harm(tmp_path, record):
    path = make_run(tmp_path, SCRATCH, {20: 2.0})
    (path / "run.json").write_text(json.dumps(record))
    (path / "config.yaml").write_text(
        "SOLVER: {MAX_ITER: -3, STEPS: x, IMS_PER_BATCH: 0}\nDATASETS: {TEST: 3}"
    )
    runs, folder = find(tmp_path, f"{SCRATCH}/seed1")
    assert folder.max_iter == 0 and folder.batch == 16 and folder.drops == [] and runs.trunk(folder) is None


def test_planned_runs_are_known_before_they_begin(tmp_path):
    make_run(tmp_path, SCRATCH, {20: 1.0})
    remember(str(tmp_path), [node(f"{SCRATCH}/seed1"), node(f"{BRANCH}/seed1"), node("../outside/seed1")])
    states = {folder.path: folder.state for folder in find_runs(str(tmp_path)).folders}
    # The record's identity is not that of the plan.
    assert states == {f"{SCRATCH}/seed1": State.CHANGED, f"{BRANCH}/seed1": State.WAITING}
    (tmp_path / "sweep.json").write_text("[{}]")
    runs = find_runs(str(tmp_path))
    assert [folder.state for folder in runs.folders] == [State.FINISHED]
    assert runs.problems[0].startswith("sweep.json cannot be read: ")
