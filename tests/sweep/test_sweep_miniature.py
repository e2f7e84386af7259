"""Every run of the paper has a miniature that is the same experiment, small."""

import dataclasses
import functools
import json
import math

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from rethink_d2 import model_zoo, paper, recipe
from rethink_d2.engine import Trainer
from rethink_d2.modeling.inspection import build_meta
from rethink_d2.solver.schedule import ONE_X, parse
from rethink_d2.sweep.miniature import MINI_ONE_X, mini_options, pretraining

RUNS = [run for run in paper.load() if run.config and run.kind != "search"]
DETECTION = [run for run in RUNS if run.kind != "pretrain"]
PRETRAINED = [run for run in DETECTION if pretraining(run)]
# 1x: 54 iterations of 8 images.
SCALE = 54 / ONE_X
ARM_KEYS = {"MODEL.WEIGHTS", "MODEL.BACKBONE.FREEZE_AT"}
PATH_KEYS = {"MODEL.WEIGHTS", *recipe.SCHEDULE, "SOLVER.CASCADE_FROM"}


def by_id(run):
    return run.id


@functools.cache
def full(run):
    return recipe.resolve(recipe.load(model_zoo.get_config_file(run.config), []))


@functools.cache
def mini(run):
    return recipe.resolve(recipe.load(model_zoo.get_config_file(run.config), mini_options(run)), 1)


@functools.cache
def mini_settings(run):
    return recipe.settings(mini(run))


def distinct(runs, cfg):
    """One run for each set of settings, apart from lengths and weights."""
    found = {}
    for run in runs:
        settings = {k: v for k, v in recipe.settings(cfg(run)).items() if k not in PATH_KEYS}
        found.setdefault(json.dumps(settings, sort_keys=True), run)
    return list(found.values())


DISTINCT = distinct(RUNS, mini)


@pytest.mark.parametrize("run", DISTINCT, ids=by_id)
def test_the_recipe_has_nothing_wrong_but_that_its_weights_are_not_there_yet(run):
    assert [p for p in recipe.check(mini(run)) if p.key != "MODEL.WEIGHTS" and p.level == "error"] == []


@pytest.mark.parametrize("run", DETECTION, ids=by_id)
def test_length_and_drops_are_the_paper_s_in_proportion(run):
    big, small = full(run).SOLVER, mini(run).SOLVER
    assert small.ONE_X == MINI_ONE_X and small.IMS_PER_BATCH == 8
    for a, b in zip((big.MAX_ITER, *big.STEPS), (small.MAX_ITER, *small.STEPS), strict=True):
        assert abs(b - a * SCALE) < 1
    if run.branch_iteration:
        assert int(run.branch_iteration * SCALE) <= small.STEPS[0]
    if run.kind == "cascade":
        assert parse(small.CASCADE_FROM, 8, small.ONE_X).max_iter == run.branch_iteration * SCALE


