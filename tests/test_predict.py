import cv2
import numpy as np
import pytest
import torch

from rethink_d2 import model_zoo, predict

CONFIG = "mini/scratch_mask_rcnn_R_18_FPN_gn.yaml"


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "weights.pth"
    torch.save({"model": model_zoo.get(CONFIG, device="cpu").state_dict()}, path)
    return path


def test_pictures_are_written_and_unreadable_files_named(weights, tmp_path, capsys):
    good, bad = tmp_path / "good.jpg", tmp_path / "bad.jpg"
    cv2.imwrite(str(good), np.full((60, 80, 3), 128, np.uint8))
    bad.write_text("not an image")
    out = tmp_path / "out"
    args = [
        "--config-file",
        model_zoo.get_config_file(CONFIG),
        "--weights",
        str(weights),
        "--output",
        str(out),
    ]
    assert predict.cli([*args, "--threshold", "0", "--input", str(good), str(bad)]) == 2
    assert "bad.jpg" in capsys.readouterr().err
    assert cv2.imread(str(out / "good.jpg")).shape == (60, 80, 3)
    assert predict.cli([*args, "--input", str(good)]) == 0


def test_missing_or_wrong_weights_are_named(tmp_path, capsys):
    args = ["--config-file", model_zoo.get_config_file(CONFIG), "--input", "a.jpg"]
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "another.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for name in ("none.pth", "another.pth", "text.pth"):
        assert predict.cli([*args, "--weights", str(tmp_path / name)]) == 2
        assert name in capsys.readouterr().err
