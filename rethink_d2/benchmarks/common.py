"""What every benchmark shares: times taken in turn, their table, and the machine they were taken on."""

import contextlib
import dataclasses
import importlib.metadata
import multiprocessing
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import cv2
import torch
from tabulate import tabulate

from ..engine.record import PACKAGES

__all__ = ["Result", "compare", "environment", "peak_memory", "peak_of_this_process", "table", "use_threads"]

# Beside those that a run's record names.
MORE_PACKAGES = ("opencv-python", "Pillow", "faster-coco-eval")


@dataclasses.dataclass
class Result:
    """One comparison.

    Attributes:
        name (str): what was done.
        peer (str): what it was compared with, e.g. "Detectron2".
        ours, theirs (list[float]): one value per repeat.
        unit (str): of the values; smaller is better.
        note (str): what the reader should know, e.g. that outputs were equal.
    """

    name: str
    peer: str
    ours: list
    theirs: list
    unit: str = "s"
    note: str = ""

    @property
    def ratio(self):
        """How many times the peer's median is of ours."""
        return statistics.median(self.theirs) / statistics.median(self.ours)


def compare(*functions: Callable, repeats: int = 5, warm_up: int = 1):
    """Time callables in turn, so that a change in the machine's load meets all of them.

    Args:
        functions: called without arguments.
        repeats: timed calls of each.
        warm_up: calls of each before that.

    Returns:
        tuple[list[float], ...]: seconds of every call, by function.
    """
    times = tuple([] for _ in functions)
    for repeat in range(warm_up + repeats):
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if repeat >= warm_up:
                taken.append(time.perf_counter() - start)
    return times


@contextlib.contextmanager
def use_threads(count):
    """While active, torch and OpenCV use so many threads."""
    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(count)
    cv2.setNumThreads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])


def peak_memory(function: Callable, *args):
    """Run a function in a fresh process.

    Args:
        function: of a module's top level.
        args: its arguments.

    Returns:
        float: the most memory that the process held at once, imports included, in MB.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_after, function, args).result()


def _peak_after(function, args):
    function(*args)
    return peak_of_this_process()


def peak_of_this_process():
    """The most memory that this process has held at once, in MB."""
    # getrusage would count what the parent held when it started this process.
    with open("/proc/self/status") as f:
        return int(re.search(r"VmHWM:\s+(\d+) kB", f.read())[1]) / 1000


def environment():
    """Versions and hardware that a figure belongs to."""
    found = {"python": platform.python_version(), "threads": torch.get_num_threads()}
    for name in (*PACKAGES, *MORE_PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    with open("/proc/cpuinfo") as f:
        model = re.search(r"model name\s*: (.*)", f.read())
    name = model[1] if model else platform.machine()
    found["cpu"] = f"{name}, {len(os.sched_getaffinity(0))} cores"
    return found


def table(results):
    """The comparisons as a Markdown table of medians."""
    rows = [
        [
            r.name,
            r.peer,
            f"{statistics.median(r.ours):.4g} {r.unit}",
            f"{statistics.median(r.theirs):.4g} {r.unit}",
            f"{r.ratio:.2f}x",
            r.note,
        ]
        for r in results
    ]
    headers = ["what", "peer", "ours", "peer's", "ratio", "note"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
