import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from rethink_d2 import recipe
from rethink_d2.config import add_rethink_config
from rethink_d2.data.loader import build_train_loader, drop_unusable, training_records


def annotation(width, height, crowd=0):
    return {"bbox": [1, 2, width, height], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": crowd}


def test_zero_size_boxes_are_dropped_and_everything_is_counted():
    records = [
        {"annotations": [annotation(3, 4), annotation(0, 4), annotation(5, 5, crowd=1)]},
        {"annotations": [annotation(3, 0)]},
        {"annotations": [annotation(3, 4)], "width": 1, "height": 9},  # outside of the image
        {"annotations": []},
    ]
    kept, counts = drop_unusable(records)
    assert [len(r["annotations"]) for r in kept] == [2, 0, 0, 0]
    assert len(records[0]["annotations"]) == 3, "the catalogue's own records must stay as they are"
    assert counts == {
        "images": 4,
        "instances": 1,
        "crowd regions": 1,
        "zero-size boxes left out": 3,
        "images without annotations": 3,
    }


def config(name):
    cfg = get_cfg()
    add_rethink_config(cfg)
    cfg.DATASETS.TRAIN = (name,)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_GROUP, cfg.SEED = 2, 1
    cfg.INPUT.MIN_SIZE_TRAIN = (64,)
    return cfg


@pytest.fixture
def grey_set(tmp_path):
    """Four images of 40x30, every second one greyscale; the last has no annotations."""
    records = []
    for i in range(4):
        path = str(tmp_path / f"{i}.jpg")
        shape = (30, 40) if i % 2 else (30, 40, 3)
        Image.fromarray(np.full(shape, 99, np.uint8)).save(path)
        records.append({"file_name": path, "image_id": i, "width": 40, "height": 30})
        records[-1]["annotations"] = [annotation(9, 9)] if i < 3 else []
    DatasetCatalog.register("test_grey", lambda: records)
    yield "test_grey"
    DatasetCatalog.remove("test_grey")


def test_greyscale_files_are_read_and_marked(grey_set):
    cfg = config(grey_set)
    records = training_records(cfg)
    assert len(records) == 3, "the image without annotations is left out"
    groups = iter(build_train_loader(cfg, records))
    samples = [s for _ in range(6) for s in next(groups)]
    assert {s["image_id"]: s["greyscale"] for s in samples} == {0: False, 1: True, 2: False}
    assert all(s["image"].shape[0] == 3 for s in samples)


def test_nothing_to_train_on_names_the_key():
    DatasetCatalog.register("test_nothing", lambda: [{"file_name": "a", "annotations": []}])
    try:
        with pytest.raises(ValueError, match="DATASETS.TRAIN"):
            training_records(config("test_nothing"))
    finally:
        DatasetCatalog.remove("test_nothing")


@pytest.fixture
def two_sets():
    """two_sets(classes, other classes) -> the names of two sets of one image."""
    names = ("test_classes_a", "test_classes_b")

    def register(*classes):
        for name, own in zip(names, classes, strict=True):
            record = {"file_name": name, "annotations": [annotation(3, 4)]}
            DatasetCatalog.register(name, lambda record=record: [record])
            MetadataCatalog.get(name).set(**({"thing_classes": own} if own else {}))
        return names

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize("other", [["dog", "cat"], ["cat", "dog", "bird"], ["cat"]])
def test_sets_with_other_classes_are_not_trained_on_together(two_sets, other):
    cfg = config("")
    cfg.DATASETS.TRAIN = two_sets(["cat", "dog"], other)
    with pytest.raises(
        ValueError, match="DATASETS.TRAIN: class [012] is .* in test_classes_a, .* in test_cl"
    ):
        training_records(cfg)
    assert "test_classes_b" in str(next(p for p in recipe.check(cfg) if p.key == "DATASETS.TRAIN"))


@pytest.mark.parametrize("classes, other", [(["cat", "dog"], ("cat", "dog")), (["cup"], None)])
def test_sets_with_the_same_classes_are_counted_by_class(two_sets, classes, other, caplog):
    cfg = config("")
    cfg.DATASETS.TRAIN = two_sets(classes, other)
    with caplog.at_level("INFO"):
        assert len(training_records(cfg)) == 2
    assert f"Distribution of instances among all {len(classes)} categories" in caplog.text
    assert not [p for p in recipe.check(cfg) if p.key == "DATASETS.TRAIN"]


def test_genuine_coco_is_counted(real_data, caplog):
    with caplog.at_level("INFO"):
        records = training_records(config("coco_2017_train"))
    assert "8 crowd regions" in caplog.text
    assert 0 < len(records) <= 80
