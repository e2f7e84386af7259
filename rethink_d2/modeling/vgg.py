"""VGG-16 without FPN: the paper's detector without any normalization (section 5.1).

The network is that of Detectron modeling/VGG16.py: 13 convolutions, a pool after each of the first four
stages, and the feature at stride 16 for RPN and RoI head alike. VGG's fc6 and fc7 are Detectron2's
``FastRCNNConvFCHead`` with two fully connected layers of 4096.
"""

from itertools import chain

import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from fvcore.nn.weight_init import c2_msra_fill

from .resnet import GN_GROUPS

__all__ = ["VGG16", "VGG16_FROM_TORCHVISION", "build_vgg16_backbone"]

STAGES = {
    f"conv{stage}": [f"conv{stage}_{i}" for i in range(1, convs + 1)]
    for stage, convs in enumerate((2, 2, 3, 3, 3), start=1)
}

VGG16_FROM_TORCHVISION: dict[str, str] = {
    f"features.{index}": f"backbone.{name}"
    for index, name in zip(
        (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), chain(*STAGES.values()), strict=True
    )
} | {"classifier.0": "roi_heads.box_head.fc1", "classifier.3": "roi_heads.box_head.fc2"}
"""Modules of ``torchvision.models.vgg16`` and what they are in a Faster R-CNN of this backbone. Both flatten
the 7x7 feature as (channel, row, column), so weights carry over unchanged, with torchvision's RGB pixels,
mean and std. Its dropout has no counterpart (Detectron has none), nor has ``classifier.6``."""


def _check(width, norm, out_features, freeze_at):
    """Raise ValueError, naming the config key, for what cannot be built."""
    try:
        get_norm(norm, GN_GROUPS)
    except KeyError:
        raise ValueError(f"MODEL.VGG.NORM is {norm!r}: detectron2.layers.get_norm does not know it") from None
    if norm == "GN" and width % GN_GROUPS:
        raise ValueError(f"MODEL.VGG.WIDTH is {width}: with NORM 'GN' it must be a multiple of {GN_GROUPS}")
    if width < 1:
        raise ValueError(f"MODEL.VGG.WIDTH is {width}: expected at least one channel")
    if not out_features or not set(out_features) <= STAGES.keys():
        raise ValueError(f"MODEL.VGG.OUT_FEATURES is {out_features}: expected some of {', '.join(STAGES)}")
    if freeze_at not in range(len(STAGES) + 1):
        raise ValueError(
            f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}: expected 0 (nothing) to {len(STAGES)} (conv1 to conv5)"
        )


class VGG16(Backbone):
    """The convolutions of VGG-16, ``conv1_1`` to ``conv5_3``, each 3x3 with ReLU.

    A stage's feature is taken before the pool that follows, so conv1 to conv5 have strides 1, 2, 4, 8 and
    16. Pools drop an odd last row or column, as Detectron's do, so images need no padding. Stages after
    the last feature asked for are not built.

    Weights start from MSRA, as the paper's (section 5.1).
    """

    def __init__(self, in_channels=3, width=64, norm="", out_features=("conv5",), freeze_at=0):
        """
        Args:
            in_channels (int): of the image.
            width (int): channels of conv1; conv2 to conv5 have 2, 4, 8 and 8 times as many.
            norm (str): between convolution and ReLU, as ``detectron2.layers.get_norm`` takes it; "" for
                none, then convolutions have a bias.
            out_features (list[str]): among "conv1" to "conv5".
            freeze_at (int): number of stages, from conv1 on, that do not train. Their batch norms become
                FrozenBN, as in ``CNNBlockBase.freeze``. 2 is Detectron's StopGradient after pool2.

        Raises:
            ValueError: for what cannot be built; names the config key.
        """
        super().__init__()
        _check(width, norm, out_features, freeze_at)
        self._out_features = list(out_features)
        self._out_feature_channels, self._out_feature_strides = {}, {}
        # Layers without a gradient would be errors in distributed training.
        depth = 1 + max(list(STAGES).index(name) for name in out_features)
        for index, (stage, names) in enumerate(list(STAGES.items())[:depth]):
            channels = width * min(2**index, 8)
            for name in names:
                conv = Conv2d(
                    in_channels,
                    channels,
                    kernel_size=3,
                    padding=1,
                    bias=not norm,
                    norm=get_norm(norm, channels),
                    activation=F.relu_,
                )
                c2_msra_fill(conv)
                if index < freeze_at:
                    conv.requires_grad_(False)
                    FrozenBatchNorm2d.convert_frozen_batchnorm(conv)
                self.add_module(name, conv)
                in_channels = channels
            self._out_feature_channels[stage] = channels
            self._out_feature_strides[stage] = 2**index

    def forward(self, x):
        """Compute the features of a batch.

        Args:
            x (Tensor): images (N, in_channels, H, W).

        Returns:
            dict[str, Tensor]: (N, C, H // stride, W // stride) by name, for every feature asked for.
        """
        outputs = {}
        for stage, stride in self._out_feature_strides.items():
            if stride > 1:
                x = F.max_pool2d(x, kernel_size=2)
            for name in STAGES[stage]:
                x = getattr(self, name)(x)
            if stage in self._out_features:
                outputs[stage] = x
        return outputs


@BACKBONE_REGISTRY.register()
def build_vgg16_backbone(cfg, input_shape: ShapeSpec) -> VGG16:
    """Build the VGG-16 that the keys of ``MODEL.VGG`` describe.

    ``MODEL.BACKBONE.FREEZE_AT`` is honoured as given. Its Detectron2 default 2 is right for pre-trained
    weights (Detectron modeling/VGG16.py); training from scratch needs 0.

    Args:
        cfg (CfgNode): a Detectron2 config; without this project's keys, :class:`VGG16`'s defaults hold.
        input_shape (ShapeSpec): of the image; only ``channels`` is used.

    Returns:
        VGG16: the backbone.

    Raises:
        ValueError: as :class:`VGG16`.
    """
    keys = {key.lower(): value for key, value in cfg.MODEL.get("VGG", {}).items()}
    return VGG16(input_shape.channels, **keys, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)
