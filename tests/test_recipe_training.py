"""Rules about training itself, and the two ways to spread a batch over processes."""

import pytest

from rethink_d2 import dry_run, model_zoo, recipe
from rethink_d2.modeling.inspection import build_meta

MINI = model_zoo.get_config_file("mini/Base-Mask-RCNN-FPN-mini.yaml")


def problems(*options, world_size=1):
    cfg = recipe.resolve(recipe.load(MINI, options), world_size)
    return {p.key: p for p in recipe.check(cfg, world_size)}


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("DATALOADER.ON_BAD_IMAGE", "skipp", ["did you mean skip?"]),
        ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", ["its own order", "'TrainingSampler'"]),
        ("SOLVER.ACCELERATE.SGD", "Fused", ["did you mean fused?"]),
        ("SOLVER.AMP.DTYPE", "fp16", ["float16", "bfloat16"]),
        ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full", ["full_model"]),
    ],
)
def test_an_unknown_choice_is_refused(key, value, words):
    found = problems(key, value)
    assert found[key].level == "error"
    assert all(word in str(found[key]) for word in [key, repr(value), *words]), str(found[key])


@pytest.mark.parametrize(
    "key, value",
    [
        ("DATALOADER.ON_BAD_IMAGE", "skip"),
        ("SOLVER.ACCELERATE.SGD", "foreach"),
        ("SOLVER.AMP.DTYPE", ""),
        ("SOLVER.AMP.DTYPE", "float16"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model"),
    ],
)
def test_a_known_choice_passes(key, value):
    assert key not in problems(key, value)


def test_poolers_that_cannot_be_replaced_are_said_before_the_run():
    key, ratio = "SOLVER.ACCELERATE.ROI_ALIGN", "MODEL.{}.POOLER_SAMPLING_RATIO"
    assert key not in problems(key, True)
    none = [ratio.format("ROI_BOX_HEAD"), 0, ratio.format("ROI_MASK_HEAD"), 0]
    found = problems(key, True, *none)[key]
    assert found.level == "error" and ratio.format("ROI_BOX_HEAD") in str(found)
    assert key not in problems(*none)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_that_divide_the_groups_pass(processes):
    assert "SOLVER.IMS_PER_BATCH" not in problems("SOLVER.IMS_PER_GROUP", 2, world_size=processes)


@pytest.mark.parametrize("processes", [3, 5, 8])
def test_processes_that_do_not_divide_the_groups_are_refused(processes):
    found = problems("SOLVER.IMS_PER_GROUP", 2, world_size=processes)["SOLVER.IMS_PER_BATCH"]
    assert found.level == "error"
    for words in (
        "SOLVER.IMS_PER_GROUP",
        "groups of 2",
        f"on {processes} processes",
        f"multiple of {2 * processes}",
    ):
        assert words in str(found), words


def summary(*options, world_size):
    cfg = recipe.resolve(recipe.load(MINI, options), world_size)
    text = dry_run.summary(cfg, build_meta(cfg), None, world_size)
    return {line.split("  ")[0]: line for line in text.splitlines()}


def test_the_dry_run_says_whether_the_batch_is_kept_or_scaled():
    options = ["SOLVER.IMS_PER_GROUP", 2, "SOLVER.BASE_LR", 0.01, "SOLVER.SCHEDULE", "300"]
    kept = summary(*options, world_size=2)
    assert kept["linear scaling"].endswith("off")
    assert "8 images: 4 groups of 2, 2 per process" in kept["batch"]
    assert " 0.01," in kept["rate"] and " 300," in kept["length"]
    scaled = summary(*options, "SOLVER.REFERENCE_WORLD_SIZE", 4, world_size=2)
    assert "SOLVER.REFERENCE_WORLD_SIZE" in scaled["linear scaling"]
    assert "4 images: 2 groups of 2, 1 per process" in scaled["batch"]
    assert " 0.005," in scaled["rate"] and " 600," in scaled["length"]
