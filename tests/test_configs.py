"""The configs hold the paper's recipe, and hold it alike for both arms and all schedules."""

import functools
import json
import statistics

import pytest
import torch
from detectron2.config import get_cfg
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rethink_d2 import add_rethink_config, model_zoo, recipe
from rethink_d2.modeling.inspection import build_meta
from rethink_d2.paper import find, load
from rethink_d2.solver import schedule

# A search has no config of its own, an analysis none at all.
RUNS = [run for run in load() if run.kind in ("train", "cascade", "evaluate")]
PRETRAINING = [run for run in load() if run.kind == "pretrain"]
LONGEST = [run for run in RUNS if run.trunk is None or run.kind != "train"]
CONFIGS = sorted(
    p.relative_to(model_zoo.config_dir()).as_posix() for p in model_zoo.config_dir().rglob("*.yaml")
)
MINI = ["mini/scratch_mask_rcnn_R_18_FPN_gn.yaml", "mini/scratch_faster_rcnn_R_18_FPN_gn_voc.yaml"]
# What an arm consists of; but for the length, nothing else may differ between the runs of a pair.
ARM_KEYS = {"MODEL.WEIGHTS", "MODEL.BACKBONE.FREEZE_AT", "OUTPUT_DIR"}
# What a run of another length may have otherwise: how often it saves and looks.
PERIODS = {"SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD"}
CASCADE_KEYS = {"MODEL.ROI_HEADS.NAME", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG"}
AP_NAMES = {
    "bbox/AP": "box AP",
    "bbox/AP50": "AP50",
    "bbox_TTA/AP": "box AP",
    "segm/AP": "mask AP",
    "segm_TTA/AP": "mask AP",
    "keypoints/AP": "keypoint AP",
}
BLOCKS = {50: 16, 101: 33, 152: 50}


@functools.cache
def merged(name):
    """The config as written, unresolved."""
    cfg = recipe.load(str(model_zoo.config_dir() / name), [])
    cfg.freeze()
    return cfg


def flat(name):
    return recipe.flatten(merged(name))


def differing(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    return {key for key in a if a[key] != b[key]}


def header(run):
    text = (model_zoo.config_dir() / run.config).read_text()
    return [line for line in text.splitlines() if line.startswith("#")]


_models = {}


def build(name):
    """The config's model on the meta device, built once for all configs that have the same one."""
    leaves = flat(name).items()
    key = json.dumps([leaf for leaf in leaves if leaf[0].startswith("MODEL.") and leaf[0] != "MODEL.WEIGHTS"])
    if key not in _models:
        _models[key] = build_meta(merged(name))
    return _models[key]


@pytest.mark.parametrize("name", CONFIGS)
def test_merges(name):
    cfg = merged(name)
    assert cfg.SEED == 1
    # The launcher chooses the device; a config that names one would fail on the other kind of machine.
    assert cfg.MODEL.DEVICE == get_cfg().MODEL.DEVICE
    if cfg.MODEL.META_ARCHITECTURE != "Classifier":
        # Lengths come from SOLVER.SCHEDULE alone.
        assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (get_cfg().SOLVER.MAX_ITER, get_cfg().SOLVER.STEPS)


@pytest.mark.parametrize("name", [run.config for run in RUNS + PRETRAINING])
def test_other_projects_can_merge_it(name):
    """With Detectron2's own reader, and nothing but this project's keys."""
    cfg = get_cfg()
    add_rethink_config(cfg)
    cfg.merge_from_file(str(model_zoo.config_dir() / name))
    cfg.freeze()
    assert cfg == merged(name)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.PIXEL_MEAN", [102.9801, 115.9465, 122.7717]),
        ("MODEL.RESNETS.STRIDE_IN_1X1", False),
        ("MODEL.ANCHOR_GENERATOR.OFFSET", 0.5),
        ("MODEL.RPN.BOUNDARY_THRESH", 0),
        ("MODEL.RPN.SMOOTH_L1_BETA", 0.1111),
        ("MODEL.RPN.POST_NMS_TOPK_TRAIN", 1000),
        ("MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", 1.0),
        ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlign"),
        ("MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", 2),
        ("MODEL.ROI_MASK_HEAD.POOLER_TYPE", "ROIAlign"),
        ("MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO", 2),
        ("MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE", "ROIAlign"),
        ("MODEL.ROI_BOX_CASCADE_HEAD.MASK_ON_LAST_STAGE", True),
        ("SOLVER.IMS_PER_BATCH", 16),
        ("SOLVER.IMS_PER_GROUP", 2),
        ("SOLVER.BASE_LR", 0.02),
        ("SOLVER.WEIGHT_DECAY", 0.0001),
        ("SOLVER.WEIGHT_DECAY_NORM", 0.0),
        ("SOLVER.WEIGHT_DECAY_BIAS", 0.0),
        ("SOLVER.BIAS_LR_FACTOR", 2.0),
        ("SOLVER.WARMUP_ITERS", 500),
        ("SOLVER.WARMUP_FACTOR", pytest.approx(1 / 3, abs=1e-6)),
        ("INPUT.MIN_SIZE_TRAIN", (800,)),
        ("TEST.AUG.ENABLED", False),
        # With INPUT.MIN_SIZE_TEST 800 and the flips, Detectron's 18 views.
        ("TEST.AUG.MIN_SIZES", (400, 500, 600, 700, 900, 1000, 1100, 1200)),
        ("TEST.AUG.MAX_SIZE", 2000),
        ("TEST.AUG.FLIP", True),
        ("TEST.AUG.BOX_VOTE_THRESH", 0.9),
    ],
)
def test_base_overrides_detectron2(key, value):
    """The settings of Detectron that a Detectron2 default or base would silently replace."""
    assert flat("Base-Mask-RCNN-FPN.yaml")[key] == value


