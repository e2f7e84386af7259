"""A compiled backbone: few shapes, the same training, also with accumulation, interruption and processes."""

import functools
import shutil

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList
from detectron2.utils import comm
from gloo import on_processes
from test_resume import StopsAfter, assert_equal
from torch import nn
from toy import config, register_images

from rethink_d2.engine import Trainer, acceleration
from rethink_d2.engine.acceleration import PADDED_TO, accelerate, compile_backbone
from rethink_d2.engine.start import find_start
from rethink_d2.preemption import Preempted

COMPILE = ("SOLVER.ACCELERATE.COMPILE", True)


class Backbone(nn.Module):
    """A pyramid of two levels, normalized over the whole image."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=8, padding=1)
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, images):
        fine = self.norm(self.stem(images)).relu()
        return {"fine": fine, "coarse": nn.functional.max_pool2d(fine, 2)}


@META_ARCH_REGISTRY.register()
class ToyPyramid(nn.Module):
    """Fits the mean of its features to a random number."""

    def __init__(self, cfg):
        super().__init__()
        self.backbone = Backbone()

    def forward(self, samples):
        images = ImageList.from_tensors([s["image"].float() / 255 for s in samples])
        found = self.backbone(images.tensor)
        mean = found["fine"].mean((1, 2, 3)) + found["coarse"].mean((1, 2, 3))
        return {"loss_toy": (mean - torch.rand(1)).square().mean()}


class Counting:
    """A backend that compiles nothing and keeps the shapes that it was asked to."""

    def __init__(self):
        self.shapes = []

    def __call__(self, graph, inputs):
        self.shapes += [tuple(i.shape) for i in inputs if i.ndim == 4 and i.shape[1] == 3 and i.shape[2] > 3]
        return graph.forward


@pytest.fixture(autouse=True)
def no_cache():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model():
    torch.manual_seed(0)
    return ToyPyramid(None)


def test_few_shapes_are_compiled_and_they_give_what_padded_images_give():
    plain, compiled, backend = model(), model(), Counting()
    names = list(compiled.state_dict())
    compile_backbone(compiled, backend)
    assert list(compiled.state_dict()) == names
    for size in ((40, 60), (100, 128), (128, 129), (90, 140)):
        images = torch.rand(2, 3, *size)
        padded = torch.zeros(2, 3, 128, 128 if size[1] <= 128 else 256)
        padded[:, :, : size[0], : size[1]] = images
        for a, b in zip(compiled.backbone(images).values(), plain.backbone(padded).values(), strict=True):
            torch.testing.assert_close(a, b)
    assert backend.shapes == [(2, 3, 128, 128), (2, 3, 128, 256)]
    assert PADDED_TO == 128


def test_more_shapes_than_torch_s_own_limit():
    compiled, backend = model(), Counting()
    compile_backbone(compiled, backend)
    for i in range(1, 11):
        compiled.backbone(torch.rand(1, 3, 8, 128 * i))
    assert len(backend.shapes) == 10


def test_evaluation_is_as_without():
    plain, compiled, backend = model().eval(), model(), Counting()
    compile_backbone(compiled, backend)
    images = torch.rand(2, 3, 40, 60)
    for a, b in zip(compiled.eval().backbone(images).values(), plain.backbone(images).values(), strict=True):
        assert torch.equal(a, b)
    assert not backend.shapes


def test_without_a_compiler_or_a_backbone_the_key_is_named(monkeypatch):
    options = CfgNode({"CHANNELS_LAST": False, "ROI_ALIGN": False, "COMPILE": True})
    with pytest.raises(ValueError, match="SOLVER.ACCELERATE.COMPILE: Linear has no backbone"):
        monkeypatch.setattr(shutil, "which", lambda name: name)
        accelerate(nn.Linear(1, 1), options)
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="SOLVER.ACCELERATE.COMPILE needs .* no-such-compiler.* CXX"):
        accelerate(model(), options)


def quick(backend="aot_eager"):
    """Another backend for the trainer; inductor takes much longer for the first step."""
    acceleration.compile_backbone = functools.partial(compile_backbone, backend=backend)


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.setattr(acceleration, "compile_backbone", compile_backbone)
    quick()
    register_images("compile_test", tmp_path)
    yield "compile_test"
    DatasetCatalog.remove("compile_test")


def run(data, folder, *options, stop=None):
    pyramid = ("MODEL.META_ARCHITECTURE", "ToyPyramid", "SOLVER.IMS_PER_GROUP", 2, "SOLVER.BASE_LR", 0.01)
    cfg = config(data, folder, *pyramid, *options)
    trainer = Trainer(cfg, find_start(cfg, resume=True), StopsAfter(stop) if stop is not None else None)
    trainer.train()
    return dict(trainer.model.state_dict())


def test_training_with_accumulation_resumes_exactly(images, tmp_path, monkeypatch):
    whole = run(images, tmp_path / "a", *COMPILE)
    with pytest.raises(Preempted):
        run(images, tmp_path / "b", *COMPILE, stop=2)
    torch._dynamo.reset()
    assert_equal(run(images, tmp_path / "b", *COMPILE), whole)
    quick("eager")
    for name, value in run(images, tmp_path / "c", *COMPILE).items():
        torch.testing.assert_close(whole[name], value)


def on_a_process(folder, pictures):
    quick()
    register_images("compile_test", pictures)
    options = [*COMPILE, "SOLVER.MAX_ITER", 2, "SOLVER.SCHEDULE", ""]
    return {k.removeprefix("module."): v for k, v in run("compile_test", folder, *options).items()}


@pytest.mark.slow
def test_on_two_processes_as_on_one(images, tmp_path):
    ranks = on_processes(tmp_path / "two", 2, on_a_process, tmp_path / "run", tmp_path)
    assert_equal(*ranks)
    assert comm.get_world_size() == 1
    alone = run(images, tmp_path / "one", *COMPILE, "SOLVER.MAX_ITER", 2, "SOLVER.SCHEDULE", "")
    for name, value in alone.items():
        torch.testing.assert_close(ranks[0][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_compiled_by_inductor():
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    plain, compiled = model(), model()
    compile_backbone(plain, "eager")
    accelerate(compiled, CfgNode({"CHANNELS_LAST": False, "ROI_ALIGN": False, "COMPILE": True}))
    sample = {"image": torch.randint(256, (3, 100, 120))}
    for each in (plain, compiled):
        torch.manual_seed(0)
        each([sample])["loss_toy"].backward()
    for p, q in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
