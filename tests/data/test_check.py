import dataclasses
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
from PIL import Image

from rethink_d2.data import glyphs
from rethink_d2.data.check import check_dataset, cli
from rethink_d2.data.classification import register_image_folder
from rethink_d2.data.subsets import register_subset
from rethink_d2.data.voc import register_voc

NAME = "check_test"
BOX = (11, 12, 30, 40)
SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]
RLE = {"size": [48, 64], "counts": [100, 200, 48 * 64 - 300]}
TURNED = RLE | {"size": [64, 48]}
COMPRESSED = mask_util.frPyObjects(RLE, 48, 64)


@pytest.fixture(autouse=True)
def forget():
    yield
    for name in [name for name in DatasetCatalog.list() if name.startswith(NAME)]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def paint(path, size=(64, 48), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert("L" if mode == "I;16" else "RGB")
    image.convert(mode).save(path, **options)


def faults(name=NAME, workers=0):
    """(level, kind, where without folder) of what is not a note."""
    found = [f for f in check_dataset(name, workers) if f.level != "note"]
    return [(f.level, f.kind, os.path.basename(f.where)) for f in found]


def notes(name=NAME):
    """Counts by kind, and by class."""
    found = [f for f in check_dataset(name) if f.level == "note"]
    counts = {f.kind: f.count for f in found if f.kind != "class"}
    return counts, {f.where: f.count for f in found if f.kind == "class"}


class Coco:
    """A COCO data set of four images without a fault; tests change ``document`` before they register it."""

    def __init__(self, root):
        self.root = root
        images = [{"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 48} for i in (1, 2, 3, 4)]
        for image in images:
            paint(root / "images" / image["file_name"])
        thing = {"id": 11, "image_id": 1, "category_id": 3, "iscrowd": 0, "bbox": [10, 10, 20, 20]}
        thing |= {"segmentation": [SQUARE], "keypoints": [11, 12, 2, 0, 0, 0], "num_keypoints": 1}
        hidden = thing | {"id": 12, "keypoints": [0] * 6, "num_keypoints": 0}
        crowd = hidden | {"id": 13, "image_id": 2, "segmentation": RLE, "iscrowd": 1, "keypoints": []}
        dog = thing | {"id": 15, "image_id": 3, "category_id": 7}
        annotations = [thing, hidden, crowd, crowd | {"id": 14, "image_id": 3}, dog]
        categories = [{"id": 3, "name": "person"}, {"id": 7, "name": "dog"}]
        self.document = {"images": images, "annotations": annotations, "categories": categories}
        self.first = thing

    def register(self):
        (self.root / "a.json").write_text(json.dumps(self.document))
        keypoints = {"keypoint_names": ["head", "foot"]}
        register_coco_instances(NAME, keypoints, str(self.root / "a.json"), str(self.root / "images"))


@pytest.fixture
def coco(tmp_path):
    return Coco(tmp_path)


def test_counts(coco):
    coco.register()
    assert faults() == []
    counts = {"images": 4, "instances": 5, "crowds": 2, "with-visible-keypoints": 2}
    counts |= {"images-without-annotations": 1, "images-with-crowds-only": 1}
    assert notes() == (counts, {"person": 2, "dog": 1})


FAULTS = [
    ("warning", "zero-size-box", "bbox", [[10, 10, 0, 20], [10, 10, 20, -1]]),
    ("warning", "box-outside", "bbox", [[50, 10, 20, 20], [-5, 10, 20, 20], [10, 100, 20, 20]]),
    ("error", "malformed", "bbox", [None, [], [1, 2, 3], [1, 2, 3, "4"], [1, 2, float("nan"), 4]]),
    ("error", "malformed", "ignore", [1]),
    ("error", "unknown-category", "category_id", [1]),
    ("warning", "short-polygon", "segmentation", [[[1, 2, 3, 4]], [SQUARE, SQUARE[:7]]]),
    ("warning", "polygon-outside", "segmentation", [[SQUARE, [60, 1, 70, 1, 70, 9]]]),
    ("warning", "no-mask", "segmentation", [[], None]),
    ("error", "malformed", "segmentation", ["abc", {"size": [48, 64]}]),
    ("error", "rle-size", "segmentation", [TURNED, RLE | {"counts": [100, 200]}]),
    ("error", "rle-size", "segmentation", [RLE | {"counts": text} for text in ("zzz", "oooo0")]),
    ("error", "keypoints-length", "keypoints", [[], [1, 2, 2], [1, 2, 2] * 3]),
    ("warning", "num-keypoints", "num_keypoints", [0, 2]),
    (None, "rounding", "bbox", [[-0.9, -0.5, 65.8, 49.4]]),
    (None, "rounding", "segmentation", [[[-0.9, 5, 64.9, 5, 64.9, 48.5]]]),
    (None, "compression", "segmentation", [RLE | {"counts": COMPRESSED["counts"].decode()}]),
]


@pytest.mark.parametrize("level, kind, key, value", [(*f[:3], value) for f in FAULTS for value in f[3]])
def test_a_fault_of_one_annotation(coco, level, kind, key, value):
    coco.first[key] = value
    coco.register()
    assert faults() == ([(level, kind, "1.jpg, annotation 11")] if level else [])


def test_boxes_alone_are_no_fault(coco):
    for annotation in coco.document["annotations"]:
        annotation["segmentation"] = RLE if annotation["iscrowd"] else []
    coco.first["bbox"] = None
    coco.register()
    assert faults() == [("error", "malformed", "1.jpg, annotation 11")]


def _copy(document, kind, **change):
    document[kind].append(document[kind][0] | change)


@pytest.mark.parametrize(
    "make, kind, where",
    [
        (lambda d: _copy(d, "images", file_name="2.jpg"), "duplicate-image", "a.json, image 1"),
        (lambda d: _copy(d, "annotations", image_id=3), "duplicate-annotation", "a.json, annotation 11"),
        (lambda d: _copy(d, "annotations", id=16, image_id=9), "unknown-image", "a.json, annotation 16"),
        (lambda d: _copy(d, "categories"), "classes", "a.json"),
        (lambda d: d["images"].append({"id": 9}), "malformed", "a.json, entry 5 of images"),
        (lambda d: d["annotations"].append({"id": 9}), "malformed", "a.json, entry 6 of annotations"),
        (lambda d: d.pop("images"), "annotation-file", "a.json"),
        (lambda d: d.update(images=[], annotations=[]), "no-images", NAME),
    ],
)
def test_a_fault_of_the_file(coco, make, kind, where):
    make(coco.document)
    coco.register()
    assert faults() == [("warning" if kind == "unknown-image" else "error", kind, where)]


def test_files_of_other_classes_or_no_json(coco):
    coco.register()
    MetadataCatalog.get(NAME).thing_classes = ["person", "cat"]
    assert faults() == [("error", "classes", "a.json")]
    (coco.root / "a.json").write_text(json.dumps(coco.document)[:-9])
    assert faults() == [("error", "annotation-file", "a.json")]


def test_what_detectron2_makes_of_errors_and_warnings(coco):
    """The levels are about its loader and mapper: it refuses the one and leaves out the other."""
    coco.document["annotations"] = [a for a in coco.document["annotations"] if not a["iscrowd"]]
    good, _, other = coco.document["annotations"]
    mapper = DatasetMapper(True, augmentations=[], image_format="BGR", use_instance_mask=True)
    warnings = [{"bbox": [10, 10, 0, 20]}, {"segmentation": [[1, 2, 3, 4]]}]
    errors = [{"bbox": [1, 2, 3]}, {"category_id": 1}, {"segmentation": TURNED}, {"ignore": 1}]
    for change in warnings + errors:
        coco.document["annotations"] = [good | change, other]
        coco.register()
        assert [f[0] for f in faults()] == ["warning" if change in warnings else "error"]
        if change in warnings:
            assert [len(mapper(r)["instances"]) for r in DatasetCatalog.get(NAME)] == [0, 0, 1, 0]
        else:
            with pytest.raises((AssertionError, KeyError, ValueError)):
                [mapper(record) for record in DatasetCatalog.get(NAME)]
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)


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
    paint(coco.root / "images/2.jpg", mode=mode, format="tiff")
    with Image.open(coco.root / "images/2.jpg") as image:
        assert image.mode == mode
    coco.register()
    assert faults() == []


def write_voc(root, image_id, box=BOX, name="cat", difficult=0, split="train"):
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
    boxes = {"whole": (1, 1, 64, 48), "counted_from_0": (0, 0, 63, 47), "thin": (11, 12, 12, 40)}
    boxes |= {"flat": (11, 12, 11, 40), "beyond": (11, 12, 80, 40), "words": ("a", 2, 3, 4)}
    for image_id in ("good", "good", "absent", "cut", "unannotated", *boxes):
        write_voc(tmp_path, image_id, boxes.get(image_id, BOX), difficult=int(image_id == "good"))
    write_voc(tmp_path, "unicorn", name="unicorn")
    (tmp_path / "JPEGImages/absent.jpg").unlink()
    (tmp_path / "Annotations/unannotated.xml").unlink()
    _truncate(tmp_path / "JPEGImages/cut.jpg")
    register_voc(NAME, [(tmp_path, "train", 2012)])
    assert faults() == [
        ("error", "duplicate-image", "good.xml"),
        ("error", "annotation-file", "unannotated.xml"),
        ("error", "annotation-file", "words.xml"),
        ("error", "missing-image", "absent.jpg"),
        ("error", "unreadable-image", "cut.jpg"),
        ("error", "unknown-category", "unicorn.jpg, annotation 1"),
        ("warning", "zero-size-box", "flat.jpg, annotation 1"),
        ("warning", "box-outside", "beyond.jpg, annotation 1"),
    ]
    assert notes()[0].items() >= {"images": 11, "instances": 9, "difficult": 1}.items()


def test_a_union_of_voc_folders(tmp_path):
    for folder in "ab":
        write_voc(tmp_path / folder, "1")
    (tmp_path / "b/ImageSets/Main/val.txt").write_text("\n")
    parts = ("a", "train"), ("b", "train"), ("b", "val")
    register_voc(NAME, [(tmp_path / folder, split, 2012) for folder, split in parts])
    assert faults() == [("error", "annotation-file", "val.txt")] and notes()[0]["images"] == 2


def test_an_image_folder(tmp_path):
    for file in ("a/1.png", "a/2.png", "b/3.png"):
        paint(tmp_path / file)
    _truncate(tmp_path / "a/2.png")
    register_image_folder(NAME, str(tmp_path))
    assert faults() == [("error", "unreadable-image", "2.png")]
    assert notes() == ({"images": 3}, {"a": 2, "b": 1})
    (tmp_path / "empty").mkdir()
    (finding,) = check_dataset(NAME)
    assert finding.kind == "loader" and "empty has no images" in finding.message


@pytest.mark.parametrize(
    "change, fault",
    [
        ({"bbox": [5, 5, 5, 9]}, ("warning", "zero-size-box")),
        ({"category_id": 2}, ("error", "unknown-category")),
        ({"segmentation": [[1, 2, 3, 4]]}, ("error", "short-polygon")),
        ({"segmentation": RLE}, ("error", "malformed")),
        ({"segmentation": COMPRESSED | {"size": [64, 48]}}, ("error", "rle-size")),
        ({"segmentation": COMPRESSED}, None),
        ({"segmentation": [np.array(SQUARE)]}, None),
    ],
)
def test_records_of_ones_own(tmp_path, change, fault):
    paint(tmp_path / "1.png")
    annotation = {"bbox": [5, 5, 20, 20], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1} | change
    # Without height and width, which Detectron2 then takes from the image.
    DatasetCatalog.register(NAME, lambda: [{"file_name": tmp_path / "1.png", "annotations": [annotation]}])
    MetadataCatalog.get(NAME).thing_classes = ["a", "b"]
    assert faults() == ([(*fault, "1.png, annotation 1")] if fault else [])


def test_records_with_the_same_id_or_without_a_file(tmp_path):
    paint(tmp_path / "1.png")
    record = {"file_name": str(tmp_path / "1.png"), "image_id": 5, "annotations": []}
    DatasetCatalog.register(NAME, lambda: [record, dict(record), {"image_id": 6}])
    assert faults() == [("error", "duplicate-image", "1.png"), ("error", "malformed", f"{NAME}, record 3")]


def test_a_subset_is_what_is_checked(coco, glyph_cache):
    paint(coco.root / "images/2.jpg", (65, 48))
    coco.register()
    for size in (2, 3):
        register_subset(f"{NAME}_{size}", NAME, size)  # of the images with a labelled person, 1 and 3
    assert faults() == [("error", "image-size", "2.jpg")]
    assert faults(f"{NAME}_2") == [] and notes(f"{NAME}_2")[0]["images"] == 2
    (finding,) = check_dataset(f"{NAME}_3")
    assert finding.kind == "annotation-file" and "3 images asked for, but there are 2" in finding.message


@pytest.mark.parametrize(
    "name, counts",
    [
        ("coco_2017_train", {"images": 80, "instances": 739, "crowds": 8}),
        ("keypoints_coco_2017_val", {"with-visible-keypoints": 68, "images-without-annotations": 40}),
        ("voc_2012_val", {"images": 5, "instances": 11, "difficult": 0}),
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
    found = [(level, where.split(".")[0]) for level, kind, where in faults() if kind == "zero-size-box"]
    assert found == [("warning", "BloodImage_00338"), ("warning", "BloodImage_00343")]


def test_built_in_data_is_made_and_clean(tmp_path):
    before = glyphs._ROOTS["glyphs_val"]
    glyphs.register(tmp_path)
    try:
        assert faults("glyphs_tiny_train") == [] == faults("glyphs_keypoints_tiny_train")
        counts, _ = notes("glyphs_keypoints_tiny_train")
        assert counts["images"] == 32 and counts["with-visible-keypoints"] == counts["instances"] > 32
    finally:
        glyphs.register(before)


@pytest.mark.parametrize("more, shown", [([], 10), (["--all"], 20)])
def test_text_has_ten_examples_of_a_kind_unless_asked_for_all(coco, capsys, more, shown):
    coco.document["annotations"] = [coco.first | {"id": i, "bbox": [1, 1, 0, 5]} for i in range(20)]
    coco.register()
    assert cli([NAME, "--workers", "0", *more]) == 0  # warnings
    text = capsys.readouterr().out
    assert text.count("left out") == shown and ("and 10 more (--all)" in text) == (not more)


def test_json_holds_everything(coco, capsys):
    coco.first["category_id"] = 5
    coco.register()
    assert cli([NAME, "--json", "--workers", "0"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found == {NAME: [dataclasses.asdict(finding) for finding in check_dataset(NAME)]}
    assert "5 is not one of 2" in found[NAME][0]["message"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["coco_2017_trian"], "coco_2017_trian is not registered; did you mean coco_2017_train?"),
        ([NAME], f"{NAME} is not on this machine: tried /nowhere/a.json, /nowhere/images"),
        ([NAME, "--workers", "-1"], "--workers must not be negative"),
    ],
)
def test_wrong_usage(capsys, arguments, words):
    register_coco_instances(NAME, {}, "/nowhere/a.json", "/nowhere/images")
    with pytest.raises(SystemExit) as error:
        cli(arguments)
    assert error.value.code == 2 and words in capsys.readouterr().err


def test_an_interruption_leaves_no_processes(coco):
    class Interrupt(dict):
        def get(self, *_):
            assert multiprocessing.active_children()
            raise KeyboardInterrupt

    records = [{"file_name": str(coco.root / "images/1.jpg"), "annotations": [Interrupt()]}] * 50
    DatasetCatalog.register(NAME, lambda: records)
    assert cli([NAME, "--workers", "2"]) == 130 and multiprocessing.active_children() == []


def test_the_program_exits_with_1_on_a_broken_set(tmp_path):
    for image_id in ("1", "2"):
        write_voc(tmp_path / "VOC2012", image_id, split="val")
    _truncate(tmp_path / "VOC2012/JPEGImages/2.jpg")
    command = [sys.executable, "-m", "rethink_d2.data.check", "voc_2012_val", "--workers", "1"]
    env = os.environ | {"DETECTRON2_DATASETS": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "2.jpg: OSError: image file is truncated" in done.stdout
