import copy
import json
import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rethink_d2.data import check
from rethink_d2.data.check import check_dataset, cli
from rethink_d2.data.classification import register_image_folder
from rethink_d2.data.subsets import register_subset
from rethink_d2.data.voc import register_voc

NAME = "check_test"
SIZE = (64, 48)  # width, height
SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]
RLE = {"size": [48, 64], "counts": [100, 200, 48 * 64 - 300]}


@pytest.fixture(autouse=True)
def forget():
    yield
    for name in [name for name in DatasetCatalog.list() if name.startswith(NAME)]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def paint(path, size=SIZE, mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)


def faults(name=NAME, workers=0):
    """(level, kind, the last two words of where) of what is not a note."""
    found = [f for f in check_dataset(name, workers) if f.level != "note"]
    return [(f.level, f.kind, " ".join(os.path.basename(f.where).split()[-2:])) for f in found]


def notes(name=NAME):
    """Counts by kind, and by class."""
    found = [f for f in check_dataset(name) if f.level == "note"]
    counts = {f.kind: f.count for f in found if f.kind != "class"}
    return counts, {f.where: f.count for f in found if f.kind == "class"}


class Coco:
    """A COCO data set without a fault, and methods to make one."""

    def __init__(self, root, keypoint_names=()):
        self.root, self.keypoint_names = root, keypoint_names
        images = [{"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 48} for i in (1, 2, 3, 4)]
        for image in images:
            paint(root / "images" / image["file_name"])
        ids = {"image_id": 1, "category_id": 3, "iscrowd": 0, "bbox": [10, 10, 20, 20]}
        person = {"id": 11, **ids, "segmentation": [SQUARE]}
        person |= {"keypoints": [11, 12, 2, 0, 0, 0], "num_keypoints": 1}
        hidden = {"id": 12, **ids, "segmentation": [SQUARE], "keypoints": [0] * 6, "num_keypoints": 0}
        crowd = {"id": 13, **ids, "image_id": 2, "segmentation": RLE, "iscrowd": 1}
        categories = [{"id": 3, "name": "person"}, {"id": 7, "name": "dog"}]
        self.document = {
            "images": images,
            "annotations": [person, hidden, crowd, {**crowd, "id": 14, "image_id": 3}, {**person, "id": 15}],
            "categories": categories,
        }
        self.document["annotations"][-1].update(image_id=3, category_id=7)

    def register(self):
        (self.root / "a.json").write_text(json.dumps(self.document))
        metadata = {"keypoint_names": list(self.keypoint_names)} if self.keypoint_names else {}
        register_coco_instances(NAME, metadata, str(self.root / "a.json"), str(self.root / "images"))


@pytest.fixture
def coco(tmp_path):
    return Coco(tmp_path, ("head", "foot"))


def test_counts(coco):
    coco.register()
    assert faults() == []
    counts = {"images": 4, "instances": 5, "crowds": 2, "with-visible-keypoints": 2}
    counts |= {"images-without-annotations": 1, "images-with-crowds-only": 1}
    assert notes() == (counts, {"person": 2, "dog": 1})


@pytest.mark.parametrize(
    "change, level, kind",
    [
        ({"bbox": [10, 10, 0, 20]}, "warning", "zero-size-box"),
        ({"bbox": [10, 10, 20, -1]}, "warning", "zero-size-box"),
        ({"bbox": [50, 10, 20, 20]}, "warning", "box-outside"),
        ({"bbox": [-5, 10, 20, 20]}, "warning", "box-outside"),
        ({"bbox": [10, 100, 20, 20]}, "warning", "box-outside"),
        ({"bbox": []}, "error", "malformed"),
        ({"bbox": [1, 2, 3]}, "error", "malformed"),
        ({"bbox": [1, 2, 3, "4"]}, "error", "malformed"),
        ({"bbox": [1, 2, float("nan"), 4]}, "error", "malformed"),
        ({"bbox": None}, "error", "malformed"),
        ({"ignore": 1}, "error", "malformed"),
        ({"category_id": 1}, "error", "unknown-category"),
        ({"segmentation": [[1, 2, 3, 4]]}, "warning", "short-polygon"),
        ({"segmentation": [SQUARE, SQUARE[:7]]}, "warning", "short-polygon"),
        ({"segmentation": [SQUARE, [60, 1, 70, 1, 70, 9]]}, "warning", "polygon-outside"),
        ({"segmentation": []}, "warning", "no-mask"),
        ({"segmentation": "abc"}, "error", "malformed"),
        ({"segmentation": {**RLE, "size": [64, 48]}}, "error", "rle-size"),
        ({"segmentation": {**RLE, "counts": [100, 200]}}, "error", "rle-size"),
        ({"segmentation": {**RLE, "counts": "zzz"}}, "error", "malformed"),
        ({"segmentation": {"size": [48, 64]}}, "error", "malformed"),
        ({"keypoints": [1, 2, 2]}, "error", "keypoints-length"),
        ({"keypoints": [1, 2, 2] * 3}, "error", "keypoints-length"),
        ({"keypoints": []}, "error", "keypoints-length"),
        ({"num_keypoints": 2}, "warning", "num-keypoints"),
    ],
)
def test_a_fault_of_one_annotation(coco, change, level, kind):
    coco.document["annotations"][0].update(change)
    coco.register()
    assert faults() == [(level, kind, "annotation 11")]


@pytest.mark.parametrize(
    "change",
    [
        {"bbox": [-0.9, -0.5, 65.8, 49.4]},  # rounding
        {"segmentation": [[-0.9, 5, 64.9, 5, 64.9, 48.5]]},
        {"segmentation": {**RLE, "counts": mask_util.frPyObjects(RLE, 48, 64)["counts"].decode()}},
        {"iscrowd": 1, "keypoints": []},
    ],
)
def test_what_is_no_fault_of_an_annotation(coco, change):
    coco.document["annotations"][0].update(change)
    coco.register()
    assert faults() == []


def test_boxes_alone_are_no_fault(coco):
    for annotation in coco.document["annotations"]:
        annotation["segmentation"] = []
    coco.document["annotations"][0]["bbox"] = None
    coco.register()
    assert faults() == [("error", "malformed", "annotation 11")]


def _duplicate(kind, **change):
    def make(document):
        document[kind].append({**document[kind][0], **change})

    return make


def _drop(kind, key):
    def make(document):
        del document[kind][0][key]

    return make


@pytest.mark.parametrize(
    "make, level, kind, where",
    [
        (_duplicate("images", file_name="2.jpg"), "error", "duplicate-image", "image 1"),
        (_duplicate("annotations", image_id=3), "error", "duplicate-annotation", "annotation 11"),
        (_duplicate("annotations", id=16, image_id=9), "warning", "unknown-image", "annotation 16"),
        (_duplicate("categories", name="cat"), "error", "classes", "a.json"),
        (_drop("images", "height"), "error", "malformed", "of images"),
        (_drop("annotations", "id"), "error", "malformed", "of annotations"),
        (_drop("annotations", "image_id"), "error", "malformed", "of annotations"),
        (lambda d: d.update(categories=[]), "error", "annotation-file", "a.json"),
        (lambda d: d.pop("images"), "error", "annotation-file", "a.json"),
        (lambda d: d.update(images=[], annotations=[]), "error", "no-images", NAME),
    ],
)
def test_a_fault_of_the_file(coco, make, level, kind, where):
    make(coco.document)
    coco.register()
    assert (level, kind, where) in faults()


def test_json_that_ends_early(coco):
    coco.register()
    path = coco.root / "a.json"
    path.write_text(path.read_text()[:-9])
    assert faults() == [("error", "annotation-file", "a.json")]


def test_other_classes_than_registered(coco):
    coco.register()
    MetadataCatalog.get(NAME).thing_classes = ["person", "cat"]
    ((level, kind, _),) = faults()
    assert (level, kind) == ("error", "classes")
    with pytest.raises(AssertionError):
        DatasetCatalog.get(NAME)


def test_what_detectron2_makes_of_errors_and_warnings(coco):
    """The levels are about its loader and mapper: it refuses the one and leaves out the other."""
    coco.document["annotations"] = [a for a in coco.document["annotations"] if not a["iscrowd"]]
    good, _, other = coco.document["annotations"]
    mapper = DatasetMapper(True, augmentations=[], image_format="BGR", use_instance_mask=True)
    for change, level in [
        ({"bbox": [10, 10, 0, 20]}, "warning"),
        ({"segmentation": [[1, 2, 3, 4]]}, "warning"),
        ({"bbox": [1, 2, 3]}, "error"),
        ({"category_id": 1}, "error"),
        ({"segmentation": {**RLE, "size": [64, 48]}}, "error"),
        ({"ignore": 1}, "error"),
    ]:
        coco.document["annotations"] = [copy.deepcopy(good) | change, other]
        coco.register()
        assert [f[0] for f in faults()] == [level]
        if level == "warning":
            assert [len(mapper(r)["instances"]) for r in DatasetCatalog.get(NAME)] == [0, 0, 1, 0]
        else:
            with pytest.raises((AssertionError, KeyError, ValueError)):
                [mapper(record) for record in DatasetCatalog.get(NAME)]
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)


# ---------------------------------------------------------------- images


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-400])


