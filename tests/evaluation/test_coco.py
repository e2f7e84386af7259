"""What is right here is what Detectron2's evaluator says, which runs pycocotools."""

import copy
import functools
import json
import math

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils import comm
from gloo import on_processes
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rethink_d2.data.glyphs import KEYPOINT_OKS_SIGMAS
from rethink_d2.data.subsets import register_subset
from rethink_d2.evaluation.coco import FastCOCOEvaluator


class Keeping:
    """Keeps what metrics are made from: recall too, which Detectron2 only prints."""

    def _derive_coco_results(self, coco_eval, iou_type, class_names=None):
        if coco_eval is not None:
            self.kept[iou_type] = {"stats": coco_eval.stats[:12], **coco_eval.eval}
        return super()._derive_coco_results(coco_eval, iou_type, class_names)

    def evaluate(self, img_ids=None):
        self.kept = {}
        return super().evaluate(img_ids)


class Ours(Keeping, FastCOCOEvaluator):
    pass


class Detectron2s(Keeping, COCOEvaluator):
    pass


def outputs(name, points=False, seed=0):
    """A mediocre detector's inputs and outputs, image by image; some find nothing, scores are often equal."""
    rng = np.random.default_rng(seed)
    classes = len(MetadataCatalog.get(name).thing_classes)
    for index, record in enumerate(DatasetCatalog.get(name)):
        size = record["height"], record["width"]
        boxes, masks, keypoints = [], [], []
        for annotation in record["annotations"] * (index % 3):
            box = np.array(BoxMode.convert(annotation["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
            shift = rng.normal(0, 0.1 * rng.random(), 2) * (box[2:] - box[:2])
            boxes.append(box + np.tile(shift, 2))
            masks.append(moved(annotation["segmentation"], shift, size))
            if points:
                found = np.reshape(annotation["keypoints"], (-1, 3)).astype(float)
                found[:, :2] += rng.normal(0, 4, (len(found), 2))
                keypoints.append(found)
        labels = np.array([a["category_id"] for a in record["annotations"]] * (index % 3), dtype=int)
        wrong = rng.random(len(labels)) < 0.2
        labels[wrong] = rng.integers(classes, size=wrong.sum())
        instances = Instances(size, scores=torch.tensor(rng.random(len(labels)).round(1)))
        instances.pred_boxes = Boxes(torch.tensor(np.array(boxes), dtype=torch.float32).reshape(-1, 4))
        instances.pred_classes = torch.tensor(labels)
        instances.pred_masks = torch.tensor(np.array(masks)).reshape(-1, *size)
        if points:
            instances.pred_keypoints = torch.tensor(np.array(keypoints), dtype=torch.float32)
        yield {"image_id": record["image_id"]}, {"instances": instances}


def moved(segmentation, shift, size):
    if isinstance(segmentation, dict):
        return mask_util.decode(segmentation).astype(bool)
    polygons = [(np.reshape(polygon, (-1, 2)) + shift).ravel().tolist() for polygon in segmentation]
    return mask_util.decode(mask_util.merge(mask_util.frPyObjects(polygons, *size))).astype(bool)


@functools.cache
def predicted(name, points=False):
    pairs = list(outputs(name, points))  # first, as it draws built-in data
    return process(FastCOCOEvaluator(name), pairs)._predictions


def evaluator(cls, name, *args, **options):
    """One that has processed outputs."""
    predictions = copy.deepcopy(predicted(name, "keypoints" in name))
    own = cls(name, *args, **options)
    own._predictions = predictions
    return own


def process(evaluator, pairs):
    evaluator.reset()
    for inputs, output in pairs:
        evaluator.process([inputs], [output])
    return evaluator


def assert_same(ours, theirs, img_ids=None):
    """Compare two evaluators, of which ours has processed outputs; returns the metrics."""
    theirs._predictions = copy.deepcopy(ours._predictions)  # Detectron2's changes its own
    result, expected = ours.evaluate(img_ids), theirs.evaluate(img_ids)
    assert list(result) == list(expected)
    for task in expected:
        assert list(result[task]) == list(expected[task])
        assert result[task] == pytest.approx(expected[task], abs=1e-9, nan_ok=True)
    assert ours.kept.keys() == theirs.kept.keys()
    for task, kept in theirs.kept.items():
        for key in ("stats", "precision", "recall", "scores"):
            np.testing.assert_allclose(ours.kept[task][key], kept[key], rtol=0, atol=1e-9)
    return result


def assert_between(metrics, low=5, high=95):
    """A comparison of all or nothing would show nothing."""
    assert all(low < value < high for value in metrics.values() if not math.isnan(value))


# ------------------------------------------------------------------ genuine and built-in data


@pytest.mark.parametrize("max_dets", [None, 300])
def test_boxes_and_masks_of_genuine_data(real_data, max_dets):
    name, options = "coco_2017_val", {"max_dets_per_image": max_dets}
    ours = evaluator(Ours, name, **options)
    assert any(annotation["iscrowd"] for annotation in ours._coco_api.dataset["annotations"])
    result = assert_same(ours, Detectron2s(name, **options))
    assert result.keys() == {"bbox", "segm"}
    for metrics in result.values():
        assert "AP-person" in metrics
        assert_between({key: metrics[key] for key in ("AP", "AP50", "AP75", "APs", "APm", "APl")})


def test_keypoints_of_genuine_data(real_data):
    name = "keypoints_coco_2017_val"
    result = assert_same(evaluator(Ours, name), Detectron2s(name))
    assert_between(result["keypoints"], low=1)


def test_keypoints_have_the_sigmas_that_are_given(glyph_cache):
    name, found = "glyphs_keypoints_tiny_val", {}
    for factor in (1, 2):
        options = {"kpt_oks_sigmas": [factor * sigma for sigma in KEYPOINT_OKS_SIGMAS]}
        result = assert_same(evaluator(Ours, name, **options), Detectron2s(name, **options))
        found[factor] = result["keypoints"]["AP"]
    assert 0 < found[1] < found[2]
    with pytest.raises(ValueError, match="4 keypoints.*has 4.*TEST.KEYPOINT_OKS_SIGMAS 17"):
        evaluator(Ours, name).evaluate()


def test_only_the_tasks_and_images_that_are_asked_for(real_data):
    name, tasks = "coco_2017_val", ("segm",)
    ours = evaluator(Ours, name, tasks)
    some = sorted(ours._coco_api.imgs)[::2]
    assert assert_same(ours, Detectron2s(name, tasks), some).keys() == {"segm"}


def test_a_subset_is_scored_on_its_own_images(real_data, glyph_cache):
    name = "test_coco_subset"
    register_subset(name, "coco_2017_val", 20)
    try:
        result = assert_same(evaluator(Ours, name), Detectron2s(name))
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    assert_between({key: result["bbox"][key] for key in ("AP", "AP50")})


def test_evaluating_changes_nothing(glyph_cache):
    ours = evaluator(Ours, "glyphs_tiny_val")
    before = copy.deepcopy((ours._predictions, ours._coco_api.dataset))
    assert str(ours.evaluate()) == str(ours.evaluate())
    assert (ours._predictions, ours._coco_api.dataset) == before


def test_files_are_detectron2s(real_data, tmp_path):
    name, found = "coco_2017_val", {}
    for cls in (FastCOCOEvaluator, COCOEvaluator):
        folder = tmp_path / cls.__name__
        evaluator(cls, name, ("bbox",), output_dir=str(folder)).evaluate()
        found[cls] = json.loads((folder / "coco_instances_results.json").read_text())
        assert (folder / "instances_predictions.pth").is_file()
    assert found[FastCOCOEvaluator] == found[COCOEvaluator]


# ------------------------------------------------------------------ constructed cases

NAME = "test_coco_constructed"


@pytest.fixture
def register(tmp_path):
    """Register annotations on images of 100 x 100: lists of (image, category, box, further fields)."""

    def write(annotations):
        forget()
        images = [{"id": i, "height": 100, "width": 100, "file_name": f"{i}.jpg"} for i in (1, 2, 3)]
        categories = [{"id": 10 * i, "name": f"class {i}"} for i in (1, 2)]
        document = {"images": images, "categories": categories}
        if annotations is not None:
            document["annotations"] = [
                {"image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3]} | fields
                for image, category, box, fields in annotations
            ]
        (tmp_path / "truth.json").write_text(json.dumps(document))
        DatasetCatalog.register(NAME, list)
        MetadataCatalog.get(NAME).set(
            json_file=str(tmp_path / "truth.json"),
            thing_classes=["class 1", "class 2"],
            thing_dataset_id_to_contiguous_id={10: 0, 20: 1},
        )
        return NAME

    def forget():
        for catalog in (DatasetCatalog, MetadataCatalog):
            if NAME in catalog.list():
                catalog.remove(NAME)

    yield write
    forget()


def predict(evaluator, found, images=(1, 2, 3)):
    """Boxes as (image, class index, (x, y, w, h), score); every image is processed."""
    pairs = []
    for image in images:
        own = [(c, box, score) for i, c, box, score in found if i == image]
        boxes = torch.tensor([box for _, box, _ in own], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        instances = Instances((100, 100), pred_boxes=Boxes(boxes))
        instances.pred_classes = torch.tensor([c for c, *_ in own], dtype=torch.int64)
        instances.scores = torch.tensor([score for *_, score in own])
        pairs.append(({"image_id": image}, {"instances": instances}))
    return process(evaluator, pairs)


CAT = (1, 10, (10, 10, 20, 20), {"id": 1, "iscrowd": 0})

# Few places, sizes and scores, so that overlaps and scores are often equal or exactly at a threshold.
boxes = st.tuples(*[st.integers(0, 4).map(lambda n: 10 * n)] * 2, *[st.sampled_from([10, 20, 40])] * 2)
areas = st.sampled_from([100, 32**2, 40**2, 96**2, 10**4])
annotations = st.lists(
    st.builds(
        lambda image, category, box, crowd, area: (image, category, box, {"iscrowd": crowd, "area": area}),
        *(st.integers(1, 3), st.sampled_from([10, 20]), boxes, st.sampled_from([0, 0, 0, 1]), areas),
    ),
    max_size=12,
)
detections = st.lists(
    st.tuples(st.integers(1, 3), st.integers(0, 1), boxes, st.sampled_from([0.25, 0.5, 0.75])), max_size=25
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(annotations, detections, st.sampled_from([None, 2, 12]))
@example([CAT], [(1, 0, (10, 10, 20, 20), score) for score in (0.75, 0.5)], None)
def test_any_boxes(register, truth, found, max_dets):
    ids = [(*annotation, {**fields, "id": 2**33 - i}) for i, (*annotation, fields) in enumerate(truth)]
    name = register(ids)
    ours = predict(Ours(name, max_dets_per_image=max_dets), found)
    assert_same(ours, Detectron2s(name, max_dets_per_image=max_dets))


OTHERS = [
    (1, 10, (50, 50, 20, 20)),
    (2, 10, (0, 0, 20, 30)),
    (2, 10, (60, 60, 30, 30)),
    (3, 10, (5, 5, 9, 9)),
]
FOUND = [(i, 0, box, score) for (i, _, box), score in zip(OTHERS, (0.9, 0.8, 0.7, 0.6), strict=True)]


@pytest.mark.parametrize("ids", [(0, 1, 2, 3), (-2, -1, 1, 2), (1, 2, 2, 3), (4, 4, 4, 4)], ids=str)
def test_any_ids_of_annotations(register, ids):
    """One of 0 is never found in pycocotools, and the last of several with one id stands for all of them."""
    truth = [(*place, {"id": i, "iscrowd": 0}) for place, i in zip(OTHERS, ids, strict=True)]
    name = register(truth)
    assert_same(predict(Ours(name), FOUND), Detectron2s(name))


def test_image_ids_may_be_strings(register, tmp_path):
    name = register([(*place, {"id": i, "iscrowd": 0}) for i, place in enumerate(OTHERS, 1)])
    document = json.loads((tmp_path / "truth.json").read_text())
    for image in document["images"]:
        image["id"] = f"image {image['id']}"
    for annotation in document["annotations"]:
        annotation["image_id"] = f"image {annotation['image_id']}"
    (tmp_path / "truth.json").write_text(json.dumps(document))
    found = [(f"image {i}", *rest) for i, *rest in FOUND[1:]]
    ours = predict(Ours(name), found, [f"image {i}" for i in (1, 2, 3)])
    assert 0 < assert_same(ours, Detectron2s(name))["bbox"]["AP"] < 100


def test_nothing_found_is_not_a_number(register):
    name = register([CAT])
    metrics = assert_same(predict(Ours(name), []), Detectron2s(name))["bbox"]
    assert len(metrics) == 6 and all(math.isnan(value) for value in metrics.values())


def test_nothing_processed_is_no_result(register):
    name = register([CAT])
    assert assert_same(process(Ours(name), []), Detectron2s(name)) == {}


def test_without_annotations_there_is_no_result(register):
    name = register(None)
    assert assert_same(predict(Ours(name), [(1, 0, (10, 10, 20, 20), 0.5)]), Detectron2s(name)) == {}


def test_images_that_are_not_in_the_annotations_are_refused(register):
    name = register([CAT])
    ours = predict(Ours(name), [(7, 0, (10, 10, 20, 20), 0.5)], images=(7,))
    theirs = COCOEvaluator(name)
    theirs._predictions = copy.deepcopy(ours._predictions)
    with pytest.raises(AssertionError):
        theirs.evaluate()
    with pytest.raises(ValueError, match="image 7, .*truth.json"):
        ours.evaluate()


def test_classes_that_the_data_does_not_have_are_refused(register):
    name = register([CAT])
    with pytest.raises(ValueError, match="class 2.*NUM_CLASSES"):
        predict(Ours(name), [(1, 2, (10, 10, 20, 20), 0.5)]).evaluate()


@pytest.mark.parametrize("tasks, says", [(("segm",), "segm asked for"), (("bbox", "boxes"), "boxes unknown")])
def test_tasks_that_cannot_be_done_are_refused(register, tasks, says):
    name = register([CAT])
    with pytest.raises(ValueError, match=says):
        predict(Ours(name, tasks), [(1, 0, (10, 10, 20, 20), 0.5)]).evaluate()


# ------------------------------------------------------------------ several processes


def evaluate_share(name):
    pairs = list(outputs(name))[comm.get_rank() :: comm.get_world_size()]
    evaluator = process(FastCOCOEvaluator(name), pairs)
    own = evaluator._predictions[:]
    result = evaluator.evaluate()
    kept = all(a is b for a, b in zip(own, evaluator._predictions, strict=False))
    return result, len(evaluator._predictions), kept


def test_two_processes_give_the_result_of_one(glyph_cache, tmp_path):
    """What the main process has is not copied, and the other keeps nothing."""
    alone = evaluator(FastCOCOEvaluator, "glyphs_tiny_val").evaluate()
    main, other = on_processes(tmp_path / "processes", 2, evaluate_share, "glyphs_tiny_val")
    assert main[1:] == (16, True)
    assert other[:2] == ({}, 0)
    assert main[0].keys() == alone.keys() == {"bbox", "segm"}
    for task, metrics in alone.items():
        assert main[0][task] == pytest.approx(metrics, abs=1e-9, nan_ok=True)