SCALES = {first: tuple(range(first, 801, 32)) for first in (480, 512, 640)}


@pytest.mark.parametrize(
    ("base", "other", "changes"),
    [
        ("Base-Mask-RCNN-FPN_aug", "Base-Mask-RCNN-FPN", {"INPUT.MIN_SIZE_TRAIN": SCALES[640]}),
        (
            "Base-Mask-RCNN-FPN_X152_aug",
            "Base-Mask-RCNN-FPN_aug",
            {
                "MODEL.RESNETS.DEPTH": 152,
                "MODEL.RESNETS.NUM_GROUPS": 8,
                "MODEL.RESNETS.WIDTH_PER_GROUP": 32,
            },
        ),
        (
            "Base-Mask-RCNN-FPN_35k",
            "Base-Mask-RCNN-FPN",
            {
                "INPUT.MIN_SIZE_TRAIN": SCALES[512],
                "DATASETS.TRAIN": ("coco_2017_train_35k",),
                "SOLVER.BASE_LR": 0.04,
                "SOLVER.GAMMA": 0.02,
            },
        ),
        (
            "Base-Keypoint-RCNN-FPN",
            "Base-Mask-RCNN-FPN_aug",
            {
                "MODEL.MASK_ON": False,
                "MODEL.KEYPOINT_ON": True,
                "MODEL.RPN.POST_NMS_TOPK_TRAIN": 1500,
                "MODEL.ROI_HEADS.NUM_CLASSES": 1,
                "DATASETS.TRAIN": ("keypoints_coco_2017_train",),
                "DATASETS.TEST": ("keypoints_coco_2017_val",),
                "TEST.EVAL_PERIOD": 10000,
            },
        ),
        (
            "Base-Faster-RCNN-FPN_voc",
            "Base-Mask-RCNN-FPN",
            {
                "MODEL.MASK_ON": False,
                "MODEL.RESNETS.DEPTH": 101,
                "MODEL.ROI_HEADS.NUM_CLASSES": 20,
                "INPUT.MIN_SIZE_TRAIN": SCALES[480],
                "DATASETS.TRAIN": ("voc_0712_train",),
                "DATASETS.TEST": ("voc_2012_val",),
                "SOLVER.WARMUP_ITERS": 100,
            },
        ),
        (
            "Base-Faster-RCNN-VGG16",
            "Base-Mask-RCNN-FPN_aug",
            {
                "MODEL.MASK_ON": False,
                "MODEL.INIT.POLICY": "msra_all",
                "MODEL.BACKBONE.NAME": "build_vgg16_backbone",
                "MODEL.ANCHOR_GENERATOR.SIZES": [[32, 64, 128, 256, 512]],
                "MODEL.RPN.IN_FEATURES": ["conv5"],
                "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 12000,
                "MODEL.RPN.PRE_NMS_TOPK_TEST": 6000,
                "MODEL.RPN.POST_NMS_TOPK_TRAIN": 2000,
                "MODEL.ROI_HEADS.IN_FEATURES": ["conv5"],
                "MODEL.ROI_BOX_HEAD.NUM_CONV": 0,
                "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
                "MODEL.ROI_BOX_HEAD.FC_DIM": 4096,
                "MODEL.ROI_BOX_HEAD.NORM": "",
                "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 0,
            },
        ),
    ],
)
def test_a_family_s_base_changes_what_the_paper_says_and_nothing_else(base, other, changes):
    base, other = f"{base}.yaml", f"{other}.yaml"
    assert {key: flat(base)[key] for key in differing(base, other)} == changes