def _rotate(path):
    exif = Image.Exif()
    exif[274] = 6
    paint(path, exif=exif)


@pytest.mark.parametrize(
    "spoil, kind",
    [
        (os.unlink, "missing-image"),
        (_truncate, "unreadable-image"),
        (lambda path: path.write_text("no image"), "unreadable-image"),
        (lambda path: path.write_bytes(b""), "unreadable-image"),
        (lambda path: paint(path, (48, 64)), "image-size"),
        (_rotate, "image-size"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image(coco, spoil, kind, workers):
    coco.register()
    spoil(coco.root / "images/2.jpg")
    assert faults(workers=workers) == [("error", kind, "2.jpg")]


@pytest.mark.parametrize("mode", ["L", "CMYK", "1", "P", "RGBA", "I;16"])
def test_any_kind_of_pixels_that_detectron2_reads(coco, mode):
    path = coco.root / "images/2.jpg"
    if mode == "I;16":
        Image.fromarray(np.zeros(SIZE[::-1], np.uint16)).save(path, format="png")
    else:
        paint(path, mode=mode, format="tiff")
    with Image.open(path) as image:
        assert image.mode == mode
    coco.register()
    assert faults() == []


def test_an_image_turned_by_exif_fits_turned_annotations(coco):
    _rotate(coco.root / "images/4.jpg")
    coco.document["images"][3].update(width=48, height=64)
    coco.register()
    assert faults() == []


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=6))
def test_every_image_gets_its_own_verdict(tmp_path_factory, kinds):
    root = tmp_path_factory.mktemp("images")
    records = []
    for number, kind in enumerate(kinds):
        path = root / f"{number}.png"
        if kind:
            paint(path, (8, 4 + kind))
        records.append({"file_name": str(path), "height": 5, "width": 8, "image_id": number})
    DatasetCatalog.register(NAME, lambda: records)
    wanted = {0: "missing-image", 2: "image-size"}
    expected = [("error", wanted[k], f"{i}.png") for i, k in enumerate(kinds) if k in wanted]
    assert faults() == expected
    DatasetCatalog.remove(NAME)


# ---------------------------------------------------------------- other kinds of data sets


def write_voc(root, image_id, box=(11, 12, 30, 40), name="cat", difficult=0, split="train"):
    sides = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    text = f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{sides}</bndbox></object>"
    text = f"<annotation><size><width>64</width><height>48</height></size>{text}</annotation>"
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "Annotations" / f"{image_id}.xml").write_text(text)
    paint(root / "JPEGImages" / f"{image_id}.jpg")
    with open(root / "ImageSets/Main" / f"{split}.txt", "a") as f:
        f.write(f"{image_id}\n")


