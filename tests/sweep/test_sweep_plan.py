"""The plan of a sweep: what it shares, what it selects, and that a training accepts its commands."""

import fnmatch
import json
import os
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rethink_d2 import paper, recipe, train
from rethink_d2.engine.checkpoint import CheckpointStore
from rethink_d2.engine.start import find_start
from rethink_d2.sweep import costs
from rethink_d2.sweep.plan import KINDS, command, identity, plan, totals

RUNS = [run for run in paper.load() if run.config]


@pytest.fixture(scope="module")
def whole():
    return plan("OUT")


@pytest.fixture(scope="module")
def mini():
    return plan("OUT", mini=True)


def by_id(nodes):
    return {node.id.removesuffix("/seed1"): node for node in nodes}


def config(node):
    return recipe.resolve(recipe.load(node.config_file, node.options), 1)


def spans(nodes):
    return {id: (node.kind, node.start, node.start + node.iterations) for id, node in by_id(nodes).items()}


def ran(node, **record):
    """Leave what a run leaves that has ended."""
    made = {"state": "done", "identity": node.identity, "parent": None, "seconds": 1.0, "world_size": 1}
    os.makedirs(node.folder)
    with open(os.path.join(node.folder, "run.json"), "w") as f:
        json.dump({**made, "threads": 2, "hardware": "8 x V100", **record}, f)


def test_2x_to_6x_of_one_curve_take_780k_iterations_instead_of_1800k():
    nodes = plan("OUT", only=["base-r50-gn-scratch-*"])
    total = totals(nodes)["detection"]
    assert (total.iterations, total.naive) == (780_000, 1_800_000)
    assert spans(nodes) == {
        "base-r50-gn-scratch-6x": ("train", 0, 540_000),
        "base-r50-gn-scratch-2x": ("branch", 120_000, 180_000),
        "base-r50-gn-scratch-3x": ("branch", 210_000, 270_000),
        "base-r50-gn-scratch-4x": ("branch", 300_000, 360_000),
        "base-r50-gn-scratch-5x": ("branch", 390_000, 450_000),
    }


def test_the_whole_paper_takes_two_thirds_of_the_naive_iterations_at_most(whole):
    total = totals(whole)
    detection = total["detection"]
    assert detection.naive == sum(
        config(node).SOLVER.MAX_ITER for node in whole if node.kind in ("train", "branch", "cascade")
    )
    assert detection.iterations / detection.naive <= 0.66
    assert (detection.iterations, detection.naive) == (16_906_000, 28_277_000)
    assert total["pre-training"].iterations == 2 * 500_456
    assert (total["evaluation"].runs, total["evaluation"].iterations) == (6, 0)
    assert list(total) == ["detection", "pre-training", "evaluation"]


@pytest.mark.parametrize("name", ["whole", "mini"])
def test_the_whole_paper_is_planned_and_parents_come_first(name, request):
    nodes = request.getfixturevalue(name)
    seen = set()
    for node in nodes:
        assert set(node.parents) <= seen
        assert node.id not in seen
        seen.add(node.id)
    asked = {run.id for run in RUNS if not run.optional}
    assert {node.run.id for node in nodes if node.selected} == asked
    needed = {parent for node in nodes for parent in node.parents}
    assert {node.id for node in nodes if not node.selected} <= needed
    assert [KINDS.index(node.kind) for node in nodes] == sorted(KINDS.index(node.kind) for node in nodes)


def test_parents(whole):
    nodes = by_id(whole)
    parents = {id: node.parents for id, node in nodes.items()}
    assert parents["base-r50-gn-pretrained-6x"] == ()  # public weights
    assert parents["x152-aug-pretrained-6x"] == ("imagenet-x152-gn-pretrained-100ep/seed1",)
    assert parents["tta-r50-scratch-9x"] == ("cascade-r50-scratch-9x/seed1",)
    assert parents["cascade-r50-scratch-9x"] == ("aug-r50-scratch-9x/seed1",)
    cascade = nodes["cascade-r50-scratch-9x"]
    assert (cascade.kind, cascade.start, cascade.iterations) == ("cascade", 540_000, 270_000)
    assert cascade.branch_from == "aug-r50-scratch-9x/seed1"
    assert nodes["tta-r50-scratch-9x"].branch_from is None
    assert config(nodes["tta-r50-scratch-9x"]).MODEL.WEIGHTS == (
        "OUT/cascade-r50-scratch-9x/seed1/model_final.pth"
    )


