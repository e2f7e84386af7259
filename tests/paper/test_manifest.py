import dataclasses
import json
from pathlib import Path

import pytest

from rethink_d2 import model_zoo, recipe
from rethink_d2.paper import find, for_config, load
from rethink_d2.paper.__main__ import cli, table
from rethink_d2.solver import schedule

RUNS = load()
KINDS = ("train", "cascade", "evaluate", "pretrain", "search", "analysis")
X2_TO_X6 = ["2x", "3x", "4x", "5x", "6x"]
# Schedules by family: of the runs from random weights, of the pre-trained ones.
FAMILIES = {
    "base-r50-gn": (X2_TO_X6, X2_TO_X6),
    "base-r101-gn": (X2_TO_X6, X2_TO_X6),
    "base-r50-syncbn": (X2_TO_X6, X2_TO_X6),
    "aug-r50": (["9x"], ["6x"]),
    "aug-r101": (["9x"], ["6x"]),
    "cascade-r50": (["9x"], ["6x"]),
    "cascade-r101": (["9x"], ["6x"]),
    "tta-r50": (["9x"], ["6x"]),
    "tta-r101": (["9x"], ["6x"]),
    "x152-aug": (["9x"], ["6x"]),
    "x152-cascade": (["9x"], ["6x"]),
    "x152-tta": (["9x"], ["6x"]),
    "keypoint-r50-gn": (["2x", "3x"], ["2x", "3x"]),
    "vgg16": (["11x"], ["9x"]),
    "coco35k-default": ([], X2_TO_X6),
    "coco35k": (X2_TO_X6, X2_TO_X6),
    "coco10k": (["160k", "220k", "280k"], ["40k", "60k", "80k"]),
    "coco3.5k": (["110k"], ["30k"]),
    "coco1k": (["60k"], ["15k"]),
    "coco1k-searched": (["60k"], []),
    "voc": (["144k"], ["18k"]),
    "voc-15k": (["144k"], ["18k"]),
    "imagenet-x152-gn": ([], ["100ep"]),
    "imagenet-vgg16": ([], ["100ep"]),
    "imagenet-r50-gn": ([], ["100ep"]),
    "imagenet-r101-gn": ([], ["100ep"]),
    "search-coco35k": ([], [""]),
    "search-coco10k": ([], [""]),
    "search-coco1k": ([""], [""]),
}


def curve(family, arm):
    return [run for run in RUNS if (run.family, run.arm) == (family, arm)]


def test_ids_and_configs_are_unique_and_follow_the_naming():
    assert len({run.id for run in RUNS}) == len(RUNS)
    configs = [run.config for run in RUNS if run.config and run.kind != "search"]
    # for_config accepts bare names.
    assert len({Path(config).name for config in configs}) == len(configs)
    for run in RUNS:
        assert run.kind in KINDS
        if run.kind == "analysis":
            assert (run.config, run.arm, run.schedule) == ("", "", "")
            continue
        assert run.id == "-".join(filter(None, (run.family, run.arm, run.schedule)))
        assert run.arm in ("scratch", "pretrained")
        folder = "imagenet/imagenet_" if run.kind == "pretrain" else f"{run.arm}/{run.arm}_"
        assert run.config.startswith(folder)
        if run.kind != "search":
            assert run.config.endswith(f"_{run.schedule}.yaml")


def test_configs_exist_and_none_is_missing_here():
    root = model_zoo.config_dir()
    on_disk = {
        p.relative_to(root).as_posix()
        for folder in ("scratch", "pretrained", "imagenet")
        for p in (root / folder).glob("*.yaml")
        if not p.name.startswith("Base-")
    }
    assert {run.config for run in RUNS if run.config} == on_disk


def test_the_paper_s_families_are_complete():
    assert [run.id for run in RUNS if run.kind == "analysis"] == [
        "localization-r50",
        "localization-r101",
        "samples",
    ]
    families = dict.fromkeys(run.family for run in RUNS if run.kind != "analysis")
    assert {
        family: tuple([run.schedule for run in curve(family, arm)] for arm in ("scratch", "pretrained"))
        for family in families
    } == FAMILIES


