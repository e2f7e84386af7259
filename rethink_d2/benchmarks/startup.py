"""Annotations at the start of training: the index of data/index.py against Detectron2's loading.

A COCO file of as many images as asked for repeats the annotations of a real data set. Every start is a
process of its own and counts from the end of the imports until a first record is read: annotations loaded,
images without objects left out, instances per class counted. Peak memory includes the imports, and what was
read of mapped files, though the system may take that back. Private memory is what starting and reading
SAMPLES records add to what the process shares with no other; a loader worker's is all of it. Pages of mapped
files do not count: the system's cache holds them once, for however many processes use the index.
"""

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from detectron2.data import DatasetFromList, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.file_io import PathManager
from torch.utils.data import DataLoader

from ..data.glyphs import CACHE_ENV
from ..data.loader import Groups, drop_unusable, training_records
from ..files import replace_atomically
from ..recipe import default_config
from .common import Result, peak_of_this_process

NAME = "rethink_benchmark_startup"
SAMPLES = 500
WORKERS = 2  # of each process
# Of train2017: 860,001 instances and crowd regions in 118,287 images.
ANNOTATIONS_PER_IMAGE = 7.27


def add_arguments(parser):
    """The benchmark's own arguments."""
    parser.add_argument("--images", type=int, default=118_287, help="train2017 has 118287")
    parser.add_argument("--dataset", default="coco_2017_train", help="whose annotations are repeated")
    parser.add_argument("--processes", type=int, default=8, help="that use one index at the same time")


def run(args):
    """Compare the records, then time and memory, of starts in turn.

    Returns:
        list[Result]

    Raises:
        ValueError: the data set's annotations are not there.
        RuntimeError: a start failed, or its records are not Detectron2's.
    """
    json_file = generated(args.dataset, args.images)
    size = f"{os.path.getsize(json_file) / 1e6:.0f} MB of JSON in {json_file}"
    starts = {"stock": [], "first": [], "later": []}
    private = []  # the most that one of many processes has
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as cache:
            starts["stock"].append(_start("stock", json_file, cache))
            starts["first"].append(_start("first", json_file, cache))
            with _staying(args.processes, json_file, cache) as others:
                starts["later"].append(_start("later", json_file, cache))
        if len({start["records"] for start in (*others, *(s[-1] for s in starts.values()))}) > 1:
            raise RuntimeError(f"{json_file}: the index has other records than Detectron2")
        private.append(max(max(o["private memory"], o["private memory of workers"]) for o in others))
    results = []
    for kind, what, unit in (
        ("first", "seconds", "s"),
        ("first", "peak memory", "MB"),
        ("later", "seconds", "s"),
        ("later", "private memory", "MB"),
    ):
        ours, theirs = ([start[what] for start in starts[k]] for k in (kind, "stock"))
        results.append(Result(f"{kind} start: {what}", "Detectron2", ours, theirs, unit, size))
    what = f"{args.processes} processes with {WORKERS} workers each: most private memory of one"
    results.append(Result(what, "Detectron2, one process", private, theirs, "MB", size))
    return results


def generated(dataset, images):
    """A COCO file of `images` images, kept below the folder for temporary files.

    Returns:
        str: its path.

    Raises:
        ValueError: the data set that it repeats is not there.
    """
    path = Path(tempfile.gettempdir(), "rethink_d2_startup", f"{dataset}-{images}.json")
    if path.exists():
        return str(path)
    source = MetadataCatalog.get(dataset).get("json_file")
    if not source or not PathManager.isfile(source):
        raise ValueError(f"--dataset {dataset}: there is no {source}; set DETECTRON2_DATASETS")
    document = json.loads(Path(PathManager.get_local_path(source)).read_text())
    some = document["images"]
    position = {image["id"]: i for i, image in enumerate(some)}
    with replace_atomically(path) as f:
        f.write(b'{"images": [')
        f.write(", ".join(json.dumps({**some[i % len(some)], "id": i + 1}) for i in range(images)).encode())
        f.write(b'], "annotations": [')
        number, separator = 0, ""
        # An image's annotations are far apart, as in train2017.
        for annotation in document["annotations"][: round(len(some) * ANNOTATIONS_PER_IMAGE)]:
            rest = json.dumps({k: v for k, v in annotation.items() if k not in ("id", "image_id")})[1:]
            for i in range(position[annotation["image_id"]], images, len(some)):
                number += 1
                f.write(f'{separator}{{"id": {number}, "image_id": {i + 1}, {rest}'.encode())
                separator = ", "
        f.write(b'], "categories": ' + json.dumps(document["categories"]).encode() + b"}")
    return str(path)


def _command(kind, json_file):
    return [sys.executable, "-m", __spec__.name, kind, json_file]


def _start(kind, json_file, cache):
    done = subprocess.run(
        _command(kind, json_file), env={**os.environ, CACHE_ENV: cache}, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"the {kind} start failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


@contextlib.contextmanager
def _staying(count, json_file, cache):
    """Processes that start together, read records, also with workers, and stay; yields their measures."""
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(
                subprocess.Popen(
                    _command("stay", json_file),
                    env={**os.environ, CACHE_ENV: cache},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )
            )
            for _ in range(count)
        ]
        yield [json.loads(process.stdout.readline()) for process in started]
        # leaving the block closes their inputs, which ends them


def measure(kind, json_file):
    """One start in this process.

    Args:
        kind (str): "stock", or another for the index.
        json_file (str): annotations.

    Returns:
        dict, Sequence: ``seconds``, ``peak memory`` and ``private memory`` (MB), and ``records``, a digest of
        some; the records.
    """
    register_coco_instances(NAME, {}, json_file, "images")
    before, start = _private_memory(), time.perf_counter()
    if kind == "stock":
        records = DatasetFromList(get_detection_dataset_dicts([NAME]))
        records[0]
    else:
        cfg = default_config()
        cfg.DATASETS.TRAIN = (NAME,)
        records = training_records(cfg)
        Groups(records, dict, 2, 1, by_orientation=True)[0]
    seconds = time.perf_counter() - start
    peak = peak_of_this_process()
    chosen = [records[i] for i in np.linspace(0, len(records) - 1, SAMPLES, dtype=int)]
    if kind == "stock":
        chosen, _ = drop_unusable(chosen)
    digest = hashlib.sha256(repr((len(records), chosen)).encode()).hexdigest()
    del chosen
    added = _private_memory() - before
    return {"seconds": seconds, "peak memory": peak, "private memory": added, "records": digest}, records


def workers_memory(records):
    """The most private memory, in MB, of loader workers that read SAMPLES records."""
    groups = Groups(records, _look, 2, 1, by_orientation=True)
    loader = DataLoader(groups, batch_size=None, sampler=range(SAMPLES // 2), num_workers=WORKERS)
    return max(sample["private memory"] for group in loader for sample in group)


def _look(record):
    return {"private memory": _private_memory()}


def _private_memory():
    """MB that are this process's alone, without pages of files, which are clean."""
    with open("/proc/self/smaps_rollup") as f:
        return sum(int(line.split()[1]) for line in f if line.startswith("Private_Dirty")) / 1000


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One start, as JSON.")
    parser.add_argument("kind", choices=["stock", "first", "later", "stay"])
    parser.add_argument("json_file")
    options = parser.parse_args()
    measured, kept = measure(options.kind, options.json_file)  # kept, as an index is mapped while it is used
    if options.kind == "stay":
        measured["private memory of workers"] = workers_memory(kept)
    print(json.dumps(measured), flush=True)
    if options.kind == "stay":
        sys.stdin.read()
