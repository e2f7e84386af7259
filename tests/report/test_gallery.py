"""Errors of detections by TIDE's rules, and the page that shows them."""

import html.parser
from collections import Counter

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from hypothesis import given
from hypothesis import strategies as st

from rethink_d2 import model_zoo, recipe
from rethink_d2.report import gallery

CONFIG = "mini/scratch_mask_rcnn_R_18_FPN_gn.yaml"
HOSTILE = """</title></script><script>boom()</script>"'><img src=x onerror=boom()>.jpg"""

coordinates = st.tuples(*[st.integers(0, 8)] * 2, *[st.integers(1, 8)] * 2)
box = coordinates.map(lambda c: (c[0], c[1], c[0] + c[2], c[1] + c[3]))
things = st.lists(st.tuples(box, st.integers(0, 1)), max_size=6)


def columns(pairs):
    boxes = torch.tensor([b for b, _ in pairs], dtype=torch.float32).reshape(-1, 4)
    return Boxes(boxes), torch.tensor([c for _, c in pairs], dtype=torch.int64)


def assign(detections, objects, ignored=()):
    """Detections in the order of falling score."""
    scores = torch.linspace(0.9, 0.1, len(detections))
    boxes, classes = columns(detections)
    return gallery.assign(boxes, classes, scores, *columns(objects), *columns(ignored))


def iou(a, b):
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    common = max(width, 0) * max(height, 0)
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return common / (sum(areas) - common)


@given(things, things)
def test_every_detection_has_the_one_error_that_it_fits(detections, objects):
    found, fates = assign(detections, objects)
    assert len(found) == len(detections) and len(fates) == len(objects)
    taken = {f.target: i for i, f in enumerate(found) if f.kind == "correct"}
    assert len(taken) == sum(f.kind == "correct" for f in found)
    for i, ((b, c), (kind, target, value)) in enumerate(zip(detections, found, strict=True)):
        same = max((iou(b, o) for o, oc in objects if oc == c), default=0)
        other = max((iou(b, o) for o, oc in objects if oc != c), default=0)
        if target is not None:
            assert value == pytest.approx(iou(b, objects[target][0]))
        right = target is not None and objects[target][1] == c
        fits = {
            "correct": right and value >= 0.5,
            "localization": right and 0.1 <= value < 0.5 and value >= same - 1e-6,
            "classification": not right and value >= 0.5 and not 0.1 <= same < 0.5,
            "duplicate": right and value >= 0.5 > other and taken.get(target, i) < i,
            "both": not right and 0.1 <= value < 0.5 and same < 0.1,
            "background": value < 0.1 and max(same, other) < 0.1,
        }
        assert fits[kind]
    covered = {f.target for f in found if f.kind in ("classification", "localization")} - set(taken)
    for j, fate in enumerate(fates):
        assert fate == ("matched" if j in taken else "covered" if j in covered else "missed")


@given(things, things, things, st.integers(0, 6))
def test_a_threshold_changes_no_error_above_it(detections, objects, ignored, count):
    everything, _ = assign(detections, objects, ignored)
    scores = torch.linspace(0.9, 0.1, len(detections))[:count]
    boxes, classes = columns(detections[:count])
    first, _ = gallery.assign(boxes, classes, scores, *columns(objects), *columns(ignored))
    assert first == everything[:count]


@given(things, things, things, st.randoms())
def test_the_order_of_detections_does_not_matter(detections, objects, ignored, random):
    scores = torch.linspace(0.9, 0.1, len(detections))
    boxes, classes = columns(detections)
    order = list(range(len(detections)))
    random.shuffle(order)
    truth = *columns(objects), *columns(ignored)
    straight, fates = gallery.assign(boxes, classes, scores, *truth)
    rows = torch.tensor(order, dtype=torch.int64)
    shuffled, fates_then = gallery.assign(boxes[rows], classes[rows], scores[rows], *truth)
    assert shuffled == [straight[i] for i in order]
    assert fates_then == fates


CAT = ((0, 0, 10, 10), 0)
FAR = (100, 100, 110, 110)


@pytest.mark.parametrize(
    "detections, kinds, fate",
    [
        ([CAT], ["correct"], "matched"),
        ([CAT, CAT], ["correct", "duplicate"], "matched"),
        ([((0, 0, 10, 10), 1)], ["classification"], "covered"),
        ([((0, 0, 10, 4), 0)], ["localization"], "covered"),
        ([((0, 0, 10, 4), 1)], ["both"], "missed"),
        ([(FAR, 0)], ["background"], "missed"),
        ([((0, 0, 10, 4), 0), CAT], ["localization", "correct"], "matched"),
        ([], [], "missed"),
    ],
)
def test_examples(detections, kinds, fate):
    found, fates = assign(detections, [CAT])
    assert ([f.kind for f in found], fates) == (kinds, [fate])


def test_what_lies_on_an_ignored_object_of_its_class_is_no_error():
    crowd = ((0, 0, 50, 50), 0)
    found, fates = assign([((5, 5, 10, 10), 0), ((5, 5, 10, 10), 1), CAT], [CAT], [crowd])
    assert [f.kind for f in found] == ["ignored", "both", "correct"]
    assert fates == ["matched"]


