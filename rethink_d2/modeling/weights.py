"""What well-known pre-trained weights were trained with."""

import os
import re
import zipfile
from dataclasses import dataclass

from .safe_weights import read_weights

_CAFFE2_MEAN = (103.53, 116.28, 123.675)
_BATCH_NORMS = ("FrozenBN", "BN", "SyncBN", "naiveSyncBN", "naiveSyncBN_N", "nnSyncBN")


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
    """Look up what weights were trained with: by their name, or in a file that tells.

    A local ``.pth`` tells by an entry "pixels" beside "model", ``{"format": "RGB", "mean": [three floats],
    "std": [three floats]}``, as :mod:`rethink_d2.modeling.convert` writes it.

    Args:
        name (str): a value of MODEL.WEIGHTS.

    Returns:
        Known or None: None for weights about which neither says anything.

    Raises:
        ValueError: the local file is refused by :func:`rethink_d2.modeling.safe_weights.read_weights`.
    """
    name = name.split("?")[0]
    # torch's older files, which are no zip, have no such entry; and they would be read as a whole.
    if name.endswith(".pth") and os.path.isfile(name) and zipfile.is_zipfile(name):
        weights = read_weights(name, mmap=True)
        if "pixels" in weights:
            return _recorded(weights)
    return next((known for pattern, known in _WEIGHTS if re.search(pattern, name)), None)


def _recorded(weights):
    model, pixels = weights["model"], weights["pixels"]
    if any(key.endswith("norm.running_mean") for key in model):
        norm = "holds batch norm", _BATCH_NORMS
    elif any(key.endswith("norm.weight") for key in model):
        norm = "holds group norm", ("GN",)
    else:
        norm = "holds no normalization", ('""',)
    bottleneck = any("res2.0.conv3." in key for key in model)
    return Known(
        *norm,
        pixels["format"],
        tuple(pixels["mean"]),
        tuple(pixels["std"]),
        stride_in_1x1=False if bottleneck and weights.get("__author__") == "torchvision" else None,
    )
