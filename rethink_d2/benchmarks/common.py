"""What every benchmark shares: pairs of times, their table, and the machine they were taken on."""

import dataclasses
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch
from tabulate import tabulate

__all__ = ["Result", "compare", "environment", "table"]

PACKAGES = ("torch", "torchvision", "numpy", "opencv-python", "Pillow", "pycocotools", "faster-coco-eval")


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


def compare(ours: Callable, theirs: Callable, repeats: int = 5, warm_up: int = 1):
    """Time two callables in turn, so that a change in the machine's load meets both.

    Args:
        ours, theirs: called without arguments.
        repeats: timed calls of each.
        warm_up: calls of each before that.

    Returns:
        tuple[list[float], list[float]]: seconds of every call.
    """
    times = ([], [])
    for repeat in range(warm_up + repeats):
        for function, taken in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            function()
            if repeat >= warm_up:
                taken.append(time.perf_counter() - start)
    return times


def environment():
    """Versions and hardware that a figure belongs to."""
    found = {"python": platform.python_version(), "threads": torch.get_num_threads()}
    for name in (
        "torch",
        "torchvision",
        "numpy",
        "opencv-python",
        "Pillow",
        "pycocotools",
        "faster-coco-eval",
    ):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    found["cpu"] = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"
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
