"""run.json and results.json: what a run is, how it stands, and what it reached."""

import importlib.metadata
import logging
import math
import os
import platform
import time

import torch
from detectron2.utils import comm

from ..files import read_json, write_json

logger = logging.getLogger(__name__)

SCHEMA = 1
PACKAGES = ("rethink_d2", "torch", "torchvision", "detectron2", "sal-detectron2", "numpy", "pycocotools")


class RunRecord:
    """Keeps ``run.json`` of one run folder true. Every process has one; only the main process's writes.

    Args:
        folder (str): the run folder.
        run_id (str), identity (str), seed (int): see :func:`rethink_d2.recipe.identity`.
        parent (dict or None): of a branch; None keeps what the record says already.
    """

    def __init__(self, folder, *, run_id, identity, seed, parent=None):
        self.path = os.path.join(folder, "run.json")
        before = read_json(self.path, {})
        self._seconds_before = before.get("seconds", 0.0)
        self._clock = time.monotonic()
        threads = before.get("threads", torch.get_num_threads())
        if threads != torch.get_num_threads() and not torch.cuda.is_available():
            logger.warning(
                "The run used %d CPU threads so far and uses %d now: results will differ in the last bits",
                threads,
                torch.get_num_threads(),
            )
        versions = _versions()
        changed = [
            f"{name} {then}, now {versions.get(name, 'none')}"
            for name, then in before.get("versions", {}).items()
            if then != versions.get(name)
        ]
        if changed:
            logger.warning(
                "The run used %s: results will differ in the last bits from one with the same versions",
                "; ".join(changed),
            )
        self.value = {
            "schema": SCHEMA,
            "run_id": run_id,
            "identity": identity,
            "seed": seed,
            "state": "running",
            "parent": parent or before.get("parent"),
            "world_size": comm.get_world_size(),
            "threads": torch.get_num_threads(),
            "versions": versions,
            "hardware": _hardware(),
            "started": before.get("started", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())),
            "last_error": None,
        }
        self.write("running")

    def write(self, state):
        """Set the state: ``running``, ``preempted`` or ``done``."""
        if comm.is_main_process():
            self._write(state)

    def fail(self, error):
        """Set the state ``failed`` and the last error, on whichever process.

        The first error counts: the others fail because that process is gone, and know no more.
        """
        if read_json(self.path, {}).get("state") != "failed":
            self._write("failed", f"{type(error).__name__}: {error}")

    def _write(self, state, error=None):
        seconds = self._seconds_before + time.monotonic() - self._clock
        self.value.update(state=state, last_error=error, seconds=round(seconds, 1))
        write_json(self.path, self.value)


def append_result(folder, iteration, dataset, metrics):
    """Add one evaluation to ``results.json``; a repeat of the same one replaces it."""
    path = os.path.join(folder, "results.json")
    rows = [r for r in read_json(path, []) if (r["iteration"], r["dataset"]) != (iteration, dataset)]
    # Without any detection Detectron2's AP is NaN, which JSON does not have.
    known = {k: None if math.isnan(v) else v for k, v in metrics.items()}
    write_json(path, [*rows, {"iteration": iteration, "dataset": dataset, **known}])


def _versions():
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass  # installed under the other name, or from a source folder
    return found


def _hardware():
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"
