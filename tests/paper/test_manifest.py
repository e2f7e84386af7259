import dataclasses
from pathlib import Path

import pytest

from rethink_d2 import model_zoo
from rethink_d2.paper import find, for_config, load
from rethink_d2.paper.__main__ import table
from rethink_d2.solver import schedule

RUNS = load()


def test_ids_and_configs_are_unique_and_follow_the_naming():
    assert len({run.id for run in RUNS}) == len({run.config for run in RUNS}) == len(RUNS)
    # for_config accepts bare names.
    assert len({Path(run.config).name for run in RUNS}) == len(RUNS)
    for run in RUNS:
        assert run.id == f"{run.family}-{run.arm}-{run.schedule}"
        assert run.arm in ("scratch", "pretrained")
        assert run.config.startswith(f"{run.arm}/{run.arm}_")


def test_configs_exist_and_none_is_missing_here():
    root = model_zoo.config_dir()
    on_disk = {
        p.relative_to(root).as_posix() for arm in ("scratch", "pretrained") for p in (root / arm).glob("*")
    }
    assert {run.config for run in RUNS} == on_disk


def test_partner_is_the_same_run_of_the_other_arm():
    for run in RUNS:
        partner = find(run.partner)
        assert partner.partner == run.id
        assert partner.arm != run.arm
        assert (partner.family, partner.schedule) == (run.family, run.schedule)


def test_branches_leave_their_trunk_at_their_first_drop():
    for run in RUNS:
        if run.trunk is None:
            assert run.branch_iteration is None
            continue
        trunk = find(run.trunk)
        assert trunk.trunk is None
        assert (trunk.family, trunk.arm) == (run.family, run.arm)
        assert run.branch_iteration == schedule.parse(run.schedule, 16).steps[0]
        # Only so has the trunk the same rate up to there.
        assert run.branch_iteration <= schedule.parse(trunk.schedule, 16).steps[0]


def test_the_paper_s_curves_are_complete():
    curves = {}
    for run in RUNS:
        curves.setdefault((run.family, run.arm), []).append(run.schedule)
    assert len(curves) == 6
    assert all(schedules == ["2x", "3x", "4x", "5x", "6x"] for schedules in curves.values())


def test_published_numbers_have_a_source():
    for run in RUNS:
        assert (run.published is None) == (run.source == "")
        assert run.published is None or 0 < run.published < 100


@pytest.mark.parametrize(
    ("curve", "published"),
    [
        ("base-r50-gn-scratch", [36.8, 39.5, 40.6, 40.7, 41.3]),
        ("base-r50-gn-pretrained", [40.3, 40.8, 40.9, 40.9, 41.1]),
        ("base-r101-gn-scratch", [38.2, 41.0, 41.8, 42.2, 42.7]),
        ("base-r101-gn-pretrained", [41.8, 42.3, 42.3, 41.9, 42.2]),
        # Only a picture, but for the caption's 6x.
        ("base-r50-syncbn-scratch", [None, None, None, None, 39.3]),
        ("base-r50-syncbn-pretrained", [None, None, None, None, 39.0]),
    ],
)
def test_published_numbers_are_the_paper_s(curve, published):
    assert [find(f"{curve}-{n}x").published for n in range(2, 7)] == published


def test_find_names_the_nearest_id():
    with pytest.raises(KeyError, match="base-r50-gn-scratch-6x"):
        find("base-r50-gn-scrach-6x")


def test_load_gives_a_list_of_its_own():
    load().clear()
    assert load() == RUNS


def test_runs_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RUNS[0].published = 50.0


@pytest.mark.parametrize(
    "path",
    [
        "scratch/scratch_mask_rcnn_R_50_FPN_gn_6x.yaml",
        "configs/scratch/scratch_mask_rcnn_R_50_FPN_gn_6x.yaml",
        Path("/somewhere/configs/scratch/scratch_mask_rcnn_R_50_FPN_gn_6x.yaml"),
        "scratch_mask_rcnn_R_50_FPN_gn_6x.yaml",
        "scratch_mask_rcnn_R_50_FPN_gn_6x",
    ],
)
def test_for_config(path):
    assert for_config(path).id == "base-r50-gn-scratch-6x"


@pytest.mark.parametrize(
    "path",
    [
        "configs/mini/scratch_mask_rcnn_R_18_FPN_gn.yaml",
        "configs/Base-Mask-RCNN-FPN.yaml",
        "mine/scratch_mask_rcnn_R_50_FPN_gn_6x.yaml",
        "",
    ],
)
def test_for_config_of_another_config(path):
    assert for_config(path) is None


def test_the_readme_shows_the_manifests_table():
    readme = Path(__file__).parents[2] / "README.md"
    assert table() in readme.read_text()
