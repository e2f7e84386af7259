"""Rules about the model: its weights, norms, pixels and what is frozen."""

import os

from detectron2.checkpoint.catalog import ModelCatalog
from detectron2.utils.file_io import PathManager

from ..modeling import INITIALIZATION_REGISTRY
from ..modeling.weights import known_weights
from ..spelling import nearest
from .problem import BODY, Problem

# Fewer images than this make batch statistics too noisy to train detectors on.
MIN_SYNCBN_IMAGES = 8


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
            cure = f"correct the path, or finish the run that writes it{hint}"
            yield Problem("MODEL.WEIGHTS", f"there is no file {os.path.abspath(path)}", cure)
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


def _policy(s):
    policy = s.cfg.MODEL.INIT.POLICY
    if policy and policy not in INITIALIZATION_REGISTRY:
        names = [name for name, _ in INITIALIZATION_REGISTRY]
        what = f"{policy!r} is unknown{nearest(policy, names)}"
        yield Problem("MODEL.INIT.POLICY", what, f"use one of {', '.join(names)}, or '' for Detectron2's own")


RULES = (_frozen_start, _scratch_norm, _syncbn_batch, _widths, _weights, _pixels, _policy)