def test_partner_is_the_run_of_the_other_arm_in_the_same_place():
    for family, schedules in FAMILIES.items():
        scratch, pretrained = curve(family, "scratch"), curve(family, "pretrained")
        if family.startswith("search-") or not all(schedules):
            assert {run.partner for run in scratch + pretrained} == {None}
        else:
            assert [run.partner for run in scratch] == [run.id for run in pretrained]
            assert [run.partner for run in pretrained] == [run.id for run in scratch]


def test_a_curve_s_longest_run_is_the_trunk_of_the_others():
    for family in FAMILIES:
        for arm in ("scratch", "pretrained"):
            runs = [run for run in curve(family, arm) if run.kind == "train"]
            if runs:
                longest = max(runs, key=lambda run: schedule.parse(run.schedule, 16).max_iter)
                assert {run.trunk for run in runs if run != longest} <= {longest.id}
                assert (longest.trunk, longest.branch_iteration) == (None, None)


def test_branches_leave_their_trunk_at_their_first_drop():
    branches = [run for run in RUNS if run.kind == "train" and run.trunk]
    assert len(branches) == 42
    for run in branches:
        trunk = find(run.trunk)
        period = recipe.load(model_zoo.get_config_file(trunk.config), []).SOLVER.CHECKPOINT_PERIOD
        drop = schedule.parse(run.schedule, 16).steps[0]
        # The trunk has a checkpoint there, and had the same rate up to there.
        assert run.branch_iteration == drop // period * period
        assert drop < schedule.parse(trunk.schedule, 16).steps[0]
        # Only lengths shorter than 2x have drops that no sensible period divides.
        assert run.branch_iteration == drop or run.id in ("coco10k-scratch-160k", "coco10k-pretrained-40k")
        assert drop - run.branch_iteration < 0.03 * drop


def test_a_cascade_continues_the_run_without_one_until_its_last_270k_iterations():
    cascades = [run for run in RUNS if run.kind == "cascade"]
    assert [run.id for run in cascades] == [
        "cascade-r50-scratch-9x",
        "cascade-r101-scratch-9x",
        "x152-cascade-scratch-9x",
    ]
    for run in cascades:
        trunk = find(run.trunk)
        assert trunk.family == run.family.replace("cascade", "aug")
        assert (trunk.arm, trunk.schedule) == (run.arm, run.schedule)
        length = schedule.parse(run.schedule, 16)
        assert length.max_iter - run.branch_iteration == 270_000
        assert run.branch_iteration <= length.steps[0]


def test_an_evaluation_is_of_the_cascade_of_its_arm():
    evaluations = [run for run in RUNS if run.kind == "evaluate"]
    assert len(evaluations) == 6
    for run in evaluations:
        trunk = find(run.trunk)
        assert trunk.family == run.family.replace("tta", "cascade")
        assert (trunk.arm, trunk.schedule, run.branch_iteration) == (run.arm, run.schedule, None)


def test_other_kinds_have_no_trunk():
    others = [run for run in RUNS if run.kind in ("pretrain", "search", "analysis")]
    assert {(run.trunk, run.branch_iteration) for run in others} == {(None, None)}


def test_optional_is_what_the_paper_s_comparisons_can_do_without():
    optional = {run.family for run in RUNS if run.optional}
    searches = {run.family for run in RUNS if run.kind == "search"}
    assert optional == searches | {"voc-15k", "imagenet-r50-gn", "imagenet-r101-gn"}


def test_published_numbers_have_a_source():
    for run in RUNS:
        assert (run.published is None) == (run.source == "")
        assert run.published is not None or not run.also_published
        assert run.metric not in run.also_published
        for number in (run.published, *run.also_published.values()):
            assert number is None or 0 < number < 100