def test_in_miniature_every_pretrained_arm_has_its_pretraining_once(mini):
    nodes = by_id(mini)
    assert sorted(id for id, node in nodes.items() if node.kind == "pretrain") == [
        "imagenet-r101-gn-pretrained-100ep",
        "imagenet-r50-gn-pretrained-100ep",
        "imagenet-r50-syncbn-pretrained-100ep",
        "imagenet-vgg16-pretrained-100ep",
        "imagenet-x152-gn-pretrained-100ep",
    ]
    for node in mini:
        if node.run.arm == "pretrained" and node.kind in ("train", "branch"):
            maker = node.parents[-1]
            assert maker.startswith("imagenet-")
            assert config(node).MODEL.WEIGHTS == f"OUT/{maker}/model_final.pth"
    branch = nodes["base-r50-syncbn-pretrained-2x"]
    assert branch.parents == (
        "base-r50-syncbn-pretrained-6x/seed1",
        "imagenet-r50-syncbn-pretrained-100ep/seed1",
    )


@pytest.mark.parametrize("name", ["whole", "mini"])
def test_branches_start_where_the_trunk_keeps_a_checkpoint_and_both_are_still_the_same(name, request):
    nodes = {node.id: node for node in request.getfixturevalue(name)}
    branches = [node for node in nodes.values() if node.branch_from]
    assert len(branches) == 45
    for node in branches:
        trunk = nodes[node.branch_from]
        assert trunk.start == 0
        there, own = config(trunk), config(node)
        assert node.start in there.SOLVER.BRANCH_POINTS
        assert 0 < node.start <= recipe.shared_iterations(recipe.settings(there), recipe.settings(own))
        assert node.start + node.iterations == own.SOLVER.MAX_ITER


def test_a_trunk_keeps_the_checkpoints_for_what_a_later_sweep_may_ask_for():
    (node,) = plan("OUT", only=["base-r50-gn-scratch-6x"])
    assert config(node).SOLVER.BRANCH_POINTS == (120_000, 210_000, 300_000, 390_000)
    (node,) = plan("OUT", only=["aug-r50-scratch-9x"])
    assert config(node).SOLVER.BRANCH_POINTS == (540_000,)


@pytest.mark.parametrize(
    ("schedules", "expected"),
    [
        (["2x", "6x"], {"2x": ("branch", 120_000, 180_000), "6x": ("train", 0, 540_000)}),
        (["2x", "3x"], {"2x": ("branch", 120_000, 180_000), "3x": ("train", 0, 270_000)}),
        (["2x"], {"2x": ("train", 0, 180_000)}),
    ],
)
def test_the_longest_schedule_that_is_asked_for_is_the_trunk(schedules, expected):
    nodes = plan("OUT", only=["base-r50-gn-scratch-*"], schedules=schedules)
    assert spans(nodes) == {f"base-r50-gn-scratch-{x}": span for x, span in expected.items()}


def test_what_is_needed_comes_along_and_is_marked():
    nodes = plan("OUT", only=["x152-tta-*"])
    assert {node.run.id: node.selected for node in nodes} == {
        "imagenet-x152-gn-pretrained-100ep": False,
        "x152-aug-scratch-9x": False,
        "x152-cascade-pretrained-6x": False,
        "x152-cascade-scratch-9x": False,
        "x152-tta-scratch-9x": True,
        "x152-tta-pretrained-6x": True,
    }


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    ids=st.lists(st.sampled_from([run.id for run in RUNS if run.kind != "search"]), min_size=1, max_size=4),
    mini=st.booleans(),
    seeds=st.integers(1, 2),
)
def test_every_selection_is_complete_and_has_nothing_more(ids, mini, seeds):
    nodes = {node.id: node for node in plan("OUT", only=ids, mini=mini, seeds=seeds)}
    assert {node.id for node in nodes.values() if node.selected} == {
        f"{id}/seed{seed}" for id in ids for seed in range(1, seeds + 1)
    }
    needed = {parent for node in nodes.values() for parent in node.parents}
    assert needed <= nodes.keys()
    assert {id for id, node in nodes.items() if not node.selected} <= needed
    for node in nodes.values():
        assert {nodes[parent].seed for parent in node.parents} <= {node.seed}
        assert config(node).SEED == node.seed
        assert node.folder == f"OUT/{node.id}"
    trunks = {}
    for node in nodes.values():
        if node.run.kind == "train" and node.kind == "train":
            trunks.setdefault((node.run.family, node.run.arm, node.seed), []).append(node)
    assert all(len(curve) == 1 for curve in trunks.values())