@pytest.mark.parametrize(
    ("run", "other", "keys"),
    [
        ("coco35k-default-pretrained-6x", "base-r50-gn-pretrained-6x", {"DATASETS.TRAIN"}),
        ("coco10k-pretrained-80k", "coco35k-pretrained-6x", {"DATASETS.TRAIN", "SOLVER.SCHEDULE", *PERIODS}),
        ("coco3.5k-scratch-110k", "coco10k-scratch-280k", {"DATASETS.TRAIN", "SOLVER.SCHEDULE", *PERIODS}),
        ("coco1k-scratch-60k", "coco10k-scratch-280k", {"DATASETS.TRAIN", "SOLVER.SCHEDULE", *PERIODS}),
        ("coco1k-searched-scratch-60k", "coco1k-scratch-60k", set()),
        ("voc-15k-scratch-144k", "voc-scratch-144k", {"DATASETS.TRAIN"}),
        ("aug-r50-scratch-9x", "base-r50-gn-scratch-6x", {"INPUT.MIN_SIZE_TRAIN", "SOLVER.SCHEDULE"}),
        ("aug-r101-pretrained-6x", "base-r101-gn-pretrained-6x", {"INPUT.MIN_SIZE_TRAIN"}),
        ("cascade-r50-pretrained-6x", "aug-r50-pretrained-6x", CASCADE_KEYS),
    ],
)
def test_a_family_changes_its_subject_only(run, other, keys):
    assert differing(find(run).config, find(other).config) == keys | {"OUTPUT_DIR"}


@pytest.mark.parametrize(
    ("family", "train"),
    [
        ("coco35k-default", "coco_2017_train_35k"),
        ("coco10k", "coco_2017_train_10k"),
        ("coco3.5k", "coco_2017_train_3.5k"),
        ("coco1k", "coco_2017_train_1k"),
        ("voc-15k", "voc_0712_train_15k"),
    ],
)
def test_training_set(family, train):
    assert {merged(run.config).DATASETS.TRAIN for run in RUNS if run.family == family} == {(train,)}