@pytest.mark.parametrize(
    ("family", "metric", "scratch", "pretrained"),
    [
        ("base-r50-gn", "bbox/AP", [36.8, 39.5, 40.6, 40.7, 41.3], [40.3, 40.8, 40.9, 40.9, 41.1]),
        ("base-r101-gn", "bbox/AP", [38.2, 41.0, 41.8, 42.2, 42.7], [41.8, 42.3, 42.3, 41.9, 42.2]),
        # None: only a picture. What is not named here has nothing but pictures.
        ("base-r50-syncbn", "bbox/AP", [None, None, None, None, 39.3], [None, None, None, None, 39.0]),
        ("aug-r101", "bbox/AP", [45.0], [None]),
        ("cascade-r101", "bbox/AP", [47.4], [None]),
        ("tta-r50", "segm_TTA/AP", [41.6], [40.9]),
        ("tta-r101", "segm_TTA/AP", [42.5], [41.9]),
        ("x152-aug", "bbox/AP", [46.4], [None]),
        ("x152-cascade", "bbox/AP", [48.6], [None]),
        ("x152-tta", "bbox_TTA/AP", [50.9], [50.3]),
        ("keypoint-r50-gn", "keypoints/AP", [65.6, None], [65.5, None]),
        ("vgg16", "bbox/AP", [35.2], [35.6]),
        ("coco35k", "bbox/AP", [None, None, None, None, 36.3], [None, None, None, None, 36.3]),
        ("coco10k", "bbox/AP", [None, 25.9, None], [None, 26.0, None]),
        ("coco3.5k", "bbox/AP", [9.3], [16.0]),
        ("coco1k", "bbox/AP", [3.5], [9.9]),
        ("coco1k-searched", "bbox/AP", [5.4], []),
        ("voc", "bbox/AP50", [77.6], [82.7]),
        ("voc-15k", "bbox/AP50", [77.6], [82.7]),
    ],
)
def test_published_numbers_are_the_paper_s(family, metric, scratch, pretrained):
    assert [run.published for run in curve(family, "scratch")] == scratch
    assert [run.published for run in curve(family, "pretrained")] == pretrained
    assert {run.metric for run in RUNS if run.family == family} == {metric}


def test_where_the_paper_has_pictures_only_there_is_no_number():
    pictures = {
        run.family for run in RUNS if all(r.published is None for r in RUNS if r.family == run.family)
    }
    assert {family for family in pictures if family not in ("samples", "search-coco1k")} == {
        "aug-r50",
        "cascade-r50",
        "coco35k-default",
        "search-coco35k",
        "search-coco10k",
        "imagenet-x152-gn",
        "imagenet-vgg16",
    }
    assert find("localization-r50").published == 1.0
    assert find("localization-r101").published == 0.8


@pytest.mark.parametrize(
    ("id", "published"),
    [
        # Box AP, AP50, AP75, mask AP, AP50, AP75 of Tables 2 and 3.
        ("base-r50-gn-scratch-6x", [41.3, 61.8, 45.6, 36.6, 59.0, 38.9]),
        ("base-r50-gn-pretrained-6x", [41.1, 61.7, 44.6, 36.4, 58.5, 38.7]),
        ("base-r101-gn-scratch-6x", [42.7, 62.9, 47.0, 37.6, 59.9, 39.7]),
        ("base-r101-gn-pretrained-3x", [42.3, 62.6, 46.2, 37.2, 59.7, 39.7]),
        ("aug-r101-scratch-9x", [45.0, 65.7, 49.3, 39.5, 62.5, 42.1]),
        ("x152-aug-scratch-9x", [46.4, 67.1, 51.1, 40.5, 63.9, 43.4]),
        ("x152-cascade-scratch-9x", [48.6, 66.8, 52.9, 41.4, 64.2, 44.6]),
        ("x152-tta-scratch-9x", [50.9, 68.7, 55.4, 43.2, 66.1, 46.8]),
    ],
)
def test_tables_2_and_3(id, published):
    run = find(id)
    numbers = {run.metric: run.published, **run.also_published}
    suffix = "_TTA" if run.kind == "evaluate" else ""
    names = [f"{task}{suffix}/{ap}" for task in ("bbox", "segm") for ap in ("AP", "AP50", "AP75")]
    assert [numbers[name] for name in names] == published


@pytest.mark.parametrize(
    ("id", "metric", "published"),
    [
        ("x152-tta-scratch-9x", "test-challenge/bbox_TTA/AP", 51.3),
        ("x152-tta-scratch-9x", "test-challenge/segm_TTA/AP", 43.6),
        ("x152-tta-pretrained-6x", "segm_TTA/AP", 42.5),
        ("cascade-r101-scratch-9x", "segm/AP", 40.5),
        # Detectron's own runs of the same configs.
        ("base-r50-gn-scratch-3x", "segm/AP", 35.2),
        ("base-r101-gn-scratch-3x", "segm/AP", 36.4),
        ("base-r50-gn-pretrained-2x", "segm/AP", 35.7),
        ("base-r50-gn-pretrained-3x", "segm/AP", 36.1),
        ("base-r101-gn-pretrained-2x", "segm/AP", 36.8),
    ],
)
def test_other_published_numbers(id, metric, published):
    assert find(id).also_published[metric] == published


