"""Real processes of train_net.py, killed, preempted and branched, end as the run alone, bit for bit."""

import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from processes import (
    MINI,
    TORCHRUN,
    Process,
    assert_same_run,
    finish,
    newest,
    record,
    results,
    tensors_digest,
)

from rethink_d2.engine import checkpoint
from rethink_d2.preemption import EXIT_CODE
from rethink_d2.train import cli

pytestmark = pytest.mark.slow

TWO = ["--num-gpus", "2", *MINI, "SOLVER.IMS_PER_GROUP", "1", "SOLVER.SCHEDULE", "40"]
WORKERS = ["DATALOADER.NUM_WORKERS", "2"]


@pytest.fixture(scope="module")
def unbroken(glyph_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    finish(folder, *MINI)
    return folder


def kill(run, moment, rng):
    """SIGKILL a run, its group or it alone, at a moment."""
    run.until_started()  # what the kill before left half written is gone then
    if moment == "writing":
        run.freeze_while(run.is_writing)
    elif moment == "evaluating":
        run.freeze_while(run.is_evaluating)
    else:
        run.until_checkpoint()  # so that every start gets further
        time.sleep(rng.uniform(0, 0.5))
    run.signal(signal.SIGKILL, group=rng.random() < 0.5)
    assert run.end() == -signal.SIGKILL, run.output[-3000:]
    assert moment != "writing" or run.is_writing()


def survive(folder, seed, options):
    """Kill a run again and again, then let it end; returns the moments."""
    rng = random.Random(seed)
    moments = 3 * ["writing"] + 3 * ["evaluating"] + 4 * ["any"]
    rng.shuffle(moments)
    with ExitStack() as stack:
        runs = []
        for moment in moments:
            # At once, while loader workers of the one before may still be about to notice.
            runs.append(stack.enter_context(Process(folder, "--resume", *MINI, *options)))
            kill(runs[-1], moment, rng)
        finish(folder, "--resume", *MINI, *options)
        assert not any(run.alive() for run in runs)
    return moments


def test_twenty_kills(unbroken, tmp_path, record_property):
    folders = [tmp_path / "alone", tmp_path / "workers"]
    with ThreadPoolExecutor() as pool:
        killed = list(pool.map(survive, folders, [1, 2], [[], WORKERS]))
    for folder in folders:
        assert_same_run(folder, unbroken)
        assert not list(folder.glob(".writing-*"))
    tried = sum(map(len, killed))
    record_property("kills survived of tried", f"{tried} of {tried}")
    print(f"kills survived: {tried} of {tried}")
    assert tried == 20


def preempt(run, number, group):
    """Signal a run, frozen or not, see it stop in order, and return the iterations done."""
    run.signal(number, group)
    run.signal(signal.SIGCONT)
    assert run.end(60) == EXIT_CODE, run.output[-3000:]
    assert f"{number.name}: stopping" in run.output
    assert not run.orphans()
    assert record(run.folder)["state"] == "preempted"
    last = newest(run.folder)
    assert checkpoint.is_whole(str(run.folder / f"model_{last:07d}.pth"))
    return last + 1


@pytest.mark.parametrize(
    "signals, evaluation",
    [((signal.SIGTERM, signal.SIGUSR1), "next"), ((signal.SIGUSR2, signal.SIGINT), "last")],
)
def test_preempted(unbroken, tmp_path, signals, evaluation):
    # No other checkpoints than those of the stops.
    rare = ["SOLVER.CHECKPOINT_PERIOD", "0", "SOLVER.BRANCH_POINTS", "()"]
    args = ["--resume", *MINI, *WORKERS, *rare]
    stops = []
    for number, group in zip(signals, (False, True), strict=True):
        with Process(tmp_path / "run", *args) as run:
            run.until_started()
            time.sleep(0.5)
            stops.append(preempt(run, number, group))
    assert 0 < stops[0] < stops[1]
    for _ in range(2):  # the second one in the same evaluation, before anything else
        with Process(tmp_path / "run", *args) as run:
            if evaluation == "last" and newest(tmp_path / "run") + 1 < 80:
                run.until(lambda: "iter 80/80" in run.output)
            run.freeze_while(run.is_evaluating)
            stops.append(preempt(run, signals[0], True))
            # Within the evaluation, not after it.
            assert run.output.count("Start inference on") == run.output.count("copypaste: Task: bbox") + 1
        assert stops[-1] not in [row["iteration"] for row in results(tmp_path / "run")]
    assert stops[2] == stops[3] and (stops[2] == 80 if evaluation == "last" else stops[2] % 16 == 0)
    # None but the end of the run wrote another one.
    assert {i + 1 for i in checkpoint.checkpoints(tmp_path / "run")} <= {*stops, 80}
    finish(tmp_path / "run", *args)
    assert_same_run(tmp_path / "run", unbroken)


def test_the_second_interrupt_stops_at_once(glyph_cache, tmp_path):
    slow = ["INPUT.MIN_SIZE_TRAIN", "(128,)", "SOLVER.IMS_PER_BATCH", "32", "SOLVER.IMS_PER_GROUP", "2"]
    with Process(tmp_path / "run", *MINI, *slow, *WORKERS) as run:
        run.until_started()
        run.signal(signal.SIGINT, group=True)
        run.until(lambda: "SIGINT: stopping" in run.output)
        run.signal(signal.SIGINT, group=True)
        assert run.end(20) not in (0, EXIT_CODE)
        assert not run.orphans()
    assert newest(tmp_path / "run") == -1
    assert record(tmp_path / "run")["state"] == "failed"


@pytest.fixture(scope="module")
def unbroken_two(glyph_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken_two") / "run"
    finish(folder, *TWO)
    assert record(folder)["world_size"] == 2
    return folder


def test_two_processes(unbroken_two, tmp_path):
    args = ["--resume", *TWO]
    for number, group, options, evaluating in (
        (signal.SIGUSR1, False, [], False),
        (signal.SIGINT, True, ["DATALOADER.NUM_WORKERS", "1"], False),
        (signal.SIGTERM, False, [], True),
    ):
        before = newest(tmp_path / "run")
        with Process(tmp_path / "run", *args, *options) as run:
            run.until_checkpoint()
            if evaluating:
                run.until(run.is_evaluating)
            assert preempt(run, number, group) > before + 1
    for place in (0, 1):  # the process that launched the others, and one of those
        with Process(tmp_path / "run", *args) as run:
            run.until_checkpoint()
            os.kill(run.launched()[place], signal.SIGKILL)
            assert run.end() not in (0, EXIT_CODE)
            assert not run.orphans()
    finish(tmp_path / "run", *args)
    assert_same_run(tmp_path / "run", unbroken_two)


def test_none_outlives_a_kill_while_processes_start(glyph_cache, tmp_path):
    with Process(tmp_path / "run", *TWO) as run:
        run.until(lambda: len(run.launched()) == 3)
        run.signal(signal.SIGKILL)
        assert not run.orphans()
    with Process(tmp_path / "run", *TWO, "DATALOADER.NUM_WORKERS", "1") as run:
        # Launched processes start their loader workers afresh, too.
        run.until(lambda: len(run.launched()) == 3 and len(run.alive()) == 6)
        for pid in run.launched()[1:]:
            os.kill(pid, signal.SIGKILL)
        assert not run.orphans()


def test_torchrun(unbroken_two, tmp_path):
    with Process(tmp_path / "run", "--resume", *TWO, prefix=TORCHRUN) as run:
        run.until_checkpoint()
        assert len(run.alive()) == 3
        run.signal(signal.SIGTERM)
        assert run.end() != 0
        assert not run.orphans()
    assert record(tmp_path / "run")["state"] == "preempted"
    finish(tmp_path / "run", "--resume", *TWO, prefix=TORCHRUN)
    assert_same_run(tmp_path / "run", unbroken_two)


def test_only_one_process_trains_in_a_folder(glyph_cache, tmp_path):
    args = ["--resume", *MINI, *WORKERS, "SOLVER.SCHEDULE", "10k", "TEST.EVAL_PERIOD", "0"]
    with Process(tmp_path / "run", *args) as first:
        first.until_checkpoint()
        with Process(tmp_path / "run", *args) as second:
            assert second.end() == 2
            assert "another process is at work there" in second.output
            assert "Traceback" not in second.output
        assert "Traceback" not in first.output
        first.until_checkpoint()  # nothing stopped it
        first.signal(signal.SIGKILL)
        first.end()
        with Process(tmp_path / "run", *args) as third:
            third.until_started()


def test_of_two_that_start_together_one_trains(glyph_cache, tmp_path):
    args = ["--resume", *MINI, "SOLVER.SCHEDULE", "10k", "TEST.EVAL_PERIOD", "0"]
    with Process(tmp_path / "run", *args) as one, Process(tmp_path / "run", *args) as other:
        while one.running() and other.running():
            time.sleep(0.1)
        refused, trains = (other, one) if one.running() else (one, other)
        assert refused.end() != 0 and "another process is at work there" in refused.output
        trains.until_checkpoint()


def test_a_branch_by_the_command_line(unbroken, tmp_path):
    args = [*MINI, "SOLVER.SCHEDULE", "30", "DATALOADER.NUM_WORKERS", "1"]
    finish(tmp_path / "alone", *args)
    output = finish(tmp_path / "branch", "--branch-from", unbroken, *args)
    assert "Starting training from iteration 20" in output
    assert_same_run(tmp_path / "branch", tmp_path / "alone")
    parent = record(tmp_path / "branch")["parent"]
    assert parent["folder"] == os.path.relpath(unbroken, tmp_path / "branch")
    assert (parent["iteration"], parent["identity"]) == (20, record(unbroken)["identity"])
    assert parent["sha256"] == checkpoint.digest(unbroken / "model_0000019.pth")
    print(f"branch {tensors_digest(tmp_path / 'branch')}, alone {tensors_digest(tmp_path / 'alone')}")


@pytest.mark.parametrize(
    "change",
    [
        ("SEED", "2"),
        ("SOLVER.BASE_LR", "0.04"),
        ("DATASETS.TRAIN", "('glyphs_train_100',)"),
        ("INPUT.RANDOM_FLIP", "none"),
    ],
    ids=lambda change: change[0],
)
def test_a_branch_of_another_run_is_refused(unbroken, tmp_path, capsys, change):
    args = [*MINI, *change, "OUTPUT_DIR", str(tmp_path / "branch")]
    assert cli(["--branch-from", str(unbroken), *args]) == 2
    assert change[0] in capsys.readouterr().err
    assert not (tmp_path / "branch").exists()
