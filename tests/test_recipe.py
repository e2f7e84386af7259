"""The recipe: settling it, saying what is wrong with it, naming it."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import given, settings
from hypothesis import strategies as st

from rethink_d2 import add_rethink_config, dry_run, paper, recipe
from rethink_d2.data.classification import register_image_folder
from rethink_d2.data.files import missing_files
from rethink_d2.modeling.inspection import build_meta

SET, VOC = "recipe_test_set", "recipe_test_voc"
TORCHVISION = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
GN_WEIGHTS = "catalog://ImageNetPretrained/FAIR/R-50-GN"
GN = ["MODEL.RESNETS.STRIDE_IN_1X1", "False"]
# torchvision's weights as Detectron2's SyncBN recipe takes them.
SYNCBN = [
    *["MODEL.WEIGHTS", TORCHVISION, "MODEL.RESNETS.NORM", "SyncBN", "MODEL.RESNETS.STRIDE_IN_1X1", "False"],
    *["INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", "[123.675, 116.28, 103.53]"],
    *["MODEL.PIXEL_STD", "[58.395, 57.12, 57.375]"],
]


@pytest.fixture(scope="module", autouse=True)
def data_sets(tmp_path_factory):
    """Two registered sets whose files exist: one as COCO's, one as VOC's with an empty split."""
    root = tmp_path_factory.mktemp("sets")
    (root / "a.json").write_text("{}")
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "train.txt").write_text("")
    for name in (SET, VOC):
        DatasetCatalog.register(name, list)
    MetadataCatalog.get(SET).set(
        json_file=str(root / "a.json"), image_root=str(root), thing_classes=["x"] * 80
    )
    MetadataCatalog.get(VOC).set(dirname=str(root), split="train", year=2007)
    yield root
    for name in (SET, VOC):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def good(*opts, world_size=1):
    """A resolved recipe with which nothing is wrong, and changes to it."""
    base = ["SEED", 1, "SOLVER.SCHEDULE", "6x", "SOLVER.BASE_LR", 0.02, "SOLVER.IMS_PER_GROUP", 2]
    base += ["MODEL.RESNETS.NORM", "GN", "MODEL.BACKBONE.FREEZE_AT", 0, "DATASETS.TRAIN", (SET,)]
    base += ["SOLVER.CHECKPOINT_KEEP", 1]  # all of them may not fit on this disk
    return recipe.resolve(recipe.load("", [*base, "DATASETS.TEST", (SET,), *opts]), world_size)


def problems(cfg, world_size=1):
    return {p.key: p for p in recipe.check(cfg, world_size)}


# ---------------------------------------------------------------- resolve


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["", "6x", "2x", "0.5x", "220k", "900"]),
    st.integers(1, 8),
    st.sampled_from([None, 1, 2, 3, 4, 8, 16]),
    st.sampled_from([0, 4, 8]),
    st.sampled_from([0, 1, 2]),
    st.sampled_from(["GN", "SyncBN"]),
)
def test_resolving_twice_changes_nothing(schedule, eighth, world_size, reference, group, norm):
    cfg = get_cfg()
    add_rethink_config(cfg)
    cfg.SOLVER.SCHEDULE, cfg.SOLVER.IMS_PER_BATCH = schedule, 8 * eighth
    cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.IMS_PER_GROUP = reference, group
    cfg.MODEL.RESNETS.NORM = norm
    before = cfg.clone()
    once = recipe.resolve(cfg, world_size)
    assert cfg == before
    assert recipe.resolve(once, world_size) == once
    assert recipe.resolve(once) == once
    if reference in (0, world_size) or world_size is None:
        assert once.SOLVER.BASE_LR == before.SOLVER.BASE_LR


def test_resolve_writes_what_follows():
    cfg = recipe.load("", ["SOLVER.SCHEDULE", "6x", "DATALOADER.NUM_WORKERS", 10**6])
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupCosineLR"
    cfg.freeze()
    out = recipe.resolve(cfg)
    s = out.SOLVER
    assert (s.MAX_ITER, s.STEPS, s.LR_SCHEDULER_NAME) == (540000, (480000, 520000), "WarmupMultiStepLR")
    assert s.IMS_PER_GROUP == 2 and out.is_frozen()
    assert out.DATALOADER.NUM_WORKERS < 10**6
    short = recipe.resolve(recipe.load("", ["SOLVER.SCHEDULE", "90"])).SOLVER
    assert short.WARMUP_ITERS == short.STEPS[0] < 90


@pytest.mark.parametrize("schedule, length", [("6x", 1080000), ("300", 600), ("2k", 4000)])
def test_linear_scaling_keeps_the_images_seen(schedule, length):
    opts = ["SOLVER.SCHEDULE", schedule, "SOLVER.REFERENCE_WORLD_SIZE", 8, "SOLVER.BASE_LR", 0.02]
    s = recipe.resolve(recipe.load("", opts), 4).SOLVER
    assert (s.IMS_PER_BATCH, s.BASE_LR, s.MAX_ITER, s.REFERENCE_WORLD_SIZE) == (8, 0.01, length, 4)
    with pytest.raises(ValueError, match="SOLVER.IMS_PER_BATCH"):
        recipe.resolve(recipe.load("", [*opts, "SOLVER.IMS_PER_BATCH", 12]), 4)


def test_syncbn_does_not_accumulate_and_runs_on_cpu_processes():
    cfg = good(*SYNCBN, world_size=2)
    assert cfg.SOLVER.IMS_PER_GROUP == 8
    assert cfg.MODEL.RESNETS.NORM == "SyncBN"
    given = recipe.load("", [*SYNCBN, "MODEL.DEVICE", "cpu"])
    assert recipe.resolve(given, 2).MODEL.RESNETS.NORM == "naiveSyncBN_N"
    assert recipe.resolve(given, 1).MODEL.RESNETS.NORM == given.MODEL.RESNETS.NORM == "SyncBN"


def test_resolve_refuses_a_malformed_schedule():
    with pytest.raises(ValueError, match="SOLVER.SCHEDULE"):
        recipe.resolve(recipe.load("", ["SOLVER.SCHEDULE", "six"]))


# ---------------------------------------------------------------- check


# Detectron2's defaults for ResNets, which a recipe with VGG does not mention.
VGG = ["MODEL.BACKBONE.NAME", "build_vgg16_backbone", "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.VGG.WIDTH", 32]
VGG += ["MODEL.RPN.IN_FEATURES", "['conv5']", "MODEL.ROI_HEADS.IN_FEATURES", "['conv5']"]
VGG += ["MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"]
VGG += ["MODEL.ROI_BOX_HEAD.NUM_FC", 2, "MODEL.INIT.POLICY", "msra_all"]


@pytest.mark.parametrize(
    "opts",
    [
        [],
        ["MODEL.WEIGHTS", GN_WEIGHTS, "MODEL.BACKBONE.FREEZE_AT", 2, *GN],
        [*SYNCBN, "MODEL.BACKBONE.FREEZE_AT", 2],
        VGG,
        [*VGG, "MODEL.VGG.NORM", "GN", "MODEL.RESNETS.NORM", "GN", "MODEL.RESNETS.STEM_OUT_CHANNELS", 48],
    ],
    ids=["scratch", "pretrained", "syncbn", "vgg", "vgg-gn"],
)
def test_good_recipes_pass(opts):
    assert recipe.check(good(*opts)) == []
    assert recipe.check(good(*opts, world_size=2), 2) == []


FPN = ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.RESNETS.OUT_FEATURES"]
FPN += ["['res2', 'res3', 'res4', 'res5']", "MODEL.FPN.IN_FEATURES", "['res2', 'res3', 'res4', 'res5']"]
FPN += ["MODEL.RPN.IN_FEATURES", "['p2']", "MODEL.ROI_HEADS.IN_FEATURES", "['p2']"]
FPN += ["MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"]
FPN += ["MODEL.ROI_BOX_HEAD.NUM_CONV", 1, "MODEL.FPN.NORM", "GN", "MODEL.ROI_BOX_HEAD.NORM", "GN"]


@pytest.mark.parametrize(
    "opts, key, words",
    [
        (
            ["MODEL.BACKBONE.FREEZE_AT", 2],
            "MODEL.BACKBONE.FREEZE_AT",
            ["36.2", "39.5", "37.5", "41.0", "model zoo"],
        ),
        (["MODEL.RESNETS.NORM", "FrozenBN"], "MODEL.RESNETS.NORM", ["frozen"]),
        (["MODEL.RESNETS.NORM", "BN"], "MODEL.RESNETS.NORM", ["GN"]),
        ([*VGG, "MODEL.BACKBONE.FREEZE_AT", 2], "MODEL.BACKBONE.FREEZE_AT", ["random"]),
        ([*VGG, "MODEL.VGG.NORM", "FrozenBN"], "MODEL.VGG.NORM", ["frozen"]),
        ([*VGG, "MODEL.VGG.NORM", "BN"], "MODEL.VGG.NORM", ["GN"]),
        ([*FPN, "MODEL.FPN.NORM", "BN"], "MODEL.FPN.NORM", ["backbone.fpn"]),
        ([*FPN, "MODEL.ROI_BOX_HEAD.NORM", "FrozenBN"], "MODEL.ROI_BOX_HEAD.NORM", ["roi_heads.box_head"]),
        ([*SYNCBN, "SOLVER.IMS_PER_BATCH", 4], "SOLVER.IMS_PER_GROUP", ["4 images", "MODEL.RESNETS.NORM"]),
        (["MODEL.RESNETS.STEM_OUT_CHANNELS", 48], "MODEL.RESNETS.STEM_OUT_CHANNELS", ["multiple of 32"]),
        (["MODEL.WEIGHTS", TORCHVISION], "MODEL.RESNETS.NORM", ["holds batch norm", "GN"]),
        (["MODEL.WEIGHTS", "detectron2://ImageNetPretrained/MSRA/R-50.pkl"], "MODEL.RESNETS.NORM", ["GN"]),
        ([*SYNCBN, "MODEL.WEIGHTS", GN_WEIGHTS], "MODEL.RESNETS.NORM", ["group norm", "SyncBN"]),
        (
            [*SYNCBN, "MODEL.WEIGHTS", "catalog://ImageNetPretrained/MSRA/R-50"],
            "MODEL.RESNETS.NORM",
            ["folded"],
        ),
        ([*SYNCBN, "MODEL.RESNETS.STRIDE_IN_1X1", True], "MODEL.RESNETS.STRIDE_IN_1X1", ["False"]),
        (["MODEL.WEIGHTS", "/no/such/model.pth"], "MODEL.WEIGHTS", ["/no/such/model.pth"]),
        (["MODEL.WEIGHTS", "catalog://ImageNetPretrained/FAIR/R-50-GM"], "MODEL.WEIGHTS", ["FAIR/R-50-GN"]),
        ([*SYNCBN, "INPUT.FORMAT", "BGR"], "INPUT.FORMAT", ["RGB"]),
        ([*SYNCBN, "MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]"], "MODEL.PIXEL_STD", ["58.395"]),
        (
            ["MODEL.WEIGHTS", GN_WEIGHTS, "MODEL.PIXEL_MEAN", "[123.7, 116.3, 103.5]"],
            "MODEL.PIXEL_MEAN",
            ["103.53"],
        ),
        (["INPUT.FORMAT", "RGB"], "MODEL.PIXEL_MEAN", ["INPUT.FORMAT RGB"]),
        (["SOLVER.BASE_LR", 0.05], "SOLVER.BASE_LR", ["0.02"]),
        (["SOLVER.IMS_PER_GROUP", 3], "SOLVER.IMS_PER_BATCH", ["groups of 3"]),
        (["SEED", -1], "SEED", ["-1"]),
        (["MODEL.INIT.POLICY", "mrsa"], "MODEL.INIT.POLICY", ["did you mean msra?"]),
        (["DATASETS.TRAIN", ()], "DATASETS.TRAIN", ["nothing to train on"]),
        (["DATASETS.TRAIN", ("recipe_test_sets",)], "DATASETS.TRAIN", [f"did you mean {SET}?"]),
        (["DATASETS.TRAIN", (VOC,)], "DATASETS.TRAIN", ["no images", "train.txt"]),
        (["MODEL.ROI_HEADS.NUM_CLASSES", 20], "MODEL.ROI_HEADS.NUM_CLASSES", ["80"]),
    ],
)
def test_each_rule(opts, key, words):
    found = problems(good(*opts))
    assert key in found, found
    text = str(found[key])
    assert "\n" not in text and all(word in text for word in [key, *words]), text
    warns = key in ("SOLVER.BASE_LR", "MODEL.RESNETS.STRIDE_IN_1X1") or opts == ["INPUT.FORMAT", "RGB"]
    assert found[key].level == ("warning" if warns else "error")


def test_rules_about_resnets_leave_vgg_alone():
    norm = "MODEL.VGG.NORM"
    assert set(problems(good(*VGG, norm, "BN", "MODEL.WEIGHTS", GN_WEIGHTS))) == {norm}
    frozen = good(*VGG, norm, "SyncBN", "SOLVER.IMS_PER_GROUP", 16, "MODEL.BACKBONE.FREEZE_AT", 2)
    assert set(problems(frozen)) == {"MODEL.BACKBONE.FREEZE_AT"}


# Image classification: all that a detector's head would need is left out.
CLASSIFIER = ["MODEL.META_ARCHITECTURE", "Classifier", "INPUT.MAPPER", "ClassificationMapper"]
CLASSIFIER += ["INPUT.MIN_SIZE_TEST", 256, "MODEL.CLASSIFIER.IN_FEATURE", "res4", "SOLVER.BASE_LR", 0.1]


@pytest.fixture
def images(tmp_path):
    """A registered folder with two classes."""
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
    register_image_folder("recipe_test_images", str(tmp_path / "images"))
    yield "recipe_test_images"
    DatasetCatalog.remove("recipe_test_images")
    MetadataCatalog.remove("recipe_test_images")


def classifier(images, *opts):
    sets = ["DATASETS.TRAIN", (images,), "DATASETS.TEST", (images,), "MODEL.CLASSIFIER.NUM_CLASSES", 2]
    return good(*CLASSIFIER, *sets, *opts)


def test_a_good_classifier_passes(images):
    # Batch norm trains a classifier; a head's widths and the rate of detection are nothing to it.
    opts = ["MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "GN", "MODEL.FPN.OUT_CHANNELS", 40]
    assert recipe.check(classifier(images, *opts)) == []


@pytest.mark.parametrize(
    "opts, key, words",
    [
        (["MODEL.CLASSIFIER.NUM_CLASSES", 3], "MODEL.CLASSIFIER.NUM_CLASSES", ["has 2 classes"]),
        (["INPUT.MAPPER", "CountingMapper"], "INPUT.MAPPER", ["ClassificationMapper"]),
        (["INPUT.MIN_SIZE_TEST", 200], "INPUT.MIN_SIZE_TEST", ["200", "224"]),
        (["MODEL.CLASSIFIER.IN_FEATURE", "res9"], "MODEL", ["MODEL.CLASSIFIER.IN_FEATURE"]),
        (["MODEL.RESNETS.STEM_OUT_CHANNELS", 48], "MODEL.RESNETS.STEM_OUT_CHANNELS", ["multiple of 32"]),
        (["DATASETS.TEST", ("imagenet_vall",)], "DATASETS.TEST", ["did you mean imagenet_val?"]),
    ],
)
def test_each_rule_for_classifiers(images, opts, key, words):
    found = problems(classifier(images, *opts))
    assert key in found, found
    assert all(word in str(found[key]) for word in words), str(found[key])


def test_a_frozen_start_of_a_classifier_costs_no_box_ap(images):
    text = str(problems(classifier(images, "MODEL.BACKBONE.FREEZE_AT", 2))["MODEL.BACKBONE.FREEZE_AT"])
    assert "random values" in text and "box AP" not in text


@pytest.mark.parametrize(
    "steps, length, key",
    [((90, 50), 100, "SOLVER.STEPS"), ((0, 50), 100, "SOLVER.STEPS"), ((100,), 100, "SOLVER.STEPS")]
    + [((), 0, "SOLVER.MAX_ITER"), ((50, 50), 100, "SOLVER.STEPS")],
)
def test_steps_lie_in_the_run(steps, length, key):
    cfg = good("SOLVER.SCHEDULE", "")
    cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER = steps, length
    assert set(problems(cfg)) == {key}


def test_missing_files_are_listed(monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", "/some/where")
    name = "recipe_test_missing"
    DatasetCatalog.register(name, list)
    try:
        MetadataCatalog.get(name).set(json_file=str(tmp_path / "no.json"), image_root=str(tmp_path))
        text = str(problems(good("DATASETS.TEST", (name,)))["DATASETS.TEST"])
        assert "no.json" in text and "/some/where" in text
        assert missing_files(name) == [str(tmp_path / "no.json")]
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_check_raises_nothing_on_an_unresolved_or_broken_recipe():
    cfg = good()
    cfg.SOLVER.SCHEDULE = "six"
    assert "SOLVER.SCHEDULE" in problems(cfg)
    cfg.MODEL.META_ARCHITECTURE = "NoSuchThing"
    assert "NoSuchThing" in problems(cfg)["MODEL"].message
    cfg.SOLVER.STEPS, cfg.SOLVER.SCHEDULE = ("a",), ""
    assert "schedule" in problems(cfg)["config"].message
    errors_first = [p.level for p in recipe.check(good("SOLVER.BASE_LR", 1.0, "SEED", -1))]
    assert errors_first == ["error", "warning"]


# ---------------------------------------------------------------- identity and summary


def test_identity_ignores_what_changes_nothing(tmp_path):
    cfg = good()
    name = recipe.identity(cfg)
    for key in recipe.FREE:
        other = cfg.clone()
        *path, last = key.split(".")
        node = other
        for part in path:
            node = node[part]
        node[last] = "x" if isinstance(node[last], str) else [7] if isinstance(node[last], list) else 7
        assert recipe.identity(other) == name, key
    for opts in (
        ["SEED", 2],
        ["SOLVER.BASE_LR", 0.01],
        ["SOLVER.SCHEDULE", "5x"],
        ["INPUT.MIN_SIZE_TEST", 600],
    ):
        assert recipe.identity(good(*opts)) != name, opts
    new = cfg.clone()
    new.SOLVER.SOMETHING_NEW = 1
    assert recipe.identity(new) != name
    kinds = [recipe.classify(key) for key in ("OUTPUT_DIR", "SOLVER.STEPS", "ANY.NEW")]
    assert kinds == ["free", "schedule", "trajectory"]


def test_identity_takes_local_weights_by_content(tmp_path):
    for name, text in (("a.pth", "1"), ("b.pth", "1"), ("c.pth", "2")):
        (tmp_path / name).write_text(text)
    a, b, c = (recipe.identity(good("MODEL.WEIGHTS", str(tmp_path / f"{n}.pth"))) for n in "abc")
    assert a == b != c


def test_summary_says_what_will_run():
    checkpoints = ["SOLVER.CHECKPOINT_PERIOD", 10000, "SOLVER.CHECKPOINT_KEEP", 0]
    cfg = good(*SYNCBN, "MODEL.BACKBONE.FREEZE_AT", 2, *checkpoints)
    model = build_meta(cfg)
    assert next(model.parameters()).device == torch.device("meta")
    text = dry_run.summary(cfg, model, {SET: 120000}, 1, paper.find("base-r50-gn-scratch-6x"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for words in (
        "480,000 (epoch 64.00)",
        "540,000 (epoch 72.00), schedule 6x",
        "1 groups of 16",
        f"{trained:,} train",
        "stem (",
        "FrozenBN",
        "SyncBN",
        "120,000 images",
        "bbox/AP 41.3 (paper Table 1",
        TORCHVISION,
        "54 of",
    ):
        assert words in text, words
    other = dry_run.summary(cfg, model, None, 1)
    assert "epoch" not in other and "nothing for this recipe" in other