def test_the_localization_numbers_follow_from_table_2():
    """They are the differences of box AP75 between the arms' best schedules."""
    for run, scratch, pretrained in (
        ("localization-r50", "base-r50-gn-scratch-6x", "base-r50-gn-pretrained-6x"),
        ("localization-r101", "base-r101-gn-scratch-6x", "base-r101-gn-pretrained-3x"),
    ):
        ap75 = [find(id).also_published["bbox/AP75"] for id in (scratch, pretrained)]
        assert ap75[0] - ap75[1] == pytest.approx(find(run).published)


def test_find_names_the_nearest_id():
    with pytest.raises(KeyError, match="base-r50-gn-scratch-6x"):
        find("base-r50-gn-scrach-6x")


def test_load_gives_a_list_of_its_own():
    load().clear()
    assert load() == RUNS


def test_runs_cannot_be_changed_and_can_be_keys():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RUNS[0].published = 50.0
    assert len(set(RUNS)) == len(RUNS)


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
    ("path", "id"),
    [
        ("scratch_cascade_mask_rcnn_R_50_FPN_gn_aug_tta_9x", "tta-r50-scratch-9x"),
        ("imagenet/imagenet_VGG_16_100ep.yaml", "imagenet-vgg16-pretrained-100ep"),
        # A dot that is no suffix; and the config of a search is that of the run it starts from.
        ("scratch_mask_rcnn_R_50_FPN_gn_3.5k_110k", "coco3.5k-scratch-110k"),
        ("scratch_mask_rcnn_R_50_FPN_gn_1k_60k.yaml", "coco1k-scratch-60k"),
    ],
)
def test_for_config_of_every_kind(path, id):
    assert for_config(path).id == id


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


def test_the_table_has_a_line_for_every_curve_that_is_not_optional():
    lines = table().splitlines()
    curves = {(run.family, run.arm) for run in RUNS if run.config and not run.optional}
    assert len(lines) == 2 + len(curves) <= 45
    assert any("`scratch/scratch_mask_rcnn_R_50_FPN_gn_10k_<schedule>.yaml`" in line for line in lines)
    assert any("220k 25.9" in line for line in lines)


def test_command_line_without_arguments_prints_the_table(capsys):
    assert cli([]) == 0
    assert capsys.readouterr().out.strip() == table()


@pytest.mark.parametrize(
    ("arguments", "ids"),
    [
        (["--family", "tta-r50"], ["tta-r50-scratch-9x", "tta-r50-pretrained-6x"]),
        (["--family", "*-scratch-11x"], ["vgg16-scratch-11x"]),
        (
            ["list", "--figure", "Fig 5", "--kind", "cascade"],
            ["cascade-r50-scratch-9x", "cascade-r101-scratch-9x"],
        ),
        (["--figure", "Table 3", "--arm", "pretrained"], None),
        (["--kind", "search", "--arm", "scratch"], ["search-coco1k-scratch"]),
    ],
)
def test_filters(capsys, arguments, ids):
    code = cli([*arguments, "--json"])
    out, err = capsys.readouterr()
    if ids is None:
        assert (code, out) == (2, "")
        assert "no run fits" in err
    else:
        assert code == 0
        assert [run["id"] for run in json.loads(out)] == ids


def test_json_holds_every_row_as_it_is(capsys):
    cli(["--json"])
    assert json.loads(capsys.readouterr().out) == [dataclasses.asdict(run) for run in RUNS]


def test_a_filtered_table_shows_optional_runs_and_analyses(capsys):
    cli(["--family", "voc-15k"])
    assert "bbox/AP50: 144k 77.6" in capsys.readouterr().out
    cli(["--kind", "analysis"])
    assert "bbox/AP75: 1.0, 0.8" in capsys.readouterr().out
