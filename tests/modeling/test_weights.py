"""What weights were trained with, by name and by what a file tells."""

import pytest
import torch

from rethink_d2 import recipe
from rethink_d2.modeling.convert import PIXELS, convert_torchvision, main
from rethink_d2.modeling.weights import known_weights

OWN = {"format": "BGR", "mean": [103.53, 116.28, 123.675], "std": [1.0, 1.0, 1.0]}


def save(path, names, **entries):
    torch.save({"model": {name: torch.zeros(1) for name in names}, **entries}, path)
    return str(path)


@pytest.mark.parametrize(
    "name, format, holds",
    [
        ("catalog://ImageNetPretrained/FAIR/R-50-GN", "BGR", "group norm"),
        ("detectron2://ImageNetPretrained/torchvision/R-50.pkl", "RGB", "batch norm"),
        ("detectron2://ImageNetPretrained/torchvision/R-50.pkl?x=1", "RGB", "batch norm"),
        ("catalog://ImageNetPretrained/MSRA/R-50", "BGR", "folded"),
        ("detectron2://ImageNetPretrained/MSRA/R-50.pkl", "BGR", "batch norm"),
    ],
)
def test_well_known_names(name, format, holds):
    known = known_weights(name)
    assert known.format == format and holds in known.holds


@pytest.mark.parametrize(
    "names, author, holds, fits, stride",
    [
        (["res2.0.conv3.norm.weight", "res2.0.conv3.norm.running_mean"], "torchvision", "batch", "BN", False),
        (["res2.0.conv3.norm.weight", "res2.0.conv3.norm.running_mean"], "x", "batch", "FrozenBN", None),
        (["res2.0.conv2.norm.weight", "res2.0.conv2.norm.running_mean"], "torchvision", "batch", "BN", None),
        (["res2.0.conv3.norm.weight", "res2.0.conv3.norm.bias"], "x", "group", "GN", None),
        (["conv1_1.weight"], "torchvision", "no normalization", '""', None),
    ],
)
def test_a_file_tells_its_pixels_and_norm(tmp_path, names, author, holds, fits, stride):
    names = ["backbone." + name for name in names]
    path = save(tmp_path / "a.pth", names, __author__=author, pixels=OWN)
    known = known_weights(path + "?matching_heuristics=True")
    assert (known.format, list(known.mean), list(known.std)) == tuple(OWN.values())
    assert holds in known.holds and fits in known.fits and known.stride_in_1x1 is stride


def test_files_that_tell_nothing(tmp_path):
    assert known_weights(save(tmp_path / "a.pth", ["a"])) is None
    (tmp_path / "b.pth").write_bytes(b"no zip")
    assert known_weights(str(tmp_path / "b.pth")) is None
    assert known_weights(str(tmp_path / "absent.pth")) is None
    assert known_weights("") is None


def test_an_unsafe_file_is_refused(tmp_path):
    path = save(tmp_path / "a.pth", ["a"], pixels=PIXELS, trap=pytest.approx)
    with pytest.raises(ValueError, match="a.pth refers to"):
        known_weights(path)


def problems(weights, *opts):
    """What the check of a recipe says about converted weights of ResNet-50, by key."""
    base = ["MODEL.WEIGHTS", weights, "MODEL.RESNETS.NORM", "BN", "MODEL.RESNETS.STRIDE_IN_1X1", "False"]
    base += ["INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", str(PIXELS["mean"])]
    cfg = recipe.resolve(recipe.load("", [*base, "MODEL.PIXEL_STD", str(PIXELS["std"]), *opts]))
    keys = ("INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "MODEL.WEIGHTS", "config")
    keys += ("MODEL.RESNETS.NORM", "MODEL.RESNETS.STRIDE_IN_1X1")
    return {p.key: str(p) for p in recipe.check(cfg) if p.key in keys}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Names of a bottleneck ResNet, through the program."""
    folder = tmp_path_factory.mktemp("converted")
    names = ["conv1.weight", "bn1.running_mean", "layer1.0.conv3.weight", "layer1.0.bn3.running_mean"]
    assert convert_torchvision(dict.fromkeys(names)).names.keys() == set(names)
    torch.save({name: torch.zeros(1) for name in names}, folder / "in.pth")
    assert main([str(folder / "in.pth"), str(folder / "R-50.pth")]) == 0
    return str(folder / "R-50.pth")


@pytest.mark.parametrize(
    "key, value",
    [
        ("INPUT.FORMAT", "BGR"),
        ("MODEL.PIXEL_MEAN", "[103.53, 116.28, 123.675]"),
        ("MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]"),
        ("MODEL.RESNETS.NORM", "GN"),
        ("MODEL.RESNETS.STRIDE_IN_1X1", "True"),
    ],
)
def test_a_recipe_that_does_not_fit_the_file_is_refused(converted, key, value):
    assert problems(converted) == {}
    found = problems(converted, key, value)
    assert list(found) == [key] and converted in found[key]
