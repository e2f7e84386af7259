"""The configs hold the paper's recipe, and hold it alike for both arms and all schedules."""

import statistics

import pytest
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import nn

from rethink_d2 import add_rethink_config, model_zoo, recipe
from rethink_d2.paper import find, load
from rethink_d2.solver import schedule

RUNS = load()
LONGEST = [run for run in RUNS if run.trunk is None]
CONFIGS = sorted(
    p.relative_to(model_zoo.config_dir()).as_posix() for p in model_zoo.config_dir().rglob("*.yaml")
)
MINI = ["mini/scratch_mask_rcnn_R_18_FPN_gn.yaml", "mini/scratch_faster_rcnn_R_18_FPN_gn_voc.yaml"]
# What an arm consists of; nothing else may differ between the runs of a pair.
ARM_KEYS = {"MODEL.WEIGHTS", "MODEL.BACKBONE.FREEZE_AT", "OUTPUT_DIR"}


def merged(name):
    """The config as written, unresolved."""
    return recipe.load(str(model_zoo.config_dir() / name), [])


def flat(cfg, prefix=""):
    out = {}
    for key, value in cfg.items():
        if isinstance(value, dict):
            out.update(flat(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = value
    return out


def differing(a, b):
    a, b = flat(merged(a)), flat(merged(b))
    assert a.keys() == b.keys()
    return {key for key in a if a[key] != b[key]}


def norms(cfg):
    m = cfg.MODEL
    return [m.RESNETS.NORM, m.FPN.NORM, m.ROI_BOX_HEAD.NORM, m.ROI_MASK_HEAD.NORM]


def build_on_cpu(name):
    cfg = merged(name)
    cfg.MODEL.DEVICE = "cpu"
    return build_model(cfg)


@pytest.mark.parametrize("name", CONFIGS)
def test_merges(name):
    cfg = merged(name)
    assert cfg.SEED == 1
    # The launcher chooses the device; a config that names one would fail on the other kind of machine.
    assert cfg.MODEL.DEVICE == get_cfg().MODEL.DEVICE
    # Lengths come from SOLVER.SCHEDULE alone.
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (get_cfg().SOLVER.MAX_ITER, get_cfg().SOLVER.STEPS)


@pytest.mark.parametrize("run", RUNS, ids=lambda r: r.id)
def test_other_projects_can_merge_it(run):
    """With Detectron2's own reader, and nothing but this project's keys."""
    cfg = get_cfg()
    add_rethink_config(cfg)
    cfg.merge_from_file(str(model_zoo.config_dir() / run.config))
    assert cfg.SOLVER.SCHEDULE == run.schedule


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
    ],
)
def test_base_overrides_detectron2(key, value):
    """The settings of Detectron that a Detectron2 default or base would silently replace."""
    assert flat(merged("Base-Mask-RCNN-FPN.yaml"))[key] == value


@pytest.mark.parametrize("run", [r for r in RUNS if r.arm == "scratch"], ids=lambda r: r.id)
def test_arms_of_a_pair_differ_in_weights_and_freezing_only(run):
    # OUTPUT_DIR is where the result goes, not how it comes about.
    assert differing(run.config, find(run.partner).config) == ARM_KEYS


@pytest.mark.parametrize("run", [r for r in RUNS if r.trunk], ids=lambda r: r.id)
def test_schedules_of_a_curve_differ_in_length_only(run):
    assert differing(run.config, find(run.trunk).config) == {"SOLVER.SCHEDULE", "OUTPUT_DIR"}


@pytest.mark.parametrize("run", RUNS, ids=lambda r: r.id)
def test_config_is_the_run_that_the_manifest_says(run):
    cfg = merged(run.config)
    assert cfg.SOLVER.SCHEDULE == run.schedule
    assert cfg.OUTPUT_DIR == f"./output/{run.id}/seed1"
    if run.arm == "scratch":
        assert (cfg.MODEL.WEIGHTS, cfg.MODEL.BACKBONE.FREEZE_AT) == ("", 0)
        assert not {"FrozenBN", "BN"} & set(norms(cfg))
    else:
        assert cfg.MODEL.WEIGHTS
        assert cfg.MODEL.BACKBONE.FREEZE_AT == 2
    # A shorter schedule can start only where the trunk keeps a checkpoint.
    drop = schedule.parse(run.schedule, cfg.SOLVER.IMS_PER_BATCH).steps[0]
    assert drop % cfg.SOLVER.CHECKPOINT_PERIOD == 0


@pytest.mark.parametrize("run", RUNS, ids=lambda r: r.id)
def test_header_says_where_from_and_how(run):
    text = (model_zoo.config_dir() / run.config).read_text()
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert f"--config-file configs/{run.config}" in header[-1]
    assert any(("Published: box AP" in line) == (run.published is not None) for line in header)
    if run.published is not None:
        assert any(f"box AP {run.published} " in line for line in header)


def test_configs_hold_differences_only():
    lines = [(model_zoo.config_dir() / r.config).read_text().count("\n") for r in RUNS]
    assert statistics.median(lines) < 15
    assert max(lines) < 20


@pytest.mark.parametrize("run", LONGEST, ids=lambda r: r.id)
def test_builds(run):
    """One schedule of each curve: the others build the same network, by the tests above."""
    model = build_on_cpu(run.config)
    bottom_up = model.backbone.bottom_up
    assert sum(len(stage) for stage in bottom_up.stages) == (33 if "r101" in run.family else 16)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    if run.arm == "scratch":
        assert frozen == []
    else:
        assert frozen or "syncbn" in run.family
        assert all(
            name.startswith(("backbone.bottom_up.stem.", "backbone.bottom_up.res2.")) for name in frozen
        )
    if run.family.endswith("gn"):
        groups = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
        # 3 x blocks + 4 shortcuts + stem, 8 in FPN, 4 in each head.
        assert len(groups) == 3 * (33 if "r101" in run.family else 16) + 4 + 1 + 8 + 4 + 4
        assert {(m.num_groups, m.eps) for m in groups} == {(32, 1e-5)}


@pytest.mark.parametrize("name", MINI)
def test_mini_builds(name):
    model = build_on_cpu(name)
    assert model.roi_heads.mask_on == ("mask_rcnn" in name)
    assert all(p.requires_grad for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) < 6e6


def test_mini_schedule_keeps_the_proportions():
    cfg = merged(MINI[0])
    assert schedule.parse(cfg.SOLVER.SCHEDULE, cfg.SOLVER.IMS_PER_BATCH) == (540, (360, 480))
