"""Subsets: the same images everywhere, and nothing but them when training and when scoring."""

import hashlib
import json
import os
import runpy
import sys

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.datasets import register_coco_instances
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager
from hypothesis import given
from hypothesis import strategies as st

from rethink_d2 import recipe
from rethink_d2.data import subsets
from rethink_d2.data.files import data_paths, missing_files
from rethink_d2.data.loader import count_images

KEYPOINTS = "keypoints_coco_2017_train"
id_lists = st.lists(st.integers(0, 10**12), min_size=1, max_size=40, unique=True)
seeds = st.integers(0, 10)
# Of images 1 to 1000 of coco_2017_train.
FIRST_OF_SEED_0 = [92, 887, 683, 222, 919, 295]
FIRST_OF_SEED_1 = [713, 675, 301, 216, 661, 605]
DIGEST = "ac3dbc97c47d0f30b925d7435cc13bc3da80358d31c8462e6f778657c0329fc5"  # of 100, seed 0


@pytest.fixture
def register(tmp_path, monkeypatch):
    """register_subset with an empty cache; what is registered during the test is forgotten after it."""
    monkeypatch.setenv(subsets.CACHE_ENV, str(tmp_path / "cache"))
    before = set(DatasetCatalog.list())
    yield subsets.register_subset
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def coco(image_ids, **person):
    """A COCO document with one box in each image."""
    box = {"category_id": 7, "bbox": [1, 2, 8, 9], "area": 72, "iscrowd": 0, **person}
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 20, "height": 30} for i in image_ids]
    boxes = [{"id": 10**12 + i, "image_id": i, **box} for i in image_ids]
    return {"info": {}, "images": images, "annotations": boxes, "categories": [{"id": 7, "name": "thing"}]}


@pytest.fixture
def source(register, tmp_path):
    """A registered data set of images 1 to 50, and its file."""
    path = tmp_path / "source.json"
    path.write_text(json.dumps(coco(range(1, 51))))
    register_coco_instances("subset_source", {}, str(path), str(tmp_path))
    return path


# ---------------------------------------------------------------- which images


@given(id_lists, seeds, st.data())
def test_draws_are_nested_and_hold_as_many_as_asked_for(ids, seed, data):
    large = data.draw(st.integers(1, len(ids)))
    small = data.draw(st.integers(1, large))
    few, many = (subsets.sample(ids, size, "coco", seed) for size in (small, large))
    assert few == many[:small]
    assert len(set(many)) == large and set(many) <= set(ids)


@given(id_lists, seeds, st.randoms())
def test_the_order_of_the_file_does_not_matter(ids, seed, random):
    shuffled = ids[:]
    random.shuffle(shuffled)
    assert subsets.rank(shuffled, "coco", seed) == subsets.rank(ids, "coco", seed)
    assert subsets.digest(shuffled) == subsets.digest(ids)


@given(st.integers(0, 10**6), seeds, seeds)
def test_seeds_and_names_give_other_orders(first, seed, other):
    ids = range(first, first + 100)
    ranked = subsets.rank(ids, "coco", seed)
    assert (subsets.rank(ids, "coco", other) == ranked) == (seed == other)
    assert subsets.rank(ids, "keypoints_coco", seed) != ranked


def test_a_draw_never_changes():
    ids = range(1, 1001)
    assert subsets.rank(ids, "coco_2017_train", 0)[:6] == FIRST_OF_SEED_0
    assert subsets.rank(ids, "coco_2017_train", 1)[:6] == FIRST_OF_SEED_1
    assert subsets.digest(subsets.sample(ids, 100, "coco_2017_train", 0)) == DIGEST


def test_the_rule_is_what_the_documentation_says():
    by_hand = min(range(1, 1001), key=lambda i: hashlib.sha256(f"coco_2017_train:0:{i}".encode()).hexdigest())
    assert by_hand == FIRST_OF_SEED_0[0]
    assert subsets.digest([10, 9]) == hashlib.sha256(b"9\n10").hexdigest()


