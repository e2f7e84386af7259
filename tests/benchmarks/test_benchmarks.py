"""Every benchmark on tiny inputs: it compares what it has to, and its output is whole. No time is judged."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from rethink_d2.benchmarks import common, step, tta
from rethink_d2.benchmarks.__main__ import NAMES, cli


@pytest.fixture
def results(capsys, real_data):
    """Runs a benchmark and returns its results by name."""

    def get(*args):
        cli(["--json", *map(str, args), "--repeats", "1"])
        out = capsys.readouterr().out
        printed = json.loads(out[out.index('{\n "environment"') :])
        assert printed["environment"]["torch"] == torch.__version__.partition("+")[0]
        for result in printed["results"]:
            values = np.array([*result["ours"], *result["theirs"], result["ratio"]])
            assert np.isfinite(values).all() and (values > 0).all(), result
        return {f"{r['name']} | {r['peer']}": r for r in printed["results"]}

    return get


def test_every_module_is_a_command():
    assert NAMES == ["evaluation", "mapper", "overhead", "startup", "step", "tta"]


def test_mapper(results, real_data):
    found = results("mapper", "--data-root", real_data, "--images", 3, "--shorter-side", 100)
    assert len(found) == 6
    assert "annotations equal" in found["sample with polygons | Detectron2"]["note"]


def test_evaluation(results):
    found = results("evaluation", "--images", 20, "--detections", 200)
    assert [name.partition(" | ")[0] for name in found] == [
        "COCO bbox",
        "COCO segm",
        "COCO bbox + segm",
        "VOC",
        "COCO keypoints",
    ]
    assert all("metrics equal" in r["note"] for r in found.values())


def test_step(results):
    arguments = ["--models", "mini", "--shape", 64, 96, "--threads", 1, "--no-memory", "--profile"]
    found = results("step", *arguments)
    for what in step.VARIANTS:
        assert "losses and weights equal" in found[f"mini step, {what} | Detectron2"]["note"]
        parts = [found[f"mini step, {what}: {kind} | Detectron2"] for kind in (*step.KINDS, step.OTHER)]
        for side in ("ours", "theirs"):
            assert sum(part[side][0] for part in parts) == pytest.approx(100)


@pytest.mark.slow
def test_step_of_the_full_model_and_torchvision_s(results):
    found = results("step", "--models", "R50", "--shape", 160, 240, "--threads", 1)
    assert sum("torchvision" in name for name in found) == sum("memory" in name for name in found) == 2


@pytest.mark.slow
def test_overhead(results):
    found = results("overhead", "--models", "mini", "--iterations", 1, "--threads", 1)
    assert len(found) == 4
    assert found["mini: added in all | Detectron2"]["theirs"] == [100]


@pytest.mark.parametrize("sizes, default", [([64, 80], "pads"), ([64], "detections equal, 100 per image")])
def test_tta(results, sizes, default):
    more = ["--models", "mini", "--images", 1, "--threads", 1, "--no-memory"]
    found = results("tta", "--sizes", *sizes, *more)
    what = f"mini with {2 * len(sizes)} views | Detectron2, passes of "
    assert "detections equal, 100 per image" in found[f"{what}2"]["note"]
    assert default in found[f"{what}3"]["note"]


@pytest.mark.slow
def test_startup(results, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = results("startup", "--images", 200, "--processes", 2)
    assert len(found) == 5
    assert any(name.startswith("2 processes with 2 workers each") for name in found)


def test_what_is_missing_is_named(capsys):
    with pytest.raises(SystemExit) as exited:
        cli(["step", "--dataset", "coco_2014_valminusminival"])
    assert exited.value.code == 2
    assert "DETECTRON2_DATASETS" in capsys.readouterr().err


def test_times_are_taken_in_turn():
    calls = []
    times = common.compare(*(lambda c=c: calls.append(c) for c in "abc"), repeats=2, warm_up=1)
    assert "".join(calls) == "abc" * 3
    assert [len(t) for t in times] == [2, 2, 2]


def test_table_and_ratio():
    result = common.Result("a", "b", [1.0, 2.0, 9.0], [3.0, 4.0, 8.0], note="c")
    assert result.ratio == 2
    assert common.table([result]).splitlines()[-1].split("|")[1:-1] == [
        " a      ",
        " b      ",
        " 2 s    ",
        " 4 s      ",
        " 2.00x   ",
        " c      ",
    ]


@pytest.mark.slow
def test_peak_memory_is_the_function_s_own():
    big = b"1" * 2_000_000_000
    small, large = (common.peak_memory(bytearray, size) for size in (1000, 400_000_000))
    assert large - small == pytest.approx(400, rel=0.1)
    assert small < len(big) / 1e6  # this process's own is not counted


def operation(name, seconds, parent=None):
    return SimpleNamespace(name=name, self_cpu_time_total=1e6 * seconds, cpu_parent=parent)


def test_time_belongs_to_a_kind():
    optimizer = operation("Optimizer.step#SGD.step", 1)
    pooler = operation("RoIAlign", 2)
    convolution = operation("aten::convolution", 4)
    backward = operation("autograd::engine::evaluate_function: NativeGroupNormBackward0", 8)
    events = [
        optimizer,
        operation("aten::add_", 16, optimizer),
        pooler,
        operation("aten::index", 32, pooler),
        convolution,
        operation("aten::empty", 64, convolution),
        backward,
        operation("aten::native_group_norm_backward", 128, backward),
        operation("aten::index_put_", 256),
        operation("aten::mul", 512),
        operation("aten::max_pool2d_with_indices", 1024),
        operation("aten::addmm", 2048),
        operation("something else", 4096),
    ]
    assert step.by_kind(events, 10_000) == {
        "optimizer": 17,
        "RoIAlign": 34,
        "convolutions, matrix products": 4 + 64 + 2048,
        "normalization": 136,
        "NMS, top-k, indexing": 256,
        "elementwise, copies": 512,
        "pooling, resampling": 1024,
        "other, Python": 4096 + 10_000 - 8191,
    }


class Side:
    """Stands for a step that has been run."""

    def __init__(self, loss, weight):
        self.model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(self.model.weight, weight)
        self.losses = lambda: {"loss": loss}


@pytest.mark.parametrize("loss, weight, message", [(1.001, 2, "loss is"), (1, 2.01, "weights are updated")])
def test_other_losses_or_weights_are_refused(loss, weight, message):
    before = {"weight": torch.ones(1, 1)}
    step.assert_same_update(before, Side(1, 2), Side(1 + 1e-6, 2 + 1e-6), "it")
    with pytest.raises(RuntimeError, match=message):
        step.assert_same_update(before, Side(1, 2), Side(loss, weight), "it")


def detections(shift=0.0, score=0.5, mask=True):
    found = Instances((8, 8), scores=torch.tensor([score]), pred_classes=torch.tensor([1]))
    found.pred_boxes = Boxes(torch.tensor([[0.0, 0, 4, 4 + shift]]))
    found.pred_masks = torch.full((1, 8, 8), mask)
    return [found]


@pytest.mark.parametrize("other", [{"shift": 0.1}, {"score": 0.501}, {"mask": False}])
def test_other_detections_are_refused(other):
    assert tta.assert_equal(detections(), detections(shift=0.01, score=0.50001)) == 1
    with pytest.raises(RuntimeError, match="differ"):
        tta.assert_equal(detections(), detections(**other))
