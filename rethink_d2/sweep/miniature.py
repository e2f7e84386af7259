"""Any of the paper's runs in miniature, for a CPU: the same kind of network and recipe on built-in data.

What makes models and images small is configs/mini/Base-Mask-RCNN-FPN-mini.yaml, and for pre-training
configs/mini/imagenet_R_18_FPN_gn.yaml on top; here are the rules for what these two do not know. A family
keeps what sets it apart: depth, groups, norm, heads, scale augmentation, cascade, little data, length.
"""

import dataclasses
import functools
import math

import yaml
from detectron2.data import DatasetCatalog

from .. import model_zoo, paper, recipe
from ..data.glyphs import KEYPOINT_NAMES, KEYPOINT_OKS_SIGMAS
from ..paper import Run
from ..solver.schedule import ONE_X, REFERENCE_BATCH, parse

__all__ = ["MINI_ONE_X", "mini_options", "pretraining"]

BASE = "mini/Base-Mask-RCNN-FPN-mini.yaml"
PRETRAINING = "mini/imagenet_R_18_FPN_gn.yaml"
PRETRAINING_SYNCBN = "mini/imagenet_R_18_FPN_syncbn.yaml"

# Iterations of 16 images that 1x means, the paper's being 90k: 54 of the mini batch of 8, which the tails'
# thirds and ninths divide.
MINI_ONE_X = 27
# For all, as arms and lengths are to share it; the shortest run first drops at 6 (coco1k-pretrained-15k).
WARMUP_ITERS = 5
# The others keep their rates, also for 8 images. A network without normalization diverges at 0.02 and 0.01.
VGG_RATE = 0.002
DEPTHS = {50: 18, 101: 34, 152: 50}


def mini_options(run: Run, one_x: int = MINI_ONE_X) -> list[str]:
    """The overrides that make a run's config its miniature.

    Args:
        run: any with a config, or what :func:`pretraining` returns.
        one_x: iterations of 16 images that 1x means. Beyond MINI_ONE_X, where comparing arms begins to mean
            something, all 400 held-out images are evaluated every 2/3x: at the first drops and the ends of
            2x, 4x and 6x. Pre-training has one length.

    Returns:
        alternating keys and values, as on the command line. MODEL.WEIGHTS is not among them.
    """
    cfg = _config(run.config)
    options = {**_own(BASE), **_network(cfg)}
    options |= _pretraining(cfg) if run.kind == "pretrain" else _detection(cfg, one_x)
    return [text for key, value in options.items() for text in (key, str(value))]


def pretraining(run: Run) -> Run | None:
    """The pre-training that gives a run its weights in miniature, also where the paper's weights are public.

    Returns:
        a run of the manifest that trains the same backbone; for SyncBN, which has none there, one like it.
        None for a run that starts from random weights or evaluates another one.
    """
    cfg = _config(run.config)
    if run.kind not in ("train", "cascade", "search") or not cfg.MODEL.WEIGHTS:
        return None
    makers = (maker for maker in paper.load() if maker.kind == "pretrain")
    maker = next(maker for maker in makers if _body(_config(maker.config)) == _body(cfg))
    if cfg.MODEL.RESNETS.NORM == "SyncBN":
        id, family = (text.replace("-gn", "-syncbn") for text in (maker.id, maker.family))
        return dataclasses.replace(maker, id=id, family=family, config=PRETRAINING_SYNCBN)
    return maker


@functools.cache
def _config(name):
    cfg = recipe.load(model_zoo.get_config_file(name), [])
    cfg.freeze()
    return cfg


@functools.cache
def _own(name):
    """What a config sets itself, without its _BASE_, by dotted key."""
    with open(model_zoo.get_config_file(name), encoding="utf-8") as f:
        tree = yaml.safe_load(f)
    return {key: value for key, value in recipe.flatten(tree).items() if key not in ("_BASE_", "OUTPUT_DIR")}


def _body(cfg):
    """What tells backbones apart, but for their norm."""
    return cfg.MODEL.BACKBONE.NAME, cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.NUM_GROUPS


def _is_vgg(cfg):
    return cfg.MODEL.BACKBONE.NAME == "build_vgg16_backbone"


