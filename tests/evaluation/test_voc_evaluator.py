"""Boxes here are VOC's: (xmin, ymin, xmax, ymax), whole pixels counted from 1, the last one included."""

import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import CLASS_NAMES
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from mean_average_precision import MetricBuilder
from mean_average_precision.utils import (
    compute_average_precision,
    compute_average_precision_with_recall_thresholds,
)

from rethink_d2.data.voc import image_ids, read_annotation, register_voc
from rethink_d2.evaluation.voc import VOCEvaluator

CLASSES = ("cat", "dog")
BCCD = ("RBC", "WBC", "Platelets")
PLACES = [(40 * i + 1, 1, 40 * i + 20, 20) for i in range(8)]  # boxes that do not touch


@pytest.fixture
def voc_data(real_data):
    if not (real_data / "BCCD").is_dir():
        pytest.skip("needs the small VOC and BCCD data beside COCO's")
    return real_data


def write_image(root, image_id, objects, fields="<pose/><truncated>0</truncated>"):
    """Objects are (class, box, difficult)."""
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    text = "<annotation><size><height>48</height><width>400</width></size>"
    for name, box, difficult in objects:
        sides = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
        text += f"<object><name>{name}</name>{fields}<difficult>{int(difficult)}</difficult><bndbox>"
        text += "".join(f"<{k}>{v}</{k}>" for k, v in sides) + "</bndbox></object>"
    (root / "Annotations" / f"{image_id}.xml").write_text(text + "</annotation>")
    with open(root / "ImageSets/Main/val.txt", "a") as f:
        f.write(f"{image_id}\n")


def register(name, root, split="val", year=2012, class_names=CLASSES):
    for catalog in (DatasetCatalog, MetadataCatalog):
        if name in catalog.list():
            catalog.remove(name)
    register_voc(name, [(root, split, year)], class_names=class_names)
    return name


def evaluate(evaluator, detections):
    """Detections are {image id: [(class index, score, box)]}."""
    evaluator.reset()
    for image_id, found in detections.items():
        instances = Instances((48, 400))
        boxes = torch.tensor(np.array([box for *_, box in found]), dtype=torch.float32).reshape(-1, 4)
        instances.pred_boxes = Boxes(boxes - torch.tensor([1.0, 1.0, 0.0, 0.0]))  # Detectron2's, from 0
        instances.scores = torch.tensor([score for _, score, _ in found])
        instances.pred_classes = torch.tensor([c for c, *_ in found], dtype=torch.int64)
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    return evaluator.evaluate()["bbox"]


# ------------------------------------------------------------------ genuine data, other implementations


def perturbed(objects, classes, rng):
    """Detections as of a mediocre detector; scores differ within a class, as ties have no order."""
    found = defaultdict(list)
    for image_id, listed in objects.items():
        for obj in listed:
            box = np.array(obj.box)
            size = np.tile(box[2:] - box[:2], 2)
            wrong = rng.integers(len(classes))
            index = wrong if rng.random() < 0.1 else classes.index(obj.name)
            if rng.random() < 0.8:
                found[index].append((image_id, box + 0.1 * size * rng.standard_normal(4)))
            if rng.random() < 0.15:  # twice
                found[index].append((image_id, box + 0.03 * size * rng.standard_normal(4)))
            if rng.random() < 0.1:  # somewhere else
                found[wrong].append((image_id, box + rng.uniform(0, 100)))
    detections = {image_id: [] for image_id in objects}
    for index, boxes in found.items():
        scores = rng.choice(np.arange(1, 1000), len(boxes), replace=False) / 1000
        for score, (image_id, box) in zip(scores, boxes, strict=True):
            detections[image_id].append((index, score, box.round(1)))
    return detections


