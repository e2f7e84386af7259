"""The search, with a stand-in for the training; at the end once with real trainings."""

import contextlib
import csv
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rethink_d2 import model_zoo, paper, recipe
from rethink_d2.search import Search, claimed, cli, default_grid, parse_grid, run_training

MINI = model_zoo.get_config_file("mini/scratch_mask_rcnn_R_18_FPN_gn.yaml")
GRID = {"SOLVER.BASE_LR": ("0.02", "0.04"), "SOLVER.GAMMA": ("0.1", "0.02")}
TINY = [
    *("DATASETS.TRAIN", "('glyphs_tiny_train',)", "DATASETS.TEST", "('glyphs_tiny_val',)"),
    *("SOLVER.SCHEDULE", "3", "SOLVER.IMS_PER_BATCH", "2", "MODEL.DEVICE", "cpu"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
]


def finish(folder, value):
    """Leave what a finished training leaves; another set and an earlier row are not to be taken."""
    rows = [(1, "glyphs_tiny_val", 99.0), (3, "glyphs_tiny_val", value), (3, "another", 98.0)]
    Path(folder, "results.json").write_text(
        json.dumps([{"iteration": i, "dataset": d, "bbox/AP": v} for i, d, v in rows])
    )
    Path(folder, "run.json").write_text('{"state": "done"}')


class Training:
    """Stands in for a training, with the given end by a piece of its arguments: a metric, or an exit code.

    Every call is noted in a file, which several processes share.
    """

    def __init__(self, log, ends=None):
        self.log, self.ends = log, ends or {}

    def __call__(self, arguments, claim):
        assert arguments[-2] == "OUTPUT_DIR" and "--resume" in arguments
        folder = arguments[-1]
        with open(self.log, "a") as f:
            f.write(f"{os.path.basename(folder)}\n")
        end = next((end for words, end in self.ends.items() if words in " ".join(arguments)), 10.0)
        if callable(end):
            return end(claim)
        if isinstance(end, int):
            return end
        finish(folder, end)
        return 0

    @property
    def calls(self):
        return self.log.read_text().split() if self.log.exists() else []


@pytest.fixture
def training(tmp_path):
    return Training(tmp_path / "calls")


@pytest.fixture
def search(tmp_path):
    return Search(MINI, str(tmp_path / "out"), grid=GRID, opts=TINY)


def table(search):
    with open(Path(search.output, "trials.csv"), newline="") as f:
        return [
            (row["SOLVER.BASE_LR"], row["SOLVER.GAMMA"], row["bbox/AP"], row["state"])
            for row in csv.DictReader(f)
        ]


# ---------------------------------------------------------------- grid


def test_every_combination_is_a_trial_with_a_folder_of_its_own(search):
    points = [tuple(trial.point.values()) for trial in search.trials]
    assert points == [("0.02", "0.1"), ("0.02", "0.02"), ("0.04", "0.1"), ("0.04", "0.02")]
    assert len({trial.folder for trial in search.trials}) == 4
    for trial in search.trials:
        assert trial.iterations == 3 and trial.dataset == "glyphs_tiny_val"
        assert f"SOLVER.BASE_LR {trial.point['SOLVER.BASE_LR']}" in " ".join(trial.arguments)


def test_a_trial_is_named_after_what_it_computes(tmp_path):
    def digests(*opts, grid=("0.1", "0.10")):
        return [t.digest for t in Search(MINI, str(tmp_path), grid={"SOLVER.GAMMA": grid}, opts=opts).trials]

    assert len(digests()) == 1
    assert digests() == digests(grid=("1e-1",)) == digests("MODEL.DEVICE", "cpu")
    assert digests() != digests("SEED", "2")


VALUE = st.text("0123456789.()x, ", min_size=1).filter(str.strip)


@given(st.dictionaries(st.sampled_from(["SOLVER.GAMMA", "SEED", "A.B"]), st.lists(VALUE, min_size=1)))
def test_grid_arguments_are_read_back(grid):
    items = [f"{key}={'|'.join(values)}" for key, values in grid.items()]
    assert parse_grid(items) == {key: tuple(v.strip() for v in values) for key, values in grid.items()}


@pytest.mark.parametrize(
    "config, size, lengths",
    [
        ("pretrained/pretrained_mask_rcnn_R_50_FPN_gn_35k_2x.yaml", 90, ("2x", "3x", "4x", "5x", "6x")),
        ("pretrained/pretrained_mask_rcnn_R_50_FPN_gn_10k_60k.yaml", 54, ("40k", "60k", "80k")),
        ("scratch/scratch_mask_rcnn_R_50_FPN_gn_1k_60k.yaml", 18, ("60k",)),
        ("mini/scratch_mask_rcnn_R_18_FPN_gn.yaml", 18, ("0.54k",)),
    ],
)
def test_default_grid_has_the_lengths_of_the_configs_curve(config, size, lengths, tmp_path):
    config = model_zoo.get_config_file(config)
    grid = default_grid(config)
    assert grid["SOLVER.SCHEDULE"] == lengths
    assert size == len(lengths) * len(grid["SOLVER.BASE_LR"]) * len(grid["SOLVER.GAMMA"]) * 3
    fixed = ["SOLVER.SCHEDULE", lengths[0], "SOLVER.GAMMA", "0.1"]
    trials = Search(config, str(tmp_path), opts=fixed).trials
    assert len(trials) == 6
    # What the paper found for 35k images is one of them.
    found = recipe.load(model_zoo.get_config_file("scratch/scratch_mask_rcnn_R_50_FPN_gn_35k_6x.yaml"), [])
    opts = [["INPUT.MIN_SIZE_TRAIN", trial.point["INPUT.MIN_SIZE_TRAIN"]] for trial in trials]
    assert found.INPUT.MIN_SIZE_TRAIN in [recipe.load(config, o).INPUT.MIN_SIZE_TRAIN for o in opts]


@pytest.mark.parametrize("id", [run.id for run in paper.load() if run.kind == "search"])
def test_the_papers_searches_are_found_by_id(id, tmp_path, capsys):
    folder = tmp_path / "out"
    few = ["--grid", "SOLVER.BASE_LR=0.02|0.04"]
    assert cli(["--run", id, "--output", str(folder), *few, "--dry-run"]) == 0
    assert "2 trials" in capsys.readouterr().out and not folder.exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--config-file", "none.yaml"], "none.yaml"),
        (["--run", "search-coco35k-pretrainde"], "search-coco35k-pretrained"),
        (["--run", "samples"], "nothing to search"),
        (["--config-file", MINI, "--grid", "SOLVER.BASE_LR"], "KEY=V1|V2"),
        (["--config-file", MINI, "--grid", "SOLVER.GAMMA=0.1|"], "KEY=V1|V2"),
        (["--config-file", MINI, "--grid", "SOLVER.GAMMA=0.1", "--grid", "SOLVER.GAMMA=1"], "twice"),
        (["--config-file", MINI, "--grid", "SOLVER.GAMA=0.1"], "did you mean SOLVER.GAMMA"),
        (["--config-file", MINI, "--grid", "SOLVER.GAMMA=0.1|high"], "SOLVER.GAMMA is 'high'"),
        (["--config-file", MINI, "--grid", "SOLVER.SCHEDULE=3|6y"], "6y"),
        (["--config-file", MINI, "--grid", "TEST.EVAL_PERIOD=1|2"], "does not change"),
        (["--config-file", MINI, "--grid", "SOLVER.GAMMA=0.1", "SOLVER.GAMMA", "0.1"], "one place"),
        (["--config-file", MINI, "SEED"], "pairs"),
        (["--config-file", MINI, "OUTPUT_DIR", "x"], "--output"),
        (["--config-file", MINI, "DATASETS.TEST", "()"], "DATASETS.TEST"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_trained(arguments, words, training, capsys, tmp_path):
    folder = tmp_path / "out"
    assert cli(["--output", str(folder), *arguments], training) == 2
    assert words in capsys.readouterr().err
    assert not folder.exists() and not training.calls


# ---------------------------------------------------------------- what is found


def test_the_best_trial_becomes_a_config(search, training, capsys):
    training.ends = {"BASE_LR 0.04 SOLVER.GAMMA 0.1": 30.0, "BASE_LR 0.02 SOLVER.GAMMA 0.02": 20.25}
    assert search.run(training) == 0
    assert [row[:3] for row in table(search)] == [
        ("0.04", "0.1", "30.0"),
        ("0.02", "0.02", "20.25"),
        ("0.02", "0.1", "10.0"),
        ("0.04", "0.02", "10.0"),
    ]
    out = capsys.readouterr().out
    assert "4 of 4 trials left" in out and "1 of 4 trials left" in out
    assert out.index("30.00") < out.rindex("20.25") < out.rindex("10.00")

    path = Path(search.output, "best.yaml")
    header, text = path.read_text().split("_BASE_", 1)
    assert "4 trials" in header and "bbox/AP on glyphs_tiny_val: 30.00" in header
    assert "SOLVER.GAMMA: 0.1 | 0.02" in header
    tree = yaml.safe_load("_BASE_" + text)
    # 0.1 is the base's own, and the device is no part of the recipe.
    assert tree["SOLVER"] == {"BASE_LR": 0.04, "SCHEDULE": "3", "IMS_PER_BATCH": 2}
    assert "MODEL" not in tree
    best = recipe.load(str(path), [])
    asked = recipe.load(MINI, [*TINY, "SOLVER.BASE_LR", "0.04"])
    assert recipe.identity(recipe.resolve(best, 1)) == recipe.identity(recipe.resolve(asked, 1))


def test_nothing_detected_counts_as_zero(search, training):
    training.ends = {"BASE_LR 0.02": None, "GAMMA 0.02": 0.5}
    assert search.run(training) == 0
    assert [row[2] for row in table(search)] == ["10.0", "0.5", "0.0", "0.0"]


def test_a_metric_that_no_trial_has_is_named_and_the_training_kept(training, capsys, tmp_path):
    command = ["--config-file", MINI, "--output", str(tmp_path / "out"), "--grid", "SOLVER.GAMMA=0.1"]
    assert cli([*command, "--metric", "bbox/ap", *TINY], training) == 2
    assert "bbox/AP" in capsys.readouterr().err
    assert cli([*command, *TINY], training) == 0
    assert len(training.calls) == 1


# ---------------------------------------------------------------- how trials end


def test_a_failed_trial_does_not_end_the_search(search, training):
    training.ends = {"BASE_LR 0.02": 1, "BASE_LR 0.04 SOLVER.GAMMA 0.02": -9}
    assert search.run(training) == 0
    assert [row[3] for row in table(search)] == ["complete", "fail", "fail", "fail"]
    assert search.run(training) == 0
    assert len(training.calls) == 4  # neither the failed ones nor the finished one again


def test_where_all_trials_fail_there_is_no_best(search, training, capsys):
    training.ends = {"": 1}
    assert search.run(training) == 1
    assert "all trials failed" in capsys.readouterr().err
    assert not Path(search.output, "best.yaml").exists()


@pytest.mark.parametrize("code", [2, 75])
def test_a_refused_or_preempted_trial_stops_the_search_and_is_run_again(search, training, code, capsys):
    training.ends = {"BASE_LR 0.04 SOLVER.GAMMA 0.1": code}
    assert search.run(training) == code
    stopped = search.trials[2]
    assert stopped.folder in capsys.readouterr().err
    assert training.calls == [t.digest for t in search.trials[:3]]
    assert not Path(search.output, "best.yaml").exists()
    training.ends = {}
    assert search.run(training) == 0
    assert training.calls[3:] == [t.digest for t in search.trials[2:]]


def test_finished_trials_outlive_the_journal_and_the_grid(search, training):
    assert search.run(training) == 0
    Path(search.output, "journal.log").unlink()
    larger = Search(MINI, search.output, grid={**GRID, "SOLVER.GAMMA": ("0.1", "0.5")}, opts=TINY)
    assert larger.run(training) == 0
    assert len(training.calls) == 4 + 2
    assert search.run(training) == 0
    assert len(training.calls) == 4 + 2


def test_a_damaged_journal_is_named(search, training, capsys):
    os.makedirs(search.output)
    Path(search.output, "journal.log").write_text('{"op_co\n{}\n')
    assert cli(["--config-file", MINI, "--output", search.output, *TINY], training) == 2
    assert "journal.log is damaged" in capsys.readouterr().err


# ---------------------------------------------------------------- several processes


def start(search, training):
    """A search in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(search.run(training)))
    process.start()
    return process


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_trial_of_a_killed_search_is_run_again(search, training):
    hanging = Training(training.log, {"BASE_LR 0.02 SOLVER.GAMMA 0.02": lambda _: time.sleep(600)})
    process = start(search, hanging)
    wait_for(lambda: len(training.calls) == 2)
    process.kill()
    process.join()
    assert search.run(training) == 0
    first, second, *others = [trial.digest for trial in search.trials]
    assert training.calls == [first, second, second, *others]
    assert Path(search.output, "best.yaml").exists()


def test_a_training_that_outlives_its_search_is_left_alone(search, training, capfd):
    lasting = training.log.with_name("lasting")

    def hang(claim):
        with subprocess.Popen(["sleep", "600"], pass_fds=(claim,)) as child:
            lasting.write_text(str(child.pid))

    process = start(search, Training(training.log, {"BASE_LR 0.02 SOLVER.GAMMA 0.1": hang}))
    wait_for(lambda: lasting.exists() and lasting.read_text())
    process.kill()
    process.join()
    try:
        assert search.run(training) == 0
        assert [row[3] for row in table(search)] == ["complete"] * 3 + ["open"]
        assert "1 trials are still run" in capfd.readouterr().out
        assert not Path(search.output, "best.yaml").exists()
    finally:
        os.kill(int(lasting.read_text()), signal.SIGKILL)
    wait_for(lambda: search.run(training) == 0 and Path(search.output, "best.yaml").exists())
    assert len(training.calls) == 4 + 1


def test_a_trial_that_another_search_leaves_is_taken_over(search, training):
    with contextlib.ExitStack() as other:
        other.enter_context(claimed(search.trials[0].folder))
        training.ends = {"BASE_LR 0.04 SOLVER.GAMMA 0.02": lambda _: other.close() or 1}
        assert search.run(training) == 0
    digests = [trial.digest for trial in search.trials]
    assert training.calls == digests[1:] + digests[:1]


def test_several_searches_share_the_trials(search, training):
    def slow(claim):
        time.sleep(0.05)
        return 1

    training.ends = {"GAMMA 0.1 ": slow}
    searchers = [start(search, training) for _ in range(3)]
    for process in searchers:
        process.join()
    assert [process.exitcode for process in searchers] == [0, 0, 0]
    assert sorted(training.calls) == sorted(trial.digest for trial in search.trials)
    assert Path(search.output, "best.yaml").exists()


def test_a_request_to_stop_reaches_the_training(tmp_path):
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with open(tmp_path / "claim", "w") as f:
        assert run_training(["--config-file", MINI], f.fileno()) == 75


@pytest.mark.slow
def test_real_trainings_killed_and_searched_on(glyph_cache, tmp_path):
    folder = tmp_path / "out"
    command = [sys.executable, "-m", "rethink_d2.search", "--config-file", MINI, "--output", str(folder)]
    command += ["--grid", "SOLVER.BASE_LR=0.01|0.02", "SOLVER.CHECKPOINT_PERIOD", "1", *TINY]
    trials = Search(MINI, str(folder), grid={"SOLVER.BASE_LR": ("0.01", "0.02")}, opts=TINY).trials

    with subprocess.Popen(command, start_new_session=True) as process:
        wait_for(lambda: Path(trials[1].folder, "last_checkpoint").exists(), 300)
        process.kill()
        process.wait()
        with claimed(trials[1].folder) as claim:
            assert claim is None  # the training lives on, and holds it
        os.killpg(process.pid, signal.SIGKILL)
    first = Path(trials[0].folder, "run.json").read_text()
    assert json.loads(Path(trials[1].folder, "run.json").read_text())["state"] == "running"
    assert not (folder / "best.yaml").exists()

    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "Starting training from iteration" in done.stdout
    assert Path(trials[0].folder, "run.json").read_text() == first
    assert json.loads(Path(trials[1].folder, "run.json").read_text())["state"] == "done"
    best = recipe.load(str(folder / "best.yaml"), [])
    assert recipe.identity(recipe.resolve(best, 1))[:12] in {trial.digest for trial in trials}