def test_every_fault_of_voc_data_in_one_run(tmp_path):
    write_voc(tmp_path, "good", difficult=1)
    write_voc(tmp_path, "whole", (1, 1, 64, 48))
    write_voc(tmp_path, "counted_from_0", (0, 0, 63, 47))
    write_voc(tmp_path, "flat", (11, 12, 11, 40))
    write_voc(tmp_path, "thin", (11, 12, 12, 40))
    write_voc(tmp_path, "beyond", (11, 12, 80, 40))
    write_voc(tmp_path, "unicorn", name="unicorn")
    write_voc(tmp_path, "words", ("a", 2, 3, 4))
    for image_id in ("absent", "cut", "unannotated"):
        write_voc(tmp_path, image_id)
    (tmp_path / "JPEGImages/absent.jpg").unlink()
    (tmp_path / "Annotations/unannotated.xml").unlink()
    _truncate(tmp_path / "JPEGImages/cut.jpg")
    write_voc(tmp_path, "good", difficult=1)
    register_voc(NAME, [(tmp_path, "train", 2012)])
    assert sorted(faults()) == [
        ("error", "annotation-file", "unannotated.xml"),
        ("error", "annotation-file", "words.xml"),
        ("error", "duplicate-image", "good.xml"),
        ("error", "missing-image", "absent.jpg"),
        ("error", "unknown-category", "annotation 1"),
        ("error", "unreadable-image", "cut.jpg"),
        ("warning", "box-outside", "annotation 1"),
        ("warning", "zero-size-box", "annotation 1"),
    ]
    at = {f.kind: os.path.basename(f.where) for f in check_dataset(NAME)}
    assert at["zero-size-box"].startswith("flat.jpg") and at["box-outside"].startswith("beyond.jpg")
    counts, classes = notes()
    assert counts["images"] == 11 and counts["instances"] == 9 and counts["difficult"] == 1
    assert classes["cat"] == 8 and classes["dog"] == 0


