"""Converted weights compute what torchvision computes."""

import argparse

import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from torch import nn

from rethink_d2.modeling import build_scratch_resnet_backbone
from rethink_d2.modeling.convert import PIXELS, convert_torchvision, main
from rethink_d2.modeling.vgg import VGG16

# Depth, groups, width per group, channels of res2.
RESNETS = {
    "resnet18": (18, 1, 64, 64),
    "resnet34": (34, 1, 64, 64),
    "resnet50": (50, 1, 64, 256),
    "resnet101": (101, 1, 64, 256),
    "resnet152": (152, 1, 64, 256),
    "resnext50_32x4d": (50, 32, 4, 256),
    "resnext101_32x8d": (101, 32, 8, 256),
    "resnext101_64x4d": (101, 64, 4, 256),
    "wide_resnet50_2": (50, 1, 128, 256),
    "wide_resnet101_2": (101, 1, 128, 256),
}


def filled(model):
    """A model made on no device, with random weights and batch norms that have trained."""
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            tensor.fill_(9)
        elif tensor.dim() > 1:
            tensor.uniform_(-1, 1).mul_((6 / tensor[0].numel()) ** 0.5)
        else:
            low, high = (-0.1, 0.1) if name.endswith(("bias", "mean")) else (0.5, 1.5)
            tensor.uniform_(low, high)
    return model.eval()


def torchvision_model(name):
    with torch.device("meta"):
        return torchvision.models.get_model(name, weights=None)


def backbone(name, norm="BN"):
    """The backbone of this project that takes over a torchvision model's weights."""
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    r = cfg.MODEL.RESNETS
    r.DEPTH, r.NUM_GROUPS, r.WIDTH_PER_GROUP, r.RES2_OUT_CHANNELS = RESNETS[name]
    r.STEM_OUT_CHANNELS, r.NORM, r.STRIDE_IN_1X1, r.OUT_FEATURES = 64, norm, False, ["res5"]
    with torch.device("meta"):
        return build_scratch_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()


