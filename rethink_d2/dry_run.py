"""What a recipe amounts to before it runs: its model's parts, its weights, its data sets, as text."""

import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.layers import FrozenBatchNorm2d, NaiveSyncBatchNorm
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from torch import nn

_CAFFE2_MEAN = (103.53, 116.28, 123.675)
_BATCH_NORMS = ("FrozenBN", "BN", "SyncBN", "naiveSyncBN", "naiveSyncBN_N", "nnSyncBN")

# Generated when first read, so their files are never missing, and no COCO recipe fits them.
GENERATED = "glyphs_"
# Which key sets the normalization of which part of the model.
NORM_KEYS = {
    "backbone": "MODEL.RESNETS.NORM",
    "backbone.bottom_up": "MODEL.RESNETS.NORM",
    "backbone.fpn": "MODEL.FPN.NORM",
    "roi_heads.res5": "MODEL.RESNETS.NORM",
    "roi_heads.box_head": "MODEL.ROI_BOX_HEAD.NORM",
    "roi_heads.mask_head": "MODEL.ROI_MASK_HEAD.NORM",
}


@dataclass(frozen=True)
class Known:
    """What weights with a well-known name were trained with.

    Attributes:
        holds (str): what they hold for the normalization layers, as a phrase.
        fits (tuple[str]): the kinds of normalization that can take it over.
        format, mean, std: of the pixels.
        stride_in_1x1 (bool or None): where the bottleneck's stride is; None when not known.
    """

    holds: str
    fits: tuple
    format: str = "BGR"
    mean: tuple = _CAFFE2_MEAN
    std: tuple = (1.0, 1.0, 1.0)
    stride_in_1x1: bool | None = None


_FOLDED = "has its batch norm folded into scale and shift, without statistics"
_WEIGHTS = (
    (r"-GN(\.pkl)?$", Known("holds group norm", ("GN",), stride_in_1x1=False)),
    (
        r"torchvision/R-\d+(\.pkl)?$",
        Known(
            "holds batch norm",
            _BATCH_NORMS,
            "RGB",
            (123.675, 116.28, 103.53),
            (58.395, 57.12, 57.375),
            stride_in_1x1=False,
        ),
    ),
    # The old catalog's files come before Detectron2's re-converted ones of the same name.
    (
        r"(catalog://|/detectron/|^)ImageNetPretrained/MSRA/",
        Known(_FOLDED, ("FrozenBN",), stride_in_1x1=True),
    ),
    (
        r"(catalog://|/detectron/|^)ImageNetPretrained/FAIR/X-",
        Known(_FOLDED, ("FrozenBN",), stride_in_1x1=False),
    ),
    (r"ImageNetPretrained/MSRA/", Known("holds batch norm", _BATCH_NORMS, stride_in_1x1=True)),
    (
        r"ImageNetPretrained/FAIR/X-",
        Known("holds batch norm", _BATCH_NORMS, std=(57.375, 57.12, 58.395), stride_in_1x1=False),
    ),
)


def known_weights(name):
    """Look up what weights were trained with, by their name.

    Args:
        name (str): a value of MODEL.WEIGHTS.

    Returns:
        Known or None: None for weights that the name says nothing about.
    """
    name = name.split("?")[0]
    return next((known for pattern, known in _WEIGHTS if re.search(pattern, name)), None)


def data_paths(name):
    """List the files and folders that a registered data set reads.

    Args:
        name (str): a registered data set.

    Returns:
        tuple[list[str], str or None]: the paths, and among them VOC's list of image ids.
    """
    meta = MetadataCatalog.get(name)
    paths = [meta.get(key) for key in ("json_file", "image_root", "dirname")]
    split = None
    if meta.get("dirname") and meta.get("split") and meta.get("year"):
        split = os.path.join(meta.dirname, "ImageSets", "Main", f"{meta.split}.txt")
        paths.append(split)
    return [p for p in paths if p], split


def missing_files(name):
    """List what a data set needs that is not there.

    Args:
        name (str): a data set; an unregistered one lacks itself.

    Returns:
        list[str]: paths as they were tried; empty when it can be read, or is generated on demand.
    """
    if name not in DatasetCatalog.list():
        return [name]
    if name.startswith(GENERATED):
        return []
    return [path for path in data_paths(name)[0] if not PathManager.exists(path)]


def norm_kind(module):
    """Name the normalization that a module is.

    Args:
        module (nn.Module): any module.

    Returns:
        str or None: as in Detectron2's NORM keys; None for other modules.
    """
    if isinstance(module, NaiveSyncBatchNorm):
        return "naiveSyncBN_N" if getattr(module, "_stats_mode", "") == "N" else "naiveSyncBN"
    for kind, cls in (
        ("SyncBN", nn.SyncBatchNorm),
        ("FrozenBN", FrozenBatchNorm2d),
        ("BN", nn.modules.batchnorm._BatchNorm),
        ("GN", nn.GroupNorm),
        ("LN", nn.LayerNorm),
    ):
        if isinstance(module, cls):
            return kind
    return None


def part_of(name):
    """The part of a detector that a module belongs to, such as "backbone.fpn" or "roi_heads.box_head"."""
    head, *rest = name.split(".")
    if head == "backbone":
        second = rest[0] if rest else ""
        return (
            f"{head}.fpn"
            if second.startswith("fpn")
            else f"{head}.{second}"
            if second == "bottom_up"
            else head
        )
    return ".".join([head, *rest[:1]]) if head == "roi_heads" else head


