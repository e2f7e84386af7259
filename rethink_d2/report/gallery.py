"""Where a detector goes wrong: ``python -m rethink_d2.report.gallery --config-file X --weights Y``.

One page of a data set's images with detections over ground truth, sorted and filtered by the error types of
"TIDE: A General Toolbox for Identifying Object Detection Errors" (Bolya et al. 2020).
"""

import argparse
import base64
import os
import re
import sys
from collections import Counter
from typing import NamedTuple

import cv2
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog, detection_utils
from detectron2.engine import DefaultPredictor
from detectron2.structures import Boxes, BoxMode, pairwise_ioa, pairwise_iou
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .. import recipe
from ..data.voc import read_annotation
from ..files import write_atomically
from ..launch import fall_back_to_cpu
from ..modeling.safe_weights import SafeCheckpointer

# TIDE's error types and what they say of a detection; "missed" is said of an object.
ERRORS = {
    "classification": "in place, of another class than the object",
    "localization": "of the right class, out of place",
    "both": "out of place and of another class",
    "duplicate": "of an object that has a detection of a higher score",
    "background": "where no object is",
    "missed": "an object without a detection, a misplaced or a misclassified one",
}
# IoU from which on a detection is in place, and below which it is on background (TIDE, section 2.2).
FOREGROUND, BACKGROUND = 0.5, 0.1
# The longer side of a picture in the page, in pixels, and its quality (0-100).
SIDE, QUALITY = 320, 80


class Found(NamedTuple):
    """What became of one detection: "correct", "ignored" or a key of ERRORS; with which object (its index, or
    None) it has the IoU that decided."""

    kind: str
    target: int | None
    iou: float


def assign(boxes, classes, scores, objects, object_classes, ignored, ignored_classes):
    """Give every detection of an image its error type, and every object its fate, as TIDE does.

    Detections are matched by falling score, each to the free object of its class of the highest IoU, from
    FOREGROUND on. One that matches none, but lies mostly on an ignored object of its class, is ignored.

    Args:
        boxes (Boxes), classes (Tensor), scores (Tensor): N detections; classes are int, scores 0-1.
        objects (Boxes), object_classes (Tensor): M objects of the ground truth.
        ignored (Boxes), ignored_classes (Tensor): objects that count neither way: crowds, difficult ones.

    Returns:
        list[Found], list[str]: of the N detections; of the M objects: "matched", "covered" (by a
        classification or localization error) or "missed".
    """
    overlap = pairwise_iou(boxes, objects)
    same = classes[:, None] == object_classes[None, :]
    same_iou, other_iou = overlap * same, overlap * ~same
    on_ignored = pairwise_ioa(ignored, boxes).T * (classes[:, None] == ignored_classes[None, :])
    fates = ["missed"] * len(objects)
    found = [None] * len(boxes)
    free = same_iou.clone()
    for i in scores.argsort(descending=True, stable=True).tolist():
        iou, target = _best(free[i])
        if iou >= FOREGROUND:
            found[i], fates[target], free[:, target] = Found("correct", target, iou), "matched", 0.0
        elif _best(on_ignored[i])[0] > FOREGROUND:
            found[i] = Found("ignored", None, 0.0)
    for i in range(len(boxes)):
        if found[i] is None:
            found[i] = _error(same_iou[i], other_iou[i])
            kind, target, _ = found[i]
            if kind in ("classification", "localization") and fates[target] == "missed":
                fates[target] = "covered"
    return found, fates


def _error(same_iou, other_iou):
    """A detection's error by its IoU with the objects of its class and with others, in TIDE's order."""
    (iou, target), (other, wrong) = _best(same_iou), _best(other_iou)
    if BACKGROUND <= iou < FOREGROUND:
        return Found("localization", target, iou)
    if other >= FOREGROUND:
        return Found("classification", wrong, other)
    if iou >= FOREGROUND:
        return Found("duplicate", target, iou)
    if other >= BACKGROUND:
        return Found("both", wrong, other)
    return max(Found("background", target, iou), Found("background", wrong, other), key=lambda f: f.iou)


def _best(ious):
    """The highest of some IoUs and its index; 0 and None where there is none."""
    if not len(ious) or ious.max() == 0:
        return 0.0, None
    return float(ious.max()), int(ious.argmax())


