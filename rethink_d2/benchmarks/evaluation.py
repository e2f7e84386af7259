"""COCO's and VOC's average precision against Detectron2's evaluators, from reading annotations to metrics.

Predictions are annotations moved a little, some of them of a wrong class, with random scores. Both sides get
the same ones, and their metrics must be equal to 1e-9 before a time is reported.
"""

import contextlib
import io
import json
import math
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator, coco_evaluation
from detectron2.evaluation.pascal_voc_evaluation import parse_rec
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.file_io import PathManager
from pycocotools import mask as mask_util

from ..data.voc import register_voc
from ..evaluation.coco import FastCOCOEvaluator
from ..evaluation.voc import VOCEvaluator
from .common import Result, compare

NAME = "rethink_benchmark_evaluation"


def add_arguments(parser):
    """The benchmark's own arguments."""
    genuine = os.path.isfile(MetadataCatalog.get("coco_2017_val").json_file)
    names = ("coco_2017_val", "keypoints_coco_2017_val") if genuine else ("glyphs_keypoints_train",) * 2
    parser.add_argument("--dataset", default=names[0], help="with masks (default: %(default)s)")
    parser.add_argument("--keypoints", default=names[1], help="with keypoints (default: %(default)s)")
    parser.add_argument("--images", type=int, default=2000, help="annotations are repeated for so many")
    parser.add_argument("--detections", type=int, default=100_000)


def run(args):
    """Time whole evaluations, each by an evaluator of its own that reads the annotations.

    Returns:
        list[Result]: seconds per evaluation.

    Raises:
        AssertionError: metrics that are not equal.
    """
    rng = np.random.default_rng(0)
    results = []
    for source, keypoints in ((args.dataset, False), (args.keypoints, True)):
        truth = repeated(source, args.images)
        predictions = perturbed(truth, args.detections, rng)
        note = f"{source}: {args.images} images, {args.detections} detections"
        with tempfile.TemporaryDirectory() as folder:
            for tasks in [["keypoints"]] if keypoints else [["bbox"], ["segm"], ["bbox", "segm"]]:
                results.append(compare_coco(tasks, truth, predictions, Path(folder), args.repeats, note))
            if not keypoints:
                results.append(compare_voc(truth, predictions, Path(folder), args.repeats, note))
    return results


def repeated(name, images):
    """A COCO data set's file with as many images as asked for: its own ones again and again."""
    DatasetCatalog.get(name)  # draws built-in data
    document = json.loads(Path(PathManager.get_local_path(MetadataCatalog.get(name).json_file)).read_text())
    belonging = {image["id"]: [] for image in document["images"][:images]}
    chosen = [a for a in document["annotations"] if a["image_id"] in belonging]
    # Detectron2's VOC metric has no value where a class has no objects.
    present = {a["category_id"] for a in chosen if not a["iscrowd"]}
    for annotation in chosen:
        if annotation["category_id"] in present:
            belonging[annotation["image_id"]].append(annotation)
    truth = {"images": [], "annotations": []}
    truth["categories"] = [category for category in document["categories"] if category["id"] in present]
    for number in range(1, images + 1):
        image = document["images"][(number - 1) % len(belonging)]
        truth["images"].append({**image, "id": number})
        for annotation in belonging[image["id"]]:
            ids = {"id": len(truth["annotations"]) + 1, "image_id": number}
            truth["annotations"].append({**annotation, **ids})
    return truth


def perturbed(truth, count, rng):
    """Predictions as Detectron2's evaluator keeps them: a list of {"image_id", "instances": COCO results}."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    predictions = {image_id: [] for image_id in sizes}
    for index in rng.integers(len(truth["annotations"]), size=count):
        annotation = truth["annotations"][index]
        x, y, w, h = annotation["bbox"]
        dx, dy, dw, dh = rng.normal(0, 0.1 * rng.random(), 4) * (w, h, w, h)
        guess = int(rng.choice(truth["categories"])["id"])
        result = {
            "image_id": annotation["image_id"],
            "category_id": guess if rng.random() < 0.2 else annotation["category_id"],
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
    """Polygons, moved, or a crowd's mask where it is, as a compressed mask."""
    if isinstance(segmentation, list):
        polygons = [(np.reshape(polygon, (-1, 2)) + offset).ravel().tolist() for polygon in segmentation]
        mask = mask_util.merge(mask_util.frPyObjects(polygons, *size))
    else:
        mask = mask_util.frPyObjects(segmentation, *size)
    return {"size": list(mask["size"]), "counts": mask["counts"].decode()}


