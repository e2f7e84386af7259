"""What is learned does not depend on how the work is spread over processes and loader workers."""

import os

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY, ROI_HEADS_REGISTRY, StandardROIHeads
from detectron2.modeling.proposal_generator import RPN
from detectron2.utils import comm
from gloo import on_processes
from test_resume import StopsAfter, assert_equal
from toy import config, register_images

from rethink_d2 import model_zoo, recipe
from rethink_d2.engine import Trainer
from rethink_d2.engine.start import find_start
from rethink_d2.preemption import Preempted


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the processes that it is compared with have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@PROPOSAL_GENERATOR_REGISTRY.register()
class RecordingRPN(RPN):
    """Keeps which anchors it has sampled, for each pass."""

    def label_and_sample_anchors(self, anchors, gt_instances):
        labels, boxes = super().label_and_sample_anchors(anchors, gt_instances)
        self.__dict__.setdefault("sampled", []).append(torch.stack(labels))
        return labels, boxes


@ROI_HEADS_REGISTRY.register()
class RecordingROIHeads(StandardROIHeads):
    """Keeps which regions it has sampled, for each pass."""

    def label_and_sample_proposals(self, proposals, targets):
        sampled = super().label_and_sample_proposals(proposals, targets)
        of_pass = [torch.column_stack((p.proposal_boxes.tensor, p.gt_classes)) for p in sampled]
        self.__dict__.setdefault("sampled", []).append(dict(enumerate(of_pass)))
        return sampled


def mini(folder, processes, *options):
    """The mini Mask R-CNN on pictures of half their size, in groups of two."""
    size = ["INPUT.MIN_SIZE_TRAIN", (64,), "DATASETS.TRAIN", ("glyphs_tiny_train",), "DATASETS.TEST", ()]
    recording = ["MODEL.PROPOSAL_GENERATOR.NAME", "RecordingRPN", "MODEL.ROI_HEADS.NAME", "RecordingROIHeads"]
    length = ["SOLVER.SCHEDULE", "", "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", ()]
    run = ["SOLVER.IMS_PER_GROUP", 2, *length, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(folder)]
    path = model_zoo.get_config_file("mini/Base-Mask-RCNN-FPN-mini.yaml")
    return recipe.resolve(recipe.load(path, [*size, *recording, *run, *options]), processes)


class Gradients(HookBase):
    """Keeps the gradients of the last iteration, averaged over the processes."""

    def after_backward(self):
        named = self.trainer.model.named_parameters()
        self.values = {name.removeprefix("module."): p.grad.clone() for name, p in named}


def mini_iteration(folder, cache):
    """One iteration: images, anchors, regions by the number of this process's groups; gradients.

    Also whether each pass averages them over the processes.
    """
    os.environ["RETHINK_D2_CACHE"] = cache
    processes = comm.get_world_size()
    trainer = Trainer(mini(folder, processes))
    gradients, images, averages = Gradients(), [], []
    trainer.register_hooks([gradients])
    trainer.model.register_forward_pre_hook(
        lambda _, args: images.append({s["file_name"]: s["image"] for s in args[0]})
    )
    if processes > 1:
        trainer.model.register_forward_pre_hook(
            lambda several, _: averages.append(several.require_backward_grad_sync)
        )
    trainer.train()
    model = trainer.model.module if processes > 1 else trainer.model
    passes = zip(images, model.proposal_generator.sampled, model.roi_heads.sampled, strict=True)
    groups = {
        step * processes + comm.get_rank(): {"images": images, "anchors": anchors, "regions": regions}
        for step, (images, anchors, regions) in enumerate(passes)
    }
    return groups, gradients.values, averages


# Once an iteration, in the last of a process's groups.
AVERAGES = {1: [], 2: [False, True], 4: [True]}


@pytest.fixture(scope="module")
def spread(glyph_cache, tmp_path_factory):
    """By number of processes: all groups, and the gradients on each process."""
    DatasetCatalog.get("glyphs_tiny_train")  # rendered once, not by each of them
    folder, found = tmp_path_factory.mktemp("spread"), {}
    for processes in (1, 2, 4):
        out = str(folder / f"run{processes}")
        results = on_processes(folder / str(processes), processes, mini_iteration, out, str(glyph_cache))
        groups = {number: values for own, _, _ in results for number, values in own.items()}
        found[processes] = groups, [gradients for _, gradients, _ in results]
        assert all(averages == AVERAGES[processes] for _, _, averages in results)
    return found


@pytest.mark.parametrize("processes", [2, 4])
def test_images_anchors_and_regions_are_the_same_on_any_number_of_processes(spread, processes):
    alone, several = spread[1][0], spread[processes][0]
    assert sorted(alone) == sorted(several) == [0, 1, 2, 3]
    for number, group in alone.items():
        assert len(group["images"]) == len(group["regions"]) == 2
        assert set(group["anchors"].unique().tolist()) == {-1, 0, 1}
        assert all(len(regions) == 64 for regions in group["regions"].values())
        assert_equal(several[number], group)


