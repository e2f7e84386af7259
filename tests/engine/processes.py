"""train_net.py as processes that tests watch, signal and kill, and what such a run leaves."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import torch
from test_resume import TIMES, assert_equal

from rethink_d2 import model_zoo
from rethink_d2.engine import checkpoint

TRAIN_NET = str(Path(__file__).parents[2] / "train_net.py")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
TAG = "RETHINK_D2_TEST_PROCESS"

# A tenth of a second an iteration, half a second an evaluation.
MINI = [
    *("--config-file", model_zoo.get_config_file("mini/scratch_mask_rcnn_R_18_FPN_gn.yaml")),
    *("DATASETS.TRAIN", "('glyphs_tiny_train',)", "DATASETS.TEST", "('glyphs_tiny_val',)"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.WARMUP_ITERS", "2", "INPUT.MIN_SIZE_TRAIN", "(64,)"),
    *("MODEL.DEVICE", "cpu"),
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", "100", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "50"),
    # So that a model that knows next to nothing has detections, which take time.
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "TEST.DETECTIONS_PER_IMAGE", "20"),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", "20"),
    *("SOLVER.SCHEDULE", "80", "SOLVER.CHECKPOINT_PERIOD", "2", "TEST.EVAL_PERIOD", "16"),
    *("SOLVER.CHECKPOINT_KEEP", "3", "SOLVER.BRANCH_POINTS", "(20,)"),  # each is of 32 MB
]


class Process:
    """train_net.py on one run folder, leader of a new process group. As a context it leaves nothing running.

    Args:
        folder (Path): OUTPUT_DIR.
        args: its other arguments.
        prefix (tuple[str]): what runs it.
    """

    def __init__(self, folder, *args, prefix=(sys.executable,)):
        self.folder = folder
        tag = uuid.uuid4().hex
        self._tag = f"{TAG}={tag}".encode()
        # One thread, so that two runs at a time on two cores neither slow down each other nor differ.
        env = {**os.environ, TAG: tag, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        command = [*prefix, TRAIN_NET, *map(str, args), "OUTPUT_DIR", str(folder)]
        path = folder.parent / f"{folder.name}-{tag}.out"
        with open(path, "w") as out:
            self._popen = subprocess.Popen(command, stdout=out, stderr=out, env=env, start_new_session=True)
        self._file, self._text = open(path), ""
        self._sessions = {self._popen.pid}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in self.alive():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._popen.wait()
        self._file.close()

    def alive(self):
        """Ids of the processes that it consists of: its own, those it launched, loader workers.

        torchrun's processes are found only if this is called while torchrun runs.
        """
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):  # just ended
                if not entry.name.isdigit():
                    continue
                # What comes after the name. Only few are looked at closer, which may wait for the process.
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                parent, session = int(stat[1]), int(stat[3])
                if session not in self._sessions and parent != self._popen.pid:
                    continue
                # Numbers are used again, so they alone prove nothing; an ended one has no environment.
                if self._tag in (entry / "environ").read_bytes().split(b"\0"):
                    self._sessions.add(session)
                    found.append(int(entry.name))
        return found

    def running(self):
        return self._popen.poll() is None

    def launched(self):
        """Ids of the processes of a run of several: first that which launched, then the launched ones."""
        first = self._popen.pid
        children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
        ranks = [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return [first, *ranks]

    @property
    def output(self):
        """Everything that it has printed, to stdout and stderr."""
        self._text += self._file.read()
        return self._text

    def until(self, happened, timeout=120):
        """Wait, closely, for ``happened()`` to be true. Fails if the process ends before."""
        end = time.monotonic() + timeout
        while not happened():
            code = self._popen.poll()
            assert code is None, f"ended with {code} before it could be interrupted:\n{self.output[-3000:]}"
            assert time.monotonic() < end, f"waited in vain:\n{self.output[-3000:]}"
            time.sleep(0.001)

    def until_started(self):
        self.until(lambda: "Starting training from iteration" in self.output)

    def until_checkpoint(self):
        """Wait until it has written one."""
        before = newest(self.folder)
        self.until(lambda: newest(self.folder) > before)

    def freeze_while(self, doing):
        """Freeze it at a moment when ``doing()`` is true. Signals that end it take effect nevertheless."""
        while True:
            self.until(doing)
            self.signal(signal.SIGSTOP)
            time.sleep(0.02)
            if doing():
                return
            self.signal(signal.SIGCONT)

    def is_writing(self):
        """Whether a checkpoint is half written."""
        return any(p.name.startswith(".writing-") for p in self.folder.glob(".*"))

    def is_evaluating(self):
        """Whether it runs the model over a test set."""
        return self.output.count("Start inference on") > self.output.count("Total inference time")

    def signal(self, number, group=False):
        if group and self.running():
            os.killpg(self._popen.pid, number)
        else:
            self._popen.send_signal(number)

    def end(self, timeout=120):
        """Wait for its end; returns the exit code."""
        try:
            return self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"does not end:\n{self.output[-3000:]}") from None

    def orphans(self, timeout=60):
        """Processes that are left `timeout` seconds from now."""
        end = time.monotonic() + timeout
        while (left := self.alive()) and time.monotonic() < end:
            time.sleep(0.1)
        return left


def finish(folder, *args, **kwargs):
    """Run train_net.py to its end; returns what it printed."""
    with Process(folder, *args, **kwargs) as run:
        assert run.end(400) == 0, run.output[-3000:]
        assert not run.orphans()
        assert record(folder)["state"] == "done"
        return run.output


def newest(folder):
    """The iteration of the newest checkpoint that has a checksum; -1 for none."""
    found = checkpoint.checkpoints(str(folder))
    return next((i for i, path in found.items() if os.path.exists(f"{path}.sha256")), -1)


def record(folder):
    return json.loads((folder / "run.json").read_text())


def results(folder):
    return json.loads((folder / "results.json").read_text())


def metrics(folder):
    """The rows of metrics.json by iteration, without times. Detectron2 does not write them in order."""
    lines = (folder / "metrics.json").read_text().splitlines()
    # AP is NaN without objects of a size, and NaN is unlike itself.
    rows = [json.loads(line, parse_constant=str) for line in lines]
    rows = [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
    return sorted(rows, key=lambda row: row["iteration"])


def final(folder):
    """All that the last checkpoint holds, without times."""
    saved = torch.load(folder / "model_final.pth", weights_only=True)
    saved["scalars"] = {name: repr(v) for name, v in saved["scalars"].items() if name not in TIMES}
    return saved


def tensors_digest(folder):
    """The sha256 of the final model's tensors and their names."""
    found = hashlib.sha256()
    for name, tensor in sorted(final(folder)["model"].items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def assert_same_run(folder, other):
    """Weights, optimizer, scheduler and histories bit for bit; every row of metrics and results."""
    assert_equal(final(folder), final(other))
    assert metrics(folder) == metrics(other)
    assert results(folder) == results(other)
    assert checkpoint.is_whole(str(folder / "model_final.pth"))
