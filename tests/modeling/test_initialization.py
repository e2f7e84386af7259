"""Every kind of layer gets its rule, every parameter exactly once, and the seed fixes the values."""

import math

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import Conv2d, FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.resnet import BasicStem, DeformBottleneckBlock
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.roi_heads import KRCNNConvDeconvUpsampleHead
from torch import nn

from rethink_d2.modeling import INITIALIZATION_REGISTRY, describe, initialize
from rethink_d2.modeling.initialization import XAVIER, Layer, msra


def mask_rcnn_config():
    """Mask R-CNN R50-FPN with GN and a 4conv1fc box head, as the paper's baseline."""
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.BACKBONE.NAME = "build_scratch_resnet_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 2  # frozen parameters are initialized as well
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    heads = cfg.MODEL.ROI_HEADS
    heads.NAME, heads.IN_FEATURES = "StandardROIHeads", ["p2", "p3", "p4", "p5"]
    box, mask = cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD
    box.NAME, box.NUM_CONV, box.NUM_FC, box.POOLER_RESOLUTION = "FastRCNNConvFCHead", 4, 1, 7
    mask.NAME, mask.NUM_CONV = "MaskRCNNConvUpsampleHead", 4
    for part in (cfg.MODEL.RESNETS, cfg.MODEL.FPN, box, mask):
        part.NORM = "GN"
    return cfg


@pytest.fixture(scope="module")
def model():
    return build_model(mask_rcnn_config())


def poison(module):
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(math.nan)


def weights(model, policy, seed=0):
    """Initialize from a poisoned model, so that nothing of an earlier test remains."""
    poison(model)
    torch.manual_seed(seed)
    initialize(model, policy)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def by_policy(model):
    return {policy: weights(model, policy) for policy in ("msra", "detectron", "msra_all")}


def fans(weight):
    area = math.prod(weight.shape[2:])
    return weight.shape[1] * area, weight.shape[0] * area


def check_normal(weight, std):
    """Normal by its first moments; tolerances are five standard errors."""
    n = weight.numel()
    assert weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * n))
    assert abs(weight.mean().item()) < 5 * std / math.sqrt(n)
    # A uniform distribution ends at 1.73 standard deviations.
    assert weight.abs().max().item() > 2.5 * std


def check_xavier(weight):
    bound = math.sqrt(3 / fans(weight)[0])
    assert 0.99 * bound < weight.abs().max().item() <= bound * (1 + 1e-6)
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=5 / math.sqrt(2 * weight.numel()))


def check_msra(weight):
    check_normal(weight, math.sqrt(2 / fans(weight)[1]))


# By name here, as an independent statement of what the classes should select.
RULES = {
    "backbone.bottom_up.": check_msra,
    "backbone.fpn_": check_xavier,
    "proposal_generator.": lambda w: check_normal(w, 0.01),
    "roi_heads.box_head.conv": check_msra,
    "roi_heads.box_head.fc": check_xavier,
    "roi_heads.box_predictor.cls_score": lambda w: check_normal(w, 0.01),
    "roi_heads.box_predictor.bbox_pred": lambda w: check_normal(w, 0.001),
    "roi_heads.mask_head.": check_msra,
}


@pytest.mark.parametrize("policy", ["msra", "detectron", "msra_all"])
def test_statistics_of_every_weight(by_policy, policy):
    rules = dict(RULES)
    if policy == "detectron":
        rules["backbone.bottom_up."] = check_xavier
    if policy == "msra_all":
        rules["roi_heads.box_head.fc"] = check_msra
    for name, value in by_policy[policy].items():
        if value.dim() > 1:
            (rule,) = (check for prefix, check in rules.items() if name.startswith(prefix))
            rule(value)
        else:
            expected = 1.0 if name.endswith(".norm.weight") else 0.0
            assert (value == expected).all(), name


def test_policies_differ_where_they_should_only(by_policy):
    def differing(a, b):
        # Draws of other layers shift the generator, so compare the distribution, not the values.
        ratios = {n: p.std() / by_policy[b][n].std() for n, p in by_policy[a].items() if p.dim() > 1}
        return {name for name, ratio in ratios.items() if not 0.87 < ratio < 1.15}

    body = {n for n, p in by_policy["msra"].items() if n.startswith("backbone.bottom_up") and p.dim() > 1}
    assert differing("msra", "detectron") <= body
    assert "backbone.bottom_up.stem.conv1.weight" in differing("msra", "detectron")
    assert differing("msra", "msra_all") <= {"roi_heads.box_head.fc1.weight"}


def test_descriptions_differ_in_the_body_only(model):
    a, b = describe(model, "msra"), describe(model, "detectron")
    assert [row for row in a if row not in b] == [("stem or block conv", "MSRA", 53)]
    assert [row for row in b if row not in a] == [("stem or block conv", "Xavier", 53)]
    assert dict((row[0], row[1:]) for row in a) == {
        "fpn conv": ("Xavier", 8),
        "norm": ("one", 53 + 8 + 4 + 4),
        "stem or block conv": ("MSRA", 53),
        "rpn conv": ("normal(0.01)", 3),
        "head conv": ("MSRA", 4),
        "fc": ("Xavier", 1),
        "class predictor": ("normal(0.01)", 1),
        "box predictor": ("normal(0.001)", 1),
        "mask conv": ("MSRA", 4),
        "mask deconv": ("MSRA", 1),
        "mask predictor": ("MSRA", 1),
    }
    assert {rule for _, rule, _ in describe(model, "")} == {"as built"}


