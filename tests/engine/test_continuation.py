"""Stopped, killed and branched runs end as the run alone, bit for bit: real models, in this process."""

import itertools
import logging
import multiprocessing
import os
import signal

import gloo  # noqa: F401 (a process starts at once)
import pytest
import test_resume
import torch
import toy
from detectron2.data import DatasetCatalog
from processes import MINI, assert_same_run, final, results
from test_resume import StopsAfter

from rethink_d2 import model_zoo, recipe
from rethink_d2.data import glyphs
from rethink_d2.engine import Trainer
from rethink_d2.engine.start import find_start
from rethink_d2.engine.trainer import build_initialized_model
from rethink_d2.preemption import Preempted

pytestmark = pytest.mark.slow

# For runs of which only the end is looked at.
UNWATCHED = [
    *("TEST.EVAL_PERIOD", "0", "DATASETS.TEST", "()"),
    *("SOLVER.CHECKPOINT_KEEP", "0", "SOLVER.BRANCH_POINTS", "()"),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def toy_data(images):
    toy.register_images("toy_interruption", images)
    yield "toy_interruption"
    DatasetCatalog.remove("toy_interruption")


@pytest.fixture(scope="module")
def glyphs_here(glyph_cache):
    glyphs.register()  # in the cache of the tests


def config(folder, *options, base=MINI):
    options = [*base[2:], *UNWATCHED, *options, "OUTPUT_DIR", str(folder)]
    return recipe.resolve(recipe.load(base[1], options), 1)


def train(cfg, preemption=None, **how):
    Trainer(cfg, find_start(cfg, **how), preemption).train()


def stop_and_resume(cfg, stops, **how):
    """Train in pieces of so many iterations, then to the end."""
    for count in stops:
        with pytest.raises(Preempted):
            train(cfg, StopsAfter(count - 1), resume=True, **how)
    train(cfg, resume=True, **how)


def die_at(count, after, cfg, images):
    """Train in a process that ends as by SIGKILL before or after its n-th file gets its name."""
    torch.set_num_threads(1)
    toy.register_images("toy_interruption", images)
    replace, calls = os.replace, itertools.count(1)

    def counted(*args):
        last = next(calls) == count
        if last and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*args)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = counted
    train(cfg, resume=True)


def test_a_kill_at_every_file(toy_data, images, tmp_path):
    long = ["SOLVER.SCHEDULE", "12", "SOLVER.CHECKPOINT_PERIOD", 5, "SOLVER.CHECKPOINT_KEEP", 2]
    alone = toy.config(toy_data, tmp_path / "alone", *long)
    train(alone)
    files = {p.name for p in (tmp_path / "alone").glob("model_*")}
    context = multiprocessing.get_context("forkserver")
    for count, after in ((n, after) for n in range(1, 100) for after in (False, True)):
        cfg = toy.config(toy_data, tmp_path / f"{count}-{after}", *long)
        child = context.Process(target=die_at, args=(count, after, cfg, images))
        child.start()
        child.join(60)
        train(cfg, resume=True)
        folder = tmp_path / f"{count}-{after}"
        test_resume.assert_same_run(folder, tmp_path / "alone")
        assert (folder / "last_checkpoint").read_text() == "model_0000011.pth"
        assert {p.name for p in folder.glob("model_*")} == files
        assert not list(folder.glob(".writing-*"))
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
    assert count > 10


def random_backbone(folder):
    """A file of weights for a backbone, as pre-training would leave."""
    model = build_initialized_model(config(folder, "SEED", "5"))
    state = {k: v for k, v in model.state_dict().items() if k.startswith("backbone.bottom_up.")}
    torch.save({"model": state}, folder / "backbone.pth")
    return str(folder / "backbone.pth")


@pytest.mark.parametrize("arm", ["scratch", "pretrained"])
def test_branches_of_both_arms(glyphs_here, tmp_path, arm):
    options = ["SOLVER.SCHEDULE", "27", "SOLVER.CHECKPOINT_PERIOD", "6"]
    if arm == "pretrained":
        options += ["MODEL.WEIGHTS", random_backbone(tmp_path), "MODEL.BACKBONE.FREEZE_AT", "2"]
    train(config(tmp_path / "trunk", *options))
    for schedule, first_drop in (("9", 6), ("18", 12)):
        alone = config(tmp_path / f"alone{schedule}", *options, "SOLVER.SCHEDULE", schedule)
        branch = config(tmp_path / f"branch{schedule}", *options, "SOLVER.SCHEDULE", schedule)
        train(alone)
        start = find_start(branch, branch_from=str(tmp_path / "trunk"))
        assert (start.iteration, start.parent["folder"]) == (first_drop - 1, "../trunk")
        Trainer(branch, start).train()
        assert_same_run(tmp_path / f"branch{schedule}", tmp_path / f"alone{schedule}")


