"""The training loop, on a toy model with genuine image files."""

import json

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultTrainer
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import BoxMode
from PIL import Image
from torch import nn

from rethink_d2 import add_rethink_config, recipe
from rethink_d2.engine import Trainer


@META_ARCH_REGISTRY.register()
class ToyModel(nn.Module):
    """Fits one number per channel to the mean pixel of an image."""

    def __init__(self, cfg):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, samples):
        pixels = torch.stack([s["image"].float().mean((1, 2)) / 255 for s in samples])
        return {"loss_toy": (self.linear(pixels) - 1).square().mean()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    records = []
    for i in range(8):
        path = str(folder / f"{i}.png")
        Image.fromarray(np.full((20, 20, 3), 30 * i, np.uint8)).save(path)
        box = {"bbox": [1, 1, 9, 9], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
        records.append({"file_name": path, "image_id": i, "width": 20, "height": 20, "annotations": [box]})
    DatasetCatalog.register("toy_trainer", lambda: records)
    yield "toy_trainer"
    DatasetCatalog.remove("toy_trainer")


def config(data, folder, *options):
    cfg = get_cfg()
    add_rethink_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "ToyModel"
    cfg.MODEL.DEVICE = "cpu"
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (data,), ()
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    cfg.INPUT.MIN_SIZE_TRAIN = (20,)
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR, cfg.SOLVER.SCHEDULE = 4, 0.1, "6"
    cfg.MODEL.WEIGHTS, cfg.SEED, cfg.OUTPUT_DIR = "", 1, str(folder)
    cfg.merge_from_list(list(options))
    return recipe.resolve(cfg, 1)


def trained(cfg):
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    return trainer


def test_groups_of_any_size_give_the_same_update(data, tmp_path):
    weights = [
        trained(config(data, tmp_path / str(group), "SOLVER.IMS_PER_GROUP", group)).model.linear.weight
        for group in (4, 2, 1)
    ]
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
    with pytest.raises(FloatingPointError, match="iteration=0"):
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
