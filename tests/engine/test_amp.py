"""Mixed precision on the CPU: bfloat16 on the mini Mask R-CNN, float16 and the scaler on the toy model."""

import math

import pytest
import torch
from detectron2.data import DatasetCatalog
from poison import States, poison
from test_microsteps import mini, one_thread  # noqa: F401  the fixture
from test_resume import StopsAfter, assert_equal, assert_same_run
from toy import config, register_images

from rethink_d2.engine import Trainer
from rethink_d2.engine.divergence import Diverged
from rethink_d2.engine.start import find_start
from rethink_d2.preemption import Preempted

HALF = ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "float16"]
FULL_SCALE = 2.0**16  # torch's first


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    register_images("toy_amp", tmp_path_factory.mktemp("images"))
    yield "toy_amp"
    DatasetCatalog.remove("toy_amp")


def toy(data, folder, *options):
    return config(data, folder, "SOLVER.SCHEDULE", "24", "SOLVER.IMS_PER_GROUP", 2, *HALF, *options)


def test_a_mask_rcnn_trains_in_bfloat16(glyph_cache, tmp_path):
    options = ["SOLVER.AMP.ENABLED", True, "SOLVER.IMS_PER_BATCH", 2]
    trainer = Trainer(mini(tmp_path, 1, *options))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    computed = []
    trainer.model.backbone.register_forward_hook(lambda m, args, out: computed.append(out["p2"].dtype))
    trainer.train()
    assert computed == [torch.bfloat16]
    losses = {k: v.latest() for k, v in trainer.storage.histories().items() if "loss" in k}
    assert len(losses) == 6 and all(map(math.isfinite, losses.values())), losses
    for name, p in trainer.model.named_parameters():
        assert p.dtype == torch.float32 and p.isfinite().all(), name
        assert not torch.equal(p, before[name]), name


def test_float16_is_near_float32(data, tmp_path):
    weights, norms = [], []
    for name, enabled in (("full", False), ("half", True)):
        trainer = Trainer(toy(data, tmp_path / name, "SOLVER.AMP.ENABLED", enabled))
        trainer.train()
        weights.append(trainer.model.linear.weight)
        norms.append([norm for norm, _ in trainer.storage.history("gradient_norm").values()])
    assert norms[1] == pytest.approx(norms[0], rel=0.05), "not that of the scaled loss"
    assert weights[1].dtype == torch.float32 and not torch.equal(*weights)
    torch.testing.assert_close(*weights, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ["inf gradient", "nan gradient"])
def test_an_overflow_leaves_the_update_out_and_scales_less(data, tmp_path, kind):
    trainer, states = Trainer(toy(data, tmp_path)), States()
    trainer.register_hooks([states])
    poison(trainer, [3, 4], kind)
    trainer.train()
    assert_equal(states.done[4], states.done[3])
    assert_equal(states.done[5], states.done[3])
    weights = [states.done[done]["linear.weight"]["weight"] for done in (5, 6)]
    assert not torch.equal(*weights)
    assert trainer.scaler.get_scale() == FULL_SCALE / 4
    assert trainer.skipped == 0 and not (tmp_path / "divergence.json").exists()
    norms = trainer.storage.history("gradient_norm").values()
    assert [i for _, i in norms] == [i for i in range(24) if i not in (3, 4)]


def test_what_is_never_finite_is_no_overflow(data, tmp_path):
    trainer = Trainer(toy(data, tmp_path))
    poison(trainer, range(2, 24), "nan gradient")
    # At a scale of 1, sixteen halvings later.
    with pytest.raises(Diverged, match="iteration 18:"):
        trainer.train()


def test_the_scaler_carries_on_where_it_stopped(data, tmp_path):
    def trainer(folder, preemption=None):
        cfg = toy(data, folder, "SOLVER.CHECKPOINT_PERIOD", 4)
        start = find_start(cfg, resume=True)
        trainer = Trainer(cfg, start, preemption)
        if start.path is None:
            trainer.scaler.set_growth_interval(9)
        poison(trainer, [2, 13], "inf gradient")
        return trainer

    unbroken = trainer(tmp_path / "unbroken")
    unbroken.train()
    # Halved at 2, doubled after 9 good ones, halved at 13, doubled after 9 more.
    assert unbroken.scaler.get_scale() == FULL_SCALE
    for stop in (7, 6):
        with pytest.raises(Preempted):
            trainer(tmp_path / "run", StopsAfter(stop)).train()
    resumed = trainer(tmp_path / "run")
    assert resumed.scaler.get_growth_interval() == 9
    resumed.train()
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")


@pytest.mark.parametrize("before, after", [(False, True), (True, False)])
def test_precision_may_change_on_resume_if_allowed(data, tmp_path, before, after):
    cfg = toy(data, tmp_path, "SOLVER.AMP.ENABLED", before)
    with pytest.raises(Preempted):
        Trainer(cfg, None, StopsAfter(5)).train()
    cfg = toy(data, tmp_path, "SOLVER.AMP.ENABLED", after)
    with pytest.raises(ValueError, match="SOLVER.AMP.ENABLED"):
        find_start(cfg, resume=True)
    trainer = Trainer(cfg, find_start(cfg, resume=True, allow=["SOLVER.AMP.ENABLED"]))
    trainer.train()
    assert trainer.scaler.get_scale() == (FULL_SCALE if after else 1)
