import copy
import io

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import transforms as T
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BitMasks, Boxes, BoxMode, Keypoints, PolygonMasks
from fvcore.transforms.transform import HFlipTransform
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as mask_util
from torch.utils.data import DataLoader

from rethink_d2.config import add_rethink_config
from rethink_d2.data.fast_mapper import FastMapper
from rethink_d2.data.mapper import CountingMapper, build_mapper

WIDTH, HEIGHT = 23, 16
NO_RESIZE = ["INPUT.MIN_SIZE_TRAIN", (0,)]


def config(*options):
    cfg = get_cfg()
    add_rethink_config(cfg)
    cfg.MODEL.MASK_ON = True
    cfg.merge_from_list(options)
    return cfg


def mappers(*options, is_train=True):
    cfg = config(*options)
    return FastMapper(cfg, is_train), CountingMapper(cfg, is_train)


def both(mappers, record, seed=0):
    """The samples of both mappers for one seed; both must have drawn the same random numbers."""
    samples, states = [], []
    for mapper in mappers:
        np.random.seed(seed)
        samples.append(mapper(record))
        states.append(np.random.random())
    assert states[0] == states[1]
    return samples


def assert_same(fast, stock, pixels=0):
    """Equal in all but pixels, which may differ by `pixels` grey levels on average."""
    assert set(fast) == set(stock)
    assert fast["image"].is_contiguous() and fast["image"].dtype == stock["image"].dtype
    assert fast["image"].shape == stock["image"].shape
    assert (fast["image"].float() - stock["image"].float()).abs().mean() <= pixels
    for name in set(stock) - {"image", "instances", "sem_seg", "proposals"}:
        assert fast[name] == stock[name], name
    for name in ("instances", "proposals"):
        if name in stock:
            assert fast[name].image_size == stock[name].image_size
            ours, theirs = fast[name].get_fields(), stock[name].get_fields()
            assert set(ours) == set(theirs)
            for field, value in theirs.items():
                assert_same_field(ours[field], value)


def assert_same_field(ours, theirs):
    if isinstance(theirs, PolygonMasks):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert len(mine) == len(other)
            assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(mine, other, strict=True))
    else:
        if isinstance(theirs, (Boxes, Keypoints, BitMasks)):
            assert type(ours) is type(theirs)
            ours, theirs = ours.tensor, theirs.tensor
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def coco_records(root, kind):
    """Some genuine images with objects."""
    path = root / f"coco/annotations/{kind}_val2017.json"
    records = load_coco_json(str(path), str(root / "coco/val2017"))
    return [r for r in records if any(not a["iscrowd"] for a in r["annotations"])][:6]


KEYPOINTS = ["MODEL.MASK_ON", False, "MODEL.KEYPOINT_ON", True]
KEYPOINTS += ["DATASETS.TRAIN", ("keypoints_coco_2017_train",)]


@pytest.mark.parametrize(
    "kind, options",
    [
        ("instances", ["INPUT.MIN_SIZE_TRAIN", (800,)]),
        ("instances", ["INPUT.MIN_SIZE_TRAIN", (240,)]),
        (
            "instances",
            ["INPUT.FORMAT", "RGB", "INPUT.MASK_FORMAT", "bitmask", "INPUT.MIN_SIZE_TRAIN", (300,)],
        ),
        ("instances", ["MODEL.MASK_ON", False, "INPUT.RANDOM_FLIP", "vertical"]),
        ("instances", ["MODEL.MASK_ON", False, "INPUT.CROP.ENABLED", True]),
        ("person_keypoints", KEYPOINTS),
        (
            "person_keypoints",
            [*KEYPOINTS, "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.MIN_SIZE_TRAIN", (650, 800)],
        ),
    ],
)
def test_genuine_samples_are_the_stock_mappers(real_data, kind, options):
    pair = mappers(*options)
    for seed, record in enumerate(coco_records(real_data, kind)):
        before = copy.deepcopy(record)
        fast, stock = both(pair, record, seed)
        assert_same(fast, stock, pixels=1)
        assert record == before


def test_genuine_samples_without_training(real_data):
    pair = mappers("INPUT.MIN_SIZE_TEST", 800, is_train=False)
    for record in coco_records(real_data, "instances")[:4]:
        fast, stock = both(pair, record)
        assert_same(fast, stock, pixels=1)
        assert "annotations" not in fast and "instances" not in fast