def ground_truth(record, metadata):
    """The objects of an image, and those that do not count.

    Args:
        record (dict): in Detectron2's data set format.
        metadata (Metadata): of the data set. For VOC the annotation file is read, because records do not say
            which objects are difficult.

    Returns:
        list[tuple[list, int, bool]]: box (x0, y0, x1, y1 in pixels), class, whether it is to be ignored.
    """
    if metadata.get("evaluator_type") == "pascal_voc" and metadata.get("dirname"):
        path = os.path.join(metadata.dirname, "Annotations", f"{record['image_id']}.xml")
        classes = list(metadata.thing_classes)
        # From 0 and with exclusive ends, as data/voc.py has it.
        return [
            ([o.box[0] - 1, o.box[1] - 1, *o.box[2:]], classes.index(o.name), o.difficult)
            for o in read_annotation(path)[2]
        ]
    return [
        (
            BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS),
            a["category_id"],
            bool(a.get("iscrowd")),
        )
        for a in record.get("annotations", ())
    ]


def picture(image, name, objects, instances, class_names):
    """All that the page shows of one image.

    Args:
        image (ndarray): H x W x 3, BGR, 0-255.
        name (str): shown with it.
        objects (list): from :func:`ground_truth`.
        instances (Instances): what was detected, on the CPU.
        class_names (Sequence[str]): by class.

    Returns:
        dict: name, width, height, image (a data URI), errors (a Counter by type) and boxes, large ones first.
    """
    counted = [o for o in objects if not o[2]]
    ignored = [o for o in objects if o[2]]
    scores, classes = instances.scores, instances.pred_classes
    found, fates = assign(instances.pred_boxes, classes, scores, *_columns(counted), *_columns(ignored))
    shown = [_box(box, "truth", "ignored", class_names[c]) for box, c, _ in ignored]
    for (box, c, _), fate in zip(counted, fates, strict=True):
        shown.append(_box(box, "truth", fate, class_names[c]))
    for box, c, score, (kind, target, iou) in zip(
        instances.pred_boxes.tensor.tolist(), classes.tolist(), scores.tolist(), found, strict=True
    ):
        overlap = "" if target is None else f", IoU {iou:.2f} with {class_names[counted[target][1]]}"
        label = f"{class_names[c]} {score:.2f}"
        shown.append(_box(box, "detection", kind, label, overlap))
    errors = Counter(f.kind for f in found if f.kind in ERRORS)
    errors["missed"] = fates.count("missed")
    height, width = image.shape[:2]
    boxes = sorted(shown, key=lambda b: -b["width"] * b["height"])
    return {
        "name": name,
        "width": width,
        "height": height,
        "image": _data_uri(image),
        "errors": errors,
        "correct": fates.count("matched"),
        "objects": len(counted),
        "boxes": boxes,
    }


def _columns(objects):
    """Boxes and classes of some objects."""
    boxes = torch.tensor([box for box, *_ in objects], dtype=torch.float32).reshape(-1, 4)
    return Boxes(boxes), torch.tensor([c for _, c, _ in objects], dtype=torch.int64)


def _box(box, role, kind, label, overlap=""):
    x0, y0, x1, y1 = (round(float(v), 1) for v in box)
    place = {"x": x0, "y": y0, "width": round(x1 - x0, 1), "height": round(y1 - y0, 1)}
    return {**place, "role": role, "kind": kind, "label": label, "info": f"{label}{overlap}: {kind}"}


def _data_uri(image):
    """A BGR image as WebP of at most SIDE pixels."""
    scale = min(1.0, SIDE / max(image.shape[:2]))
    if scale < 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    encoded = cv2.imencode(".webp", image, [cv2.IMWRITE_WEBP_QUALITY, QUALITY])[1]
    return "data:image/webp;base64," + base64.b64encode(encoded).decode()


def page(pictures, **facts):
    """The HTML of the page, worst image first; it loads nothing from anywhere.

    Args:
        pictures (list[dict]): from :func:`picture`.
        facts (str or number): title, weights, data, total (its number of images) and threshold.
    """
    environment = Environment(
        loader=FileSystemLoader(os.path.dirname(__file__)), autoescape=True, undefined=StrictUndefined
    )
    totals = Counter()
    for p in pictures:
        totals.update(p["errors"])
    return environment.get_template("gallery.html.j2").render(
        pictures=sorted(pictures, key=lambda p: -p["errors"].total()),
        correct=sum(p["correct"] for p in pictures),
        objects=sum(p["objects"] for p in pictures),
        totals=totals,
        errors=ERRORS,
        foreground=FOREGROUND,
        background=BACKGROUND,
        **facts,
    )