def norms(model):
    """Count the normalization layers of a model.

    Args:
        model (nn.Module): a detector.

    Returns:
        dict[str, Counter]: for every part (see :func:`part_of`), how many layers of which kind.
    """
    parts = {}
    for name, module in model.named_modules():
        kind = norm_kind(module)
        if kind:
            parts.setdefault(part_of(name), Counter())[kind] += 1
    return parts


def build_meta(cfg):
    """Build the configured model without memory for its parameters.

    Args:
        cfg (CfgNode): a config.

    Returns:
        nn.Module: on the meta device, or on the CPU where a component cannot do without values.
    """
    for device in ("meta", "cpu"):
        copy = cfg.clone()
        copy.defrost()
        copy.MODEL.DEVICE = device
        try:
            with torch.device(device):
                return build_model(copy)
        except (NotImplementedError, RuntimeError):
            if device == "cpu":
                raise


def _counts(model):
    """Count elements: of parameters, of those that train, and of buffers."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return total, trained, sum(b.numel() for b in model.buffers())


def frozen_modules(model):
    """Find the largest modules none of whose parameters trains.

    Args:
        model (nn.Module): any model.

    Returns:
        dict[str, int]: number of parameters by module name.
    """
    found = {}
    for name, module in model.named_modules():
        params = list(module.parameters())
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and params and not inside and not any(p.requires_grad for p in params):
            found[name] = sum(p.numel() for p in params)
    return found


def _published(published):
    """Word a published result given as a run of the paper, a dict or a text."""
    if isinstance(published, Mapping):
        source = published.get("source")
        values = ", ".join(f"{k} {v}" for k, v in published.items() if k != "source")
    elif hasattr(published, "metric"):
        source = published.source
        values = (
            "only as a picture"
            if published.published is None
            else f"{published.metric} {published.published}"
        )
    else:
        return str(published or "nothing for this recipe")
    return f"{values} ({source})" if source else values


def summary(cfg, model, sizes, world_size, published=None):
    """Describe a run before it starts.

    Args:
        cfg (CfgNode): a resolved config.
        model (nn.Module): the model it builds, on any device.
        sizes (dict[str, int] or None): number of images by data set, for those that are known.
        world_size (int): number of processes.
        published (paper.Run or dict or str or None): published results; a dict has their "source" too.

    Returns:
        str: aligned lines, one subject each.
    """
    solver, sizes = cfg.SOLVER, sizes or {}
    batch = solver.IMS_PER_BATCH
    group = solver.IMS_PER_GROUP or max(1, batch // world_size)
    images = None
    if cfg.DATASETS.TRAIN and all(sizes.get(name) for name in cfg.DATASETS.TRAIN):
        images = sum(sizes[name] for name in cfg.DATASETS.TRAIN)

    def at(iteration):
        return f"{iteration:,}" + (f" (epoch {iteration * batch / images:.2f})" if images else "")

    def data(names):
        return ", ".join(f"{n} ({sizes[n]:,} images)" if n in sizes else n for n in names) or "none"

    scaling = "off"
    if solver.REFERENCE_WORLD_SIZE > 0:
        scaling = f"batch and rate fit {solver.REFERENCE_WORLD_SIZE} processes (SOLVER.REFERENCE_WORLD_SIZE)"
    total, trained, buffers = _counts(model)
    frozen = frozen_modules(model)
    # float32 parameters and buffers, and one momentum for each parameter that trains.
    size = 4 * (total + buffers + trained)
    period = solver.CHECKPOINT_PERIOD
    kept = math.ceil(solver.MAX_ITER / period) if period > 0 else 1
    policy = cfg.MODEL.INIT.POLICY or "as Detectron2's modules do"
    rows = [
        ("processes", f"{world_size} on {cfg.MODEL.DEVICE}"),
        ("linear scaling", scaling),
        (
            "batch",
            f"{batch} images: {batch // group} groups of {group}, {batch // group // world_size} per process",
        ),
        ("rate", f"{solver.BASE_LR:g}, x{solver.GAMMA:g} at {', '.join(map(at, solver.STEPS)) or 'no step'}"),
        (
            "warm-up",
            f"{solver.WARMUP_ITERS:,} iterations from x{solver.WARMUP_FACTOR:.4g} ({solver.WARMUP_METHOD})",
        ),
        ("length", f"{at(solver.MAX_ITER)}" + (f", schedule {solver.SCHEDULE}" if solver.SCHEDULE else "")),
        ("initialization", f"{policy}; weights: {cfg.MODEL.WEIGHTS or 'none'}; seed {cfg.SEED}"),
        ("parameters", f"{total:,}, of which {trained:,} train"),
        ("frozen", ", ".join(f"{name} ({n:,})" for name, n in frozen.items()) or "nothing"),
    ]
    for part, kinds in norms(model).items():
        rows.append((f"norm of {part}", ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))))
    rows += [
        ("train on", data(cfg.DATASETS.TRAIN)),
        ("test on", data(cfg.DATASETS.TEST)),
        ("published", _published(published)),
        ("checkpoints", f"{kept} of {size / 1e6:,.0f} MB, {kept * size / 1e9:,.1f} GB in {cfg.OUTPUT_DIR}"),
    ]
    width = max(len(label) for label, _ in rows) + 2
    return "\n".join(f"{label:<{width}}{text}" for label, text in rows)
