"""Evaluation with test-time augmentation, on built-in data."""

import sys

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from torch import nn

from rethink_d2 import model_zoo, recipe
from rethink_d2.evaluation import evaluate
from rethink_d2.evaluation.evaluate import build_evaluator
from rethink_d2.modeling import initialize
from rethink_d2.modeling.tta import RCNNWithTTA

KEYPOINTS = ["MODEL.KEYPOINT_ON", "True", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "4"]
KEYPOINTS += ["MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(32,)"]
KEYPOINTS += ["TEST.KEYPOINT_OKS_SIGMAS", "(0.075, 0.075, 0.075, 0.075)"]
# Detectron2's mapper asks the training set, for tests too, for left and right.
KEYPOINTS += ["DATASETS.TRAIN", "('glyphs_keypoints_tiny_train',)"]


def config(name, *overrides):
    options = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "DATASETS.TEST", f"('{name}',)"]
    options += ["INPUT.MIN_SIZE_TEST", "64", "TEST.DETECTIONS_PER_IMAGE", "5"]
    options += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.01", "TEST.AUG.MIN_SIZES", "()"]
    path = model_zoo.get_config_file("mini/Base-Mask-RCNN-FPN-mini.yaml")
    return recipe.load(path, options + list(overrides))


@pytest.fixture
def model_of():
    def build(cfg):
        torch.manual_seed(0)
        model = build_model(cfg)
        initialize(model, "msra")
        return model

    return build


@pytest.mark.parametrize(
    "name, options, tasks",
    [
        ("glyphs_tiny_val", [], {"bbox_TTA", "segm_TTA"}),
        ("glyphs_keypoints_tiny_val", KEYPOINTS, {"bbox_TTA", "segm_TTA", "keypoints_TTA"}),
    ],
)
def test_metrics_of_the_augmented_model_are_named_so(glyph_cache, model_of, name, options, tasks):
    cfg = config(name, "TEST.AUG.ENABLED", "True", *options)
    cfg.freeze()
    model, widths = model_of(cfg), []
    model.backbone.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[3]))
    metrics = evaluate(cfg, model, name)
    assert {key.split("/")[0] for key in metrics} == tasks
    assert all(0 <= metrics[f"{task}/AP"] <= 100 for task in tasks)
    assert len(widths) == 16 * 2  # images, each also mirrored; masks come from the features of the boxes
    assert max(widths) < 128  # the normal view's size is kept
    assert model.training  # as it was


def test_loader_gives_images_of_the_original_size_only_for_augmentation(glyph_cache, model_of, monkeypatch):
    seen = []

    def look(model, loader, evaluator):
        (sample,) = next(iter(loader))
        seen.append((type(model), tuple(sample["image"].shape[1:]) == (sample["height"], sample["width"])))
        return {"bbox": {"AP": 1.0}}

    monkeypatch.setattr(sys.modules["rethink_d2.evaluation.evaluate"], "inference_on_dataset", look)
    cfg = config("glyphs_tiny_val")
    model = model_of(cfg)
    assert evaluate(cfg, model, "glyphs_tiny_val") == {"bbox/AP": 1.0}
    cfg.TEST.AUG.ENABLED = True
    assert evaluate(cfg, model, "glyphs_tiny_val") == {"bbox_TTA/AP": 1.0}
    assert seen == [(type(model), False), (RCNNWithTTA, True)]
    assert cfg.INPUT.MIN_SIZE_TEST == 64


def test_models_that_cannot_be_augmented_are_refused(glyph_cache):
    cfg = config("glyphs_tiny_val", "TEST.AUG.ENABLED", "True")
    with pytest.raises(ValueError, match="TEST.AUG.ENABLED"):
        evaluate(cfg, nn.Linear(1, 1), "glyphs_tiny_val")


def test_a_coco_set_without_a_file_is_refused_by_that_name():
    DatasetCatalog.register("test_no_file", list)
    MetadataCatalog.get("test_no_file").set(evaluator_type="coco", thing_classes=["a"])
    try:
        with pytest.raises(ValueError, match="DATASETS.TEST: test_no_file .*json_file"):
            build_evaluator(config("test_no_file"), "test_no_file")
    finally:
        DatasetCatalog.remove("test_no_file")
        MetadataCatalog.remove("test_no_file")
