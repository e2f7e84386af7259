"""Killed, preempted and branched runs of the mini Mask R-CNN end as the run alone, bit for bit."""

import itertools
import multiprocessing
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import test_resume
import toy
from detectron2.data import DatasetCatalog
from processes import TORCHRUN, Process, assert_same_run, finish, newest, record, results, tensors_digest
from toy import register_images

from rethink_d2 import model_zoo
from rethink_d2.engine import Trainer, checkpoint
from rethink_d2.engine.start import find_start
from rethink_d2.preemption import EXIT_CODE

pytestmark = pytest.mark.slow

MINI = [
    *("--config-file", model_zoo.get_config_file("mini/scratch_mask_rcnn_R_18_FPN_gn.yaml")),
    *("DATASETS.TRAIN", "('glyphs_tiny_train',)", "DATASETS.TEST", "('glyphs_tiny_val',)"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.WARMUP_ITERS", "2", "INPUT.MIN_SIZE_TRAIN", "(64,)"),
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", "100", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "50"),
    # So that a model that knows next to nothing has detections, which take time.
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "TEST.DETECTIONS_PER_IMAGE", "20"),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", "20"),
    *("SOLVER.SCHEDULE", "80", "SOLVER.CHECKPOINT_PERIOD", "2", "TEST.EVAL_PERIOD", "16"),
    *("SOLVER.CHECKPOINT_KEEP", "3", "SOLVER.BRANCH_POINTS", "(20,)"),  # each is of 32 MB
]
TWO = ["--num-gpus", "2", *MINI, "MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_GROUP", "1", "SOLVER.SCHEDULE", "40"]
WORKERS = ["DATALOADER.NUM_WORKERS", "2"]


@pytest.fixture(scope="module")
def unbroken(glyph_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    finish(folder, *MINI)
    return folder


def kill(run, moment, rng):
    """SIGKILL a run, its group or it alone, at a moment."""
    if moment == "writing":
        run.freeze_while(run.is_writing)
    elif moment == "evaluating":
        run.freeze_while(run.is_evaluating)
    else:
        run.until_checkpoint()  # so that every start gets further
        time.sleep(rng.uniform(0, 0.5))
    run.signal(signal.SIGKILL, group=rng.random() < 0.5)
    assert run.end() == -signal.SIGKILL, run.output[-3000:]


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
    """Signal a run and see it stop in order."""
    before = newest(run.folder)
    run.signal(number, group)
    run.signal(signal.SIGCONT)
    assert run.end(60) == EXIT_CODE, run.output[-3000:]
    assert f"{number.name}: stopping" in run.output
    assert not run.orphans()
    assert record(run.folder)["state"] == "preempted"
    last = newest(run.folder)
    assert last > before and checkpoint.is_whole(str(run.folder / f"model_{last:07d}.pth"))


@pytest.mark.parametrize("signals", [(signal.SIGTERM, signal.SIGUSR1), (signal.SIGUSR2, signal.SIGINT)])
def test_preempted(unbroken, tmp_path, signals):
    # No other checkpoints than those of the stops.
    rare = ["SOLVER.CHECKPOINT_PERIOD", "0", "SOLVER.BRANCH_POINTS", "()"]
    args = ["--resume", *MINI, *WORKERS, *rare]
    for number, group in zip(signals, (False, True), strict=True):
        with Process(tmp_path / "run", *args) as run:
            run.until_started()
            time.sleep(0.5)
            preempt(run, number, group)
    with Process(tmp_path / "run", *args) as run:
        run.freeze_while(run.is_evaluating)
        preempt(run, signals[0], True)
        assert run.output.count("Start inference on") == run.output.count("copypaste: Task: bbox") + 1
    done = newest(tmp_path / "run") + 1
    assert done % 16 == 0 and done not in [row["iteration"] for row in results(tmp_path / "run")]
    assert len(checkpoint.checkpoints(tmp_path / "run")) == 3
    output = finish(tmp_path / "run", *args)
    assert f"Starting training from iteration {done}" in output
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
    args = ["--resume", *TWO, "DATALOADER.NUM_WORKERS", "1"]
    for number, group in ((signal.SIGUSR1, False), (signal.SIGINT, True), (signal.SIGTERM, True)):
        with Process(tmp_path / "run", *args) as run:
            run.until_checkpoint()
            preempt(run, number, group)
    with Process(tmp_path / "run", *args) as run:
        run.until_checkpoint()
        run.signal(signal.SIGKILL)  # the parent's children do not outlive it
        assert run.end() == -signal.SIGKILL
        assert not run.orphans()
    finish(tmp_path / "run", *args)
    assert_same_run(tmp_path / "run", unbroken_two)


def test_torchrun(unbroken_two, tmp_path):
    with Process(tmp_path / "run", "--resume", *TWO, prefix=TORCHRUN) as run:
        run.until_checkpoint()
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
            assert "another process is training there" in second.output
            assert "Traceback" not in second.output
        assert "Traceback" not in first.output
        first.until_checkpoint()
        first.signal(signal.SIGKILL)
        first.end()
        with Process(tmp_path / "run", *args) as third:
            third.until_started()


# From here on in this process.


@pytest.fixture(scope="module")
def toy_data(tmp_path_factory):
    register_images("toy_interruption", tmp_path_factory.mktemp("images"))
    yield "toy_interruption"
    DatasetCatalog.remove("toy_interruption")


def train(cfg, preemption=None, **how):
    Trainer(cfg, find_start(cfg, **how), preemption).train()


def die_at(count, after, cfg):
    """Train in a process that ends as by SIGKILL before or after its n-th file gets its name."""
    replace, calls = os.replace, itertools.count(1)

    def counted(*args):
        last = next(calls) == count
        if last and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*args)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = counted
    train(cfg, resume=True)


def test_a_kill_at_every_file(toy_data, tmp_path):
    long = ["SOLVER.SCHEDULE", "12", "SOLVER.CHECKPOINT_PERIOD", 5, "SOLVER.CHECKPOINT_KEEP", 2]
    alone = toy.config(toy_data, tmp_path / "alone", *long)
    train(alone)
    files = {p.name for p in (tmp_path / "alone").glob("model_*")}
    context = multiprocessing.get_context("fork")
    for count, after in ((n, after) for n in range(1, 100) for after in (False, True)):
        cfg = toy.config(toy_data, tmp_path / f"{count}-{after}", *long)
        child = context.Process(target=die_at, args=(count, after, cfg))
        child.start()
        child.join(60)
        train(cfg, resume=True)
        folder = tmp_path / f"{count}-{after}"
        test_resume.assert_same_run(folder, tmp_path / "alone")
        assert (folder / "last_checkpoint").read_text() == "model_0000011.pth"
        assert {p.name for p in folder.glob("model_*")} == files
        assert not list(folder.glob(".writing-*"))
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
    assert count > 10
