import dataclasses
import os

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rethink_d2 import model_zoo, recipe
from rethink_d2.data import glyphs
from rethink_d2.data.classification import (
    CenterCrop,
    ClassificationMapper,
    RandomResizedCrop,
    class_names,
    load_image_folder,
    register_image_folder,
)
from rethink_d2.data.files import missing_files
from rethink_d2.data.loader import build_train_loader, training_records
from rethink_d2.data.mapper import build_mapper


def paint(path, size=(20, 12), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    # What the name says is not what the file holds, as in a few of ImageNet's.
    Image.fromarray(pixels).convert(mode).save(path, format="png")
    return str(path)


@pytest.fixture
def root(tmp_path):
    """Two classes of images, greyscale in b, and files that are none."""
    for name, mode in (("b/2.JPEG", "L"), ("b/10.jpg", "L"), ("a/x.PNG", "RGB"), ("a/._x.PNG", "RGB")):
        paint(tmp_path / "set" / name, mode=mode)
    for name in ("a/notes.txt", "README", ".DS_Store"):
        (tmp_path / "set" / name).write_text("")
    return tmp_path / "set"


@pytest.fixture
def registered(root):
    register_image_folder("test_folder", str(root))
    yield "test_folder"
    DatasetCatalog.remove("test_folder")
    MetadataCatalog.remove("test_folder")


def config(*options):
    cfg = recipe.load(model_zoo.get_config_file("mini/imagenet_R_18_FPN_gn.yaml"), [])
    cfg.merge_from_list(["MODEL.CLASSIFIER.NUM_CLASSES", 2, "INPUT.CLASSIFICATION.CROP_SIZE", 8, *options])
    return cfg


def test_classes_and_files_are_sorted(root):
    records = load_image_folder(str(root))
    names = [os.path.relpath(r["file_name"], root) for r in records]
    assert names == ["a/x.PNG", "b/10.jpg", "b/2.JPEG"]
    assert [(r["label"], r["image_id"]) for r in records] == [(0, 0), (1, 1), (1, 2)]
    chosen = load_image_folder(str(root), ["b", "a"])
    assert [r["label"] for r in chosen] == [0, 0, 1]


def test_a_wrong_folder_is_named(root):
    (root / "c").mkdir()
    for folder, classes, words in (
        (root, None, [f"{root}/c has no images", ".jpeg"]),
        (root, ["a", "d"], [f"{root}/d is not a folder"]),
        (root, ["README"], [f"{root}/README is not a folder"]),
        (root / "none", None, [f"{root}/none is not a folder", "<class>/<image>"]),
        (root / "a", None, [f"{root}/a has no class folders"]),
    ):
        with pytest.raises(ValueError) as e:
            load_image_folder(str(folder), classes)
        assert all(word in str(e.value) for word in words), str(e.value)


def test_nothing_is_read_before_use(tmp_path):
    folder = str(tmp_path / "later")
    for name, classes in (("test_later", None), ("test_named", ["b", "a"])):
        register_image_folder(name, folder, classes)
    try:
        assert missing_files("test_later") == [folder]
        assert class_names("test_named") == ["b", "a"]
        for name in ("a/1.png", "b/1.png"):
            paint(tmp_path / "later" / name)
        assert missing_files("test_later") == [] and class_names("test_later") == ["a", "b"]
        labels = [[r["label"] for r in DatasetCatalog.get(n)] for n in ("test_later", "test_named")]
        assert labels == [[0, 1], [0, 1]]
        assert MetadataCatalog.get("test_later").evaluator_type == "classification"
    finally:
        for name in ("test_later", "test_named"):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def test_imagenet_is_where_detectron2_keeps_data():
    base = os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    for split in ("train", "val"):
        assert MetadataCatalog.get(f"imagenet_{split}").image_root == os.path.join(base, "imagenet", split)


def test_samples_of_a_training_run(registered):
    cfg = config("SOLVER.IMS_PER_GROUP", 4, "DATASETS.TRAIN", (registered,))
    records = training_records(cfg)
    groups = iter(build_train_loader(cfg, records))
    group = [sample for _ in range(3) for sample in next(groups)]
    assert {(s["image_id"], s["label"], s["greyscale"]) for s in group} == {
        (0, 0, False),
        (1, 1, True),
        (2, 1, True),
    }
    assert {tuple(s["image"].shape) for s in group} == {(3, 8, 8)}
    assert len(group) == 12 and all(str(s["image"].dtype) == "torch.uint8" for s in group)


def test_samples_of_an_evaluation(registered):
    cfg = config("INPUT.MIN_SIZE_TEST", 12)
    loader = build_detection_test_loader(cfg, registered, mapper=build_mapper(cfg, False))
    batches = list(loader)
    assert [batch[0]["label"] for batch in batches] == [0, 1, 1]
    with Image.open(batches[0][0]["file_name"]) as image:
        rgb = np.asarray(image)  # 20 x 12, so the shorter side is 12 already
    bgr = batches[0][0]["image"].permute(1, 2, 0).numpy()
    assert np.array_equal(bgr, rgb[2:10, 6:14, ::-1])


def test_the_shorter_side_is_resized(registered):
    cfg = config("INPUT.MIN_SIZE_TEST", 24, "INPUT.CLASSIFICATION.CROP_SIZE", 24)
    sample = ClassificationMapper(cfg, False)(DatasetCatalog.get(registered)[0])
    with Image.open(sample["file_name"]) as image:
        large = np.asarray(image.resize((40, 24), Image.BILINEAR))
    assert np.array_equal(sample["image"].permute(1, 2, 0).numpy(), large[:, 8:32, ::-1])


@pytest.mark.parametrize(("flip", "expected"), [("none", {"as is"}), ("horizontal", {"as is", "mirrored"})])
def test_letters_are_not_flipped(tmp_path, flip, expected):
    cfg = config("INPUT.RANDOM_FLIP", flip, "INPUT.CLASSIFICATION.RELATIVE_AREA", (1.0, 1.0))
    mapper = ClassificationMapper(cfg, True)
    record = {"file_name": paint(tmp_path / "a.png", (8, 8)), "label": 0}
    with Image.open(record["file_name"]) as image:
        bgr = np.asarray(image)[:, :, ::-1]
    known = {bgr.tobytes(): "as is", bgr[:, ::-1].tobytes(): "mirrored"}
    seen = {known.get(mapper(record)["image"].permute(1, 2, 0).numpy().tobytes()) for _ in range(60)}
    assert expected <= seen <= expected | {None}, "None: a crop that is not the whole"


def test_numpys_seed_decides_on_the_crop(tmp_path):
    mapper = ClassificationMapper(config(), True)
    record = {"file_name": paint(tmp_path / "a.png", (40, 30)), "label": 0}
    images = []
    for seed in (1, 1, 2):
        np.random.seed(seed)
        images.append(mapper(record)["image"])
    assert images[0].equal(images[1]) and not images[0].equal(images[2])


@settings(deadline=None, max_examples=100)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)).map(sorted),
    st.integers(0, 2**32 - 1),
)
def test_crops_keep_to_area_and_aspect(height, width, area, seed):
    np.random.seed(seed)
    crop, resize = RandomResizedCrop(8, area).get_transform(np.zeros((height, width, 3), np.uint8)).transforms
    assert 0 <= crop.x0 <= width - crop.w and 0 <= crop.y0 <= height - crop.h
    assert (resize.h, resize.w, resize.new_h, resize.new_w) == (crop.h, crop.w, 8, 8)
    # Sides are rounded to pixels: what they can have been before.
    assert (crop.w - 0.5) / (crop.h + 0.5) <= 4 / 3 and (crop.w + 0.5) / (crop.h - 0.5) >= 3 / 4
    largest = crop.w == width or crop.h == height  # may be the central part, taken when no draw fits
    assert largest or (crop.w + 0.5) * (crop.h + 0.5) >= area[0] * height * width
    assert (crop.w - 0.5) * (crop.h - 0.5) <= area[1] * height * width or largest


