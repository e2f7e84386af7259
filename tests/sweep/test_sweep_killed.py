"""A sweep and its training, killed together: nothing of them may stay."""

import os
import signal
import subprocess
import sys

import pytest
from standin import until

from rethink_d2.files import read_json
from rethink_d2.sweep.process import started
from rethink_d2.sweep.state import held

RUN = "base-r50-gn-scratch-2x"


def children(pid):
    return [int(child) for child in subprocess.check_output(["ps", "--ppid", str(pid), "-o", "pid="]).split()]


@pytest.mark.slow
def test_a_killed_training_leaves_no_workers_and_no_locks(tmp_path, glyph_cache):
    folder = tmp_path / RUN / "seed1"
    metrics = folder / "metrics.json"
    options = ["DATASETS.TEST", "()", "TEST.EVAL_PERIOD", "0", "DATALOADER.NUM_WORKERS", "2"]
    argv = [sys.executable, "-m", "rethink_d2.sweep", "run", "--mini", "--out", tmp_path, "--only", RUN]
    sweep = subprocess.Popen([*argv, *options], stdout=subprocess.DEVNULL)
    try:
        # It trains, and so its workers' pipe is full.
        until(lambda: os.path.exists(metrics) and os.path.getsize(metrics), 300)
    finally:
        sweep.kill()
        sweep.wait()
        training = read_json(folder / "launch.json", {}).get("pid")
        workers = {pid: started(pid) for pid in (children(training) if training else ())}
        if training:
            os.kill(training, signal.SIGKILL)
    [device] = (tmp_path / ".devices").iterdir()
    try:
        assert len(workers) >= 2
        until(lambda: not any(started(pid) == begin for pid, begin in workers.items()), 20)
    finally:
        for pid, begin in workers.items():
            if started(pid) == begin:
                os.kill(pid, signal.SIGKILL)
    assert not held(folder / ".claim") and not held(folder / ".lock") and not held(device)