@pytest.mark.parametrize("size", [0, -1, 4])
def test_a_size_that_cannot_be_had_is_refused_with_the_numbers(size):
    with pytest.raises(ValueError, match=f"coco: {size} images .* 3 to choose"):
        subsets.sample([1, 2, 3], size, "coco", 0)


# ---------------------------------------------------------------- registration


def test_the_paper_s_names_are_registered():
    for source in ("coco_2017_train", KEYPOINTS):
        sizes = {"35k_sampled": 35504, "10k": 10000, "3.5k": 3500, "1k": 1000}
        for short, size in sizes.items():
            for seed in range(10):
                name = f"{source}_{short}" + (f"_seed{seed}" if seed else "")
                assert MetadataCatalog.get(name).subset == subsets.Subset(source, size, seed)
                assert count_images(name) == size
        exact = MetadataCatalog.get(f"{source}_35k").subset
        assert exact == subsets.Subset(source, 35504, images_of="coco_2014_val")


def test_registering_reads_and_writes_nothing(register, tmp_path):
    register_coco_instances("subset_absent", {}, "/no/such.json", "/no/such")
    register("subset_of_absent", "subset_absent", 5)
    assert missing_files("subset_of_absent") == ["/no/such.json", "/no/such"]
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "bad", [("no_such_set", None), ("voc_2007_train", None), ("subset_source", "no_such_set")]
)
def test_only_registered_coco_sets_have_subsets(register, source, bad):
    with pytest.raises(ValueError, match="register it first"):
        register("subset_bad", bad[0], 3, images_of=bad[1])
    assert "subset_bad" not in DatasetCatalog.list()


# ---------------------------------------------------------------- loading


def test_a_subset_holds_its_images_and_their_annotations_only(register, source, caplog):
    register("subset_small", "subset_source", 12, seed=3)
    with caplog.at_level("INFO", "rethink_d2.data.subsets"):
        records = DatasetCatalog.get("subset_small")
    want = subsets.sample(range(1, 51), 12, "subset_source", 3)
    assert [r["image_id"] for r in records] == sorted(want) == subsets.subset_ids("subset_small")
    assert all(len(r["annotations"]) == 1 for r in records)
    with PathManager.open(MetadataCatalog.get("subset_small").json_file) as f:
        assert {a["image_id"] for a in json.load(f)["annotations"]} == set(want)
    assert subsets.digest(want) in caplog.text and "seed 3" in caplog.text
    assert not [r for r in caplog.records if "expected" in r.getMessage()]


def test_images_without_annotations_count(register, source):
    document = coco(range(1, 51))
    document["annotations"] = []
    source.write_text(json.dumps(document))
    register("subset_empty", "subset_source", 50)
    assert len(DatasetCatalog.get("subset_empty")) == 50


def test_metadata_is_the_source_s(register, source):
    """Some of it is set by Detectron2 only when a data set is loaded, here into either of the two."""
    MetadataCatalog.get("subset_source").thing_colors = [(1, 2, 3)]
    register("subset_meta", "subset_source", 5)
    DatasetCatalog.get("subset_meta")
    DatasetCatalog.get("subset_source")
    mine, theirs = (MetadataCatalog.get(n).as_dict() for n in ("subset_meta", "subset_source"))
    own = {"name", "json_file", "subset", "num_images"}
    assert {k: v for k, v in mine.items() if k not in own} == {
        k: v for k, v in theirs.items() if k not in own
    }
    assert mine["thing_dataset_id_to_contiguous_id"] == {7: 0} and mine["thing_colors"] == [(1, 2, 3)]


def test_crowds_and_unlabelled_persons_do_not_make_a_keypoint_image(register, source):
    MetadataCatalog.get("subset_source").keypoint_names = ["nose"]
    document = coco(range(1, 5))
    marks = [{"num_keypoints": 1}, {"num_keypoints": 0}, {"num_keypoints": 1, "iscrowd": 1}, {}]
    for box, mark in zip(document["annotations"], marks, strict=True):
        box.update(mark)
    source.write_text(json.dumps(document))
    register("subset_labelled", "subset_source", 1)
    register("subset_unlabelled", "subset_source", 2)
    assert subsets.subset_ids("subset_labelled") == [1]
    with pytest.raises(ValueError, match="2 images asked for, but there are 1"):
        subsets.subset_ids("subset_unlabelled")