def small():
    """A model of every module-independent kind: a stem, fc, a convolution."""
    return nn.Sequential(BasicStem(3, 32, "GN"), nn.Conv2d(32, 8, 3), nn.Linear(8, 4))


def test_seed_fixes_the_values_and_nothing_else_does():
    first, second = small(), small()
    a, b, c = weights(first, "msra", 7), weights(second, "msra", 7), weights(first, "msra", 8)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["1.weight"], c["1.weight"])


def test_describe_draws_and_changes_nothing():
    model = small()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    describe(model, "msra")
    initialize(model, "")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_gradients_and_requires_grad_are_left_alone():
    model = small()
    model[1].weight.requires_grad_(False)
    initialize(model, "msra")
    assert not model[1].weight.requires_grad and model[2].weight.requires_grad
    assert model[2].weight.grad_fn is None and model[2].weight.is_leaf


def test_detectron_is_msra_where_the_body_has_no_gn():
    assert describe(BasicStem(3, 32, "BN"), "detectron")[0][1] == "MSRA"
    assert describe(BasicStem(3, 32, "GN"), "detectron")[0][1] == "Xavier"


def test_grouped_convolution_has_caffe2s_fan_out():
    conv = nn.Conv2d(256, 256, 3, groups=8)
    check_normal(weights(conv, "msra")["weight"], math.sqrt(2 / (256 * 9)))


def test_keypoint_head():
    head = KRCNNConvDeconvUpsampleHead(
        ShapeSpec(channels=64, height=14, width=14), num_keypoints=17, conv_dims=[64]
    )
    values = weights(head, "msra")
    check_msra(values["conv_fcn1.weight"])
    check_msra(values["score_lowres.weight"])
    assert describe(head, "msra") == [("keypoint conv", "MSRA", 1), ("keypoint predictor", "MSRA", 1)]


def test_deformable_blocks_start_as_regular_ones(monkeypatch):
    # The real operator needs Detectron2's compiled extension; the block around it does not.
    def regular(*args, deformable_groups, **kwargs):
        return Conv2d(*args, **kwargs)

    monkeypatch.setattr("detectron2.modeling.backbone.resnet.DeformConv", regular)
    block = DeformBottleneckBlock(32, 32, bottleneck_channels=32, norm="GN")
    values = weights(block, "msra")
    assert (values["conv2_offset.weight"] == 0).all()
    check_msra(values["conv2.weight"])


def test_classifier_of_a_resnet():
    net = ResNet(BasicStem(3, 64, "BN"), ResNet.make_default_stages(18, norm="BN"), num_classes=100)
    check_normal(weights(net, "msra_all")["linear.weight"], 0.01)


def test_retinanet_keeps_its_prior():
    head = RetinaNetHead(
        input_shape=[ShapeSpec(channels=32)], num_classes=4, num_anchors=3, conv_dims=[32], prior_prob=0.01
    )
    prior = head.cls_score.bias.detach().clone()
    initialize(head, "msra")
    assert torch.equal(head.cls_score.bias, prior) and prior[0] < -4
    check_normal(head.cls_score.weight.detach(), 0.01)
    assert (head.bbox_pred.bias == 0).all()


def test_norm_statistics_are_reset():
    model = nn.Sequential(nn.BatchNorm2d(4), FrozenBatchNorm2d(4))
    for norm in model:
        norm.running_mean.fill_(3.0)
        norm.running_var.fill_(3.0)
    model[1].weight.fill_(3.0)
    initialize(model, "msra")
    fresh = FrozenBatchNorm2d(4)
    assert (model[0].running_mean == 0).all() and (model[0].running_var == 1).all()
    assert all(torch.equal(value, getattr(fresh, name)) for name, value in model[1].named_buffers())


def test_shared_parameters_are_drawn_once():
    a, b = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    b.weight = a.weight
    both = weights(nn.Sequential(a, b), "msra")["0.weight"]
    assert torch.equal(both, weights(nn.Conv2d(4, 4, 3), "msra")["weight"])


def test_unknown_policy_lists_the_known_ones():
    with pytest.raises(ValueError, match="MODEL.INIT.POLICY: 'he' .*'msra', 'detectron', 'msra_all'"):
        initialize(small(), "he")


def test_uncovered_parameters_are_refused_before_any_change():
    model = nn.Sequential(small(), nn.Embedding(3, 3))
    before = model[0][1].weight.detach().clone()
    with pytest.raises(ValueError, match=r"1\.weight \(Embedding\)"):
        initialize(model, "msra")
    assert torch.equal(before, model[0][1].weight)
    assert ("other", "as built", 1) in describe(model, "")


def test_policy_of_ones_own(monkeypatch):
    monkeypatch.setattr(INITIALIZATION_REGISTRY, "_obj_map", dict(INITIALIZATION_REGISTRY))

    @INITIALIZATION_REGISTRY.register()
    def mine(layer: Layer):
        return XAVIER if isinstance(layer.module, Conv2d) else msra(layer)

    assert describe(small(), "mine")[0] == ("stem or block conv", "Xavier", 1)