@pytest.mark.parametrize("run", [r for r in RUNS if r.arm == "scratch" and r.partner], ids=lambda r: r.id)
def test_arms_of_a_pair_differ_in_weights_freezing_and_length_only(run):
    # OUTPUT_DIR is where the result goes, not how it comes about.
    found = differing(run.config, find(run.partner).config)
    if run.schedule == find(run.partner).schedule:
        assert found == ARM_KEYS
    else:
        # Where the pre-trained arm is a cascade throughout, the other one starts with its trunk.
        start = (
            {"SOLVER.CASCADE_FROM"} if "cascade" in (run.kind, run.trunk and find(run.trunk).kind) else set()
        )
        assert found - PERIODS == ARM_KEYS | {"SOLVER.SCHEDULE"} | start


@pytest.mark.parametrize("run", [r for r in RUNS if r.trunk], ids=lambda r: r.id)
def test_a_run_differs_from_its_trunk_in_what_its_kind_says(run):
    own = {
        "train": {"SOLVER.SCHEDULE"},
        "cascade": {"SOLVER.CASCADE_FROM", *CASCADE_KEYS},
        "evaluate": {"TEST.AUG.ENABLED", "MODEL.WEIGHTS"},
    }
    assert differing(run.config, find(run.trunk).config) == own[run.kind] | {"OUTPUT_DIR"}


