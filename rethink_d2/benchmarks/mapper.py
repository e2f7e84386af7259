"""Samples from image files and annotations: FastMapper against Detectron2's DatasetMapper, on one thread."""

import copy
import os
import statistics

import cv2
import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.data.datasets import load_coco_json
from detectron2.structures import PolygonMasks

from ..data import fast_mapper
from .common import Result, compare, use_threads

# What the mask head is trained on: 25% of 512 regions of an image, with targets of 28x28.
TARGETS, TARGET_SIZE = 128, 28


def add_arguments(parser):
    """The benchmark's own arguments."""
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    parser.add_argument("--data-root", default=root, help="holds coco/, as Detectron2 lays it out")
    parser.add_argument("--images", type=int, default=40, help="of val2017, those with objects")
    parser.add_argument("--shorter-side", type=int, default=800, help="of the samples, in pixels")


def run(args):
    """Compare the outputs, then the times, of whole samples and of the steps to them.

    Returns:
        list[Result]: milliseconds per image.

    Raises:
        ValueError: the data root has no COCO.
        RuntimeError: something that has to be equal to Detectron2's is not.
    """
    with use_threads(1):
        instances = _records(args, "instances")
        return [
            _samples("polygons", instances, _config(args, keypoints=False), args.repeats),
            _samples("keypoints", _records(args, "person_keypoints"), _config(args, True), args.repeats),
            *_steps(instances, _config(args, keypoints=False), args.repeats),
        ]


def _records(args, kind):
    path = os.path.join(args.data_root, "coco", "annotations", f"{kind}_val2017.json")
    if not os.path.isfile(path):
        raise ValueError(f"{path} is missing; set --data-root or DETECTRON2_DATASETS to what holds coco/")
    records = load_coco_json(path, os.path.join(args.data_root, "coco", "val2017"))
    return [r for r in records if any(not a["iscrowd"] for a in r["annotations"])][: args.images]


def _config(args, keypoints):
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN = (args.shorter_side,)
    cfg.MODEL.MASK_ON, cfg.MODEL.KEYPOINT_ON = not keypoints, keypoints
    cfg.DATASETS.TRAIN = ("keypoints_coco_2017_train",)  # only for the names of the keypoints
    return cfg


def _samples(task, records, cfg, repeats):
    """Whole samples; both mappers flip the same images."""

    ours, theirs = fast_mapper.FastMapper(cfg, True), DatasetMapper(cfg, True)
    differences = []
    for seed, record in enumerate(records):
        fast, stock = (_seeded(mapper, record, seed) for mapper in (ours, theirs))
        _require(_equal(fast["instances"], stock["instances"]), "annotations")
        pixels = (sample["image"].numpy().reshape(-1) for sample in (fast, stock))
        differences.append(cv2.norm(*pixels, cv2.NORM_L1) / fast["image"].numel())

    def prepare(mapper):
        for seed, record in enumerate(records):
            _seeded(
                mapper, record, seed
            )  # dropped at once, as a loader's worker does: its memory is used again

    times = (lambda: prepare(ours)), (lambda: prepare(theirs))
    result = _result(f"sample with {task}", *times, len(records), repeats)
    rates = [1000 / statistics.median(times) for times in (result.ours, result.theirs)]
    result.note = (
        f"{rates[0]:.0f} against {rates[1]:.0f} images/s; annotations equal; pixels differ by "
        f"{statistics.mean(differences):.2f} grey levels, in the worst image by {max(differences):.2f}"
    )
    return result


def _seeded(mapper, record, seed):
    np.random.seed(seed)
    return mapper(record)


def _steps(records, cfg, repeats):
    """Each step alone; every image is resized and flipped."""
    fast, stock = fast_mapper.FastMapper(cfg, True), DatasetMapper(cfg, True)
    shortest = T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, "choice")
    augmentations = T.AugmentationList([shortest, T.RandomFlip(1.0)])

    def read_fast():
        return [fast_mapper._read(record["file_name"], "BGR")[0] for record in records]

    def read_stock():
        return [utils.read_image(record["file_name"], "BGR") for record in records]

    def resize(kind, images):
        for image in images:
            inputs = kind(image)
            transforms = augmentations(inputs)
            np.ascontiguousarray(inputs.image.transpose(2, 0, 1))
            yield transforms

    def annotate(mapper, copied):
        for record, transforms in zip(records, geometry, strict=True):
            sample = copied(record)
            mapper._transform_annotations(sample, transforms, (transforms[0].new_h, transforms[0].new_w))
            yield sample["instances"]

    def targets(masks):
        return [m.crop_and_resize(b, TARGET_SIZE) for m, b in zip(masks, boxes, strict=True)]

    images = read_fast(), read_stock()
    _require(all(map(np.array_equal, *images)), "pixels of the files")
    geometry = list(resize(T.AugInput, images[1]))
    instances = list(annotate(fast, dict))
    _require(all(map(_equal, instances, annotate(stock, copy.deepcopy))), "annotations")
    masks, boxes = zip(*(_regions(i) for i in instances if len(i)), strict=True)
    slow = [PolygonMasks(m.polygons) for m in masks]
    _require(all(map(torch.equal, targets(masks), targets(slow))), "mask targets")

    steps = {
        "read the file": (read_fast, read_stock),
        "resize and flip": (
            lambda: list(resize(fast_mapper._PlanarInput, images[0])),
            lambda: list(resize(T.AugInput, images[1])),
        ),
        "annotations": (
            lambda: list(annotate(fast, dict)),
            lambda: list(annotate(stock, copy.deepcopy)),  # as each does in a sample
        ),
        f"{TARGETS} mask targets": (lambda: targets(masks), lambda: targets(slow)),
    }
    notes = "equal", "differ by rounding", "equal", f"equal; {TARGET_SIZE}x{TARGET_SIZE}, in training itself"
    return [
        _result(name, *functions, len(records), repeats, note)
        for (name, functions), note in zip(steps.items(), notes, strict=True)
    ]


def _regions(instances):
    """Masks and boxes of regions near an image's objects, as the mask head is trained on."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(instances), (TARGETS,), generator=generator)
    boxes = instances.gt_boxes.tensor[chosen]
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    shift = 0.4 * torch.rand(boxes.shape, generator=generator) - 0.2
    return instances.gt_masks[chosen], boxes + shift * sides


def _equal(ours, theirs):
    """Whether two Instances hold the same boxes, classes, polygons and keypoints."""

    def plain(value):
        if isinstance(value, PolygonMasks):
            return [[polygon.tolist() for polygon in polygons] for polygons in value]
        return getattr(value, "tensor", value).tolist()

    ours, theirs = ours.get_fields(), theirs.get_fields()
    return ours.keys() == theirs.keys() and all(plain(ours[k]) == plain(theirs[k]) for k in theirs)


def _require(equal, what):
    if not equal:
        raise RuntimeError(f"{what} differ from Detectron2's; without that, a time says nothing")


def _result(name, ours, theirs, images, repeats, note=""):
    """Times of two callables which go through so many images, per image."""
    ours, theirs = (
        [s / images * 1000 for s in seconds] for seconds in compare(ours, theirs, repeats=repeats)
    )
    return Result(name, "Detectron2", ours, theirs, "ms", note)