def test_crowds_and_difficult_objects_are_ignored(real_data):
    name = "voc_2007_trainval"
    records, metadata = DatasetCatalog.get(name), MetadataCatalog.get(name)
    objects = [o for r in records for o in gallery.ground_truth(r, metadata)]
    assert 0 < sum(difficult for *_, difficult in objects) < len(objects)
    # Detectron2's records hold the same boxes without saying which are difficult.
    plain = [(list(a["bbox"]), a["category_id"]) for r in records for a in r["annotations"]]
    assert [(b, c) for b, c, _ in objects] == plain
    crowd = {"bbox": [1, 2, 3, 4], "bbox_mode": 1, "category_id": 7, "iscrowd": 1}
    read = gallery.ground_truth({"annotations": [crowd]}, MetadataCatalog.get("x"))
    assert read == [([1, 2, 4, 6], 7, True)]


def noise(seed, height=480, width=640):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def a_picture(image, name="a.jpg", class_names=("cat", "dog")):
    """A cat found, a cat missed, and a detection on background."""
    instances = Instances(image.shape[:2])
    instances.pred_boxes = Boxes(torch.tensor([[10.0, 10, 60, 60], [300, 300, 400, 400]]))
    instances.pred_classes, instances.scores = torch.tensor([0, 1]), torch.tensor([0.9, 0.6])
    objects = [([10, 10, 60, 60], 0, False), ([100, 100, 160, 160], 0, False), ([0, 0, 9, 9], 1, True)]
    return gallery.picture(image, name, objects, instances, class_names)


def a_page(pictures, **facts):
    facts = {"title": "run", "weights": "w.pth", "data": "d", "total": 9, "threshold": 0.5, **facts}
    return gallery.page(pictures, **facts)


class Outline(html.parser.HTMLParser):
    """What a browser would make of a page: elements, and what it would fetch or run."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.handlers = Counter(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href")]
        self.handlers += [k for k, _ in attrs if k.startswith("on")]


def test_errors_are_counted_per_image_and_the_worst_comes_first():
    worse = a_picture(noise(0))
    assert worse["errors"] == {"background": 1, "missed": 1}
    better = {**worse, "name": "b.jpg", "errors": Counter(missed=1)}
    text = a_page([better, worse])
    assert text.index('data-name="a.jpg"') < text.index('data-name="b.jpg"')
    assert "2 of 4 objects found, 3 errors" in " ".join(text.split())
    assert 'data-info="cat 0.90, IoU 1.00 with cat: correct"' in text


def test_hostile_names_stay_text():
    plain = Outline(a_page([a_picture(noise(0))]))
    hostile = a_picture(noise(0), HOSTILE, (HOSTILE, HOSTILE))
    outline = Outline(a_page([hostile], title=HOSTILE, weights=HOSTILE, data=HOSTILE))
    assert outline.tags == plain.tags
    assert not outline.handlers
    assert all(a.startswith("data:image/webp;base64,") for a in outline.addresses)


def test_the_page_is_small(real_data):
    # Noise is the worst that an image can be.
    assert len(a_page([a_picture(noise(i)) for i in range(4)])) < 4 * 100_000 + 20_000
    photographs = sorted((real_data / "coco/val2017").glob("*.jpg"))[:6]
    images = [gallery.detection_utils.read_image(str(p), "BGR") for p in photographs]
    assert len(a_page([a_picture(image) for image in images])) < len(images) * 40_000 + 20_000


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    torch.save({"model": model_zoo.get(CONFIG, device="cpu").state_dict()}, path)
    return str(path)


def test_a_checkpoint_becomes_a_page(weights, tmp_path, capsys, glyph_cache):
    arguments = ["--config-file", model_zoo.get_config_file(CONFIG), "--weights", weights]
    arguments += ["--data", "glyphs_tiny_val", "--images", "3", "--threshold", "0", "--output", str(tmp_path)]
    assert gallery.cli(arguments) == 0
    (path,) = tmp_path.iterdir()
    said = capsys.readouterr().out
    assert path.name.endswith("-w.html") and str(path) in said
    assert "when it is made again: python -m rethink_d2.report" in said
    text = path.read_text()
    assert text.count("<figure") == 3
    assert "on 3 of the 16 images of glyphs_tiny_val" in text
    objects = sum(len(DatasetCatalog.get("glyphs_tiny_val")[i]["annotations"]) for i in (0, 5, 10))
    assert f"of {objects} objects found" in text


@pytest.fixture
def unlabelled():
    DatasetCatalog.register("unlabelled", lambda: [{"file_name": "a.jpg", "image_id": 0}])
    MetadataCatalog.get("unlabelled").set(thing_classes=list("abcdefghijklmnopqrst"))
    yield
    DatasetCatalog.remove("unlabelled")
    MetadataCatalog.remove("unlabelled")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"weights": "none.pth"}, "MODEL.WEIGHTS: there is no file .*none.pth"),
        ({"data": "glyphs_vla"}, "DATASETS.TEST: glyphs_vla is not registered; did you mean glyphs_val"),
        ({"data": "unlabelled"}, "DATASETS.TEST: unlabelled has no ground truth"),
        ({"images": 0}, "--images 0"),
    ],
)
def test_what_does_not_fit_is_named(weights, tmp_path, unlabelled, options, message):
    cfg = recipe.load(model_zoo.get_config_file(CONFIG), [])
    with pytest.raises(ValueError, match=message):
        gallery.write_gallery(cfg, options.pop("weights", weights), str(tmp_path), **options)
    assert not any(tmp_path.iterdir())


def test_a_classifier_is_refused(weights, tmp_path):
    cfg = recipe.load(model_zoo.get_config_file("mini/imagenet_R_18_FPN_gn.yaml"), [])
    with pytest.raises(ValueError, match="MODEL.META_ARCHITECTURE"):
        gallery.write_gallery(cfg, weights, str(tmp_path))
