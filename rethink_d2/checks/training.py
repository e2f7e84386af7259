"""Rules about the training: schedule, rate, batch, data, disk."""

import importlib.util
import os
import shutil
from operator import attrgetter

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..data.classification import class_names
from ..data.files import data_paths, is_generated, missing_files, remedy
from ..data.loader import other_classes
from ..disk import checkpoint_bytes, checkpoints_kept
from ..modeling.pooler import fast_poolers
from ..solver.schedule import parse
from ..spelling import nearest
from .problem import Problem

# Keys with few values, and why no others.
CHOICES = {
    "DATALOADER.ON_BAD_IMAGE": (["stop", "skip"], ""),
    "DATALOADER.SAMPLER_TRAIN": (["TrainingSampler"], " (the loader has its own order, data/order.py)"),
    "SOLVER.ACCELERATE.SGD": (["", "foreach", "fused"], ""),
    "SOLVER.AMP.DTYPE": (["", "float16", "bfloat16"], ""),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": (["value", "norm", "full_model"], ""),
}
# engine/writers.py builds these.
WRITERS = ["tensorboard", "wandb"]


def _schedule(s):
    solver = s.cfg.SOLVER
    if solver.SCHEDULE:
        try:
            parse(solver.SCHEDULE, solver.IMS_PER_BATCH, solver.ONE_X)
        except ValueError as e:
            yield Problem("SOLVER.SCHEDULE", str(e), 'write e.g. "6x", "220k" or "300"')
            return
    key = "SOLVER.SCHEDULE" if solver.SCHEDULE else "SOLVER.STEPS"
    steps = solver.STEPS
    if solver.MAX_ITER <= 0:
        yield Problem(
            "SOLVER.MAX_ITER", f"{solver.MAX_ITER} leaves nothing to train", "set a positive length"
        )
    elif any(not 0 < step < solver.MAX_ITER for step in steps):
        what = f"SOLVER.STEPS {solver.STEPS} must lie between 0 and SOLVER.MAX_ITER {solver.MAX_ITER}"
        yield Problem(key, what, "drop the rate inside the run, or set SOLVER.SCHEDULE")
    if any(a >= b for a, b in zip(steps, steps[1:], strict=False)):
        yield Problem(key, f"SOLVER.STEPS {steps} must increase", "sort them")


def _rate(s):
    solver, train = s.cfg.SOLVER, s.cfg.DATASETS.TRAIN
    if not s.detector or (train and all(map(is_generated, train))):
        return
    want = 0.02 * solver.IMS_PER_BATCH / 16
    if abs(solver.BASE_LR - want) > 0.01 * want:
        yield Problem(
            "SOLVER.BASE_LR",
            f"{solver.BASE_LR:g} is not 0.02 per 16 images, the paper's rate (section 4), at "
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH}",
            f"set SOLVER.BASE_LR {want:g} (linear scaling), or keep it if it was searched for",
            "warning",
        )


def _batch(s):
    solver = s.cfg.SOLVER
    images = s.group * s.world_size
    if solver.IMS_PER_BATCH <= 0 or solver.IMS_PER_BATCH % images:
        yield Problem(
            "SOLVER.IMS_PER_BATCH",
            f"{solver.IMS_PER_BATCH} cannot be split into groups of {s.group} images (SOLVER.IMS_PER_GROUP) "
            f"on {s.world_size} processes",
            f"use a multiple of {images}, or another number of processes",
        )
    if s.cfg.SEED < 0:
        yield Problem("SEED", f"{s.cfg.SEED} means an unrecorded random seed", "set SEED 1, or any from 0 up")


def _choices(s):
    for key, (values, why) in CHOICES.items():
        if (value := attrgetter(key)(s.cfg)) not in values:
            yield Problem(key, f"{value!r} is not one of {values}{why}{nearest(value, values)}", "correct it")


def _poolers(s):
    wanted = s.cfg.SOLVER.ACCELERATE.ROI_ALIGN and s.model is not None
    if wanted and not any(fast_poolers(module) for module in s.model.modules()):
        keys = [f"MODEL.{head}.POOLER_SAMPLING_RATIO" for head in ("ROI_BOX_HEAD", "ROI_MASK_HEAD")]
        yield Problem(
            "SOLVER.ACCELERATE.ROI_ALIGN",
            f"the model has no ROIAlign pooler with a positive {keys[0]}, and others are not made faster",
            f"set it to False, or {' and '.join(f'{key} 2' for key in keys)}",
        )


