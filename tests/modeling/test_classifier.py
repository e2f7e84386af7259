"""The classifier, and that what it learns reaches a detector by name alone."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from rethink_d2 import model_zoo, recipe
from rethink_d2.modeling import describe, initialize
from rethink_d2.modeling.classifier import Classifier

CLASSIFIER, DETECTOR = "mini/imagenet_R_18_FPN_gn.yaml", "mini/scratch_mask_rcnn_R_18_FPN_gn.yaml"
# A VGG-16 of two channels, as a classifier and as a Faster R-CNN.
VGG = {
    "MODEL.BACKBONE.NAME": "build_vgg16_backbone",
    "MODEL.VGG.WIDTH": 2,
    "MODEL.CLASSIFIER.IN_FEATURE": "conv5",
    "MODEL.CLASSIFIER.POOLER_RESOLUTION": 7,
    "MODEL.CLASSIFIER.FC_DIMS": [12, 12],
    "MODEL.MASK_ON": False,
    "MODEL.RPN.IN_FEATURES": ["conv5"],
    "MODEL.ROI_HEADS.IN_FEATURES": ["conv5"],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[32, 64]],
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 0,
    "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 12,
}


def built(name, policy="msra", seed=0, **changes):
    cfg = recipe.load(model_zoo.get_config_file(name), [])
    changes = {**(VGG if changes.pop("vgg", False) else {}), "MODEL.DEVICE": "cpu", **changes}
    cfg.merge_from_list([x for pair in changes.items() for x in pair])
    model = build_model(cfg)
    torch.manual_seed(seed)
    initialize(model, policy)
    return model


def samples(*sizes):
    torch.manual_seed(3)
    return [{"image": torch.rand(3, s, s) * 255, "label": i} for i, s in enumerate(sizes)]


@pytest.mark.parametrize(
    ("vgg", "shared"), [(False, ("backbone.bottom_up.",)), (True, ("backbone.", "roi_heads.box_head."))]
)
def test_a_checkpoint_is_the_start_of_a_detector(tmp_path, vgg, shared):
    classifier = built(CLASSIFIER, vgg=vgg, seed=1)
    DetectionCheckpointer(classifier, str(tmp_path)).save("model_final", iteration=7)
    detector = built(DETECTOR, vgg=vgg, seed=2)
    before = {k: v.clone() for k, v in detector.state_dict().items()}
    DetectionCheckpointer(detector).load(str(tmp_path / "model_final.pth"))
    learnt, after = classifier.state_dict(), detector.state_dict()
    common = learnt.keys() & after.keys()
    assert learnt.keys() - common == {"classifier.weight", "classifier.bias"}
    assert common == {key for key in after if key.startswith(shared)}
    assert all(torch.equal(after[key], learnt[key]) for key in common)
    # What a classifier does not have stays as initialized.
    assert all(torch.equal(after[key], before[key]) for key in after.keys() - common)
    assert any(not torch.equal(before[key], learnt[key]) for key in common)
    if vgg:
        assert {"roi_heads.box_head.fc1.weight", "roi_heads.box_head.fc2.bias"} <= common


@pytest.mark.parametrize("vgg", [False, True])
def test_training_gives_the_cross_entropy_of_the_scores(vgg):
    model, batch = built(CLASSIFIER, vgg=vgg), samples(32, 32, 32)
    losses = model(batch)
    assert losses.keys() == {"loss_cls"}
    losses["loss_cls"].backward()
    # Nothing is left without a part in the loss, as distributed training requires.
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        scores = torch.stack([output["scores"] for output in model.eval()(batch)])
    assert scores.shape == (3, 25)
    torch.testing.assert_close(scores.sum(1), torch.ones(3))
    torch.testing.assert_close(F.nll_loss(scores.log(), torch.arange(3)), losses["loss_cls"])


def test_scores_are_those_of_each_image_alone():
    model, batch = built(CLASSIFIER).eval(), samples(32, 32)
    with torch.no_grad():
        together, alone = model(batch), [model([sample])[0] for sample in batch]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a["scores"], b["scores"])
    assert not torch.allclose(alone[0]["scores"], alone[1]["scores"])


def test_pixels_are_normalized_as_in_a_detector():
    mean, std = [10.0, 20.0, 30.0], [2.0, 4.0, 8.0]
    keys = {"MODEL.PIXEL_MEAN": mean, "MODEL.PIXEL_STD": std}
    plain = {"MODEL.PIXEL_MEAN": [0.0] * 3, "MODEL.PIXEL_STD": [1.0] * 3}
    image = samples(32)[0]["image"]
    done = (image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.no_grad():
        a = built(CLASSIFIER, **keys).eval()([{"image": image}])[0]["scores"]
        b = built(CLASSIFIER, **plain).eval()([{"image": done}])[0]["scores"]
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("policy", "rule"), [("msra", "Xavier"), ("detectron", "Xavier"), ("msra_all", "MSRA")]
)
def test_a_policy_covers_all_layers(policy, rule):
    model = built(CLASSIFIER, policy, vgg=True)
    assert describe(model, policy) == [
        ("stem or block conv", "MSRA", 13),
        ("fc", rule, 2),
        ("classifier", "normal(0.01)", 1),
    ]


def test_a_backbone_of_ones_own_needs_no_config():
    body = built(DETECTOR).backbone.bottom_up
    model = Classifier(
        backbone=body, in_feature="res3", num_classes=4, pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3
    )
    assert model.classifier.weight.shape == (4, 64)
    assert model.body is body and "backbone.stem.conv1.weight" in model.state_dict()


def test_a_feature_that_the_backbone_lacks_is_named():
    with pytest.raises(ValueError, match=r"MODEL.CLASSIFIER.IN_FEATURE is 'p5': .* res2, res3, res4, res5"):
        built(CLASSIFIER, **{"MODEL.CLASSIFIER.IN_FEATURE": "p5"})


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("R_50_gn", 25_557_032), ("R_101_gn", 44_549_160), ("VGG_16", 138_357_544)],
)
def test_the_networks_are_the_published_ones(name, parameters):
    """The numbers of torchvision's resnet50, resnet101 and vgg16."""
    cfg = recipe.load(model_zoo.get_config_file(f"imagenet/imagenet_{name}_100ep.yaml"), [])
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        assert sum(p.numel() for p in build_model(cfg).parameters()) == parameters
