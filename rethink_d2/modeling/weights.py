"""What well-known pre-trained weights were trained with."""

import re
from dataclasses import dataclass

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
    """Look up what weights were trained with, by their name.

    Args:
        name (str): a value of MODEL.WEIGHTS.

    Returns:
        Known or None: None for weights that the name says nothing about.
    """
    name = name.split("?")[0]
    return next((known for pattern, known in _WEIGHTS if re.search(pattern, name)), None)