def test_the_source_is_read_once_until_it_changes(register, source, monkeypatch):
    register("subset_once", "subset_source", 50)
    first = subsets.ensure("subset_once")
    with monkeypatch.context() as patch:
        patch.setattr(subsets, "_cut", None)
        assert subsets.ensure("subset_once") == first
        os.utime(source)
        assert subsets.ensure("subset_once") == first
    stat = source.stat()
    source.write_text(source.read_text().replace('"id": 50,', '"id": 60,'))
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as cp -p, rsync -t and tar leave it
    assert stat.st_size == source.stat().st_size and max(subsets.subset_ids("subset_once")) == 60


def test_built_in_data_and_subsets_have_subsets_too(register, glyph_cache, monkeypatch):
    monkeypatch.setenv(subsets.CACHE_ENV, str(glyph_cache))
    register("subset_letters", "glyphs_tiny_val", 8)
    register("subset_few_letters", "subset_letters", 3)
    assert missing_files("subset_few_letters") == []
    assert len(DatasetCatalog.get("subset_few_letters")) == 3
    assert set(subsets.subset_ids("subset_few_letters")) < set(subsets.subset_ids("subset_letters"))


def test_a_cache_that_cannot_be_written_names_the_variable(register, source, monkeypatch):
    monkeypatch.setenv(subsets.CACHE_ENV, str(source))  # a file, not a folder
    register("subset_nowhere", "subset_source", 5)
    with pytest.raises(OSError, match=subsets.CACHE_ENV):
        DatasetCatalog.get("subset_nowhere")


@pytest.mark.parametrize("text", ["[]", "{}", '{"images": ['])
def test_a_damaged_source_is_named(register, source, text):
    source.write_text(text)
    register("subset_damaged", "subset_source", 5)
    with pytest.raises(ValueError, match=f"{source} cannot be read"):
        subsets.subset_ids("subset_damaged")


# ---------------------------------------------------------------- val35k


@pytest.fixture
def val2014(register, tmp_path, monkeypatch):
    """Where the built-in names look for instances_val2014.json: a path within a temporary data root."""
    path = tmp_path / "coco" / "annotations" / "instances_val2014.json"
    path.parent.mkdir(parents=True)
    monkeypatch.setitem(
        MetadataCatalog.data, "coco_2014_val", Metadata(name="coco_2014_val", json_file=str(path))
    )
    return path


@pytest.mark.parametrize("name", ["coco_2017_train_35k", KEYPOINTS + "_35k"])
def test_val35k_is_what_val2014_and_train2017_share(real_data, val2014, name, caplog):
    train = json.loads((real_data / "coco/annotations/instances_train2017.json").read_text())
    shared = sorted(image["id"] for image in train["images"])[::4]
    val2014.write_text(json.dumps(coco([*shared, 5, 6])))
    assert [r["image_id"] for r in DatasetCatalog.get(name)] == shared
    assert f"{len(shared)} images, where 35504 are expected" in caplog.text


def test_val35k_without_val2014_names_the_file_and_offers_the_sampled_set(real_data, val2014):
    for name in ("coco_2017_train_35k", KEYPOINTS + "_35k"):
        with pytest.raises(ValueError) as error:
            DatasetCatalog.get(name)
        assert str(val2014) in str(error.value) and f"{name}_sampled" in str(error.value)
        assert missing_files(name) == [str(val2014)]


def test_the_recipe_check_says_so_before_the_run(real_data, val2014):
    cfg = recipe.load("", ["DATASETS.TRAIN", ("coco_2017_train_35k",), "DATASETS.TEST", ()])
    found = {p.key: str(p) for p in recipe.check(cfg)}["DATASETS.TRAIN"]
    assert str(val2014) in found and "coco_2017_train_35k_sampled" in found


