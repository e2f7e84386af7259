import pytest
import torch
from torch import nn

from rethink_d2 import model_zoo

SCRATCH = "scratch/scratch_mask_rcnn_R_50_FPN_gn_6x.yaml"
MINI = "mini/scratch_mask_rcnn_R_18_FPN_gn.yaml"


def test_config_file_with_and_without_suffix():
    path = model_zoo.get_config_file(MINI)
    assert path == str(model_zoo.config_dir() / MINI)
    assert model_zoo.get_config_file(MINI.removesuffix(".yaml")) == path


@pytest.mark.parametrize(
    "name",
    [
        "scratch/scratch_mask_rcnn_R50_FPN_gn_6x.yaml",
        "scratch_mask_rcnn_R_50_FPN_gn_6x.yaml",
        "../configs/" + SCRATCH,
    ],
)
def test_unknown_name_is_answered_with_the_nearest(name):
    with pytest.raises(RuntimeError, match=SCRATCH):
        model_zoo.get_config_file(name)


def test_unlike_any_name():
    with pytest.raises(RuntimeError, match="nothing is named like it"):
        model_zoo.get_config_file("?")


def test_config_is_resolved():
    solver = model_zoo.get_config(SCRATCH).SOLVER
    # Section 4 of the paper: 6 x 90k, drops at the last 60k and the last 20k.
    assert (solver.MAX_ITER, tuple(solver.STEPS)) == (540_000, (480_000, 520_000))


def test_trained_config_points_at_the_finished_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="train mini/scratch"):
        model_zoo.get_config(MINI, trained=True)
    weights = tmp_path / model_zoo.get_config(MINI).OUTPUT_DIR / "model_final.pth"
    weights.parent.mkdir(parents=True)
    weights.touch()
    assert (tmp_path / model_zoo.get_config(MINI, trained=True).MODEL.WEIGHTS).samefile(weights)


def test_model_is_initialized_by_the_config_s_policy():
    torch.manual_seed(0)
    model = model_zoo.get(MINI, device="cpu")
    assert model.training
    conv = model.backbone.bottom_up.res5[1].conv1
    assert isinstance(conv, nn.Conv2d)
    fan_out = conv.out_channels * 9
    assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)
    torch.manual_seed(0)
    again = model_zoo.get(MINI, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_trained_model_holds_the_run_s_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = model_zoo.get(MINI, device="cpu")
    folder = tmp_path / model_zoo.get_config(MINI).OUTPUT_DIR
    folder.mkdir(parents=True)
    torch.save({"model": model.state_dict()}, folder / "model_final.pth")
    loaded = model_zoo.get(MINI, trained=True, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
