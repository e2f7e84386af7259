"""Data sets are part of a recipe's identity by their content."""

import json
import os

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from rethink_d2 import recipe
from rethink_d2.data import index, subsets

NAME = "identity_test"


def settings(name=NAME):
    cfg = recipe.default_config()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (name,), (name, "voc_2007_train")
    return recipe.settings(cfg)


@pytest.fixture
def write(tmp_path):
    """Writes annotations and registers them, as often as it is called."""
    path = tmp_path / "a.json"

    def write(category, path=path):
        images = [{"id": i, "file_name": f"{i}.jpg", "height": 8, "width": 8} for i in range(3)]
        document = {"images": images, "annotations": [], "categories": [{"id": 1, "name": category}]}
        path.write_text(json.dumps(document))
        register_coco_instances(NAME, {}, str(path), str(tmp_path))
        return path

    yield write
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def test_it_is_the_content_that_counts(write, tmp_path):
    path = write("cat")
    first = settings()
    (train,), test = first["DATASETS.TRAIN"], first["DATASETS.TEST"]
    assert train.startswith(f"{NAME}@sha256:")
    assert test == [train, "voc_2007_train"]  # VOC's folders have no digest

    os.utime(path, (0, 0))
    assert settings() == first
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)
    write("cat", tmp_path / "moved.json")
    assert settings() == first
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)
    write("dog!")
    assert recipe.differences(first, settings()).keys() == {"DATASETS.TRAIN", "DATASETS.TEST"}


def test_the_file_is_read_once(write, monkeypatch):
    write("cat")
    first, read = settings(), []
    monkeypatch.setattr(index.hashlib, "file_digest", lambda *args: read.append(args))
    assert settings() == first
    assert not read


def test_a_subset_changes_with_its_source_and_is_not_made_for_it(write, monkeypatch):
    path = write("cat")
    subsets.register_subset(f"{NAME}_two", NAME, 2)
    monkeypatch.setattr(subsets, "ensure", None)
    first = settings(f"{NAME}_two")
    assert first["DATASETS.TRAIN"][0].startswith(f"{NAME}_two@sha256:")
    path.write_text(path.read_text().replace("cat", "a dog"))
    assert settings(f"{NAME}_two") != first
    DatasetCatalog.remove(f"{NAME}_two")
    MetadataCatalog.remove(f"{NAME}_two")


@pytest.mark.parametrize("name", ["glyphs_train", "no_such_set"])
def test_data_that_is_drawn_or_missing_goes_by_its_name(name):
    assert settings(name)["DATASETS.TRAIN"] == [name]
