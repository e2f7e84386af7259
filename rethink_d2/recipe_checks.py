"""What can be known to be wrong before the first iteration, each with the key to change.

Every rule is a generator of :class:`Problem`; :func:`check` runs them all, so one look shows everything.
"""

import difflib
import os
from dataclasses import dataclass
from operator import attrgetter

from detectron2.checkpoint.catalog import ModelCatalog
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from .data.classification import class_names
from .data.files import data_paths, is_generated, missing_files, remedy
from .modeling import INITIALIZATION_REGISTRY
from .modeling.inspection import NORM_KEYS, build_meta, norms
from .modeling.weights import known_weights
from .solver.schedule import parse

# Fewer images than this make batch statistics too noisy to train detectors on.
MIN_SYNCBN_IMAGES = 8
# The parts that a backbone without its neck can be.
BODY = ("backbone", "backbone.bottom_up")
DETECTORS = ("GeneralizedRCNN", "ProposalNetwork", "RetinaNet", "PanopticFPN")
# Keys with few values, and why no others.
CHOICES = {
    "DATALOADER.ON_BAD_IMAGE": (["stop", "skip"], ""),
    "DATALOADER.SAMPLER_TRAIN": (["TrainingSampler"], " (the loader has its own order, data/order.py)"),
    "SOLVER.AMP.DTYPE": (["", "float16", "bfloat16"], ""),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": (["value", "norm", "full_model"], ""),
}


@dataclass(frozen=True)
class Problem:
    """One thing that does not belong together.

    Attributes:
        key (str): the config key to look at.
        message (str): what is wrong.
        cure (str): what to do about it.
        level (str): "error" or "warning".
    """

    key: str
    message: str
    cure: str
    level: str = "error"

    def __str__(self):
        return " ".join(f"{self.key}: {self.message}; {self.cure}".split())


def nearest(name, names):
    """Suggest what was probably meant.

    Args:
        name (str): a name that does not exist.
        names (Collection[str]): those that do.

    Returns:
        str: "; did you mean ...?", or "" when nothing is close.
    """
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    if not close:
        # A right last part under a wrong path (SOLVER.FREEZE_AT) is as telling as a close spelling.
        last = name.rsplit(".", 1)[-1]
        close = [n for n in names if n.rsplit(".", 1)[-1] == last][:1]
    return f"; did you mean {close[0]}?" if close else ""


