"""Shared by all tests. Small genuine COCO and VOC data is used where it is found."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# A shell that starts tests in the background has them, and all they start, ignore SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Small models gain nothing by more threads, which wait for each other on a busy machine.
torch.set_num_threads(1)

# No time is asserted: the machine may be busy.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

ROOT = Path(__file__).parents[1]

# The built-in data sets take their places from this when they are registered, at import; so do their files
# never come from, or go to, the user's own cache.
_cache = tempfile.TemporaryDirectory(prefix="rethink_d2_tests_")
os.environ["RETHINK_D2_CACHE"] = _cache.name

# Detectron2 reads this variable once, at import; so it is set here, before any test imports it.
_small = ROOT.parent / "shared" / "data"
if "DETECTRON2_DATASETS" not in os.environ and _small.is_dir():
    os.environ["DETECTRON2_DATASETS"] = str(_small)


@pytest.fixture(scope="session")
def real_data():
    """The folder of genuine COCO and VOC data."""
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    if not (root / "coco/annotations/instances_val2017.json").is_file():
        pytest.skip("needs COCO data: set DETECTRON2_DATASETS")
    return root


@pytest.fixture(scope="session")
def glyph_cache():
    """One cache of built-in data for all tests, empty at first, also for child processes."""
    return Path(os.environ["RETHINK_D2_CACHE"])


@pytest.fixture(scope="session")
def run_train(glyph_cache):
    """Run train_net.py with arguments in a process of its own; returns the finished process."""

    def run(*args, prefix=(sys.executable,), **kwargs):
        command = [*prefix, str(ROOT / "train_net.py"), *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=1400, **kwargs)

    return run