def test_a_branch_with_nothing_left_to_train(toy_data, tmp_path):
    train(toy.config(toy_data, tmp_path / "trunk"))
    train(toy.config(toy_data, tmp_path / "branch"), branch_from=str(tmp_path / "trunk"))
    assert_same_run(tmp_path / "branch", tmp_path / "trunk")


@pytest.mark.parametrize("sgd", ["", "fused"])
def test_the_cascade_phase(glyphs_here, tmp_path, caplog, sgd):
    caplog.set_level(logging.INFO, "rethink_d2")
    long = ["SOLVER.SCHEDULE", "27", "SOLVER.CHECKPOINT_PERIOD", "0", "SOLVER.BRANCH_POINTS", "(12,)"]
    long += ["SOLVER.ACCELERATE.SGD", sgd]
    train(config(tmp_path / "trunk", *long))
    heads = [
        *("MODEL.ROI_HEADS.NAME", "LastStageMaskCascadeROIHeads", "SOLVER.CASCADE_FROM", "12"),
        *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"),
    ]
    how = {"branch_from": str(tmp_path / "trunk")}
    cascade = config(tmp_path / "cascade", *long, *heads)
    start = find_start(cascade, **how)
    assert (start.kind, start.iteration, start.parent["iteration"]) == ("cascade", 11, 12)
    caplog.clear()
    Trainer(cascade, start).train()
    assert "Starting training from iteration 12" in caplog.text
    new = caplog.text.partition("New in the cascade: ")[2].splitlines()[0]
    assert "roi_heads.box_predictor.2.bbox_pred.weight" in new and "box_head" not in new
    trunk, weights = final(tmp_path / "trunk")["model"], final(tmp_path / "cascade")["model"]
    name = "backbone.bottom_up.res5.0.conv1.weight"
    assert not torch.equal(weights[name], trunk[name])

    stop_and_resume(config(tmp_path / "stopped", *long, *heads), [1, 5], **how)
    assert_same_run(tmp_path / "stopped", tmp_path / "cascade")


def test_an_evaluation_stopped_in_its_second_data_set(glyphs_here, tmp_path, caplog):
    caplog.set_level(logging.INFO, "detectron2")
    sets = ["DATASETS.TEST", "('glyphs_tiny_val', 'glyphs_tiny_train')", "TEST.EVAL_PERIOD", "3"]
    options = [*sets, "SOLVER.SCHEDULE", "6", "MODEL.RPN.POST_NMS_TOPK_TEST", "5"]
    train(config(tmp_path / "alone", *options))
    cfg = config(tmp_path / "stopped", *options)
    images = 16
    with pytest.raises(Preempted):  # asked once an iteration, an image, and an evaluation
        train(cfg, StopsAfter(3 + images + 1 + 5))
    assert [row["dataset"] for row in results(tmp_path / "stopped")] == ["glyphs_tiny_val"]
    caplog.clear()
    train(cfg, resume=True)
    assert caplog.text.count("Start inference on") == 3
    assert_same_run(tmp_path / "stopped", tmp_path / "alone")


KEYPOINTS = [
    *MINI,
    *("MODEL.MASK_ON", "False", "MODEL.KEYPOINT_ON", "True", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "4"),
    *("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(32,)", "DATASETS.TRAIN", "('glyphs_keypoints_tiny_train',)"),
]
CLASSIFIER = [
    *("--config-file", model_zoo.get_config_file("mini/imagenet_R_18_FPN_gn.yaml")),
    *("SOLVER.IMS_PER_BATCH", "4", "SOLVER.WARMUP_ITERS", "2", "MODEL.DEVICE", "cpu"),
]


@pytest.mark.parametrize("base", [KEYPOINTS, CLASSIFIER], ids=["keypoints", "classifier"])
def test_other_models_stopped(glyphs_here, tmp_path, base):
    train(config(tmp_path / "alone", "SOLVER.SCHEDULE", "12", base=base))
    stop_and_resume(config(tmp_path / "stopped", "SOLVER.SCHEDULE", "12", base=base), [2, 5, 4])
    assert_same_run(tmp_path / "stopped", tmp_path / "alone")