def _writers(s):
    writers, key = s.cfg.LOG.WRITERS, "LOG.WRITERS"
    for name in writers:
        if name not in WRITERS:
            yield Problem(key, f"{name!r} is not one of {WRITERS}{nearest(str(name), WRITERS)}", "correct it")
    if "wandb" in writers and importlib.util.find_spec("wandb") is None:
        yield Problem(key, "the package wandb is not installed", "pip install wandb, or leave it out")
    if s.cfg.VIS_PERIOD > 0 and "tensorboard" not in writers:
        what = "Detectron2's pictures every VIS_PERIOD iterations would pile up in memory"
        yield Problem(key, f"{what} without tensorboard, which takes them", "add it, or set VIS_PERIOD 0")


def _classification(s):
    inputs = s.cfg.INPUT
    if s.cfg.MODEL.META_ARCHITECTURE != "Classifier":
        return
    if inputs.MAPPER == "CountingMapper":
        what = f"{inputs.MAPPER} reads images for detection, not with their classes"
        yield Problem("INPUT.MAPPER", what, 'set INPUT.MAPPER "ClassificationMapper"')
    if 0 < inputs.MIN_SIZE_TEST < inputs.CLASSIFICATION.CROP_SIZE:
        yield Problem(
            "INPUT.MIN_SIZE_TEST",
            f"{inputs.MIN_SIZE_TEST} is smaller than INPUT.CLASSIFICATION.CROP_SIZE, which is cut out of it",
            f"set INPUT.MIN_SIZE_TEST {inputs.CLASSIFICATION.CROP_SIZE} or more",
        )


def _disk(s):
    if s.model is None:
        return
    folder = os.path.abspath(s.cfg.OUTPUT_DIR)
    there = 0
    if os.path.isdir(folder):
        there = sum(e.stat().st_size for e in os.scandir(folder) if e.name.endswith(".pth"))
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    kept, size = checkpoints_kept(s.cfg), checkpoint_bytes(s.model)
    # One more is written before an older one goes.
    need, free = (kept + 1) * size - there, shutil.disk_usage(folder).free
    if need > free:
        yield Problem(
            "OUTPUT_DIR",
            f"{kept} checkpoints of {size / 1e6:,.0f} MB do not fit, {folder} has {free / 1e9:,.1f} GB free",
            "free space, set another OUTPUT_DIR, or keep only the newest with SOLVER.CHECKPOINT_KEEP 3",
        )


def _data_sets(s):
    registered = DatasetCatalog.list()
    for key in ("TRAIN", "TEST"):
        names = s.cfg.DATASETS[key]
        if key == "TRAIN" and not names:
            yield Problem("DATASETS.TRAIN", "nothing to train on", "name at least one data set")
        if key == "TRAIN" and (differ := other_classes([name for name in names if name in registered])):
            yield Problem("DATASETS.TRAIN", differ, "train on sets with the same classes in the same order")
        for name in names:
            if name not in registered:
                what = f"{name} is not registered{nearest(name, registered)}"
                yield Problem(f"DATASETS.{key}", what, "correct the name, or register it before training")
            else:
                yield from _data_set(s, f"DATASETS.{key}", name)


def _data_set(s, key, name):
    meta = MetadataCatalog.get(name)
    missing, split = missing_files(name), data_paths(name)[1]
    if missing:
        root = os.environ.get("DETECTRON2_DATASETS")
        yield Problem(
            key,
            f"{name} is not on this machine: tried {', '.join(missing)} (DETECTRON2_DATASETS is "
            f"{root or 'not set, so ./datasets counts'})",
            remedy(name),
        )
    elif split and key == "DATASETS.TRAIN":
        with PathManager.open(split) as f:
            if not f.read().split():
                yield Problem(key, f"{name} has no images: {split} is empty", "take another data set")
    arch = s.cfg.MODEL.META_ARCHITECTURE
    group = {
        "GeneralizedRCNN": "ROI_HEADS",
        "PanopticFPN": "ROI_HEADS",
        "RetinaNet": "RETINANET",
        "Classifier": "CLASSIFIER",
    }.get(arch)
    classes = meta.get("thing_classes")
    if meta.get("evaluator_type") == "classification" and not missing:
        classes = class_names(name)
    if group and classes and s.cfg.MODEL[group].NUM_CLASSES != len(classes):
        yield Problem(
            f"MODEL.{group}.NUM_CLASSES",
            f"{s.cfg.MODEL[group].NUM_CLASSES}, but {name} has {len(classes)} classes",
            f"set MODEL.{group}.NUM_CLASSES {len(classes)}",
        )


RULES = (_schedule, _rate, _batch, _choices, _poolers, _writers, _classification, _data_sets, _disk)
