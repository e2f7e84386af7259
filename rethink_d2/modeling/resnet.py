"""ResNet and ResNeXt backbones for training from random initialization.

Detectron2's own builder already covers every bottleneck network; it is called as it is, after checks
that turn its late and nameless failures into messages that name the key. What it refuses is added:
ResNet-18/34 of any width, small enough to be trained from scratch on a CPU.

Everything is composed of Detectron2's own modules, so parameter names are Detectron2's and weights
can be exchanged with ``build_resnet_backbone`` and ``build_resnet_fpn_backbone`` in both directions.
"""

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet, build_resnet_backbone

__all__ = ["GN_GROUPS", "build_scratch_resnet_backbone", "build_scratch_resnet_fpn_backbone"]

# detectron2.layers.get_norm fixes this number, and the paper (section 4) uses it, after "Group
# Normalization".
GN_GROUPS = 32

BASIC_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
BOTTLENECK_DEPTHS = (50, 101, 152)


def _check_gn_width(key, width):
    if width <= 0 or width % GN_GROUPS:
        raise ValueError(f"{key} is {width}: with NORM 'GN' it must be a multiple of {GN_GROUPS}")


def _check_resnet(cfg):
    """Raise ValueError, naming the key, for every combination that cannot be built."""
    r = cfg.MODEL.RESNETS
    basic = r.DEPTH in BASIC_BLOCKS
    if not basic and r.DEPTH not in BOTTLENECK_DEPTHS:
        known = ", ".join(map(str, (*BASIC_BLOCKS, *BOTTLENECK_DEPTHS)))
        raise ValueError(f"MODEL.RESNETS.DEPTH is {r.DEPTH}: expected one of {known}")
    if r.RES5_DILATION not in (1, 2):
        raise ValueError(f"MODEL.RESNETS.RES5_DILATION is {r.RES5_DILATION}: expected 1 or 2")
    if basic:
        # BasicBlock has neither dilation, groups nor a deformable variant; ignoring the keys would
        # train another network than the config says.
        for key, refused in (
            ("DEFORM_ON_PER_STAGE", any(r.DEFORM_ON_PER_STAGE)),
            ("RES5_DILATION", r.RES5_DILATION != 1),
            ("NUM_GROUPS", r.NUM_GROUPS != 1),
        ):
            if refused:
                raise ValueError(
                    f"MODEL.RESNETS.{key} is {r[key]}: needs bottleneck blocks "
                    f"(DEPTH 50, 101 or 152), but MODEL.RESNETS.DEPTH is {r.DEPTH}"
                )
    if r.NORM == "GN":
        # Later stages double these widths, so they are multiples as well.
        _check_gn_width("MODEL.RESNETS.STEM_OUT_CHANNELS", r.STEM_OUT_CHANNELS)
        _check_gn_width("MODEL.RESNETS.RES2_OUT_CHANNELS", r.RES2_OUT_CHANNELS)
        if not basic:
            _check_gn_width(
                "MODEL.RESNETS.NUM_GROUPS x MODEL.RESNETS.WIDTH_PER_GROUP", r.NUM_GROUPS * r.WIDTH_PER_GROUP
            )


def _build_basic_resnet(cfg, input_shape):
    """ResNet-18/34 of any width: stages of RES2_OUT_CHANNELS x 1, 2, 4, 8."""
    r = cfg.MODEL.RESNETS
    in_channels, out_channels = r.STEM_OUT_CHANNELS, r.RES2_OUT_CHANNELS
    stem = BasicStem(in_channels=input_shape.channels, out_channels=in_channels, norm=r.NORM)
    stages = []
    for index, num_blocks in enumerate(BASIC_BLOCKS[r.DEPTH]):
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                num_blocks,
                stride_per_block=[1 if index == 0 else 2] + [1] * (num_blocks - 1),
                in_channels=in_channels,
                out_channels=out_channels,
                norm=r.NORM,
            )
        )
        in_channels, out_channels = out_channels, 2 * out_channels
    return ResNet(stem, stages, out_features=r.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)


@BACKBONE_REGISTRY.register()
def build_scratch_resnet_backbone(cfg, input_shape: ShapeSpec) -> Backbone:
    """Build the ResNet or ResNeXt that the keys of ``MODEL.RESNETS`` describe.

    Uses only keys that Detectron2 has itself, so it works in projects without
    :func:`rethink_d2.config.add_rethink_config`. Normalization is any name that
    ``detectron2.layers.get_norm`` knows: ``GN`` and ``SyncBN`` are the paper's two (section 3.1).

    ``MODEL.BACKBONE.FREEZE_AT`` is honoured as given. Its Detectron2 default is 2, which in a run from
    scratch would leave the stem and res2 at their random weights: set it to 0 there. Frozen stages get
    no gradient; their GN modules stay GN, while BN becomes FrozenBN, as ``CNNBlockBase.freeze`` does.

    Args:
        cfg (CfgNode): a Detectron2 config; ``MODEL.RESNETS`` and ``MODEL.BACKBONE.FREEZE_AT`` are read.
        input_shape (ShapeSpec): of the image; only ``channels`` is used.

    Returns:
        ResNet: maps images (N, channels, H, W) to ``{"res2": (N, C, H/4, W/4), ...}`` for the
        features in ``MODEL.RESNETS.OUT_FEATURES``; strides 4, 8, 16, 32 (res5 is 16 if dilated).

    Raises:
        ValueError: for a combination of keys that cannot be built, e.g. GN on a width that is not a
            multiple of 32. The message names the key.
    """
    _check_resnet(cfg)
    if cfg.MODEL.RESNETS.DEPTH in BASIC_BLOCKS:
        return _build_basic_resnet(cfg, input_shape)
    return build_resnet_backbone(cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_scratch_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> Backbone:
    """Build the network of :func:`build_scratch_resnet_backbone` with an FPN on top.

    Args:
        cfg (CfgNode): a Detectron2 config; ``MODEL.FPN`` is read as well.
        input_shape (ShapeSpec): of the image; only ``channels`` is used.

    Returns:
        FPN: maps images (N, channels, H, W), H and W multiples of 32, to ``{"p2": (N,
        MODEL.FPN.OUT_CHANNELS, H/4, W/4), ..., "p6": (..., H/64, W/64)}``; p6 is a subsampled p5.

    Raises:
        ValueError: as :func:`build_scratch_resnet_backbone`, also for ``MODEL.FPN.OUT_CHANNELS``.
    """
    fpn = cfg.MODEL.FPN
    if fpn.NORM == "GN":
        _check_gn_width("MODEL.FPN.OUT_CHANNELS", fpn.OUT_CHANNELS)
    return FPN(
        bottom_up=build_scratch_resnet_backbone(cfg, input_shape),
        in_features=fpn.IN_FEATURES,
        out_channels=fpn.OUT_CHANNELS,
        norm=fpn.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=fpn.FUSE_TYPE,
    )
