"""The disk that checkpoints take, and the refusal where they do not fit."""

import torch
from torch import nn

from rethink_d2 import recipe
from rethink_d2.disk import checkpoint_bytes, checkpoints_kept


def config(*options):
    return recipe.resolve(recipe.load("", ["SOLVER.SCHEDULE", "2x", "SEED", 1, *options]), 1)


def test_size_is_that_of_a_real_checkpoint(tmp_path):
    model = nn.Sequential(nn.Linear(100, 100), nn.BatchNorm1d(100), nn.Linear(100, 100))
    model[2].requires_grad_(False)
    momentum = [torch.zeros_like(p) for p in model.parameters() if p.requires_grad]
    torch.save([model.state_dict(), momentum], tmp_path / "a.pth")
    assert abs((tmp_path / "a.pth").stat().st_size - checkpoint_bytes(model)) < 6000


def test_number_follows_the_keys():
    assert checkpoints_kept(config("SOLVER.CHECKPOINT_PERIOD", 50_000)) == 4
    assert checkpoints_kept(config("SOLVER.CHECKPOINT_PERIOD", 0)) == 1
    few = ["SOLVER.CHECKPOINT_KEEP", 2, "SOLVER.BRANCH_POINTS", (9, 99), "SOLVER.CHECKPOINT_BEST", "bbox/AP"]
    assert checkpoints_kept(config(*few)) == 5
    cascade = config("SOLVER.CASCADE_FROM", "1x", "SOLVER.CHECKPOINT_PERIOD", 10_000)
    assert checkpoints_kept(cascade) == 9
    short = ["SOLVER.ONE_X", 90, "SOLVER.CASCADE_FROM", "1x", "SOLVER.CHECKPOINT_PERIOD", 10]
    assert checkpoints_kept(config(*short)) == 9


def test_what_does_not_fit_is_refused_with_the_cure():
    cfg = config("SOLVER.CHECKPOINT_PERIOD", 1, "MODEL.BACKBONE.FREEZE_AT", 0)  # 180,000 of 300 MB
    (problem,) = [p for p in recipe.check(cfg) if p.key == "OUTPUT_DIR"]
    assert problem.level == "error" and "SOLVER.CHECKPOINT_KEEP" in problem.cure
    cfg.SOLVER.CHECKPOINT_KEEP = 1
    assert "OUTPUT_DIR" not in {p.key for p in recipe.check(cfg)}