def test_nothing_is_offered_that_lacks_files_too(real_data, val2014, monkeypatch):
    lost = Metadata(name="coco_2017_train", json_file="/no/such.json", image_root="/no/such")
    monkeypatch.setitem(MetadataCatalog.data, "coco_2017_train", lost)
    assert missing_files("coco_2017_train_1k") == ["/no/such.json"]
    with pytest.raises(ValueError) as error:
        subsets.subset_ids("coco_2017_train_35k")
    assert "/no/such.json" in str(error.value) and "sampled" not in str(error.value)


def test_another_file_in_the_place_of_val2014_is_refused(real_data, val2014):
    val2014.write_text(json.dumps(coco([5, 6])))
    with pytest.raises(ValueError, match="none of the images"):
        subsets.subset_ids("coco_2017_train_35k")


# ---------------------------------------------------------------- real data, real evaluator


def perfect(record, task):
    """Detections that are the ground truth of one image."""
    boxes = [a for a in record["annotations"] if not a["iscrowd"]]
    if task == "keypoints":
        boxes = [{**a, "keypoints": np.reshape(a["keypoints"], (17, 3))} for a in boxes]
        boxes = [a for a in boxes if a["keypoints"][:, 2].any()]
    truth = annotations_to_instances(boxes, (record["height"], record["width"]), mask_format="bitmask")
    found = Instances(truth.image_size, pred_boxes=truth.gt_boxes, pred_classes=truth.gt_classes)
    found.scores = torch.ones(len(boxes))
    if boxes and task == "keypoints":
        found.pred_keypoints = truth.gt_keypoints.tensor
    elif boxes and task == "segm":
        found.pred_masks = truth.gt_masks.tensor.numpy()
    return {"instances": found}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "source, size, task",
    [("coco_2017_train", 30, "bbox"), ("coco_2017_train", 30, "segm"), (KEYPOINTS, 20, "keypoints")],
)
def test_ground_truth_scores_100(real_data, register, source, size, task):
    register("subset_coco", source, size)
    # The evaluator before anything is loaded, as Detectron2's training script builds it.
    evaluator = COCOEvaluator("subset_coco", (task,), distributed=False)
    records = DatasetCatalog.get("subset_coco")
    assert len(records) == size
    evaluator.reset()
    for record in records:
        evaluator.process([record], [perfect(record, task)])
    assert evaluator.evaluate()[task]["AP"] == pytest.approx(100)
    assert sorted(evaluator._coco_api.imgs) == subsets.subset_ids("subset_coco")


def test_keypoint_draws_are_of_images_with_labelled_persons(real_data, register):
    path = data_paths(KEYPOINTS)[0][0]
    with open(path) as f:
        people = [a for a in json.load(f)["annotations"] if a["num_keypoints"] and not a["iscrowd"]]
    labelled = {a["image_id"] for a in people}
    register("subset_people", KEYPOINTS, len(labelled))
    register("subset_too_many_people", KEYPOINTS, len(labelled) + 1)
    assert subsets.subset_ids("subset_people") == sorted(labelled)
    with pytest.raises(ValueError, match=f"{len(labelled) + 1} images .* {len(labelled)} to choose"):
        subsets.subset_ids("subset_too_many_people")


# ---------------------------------------------------------------- command line


def test_the_command_line_prints_the_ids(register, source, capsys):
    register("subset_printed", "subset_source", 5, seed=2)
    ids = subsets.subset_ids("subset_printed")
    assert subsets.cli(["subset_printed"]) == 0
    line = capsys.readouterr().out
    assert "5 images of subset_source, seed 2" in line and subsets.digest(ids) in line
    assert subsets.cli(["subset_printed", "--ids"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(line) and printed.splitlines()[1:] == [str(i) for i in ids]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("name", ["coco_2017_val", "no_such_set"])
def test_the_command_line_refuses_what_is_no_subset(name, capsys):
    """Run as ``python -m`` runs it: as a second copy beside the imported module."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["subsets", name])
        runpy.run_module("rethink_d2.data.subsets", run_name="__main__")
    assert end.value.code == 2
    assert f"{name} is not a subset" in capsys.readouterr().err
