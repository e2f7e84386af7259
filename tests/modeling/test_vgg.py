"""VGG-16: the network is torchvision's, and a detector around it trains."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models import vgg16

from rethink_d2 import add_rethink_config
from rethink_d2.modeling import describe, initialize
from rethink_d2.modeling.vgg import STAGES, VGG16, VGG16_FROM_TORCHVISION, build_vgg16_backbone

IMAGE = ShapeSpec(channels=3)


def detector_config(width=8, fc_dim=32, pooler="ROIAlign", freeze_at=0):
    """Faster R-CNN as the original: one level, RPN and RoI head on conv5."""
    cfg = get_cfg()
    add_rethink_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "build_vgg16_backbone", freeze_at
    cfg.MODEL.VGG.WIDTH = width
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32, 64, 128, 256, 512]]
    cfg.MODEL.RPN.IN_FEATURES = ["conv5"]
    heads, box = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD
    heads.NAME, heads.IN_FEATURES, heads.NUM_CLASSES = "StandardROIHeads", ["conv5"], 3
    box.NAME, box.NUM_CONV, box.NUM_FC, box.FC_DIM = "FastRCNNConvFCHead", 0, 2, fc_dim
    box.POOLER_TYPE, box.POOLER_SAMPLING_RATIO, box.POOLER_RESOLUTION = pooler, 0, 7
    return cfg


def training_image():
    boxes = torch.tensor([[4.0, 8.0, 40.0, 44.0], [30.0, 10.0, 90.0, 60.0]])
    instances = Instances((64, 96), gt_boxes=Boxes(boxes), gt_classes=torch.tensor([0, 2]))
    return [{"image": torch.rand(3, 64, 96) * 255, "instances": instances}]


# ---------------------------------------------------------------- the network


def copy_by_mapping(source, target, prefix):
    """Load the modules of the mapping whose names in the detector begin with a prefix."""
    weights = {
        f"{ours.removeprefix(prefix)}.{kind}": getattr(source.get_submodule(theirs), kind)
        for theirs, ours in VGG16_FROM_TORCHVISION.items()
        if ours.startswith(prefix)
        for kind in ("weight", "bias")
    }
    target.load_state_dict(weights)


@pytest.fixture(scope="module")
def torchvision_vgg():
    """torchvision's network with random weights; fc6 and fc7 narrowed from 4096, fc8 taken off."""
    with torch.device("meta"):
        model = vgg16(weights=None)
    model.classifier[0], model.classifier[3] = nn.Linear(512 * 7 * 7, 32), nn.Linear(32, 32)
    model.classifier[6] = nn.Identity()
    model.features.to_empty(device="cpu")
    torch.manual_seed(0)
    initialize(model, "msra_all")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.1)
    return model.eval()


def test_conv5_is_torchvisions(torchvision_vgg):
    backbone = VGG16()
    copy_by_mapping(torchvision_vgg, backbone, "backbone.")
    image = torch.randn(1, 3, 50, 67)  # odd sizes before some pools
    with torch.no_grad():
        expected = torchvision_vgg.features[:-1](image)
        assert expected.any() and torch.equal(backbone(image)["conv5"], expected)


def test_box_head_is_torchvisions_classifier(torchvision_vgg):
    head = FastRCNNConvFCHead(ShapeSpec(channels=512, height=7, width=7), conv_dims=[], fc_dims=[32, 32])
    copy_by_mapping(torchvision_vgg, head, "roi_heads.box_head.")
    rois = torch.rand(2, 512, 7, 7)
    with torch.no_grad():
        expected = torchvision_vgg.classifier(torchvision_vgg.avgpool(rois).flatten(1))
        assert expected.any() and torch.equal(head(rois), expected)