def independent_ap50(objects, detections, classes, eleven_points):
    """By the package mean-average-precision: class -> AP, 0-100.

    Two of its errors are corrected here, both about difficult objects: it mixes up the flags of an image
    where it has several detections, and counts difficult objects in the denominator of the recall.
    """
    metric = MetricBuilder.build_evaluation_metric("map_2d", num_classes=len(classes))
    for image_id, listed in objects.items():
        truth = np.array([[*o.box, classes.index(o.name), o.difficult, 0] for o in listed])
        metric.add(np.array([[*box, index, score] for index, score, box in detections[image_id]]), truth)
    ap = {}
    for index, name in enumerate(classes):
        flags = [[o.difficult for o in listed if o.name == name] for listed in objects.values()]
        table = metric.metric_fn.match_table[index]
        table["difficult"] = [flags[image] for image in table["img_id"]]
        everything = sum(len(image) for image in flags)
        if counted := everything - sum(sum(image) for image in flags):
            curve = metric.value(iou_thresholds=0.5)[0.5][index]
            precision, recall = curve["precision"], curve["recall"] * everything / counted
            if eleven_points:
                points = np.arange(0.0, 1.1, 0.1)
                ap[name] = 100 * compute_average_precision_with_recall_thresholds(precision, recall, points)
            else:
                ap[name] = 100 * compute_average_precision(precision, recall)
    return ap


GENUINE = [("VOC2007", "test", CLASS_NAMES), ("VOC2012", "val", CLASS_NAMES), ("BCCD", "test", BCCD)]


@pytest.mark.parametrize("year", [2007, 2012])
@pytest.mark.parametrize("folder, split, classes", GENUINE)
def test_ap50_is_that_of_an_independent_package(voc_data, folder, split, classes, year):
    root = voc_data / folder
    name = register("voc_test_genuine", root, split, year, classes)
    objects = {i: read_annotation(root / "Annotations" / f"{i}.xml")[2] for i in image_ids(root, split)}
    detections = perturbed(objects, classes, np.random.default_rng(7))
    ours = evaluate(VOCEvaluator(name), detections)
    theirs = independent_ap50(objects, detections, classes, year == 2007)
    counted = {c: ours[f"AP50-{c}"] for c in classes if not math.isnan(ours[f"AP50-{c}"])}
    assert counted == pytest.approx(theirs, abs=1e-9)
    assert ours["AP50"] == pytest.approx(np.mean(list(theirs.values())), abs=1e-9)
    assert 5 < ours["AP50"] < 95, "a comparison of all or nothing would show nothing"


@pytest.mark.parametrize("year", [2007, 2012])
def test_means_are_detectron2s_where_every_class_has_objects(voc_data, year):
    root = voc_data / "BCCD"
    name = register("voc_test_genuine", root, "test", year, BCCD)
    objects = {i: read_annotation(root / "Annotations" / f"{i}.xml")[2] for i in image_ids(root, "test")}
    detections = perturbed(objects, BCCD, np.random.default_rng(8))
    ours = evaluate(VOCEvaluator(name), detections)
    theirs = evaluate(PascalVOCDetectionEvaluator(name), detections)
    assert {k: ours[k] for k in theirs} == pytest.approx(theirs, abs=1e-9)


# ------------------------------------------------------------------ constructed cases


@pytest.fixture(scope="module")
def six_cats(tmp_path_factory):
    root = tmp_path_factory.mktemp("six_cats")
    for image_id in ("a", "b"):
        write_image(root, image_id, [("cat", box, False) for box in PLACES[:3]])
    return VOCEvaluator(register("voc_test_six", root, class_names=("cat",)))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([*range(6), None]), max_size=14))
def test_area_under_the_curve(six_cats, order):
    """`order` lists which cat each detection covers, best score first; None: none."""
    detections, hits, seen = {"a": [], "b": []}, [], set()
    for rank, cat in enumerate(order):
        place = PLACES[5] if cat is None else PLACES[cat % 3]
        detections["a" if cat is None or cat < 3 else "b"].append((0, 0.9 - rank / 100, place))
        hits.append(cat is not None and cat not in seen)
        seen.add(cat)
    precision = [sum(hits[: i + 1]) / (i + 1) for i in range(len(hits))]
    # Every object found adds 1/6 at the best precision from there on.
    expected = sum(max(precision[i:]) / 6 for i, hit in enumerate(hits) if hit)
    assert evaluate(six_cats, detections)["AP50"] == pytest.approx(100 * expected, abs=1e-9)