@pytest.mark.parametrize("run", RUNS, ids=lambda r: r.id)
def test_config_is_the_run_that_the_manifest_says(run):
    cfg = merged(run.config)
    assert cfg.SOLVER.SCHEDULE == run.schedule
    assert cfg.OUTPUT_DIR == f"./output/{run.id}/seed1"
    assert cfg.TEST.AUG.ENABLED == (run.kind == "evaluate") == ("_TTA/" in run.metric)
    assert cfg.MODEL.KEYPOINT_ON == run.metric.startswith("keypoints/")
    assert cfg.MODEL.BACKBONE.FREEZE_AT == (0 if run.arm == "scratch" else 2)
    if run.kind == "evaluate":
        assert cfg.MODEL.WEIGHTS == f"{merged(find(run.trunk).config).OUTPUT_DIR}/model_final.pth"
    else:
        assert (cfg.MODEL.WEIGHTS == "") == (run.arm == "scratch")
    if run.arm == "scratch":
        parts = (cfg.MODEL[part] for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"))
        assert not {"FrozenBN", "BN"} & {part.NORM for part in parts}


def test_weights_that_no_one_publishes_are_made_by_pretraining():
    weights = {merged(run.config).MODEL.WEIGHTS for run in RUNS if run.kind != "evaluate"}
    assert {name for name in weights if name and "://" not in name} == {
        f"./output/{run.id}/seed1/model_final.pth" for run in PRETRAINING if not run.optional
    }


@pytest.mark.parametrize("run", PRETRAINING, ids=lambda r: r.id)
def test_pretraining_writes_where_its_id_says(run):
    assert merged(run.config).OUTPUT_DIR == f"./output/{run.id}/seed1"


@pytest.mark.parametrize("run", [r for r in RUNS if r.branch_iteration], ids=lambda r: r.id)
def test_branches_start_where_the_trunk_keeps_a_checkpoint(run):
    trunk, cfg = merged(find(run.trunk).config), merged(run.config)
    assert run.branch_iteration % trunk.SOLVER.CHECKPOINT_PERIOD == 0
    if run.kind == "cascade":
        start = schedule.parse(cfg.SOLVER.CASCADE_FROM, cfg.SOLVER.IMS_PER_BATCH)
        assert start.max_iter == run.branch_iteration
    else:
        assert cfg.SOLVER.CASCADE_FROM == ""


@pytest.mark.parametrize("run", [r for r in LONGEST if r.kind != "evaluate"], ids=lambda r: r.id)
def test_a_curve_has_enough_points(run):
    cfg = merged(run.config)
    length = schedule.parse(run.schedule, cfg.SOLVER.IMS_PER_BATCH).max_iter
    assert 15 <= length / cfg.TEST.EVAL_PERIOD <= 50


@pytest.mark.parametrize("run", RUNS, ids=lambda r: r.id)
def test_header_says_where_from_and_how(run):
    *lines, command = header(run)
    assert f"--config-file configs/{run.config}" in command
    assert ("--eval-only" in command) == (run.kind == "evaluate")
    assert ("--branch-from" in command) == (run.kind == "cascade")
    if run.kind == "cascade":
        assert command.endswith(f"--branch-from {merged(find(run.trunk).config).OUTPUT_DIR}")
    assert all(
        part.removeprefix("Fig ") in lines[0] for part in run.figure.removeprefix("section ").split("; ")
    )
    published = next(line for line in lines if line.startswith("# Published: "))
    assert ("no number" in published) == (run.published is None)
    numbers = {run.metric: run.published, **run.also_published}
    for metric, name in AP_NAMES.items():
        # AP50 and AP75 of Mask R-CNNs stand in the manifest only.
        if numbers.get(metric) is not None and (metric == run.metric or metric.endswith("/AP")):
            assert f"{name} {numbers[metric]} " in published.replace(",", " ")


def test_configs_hold_differences_only():
    lines = [(model_zoo.config_dir() / r.config).read_text().count("\n") for r in RUNS]
    assert statistics.median(lines) < 15
    assert max(lines) < 20


@pytest.mark.parametrize("run", LONGEST, ids=lambda r: r.id)
def test_builds(run):
    """One schedule of each curve: the others build the same network, by the tests above."""
    cfg, model = merged(run.config), build(run.config)
    backbone = model.backbone
    if "vgg" in run.family:
        body, kept = "backbone.", ("conv1_", "conv2_")
        assert sum(isinstance(m, nn.Conv2d) for m in backbone.modules()) == 13
    else:
        body, kept = "backbone.bottom_up.", ("stem.", "res2.")
        assert sum(len(stage) for stage in backbone.bottom_up.stages) == BLOCKS[cfg.MODEL.RESNETS.DEPTH]
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    if run.arm == "scratch":
        assert frozen == []
    else:
        # Of SyncBN's frozen stages the norms have become buffers.
        assert frozen
        assert all(name.removeprefix(body).startswith(kept) for name in frozen)
    stages = len(getattr(model.roi_heads, "proposal_matchers", [None]))
    assert stages == (3 if "cascade" in run.config else 1)
    groups = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    if "_gn_" in run.config:
        # 3 x blocks + 4 shortcuts + stem, 8 in FPN, 4 in each stage's box head and the mask head.
        expected = 3 * BLOCKS[cfg.MODEL.RESNETS.DEPTH] + 4 + 1 + 8 + 4 * stages + 4 * cfg.MODEL.MASK_ON
        assert len(groups) == expected
        assert {(m.num_groups, m.eps) for m in groups} == {(32, 1e-5)}
    else:
        assert groups == []


def multiply_adds(name):
    """Of the backbone without FPN, for one image of 224x224, in 1e9."""
    with FlopCounterMode(display=False) as counter:
        build(name).backbone.bottom_up(torch.zeros(1, 3, 224, 224, device="meta"))
    return counter.get_total_flops() / 2e9


def test_x152_has_about_four_times_the_flops_of_r101():
    """Section 5.1; so "8x32d" means 8 groups of 32 channels, not 32 of 8."""
    r101 = multiply_adds(find("aug-r101-scratch-9x").config)
    x152 = multiply_adds(find("x152-aug-scratch-9x").config)
    assert (r101, x152) == (pytest.approx(7.80, abs=0.01), pytest.approx(33.05, abs=0.01))
    assert x152 / r101 == pytest.approx(4.24, abs=0.01)


@pytest.mark.parametrize("name", MINI)
def test_mini_builds(name):
    model = build(name)
    assert model.roi_heads.mask_on == ("mask_rcnn" in name)
    assert all(p.requires_grad for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) < 6e6


def test_mini_schedule_keeps_the_proportions():
    cfg = merged(MINI[0])
    assert schedule.parse(cfg.SOLVER.SCHEDULE, cfg.SOLVER.IMS_PER_BATCH) == (540, (360, 480))