@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
@pytest.mark.parametrize("flip", ["horizontal", "vertical"])
def test_pixels_are_equal_without_resizing(real_data, image_format, flip):
    pair = mappers(*NO_RESIZE, "INPUT.FORMAT", image_format, "INPUT.RANDOM_FLIP", flip)
    for record in coco_records(real_data, "instances")[:4]:
        for seed in (0, 1):  # one flips, one does not
            assert_same(*both(pair, record, seed))


def noise(*shape, high=256, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, high, shape).astype(dtype)


def colour():
    return Image.fromarray(cv2.resize(noise(4, 4, 3), (WIDTH, HEIGHT)))


def save(image, path, kind="JPEG", **options):
    image.save(path, kind, **options)
    return {"file_name": str(path), "image_id": 5}


@pytest.fixture(scope="module")
def colour_record(tmp_path_factory):
    return save(colour(), tmp_path_factory.mktemp("images") / "colour.jpg", quality=95)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return {"exif": tags}


XMP = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/">
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>"""

FILES = {
    **{f"EXIF {i}": (lambda: colour(), "JPEG", exif(i)) for i in range(10)},
    "XMP": (lambda: colour(), "JPEG", {"xmp": XMP}),
    "damaged EXIF": (lambda: colour(), "JPEG", {"exif": b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(9)}),
    "progressive": (lambda: colour(), "JPEG", {"progressive": True}),
    "RGB within": (lambda: colour(), "JPEG", {"keep_rgb": True}),
    "grey JPEG": (lambda: colour().convert("L"), "JPEG", {}),
    "CMYK": (lambda: colour().convert("CMYK"), "JPEG", {}),
    "PNG": (lambda: colour(), "PNG", {}),
    "transparent PNG": (lambda: Image.fromarray(noise(HEIGHT, WIDTH, 4)), "PNG", {}),
    "palette PNG": (lambda: colour().convert("P"), "PNG", {}),
    "grey PNG": (lambda: colour().convert("LA"), "PNG", {}),
    "1-bit PNG": (lambda: colour().convert("1"), "PNG", {}),
    "16-bit PNG": (lambda: Image.fromarray(noise(HEIGHT, WIDTH, high=999, dtype=np.uint16)), "PNG", {}),
    "two pixels": (lambda: colour().crop((3, 3, 5, 4)), "JPEG", {}),
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_read_as_detectron2_reads_them(tmp_path, name):
    make, kind, options = FILES[name]
    record = save(make(), tmp_path / "image", kind, **options)
    for image_format in ("BGR", "RGB"):
        for seed in (0, 1):
            assert_same(*both(mappers(*NO_RESIZE, "INPUT.FORMAT", image_format), record, seed))


def whole():
    buffer = io.BytesIO()
    colour().resize((200, 100)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"404 not found", whole()[:-300], whole()[:-2], whole()[:40], b"\x89PNG\r\n\x1a\n" + bytes(20)],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_files_are_refused_by_name(tmp_path, content):
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="broken.jpg cannot be read as an image"):
        FastMapper(config(), True)({"file_name": str(path)})
    with pytest.raises((OSError, SyntaxError)):
        CountingMapper(config(), True)({"file_name": str(path)})


def test_another_size_than_annotated_is_refused_as_by_detectron2(colour_record):
    with pytest.raises(ValueError, match="Mismatched image shape.*colour.jpg"):
        FastMapper(config(), True)({**colour_record, "width": WIDTH + 1, "height": HEIGHT})


number = st.integers(-5, 30) | st.floats(-5, 30)
polygon = st.lists(number, min_size=6, max_size=12).map(lambda p: p[: len(p) // 2 * 2])


def objects(mode, segmentation):
    return st.fixed_dictionaries(
        {
            "bbox": st.lists(number, min_size=4, max_size=4) | st.tuples(*[st.integers(0, 20)] * 4),
            "bbox_mode": mode,
            "category_id": st.integers(0, 79),
            "segmentation": segmentation,
            "keypoints": st.lists(number, min_size=51, max_size=51),
        },
        optional={"iscrowd": st.integers(0, 1)},
    )


one_mode = st.sampled_from([BoxMode.XYXY_ABS, BoxMode.XYWH_ABS]).flatmap(
    lambda mode: st.lists(objects(st.just(mode), st.lists(polygon, max_size=3)), max_size=4)
)
modes = st.sampled_from([BoxMode.XYXY_ABS, BoxMode.XYWH_ABS])
any_mode = st.lists(objects(modes, st.lists(polygon, min_size=1, max_size=2)), max_size=3)


@given(
    one_mode | any_mode,
    st.booleans(),
    st.booleans(),
    st.sampled_from(["polygon", "bitmask"]),
    st.integers(0, 9),
)
@settings(max_examples=100, deadline=None)
def test_any_annotations_are_transformed_as_by_detectron2(
    colour_record, annotations, mask, keypoint, kind, seed
):
    options = [*KEYPOINTS, "MODEL.MASK_ON", mask, "MODEL.KEYPOINT_ON", keypoint, "INPUT.MASK_FORMAT", kind]
    pair = mappers(*options, "INPUT.MIN_SIZE_TRAIN", (21, 0, 40))
    record = {**colour_record, "annotations": annotations}
    before = copy.deepcopy(record)
    assert_same(*both(pair, record, seed), pixels=256)
    assert record == before


def thing(**fields):
    box = {"bbox": [2.0, 3.0, 9.0, 8.0], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1}
    return {**box, "segmentation": [[2.0, 3.0, 11.0, 3.5, 10.0, 9.0]], **fields}


def rle():
    return mask_util.encode(np.asfortranarray(noise(HEIGHT, WIDTH, high=2)))


@pytest.mark.parametrize(
    "annotations, options",
    [
        ([thing(segmentation=rle())], ["INPUT.MASK_FORMAT", "bitmask"]),
        ([thing(), thing(segmentation=rle())], ["INPUT.MASK_FORMAT", "bitmask"]),
        ([thing(bbox=[9.0, 8.0, 5.0, 4.0, 30.0], bbox_mode=BoxMode.XYWHA_ABS)], []),
        ([thing(bbox=np.array([2, 3, 9, 8.5]), bbox_mode=BoxMode.XYXY_ABS)], []),
        ([thing(segmentation=[np.arange(6, dtype=np.float32)])], []),
        ([{k: v for k, v in thing().items() if k != "segmentation"}], []),
        ([thing(), thing(iscrowd=1, segmentation=rle())], []),
    ],
)
def test_unusual_annotations_are_transformed_as_by_detectron2(colour_record, annotations, options):
    record = {**colour_record, "annotations": annotations}
    for seed in (0, 1):
        assert_same(*both(mappers("INPUT.MIN_SIZE_TRAIN", (40,), *options), record, seed), pixels=256)


@pytest.mark.parametrize(
    "annotations, options",
    [
        ([thing(segmentation=rle())], []),
        ([thing(segmentation=[[1.0, 2.0, 3.0, 4.0]])], []),
        ([thing(segmentation=[[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]])], []),
        ([thing(bbox_mode=BoxMode.XYXY_REL)], []),
        ([thing(keypoints=[3.0] * 6)], KEYPOINTS),
        ([thing(keypoints=[3.0] * 51), thing()], KEYPOINTS),
    ],
)
def test_what_detectron2_refuses_is_refused_alike(colour_record, annotations, options):
    errors = []
    for mapper in mappers(*options):
        np.random.seed(1)  # flips: only then does Detectron2 count keypoints
        with pytest.raises(Exception) as info:
            mapper({**colour_record, "annotations": annotations})
        errors.append((type(info.value), str(info.value)))
    assert errors[0] == errors[1]


def test_other_formats_are_left_to_detectron2(colour_record):
    for name in ("YUV-BT.601", "L"):
        assert_same(*both(mappers("INPUT.FORMAT", name), colour_record))


def test_semantic_segmentation_is_left_to_detectron2(colour_record, tmp_path):
    Image.fromarray(noise(HEIGHT, WIDTH, high=5)).save(tmp_path / "labels.png")
    record = {**colour_record, "sem_seg_file_name": str(tmp_path / "labels.png")}
    fast, stock = both(mappers(), record)
    assert_same(fast, stock)
    assert torch.equal(fast["sem_seg"], stock["sem_seg"])


def test_proposals_are_left_to_detectron2(colour_record):
    proposals = {
        "proposal_boxes": np.array([[1.0, 2.0, 9.0, 8.0], [3.0, 3.0, 5.0, 6.0]]),
        "proposal_objectness_logits": np.array([0.5, 0.2]),
        "proposal_bbox_mode": BoxMode.XYXY_ABS,
    }
    assert_same(*both(mappers("MODEL.LOAD_PROPOSALS", True), {**colour_record, **proposals}))


class KeepFirstPolygon(HFlipTransform):
    """Treats polygons otherwise than their points, as a crop does."""

    def apply_polygons(self, polygons):
        return super().apply_polygons(polygons)[:1]


class ToFloat(T.Augmentation):
    def get_transform(self, image):
        return T.BlendTransform(np.float32(7), 0.25, 0.75)


@pytest.mark.parametrize(
    "augmentations, pixels",
    [
        ([KeepFirstPolygon(WIDTH)], 0),
        ([T.Resize((30, 40), Image.NEAREST), T.RandomFlip(1.0)], 0),
        ([T.RandomBrightness(0.5, 1.5), T.RandomFlip(1.0), T.RandomContrast(0.5, 1.5)], 0),
        ([T.RandomRotation([-30, 30]), T.RandomFlip(1.0)], 0),
        ([T.RandomRotation([-30, 30]), T.ResizeShortestEdge(60), T.RandomFlip(1.0)], 2),
        (
            [T.RandomFlip(1.0), T.ResizeShortestEdge(60), T.RandomFlip(1.0, horizontal=False, vertical=True)],
            2,
        ),
        ([T.RandomApply(T.AugmentationList([T.ResizeShortestEdge(60)]), 0.5), T.RandomFlip()], 2),
        ([ToFloat(), T.ResizeShortestEdge(60), T.RandomFlip()], 2),
        ([T.RandomExtent((0.5, 0.9), (0.1, 0.1)), T.RandomFlip()], 0),
    ],
)
def test_any_augmentations_do_as_in_detectron2(colour_record, augmentations, pixels):
    fields = {"augmentations": augmentations, "image_format": "BGR", "use_instance_mask": True}
    pair = FastMapper(True, **fields), CountingMapper(True, **fields)
    two = [[2.0, 3.0, 11.0, 3.5, 10.0, 9.0], [4.0, 4.0, 6.0, 4.0, 6.0, 7.0]]
    for seed in (0, 1):
        assert_same(*both(pair, {**colour_record, "annotations": [thing(segmentation=two)]}, seed), pixels)


def test_boxes_are_recomputed_as_by_detectron2(colour_record):
    fields = {"augmentations": [T.ResizeShortestEdge(60)], "image_format": "BGR", "use_instance_mask": True}
    fields["recompute_boxes"] = True
    pair = FastMapper(True, **fields), CountingMapper(True, **fields)
    loose = thing(bbox=[0.0, 0.0, WIDTH, HEIGHT])
    assert_same(*both(pair, {**colour_record, "annotations": [loose]}), pixels=2)


def test_keypoints_need_no_flip_indices_where_nothing_flips(colour_record):
    fields = {"augmentations": [T.ResizeShortestEdge(60)], "image_format": "BGR", "use_keypoint": True}
    pair = FastMapper(True, **fields), CountingMapper(True, **fields)
    record = {**colour_record, "annotations": [thing(keypoints=[3.0] * 51)]}
    assert_same(*both(pair, record), pixels=2)


def test_chosen_by_config():
    assert type(build_mapper(config("INPUT.MAPPER", "FastMapper"), True)) is FastMapper


class Threads:
    """What a loader's worker has."""

    def __init__(self, mapper, record):
        self.mapper, self.record = mapper, record

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.mapper(self.record)["image"].shape, cv2.getNumThreads()


def test_a_loaders_worker_has_one_thread(colour_record):
    before = cv2.getNumThreads()
    try:
        cv2.setNumThreads(3)
        data = Threads(FastMapper(config(), True), colour_record)
        data[0]  # OpenCV's threads exist before the worker is forked
        [(shape, threads)] = DataLoader(data, batch_size=None, num_workers=1, timeout=60)
        assert threads == 1 and shape[0] == 3
        assert cv2.getNumThreads() == 3
    finally:
        cv2.setNumThreads(before)
