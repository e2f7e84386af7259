"""The backbones for training from scratch, and that they fit Detectron2's own."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone
from detectron2.modeling.backbone.resnet import build_resnet_backbone
from torch import nn

from rethink_d2.modeling import build_scratch_resnet_backbone, build_scratch_resnet_fpn_backbone

IMAGE = ShapeSpec(channels=3)


def config(depth=18, norm="GN", width=32, freeze_at=0, **resnets):
    """A small backbone of stock Detectron2 keys."""
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_scratch_resnet_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    r = cfg.MODEL.RESNETS
    r.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    r.DEPTH, r.NORM, r.STEM_OUT_CHANNELS, r.RES2_OUT_CHANNELS = depth, norm, width, width
    r.NUM_GROUPS, r.WIDTH_PER_GROUP = 1, width
    for key, value in resnets.items():
        r[key] = value
    cfg.MODEL.FPN.IN_FEATURES = list(r.OUT_FEATURES)
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.FPN.NORM = norm
    return cfg


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def test_r50_gn_fpn_is_interchangeable_with_detectron2s():
    cfg = config(50, width=64, RES2_OUT_CHANNELS=256)
    ours, theirs = build_scratch_resnet_fpn_backbone(cfg, IMAGE), build_resnet_fpn_backbone(cfg, IMAGE)
    assert shapes(ours) == shapes(theirs)
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected, got = theirs(image), ours(image)
    assert list(got) == ["p2", "p3", "p4", "p5", "p6"]
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_r18_of_stock_width_is_interchangeable_with_detectron2s():
    cfg = config(18, width=64)
    ours, theirs = build_scratch_resnet_backbone(cfg, IMAGE), build_resnet_backbone(cfg, IMAGE)
    assert shapes(ours) == shapes(theirs)
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours(image)["res5"], theirs(image)["res5"])


@pytest.mark.parametrize("depth, blocks", [(18, 8), (34, 16), (50, 16), (101, 33), (152, 50)])
def test_depths(depth, blocks):
    with torch.device("meta"):
        model = build_scratch_resnet_backbone(config(depth), IMAGE)
    assert sum(len(stage) for stage in model.stages) == blocks


def test_resnext_8x32d_widths():
    cfg = config(50, width=64, RES2_OUT_CHANNELS=256, NUM_GROUPS=8, WIDTH_PER_GROUP=32, STRIDE_IN_1X1=False)
    with torch.device("meta"):
        model = build_scratch_resnet_backbone(cfg, IMAGE)
    conv = model.res2[0].conv2
    assert (conv.groups, conv.out_channels, conv.weight.shape[1]) == (8, 256, 32)
    assert model.res3[0].conv1.stride == (1, 1) and model.res3[0].conv2.stride == (2, 2)


def test_widths_of_stem_and_res2_may_differ_in_basic_blocks():
    model = build_scratch_resnet_backbone(config(18, STEM_OUT_CHANNELS=64), IMAGE)
    assert model.res2[0].shortcut is not None
    assert {k: v.channels for k, v in model.output_shape().items()} == {
        "res2": 32,
        "res3": 64,
        "res4": 128,
        "res5": 256,
    }


@pytest.mark.parametrize("norm", ["GN", "BN", "SyncBN", "naiveSyncBN_N"])
def test_norm_everywhere(norm):
    with torch.device("meta"):
        model = build_scratch_resnet_fpn_backbone(config(18, norm), IMAGE)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    kinds = {type(conv.norm).__name__ for conv in convs}
    expected = {"GN": "GroupNorm", "BN": "BatchNorm2d", "SyncBN": "SyncBatchNorm"}
    assert kinds == {expected.get(norm, "NaiveSyncBatchNorm")}
    if norm == "GN":
        assert {conv.norm.num_groups for conv in convs} == {32}


@pytest.mark.parametrize(
    "key, depth, change",
    [
        ("STEM_OUT_CHANNELS", 18, {"STEM_OUT_CHANNELS": 48}),
        ("RES2_OUT_CHANNELS", 34, {"RES2_OUT_CHANNELS": 16}),
        ("NUM_GROUPS x MODEL.RESNETS.WIDTH_PER_GROUP", 50, {"NUM_GROUPS": 3, "WIDTH_PER_GROUP": 24}),
        ("DEPTH", 19, {}),
        ("RES5_DILATION", 18, {"RES5_DILATION": 2}),
        ("RES5_DILATION", 50, {"RES5_DILATION": 4}),
        ("NUM_GROUPS", 18, {"NUM_GROUPS": 32}),
        ("DEFORM_ON_PER_STAGE", 34, {"DEFORM_ON_PER_STAGE": [False, True, True, True]}),
    ],
)
def test_refusals_name_the_key(key, depth, change):
    with pytest.raises(ValueError, match=f"^MODEL.RESNETS.{key} is "):
        build_scratch_resnet_backbone(config(depth, **change), IMAGE)


def test_fpn_width_is_refused_only_with_gn():
    cfg = config(18)
    cfg.MODEL.FPN.OUT_CHANNELS = 80
    with pytest.raises(ValueError, match="^MODEL.FPN.OUT_CHANNELS is 80"):
        build_scratch_resnet_fpn_backbone(cfg, IMAGE)
    cfg.MODEL.FPN.NORM = ""
    build_scratch_resnet_fpn_backbone(cfg, IMAGE)


def test_bn_takes_any_width():
    build_scratch_resnet_backbone(config(18, "BN", width=8), IMAGE)


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("freeze_at", [0, 2])
def test_freeze_at_is_honoured_and_gn_stays_gn(depth, freeze_at):
    model = build_scratch_resnet_backbone(config(depth, freeze_at=freeze_at), IMAGE)
    frozen = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == ({"stem", "res2"} if freeze_at else set())
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert not frozen & trained
    assert isinstance(model.stem.conv1.norm, nn.GroupNorm)


def test_frozen_bn_becomes_frozen_batch_norm():
    model = build_scratch_resnet_backbone(config(18, "BN", freeze_at=1), IMAGE)
    assert isinstance(model.stem.conv1.norm, FrozenBatchNorm2d)
    assert isinstance(model.res2[0].conv1.norm, nn.BatchNorm2d)


def test_in_a_project_of_stock_keys():
    """A detector from get_cfg() alone, without this project's keys."""
    cfg = config(18)
    assert "INIT" not in cfg.MODEL
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    model = build_model(cfg).eval()
    with torch.no_grad():
        (result,) = model([{"image": torch.rand(3, 64, 96) * 255, "height": 64, "width": 96}])
    assert result["instances"].image_size == (64, 96)