def test_full_size_fits_torchvision():
    cfg = detector_config(width=64, fc_dim=4096)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        ours, theirs = build_model(cfg), vgg16(weights=None)
    assert sum(p.numel() for p in ours.backbone.parameters()) == 14_714_688
    for source, target in VGG16_FROM_TORCHVISION.items():
        source, target = theirs.get_submodule(source), ours.get_submodule(target)
        assert source.weight.shape == target.weight.shape and source.bias.shape == target.bias.shape
    layers = {name for name, m in theirs.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert layers - VGG16_FROM_TORCHVISION.keys() == {"classifier.6"}
    parts = "backbone.", "roi_heads.box_head."
    heirs = {name.rsplit(".", 1)[0] for name, _ in ours.named_parameters() if name.startswith(parts)}
    assert heirs == set(VGG16_FROM_TORCHVISION.values())


@settings(deadline=None, max_examples=20)
@given(
    st.sets(st.sampled_from(list(STAGES)), min_size=1).map(sorted),
    st.integers(1, 5),
    st.integers(16, 70),
    st.integers(16, 70),
)
def test_output_shape_says_what_comes_out(features, width, height, image_width):
    backbone = VGG16(in_channels=1, width=width, out_features=features)
    spec = backbone.output_shape()
    assert {name: (s.stride, s.channels) for name, s in spec.items()} == {
        name: (2**i, width * (1, 2, 4, 8, 8)[i]) for i, name in enumerate(STAGES) if name in features
    }
    with torch.no_grad():
        out = backbone(torch.rand(2, 1, height, image_width))
    assert {name: tuple(x.shape) for name, x in out.items()} == {
        name: (2, s.channels, height // s.stride, image_width // s.stride) for name, s in spec.items()
    }
    built = {name.split("_")[0] for name, _ in backbone.named_children()}
    assert built == {stage for stage in STAGES if stage <= max(features)}


@pytest.mark.parametrize(
    "norm, kind", [("GN", nn.GroupNorm), ("BN", nn.BatchNorm2d), ("SyncBN", nn.SyncBatchNorm)]
)
def test_every_convolution_has_the_norm_and_then_no_bias(norm, kind):
    convs = list(VGG16(width=32, norm=norm).children())
    assert len(convs) == 13 and all(type(c.norm) is kind and c.bias is None for c in convs)


def test_every_convolution_has_a_bias_without_norm():
    assert all(c.norm is None and c.bias is not None for c in VGG16(width=1).children())


def test_features_are_taken_after_the_relu():
    out = VGG16(width=4, out_features=list(STAGES))(torch.randn(1, 3, 32, 32))
    assert all((x >= 0).all() and (x == 0).any() for x in out.values())


# ---------------------------------------------------------------- keys


def test_stock_config_builds_the_same_as_the_defaults_of_the_keys():
    stock, ours = get_cfg(), get_cfg()
    add_rethink_config(ours)
    assert "VGG" not in stock.MODEL
    with torch.device("meta"):
        a, b = build_vgg16_backbone(stock, IMAGE), build_vgg16_backbone(ours, IMAGE)
    assert str(a) == str(b) and a.output_shape() == b.output_shape()
    assert not a.conv2_2.weight.requires_grad  # Detectron2's default FREEZE_AT 2


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("MODEL.VGG.NORM", "Group", "get_norm"),
        ("MODEL.VGG.WIDTH", 0, "at least one"),
        ("MODEL.VGG.OUT_FEATURES", ["conv5", "res5"], "conv1, conv2, conv3, conv4, conv5"),
        ("MODEL.VGG.OUT_FEATURES", [], "conv1, conv2, conv3, conv4, conv5"),
        ("MODEL.BACKBONE.FREEZE_AT", 6, "0 .* to 5"),
        ("MODEL.BACKBONE.FREEZE_AT", -1, "0 .* to 5"),
    ],
)
def test_refusals_name_the_key(key, value, words):
    cfg = detector_config()
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=f"^{key} is .*{words}"):
        build_backbone(cfg)


@pytest.mark.parametrize("width", [0, 8, 48, -32])
def test_gn_needs_multiples_of_32(width):
    with pytest.raises(ValueError, match=f"^MODEL.VGG.WIDTH is {width}: "):
        VGG16(width=width, norm="GN")


@pytest.mark.parametrize("freeze_at", range(6))
@pytest.mark.parametrize("norm", ["", "BN", "GN"])
def test_freeze_at(freeze_at, norm):
    with torch.device("meta"):
        backbone = VGG16(width=32, norm=norm, freeze_at=freeze_at)
    for name, conv in backbone.named_children():
        frozen = int(name[4]) <= freeze_at
        assert all(p.requires_grad != frozen for p in conv.parameters()), name
        assert isinstance(conv.norm, FrozenBatchNorm2d) == (frozen and norm == "BN"), name


# ---------------------------------------------------------------- the detector


def test_msra_all_covers_every_layer_of_the_detector():
    assert describe(build_model(detector_config()), "msra_all") == [
        ("stem or block conv", "MSRA", 13),
        ("rpn conv", "normal(0.01)", 3),
        ("fc", "MSRA", 2),
        ("class predictor", "normal(0.01)", 1),
        ("box predictor", "normal(0.001)", 1),
    ]


def test_constructor_draws_msra_too():
    torch.manual_seed(0)
    for conv in VGG16(width=16).children():
        std = (2 / (9 * conv.out_channels)) ** 0.5
        assert conv.weight.std().item() == pytest.approx(std, rel=5 / (2 * conv.weight.numel()) ** 0.5)
        assert (conv.bias == 0).all()


@pytest.mark.parametrize("pooler, freeze_at", [("ROIAlign", 0), ("ROIAlign", 2), ("ROIPool", 0)])
def test_one_step_changes_what_trains_and_nothing_else(pooler, freeze_at):
    cfg = detector_config(pooler=pooler, freeze_at=freeze_at)
    cfg.SOLVER.WEIGHT_DECAY = 0.0  # so that only a gradient moves a weight
    torch.manual_seed(0)
    model = build_model(cfg)
    initialize(model, "msra_all")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(cfg, model)
    with EventStorage():
        sum(model(training_image()).values()).backward()
    optimizer.step()
    same = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    frozen = [name for stage in list(STAGES)[:freeze_at] for name in STAGES[stage]]
    assert same == {f"backbone.{name}.{kind}" for name in frozen for kind in ("weight", "bias")}
    assert all(p.isfinite().all() for p in model.parameters())


def test_detector_finds_boxes_inside_an_image_of_odd_size():
    cfg = detector_config()
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    model = build_model(cfg).eval()
    with torch.no_grad():
        (result,) = model([{"image": torch.rand(3, 61, 93) * 255, "height": 61, "width": 93}])
    found = result["instances"]
    boxes = found.pred_boxes.tensor
    assert len(found) and (boxes >= 0).all() and (boxes <= torch.tensor([93, 61, 93, 61])).all()