@dataclass(frozen=True)
class Subject:
    """What the rules look at: the config, the processes, and the norms of the model it builds."""

    cfg: object
    world_size: int
    parts: dict

    @property
    def group(self):
        """Images per pass of one process, for a config that is not resolved too."""
        solver = self.cfg.SOLVER
        return solver.IMS_PER_GROUP or max(1, solver.IMS_PER_BATCH // self.world_size)

    @property
    def scratch(self):
        """Whether training starts from no weights."""
        return self.cfg.MODEL.WEIGHTS == ""

    @property
    def detector(self):
        """Whether the model is a detector, not an image classifier."""
        return self.cfg.MODEL.META_ARCHITECTURE in DETECTORS

    @property
    def body(self):
        """The kinds of normalization in the backbone without its neck."""
        return set().union(*(self.parts.get(part, ()) for part in BODY))

    @property
    def body_group(self):
        """The config group below MODEL that describes the backbone without its neck."""
        return "VGG" if "vgg" in self.cfg.MODEL.BACKBONE.NAME else "RESNETS"

    def norm_key(self, part):
        """The key that sets the normalization of a part of the model."""
        return f"MODEL.{self.body_group}.NORM" if part in BODY else NORM_KEYS.get(part, "MODEL")


def _frozen_start(s):
    at = s.cfg.MODEL.BACKBONE.FREEZE_AT
    if s.scratch and at > 0:
        cost = "R50 36.2 instead of 39.5, R101 37.5 instead of 41.0, Detectron's GN model zoo page"
        cost = f" (costs box AP at 3x: {cost})" if s.detector else ""
        yield Problem(
            "MODEL.BACKBONE.FREEZE_AT",
            f"{at} keeps the first stages at their random values, because MODEL.WEIGHTS is empty{cost}",
            "set MODEL.BACKBONE.FREEZE_AT 0",
        )


def _scratch_norm(s):
    if not s.scratch:
        return
    for part, kinds in s.parts.items():
        key = s.norm_key(part)
        # FREEZE_AT makes FrozenBN of any batch norm; its own rule says so.
        named = part not in BODY or s.cfg.MODEL[s.body_group].NORM == "FrozenBN"
        if kinds["FrozenBN"] and (named or s.cfg.MODEL.BACKBONE.FREEZE_AT == 0):
            what = "frozen batch norm normalizes nothing without the statistics of MODEL.WEIGHTS"
        elif kinds["BN"] and s.detector:
            what = "batch norm over one process's few images does not train a detector without MODEL.WEIGHTS"
        else:
            continue
        yield Problem(key, f"{part}: {what}", f'set {key} "GN" (or a synchronized batch norm)')


def _syncbn_batch(s):
    images = s.group * s.world_size
    if images >= MIN_SYNCBN_IMAGES:
        return
    for part, kinds in s.parts.items():
        if any("SyncBN" in kind for kind in kinds):
            key = s.norm_key(part)
            yield Problem(
                "SOLVER.IMS_PER_GROUP",
                f"{key} is a synchronized batch norm, but its statistics would come from only {images} "
                f"images ({s.group} x {s.world_size} processes), fewer than {MIN_SYNCBN_IMAGES}",
                f"raise SOLVER.IMS_PER_BATCH (now {s.cfg.SOLVER.IMS_PER_BATCH}), leave SOLVER.IMS_PER_GROUP "
                '0, use more processes, or take "GN"',
            )
            return


def _widths(s):
    m = s.cfg.MODEL
    body = {"MODEL.RESNETS.STEM_OUT_CHANNELS": m.RESNETS.STEM_OUT_CHANNELS}
    body["MODEL.RESNETS.RES2_OUT_CHANNELS"] = m.RESNETS.RES2_OUT_CHANNELS
    if m.RESNETS.DEPTH > 34:
        body["MODEL.RESNETS.WIDTH_PER_GROUP"] = m.RESNETS.NUM_GROUPS * m.RESNETS.WIDTH_PER_GROUP
    heads = ("MODEL.ROI_BOX_HEAD", m.ROI_BOX_HEAD), ("MODEL.ROI_MASK_HEAD", m.ROI_MASK_HEAD)
    groups = [(m.RESNETS.NORM, body if "resnet" in m.BACKBONE.NAME else {})]
    if s.detector:
        groups.append((m.FPN.NORM, {"MODEL.FPN.OUT_CHANNELS": m.FPN.OUT_CHANNELS}))
        groups += [(node.NORM, {f"{key}.CONV_DIM": node.CONV_DIM}) for key, node in heads]
    for norm, widths in groups:
        for key, width in widths.items():
            if norm == "GN" and width % 32:
                yield Problem(
                    key,
                    f"{width} channels cannot be split into group norm's 32 groups",
                    "use a multiple of 32",
                )


def _weights(s):
    name = s.cfg.MODEL.WEIGHTS
    if s.scratch:
        return
    path = name.split("?")[0]
    if "://" not in path:
        if not PathManager.isfile(path):
            hint = f' (or did you mean "catalog://{path}"?)' if path.startswith("ImageNetPretrained/") else ""
            yield Problem(
                "MODEL.WEIGHTS", f"there is no file {os.path.abspath(path)}", f"correct the path{hint}"
            )
    elif path.startswith("catalog://"):
        try:
            ModelCatalog.get(path.removeprefix("catalog://"))
        except (KeyError, RuntimeError):
            names = [f"catalog://ImageNetPretrained/{n}" for n in ModelCatalog.C2_IMAGENET_MODELS]
            yield Problem(
                "MODEL.WEIGHTS", f"{path} is not in Detectron2's catalog{nearest(path, names)}", "correct it"
            )
    known = known_weights(name)
    if known is None or not s.body:
        return
    if not s.body <= set(known.fits):
        key = s.norm_key("backbone")
        yield Problem(
            key,
            f"{name} {known.holds}, but the backbone is normalized by {', '.join(sorted(s.body))}",
            f"set {key} to one of {', '.join(known.fits)}, or take other MODEL.WEIGHTS",
        )
    if s.body_group != "RESNETS" or known.stride_in_1x1 is None:
        return
    if s.cfg.MODEL.RESNETS.STRIDE_IN_1X1 != known.stride_in_1x1:
        yield Problem(
            "MODEL.RESNETS.STRIDE_IN_1X1",
            f"{name} was trained with {known.stride_in_1x1}",
            f"set MODEL.RESNETS.STRIDE_IN_1X1 {known.stride_in_1x1}",
            "warning",
        )


def _pixels(s):
    model, form = s.cfg.MODEL, s.cfg.INPUT.FORMAT
    mean, std = list(model.PIXEL_MEAN), list(model.PIXEL_STD)
    known = known_weights(model.WEIGHTS)
    if known is not None:
        for key, is_, want, slack in (
            ("INPUT.FORMAT", form, known.format, None),
            ("MODEL.PIXEL_MEAN", mean, known.mean, 2.0),
            ("MODEL.PIXEL_STD", std, known.std, 0.5),
        ):
            # Loose, because Detectron and Detectron2 round the same means differently.
            near = (
                slack and len(is_) == 3 and all(abs(a - b) <= slack for a, b in zip(is_, want, strict=True))
            )
            fits = near or is_ == want
            if not fits:
                yield Problem(key, f"{is_} is not what {model.WEIGHTS} was trained on", f"set {key} {want}")
    elif len(mean) == 3 and min(mean) > 50 and form in ("BGR", "RGB") and mean[0] != mean[2]:
        # Blue is the darkest channel of ImageNet and COCO, red the brightest.
        if (mean[0] < mean[2]) != (form == "BGR"):
            yield Problem(
                "MODEL.PIXEL_MEAN",
                f"{mean} is in the order of the other format than INPUT.FORMAT {form}",
                f"reverse MODEL.PIXEL_MEAN to {mean[::-1]} (and MODEL.PIXEL_STD with it)",
                "warning",
            )


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


def _policy(s):
    policy = s.cfg.MODEL.INIT.POLICY
    if policy and policy not in INITIALIZATION_REGISTRY:
        names = [name for name, _ in INITIALIZATION_REGISTRY]
        what = f"{policy!r} is unknown{nearest(policy, names)}"
        yield Problem("MODEL.INIT.POLICY", what, f"use one of {', '.join(names)}, or '' for Detectron2's own")


def _data_sets(s):
    registered = DatasetCatalog.list()
    for key in ("TRAIN", "TEST"):
        names = s.cfg.DATASETS[key]
        if key == "TRAIN" and not names:
            yield Problem("DATASETS.TRAIN", "nothing to train on", "name at least one data set")
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


MODEL_RULES = (_frozen_start, _scratch_norm, _syncbn_batch, _widths, _weights, _pixels, _policy)
TRAINING_RULES = (_schedule, _rate, _batch, _choices, _classification, _data_sets)


def check(cfg, world_size=1):
    """Say what in a recipe does not belong together.

    Args:
        cfg (CfgNode): a resolved config; a rule that cannot judge another one says so.
        world_size (int): number of processes that share the batch.

    Returns:
        list[Problem]: errors first; empty when nothing is wrong. Raises nothing.
    """
    problems, parts = [], {}
    try:
        parts = norms(build_meta(cfg))
    except Exception as e:
        what = f"the model cannot be built ({type(e).__name__}: {e})"
        problems.append(Problem("MODEL", what, "correct the keys of the part that it names"))
    subject = Subject(cfg, max(1, world_size), parts)
    for rule in MODEL_RULES + TRAINING_RULES:
        try:
            problems += rule(subject)
        except Exception as e:
            what = f"{rule.__name__.strip('_')} could not be checked ({type(e).__name__}: {e})"
            problems.append(Problem("config", what, "correct the value that it names"))
    return sorted(problems, key=lambda p: p.level != "error")
