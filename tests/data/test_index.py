"""The index of COCO annotations: its files, which data sets it serves, and training from it."""

import hashlib
import importlib
import json
import logging
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from PIL import Image

from rethink_d2.data import index, subsets
from rethink_d2.data._index_build import build
from rethink_d2.data.loader import build_train_loader, count_images, training_records
from rethink_d2.engine import Trainer
from rethink_d2.recipe import default_config

REAL = [f"{kind}coco_2017_{split}" for kind in ("", "keypoints_") for split in ("train", "val")]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache; what is registered during the test is forgotten after it."""
    monkeypatch.setenv(index.CACHE_ENV, str(tmp_path / "cache"))
    before = set(DatasetCatalog.list())
    yield tmp_path / "cache"
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def box(number, image, **more):
    return {"id": number, "image_id": image, "category_id": 7, "bbox": [1, 2, 8.5, 9], "iscrowd": 0, **more}


def document(images=3, annotations=None):
    """A COCO document; each image has one box if nothing else is said."""
    return {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": 30 + i % 2 * 20, "width": 40}
            for i in range(1, images + 1)
        ],
        "annotations": [box(i, i) for i in range(1, images + 1)] if annotations is None else annotations,
        "categories": [{"id": 9, "name": "cup"}, {"id": 7, "name": "mug"}],
    }


@pytest.fixture
def register(tmp_path):
    """register(document) -> name; registers it with register_coco_instances."""

    def write(content, name="index_test"):
        path = tmp_path / f"{name}.json"
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text, errors="surrogateescape")
        if name not in DatasetCatalog.list():
            register_coco_instances(name, {}, str(path), str(tmp_path))
        return name

    return write


def stock(name):
    """The records as Detectron2 loads them."""
    return DatasetCatalog.get(name)


def same(ours, theirs):
    """Types and the order of keys too, which the text shows."""
    return repr(list(ours)) == repr(list(theirs))


# ---------------------------------------------------------------- records


@pytest.mark.parametrize("name", REAL)
def test_records_of_genuine_data_are_detectron2_s(real_data, name):
    records = index.load(name)
    assert len(records) == len(stock(name)) and same(records, stock(name))


def test_what_loading_sets_in_the_metadata_is_set(register):
    name = register(document())
    index.load(name)
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["mug", "cup"]
    assert metadata.thing_dataset_id_to_contiguous_id == {7: 0, 9: 1}
    stock(name)  # which refuses other values than those that are there


def test_what_is_left_out_of_the_records_is_said(register, caplog):
    name = register(document(2, [box(1, 1), box(2, 77), box(3, 1, segmentation=[[1, 2, 3, 4]])]))
    assert len(index.load(name)[0]["annotations"]) == 1
    assert "1 annotations are of no image" in caplog.text
    assert "1 instances without a polygon" in caplog.text


def test_it_is_a_sequence(register):
    records = index.load(register(document(5)))
    assert [r["image_id"] for r in records[1:4]] == [2, 3, 4] and records[-1]["image_id"] == 5
    records[0]["annotations"].clear()
    assert records[0]["annotations"], "a record that is changed is nobody else's"
    with pytest.raises(IndexError):
        records[5]


def test_a_pickle_holds_no_records(real_data):
    records = index.load(REAL[0])[10:20].usable()[0]
    text = pickle.dumps(records)
    assert len(text) < 1000 and same(pickle.loads(text), records)


# ---------------------------------------------------------------- the file


def index_files(cache):
    return sorted(cache.rglob("*.index"))


def test_a_file_is_parsed_once_until_it_changes(register, cache, monkeypatch):
    name = register(document(3))
    first = index.load(name)
    with monkeypatch.context() as patch:
        patch.setattr(index, "build", None)
        assert same(index.load(name), first)
    register(document(4))
    assert len(index.load(name)) == 4
    assert len(first) == 3 and first[2], "who reads the old index still has it"


@pytest.mark.parametrize("damage", [b"", b"rd2", b"x" * 40])
def test_a_damaged_index_is_written_again(register, cache, damage):
    name = register(document(3))
    records = list(index.load(name))
    (path,) = index_files(cache)
    path.write_bytes(damage)
    assert same(index.load(name), records)


def test_an_index_cut_off_anywhere_is_no_index(register, cache):
    index.load(register(document(2)))
    (path,) = index_files(cache)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 99), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError):
            index.IndexedRecords(path, "")


def _load_and_note(name, path):
    def counted(*args):
        with open(path, "a") as f:
            f.write("built\n")
        build(*args)

    index.build = counted
    if len(index.load(name)) != 300:
        raise RuntimeError("not all records")


def test_of_processes_that_start_together_one_writes(register, cache, tmp_path):
    name = register(document(300))
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=_load_and_note, args=(name, tmp_path / "log")) for _ in range(6)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * 6
    assert (tmp_path / "log").read_text() == "built\n"


class Interrupt(BaseException):
    pass


def test_a_start_that_is_interrupted_leaves_nothing(register, cache, monkeypatch):
    name = register(document())
    with monkeypatch.context() as patch, pytest.raises(Interrupt):

        def interrupted(*args):
            raise Interrupt

        patch.setattr("rethink_d2.data._index_build._finish", interrupted)
        index.load(name)
    assert [p.suffix for p in (cache / "index_v1").iterdir()] == [".lock"]
    assert len(index.load(name)) == 3


def test_a_cache_that_cannot_be_written_is_done_without(register, tmp_path, monkeypatch, caplog):
    name = register(document())
    monkeypatch.setenv(index.CACHE_ENV, str(tmp_path / "index_test.json"))  # a file, not a folder
    assert index.load(name) is None
    assert index.CACHE_ENV in caplog.text
    assert same(training_records(config(name)), stock(name))


def test_the_digest_is_the_file_s(register, tmp_path, monkeypatch):
    name = register(document())
    digest = hashlib.sha256((tmp_path / "index_test.json").read_bytes()).hexdigest()
    assert index.dataset_digest(name) == digest
    assert index.load(name).digest == digest
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert index.dataset_digest(name) == digest


def test_no_digest_without_an_annotation_file():
    register_coco_instances("index_absent", {}, "/no/such.json", "/no/such")
    subsets.register_subset("index_absent_subset", "index_absent", 2)
    for name in ("index_absent", "index_absent_subset", "voc_2007_train", "no_such_set"):
        assert index.dataset_digest(name) is None


# ---------------------------------------------------------------- what it serves


def twice(key, change):
    content = document()
    content[key].append({**content[key][0], **change})
    return content


UNFIT = {
    "two images with one id": twice("images", {}),
    "two categories with one id": twice("categories", {}),
    "two annotations with one id": twice("annotations", {}),
    "a category that is not listed": document(1, [box(1, 1, category_id=8)]),
    "ignore": document(1, [box(1, 1, ignore=1)]),
    "an empty box": document(1, [box(1, 1, bbox=[])]),
    "no box": document(1, [{k: v for k, v in box(1, 1).items() if k != "bbox"}]),
    "names as ids": {
        **document(1, [box("b", "a")]),
        "images": [{"id": "a", "file_name": "a.png", "height": 30, "width": 40}],
    },
    "NaN": json.dumps(document(1)).replace("8.5", "NaN"),
    "run lengths without a size": document(1, [box(1, 1, segmentation={"counts": "12"})]),
    "another encoding": json.dumps(document(1)).replace("1.png", "\udcff.png"),
    "no images": document(0),
    "no categories": {**document(), "categories": []},
    "nothing": "",
    "no JSON": '{"images": [',
}


@pytest.mark.parametrize("content", UNFIT.values(), ids=UNFIT)
def test_what_detectron2_refuses_or_reads_in_its_own_way_is_left_to_it(register, cache, caplog, content):
    name = register(content)
    assert index.load(name) is None
    assert "no index of" in caplog.text and name in caplog.text
    assert not index_files(cache)


def test_detectron2_s_own_loading_takes_such_a_file_over(register):
    name = register(UNFIT["names as ids"])
    assert same(training_records(config(name)), stock(name))


def test_minival_may_have_an_id_twice_as_in_detectron2(register):
    name = register(UNFIT["two annotations with one id"], "index_minival")
    assert same(index.load(name), stock(name))


def test_a_function_of_somebody_s_own_is_not_bypassed(register, tmp_path):
    register(document())
    path = str(tmp_path / "index_test.json")
    DatasetCatalog.register("index_own", lambda: load_coco_json(path, str(tmp_path), "index_own")[:1])
    MetadataCatalog.get("index_own").set(json_file=path, image_root=str(tmp_path), evaluator_type="coco")
    assert index.load("index_own") is None
    assert len(training_records(config("index_own"))) == 1


@pytest.mark.parametrize(
    "name", ["voc_2007_train", "glyphs_tiny_train", "coco_2017_val_100_panoptic_separated"]
)
def test_other_data_sets_have_none(name):
    assert index.load(name) is None


def test_several_data_sets_are_a_list(register):
    names = [register(document(2), "index_one"), register(document(3), "index_two")]
    cfg = config(*names)
    assert len(training_records(cfg)) == 5 and type(training_records(cfg)) is list


def test_a_subset_has_an_index_of_its_own_images_only(register, cache, caplog):
    source = register(document(50))
    subsets.register_subset("index_subset", source, 5)
    with caplog.at_level(logging.INFO):
        records = training_records(config("index_subset"))
    assert isinstance(records, index.IndexedRecords)
    assert records.ids.tolist() == subsets.subset_ids("index_subset")
    assert same(records, stock("index_subset"))
    assert f"sha256 of ids {subsets.digest(records.ids.tolist())}" in caplog.text
    (path,) = index_files(cache)
    assert path.name.startswith("index_subset") and len(index.IndexedRecords(path, "")) == 5


def test_a_subset_that_is_not_of_the_expected_size_is_reported(register, caplog):
    register(document(3), "index_other")
    subsets.register_subset("index_shared", register(document(9)), 5, images_of="index_other")
    training_records(config("index_shared"))
    assert "3 images, where 5 are expected" in caplog.text


def test_images_are_counted_without_loading_them(register, monkeypatch):
    name = register(document(7))
    monkeypatch.setattr(DatasetCatalog, "get", None)
    assert count_images(name) == 7


# ---------------------------------------------------------------- training


def config(*names, **model):
    cfg = default_config()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = names, ()
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = cfg.SOLVER.IMS_PER_GROUP = 2
    cfg.SEED = 1
    cfg.INPUT.MIN_SIZE_TRAIN = (64, 96)
    cfg.MODEL.update(model)
    return cfg


@pytest.fixture
def plain(real_data):
    """plain(name) -> a name under which a genuine data set is loaded as Detectron2 does."""

    def register(name):
        metadata = MetadataCatalog.get(name)
        other = f"{name}_plain"
        DatasetCatalog.register(other, lambda: load_coco_json(metadata.json_file, metadata.image_root, other))
        kept = {k: v for k, v in metadata.as_dict().items() if k.startswith(("keypoint", "evaluator"))}
        MetadataCatalog.get(other).set(**kept)
        return other

    return register


def contents(sample):
    fields = sample["instances"].get_fields()
    masks = fields.pop("gt_masks").polygons if "gt_masks" in fields else []
    plain = {k: getattr(v, "tensor", v).tolist() for k, v in fields.items()}
    return sample["file_name"], sample["image"].tolist(), plain, [[p.tolist() for p in m] for m in masks]


@pytest.mark.parametrize("name, keypoints, workers", [(REAL[0], False, 2), (REAL[2], True, 0)])
def test_training_samples_are_the_same(plain, name, keypoints, workers):
    found = []
    for registered in (name, plain(name)):
        cfg = config(registered, KEYPOINT_ON=keypoints, MASK_ON=not keypoints)
        cfg.DATALOADER.NUM_WORKERS = workers
        records = training_records(cfg)
        groups = iter(build_train_loader(cfg, records, start_iter=7))
        found.append((records, [sample for _ in range(4) for sample in next(groups)]))
    (ours, our_samples), (theirs, their_samples) = found
    assert isinstance(ours, index.IndexedRecords) and type(theirs) is list
    assert same(ours, theirs)
    assert all(map(len, (s["instances"] for s in our_samples)))
    assert [contents(s) for s in our_samples] == [contents(s) for s in their_samples]


def test_training_ends_with_the_same_weights(register, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "engine")
    toy = importlib.import_module("toy")
    content = document(8)
    for image in content["images"]:
        pixels = np.random.default_rng(image["id"]).integers(0, 256, (image["height"], 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / image["file_name"])
    name = register(content)
    DatasetCatalog.register("index_plain", lambda: stock(name))
    weights = []
    for registered in (name, "index_plain"):
        trainer = Trainer(toy.config(registered, tmp_path / registered))
        assert isinstance(trainer.records, index.IndexedRecords) == (registered == name)
        trainer.train()
        weights.append(trainer.model.state_dict())
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
