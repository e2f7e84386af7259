"""The training loop, on a toy model with genuine image files."""

import json

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultTrainer
from torch import nn
from toy import config, register_images

from rethink_d2.engine import Trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    register_images("toy_trainer", tmp_path_factory.mktemp("images"))
    yield "toy_trainer"
    DatasetCatalog.remove("toy_trainer")


def trained(cfg):
    trainer = Trainer(cfg)
    trainer.train()
    return trainer


def test_groups_of_any_size_give_the_same_update(data, tmp_path):
    # A batch of all eight images: which of them meet in a group depends on the groups' size.
    eight = ("SOLVER.IMS_PER_BATCH", 8, "SOLVER.IMS_PER_GROUP")
    weights = []
    for group in (8, 4, 2):
        trainer = Trainer(config(data, tmp_path / str(group), *eight, group))
        trainer.model.noise = 0.0  # it is drawn anew for every group
        trainer.train()
        weights.append(trainer.model.linear.weight)
    torch.testing.assert_close(weights[0], weights[1])
    torch.testing.assert_close(weights[0], weights[2])


def test_rates_follow_the_schedule_and_are_written_down(data, tmp_path):
    cfg = config(data, tmp_path, "SOLVER.WARMUP_ITERS", 0)
    trainer = trained(cfg)
    assert cfg.SOLVER.STEPS == (4, 5)
    rates = [rate for rate, _ in trainer.storage.history("lr").values()]
    assert rates == pytest.approx([0.1] * 4 + [0.01, 0.001])
    assert json.loads((tmp_path / "metrics.json").read_text().splitlines()[-1])["iteration"] == 5


def test_bf16_on_the_cpu(data, tmp_path):
    full = trained(config(data, tmp_path / "full")).model.linear.weight
    half = trained(config(data, tmp_path / "half", "SOLVER.AMP.ENABLED", True)).model.linear.weight
    assert half.dtype == torch.float32
    assert not torch.equal(full, half)
    torch.testing.assert_close(full, half, rtol=0.05, atol=0.05)


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path):
    trainer = Trainer(config(data, tmp_path))
    nn.init.constant_(trainer.model.linear.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="iteration 0"):
        trainer.train()


def test_gradient_clipping_bounds_the_update(data, tmp_path):
    clip = (
        "SOLVER.CLIP_GRADIENTS.ENABLED",
        True,
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE",
        1e-6,
        "SOLVER.WEIGHT_DECAY",
        0.0,
    )
    before = Trainer(config(data, tmp_path / "a", *clip)).model.linear.weight.clone()
    after = trained(config(data, tmp_path / "b", *clip)).model.linear.weight
    assert 0 < (after - before).abs().max() < 1e-5


def test_a_resolved_config_trains_under_detectron2s_own_trainer(data, tmp_path):
    cfg = config(data, tmp_path, "SOLVER.WARMUP_ITERS", 0)
    theirs = DefaultTrainer(cfg)
    theirs.train()
    rates = [rate for rate, _ in theirs.storage.history("lr").values()]
    assert rates == pytest.approx([0.1] * 4 + [0.01, 0.001])
