"""Reading weights runs nothing, reads what all NumPy and Detectron versions wrote, and misses nothing."""

import argparse
import io
import logging
import os
import pickle
import struct
from collections import OrderedDict

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from torchvision.models import resnet18

from rethink_d2.modeling.safe_weights import SafeCheckpointer, read_weights


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes alike as Python 2's str."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_str(self, value):
        data = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_str


def old_numpy(value):
    return pickle.dumps(value, 2).replace(b"numpy._core", b"numpy.core")


def python2(value):
    out = io.BytesIO()
    Python2Pickler(out, 2).dump(value)
    return out.getvalue().replace(b"numpy._core", b"numpy.core")


WRITERS = {f"protocol{n}": lambda value, n=n: pickle.dumps(value, n) for n in range(6)}
WRITERS |= {"old_numpy": old_numpy, "python2": python2}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A file that the tests write in turn."""
    return tmp_path_factory.mktemp("weights") / "weights.pkl"


# ---------------------------------------------------------------- pickles of arrays

DTYPES = st.one_of(
    npst.boolean_dtypes(),
    npst.integer_dtypes(endianness="?"),
    npst.unsigned_integer_dtypes(endianness="?"),
    npst.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
    npst.complex_number_dtypes(endianness="?", sizes=(64, 128)),
)
ARRAYS = npst.arrays(DTYPES, npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))


@settings(deadline=None, max_examples=150)
@given(ARRAYS, st.sampled_from(sorted(WRITERS)), st.sampled_from("CF"), st.booleans())
def test_arrays_of_all_writers_are_read(path, array, writer, order, transpose):
    array = np.asarray(array, order=order)
    if transpose and array.ndim > 1:
        array = array.swapaxes(0, 1)
    path.write_bytes(WRITERS[writer]({"a": array, "more": [array, ("x", None, 1.5)]}))
    read = read_weights(str(path))
    for got in (read["a"], read["more"][0]):
        assert got.dtype == array.dtype.newbyteorder("=") and got.dtype.isnative
        np.testing.assert_array_equal(got, array)
        assert got.flags.writeable and torch.from_numpy(got).shape == array.shape
    assert read["more"][1] == ("x", None, 1.5)


@pytest.mark.parametrize("writer", WRITERS)
def test_scalars_and_ordered_dicts_are_read(path, writer):
    model = OrderedDict(b=np.float32(1.5), a=np.int64(2))
    model._metadata = OrderedDict(version=1)  # as torch's state_dict() has it
    path.write_bytes(WRITERS[writer]({"model": model}))
    read = read_weights(str(path))
    assert read == {"model": {"b": 1.5, "a": 2}} and list(read["model"]) == ["b", "a"]
    assert read["model"]["b"].dtype == np.float32


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(WRITERS)), st.floats(0, 1, exclude_max=True))
def test_a_truncated_pickle_is_refused(path, writer, part):
    data = WRITERS[writer]({"a": np.arange(6.0).reshape(2, 3), "b": "text"})
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(ValueError, match=str(path)):
        read_weights(str(path))


# ---------------------------------------------------------------- programs


class Call:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Forged:
    """An array of object pointers out of the file's bytes: NumPy's own unpickling makes it."""

    class Dtype:
        def __reduce__(self):
            return np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0)

    def __reduce__(self):
        state = 1, (1,), self.Dtype(), False, b"\0" * 8
        return np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), state


REFUSED = [
    (Call(os.mkdir, "made"), "posix.mkdir"),
    (Call(eval, "1"), "eval"),
    (Call(getattr, [], "append"), "getattr"),
    (Call(np.dtype, "f4,O"), "numpy.dtype('f4,O')"),
    (torch.zeros(2), "torch._utils._rebuild_tensor_v2"),
    (np.array([{}], dtype=object), "numpy.dtype('|O8')"),
    (np.zeros(1, "f4,i4"), "numpy.dtype('|V8')"),
    (np.array(["text"]), "numpy.dtype('<U4')"),
    (Forged(), "numpy.dtype('|O8')"),
    (Call(io.open, "made", "w"), "open"),
]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("value, name", REFUSED, ids=lambda x: x if type(x) is str else "")
def test_a_pickle_that_names_anything_else_is_refused(tmp_path, monkeypatch, protocol, value, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"a": value}, protocol))
    with pytest.raises(ValueError) as e:
        read_weights("bad.pkl")
    assert all(word in str(e.value) for word in ["bad.pkl", name, "only arrays", "torch.save("]), str(e.value)
    assert os.listdir() == ["bad.pkl"]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "value, name",
    [
        (Call(os.mkdir, "made"), "posix.mkdir"),
        (argparse.Namespace(lr=1), "argparse.Namespace"),
        (np.float64(3), "multiarray.scalar"),
        (np.zeros(2), "multiarray._reconstruct"),
    ],
    ids=lambda x: x if type(x) is str else "",
)
def test_a_torch_file_that_names_anything_else_is_refused(tmp_path, monkeypatch, zipped, value, name):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "x": value}, "bad.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError) as e:
        SafeCheckpointer(torch.nn.Linear(1, 1)).load("bad.pth")
    assert all(word in str(e.value) for word in ["bad.pth", name, "only arrays", "torch.save("]), str(e.value)
    assert os.listdir() == ["bad.pth"]


@pytest.mark.parametrize("data", [b"", b"hello world", b"PK\x03\x04 and no more", pickle.dumps([1])])
@pytest.mark.parametrize("name", ["bad.pth", "bad.pt", "bad.pkl"])
def test_what_is_no_file_of_weights_is_refused_by_name(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=name):
        read_weights(str(tmp_path / name))


def test_a_truncated_torch_file_is_refused_by_name(tmp_path):
    torch.save({"model": {"a": torch.zeros(500)}}, tmp_path / "a.pth")
    (tmp_path / "a.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:-100])
    with pytest.raises(ValueError, match="a.pth is damaged"):
        read_weights(str(tmp_path / "a.pth"))


def test_a_missing_file_is_an_os_error(tmp_path):
    for name in ("a.pkl", "a.pth"):
        with pytest.raises(FileNotFoundError):
            read_weights(str(tmp_path / name))


# ---------------------------------------------------------------- into a model


def detector(norm):
    """A narrow Faster R-CNN R50-FPN."""
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    r, levels = cfg.MODEL.RESNETS, ["p2", "p3", "p4", "p5"]
    r.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    r.NORM = cfg.MODEL.FPN.NORM = norm
    r.STEM_OUT_CHANNELS = r.RES2_OUT_CHANNELS = r.WIDTH_PER_GROUP = cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.RPN.IN_FEATURES = [*levels, "p6"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_HEADS.IN_FEATURES = "StandardROIHeads", levels
    box = cfg.MODEL.ROI_BOX_HEAD
    box.NAME, box.NUM_FC, box.FC_DIM, box.POOLER_RESOLUTION = "FastRCNNConvFCHead", 2, 32, 7
    return build_model(cfg)


@pytest.fixture(scope="module")
def models():
    """Detectors by their norm; every test loads all that it looks at."""
    return {norm: detector(norm) for norm in ("GN", "BN", "FrozenBN")}


GENERATOR = np.random.default_rng(0)


def random_weights(model, prefix):
    """New values, other ones at each call, for what begins with a prefix, by the rest of the names."""
    return {
        name.removeprefix(prefix): GENERATOR.random(value.shape, dtype=np.float32)
        for name, value in model.state_dict().items()
        if name.startswith(prefix) and not name.endswith("num_batches_tracked")
    }


def assert_loaded(model, weights, prefix):
    state = model.state_dict()
    assert weights
    for name, value in weights.items():
        np.testing.assert_array_equal(state[prefix + name].numpy(), value, err_msg=name)


BODY = "backbone.bottom_up."


def caffe2_name(name, norm):
    """Detectron's name of a ResNet's parameter; `norm` is "gn" or "bn"."""
    module, _, kind = name.rpartition(".")
    kind = {
        "weight": "s" if "norm" in module else "w",
        "bias": "b",
        "running_mean": "rm",
        "running_var": "riv",
    }[kind]
    module = module.replace("stem.conv1.norm", "conv1.norm" if norm == "gn" else "res.conv1.norm")
    for new, old in (
        ("stem.conv1", "conv1"),
        ("shortcut", "branch1"),
        *((f"{block}.conv{i}", f"{block}.branch2{'abc'[i - 1]}") for block in range(6) for i in (1, 2, 3)),
        ("norm", norm),
    ):
        module = module.replace(new, old)
    return f"{module}_{kind}".replace(".", "_")


def test_caffe2_names_are_as_detectrons_files_have_them():
    names = {
        "stem.conv1.weight": "conv1_w",
        "stem.conv1.norm.weight": "conv1_gn_s",
        "res2.0.conv1.weight": "res2_0_branch2a_w",
        "res2.0.conv3.norm.bias": "res2_0_branch2c_gn_b",
        "res2.0.shortcut.norm.weight": "res2_0_branch1_gn_s",
    }
    assert {name: caffe2_name(name, "gn") for name in names} == names
    assert caffe2_name("stem.conv1.norm.bias", "bn") == "res_conv1_bn_b"


@pytest.mark.parametrize("writer", ["python2", "old_numpy", "protocol4", "protocol5"])
@pytest.mark.parametrize("norm", ["GN", "FrozenBN"])
def test_detectrons_imagenet_weights_load(tmp_path, models, norm, writer, caplog):
    model = models[norm]
    weights = random_weights(model, BODY)
    if norm == "FrozenBN":  # Detectron's files have the statistics folded into scale and shift
        weights = {k: v for k, v in weights.items() if "running" not in k}
    blobs = {caffe2_name(k, "gn" if norm == "GN" else "bn"): v for k, v in weights.items()}
    blobs |= {"pred_w": np.zeros((10, 4), np.float32), "conv1_w_momentum": np.zeros(3, np.float32)}
    (tmp_path / "R-50.pkl").write_bytes(WRITERS[writer](blobs))
    SafeCheckpointer(model).load(str(tmp_path / "R-50.pkl"))
    assert_loaded(model, weights, BODY)
    assert "linear.weight" in caplog.text and "momentum" not in caplog.text


def test_detectrons_detector_loads(tmp_path, models):
    model = models["GN"]
    weights = random_weights(model, BODY)
    blobs = {caffe2_name(k, "gn"): v for k, v in weights.items()}
    others = {
        "fpn_inner_res5_2_sum_w": "backbone.fpn_lateral5.weight",
        "conv_rpn_fpn2_w": "proposal_generator.rpn_head.conv.weight",
        "fc6_w": "roi_heads.box_head.fc1.weight",
    }
    state = random_weights(model, "")
    blobs |= {old: state[new] for old, new in others.items()}
    (tmp_path / "model_final.pkl").write_bytes(python2({"blobs": blobs, "cfg": "MODEL: {}\n"}))
    SafeCheckpointer(model).load(str(tmp_path / "model_final.pkl"))
    assert_loaded(model, weights, BODY)
    assert_loaded(model, {new: state[new] for new in others.values()}, "")


@pytest.mark.parametrize("author", ["Caffe2", "torchvision"])
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_detectron2s_imagenet_weights_load(tmp_path, models, norm, author):
    model = models[norm]
    weights = random_weights(model, BODY)
    names = {k: caffe2_name(k, "bn") if author == "Caffe2" else k for k in weights}
    data = {
        "model": {names[k]: v for k, v in weights.items()} | {"stem.fc.weight": np.zeros(2, np.float32)},
        "__author__": author,
        "matching_heuristics": True,
    }
    (tmp_path / "R-50.pkl").write_bytes(old_numpy(data))
    SafeCheckpointer(model).load(str(tmp_path / "R-50.pkl"))
    assert_loaded(model, weights, BODY)


def test_a_checkpoint_loads_with_its_optimizer(tmp_path, models):
    model = models["GN"]
    weights = random_weights(model, "")
    torch.save(
        {
            "model": {k: torch.from_numpy(v) for k, v in weights.items()},
            "iteration": 7,
            "optimizer": {"lr": 0.1},
        },
        tmp_path / "model_0000007.pth",
    )
    extra = SafeCheckpointer(model).load(str(tmp_path / "model_0000007.pth"))
    assert extra == {"iteration": 7, "optimizer": {"lr": 0.1}}
    assert_loaded(model, weights, "")


def test_matching_heuristics_on_request(tmp_path, models):
    model = models["GN"]
    weights = random_weights(model, BODY)
    path = str(tmp_path / "bare.pth")
    torch.save({k: torch.from_numpy(v) for k, v in weights.items()}, path)
    with pytest.raises(ValueError, match=r"\?matching_heuristics=True"):
        SafeCheckpointer(model).load(path)
    SafeCheckpointer(model).load(path + "?matching_heuristics=True")
    assert_loaded(model, weights, BODY)


# ---------------------------------------------------------------- weights of another model


def save(weights, path):
    torch.save({"model": {k: torch.as_tensor(v) for k, v in weights.items()}}, path)
    return str(path)


@pytest.mark.parametrize("norm", ["GN", "BN", "FrozenBN"])
def test_other_names_are_refused(tmp_path, models, norm):
    path = save(resnet18(weights=None).state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(ValueError) as e:
        SafeCheckpointer(models[norm]).load(path)
    words = [path, "conv1.weight (64, 3, 7, 7)", BODY + "stem.conv1.weight (32, 3, 7, 7)"]
    words += ["python -m rethink_d2.modeling.convert"]
    assert all(word in str(e.value) for word in words), str(e.value)


def test_other_shapes_are_refused(tmp_path, models):
    weights = {k: np.repeat(v, 2, 0) for k, v in random_weights(models["GN"], "").items()}
    with pytest.raises(ValueError, match="fits 0 of"):
        SafeCheckpointer(models["GN"]).load(save(weights, tmp_path / "wide.pth"))


def test_half_of_the_backbone_is_enough_and_the_rest_is_logged(tmp_path, models, caplog):
    model = models["GN"]
    weights = list(random_weights(model, BODY).items())
    half = (len(weights) + 1) // 2
    checkpointer = SafeCheckpointer(model)
    enough = {BODY + k: v for k, v in weights[:half]} | {"head.extra": np.zeros(2)}
    caplog.set_level(logging.WARNING, "fvcore")
    checkpointer.load(save(enough, tmp_path / "half.pth"))
    assert all(name in caplog.text for name in ("head.extra", "rpn_head.conv", "res5.2.conv3"))
    less = {BODY + k: v for k, v in weights[: half - 1]}
    with pytest.raises(ValueError, match=f"fits {half - 1} of the backbone's {len(weights)}"):
        checkpointer.load(save(less, tmp_path / "less.pth"))
    # The same checkpointer goes on after a refusal.
    checkpointer.load(save(enough, tmp_path / "half.pth"))


def test_what_is_no_array_among_the_weights_is_named(tmp_path, models):
    path = tmp_path / "mm.pth"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "epoch": 3}, path)
    with pytest.raises(ValueError, match="mm.pth: 'state_dict' among the weights"):
        SafeCheckpointer(models["GN"]).load(str(path))
