"""Test-time augmentation, per image, against Detectron2's for the same views.

Both by Detectron2's rule: NMS in each view, no voting. Detectron2's passes hold two views here, an image and
its mirror image. By default they hold three: of several sizes, most views are then padded to the size of
another, which changes what is detected under group norm, so that those detections are not compared. The
weights are random, with predictors that detect as much as TEST.DETECTIONS_PER_IMAGE allows.
"""

import statistics

import torch
from detectron2.data import detection_utils
from detectron2.modeling import GeneralizedRCNNWithTTA
from torch import nn

from ..engine.trainer import build_initialized_model
from ..modeling.tta import RCNNWithTTA
from . import _models
from .common import Result, compare, peak_memory, use_threads

# Shorter sides of the views, those that a CPU gets through; the mini model is made for small images.
SIZES = {"mini": (128, 160, 192, 224), "R50": (240, 320, 400)}
LONGEST = 4  # times the shorter side: no image is that long
# Of two sides: pixels, scores, and parts of all pixels of masks.
BOXES_DIFFER, SCORES_DIFFER, MASKS_DIFFER = 0.05, 1e-4, 1e-3


def add_arguments(parser):
    """The benchmark's own arguments."""
    parser.add_argument("--dataset", default="coco_2017_val", help="whose images are looked at")
    parser.add_argument("--models", nargs="+", default=list(_models.MODELS), choices=_models.MODELS)
    parser.add_argument("--sizes", type=int, nargs="+", help="shorter sides of the views (default: by model)")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")


def run(args):
    """Compare detections, then time images in turn.

    Returns:
        list[Result]: seconds per image, and MB of peak memory.

    Raises:
        RuntimeError: detections that differ.
    """
    with use_threads(args.threads):
        return [result for model in args.models for result in _run(model, args)]


def _run(name, args):
    sizes = args.sizes or SIZES[name]
    samples = _samples(name, args.dataset, args.images)
    sides = {side: build(side, name, args.dataset, sizes) for side in ("ours", "twos", "threes")}
    same = ("twos", "threes") if len(sizes) == 1 else ("twos",)  # views of one size are not padded
    expected = [detect(sides["ours"], s) for s in samples]
    for side in same:
        detected = assert_equal(expected, [detect(sides[side], s) for s in samples])
    whole = [lambda model=model: [detect(model, s) for s in samples] for model in sides.values()]
    times = compare(*whole, repeats=args.repeats)
    ours, twos, threes = ([seconds / len(samples) for seconds in side] for side in times)
    what = f"{name} with {2 * len(sizes)} views"
    equal = f"detections equal, {detected:.0f} per image"
    note = f"shorter sides {', '.join(map(str, sizes))}; {equal}"
    default = f"as by default; {equal if 'threes' in same else 'pads, so detects other'}"
    results = [
        Result(what, "Detectron2, passes of 2", ours, twos, note=note),
        Result(what, "Detectron2, passes of 3", ours, threes, note=default),
    ]
    if not args.no_memory:
        peaks = ([peak_memory(_once, side, name, args, sizes)] for side in ("ours", "twos"))
        results.append(Result(f"{what}: peak memory", "Detectron2, passes of 2", *peaks, "MB"))
    return results


def _once(side, name, args, sizes):
    with use_threads(args.threads):
        model = build(side, name, args.dataset, sizes)
        for sample in _samples(name, args.dataset, args.images):
            detect(model, sample)


def _samples(name, dataset, count):
    records = [r for r in _models.records(dataset) if r["annotations"]][:count]
    samples = []
    for record in records:
        pixels = detection_utils.read_image(record["file_name"], "BGR")
        image = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
        samples.append({"image": image, "height": pixels.shape[0], "width": pixels.shape[1]})
    return samples


def build(side, name, dataset, sizes):
    """A model with test-time augmentation.

    Args:
        side (str): "ours", or "twos" or "threes" for Detectron2's in passes of so many views.
        name (str): one of :data:`_models.MODELS`.
        dataset (str): whose classes it has.
        sizes (list[int]): shorter sides of the views.

    Returns:
        nn.Module
    """
    first, *others = sizes if side == "ours" else (None, *sizes)
    longest = LONGEST * max(sizes)
    own = {"INPUT__MIN_SIZE_TEST": first, "TEST__AUG__BOX_VOTE_THRESH": 0.0} if side == "ours" else {}
    cfg = _models.config(
        name,
        dataset,
        (320, 480),
        "",
        INPUT__MAX_SIZE_TEST=longest,
        TEST__AUG__MIN_SIZES=tuple(others),
        TEST__AUG__MAX_SIZE=longest,
        TEST__AUG__NMS_PER_VIEW=True,
        TEST__AUG__IMS_PER_BATCH=2,
        **own,
    )
    model = build_initialized_model(cfg)
    torch.manual_seed(0)
    nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.3)
    nn.init.normal_(model.roi_heads.box_predictor.bbox_pred.weight, std=0.05)
    if side == "ours":
        return RCNNWithTTA(cfg, model).eval()
    return GeneralizedRCNNWithTTA(cfg, model, batch_size=2 if side == "twos" else 3).eval()


@torch.no_grad()
def detect(model, sample):
    """The detections of one sample (Instances)."""
    return model([sample])[0]["instances"]


def assert_equal(ours, theirs):
    """Compare detections, one Instances for each image.

    Returns:
        float: how many there are per image.

    Raises:
        RuntimeError: they differ.
    """
    for a, b in zip(ours, theirs, strict=True):
        if a.pred_classes.tolist() != b.pred_classes.tolist():
            raise RuntimeError("other detections than Detectron2's")
        boxes = (a.pred_boxes.tensor - b.pred_boxes.tensor).abs().max()
        scores = (a.scores - b.scores).abs().max()
        masks = (a.pred_masks != b.pred_masks).float().mean()
        if boxes > BOXES_DIFFER or scores > SCORES_DIFFER or masks > MASKS_DIFFER:
            raise RuntimeError(
                f"boxes differ from Detectron2's by {boxes:.2g} pixels, scores by {scores:.2g}, masks in a "
                f"part of {masks:.2g}"
            )
    return statistics.mean(map(len, ours))
