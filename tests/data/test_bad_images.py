"""Images that cannot be read, in a data set of COCO's format with genuine files."""

import itertools
import json
import os
import traceback

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image

from rethink_d2 import recipe
from rethink_d2.data.classification import ClassificationMapper
from rethink_d2.data.loader import BadImageError, Groups, build_train_loader, training_records
from rethink_d2.data.mapper import DATASET_MAPPER_REGISTRY, CountingMapper
from rethink_d2.data.order import GroupOrder

NAME, COUNT, BAD = "test_bad_images", 9, 4


@DATASET_MAPPER_REGISTRY.register()
class MapperWithMistake(CountingMapper):
    """Fails on one image, which can be read."""

    def __call__(self, record):
        if record["image_id"] == BAD:
            record["no such key"]
        return super().__call__(record)


@pytest.fixture
def folder(tmp_path):
    images, annotations = [], []
    for i in range(COUNT):
        width, height = (40, 60) if i % 3 == 0 else (60, 40)
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.jpg")
        images.append({"id": i, "file_name": f"{i}.jpg", "width": width, "height": height})
        box = {"bbox": [3, 4, 20, 30], "area": 600, "iscrowd": 0, "category_id": 1}
        annotations.append({"id": i + 1, "image_id": i, **box})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    register_coco_instances(NAME, {}, str(tmp_path / "instances.json"), str(tmp_path))
    yield tmp_path
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-300])


def missing(path):
    os.unlink(path)


def text(path):
    path.write_text("404 not found")


def broken_png(path):
    Image.open(path).save(path, "PNG")
    content = bytearray(path.read_bytes())
    length = content.index(b"IDAT") - 4
    content[length : length + 4] = (100).to_bytes(4, "big")  # where no other chunk follows
    path.write_bytes(content)


def another_picture(path):
    Image.new("RGB", (8, 8)).save(path)


DAMAGES = (truncated, missing, text, broken_png, another_picture)


def batches(iterations, *options, start_iter=0):
    """The samples of some iterations of two groups."""
    small = ["DATASETS.TRAIN", (NAME,), "INPUT.MIN_SIZE_TRAIN", (20, 24, 28, 32), "SEED", 1]
    batch = ["SOLVER.IMS_PER_BATCH", 4, "SOLVER.IMS_PER_GROUP", 2, "DATALOADER.NUM_WORKERS", 0]
    cfg = recipe.resolve(recipe.load("", [*small, *batch, *options]), 1)
    loader = build_train_loader(cfg, training_records(cfg), start_iter)
    return list(itertools.islice(loader, 2 * iterations))


def refusal(*args):
    """The error that stops the loader."""
    try:
        batches(*args)
    except RuntimeError as e:
        # Torch's frames hold the loader in a reference cycle; collecting that waits for workers in vain.
        traceback.clear_frames(e.__traceback__)
        return type(e), str(e)
    raise AssertionError("nothing was refused")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_bad_image_stops_with_its_name(folder, damage, workers):
    path = folder / f"{BAD}.jpg"
    damage(path)
    error, message = refusal(3, "DATALOADER.NUM_WORKERS", workers)
    assert error is BadImageError
    assert message.startswith(f"{path}: cannot be read (") and "\n" not in message
    assert "DATALOADER.ON_BAD_IMAGE skip" in message


SKIP = ["DATALOADER.ON_BAD_IMAGE", "skip"]


def assert_same(sample, other):
    assert sample["file_name"] == other["file_name"] and sample["greyscale"] == other["greyscale"]
    assert torch.equal(sample["image"], other["image"])
    assert torch.equal(sample["instances"].gt_boxes.tensor, other["instances"].gt_boxes.tensor)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_skipping_changes_nothing_else(folder, damage, workers):
    path = str(folder / f"{BAD}.jpg")
    good = batches(10)  # four epochs
    damage(folder / f"{BAD}.jpg")
    skipped = batches(10, *SKIP, "DATALOADER.NUM_WORKERS", workers)
    replaced = []
    for group, other in zip(good, skipped, strict=True):
        assert len(group) == len(other) == 2
        for sample, chosen in zip(group, other, strict=True):
            if sample["file_name"] == path:
                assert chosen["file_name"] != path
                assert chosen["bad_images"] and set(chosen["bad_images"]) == {path}
                replaced.append(chosen["file_name"])
            else:
                assert chosen["bad_images"] == []
                assert_same(chosen, sample)
    assert len(replaced) >= 4 and len(set(replaced)) > 1, "another one in another epoch"


def test_skipping_depends_on_the_place_alone(folder):
    for i in (1, 4, 5):
        missing(folder / f"{i}.jpg")
    straight = batches(9, *SKIP)
    for start in (3, 7):
        later = batches(9 - start, *SKIP, start_iter=start)
        for group, other in zip(straight[2 * start :], later, strict=True):
            for sample, again in zip(group, other, strict=True):
                assert sample["bad_images"] == again["bad_images"]
                assert_same(sample, again)


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_but_bad_images_is_an_error(folder, workers):
    for i in range(COUNT):
        missing(folder / f"{i}.jpg")
    error, message = refusal(1, *SKIP, "DATALOADER.NUM_WORKERS", workers)
    assert error is BadImageError
    assert "cannot be read" in message and f"all {Groups.TRIES} images tried" in message
    assert "ON_BAD_IMAGE skip" not in message


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("options", [[], SKIP], ids=["stop", "skip"])
def test_a_mistake_in_the_code_is_never_skipped(folder, options, workers):
    mistake = ["INPUT.MAPPER", "MapperWithMistake", "DATALOADER.NUM_WORKERS", workers]
    error, message = refusal(3, *options, *mistake)
    assert error is RuntimeError
    assert "4.jpg: INPUT.MAPPER failed on it (KeyError: 'no such key')" in message
    assert not workers or "in __call__" in message, "where the mistake is"


def classification(folder, **changes):
    records = [{"file_name": str(folder / f"{i}.jpg"), "image_id": i, "label": 0} for i in range(COUNT)]
    records[BAD].update(changes)
    mapper = ClassificationMapper(augmentations=[], image_format="BGR", num_classes=1)
    groups = Groups(records, mapper, 1, 0, by_orientation=False, skip_bad=True)
    return [name for position in range(COUNT) for (s,) in [groups[position]] for name in s["bad_images"]]


def test_what_a_mapper_says_of_an_image_in_its_own_words(folder):
    text(folder / f"{BAD}.jpg")
    found = classification(folder)
    assert found and set(found) == {str(folder / f"{BAD}.jpg")}


def test_a_wrong_label_is_not_skipped(folder):
    with pytest.raises(RuntimeError, match="4.jpg.*MODEL.CLASSIFIER.NUM_CLASSES"):
        classification(folder, label=1)


def test_a_replacement_may_be_bad_too():
    def mapper(record):
        if int(record["file_name"]) < 2:
            raise FileNotFoundError(record["file_name"])
        return record

    groups = Groups(
        [{"file_name": str(i)} for i in range(4)], mapper, 1, 0, by_orientation=False, skip_bad=True
    )
    order, tries = GroupOrder([False] * 4, 1, 0), []
    for position in range(40):
        (sample,) = groups[position]
        ((index, _),) = order.group(position)
        assert int(sample["file_name"]) >= 2
        assert sample["bad_images"][:1] == ([str(index)] if index < 2 else [])
        tries.append(len(sample["bad_images"]))
    assert {0, 1, 2, 3} <= set(tries)
