"""The built-in data: drawn alike everywhere, annotated truly, and cached whole or not at all."""

import contextlib
import dataclasses
import errno
import hashlib
import io
import itertools
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from PIL import Image
from pycocotools.coco import COCO

from rethink_d2.data import _glyph_render as render
from rethink_d2.data import glyphs

REPO = Path(__file__).resolve().parents[2]
FONTS = list(render.PARAMS["fonts"])


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache that the names are registered with for one test."""
    before = next(iter(glyphs._ROOTS.values()))
    root = tmp_path / "cache"
    monkeypatch.setenv(glyphs.CACHE_ENV, str(root))
    for name in ("classify_train", "classify_val"):
        few = dataclasses.replace(glyphs._SPLITS[name], count=50)
        monkeypatch.setitem(glyphs._SPLITS, name, few)
    glyphs.register()
    yield root
    glyphs.register(before)


def contents(folder):
    """Relative path -> digest of all files of a folder."""
    files = [p for p in sorted(Path(folder).rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def leftovers(root):
    """What is in the cache apart from empty lock files."""
    return [p for p in root.rglob("*") if p.is_file() and p.suffix != ".lock"]


def rasterize(polygons, height, width):
    flat = [np.asarray(p).reshape(-1).tolist() for p in polygons]
    return mask_util.decode(mask_util.merge(mask_util.frPyObjects(flat, height, width))).astype(bool)


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


# ---------------------------------------------------------------- what is drawn


def test_same_bytes_twice_and_for_any_number_of_workers(cache, tmp_path):
    first = contents(Path(glyphs.ensure("glyphs_tiny_val")).parent)
    glyphs.register(tmp_path / "other")
    assert contents(Path(glyphs.ensure("glyphs_tiny_val")).parent) == first
    glyphs.register(tmp_path / "third")
    assert contents(Path(glyphs.ensure("glyphs_tiny_val", workers=2)).parent) == first


def test_pictures_depend_on_split_and_index_alone():
    late_first = [render.render_scene("train", i)[0] for i in (5, 0)]
    assert np.array_equal(render.render_scene("train", 0)[0], late_first[1])
    assert not np.array_equal(
        render.render_single("classify_train", 0)[0], render.render_single("classify_val", 0)[0]
    )


def test_subset_is_the_first_pictures_of_train():
    spec = glyphs._SPLITS["train_100"]
    assert (spec.stream, spec.count) == (glyphs._SPLITS["train"].stream, 100)


def test_coco_json_agrees_with_the_pictures(cache):
    json_file = Path(glyphs.ensure("glyphs_keypoints_tiny_train"))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(json_file))
    assert [coco.cats[i + 1]["name"] for i in range(20)] == list(glyphs.DETECTION_CLASSES)
    assert len(coco.imgs) == 32
    low, high = render.PARAMS["side"]
    for image_id, record in coco.imgs.items():
        with Image.open(json_file.parent / "images" / record["file_name"]) as image:
            assert image.format == "JPEG"
            assert image.size == (record["width"], record["height"])
            assert low <= min(image.size) <= max(image.size) <= high
        annotations = coco.imgToAnns[image_id]
        assert 2 <= len(annotations) <= 6
        masks = np.stack([coco.annToMask(a).astype(bool) for a in annotations])
        assert (masks.sum(0) <= 1).mean() > 0.998
        for a, mask in zip(annotations, masks, strict=True):
            x, y, w, h = a["bbox"]
            assert x >= 0 and y >= 0 and x + w <= record["width"] and y + h <= record["height"]
            assert mask.sum() == pytest.approx(a["area"], rel=0.15)
            ys, xs = np.nonzero(mask)
            edges = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            # A pointed corner of a turned letter may miss the centre of its outermost pixel.
            assert edges == pytest.approx((x, y, x + w, y + h), abs=1.5)


def test_both_orientations_occur():
    shapes = [render.render_scene("train", i)[0].shape for i in range(12)]
    assert {h > w for h, w, _ in shapes} == {True, False}


def test_masks_agree_with_what_is_painted():
    scores = []
    for index in range(60):
        image, letters = render.render_scene("train", index)
        for letter in letters:
            scores.append(iou(rasterize(letter["polygons"], *image.shape[:2]), letter["mask"]))
    assert np.mean(scores) > 0.95
    # The rest is how strokes of two or three pixels are rounded to whole pixels.
    assert min(scores) > 0.85


def test_letters_stand_out_from_what_is_around_them():
    for index in range(40):
        image, letters = render.render_scene("train", index)
        grey = np.asarray(Image.fromarray(image).convert("L"), float)
        around = ~np.any([x["mask"] for x in letters], axis=0)
        for letter in letters:
            ys, xs = np.nonzero(letter["mask"])
            box = (slice(ys.min(), ys.max() + 1), slice(xs.min(), xs.max() + 1))
            assert abs(grey[letter["mask"]].mean() - np.median(grey[box][around[box]])) > 40


@pytest.mark.parametrize("char", glyphs.DETECTION_CLASSES)
@pytest.mark.parametrize("font", FONTS)
def test_polygons_keep_holes(font, char):
    shape = render.glyph(font, char)
    rings, polygons = ([p * 100 + 64 for p in part] for part in (shape.rings, shape.polygons))
    assert len(polygons) == 1
    painted = render.coverage(rings, 128, 128) >= 0.5
    filled = rasterize(polygons, 128, 128)
    assert iou(painted, filled) > 0.9
    holes = {"A": 1, "B": 2, "D": 1, "P": 1, "Q": 1, "R": 1}.get(char, 0)
    assert len(rings) == 1 + holes
    for ring in rings[1:]:
        x, y = ring.mean(0)
        assert not filled[int(y), int(x)]


def test_no_class_is_the_mirror_image_of_another():
    def stretched(font, char):
        rings = render.glyph(font, char).rings
        points = np.concatenate(rings)
        low, extent = points.min(0), np.ptp(points, axis=0)
        return render.coverage([(r - low) / extent * 48 for r in rings], 48, 48) >= 0.5

    def worst(classes):
        masks = {(f, c): stretched(f, c) for f in FONTS for c in classes}
        pairs = itertools.permutations(classes, 2)
        return max(iou(masks[f, a], masks[f, b][:, ::-1]) for a, b in pairs for f in FONTS)

    assert worst(glyphs.DETECTION_CLASSES) < 0.75
    assert worst("bd") > 0.75  # the measure does find such a pair


def test_keypoints_are_within_their_boxes(cache):
    for record in DatasetCatalog.get("glyphs_keypoints_tiny_train"):
        for a in record["annotations"]:
            x, y, w, h = a["bbox"]
            points = np.array(a["keypoints"]).reshape(4, 3)
            assert (points[:, 2] == 2).all()
            assert (points[:, 0] >= x - 0.02).all() and (points[:, 0] <= x + w + 0.02).all()
            assert (points[:, 1] >= y - 0.02).all() and (points[:, 1] <= y + h + 0.02).all()


def test_keypoints_of_a_mirrored_letter_are_the_mirrored_keypoints():
    mask = np.zeros((40, 30), bool)
    mask[5:35, 4:8] = mask[5:9, 4:25] = mask[18:22, 4:17] = True  # an F
    points = render._edge_points(mask)
    mirrored = render._edge_points(mask[:, ::-1])[[0, 1, 3, 2]]
    assert np.allclose(mirrored, np.stack([29 - points[:, 0], points[:, 1]], 1))


def test_classification_characters_are_not_targets_of_detection():
    chars = list(glyphs.CLASSIFICATION_CLASSES.values())
    assert len(set(chars)) == len(chars) >= 24
    assert list(glyphs.CLASSIFICATION_CLASSES) == sorted(glyphs.CLASSIFICATION_CLASSES)
    normal = {unicodedata.normalize("NFKC", c).casefold() for c in chars}
    assert normal.isdisjoint(c.casefold() for c in glyphs.DETECTION_CLASSES)
    # No Greek capital that is drawn as a Latin one, either.
    drawn = {render.glyph(f, c).rings[0].tobytes() for f in FONTS for c in chars}
    assert drawn.isdisjoint(render.glyph(f, c).rings[0].tobytes() for f in FONTS for c in "ABDEHKMTXY")


# ---------------------------------------------------------------- registration


def test_instance_sets_load_without_keypoints(cache):
    records = DatasetCatalog.get("glyphs_tiny_val")
    metadata = MetadataCatalog.get("glyphs_tiny_val")
    assert len(records) == 16
    assert all("keypoints" not in a for r in records for a in r["annotations"])
    assert all(isinstance(a["segmentation"], list) for r in records for a in r["annotations"])
    assert metadata.evaluator_type == "coco"
    assert COCOEvaluator("glyphs_tiny_val", output_dir=None) is not None


def test_keypoint_metadata():
    metadata = MetadataCatalog.get("glyphs_keypoints_val")
    assert metadata.keypoint_names == ["top", "bottom", "left", "right"]
    assert metadata.keypoint_flip_map == [("left", "right")]
    assert len(glyphs.KEYPOINT_OKS_SIGMAS) == 4


def test_registering_generates_nothing_and_is_idempotent(cache):
    names = set(DatasetCatalog.list())
    glyphs.register()
    assert set(DatasetCatalog.list()) == names
    assert not cache.exists()
    parts = ["train", "val", "train_100", "tiny_train", "tiny_val", "keypoints_train", "keypoints_val"]
    assert {f"glyphs_{p}" for p in [*parts, "classify_train", "classify_val"]} <= names
    with pytest.raises(KeyError, match="glyphs_nope"):
        glyphs.ensure("glyphs_nope")


def test_classification_set_is_an_image_folder(cache):
    from torchvision.datasets import ImageFolder

    folder = ImageFolder(glyphs.classification_root("val"))
    records = DatasetCatalog.get("glyphs_classify_val")
    classes = MetadataCatalog.get("glyphs_classify_val").classes
    assert folder.classes == classes == list(glyphs.CLASSIFICATION_CLASSES)
    assert sorted(folder.samples) == sorted((r["file_name"], r["label"]) for r in records)
    assert len(records) == 50
    assert {(r["height"], r["width"]) for r in records} == {(64, 64)}
    with pytest.raises(ValueError, match="no split"):
        glyphs.classification_root("test")


# ---------------------------------------------------------------- the cache


@pytest.mark.parametrize("error", [RuntimeError("crash"), KeyboardInterrupt()])
def test_a_crash_leaves_nothing(cache, monkeypatch, error):
    real = glyphs._draw

    def crash(out, split, index):
        if index == 5:
            raise error
        return real(out, split, index)

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(glyphs, "_draw", crash)
        glyphs.ensure("glyphs_tiny_val")
    assert leftovers(cache) == []
    assert len(DatasetCatalog.get("glyphs_tiny_val")) == 16


def test_what_a_killed_process_left_is_swept_up(cache):
    folder = glyphs._split_dir(cache, "tiny_val")
    stale = folder.parent / ".tiny_val.tmp-abc"
    stale.mkdir(parents=True)
    (stale / "half.jpg").write_bytes(b"x")
    glyphs.ensure("glyphs_tiny_val")
    assert not stale.exists()


@pytest.mark.parametrize("damage", ["json", "missing", "cut", "manifest", "extra"])
def test_a_damaged_cache_is_generated_again(cache, damage):
    folder = Path(glyphs.ensure("glyphs_tiny_val")).parent
    good = contents(folder)
    picture = folder / "images" / "000003.jpg"
    if damage == "json":
        text = (folder / "instances.json").read_text()
        (folder / "instances.json").write_text(text.replace("1", "2", 1))
    elif damage == "missing":
        picture.unlink()
    elif damage == "cut":
        picture.write_bytes(picture.read_bytes()[:-100])
    elif damage == "manifest":
        (folder / "manifest.json").write_text("{")
    else:
        (folder / "images" / "stray.jpg").write_bytes(b"x")
    glyphs.ensure("glyphs_tiny_val")
    assert contents(folder) == good
    assert [p.name for p in folder.parent.iterdir() if p.name != ".tiny_val.lock"] == ["tiny_val"]


def test_a_good_cache_is_not_written_to(cache, monkeypatch):
    glyphs.ensure("glyphs_tiny_val")
    monkeypatch.setattr(glyphs, "_write", None)
    monkeypatch.setattr(glyphs, "FileLock", None)
    glyphs.ensure("glyphs_keypoints_tiny_val")


def test_concurrent_processes_make_one_cache(cache):
    code = (
        "import logging; logging.basicConfig(level=logging.INFO)\n"
        "from rethink_d2.data import glyphs; glyphs.ensure('glyphs_tiny_train')"
    )
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    both = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    logs = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], logs
    assert "".join(logs).count("Generating 32 images") == 1
    folder = glyphs._split_dir(cache, "tiny_train")
    assert glyphs._is_good(folder, glyphs._SPLITS["tiny_train"])
    assert [p.name for p in folder.parent.iterdir() if not p.name.endswith(".lock")] == ["tiny_train"]


def test_a_root_that_cannot_be_written_names_the_variable(cache):
    cache.write_text("not a folder")
    with pytest.raises(glyphs.GlyphCacheError, match="RETHINK_D2_CACHE"):
        DatasetCatalog.get("glyphs_tiny_val")


def test_a_full_disk_names_the_variable_and_leaves_nothing(cache, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:  # undone before the names are registered anew
        patch.setattr(glyphs.json, "dumps", full)
        patch.setattr(glyphs, "_version_folder", lambda: "glyphs_test")
        with pytest.raises(glyphs.GlyphCacheError, match="No space left.*RETHINK_D2_CACHE"):
            glyphs.ensure("glyphs_tiny_val")
    assert leftovers(cache) == []


def test_cache_root_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv(glyphs.CACHE_ENV, str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert glyphs.cache_root() == tmp_path / "own"
    monkeypatch.delenv(glyphs.CACHE_ENV)
    assert glyphs.cache_root() == tmp_path / "xdg" / "rethink_d2"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert glyphs.cache_root() == tmp_path / ".cache" / "rethink_d2"
    monkeypatch.setenv("HOME", str(tmp_path / "absent"))
    monkeypatch.setattr(glyphs.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    assert glyphs.cache_root().parent == tmp_path / "tmp"


def test_the_folder_is_named_by_the_parameters(monkeypatch):
    name = glyphs._version_folder()
    assert name.startswith("glyphs_v1_")
    monkeypatch.setitem(render.PARAMS, "rotation", 10.0)
    assert glyphs._version_folder() != name
    assert json.dumps(render.PARAMS)
