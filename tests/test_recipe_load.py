"""Reading a recipe: its file, the bases of that, and the command line."""

import pytest

from rethink_d2 import recipe


def test_load_merges_file_base_and_options(tmp_path):
    (tmp_path / "base.yaml").write_text('SOLVER:\n  SCHEDULE: "300"\n  BASE_LR: 1\nSEED: 3\n')
    (tmp_path / "a.yaml").write_text("_BASE_: base.yaml\nSEED: 4\n")
    cfg = recipe.load(str(tmp_path / "a.yaml"), ["SOLVER.STEPS", "[5, 6]", "SOLVER.SCHEDULE", ""])
    assert (cfg.SEED, cfg.SOLVER.SCHEDULE, cfg.SOLVER.STEPS) == (4, "", (5, 6))
    assert type(cfg.SOLVER.BASE_LR) is float
    # A number for a text is what the command line gives; the length is a text.
    assert recipe.load(str(tmp_path / "a.yaml"), []).SOLVER.SCHEDULE == "300"
    assert recipe.load("", ["SOLVER.SCHEDULE", "300"]).SOLVER.SCHEDULE == "300"


def test_a_dumped_recipe_reads_back(tmp_path):
    cfg = recipe.resolve(recipe.load("", ["SEED", 1, "SOLVER.SCHEDULE", "300"]), 1)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert recipe.load(str(tmp_path / "config.yaml"), []) == cfg


@pytest.mark.parametrize(
    "opts, words",
    [
        (["SOLVER.BASE_RL", "1"], ["SOLVER.BASE_RL is not a config key; did you mean SOLVER.BASE_LR?"]),
        (["SOLVER.FREEZE_AT", "0"], ["did you mean MODEL.BACKBONE.FREEZE_AT?"]),
        (["SOLVER.MAX_ITER", "many"], ["SOLVER.MAX_ITER", "'many'", "int", "40000"]),
        (["SOLVER.STEPS", "300"], ["SOLVER.STEPS", "tuple", "(300,)"]),
        (["DATASETS.TRAIN", "x"], ["DATASETS.TRAIN", "('x',)"]),
        (["MODEL.MASK_ON", "1"], ["MODEL.MASK_ON", "bool", "False"]),
        (["SOLVER", "1"], ["SOLVER is a group"]),
        (["SEED"], ["pairs"]),
        (
            ["SOLVER.SCHEDULE", "6x", "SOLVER.MAX_ITER", "9"],
            ["SOLVER.MAX_ITER", "override SOLVER.SCHEDULE instead"],
        ),
        (["SOLVER.STEPS", "(1,)", "SOLVER.SCHEDULE", "6x"], ["SOLVER.STEPS", "SOLVER.SCHEDULE ''"]),
    ],
)
def test_wrong_options_are_named(opts, words):
    with pytest.raises(ValueError) as e:
        recipe.load("", opts)
    assert all(word in str(e.value) for word in words), str(e.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("SOLVER:\n  BASE_RL: 1\n", ["SOLVER.BASE_RL", "SOLVER.BASE_LR"]),
        ("SOLVER:\n  BASE_LR: fast\n", ["SOLVER.BASE_LR", "float"]),
        ("MODEL:\n  WEIGHTS:\n", ["MODEL.WEIGHTS", "str"]),
        ("SEED: [\n", ["not a config file"]),
        ("", ["not a config file"]),
        ("just words", ["not a config file"]),
        ("_BASE_: none.yaml\n", ["none.yaml", "_BASE_"]),
    ],
)
def test_wrong_files_are_named(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as e:
        recipe.load(str(path), [])
    assert all(word in str(e.value) for word in [str(path), *words]), str(e.value)
    with pytest.raises(ValueError, match="missing.yaml"):
        recipe.load(str(tmp_path / "missing.yaml"), [])
