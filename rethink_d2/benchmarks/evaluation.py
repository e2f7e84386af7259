"""COCO's and VOC's average precision against Detectron2's evaluators, from reading annotations to metrics.

Predictions are annotations moved a little, some of them of a wrong class, with random scores. They are the
same for both sides, and metrics must be equal to 1e-9 before a time is reported.
"""

import contextlib
import io
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator, coco_evaluation
from detectron2.structures import Boxes, Instances
from detectron2.utils.file_io import PathManager
from pycocotools import mask as mask_util

from ..data.voc import image_ids, read_annotation, register_voc
from ..evaluation.coco import FastCOCOEvaluator
from ..evaluation.voc import VOCEvaluator
from .common import Result, compare

NAME = "rethink_benchmark_evaluation"


def add_arguments(parser):
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--detections", type=int, default=100_000)
    parser.add_argument("--dataset", default="glyphs_keypoints_train", help="annotations with masks, repeated")
    parser.add_argument("--keypoints", default="", help="annotations with keypoints, if the others have none")
    parser.add_argument("--voc", default="", help="a folder in VOC's layout, for its metric too")


def run(args):
    """Time whole evaluations, each with a new evaluator that reads the annotations."""
    rng = np.random.default_rng(0)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        keypoints = args.keypoints or args.dataset
        for source, kinds in ((args.dataset, [["bbox"], ["segm"], ["bbox", "segm"]]), (keypoints, [["keypoints"]])):
            truth = repeated(source, args.images)
            predictions = perturbed(truth, args.detections, rng)
            options = register(source, truth, Path(folder) / f"{source}.json")
            results += [coco(tasks, predictions, options, args.repeats, source) for tasks in kinds]
        if args.voc:
            results.append(voc(Path(args.voc), Path(folder), args, rng))
    return results


def repeated(name, images):
    """A COCO data set's annotations, as in its file, for a number of images: its own again and again."""
    DatasetCatalog.get(name)  # makes built-in data
    document = json.loads(Path(PathManager.get_local_path(MetadataCatalog.get(name).json_file)).read_text())
    belonging = {image["id"]: [] for image in document["images"]}
    for annotation in document["annotations"]:
        belonging[annotation["image_id"]].append(annotation)
    truth = {"images": [], "annotations": [], "categories": document["categories"]}
    for number in range(1, images + 1):
        image = document["images"][number % len(document["images"])]
        truth["images"].append({**image, "id": number})
        for annotation in belonging[image["id"]]:
            own = {"id": len(truth["annotations"]) + 1, "image_id": number}
            truth["annotations"].append({**annotation, **own})
    return truth


def perturbed(truth, count, rng):
    """Predictions as Detectron2's evaluator keeps them: a list of {"image_id", "instances": COCO results}."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    predictions = {image_id: [] for image_id in sizes}
    for index in rng.integers(len(truth["annotations"]), size=count):
        annotation = truth["annotations"][index]
        x, y, w, h = annotation["bbox"]
        dx, dy, dw, dh = rng.normal(0, 0.1 * rng.random(), 4) * (w, h, w, h)
        wrong = rng.choice(truth["categories"])["id"]
        result = {
            "image_id": annotation["image_id"],
            "category_id": int(wrong) if rng.random() < 0.2 else annotation["category_id"],
            "bbox": [x + dx, y + dy, max(w + dw, 1.0), max(h + dh, 1.0)],
            "score": rng.random(),
            "segmentation": moved_mask(annotation["segmentation"], (dx, dy), sizes[annotation["image_id"]]),
        }
        if "keypoints" in annotation:
            points = np.array(annotation["keypoints"], dtype=float).reshape(-1, 3)
            points[:, :2] += rng.normal(0, 0.03 * math.sqrt(w * h), (len(points), 2))
            result["keypoints"] = points.ravel().tolist()
        predictions[annotation["image_id"]].append(result)
    return [{"image_id": image_id, "instances": found} for image_id, found in predictions.items()]


def moved_mask(segmentation, offset, size):
    """Polygons, moved, or a crowd's mask, not moved, as a compressed mask."""
    if isinstance(segmentation, list):
        polygons = [(np.reshape(p, (-1, 2)) + offset).ravel().tolist() for p in segmentation]
        mask = mask_util.merge(mask_util.frPyObjects(polygons, *size))
    else:
        mask = mask_util.frPyObjects(segmentation, *size)
    return {"size": list(mask["size"]), "counts": mask["counts"].decode()}


def register(source, truth, path):
    """Write and register annotations; returns what evaluators need to know besides the name."""
    path.write_text(json.dumps(truth))
    forget()
    # No mapping of ids to classes: predictions have the data set's own ids.
    DatasetCatalog.register(NAME, list)
    MetadataCatalog.get(NAME).set(json_file=str(path), thing_classes=[c["name"] for c in truth["categories"]])
    points = {len(a["keypoints"]) // 3 for a in truth["annotations"] if "keypoints" in a} - {17}
    return {"kpt_oks_sigmas": [0.075] * points.pop()} if points else {}


def forget():
    for catalog in (DatasetCatalog, MetadataCatalog):
        if NAME in catalog.list():
            catalog.remove(NAME)


def coco(tasks, predictions, options, repeats, source):
    """Detectron2's and our evaluator on the same predictions."""
    metrics = {}

    def evaluate(cls):
        with contextlib.redirect_stdout(io.StringIO()):
            evaluator = cls(NAME, tasks, distributed=False, **options)
            # What process() would leave, without the masks as pictures, which would take 30 GB.
            evaluator._predictions = predictions
            metrics[cls] = evaluator.evaluate()

    times = compare(lambda: evaluate(FastCOCOEvaluator), lambda: evaluate(COCOEvaluator), repeats, warm_up=0)
    count = assert_equal(metrics[FastCOCOEvaluator], metrics[COCOEvaluator])
    built = coco_evaluation.COCOeval_opt is not coco_evaluation.COCOeval
    return Result(
        name=f"COCO {' + '.join(tasks)}",
        peer="Detectron2, its C++" if built else "Detectron2, pycocotools",
        ours=times[0],
        theirs=times[1],
        note=f"{source}: {len(predictions)} images, {sum(len(p['instances']) for p in predictions)} detections;"
        f" {count} metrics equal",
    )


def assert_equal(ours, theirs):
    """Compare metrics by task and name to 1e-9; returns their number."""
    assert ours.keys() == theirs.keys()
    for task in ours:
        assert ours[task].keys() >= theirs[task].keys()
        for name, value in theirs[task].items():
            np.testing.assert_allclose(ours[task][name], value, rtol=0, atol=1e-9, err_msg=f"{task} {name}")
    return sum(len(metrics) for metrics in theirs.values())