@pytest.mark.parametrize("first, expected", [("difficult", 100), ("nothing", 50), ("the dog", 50)])
def test_difficult_objects_are_neither_hits_nor_misses(tmp_path, first, expected):
    objects = [("cat", PLACES[0], False), ("cat", PLACES[1], True), ("dog", PLACES[2], False)]
    write_image(tmp_path, "1", objects)
    evaluator = VOCEvaluator(register("voc_test_difficult", tmp_path))
    place = {"difficult": PLACES[1], "nothing": PLACES[5], "the dog": PLACES[2]}[first]
    detections = {"1": [(0, 0.9, place), (0, 0.5, PLACES[0])]}
    assert evaluate(evaluator, detections)["AP50-cat"] == pytest.approx(expected)


@pytest.mark.parametrize("dogs_found", [0, 1])
def test_classes_without_objects_are_named_and_not_in_the_means(tmp_path, caplog, dogs_found):
    """The only dog is difficult, so there is none to find."""
    write_image(tmp_path, "1", [("cat", PLACES[0], False), ("dog", PLACES[1], True)])
    evaluator = VOCEvaluator(register("voc_test_absent", tmp_path))
    result = evaluate(evaluator, {"1": [(0, 0.9, PLACES[0])] + [(1, 0.9, PLACES[3])] * dogs_found})
    assert math.isnan(result.pop("AP50-dog"))
    assert result == pytest.approx({"AP": 100, "AP50": 100, "AP75": 100, "AP50-cat": 100})
    assert "no objects of dog" in caplog.text


def test_nothing_found_is_zero(six_cats):
    assert evaluate(six_cats, {"a": [], "b": []}) == {"AP": 0, "AP50": 0, "AP75": 0, "AP50-cat": 0}


@pytest.mark.parametrize("columns, ap50", [(19, 100), (20, 0)])
def test_pixels_are_counted_inclusively(tmp_path, columns, ap50):
    """IoU of 20 and 39 columns is above 0.5; without the last pixel it would be 19 / 38."""
    write_image(tmp_path, "1", [("cat", (1, 1, 20, 20), False)])
    evaluator = VOCEvaluator(register("voc_test_pixels", tmp_path, class_names=("cat",)))
    assert evaluate(evaluator, {"1": [(0, 0.9, (1, 1, 20 + columns, 20))]})["AP50"] == ap50


def test_files_of_other_programs_are_evaluated(tmp_path, caplog):
    """Fractions, none of the fields that detection does not need, a folder in a name, blank lines."""
    (tmp_path / "Annotations/sub").mkdir(parents=True)
    write_image(tmp_path, "sub/1", [("tv/monitor", (1.4, 0.6, 20.1, 19.9), False)], fields="")
    with open(tmp_path / "ImageSets/Main/val.txt", "a") as f:
        f.write("\n\n")
    evaluator = VOCEvaluator(register("voc_test_other", tmp_path, class_names=("tv/monitor",)))
    assert "rounded" in caplog.text
    assert evaluate(evaluator, {"sub/1": [(0, 0.9, (1, 1, 20, 20))]})["AP"] == pytest.approx(100)


def test_a_union_is_refused():
    with pytest.raises(ValueError, match="voc_0712_train .*parts"):
        VOCEvaluator("voc_0712_train")


def test_an_unreadable_file_is_named_before_inference(tmp_path):
    write_image(tmp_path, "1", [("cat", (1, 1, "x", 20), False)])
    with pytest.raises(ValueError, match="1.xml.*'x'"):
        VOCEvaluator(register("voc_test_bad", tmp_path))