@pytest.mark.parametrize(
    "name, norm",
    [("resnet18", "BN"), ("resnet18", "FrozenBN"), ("resnet50", "BN"), ("resnext50_32x4d", "BN")],
)
def test_res5_is_torchvisions_layer4(name, norm):
    source, target = filled(torchvision_model(name)), backbone(name, norm).to_empty(device="cpu")
    missing, unexpected = target.load_state_dict(convert_torchvision(source.state_dict(), "").model, False)
    assert not unexpected and all(key.endswith("num_batches_tracked") for key in missing)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        x = image
        for child in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            x = source.get_submodule(child)(x)
        got = target(image)["res5"]
    assert x.std() > 0.1
    torch.testing.assert_close(got, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", RESNETS)
def test_every_tensor_of_every_resnet_has_its_place(name):
    source, wanted = torchvision_model(name).state_dict(), backbone(name).state_dict()
    done = convert_torchvision(source)
    prefix = "backbone.bottom_up."
    assert {k: v.shape for k, v in done.model.items()} == {
        prefix + k: v.shape for k, v in wanted.items() if not k.endswith("num_batches_tracked")
    }
    assert sorted([*done.names, *done.dropped]) == sorted(source)
    left = {key for key in done.dropped if not key.endswith("num_batches_tracked")}
    assert left == {"fc.weight", "fc.bias"}
    assert all(done.model[new] is source[old] for old, new in done.names.items())


def test_the_prefix_is_free():
    source = torchvision_model("resnet18").state_dict()
    assert "backbone.stem.conv1.norm.running_var" in convert_torchvision(source, "backbone.").model


def test_vgg16_is_torchvisions():
    source = torchvision_model("vgg16")
    source.classifier[0], source.classifier[3] = nn.Linear(512 * 7 * 7, 32), nn.Linear(32, 32)
    source.classifier[6] = nn.Linear(32, 10)
    filled(source)

    box_head = FastRCNNConvFCHead(ShapeSpec(512, 7, 7), conv_dims=[], fc_dims=[32, 32])
    parts = {"backbone": VGG16(), "roi_heads": nn.ModuleDict({"box_head": box_head})}
    done = convert_torchvision(source.state_dict())
    nn.ModuleDict(parts).load_state_dict(done.model)
    assert done.dropped == ["classifier.6.weight", "classifier.6.bias"]
    image, feature = torch.randn(1, 3, 64, 64), torch.randn(2, 512, 7, 7)
    with torch.no_grad():
        conv5 = source.features[:30](image)
        assert conv5.std() > 0.1
        torch.testing.assert_close(parts["backbone"](image)["conv5"], conv5, rtol=1e-5, atol=1e-5)
        fc7 = source.classifier[:6](feature.flatten(1))
        torch.testing.assert_close(box_head(feature), fc7, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name, words",
    [
        ("vgg16_bn", ["features.1.weight", "without batch norm"]),
        ("vgg13", ["unknown", "features.15.weight"]),
        ("vgg19", ["features.16.weight"]),
        ("densenet121", ["features.conv0.weight", "more"]),
        ("mobilenet_v2", ["features.0.0.weight"]),
        ("shufflenet_v2_x0_5", ["conv1.0.weight"]),
    ],
)
def test_other_models_are_refused(name, words):
    with pytest.raises(ValueError) as e:
        convert_torchvision(torchvision_model(name).state_dict())
    assert all(word in str(e.value) for word in words), str(e.value)


@pytest.mark.parametrize(
    "weights, word",
    [
        ({}, "nothing of theirs"),
        ({"fc.weight": torch.zeros(1)}, "nothing of theirs"),
        ({"conv1.weight": torch.zeros(1), "layer5.0.conv1.weight": torch.zeros(1)}, "unknown layer5.0.conv1"),
        ({"layer1.0.se.fc1.weight": torch.zeros(1)}, "unknown layer1.0.se"),
        ({"module.conv1.weight": torch.zeros(1)}, "unknown module.conv1"),
    ],
)
def test_unknown_names_are_refused(weights, word):
    with pytest.raises(ValueError, match=word):
        convert_torchvision(weights)


def test_vgg16_takes_no_prefix():
    with pytest.raises(ValueError, match="--prefix"):
        convert_torchvision({"features.0.weight": torch.zeros(1)}, "backbone.")


# ---------------------------------------------------------------- the program


@pytest.fixture
def resnet(tmp_path):
    path = tmp_path / "resnet18.pth"
    torch.save(filled(torchvision_model("resnet18")).state_dict(), path)
    return path


def test_the_file_has_weights_and_their_pixels(tmp_path, resnet, capsys):
    out = tmp_path / "new" / "R-18.pth"
    assert main([str(resnet), str(out), "--prefix", "backbone."]) == 0
    data = torch.load(out, weights_only=True)
    pixels = data.pop("pixels")
    assert pixels == PIXELS and data.pop("__author__") == "torchvision" and list(data) == ["model"]
    # torchvision documents mean and std for pixels of 0-1.
    torchvisions = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    assert pixels["mean"] == pytest.approx([255 * x for x in torchvisions.mean])
    assert pixels["std"] == pytest.approx([255 * x for x in torchvisions.std])
    source = torch.load(resnet, weights_only=True)
    assert torch.equal(data["model"]["backbone.res2.0.conv1.weight"], source["layer1.0.conv1.weight"])
    printed = capsys.readouterr().out
    assert "layer2.0.downsample.1.bias -> backbone.res3.0.shortcut.norm.bias\n" in printed
    assert "fc.weight dropped\n" in printed and f"{out}: 100 tensors, 22 dropped" in printed


def test_weights_inside_a_training_checkpoint_are_found(tmp_path, resnet):
    torch.save({"model": torch.load(resnet, weights_only=True), "epoch": 3}, tmp_path / "checkpoint.pth")
    assert main([str(tmp_path / "checkpoint.pth"), str(tmp_path / "out.pth")]) == 0


def test_what_is_refused_leaves_no_file(tmp_path, resnet, capsys):
    out = tmp_path / "out.pth"
    torch.save({"model": {}, "args": argparse.Namespace()}, tmp_path / "unsafe.pth")
    torch.save({"a.weight": torch.zeros(1)}, tmp_path / "other.pth")
    for name, word in (("unsafe", "argparse.Namespace"), ("other", "a.weight"), ("absent", "No such file")):
        assert main([str(tmp_path / f"{name}.pth"), str(out)]) == 2
        error = capsys.readouterr().err
        assert word in error and f"{name}.pth" in error
    with pytest.raises(SystemExit) as e:
        main([str(resnet), str(tmp_path / "out.bin")])
    assert e.value.code == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.pth", "resnet18.pth", "unsafe.pth"]