@pytest.mark.parametrize(
    ("options", "patterns"),
    [
        ({"figures": ["1"]}, ["base-r50-gn-*"]),
        ({"figures": [6]}, ["keypoint-*"]),
        (
            {"figures": ["Table 3"], "arm": "scratch", "schedules": ["9x"], "only": ["*-aug-*"]},
            ["x152-aug-scr*"],
        ),
        ({"only": ["voc-*", "vgg16-*"], "arm": "scratch"}, ["voc-scratch-*", "vgg16-scratch-*"]),
        ({"optional": True, "only": ["voc-*"]}, ["voc-*"]),
        ({"only": ["voc-15k-scratch-144k"]}, ["voc-15k-scratch-144k"]),
    ],
)
def test_filters(options, patterns):
    expected = {run.id for run in RUNS for pattern in patterns if fnmatch.fnmatchcase(run.id, pattern)}
    assert {node.run.id for node in plan("OUT", **options) if node.selected} == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": ["base-r60-*"]}, "--only base-r60-\\*: no run"),
        ({"figures": ["2"]}, "--figure Fig 2: no run"),
        ({"arm": "both"}, "--arm both"),
        ({"schedules": ["7x"]}, "--schedules 7x"),
        ({"only": ["voc-*"], "schedules": ["6x"]}, "no run fits all of these options: --only, --schedules"),
        ({"only": ["voc-15k-*"]}, "without optional runs \\(--optional\\)"),
        ({"seeds": 0}, "--seeds 0"),
        ({"options": ["SEED", "3"]}, "SEED: the sweep sets it"),
        ({"only": ["voc-*"], "options": ["SOLVER.RATE", "3"]}, "SOLVER.RATE is not a config key"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        plan("OUT", **options)


def test_identity_is_what_the_training_records_and_survives_a_move(tmp_path):
    out, moved = tmp_path / "a", tmp_path / "b"
    selection = {"only": ["base-r50-gn-*-2x"], "mini": True}
    before = by_id(plan(out, **selection))
    for node in before.values():
        argv = command(node)[3:]
        assert node.identity == identity(node)
        assert node.identity == recipe.identity(train.prepare(train.argument_parser().parse_args(argv)))
    scratch, pretrained = "base-r50-gn-scratch-2x", "base-r50-gn-pretrained-2x"
    assert before[scratch].identity == by_id(plan(moved, **selection))[scratch].identity
    assert before[scratch].identity != by_id(plan(out, **selection, seeds=2))[f"{scratch}/seed2"].identity

    maker = out / before[pretrained].parents[-1]
    maker.mkdir(parents=True)
    (maker / "model_final.pth").write_bytes(b"weights")
    trained = identity(before[pretrained])
    assert trained != before[pretrained].identity
    shutil.move(out, moved)
    assert by_id(plan(moved, **selection))[pretrained].identity == trained


def test_a_run_is_the_same_whether_it_branches_or_not(whole):
    (alone,) = plan("OUT", only=["base-r50-gn-scratch-2x"])
    assert alone.kind != by_id(whole)["base-r50-gn-scratch-2x"].kind
    assert alone.identity == by_id(whole)["base-r50-gn-scratch-2x"].identity


def test_commands():
    nodes = by_id(plan("OUT", only=["tta-r50-scratch-9x"]))
    parse = train.argument_parser().parse_args
    run = parse(command(nodes["cascade-r50-scratch-9x"], num_gpus=4)[3:])
    assert (run.num_gpus, run.resume, run.eval_only, run.dist_url) == (4, True, False, "auto")
    assert run.branch_from == "OUT/aug-r50-scratch-9x/seed1"
    assert run.opts[run.opts.index("OUTPUT_DIR") + 1] == "OUT/cascade-r50-scratch-9x/seed1"
    evaluation = parse(command(nodes["tta-r50-scratch-9x"])[3:])
    assert (evaluation.resume, evaluation.eval_only, evaluation.branch_from) == (False, True, None)
    assert parse(command(nodes["aug-r50-scratch-9x"])[3:]).branch_from is None
    assert parse(command(nodes["cascade-r50-scratch-9x"], out="/far")[3:]).branch_from.startswith("/far/")


@pytest.mark.parametrize("id", ["base-r50-gn-scratch-2x", "coco10k-scratch-160k", "cascade-r50-scratch-9x"])
def test_a_training_finds_the_checkpoint_to_branch_off(id, tmp_path):
    family = id.rpartition("-")[0]
    nodes = by_id(plan(tmp_path, only=[f"{family}-*"], mini=True))
    node = nodes[id]
    trunk = nodes[node.branch_from.removesuffix("/seed1")]
    there = config(trunk)
    store = CheckpointStore(trunk.folder, keep=2, keep_always=[b - 1 for b in there.SOLVER.BRANCH_POINTS])
    period = there.SOLVER.CHECKPOINT_PERIOD
    written = {*range(period, trunk.iterations, period), *there.SOLVER.BRANCH_POINTS, trunk.iterations}
    for done in sorted(written):
        store.save(done - 1, {"settings": json.dumps(recipe.settings(there))})
    start = find_start(config(node), resume=True, branch_from=os.path.join(tmp_path, node.branch_from))
    assert start.iteration == node.start - 1
    assert start.kind == ("cascade" if node.kind == "cascade" else "branch")


@pytest.mark.parametrize("kept", [True, False])
def test_a_run_that_was_a_branch_itself_is_no_trunk_for_what_comes_before(tmp_path, kept):
    curve = ["base-r50-gn-scratch-*"]
    first = by_id(plan(tmp_path, only=curve, schedules=["3x", "6x"]))
    longest, middle = first["base-r50-gn-scratch-6x"], first["base-r50-gn-scratch-3x"]
    ran(longest)
    parent = {"folder": f"../../{longest.id}", "iteration": 210_000}
    ran(middle, parent=parent)
    there = config(longest)
    # Of its own it has late checkpoints only.
    for node, iterations in ((longest, (120_000, 210_000, 540_000) if kept else ()), (middle, (270_000,))):
        for done in iterations:
            store = CheckpointStore(node.folder)
            store.save(done - 1, {"settings": json.dumps(recipe.settings(there))})
    again = by_id(plan(tmp_path, only=curve, schedules=["2x", "3x"]))
    assert again["base-r50-gn-scratch-3x"].identity == middle.identity
    node = again["base-r50-gn-scratch-2x"]
    assert node.parents == ()
    if kept:
        assert (node.kind, node.branch_from, node.start) == ("branch", longest.id, 120_000)
        found = find_start(config(node), resume=True, branch_from=str(tmp_path / node.branch_from))
        assert found.iteration == 120_000 - 1
    else:
        assert (node.kind, node.branch_from, node.start) == ("train", None, 0)
        assert node.iterations == 180_000


def test_a_search_is_planned_on_request_and_counts_all_trials():
    (node,) = plan("OUT", only=["search-coco1k-pretrained"])
    assert (node.kind, node.iterations) == ("search", 18 * 15_000)
    assert totals([node])["search"].iterations == 18 * 15_000
    argv = command(node, num_gpus=2)
    assert argv[2:5] == ["rethink_d2.search", "--num-gpus", "2"]
    assert argv[argv.index("--output") + 1] == "OUT/search-coco1k-pretrained/seed1"
    assert "OUTPUT_DIR" not in argv


def test_the_mini_paper_fits_into_75_minutes_on_two_cores(mini):
    assert sum(node.gpu_hours for node in mini) / 2 <= 75 / 60


@pytest.mark.parametrize("scale", ["paper", "mini"])
def test_every_run_has_a_cost_with_a_source(scale, whole):
    for node in whole:
        cost = costs.find(node.run, scale == "mini")
        assert cost.scale == scale
        assert cost.seconds + cost.fixed > 0
        assert cost.basis in ("measured", "estimate") and cost.source
    assert all(costs.find(run) for run in RUNS)


def test_gpu_hours_are_the_table_s(whole):
    node = by_id(whole)["aug-r50-scratch-9x"]
    assert node.gpu_hours == pytest.approx(810_000 * 0.338 * 8 / 3600)


def test_finished_runs_replace_the_table(tmp_path):
    selection = {"only": ["voc-*"]}
    nodes = by_id(plan(tmp_path, **selection))
    assert costs.measure(nodes.values()) == {}
    for id, state in (("voc-scratch-144k", "done"), ("voc-pretrained-18k", "running")):
        ran(nodes[id], state=state, seconds=36_000.0, world_size=4)
    measured = costs.measure(nodes.values())
    assert measured == {"voc": pytest.approx(36_000 * 4 / 144_000)}
    again = by_id(plan(tmp_path, **selection, measured=measured))
    assert again["voc-scratch-144k"].gpu_hours == pytest.approx(40)
    assert again["voc-pretrained-18k"].gpu_hours == pytest.approx(5)


def test_costs_on_a_cpu_are_those_of_its_cores(tmp_path):
    (node,) = plan(tmp_path, only=["voc-scratch-*"], mini=True)
    ran(node, seconds=100.0, world_size=2, threads=4, hardware="x86_64 CPU, 8 cores")
    assert costs.measure([node]) == {"voc": pytest.approx(100 * 2 * 4 / node.iterations)}


def test_the_miniature_s_runs_say_nothing_about_the_paper_s(tmp_path):
    (mini,) = plan(tmp_path, only=["voc-scratch-*"], mini=True)
    ran(mini)
    assert costs.measure([mini]) != {}
    assert costs.measure(plan(tmp_path, only=["voc-scratch-*"])) == {}


def test_disk_is_that_of_the_checkpoints_kept():
    nodes = by_id(plan("OUT", only=["base-r50-gn-scratch-*"]))
    trunk, branch = nodes["base-r50-gn-scratch-6x"], nodes["base-r50-gn-scratch-2x"]
    # Two of 45.7 M parameters with their momentum; the trunk has four branch points besides.
    assert branch.disk_gb == pytest.approx(2 * 8 * 0.0457, rel=0.01)
    assert trunk.disk_gb == pytest.approx(6 * 8 * 0.0457, rel=0.01)