def test_a_union_of_voc_folders(tmp_path):
    for folder in "ab":
        write_voc(tmp_path / folder, "1")
    (tmp_path / "b/ImageSets/Main/val.txt").write_text("\n")
    parts = [(tmp_path / "a", "train", 2007), (tmp_path / "b", "train", 2012), (tmp_path / "b", "val", 2012)]
    register_voc(NAME, parts)
    assert faults() == [("error", "annotation-file", "val.txt")]
    assert notes()[0]["images"] == 2


def test_an_image_folder(tmp_path):
    for file in ("a/1.png", "a/2.png", "b/3.png"):
        paint(tmp_path / file)
    _truncate(tmp_path / "a/2.png")
    register_image_folder(NAME, str(tmp_path))
    assert faults() == [("error", "unreadable-image", "2.png")]
    assert notes() == ({"images": 3}, {"a": 2, "b": 1})


def test_a_loader_that_fails(tmp_path):
    (tmp_path / "empty").mkdir()
    register_image_folder(NAME, str(tmp_path))
    (finding,) = (f for f in check_dataset(NAME) if f.level == "error")
    assert finding.kind == "loader" and "has no images" in finding.message


@pytest.mark.parametrize(
    "change, level, kind",
    [
        ({}, None, None),
        ({"bbox": [5, 5, 5, 9]}, "warning", "zero-size-box"),
        ({"bbox": [5, 5, 20, 99]}, "warning", "box-outside"),
        ({"bbox": [0.1, 0.1, 0.9, 0.9], "bbox_mode": BoxMode.XYXY_REL}, "error", "malformed"),
        ({"category_id": 2}, "error", "unknown-category"),
        ({"category_id": -1}, "error", "unknown-category"),
        ({"segmentation": [[1, 2, 3, 4]]}, "error", "short-polygon"),
        ({"segmentation": [np.array(SQUARE)]}, None, None),
        ({"segmentation": RLE}, "error", "malformed"),
        ({"segmentation": mask_util.frPyObjects(RLE, 48, 64)}, None, None),
        ({"segmentation": mask_util.encode(np.zeros((64, 48), np.uint8, order="F"))}, "error", "rle-size"),
        ({"bbox": [30, 20, 20, 10, 45], "bbox_mode": BoxMode.XYWHA_ABS}, None, None),
    ],
)
def test_records_of_ones_own(tmp_path, change, level, kind):
    paint(tmp_path / "1.png")
    annotation = {"bbox": [5, 5, 20, 20], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1, **change}
    # Without height and width, which Detectron2 then takes from the image.
    DatasetCatalog.register(NAME, lambda: [{"file_name": tmp_path / "1.png", "annotations": [annotation]}])
    MetadataCatalog.get(NAME).thing_classes = ["a", "b"]
    assert faults() == ([(level, kind, "annotation 1")] if level else [])


def test_records_with_the_same_id_or_without_a_file(tmp_path):
    paint(tmp_path / "1.png")
    record = {"file_name": str(tmp_path / "1.png"), "image_id": 5, "annotations": []}
    DatasetCatalog.register(NAME, lambda: [record, dict(record), {"image_id": 6}])
    assert faults() == [("error", "duplicate-image", "1.png"), ("error", "malformed", "record 3")]


def test_a_subset_is_what_is_checked(coco, glyph_cache):
    coco.document["images"][1]["width"] = 65
    coco.register()
    register_subset(f"{NAME}_subset", NAME, 2)  # of images with a labelled person: 1 and 3
    assert faults(f"{NAME}_subset") == []
    assert notes(f"{NAME}_subset")[0]["images"] == 2
    assert ("error", "image-size", "2.jpg") in faults()


def test_a_subset_that_cannot_be_made(coco, glyph_cache):
    coco.register()
    register_subset(f"{NAME}_subset", NAME, 3)
    (finding,) = (f for f in check_dataset(f"{NAME}_subset") if f.level == "error")
    assert finding.kind == "annotation-file" and "3 images asked for, but there are 2" in finding.message


# ---------------------------------------------------------------- genuine data