@pytest.mark.parametrize("one_x", [54, 225])
def test_with_a_longer_1x_evaluations_meet_drops_and_ends(one_x):
    for schedule in ("2x", "4x", "6x"):
        run = paper.find(f"base-r50-gn-scratch-{schedule}")
        cfg = recipe.resolve(recipe.load(model_zoo.get_config_file(run.config), mini_options(run, one_x)), 1)
        length = int(schedule[0]) * 2 * one_x
        assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS[0]) == (length, length - 2 * one_x * 2 // 3)
        assert cfg.SOLVER.MAX_ITER % cfg.TEST.EVAL_PERIOD == cfg.SOLVER.STEPS[0] % cfg.TEST.EVAL_PERIOD == 0
        assert cfg.DATASETS.TEST == ("glyphs_val",)
        assert cfg.SOLVER.WARMUP_ITERS == 5 * one_x // 27
        assert recipe.differences(recipe.settings(cfg), mini_settings(run)).keys() <= {
            *recipe.SCHEDULE,
            "DATASETS.TEST",
            "SOLVER.ONE_X",
            "SOLVER.WARMUP_ITERS",
        }


def test_a_longer_1x_leaves_keypoints_and_pretraining_what_they_are():
    def option(id, key):
        options = mini_options(paper.find(id), 54)
        return options[options.index(key) + 1]

    assert option("keypoint-r50-gn-scratch-2x", "DATASETS.TEST") == "('glyphs_keypoints_val',)"
    maker = paper.find("imagenet-r50-gn-pretrained-100ep")
    assert mini_options(maker, 54) == mini_options(maker)


def test_a_length_needs_a_positive_1x():
    with pytest.raises(ValueError, match="SOLVER.ONE_X: 0 is not positive"):
        parse("2x", 16, 0)


def test_warmup_ends_before_the_first_drop_and_is_one_for_all():
    assert {mini(run).SOLVER.WARMUP_ITERS for run in DETECTION} == {5}
    assert min(mini(run).SOLVER.STEPS[0] for run in DETECTION) > 5


@pytest.mark.parametrize("run", [r for r in DETECTION if r.arm == "scratch" and r.partner], ids=by_id)
def test_arms_differ_in_weights_freezing_and_length_only(run):
    found = recipe.differences(mini_settings(run), mini_settings(paper.find(run.partner))).keys()
    big = recipe.differences(recipe.settings(full(run)), recipe.settings(full(paper.find(run.partner))))
    assert found <= ARM_KEYS | PATH_KEYS
    assert found == big.keys()


@pytest.mark.parametrize("run", [r for r in RUNS if r.trunk and r.kind == "train"], ids=by_id)
def test_a_branch_shares_its_trunk_s_trajectory(run):
    there, own = mini_settings(paper.find(run.trunk)), mini_settings(run)
    assert recipe.differences(there, own).keys() <= recipe.SCHEDULE
    assert recipe.shared_iterations(there, own) == mini(run).SOLVER.STEPS[0]


def test_what_differs_in_kind_differs_in_miniature():
    # The two readings of VOC's training set are of COCO's size both, and not told apart.
    runs = [run for run in RUNS if run.family != "voc-15k"]
    assert {run.id for run in distinct(runs, full)} == {run.id for run in distinct(runs, mini)}


@pytest.mark.parametrize(
    ("id", "expected"),
    [
        ("base-r50-gn-scratch-6x", {"RESNETS.DEPTH": 18, "RESNETS.NORM": "GN"}),
        ("base-r101-gn-scratch-6x", {"RESNETS.DEPTH": 34}),
        ("base-r50-syncbn-scratch-6x", {"RESNETS.NORM": "SyncBN", "ROI_BOX_HEAD.NORM": "naiveSyncBN_N"}),
        (
            "x152-aug-scratch-9x",
            {"RESNETS.DEPTH": 50, "RESNETS.NUM_GROUPS": 8, "RESNETS.WIDTH_PER_GROUP": 4},
        ),
        ("cascade-r50-scratch-9x", {"ROI_HEADS.NAME": "LastStageMaskCascadeROIHeads"}),
        ("keypoint-r50-gn-scratch-2x", {"KEYPOINT_ON": True, "ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 4}),
        (
            "vgg16-scratch-11x",
            {
                "RPN.IN_FEATURES": ["conv5"],
                "ANCHOR_GENERATOR.SIZES": [[16, 32, 64, 128]],
                "ROI_BOX_HEAD.NUM_CONV": 0,
                "ROI_BOX_HEAD.FC_DIM": 256,
                "INIT.POLICY": "msra_all",
            },
        ),
        ("voc-scratch-144k", {"MASK_ON": False, "RESNETS.DEPTH": 34}),
    ],
)
def test_models(id, expected):
    leaves = recipe.flatten(mini(paper.find(id)).MODEL)
    assert {key: leaves[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("id", "scales"),
    [
        ("base-r50-gn-scratch-6x", (128,)),
        ("aug-r50-scratch-9x", (102, 108, 113, 118, 123, 128)),
        ("coco35k-scratch-2x", (82, 87, 92, 97, 102, 108, 113, 118, 123, 128)),
    ],
)
def test_scales_for_training(id, scales):
    assert mini(paper.find(id)).INPUT.MIN_SIZE_TRAIN == scales


def test_views_for_test_time_augmentation():
    aug = mini(paper.find("tta-r50-scratch-9x")).TEST.AUG
    assert aug.ENABLED
    assert (aug.MIN_SIZES, aug.MAX_SIZE) == ((64, 80, 96, 112, 144, 160, 176, 192), 288)


@pytest.mark.parametrize(
    ("size", "images"), [("35k", 600), ("10k", 169), ("3.5k", 59), ("1k", 17)], ids=lambda value: str(value)
)
def test_small_sets_are_nested_and_in_proportion(size, images):
    name = f"glyphs_train_{size}"
    used = {name_ for run in DETECTION for name_ in mini(run).DATASETS.TRAIN}
    assert name in used
    assert MetadataCatalog.get(name).num_images == images
    assert MetadataCatalog.get(name).subset.source == "glyphs_train"
    assert abs(images / 2000 - {"35k": 35_504}.get(size, float(size[:-1]) * 1000) / 118_287) < 0.5 / 2000


@pytest.mark.parametrize("run", DISTINCT, ids=by_id)
def test_data_is_built_in(run):
    cfg = mini(run)
    assert all(name.startswith("glyphs_") for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    assert set(cfg.DATASETS.TRAIN) | set(cfg.DATASETS.TEST) <= set(DatasetCatalog.list())


def test_who_needs_pretraining():
    found = {run.id: pretraining(run) for run in RUNS}
    assert {id for id, maker in found.items() if maker} == {
        run.id for run in RUNS if run.arm == "pretrained" and run.kind == "train"
    }
    makers = {maker.id for maker in found.values() if maker}
    assert makers == {
        f"imagenet-{name}-pretrained-100ep"
        for name in ("r50-gn", "r101-gn", "r50-syncbn", "x152-gn", "vgg16")
    }
    vgg = found["vgg16-pretrained-9x"]
    assert vgg == paper.find("imagenet-vgg16-pretrained-100ep")


@pytest.mark.parametrize("run", distinct(PRETRAINED, mini), ids=by_id)
def test_pretraining_fits(run):
    """The same backbone, in names, shapes, norms and pixels."""
    maker = pretraining(run)
    own, there = mini(run), mini(maker)
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        assert own.MODEL[key] == there.MODEL[key]
    assert own.INPUT.FORMAT == there.INPUT.FORMAT
    assert own.MODEL.RESNETS.NORM == there.MODEL.RESNETS.NORM
    detector, classifier = (build_meta(cfg).state_dict() for cfg in (own, there))
    made = {name: value.shape for name, value in classifier.items() if not name.startswith("classifier.")}
    kept = {name: value.shape for name, value in detector.items() if name in made}
    # A frozen BN does not count its batches.
    assert {n: s for n, s in made.items() if "num_batches_tracked" not in n}.items() <= kept.items()
    body = "backbone." if "vgg" in own.MODEL.BACKBONE.NAME else "backbone.bottom_up."
    assert {name for name in detector if name.startswith(body)} <= made.keys()


def test_pretraining_is_that_of_the_mini_config():
    run = paper.find("imagenet-r50-gn-pretrained-100ep")
    like = recipe.resolve(recipe.load(model_zoo.get_config_file("mini/imagenet_R_18_FPN_gn.yaml"), []), 1)
    # The recipe of ImageNet pre-training remains, at the mini config's rate.
    assert recipe.differences(recipe.settings(like), mini_settings(run)).keys() <= {
        "INPUT.CLASSIFICATION.RELATIVE_AREA",
        "SOLVER.WEIGHT_DECAY_NORM",
        "SOLVER.WEIGHT_DECAY_BIAS",
        "SOLVER.BIAS_LR_FACTOR",
        "SOLVER.WARMUP_ITERS",
    }


def test_the_syncbn_pretraining_has_the_detectors_norm_and_pixels():
    run = pretraining(paper.find("base-r50-syncbn-pretrained-2x"))
    assert dataclasses.replace(run, id="", family="", config="") == dataclasses.replace(
        paper.find("imagenet-r50-gn-pretrained-100ep"), id="", family="", config=""
    )
    assert mini(run).INPUT.FORMAT == "RGB"


@pytest.mark.slow
@pytest.mark.parametrize("run", [r for r in DISTINCT if r.kind != "evaluate"], ids=by_id)
def test_trains(run, glyph_cache, tmp_path):
    cfg = mini(run).clone()
    cfg.OUTPUT_DIR, cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.DATASETS.TEST = str(tmp_path), "cpu", "", ()
    cfg.SOLVER.CASCADE_FROM, cfg.SOLVER.MAX_ITER = "", 3
    trainer = Trainer(cfg)
    trainer.train()
    losses = [value for value, _ in trainer.storage.history("total_loss").values()]
    assert len(losses) == 3 and all(map(math.isfinite, losses))
