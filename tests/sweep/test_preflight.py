import json

import pytest
from standin import node

from rethink_d2 import model_zoo, recipe
from rethink_d2.sweep import preflight as module
from rethink_d2.sweep.plan import resolved
from rethink_d2.sweep.preflight import preflight

MINI = model_zoo.get_config_file("mini/scratch_mask_rcnn_R_18_FPN_gn.yaml")


def mini(id, *options, **kwargs):
    return node(id, config_file=MINI, options=options, **kwargs)


def test_nothing_is_wrong_with_a_sweep_on_built_in_data(tmp_path):
    assert preflight(str(tmp_path / "out"), [mini("a/seed1"), mini("b/seed1")]) == []
    assert not (tmp_path / "out").exists()


def test_all_problems_at_once_and_each_once(tmp_path):
    nodes = [
        *(mini(f"{i}/seed1", "DATASETS.TRAIN", "('nosuch',)") for i in range(4)),
        mini("b/seed1", "SOLVER.NOSUCH", "1"),
        mini("c/seed1", "SEED", "-1", disk_gb=1e9),
    ]
    problems = preflight(str(tmp_path), nodes, num_gpus=2)
    expected = ("nosuch is not registered", "SOLVER.NOSUCH", "SEED", "GB", "--num-gpus 2")
    assert len(problems) == len(expected)
    for problem, text in zip(problems, expected, strict=True):
        assert text in problem
    assert "(needed by 0/seed1, 1/seed1 and 2 more)" in problems[0]
    assert preflight(str(tmp_path), [mini("a/seed1", "MODEL.DEVICE", "cpu")], num_gpus=2) == []


def test_weights_may_be_missing_only_where_a_run_makes_them(tmp_path):
    maker, out = mini("maker/seed1", kind="pretrain"), str(tmp_path)
    weights = [str(tmp_path / id / "model_final.pth") for id in ("maker/seed1", "other/seed1")]
    for path, count in zip(weights, (0, 1), strict=True):
        user = mini(
            "user/seed1", "MODEL.WEIGHTS", path, "MODEL.BACKBONE.FREEZE_AT", "2", parents=["maker/seed1"]
        )
        problems = [p for p in preflight(out, [maker, user]) if "MODEL.WEIGHTS" in p]
        assert len(problems) == count


def test_an_evaluation_needs_no_training_data(tmp_path):
    options = ("DATASETS.TRAIN", "('nosuch',)")
    assert preflight(str(tmp_path), [mini("a/seed1", *options, kind="evaluate")]) == []
    assert preflight(str(tmp_path), [mini("a/seed1", *options)]) != []


@pytest.mark.parametrize("state", ["done", "preempted"])
def test_a_folder_of_another_recipe_is_refused_with_the_keys(tmp_path, state):
    before = mini("a/seed1")
    folder = tmp_path / "a/seed1"
    folder.mkdir(parents=True)
    cfg = resolved(before, 1)
    (folder / "config.yaml").write_text(cfg.dump())
    (folder / "run.json").write_text(json.dumps({"identity": recipe.identity(cfg), "state": state}))
    same = mini("a/seed1", identity=recipe.identity(cfg))
    assert preflight(str(tmp_path), [same]) == []
    other = mini("a/seed1", "SOLVER.GAMMA", "0.3")
    [problem] = preflight(str(tmp_path), [other])
    assert str(folder) in problem and "SOLVER.GAMMA: 0.1, now 0.3" in problem and "--out" in problem
    (folder / "run.json").write_text(json.dumps({"identity": "of other annotations", "state": state}))
    [problem] = preflight(str(tmp_path), [same])
    assert "the content of its data or weights" in problem


def test_finished_runs_need_nothing(tmp_path):
    made = mini("a/seed1", "DATASETS.TRAIN", "('nosuch',)", disk_gb=1e9)
    (tmp_path / "a/seed1").mkdir(parents=True)
    (tmp_path / "a/seed1/run.json").write_text(json.dumps({"identity": "a/seed1", "state": "done"}))
    assert preflight(str(tmp_path), [made]) == []


def test_slurm_that_is_not_there_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    [problem] = preflight(str(tmp_path), [mini("a/seed1")], slurm={})
    assert "no sbatch" in problem
