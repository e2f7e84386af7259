import json
import os

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


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Programs that answer like those of a Slurm with two partitions."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (
        ("sbatch", ""),
        ("sinfo", "main* 6:00:00\nmain* 6:00:00\nlong 2-00:00:00\nany infinite\n"),
    ):
        (folder / name).write_text(f"#!/bin/sh\nprintf '{text}'\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"time": "6"}, None),
        ({"time": "24"}, "--slurm time=24: jobs may take 6:00:00 in main"),
        ({}, "--slurm time=24: jobs may take 6:00:00 in main"),
        ({"partition": "long"}, None),
        ({"partition": "any", "time": "1000"}, None),
        ({"partition": "main,long", "time": "48"}, None),
        ({"partition": "main,long", "time": "49"}, "6:00:00 in main, 2-00:00:00 in long"),
        ({"partition": "gpu", "time": "49"}, "there is no gpu; this cluster has any, long, main"),
    ],
)
def test_partitions_and_their_time_limits(tmp_path, cluster, options, text):
    problems = preflight(str(tmp_path), [mini("a/seed1")], slurm=options)
    assert len(problems) == bool(text)
    assert not text or text in problems[0]


def test_public_weights_are_fetched_once_before_the_first_run(tmp_path, monkeypatch, capsys):
    fetched = []

    def fetch(name):
        fetched.append(name)
        if "R-101" in name:
            raise OSError("no route to host")

    monkeypatch.setattr(module.PathManager, "get_local_path", fetch)
    near, far = "catalog://ImageNetPretrained/MSRA/R-50-GN", "catalog://ImageNetPretrained/MSRA/R-101-GN"
    nodes = [
        *(mini(f"{i}/seed1", "MODEL.WEIGHTS", near, "MODEL.BACKBONE.FREEZE_AT", "2") for i in range(3)),
        mini("b/seed1", "MODEL.WEIGHTS", far, "MODEL.BACKBONE.FREEZE_AT", "2"),
        mini("c/seed1", "MODEL.WEIGHTS", "https://x/y", branch_from="0/seed1"),
        mini("d/seed1", "MODEL.WEIGHTS", "https://x/z"),
    ]
    (tmp_path / "d/seed1").mkdir(parents=True)
    (tmp_path / "d/seed1/model_0000009.pth").touch()
    problems = [p for p in preflight(str(tmp_path), nodes) if "fetched" in p]
    assert sorted(fetched) == sorted([near, far])
    assert len(problems) == 1 and f"{far} cannot be fetched (OSError: no route to host)" in problems[0]
    assert f"Fetching {near}" in capsys.readouterr().out