def test_crops_fill_their_range():
    np.random.seed(0)
    image, augmentation = np.zeros((100, 100, 3), np.uint8), RandomResizedCrop(8, (0.1, 0.9))
    crops = [augmentation.get_transform(image).transforms[0] for _ in range(400)]
    areas = [crop.w * crop.h / 1e4 for crop in crops]
    ratios = [crop.w / crop.h for crop in crops]
    assert min(areas) < 0.15 and max(areas) > 0.8
    assert min(ratios) < 0.8 and max(ratios) > 1.25
    # Uniform over all places: corners are reached, and the mean is in the middle.
    assert min(crop.x0 for crop in crops) == 0 and max(crop.x0 + crop.w for crop in crops) == 100
    assert np.mean([crop.x0 + crop.w / 2 for crop in crops]) == pytest.approx(50, abs=3)


def test_wrong_sizes_name_their_key():
    with pytest.raises(ValueError, match="INPUT.CLASSIFICATION.RELATIVE_AREA"):
        ClassificationMapper(config("INPUT.CLASSIFICATION.RELATIVE_AREA", (0.0, 1.0)), True)
    with pytest.raises(ValueError, match=r"CROP_SIZE 9 does not fit .* 20x8 .*INPUT.MIN_SIZE_TEST"):
        CenterCrop(9).get_transform(np.zeros((8, 20, 3)))


def test_a_bad_file_or_label_is_named(tmp_path):
    mapper = ClassificationMapper(config(), True)
    path = tmp_path / "a.JPEG"
    path.write_text("no image")
    with pytest.raises(ValueError, match=f"{path} cannot be read"):
        mapper({"file_name": str(path), "label": 0})
    paint(path)
    path.write_bytes(path.read_bytes()[:200])  # a header only
    with pytest.raises(ValueError, match=f"{path} cannot be read"):
        mapper({"file_name": str(path), "label": 0})
    with pytest.raises(ValueError, match=r"label 2, but MODEL.CLASSIFIER.NUM_CLASSES is 2"):
        mapper({"file_name": str(path), "label": 2})


def test_built_in_characters_are_records_like_any(tmp_path, monkeypatch):
    before = glyphs._ROOTS["glyphs_classify_val"]
    monkeypatch.setitem(
        glyphs._SPLITS, "classify_val", dataclasses.replace(glyphs._SPLITS["classify_val"], count=4)
    )
    glyphs.register(tmp_path)
    try:
        records = DatasetCatalog.get("glyphs_classify_val")
        names = class_names("glyphs_classify_val")
        assert [names[r["label"]] for r in records] == [r["file_name"].split("/")[-2] for r in records]
        assert MetadataCatalog.get("glyphs_classify_val").evaluator_type == "classification"
    finally:
        glyphs.register(before)