@pytest.mark.parametrize(
    "name, counts",
    [
        ("coco_2017_train", {"images": 80, "instances": 739, "crowds": 8}),
        ("coco_2017_val", {"images": 79, "instances": 624, "crowds": 5}),
        (
            "keypoints_coco_2017_val",
            {"instances": 118, "with-visible-keypoints": 68, "images-without-annotations": 40},
        ),
        ("voc_2012_val", {"images": 5, "instances": 11, "difficult": 0}),
        ("voc_2007_trainval", {"images": 5, "instances": 17, "difficult": 2}),
        ("voc_0712_train", {"images": 10, "instances": 28, "difficult": 2}),
    ],
)
def test_genuine_data_is_clean(real_data, name, counts):
    if "voc" in name and not (real_data / "VOC2012").is_dir():
        pytest.skip("needs the small VOC data beside COCO's")
    assert faults(name) == []
    found, classes = notes(name)
    assert {kind: found[kind] for kind in counts} == counts
    assert sum(classes.values()) == found["instances"] - found["crowds"]


def test_the_two_zero_size_boxes_of_bccd(real_data):
    if not (real_data / "BCCD").is_dir():
        pytest.skip("needs the small BCCD data beside COCO's")
    register_voc(NAME, [(real_data / "BCCD", "trainval", 2012)], class_names=("RBC", "WBC", "Platelets"))
    found = [f for f in check_dataset(NAME) if f.kind == "zero-size-box"]
    assert [os.path.basename(f.where).split(".")[0] for f in found] == [
        "BloodImage_00338",
        "BloodImage_00343",
    ]
    assert {f.level for f in found} == {"warning"}


def test_built_in_data_is_made_and_clean(glyph_cache):
    assert faults("glyphs_tiny_train") == [] == faults("glyphs_keypoints_tiny_train")
    counts, _ = notes("glyphs_keypoints_tiny_train")
    assert counts["images"] == 32 and counts["with-visible-keypoints"] == counts["instances"] > 32


# ---------------------------------------------------------------- command line


def test_text_has_ten_examples_of_a_kind_unless_asked_for_all(coco, capsys):
    for annotation in coco.document["annotations"] * 4:
        coco.document["annotations"].append({**annotation, "id": 100 + len(coco.document["annotations"])})
        coco.document["annotations"][-1].update(bbox=[1, 1, 0, 5])
    coco.register()
    assert cli([NAME, "--workers", "0"]) == 0  # warnings
    text = capsys.readouterr().out
    assert text.count("left out") == check.EXAMPLES and "and 10 more (--all)" in text
    assert cli([NAME, "--workers", "0", "--all"]) == 0
    text = capsys.readouterr().out
    assert text.count("left out") == 20 and "--all" not in text


def test_json_holds_everything(coco, capsys):
    coco.document["annotations"][0]["category_id"] = 5
    coco.register()
    assert cli([NAME, "--json", "--workers", "0"]) == 1
    (findings,) = json.loads(capsys.readouterr().out).values()
    assert findings[0]["level"] == "error" and findings[0]["kind"] == "unknown-category"
    assert findings[0]["where"].endswith("1.jpg, annotation 11")
    assert "5 is not one of 2" in findings[0]["message"]
    assert len(findings) == len(check_dataset(NAME))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["coco_2017_trian"], ["coco_2017_trian is not registered", "did you mean coco_2017_train?"]),
        ([NAME], [f"{NAME} is not on this machine", "nowhere/a.json", "nowhere/images"]),
        ([NAME, "--workers", "-1"], ["--workers"]),
        ([], ["NAME"]),
    ],
)
def test_wrong_usage(tmp_path, capsys, arguments, words):
    register_coco_instances(NAME, {}, str(tmp_path / "nowhere/a.json"), str(tmp_path / "nowhere/images"))
    with pytest.raises(SystemExit) as error:
        cli(arguments)
    assert error.value.code == 2
    shown = capsys.readouterr().err
    assert all(word in shown for word in words)


def test_an_interruption_leaves_no_processes(coco, capsys):
    class Interrupt(dict):
        def get(self, *_):
            assert multiprocessing.active_children()
            raise KeyboardInterrupt

    paint(coco.root / "1.png")
    records = [{"file_name": str(coco.root / "1.png"), "annotations": [Interrupt()]}] * 50
    DatasetCatalog.register(NAME, lambda: records)
    assert cli([NAME, "--workers", "2"]) == 130
    assert multiprocessing.active_children() == []
    assert "interrupted" in capsys.readouterr().err


def test_the_program_exits_with_1_on_a_broken_set(tmp_path):
    for image_id in ("1", "2"):
        write_voc(tmp_path / "VOC2012", image_id, split="val")
    _truncate(tmp_path / "VOC2012/JPEGImages/2.jpg")
    done = subprocess.run(
        [sys.executable, "-m", "rethink_d2.data.check", "voc_2012_val", "--workers", "1"],
        env=os.environ | {"DETECTRON2_DATASETS": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    assert "2.jpg: OSError: image file is truncated" in done.stdout