@pytest.mark.parametrize("processes", [2, 4])
def test_gradients_are_the_same_on_any_number_of_processes(spread, processes):
    (alone,), several = spread[1][1], spread[processes][1]
    differences = {}
    for name, gradient in alone.items():
        for others in several:
            assert torch.equal(others[name], several[0][name]), name
        largest = gradient.abs().max()
        assert largest > 0, name
        differences[name] = float((gradient - several[0][name]).abs().max() / largest)
    worst = max(differences, key=differences.get)
    print(f"\n1 against {processes} processes: {differences[worst]:.1e} of the largest gradient, in {worst}")
    assert differences[worst] <= 1e-5


def mini_weights(folder, *options):
    trainer = Trainer(mini(folder, 1, "SOLVER.MAX_ITER", 2, "SOLVER.WARMUP_ITERS", 0, *options))
    trainer.train()
    return trainer.model.state_dict()


def test_loader_workers_change_nothing(glyph_cache, tmp_path):
    alone = mini_weights(tmp_path / "0", "DATALOADER.NUM_WORKERS", 0)
    assert_equal(mini_weights(tmp_path / "3", "DATALOADER.NUM_WORKERS", 3), alone)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return register_images("toy_spread", tmp_path_factory.mktemp("images"))


LONG = ["SOLVER.SCHEDULE", "18", "SOLVER.CHECKPOINT_PERIOD", 4, "SOLVER.IMS_PER_GROUP", 2]


def toy_run(records, folder, options, stop_after=None):
    """The toy model, in two groups an iteration; resumes if it can, stops if the last process is asked to."""
    if "toy_spread" not in DatasetCatalog.list():
        DatasetCatalog.register("toy_spread", lambda: records)
    cfg = config("toy_spread", folder, *LONG, *options)
    last = comm.get_rank() == comm.get_world_size() - 1
    preemption = StopsAfter(stop_after) if stop_after and last else None
    trainer = Trainer(cfg, find_start(cfg, resume=True), preemption)
    try:
        trainer.train()
    except Preempted:
        assert stop_after
    bare = trainer.model.module if comm.get_world_size() > 1 else trainer.model
    return bare.state_dict()


def assert_close(weights, expected):
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_a_run_resumes_on_another_number_of_processes(images, tmp_path, before, after):
    expected = toy_run(images, tmp_path / "unbroken", [])
    run = [toy_run, images, tmp_path / "run", []]
    stopped = on_processes(tmp_path / "before", before, *run, 6)
    assert not torch.equal(stopped[0]["linear.weight"], expected["linear.weight"])
    assert (tmp_path / "run/last_checkpoint").read_text() == "model_0000006.pth"
    for weights in on_processes(tmp_path / "after", after, *run):
        assert_close(weights, expected)


CLIPS = {"value": 0.05, "norm": 0.1, "full_model": 0.1}


def clip(kind):
    key = "SOLVER.CLIP_GRADIENTS"
    return [f"{key}.ENABLED", True, f"{key}.CLIP_TYPE", kind, f"{key}.CLIP_VALUE", CLIPS[kind]]


def clipped_runs(records, folder):
    return {kind: toy_run(records, folder / kind, clip(kind)) for kind in CLIPS}


def test_gradients_are_clipped_alike_on_any_number_of_processes(images, tmp_path):
    alone, free = clipped_runs(images, tmp_path / "alone"), toy_run(images, tmp_path / "free", [])
    for several in on_processes(tmp_path / "processes", 2, clipped_runs, images, tmp_path / "several"):
        for kind, weights in several.items():
            assert_close(weights, alone[kind])
            assert not torch.allclose(weights["linear.weight"], free["linear.weight"])


@pytest.mark.parametrize("kind", CLIPS)
def test_what_is_clipped(images, tmp_path, kind):
    """The first update divided by its rate: the gradient after clipping."""
    once = ["SOLVER.SCHEDULE", "", "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", (), "SOLVER.WARMUP_ITERS", 0]
    cfg = config("toy_spread", tmp_path, *LONG, *clip(kind), *once, "SOLVER.WEIGHT_DECAY", 0.0)
    trainer, gradients = Trainer(cfg), Gradients()
    trainer.register_hooks([gradients])
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    steps = {name: (before[name] - after[name]) / cfg.SOLVER.BASE_LR for name in before}
    limit, expected = CLIPS[kind], {}
    norm = torch.cat([g.flatten() for g in gradients.values.values()]).norm()
    assert norm > limit
    for name, gradient in gradients.values.items():
        if kind == "value":
            expected[name] = gradient.clamp(-limit, limit)
        else:
            expected[name] = gradient * min(1, limit / (norm if kind == "full_model" else gradient.norm()))
    for name, step in steps.items():
        torch.testing.assert_close(step, expected[name], rtol=1e-4, atol=1e-6)
    assert trainer.storage.history("gradient_norm").latest() == pytest.approx(float(norm))