def _network(cfg):
    """The backbone's options; detector and classifier have the same."""
    if _is_vgg(cfg):
        return {"MODEL.VGG.WIDTH": 16}
    depth = cfg.MODEL.RESNETS.DEPTH
    options = {"MODEL.RESNETS.DEPTH": DEPTHS.get(depth, depth)}
    if cfg.MODEL.RESNETS.NUM_GROUPS > 1:
        # As wide as the stage, like the paper's 8 x 32; together 32, the least that GN can normalize.
        options["MODEL.RESNETS.WIDTH_PER_GROUP"] = 32 // cfg.MODEL.RESNETS.NUM_GROUPS
    return options


def _pretraining(cfg):
    options = _own(PRETRAINING)
    if _is_vgg(cfg):
        width = _own(BASE)["MODEL.ROI_BOX_HEAD.FC_DIM"]
        rate = options["SOLVER.BASE_LR"] / 10  # a tenth of the others', as at full size
        options = {**options, "MODEL.CLASSIFIER.FC_DIMS": [width, width], "SOLVER.BASE_LR": rate}
    return options


def _detection(cfg, one_x):
    own = _own(BASE)
    length = parse("1x", own["SOLVER.IMS_PER_BATCH"], one_x).max_iter
    compared = one_x > MINI_ONE_X
    held_out = "val" if compared else "val_100"
    scale = own["INPUT.MIN_SIZE_TEST"] / cfg.INPUT.MIN_SIZE_TEST
    longest = own["INPUT.MAX_SIZE_TEST"] / cfg.INPUT.MAX_SIZE_TEST
    options = {
        # Half of the mini config's regions: with 64, RoI heads and masks take as long as all the rest.
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 32,
        "INPUT.MIN_SIZE_TRAIN": tuple(round(size * scale) for size in cfg.INPUT.MIN_SIZE_TRAIN),
        "TEST.AUG.MIN_SIZES": tuple(round(size * scale) for size in cfg.TEST.AUG.MIN_SIZES),
        "TEST.AUG.MAX_SIZE": round(cfg.TEST.AUG.MAX_SIZE * longest),
        "TEST.PRECISE_BN.NUM_ITER": 5,
        "TEST.EVAL_PERIOD": 2 * length // 3 if compared else length,
        "DATASETS.TRAIN": (_training_set(cfg),),
        "DATASETS.TEST": (f"glyphs_{held_out}",),
        "SOLVER.ONE_X": one_x,
        "SOLVER.SCHEDULE": _in_x(cfg.SOLVER.SCHEDULE),
        "SOLVER.WARMUP_ITERS": min(WARMUP_ITERS * one_x // MINI_ONE_X, own["SOLVER.WARMUP_ITERS"]),
        "SOLVER.CHECKPOINT_PERIOD": length,
    }
    if _is_vgg(cfg):
        options["SOLVER.BASE_LR"] = VGG_RATE
        # One feature with all anchors; and its head has no convolutions.
        options["MODEL.ANCHOR_GENERATOR.SIZES"] = [sum(own["MODEL.ANCHOR_GENERATOR.SIZES"], [])]
        for key in ("RPN.IN_FEATURES", "ROI_BOX_HEAD.NUM_CONV", "ROI_BOX_HEAD.POOLER_SAMPLING_RATIO"):
            options[f"MODEL.{key}"] = recipe.flatten(cfg.MODEL)[key]
    if cfg.MODEL.KEYPOINT_ON:
        options |= {
            "DATASETS.TEST": (f"glyphs_keypoints_{held_out}",),
            "TEST.KEYPOINT_OKS_SIGMAS": KEYPOINT_OKS_SIGMAS,
            "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": len(KEYPOINT_NAMES),
            "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": [own["MODEL.ROI_MASK_HEAD.CONV_DIM"]] * 2,
            "MODEL.ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO": 1,
        }
    return options


def _training_set(cfg):
    """The glyphs in place of a config's training set: as large a part of all as that is of COCO."""
    name = cfg.DATASETS.TRAIN[0]
    if cfg.MODEL.KEYPOINT_ON:
        return "glyphs_keypoints_train"
    small = f"glyphs_train_{name.rpartition('_')[2]}"
    return small if small in DatasetCatalog else "glyphs_train"


def _in_x(schedule):
    """A length in units of 1x: "60k" is "0.667x"."""
    if schedule.endswith("x"):
        return schedule
    # Rounded up: cut off, a whole number of iterations would lose one.
    return f"{math.ceil(1000 * parse(schedule, REFERENCE_BATCH).max_iter / ONE_X) / 1000}x"
