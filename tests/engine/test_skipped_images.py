"""Runs on a data set with images that cannot be read."""

import json
import os

import pytest
import torch
from detectron2.data import DatasetCatalog
from gloo import on_processes
from test_resume import StopsAfter, assert_same_run
from toy import config, register_images

from rethink_d2.data.loader import BadImageError
from rethink_d2.engine import Trainer
from rethink_d2.engine.start import find_start
from rethink_d2.preemption import Preempted

NAME, BAD = "toy_bad_images", (2, 5)
SKIP = ["DATALOADER.ON_BAD_IMAGE", "skip", "SOLVER.SCHEDULE", "18", "SOLVER.CHECKPOINT_PERIOD", 4]
SKIP += ["SOLVER.IMS_PER_GROUP", 2]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    records = register_images(NAME, tmp_path_factory.mktemp("images"))
    for i in BAD:
        os.unlink(records[i]["file_name"])
    yield records
    DatasetCatalog.remove(NAME)


@pytest.fixture(scope="module")
def unbroken(records, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    Trainer(config(NAME, folder, *SKIP)).train()
    return folder


def counted(folder):
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return rows[-1]["bad_images"]


def test_a_run_stops_at_a_bad_image(records, tmp_path):
    with pytest.raises(BadImageError, match="(2|5).png: cannot be read"):
        Trainer(config(NAME, tmp_path)).train()


def test_bad_images_are_counted(records, unbroken, caplog):
    # 18 iterations of 4 images are 9 epochs of 8 images; a replacement that is bad counts too.
    assert counted(unbroken) >= 9 * len(BAD)
    assert torch.load(unbroken / "model_final.pth", weights_only=True)["images_seen"] == {
        "images": 72,
        "greyscale": 0,
        "bad": counted(unbroken),
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_equals_unbroken(records, unbroken, tmp_path, workers):
    cfg = config(NAME, tmp_path, *SKIP, "DATALOADER.NUM_WORKERS", workers)
    for stop in (4, 6):
        with pytest.raises(Preempted):
            Trainer(cfg, find_start(cfg, resume=True), StopsAfter(stop)).train()
    Trainer(cfg, find_start(cfg, resume=True)).train()
    assert_same_run(tmp_path, unbroken)


def spread(records, folder):
    DatasetCatalog.register(NAME, lambda: records)
    trainer = Trainer(config(NAME, folder, *SKIP))
    trainer.train()
    return dict(trainer.images_seen)


def test_the_count_is_of_all_processes(records, unbroken, tmp_path):
    expected = {"images": 72, "greyscale": 0, "bad": counted(unbroken)}
    assert on_processes(tmp_path / "processes", 2, spread, records, tmp_path / "run") == [expected] * 2
    assert counted(tmp_path / "run") == expected["bad"]


def stop_on_one(records, folder):
    DatasetCatalog.register(NAME, lambda: records)
    Trainer(config(NAME, folder, "SOLVER.IMS_PER_GROUP", 2)).train()


def test_a_bad_image_on_one_process_ends_all(records, tmp_path):
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="png: cannot be read"):
        on_processes(tmp_path / "processes", 2, stop_on_one, records, tmp_path / "run")
