"""Every config trains on data of its kind; those that differ in their length only, once."""

import json
import math

import pytest
from detectron2.data import MetadataCatalog

from rethink_d2 import model_zoo, recipe
from rethink_d2.data.subsets import register_subset
from rethink_d2.engine import Trainer
from rethink_d2.engine.trainer import build_initialized_model, evaluate_all
from rethink_d2.paper import load

# Small enough for seconds on a CPU: images of 64 pixels, few proposals and RoIs.
SMALL = {
    "INPUT.MIN_SIZE_TRAIN": (64,),
    "INPUT.MAX_SIZE_TRAIN": 96,
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 96,
    "TEST.AUG.MIN_SIZES": (48,),
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,  # random weights are sure of nothing
    "TEST.DETECTIONS_PER_IMAGE": 5,
    "TEST.PRECISE_BN.NUM_ITER": 1,
    "DATALOADER.NUM_WORKERS": 0,
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",  # the pre-trained arm's are not on every machine
    "SOLVER.CASCADE_FROM": "",  # started alone here
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.IMS_PER_GROUP": 2,
    "SOLVER.SCHEDULE": "",
    "SOLVER.MAX_ITER": 2,
    "SOLVER.STEPS": (),
}


def distinct():
    """One run for each set of settings, lengths aside."""
    found = {}
    for run in load():
        if run.config and run.kind != "search":
            cfg = recipe.load(model_zoo.get_config_file(run.config), [])
            settings = recipe.settings(recipe.resolve(cfg))
            settings = {k: v for k, v in settings.items() if k not in (*recipe.SCHEDULE, "MODEL.WEIGHTS")}
            found.setdefault(json.dumps(settings, sort_keys=True), run)
    return list(found.values())


def data_of_its_kind(cfg):
    """Data sets that are on this machine, for those that the config names."""
    train = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
    if train.evaluator_type == "classification":
        cfg.INPUT.CLASSIFICATION.CROP_SIZE = 64
        return "glyphs_classify_train"
    if train.evaluator_type == "pascal_voc":
        return "voc_0712_train"
    return "keypoints_coco_2017_train" if cfg.MODEL.KEYPOINT_ON else "coco_2017_train"


@pytest.fixture(scope="module")
def two_images(real_data, glyph_cache):
    register_subset("every_config_two_images", "coco_2017_train", 2)
    return "every_config_two_images"


@pytest.mark.slow
@pytest.mark.parametrize("run", distinct(), ids=lambda run: run.id)
def test_trains_or_evaluates(run, two_images, tmp_path):
    small = [text for key, value in SMALL.items() for text in (key, str(value))]
    cfg = recipe.load(model_zoo.get_config_file(run.config), [*small, "OUTPUT_DIR", str(tmp_path)])
    cfg.DATASETS.TRAIN = (data_of_its_kind(cfg),)
    if run.kind == "evaluate":
        cfg.DATASETS.TEST = (two_images,)
        metrics = evaluate_all(recipe.resolve(cfg, 1), build_initialized_model(cfg), 0)
        assert {"bbox_TTA/AP", "segm_TTA/AP"} <= metrics.keys()
        return
    cfg.DATASETS.TEST = ()
    trainer = Trainer(recipe.resolve(cfg, 1))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    losses = [value for value, _ in trainer.storage.history("total_loss").values()]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    changed = {name for name, p in trainer.model.named_parameters() if not p.equal(before[name])}
    assert changed
    assert changed <= {name for name, p in trainer.model.named_parameters() if p.requires_grad}