def write_gallery(cfg, weights, folder, *, data=None, images=60, threshold=0.5):
    """Run a detector on images of a data set and write the page.

    Args:
        cfg (CfgNode): the model's config, as :func:`rethink_d2.recipe.load` returns it; it stays as it is.
        weights (str): a checkpoint of this project or of Detectron2.
        folder (str): where the page is written, named like the weights; made if needed. The report links
            the pages in its folder ``gallery``.
        data (str or None): a registered data set with ground truth; None for the first of DATASETS.TEST.
        images (int): how many, spread evenly over the data set.
        threshold (float): lowest score of a detection that is looked at, 0-1.

    Returns:
        str: the page's path.

    Raises:
        ValueError: weights, data or model do not exist or do not fit each other; names the key or file.
    """
    cfg = cfg.clone()
    cfg.defrost()
    if images < 1:
        raise ValueError(f"--images {images}: must be at least 1")
    if cfg.MODEL.META_ARCHITECTURE == "Classifier":
        raise ValueError("MODEL.META_ARCHITECTURE: Classifier detects nothing; give a detector's config")
    if not (data or cfg.DATASETS.TEST):
        raise ValueError("DATASETS.TEST names no data set; give --data NAME")
    name = data or cfg.DATASETS.TEST[0]
    cfg.DATASETS.TEST, cfg.MODEL.WEIGHTS = (name,), weights
    fall_back_to_cpu(cfg)
    wrong = [p for p in recipe.check(cfg) if p.level == "error" and p.key in recipe.EVALUATION_KEYS]
    if wrong:
        raise ValueError("; ".join(map(str, wrong)))
    records, metadata = DatasetCatalog.get(name), MetadataCatalog.get(name)
    if not any("annotations" in record for record in records):
        raise ValueError(f"DATASETS.TEST: {name} has no ground truth to compare with; give another --data")
    cfg.MODEL.WEIGHTS = ""  # Detectron2 would load it in its own, unsafe way
    predictor = DefaultPredictor(cfg)
    SafeCheckpointer(predictor.model).load(weights)
    pictures = []
    chosen = range(len(records)) if images >= len(records) else range(images)
    for i in chosen:
        record = records[i * len(records) // len(chosen)]
        try:
            image = detection_utils.read_image(record["file_name"], format="BGR")
        except OSError as e:
            raise ValueError(f"{record['file_name']} cannot be read: {e}") from e
        instances = predictor(image)["instances"].to("cpu")
        instances = instances[instances.scores > threshold]
        label = os.path.basename(record["file_name"])
        objects = ground_truth(record, metadata)
        pictures.append(picture(image, label, objects, instances, metadata.thing_classes))
    # run id, seed and checkpoint, as the folders of a sweep are named
    title = re.sub(r"[^\w.-]+", "_", "-".join(os.path.abspath(weights).split(os.sep)[-3:]))
    path = os.path.join(folder, f"{title.removesuffix('.pth')}.html")
    facts = {"weights": weights, "data": name, "total": len(records), "threshold": threshold}
    write_atomically(path, page(pictures, title=title, **facts))
    return path


def cli(argv=None):
    """The command line.

    Returns:
        int: 0, or 2 where an argument or a file is wrong.
    """
    parser = argparse.ArgumentParser(description="A page of detections beside ground truth, by error type.")
    parser.add_argument("--config-file", required=True, help="the model's config")
    parser.add_argument("--weights", required=True, help="a checkpoint of this project or of Detectron2")
    parser.add_argument("--data", help="a registered data set (default: the first of DATASETS.TEST)")
    parser.add_argument("--images", type=int, default=60, help="how many, spread over the data set")
    parser.add_argument("--threshold", type=float, default=0.5, help="lowest score looked at (0-1)")
    parser.add_argument("--output", default="output/report/gallery", help="folder for the page")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
    args = parser.parse_args(argv)
    try:
        cfg = recipe.load(args.config_file, args.opts)
        path = write_gallery(
            cfg,
            args.weights,
            args.output,
            data=args.data,
            images=args.images,
            threshold=args.threshold,
        )
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(f"{path}: {os.path.getsize(path) / 1e6:.1f} MB")
    print("The report links it when it is made again: python -m rethink_d2.report OUT")
    return 0


if __name__ == "__main__":
    sys.exit(cli())