@contextlib.contextmanager
def registered(register):
    """Metadata of a data set for as long as it is needed."""
    register()
    yield MetadataCatalog.get(NAME)
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def compare_coco(tasks, truth, predictions, folder, repeats, note):
    """Time COCO evaluations of some tasks."""
    path = folder / "truth.json"
    path.write_text(json.dumps(truth))
    points = {len(a["keypoints"]) // 3 for a in truth["annotations"] if "keypoints" in a} - {17}
    metrics = {}

    def evaluate(cls):
        evaluator = cls(NAME, tasks, distributed=False, kpt_oks_sigmas=[0.075] * sum(points))
        # What process() leaves there; predicted masks as pictures would take 30 GB.
        evaluator._predictions = predictions
        with contextlib.redirect_stdout(io.StringIO()):
            metrics[cls] = evaluator.evaluate()

    with registered(lambda: DatasetCatalog.register(NAME, list)) as meta:
        # Without a mapping of classes to ids: the predictions have the file's ids.
        meta.set(json_file=str(path), thing_classes=[c["name"] for c in truth["categories"]])
        times = compare(lambda: evaluate(FastCOCOEvaluator), lambda: evaluate(COCOEvaluator), repeats=repeats)
    count = assert_equal(metrics[FastCOCOEvaluator], metrics[COCOEvaluator])
    compiled = coco_evaluation.COCOeval_opt is not coco_evaluation.COCOeval
    peer = "Detectron2, its C++" if compiled else "Detectron2, pycocotools"
    return Result(f"COCO {' + '.join(tasks)}", peer, *times, note=f"{note}; {count} metrics equal")


def compare_voc(truth, predictions, folder, repeats, note):
    """Time VOC evaluations of the same annotations, written as VOC's files, and the same boxes."""
    names = {category["id"]: category["name"] for category in truth["categories"]}
    write_voc(folder, truth, names)
    metrics = {}
    with registered(lambda: register_voc(NAME, [(folder, "val", 2012)], class_names=list(names.values()))):
        evaluator = PascalVOCDetectionEvaluator(NAME)  # whose lines of text both take
        evaluator.reset()
        for prediction in predictions:
            inputs = {"image_id": str(prediction["image_id"])}
            evaluator.process([inputs], [{"instances": instances(prediction["instances"], list(names))}])

        def evaluate(cls):
            parse_rec.cache_clear()  # or Detectron2 would read the files once in all
            own = cls(NAME)
            own._predictions = evaluator._predictions
            metrics[cls] = own.evaluate()

        times = compare(
            lambda: evaluate(VOCEvaluator), lambda: evaluate(PascalVOCDetectionEvaluator), repeats=repeats
        )
    count = assert_equal(metrics[VOCEvaluator], metrics[PascalVOCDetectionEvaluator])
    return Result("VOC", "Detectron2", *times, note=f"{note}; {count} metrics equal")


def write_voc(folder, truth, names):
    """Write boxes as files in VOC's layout; image n is called n."""
    objects = {image["id"]: [] for image in truth["images"]}
    for annotation in truth["annotations"]:
        x, y, w, h = annotation["bbox"]
        sides = zip(("xmin", "ymin", "xmax", "ymax"), (x + 1, y + 1, x + w, y + h), strict=True)
        box = "".join(f"<{side}>{round(value)}</{side}>" for side, value in sides)
        objects[annotation["image_id"]].append(
            f"<object><name>{names[annotation['category_id']]}</name><pose/><truncated>0</truncated>"
            f"<difficult>{annotation['iscrowd']}</difficult><bndbox>{box}</bndbox></object>"
        )
    for part in ("Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    for image in truth["images"]:
        size = f"<size><width>{image['width']}</width><height>{image['height']}</height></size>"
        text = f"<annotation>{size}{''.join(objects[image['id']])}</annotation>"
        (folder / "Annotations" / f"{image['id']}.xml").write_text(text)
    (folder / "ImageSets/Main/val.txt").write_text("".join(f"{image_id}\n" for image_id in objects))


def instances(results, category_ids):
    """COCO results as a model's output, boxes only."""
    boxes = np.array([result["bbox"] for result in results]).reshape(-1, 4)
    output = Instances((1, 1))
    output.pred_boxes = Boxes(torch.from_numpy(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)))
    output.scores = torch.tensor([result["score"] for result in results])
    output.pred_classes = torch.tensor([category_ids.index(result["category_id"]) for result in results])
    return output


def assert_equal(ours, theirs):
    """Compare metrics by task and name to 1e-9; ours may have more. Returns the number of theirs."""
    assert ours.keys() == theirs.keys()
    for task, metrics in theirs.items():
        for name, value in metrics.items():
            np.testing.assert_allclose(ours[task][name], value, rtol=0, atol=1e-9, err_msg=f"{task} {name}")
    return sum(map(len, theirs.values()))
