import dataclasses
import json

import pytest
from detectron2.config import CfgNode
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from rethink_d2 import recipe
from rethink_d2.paper import __main__ as main
from rethink_d2.paper import find, load, settings
from rethink_d2.paper.check import (
    RULES,
    SETTINGS,
    UNUSED_BY_CLASSIFIERS,
    check,
    examine,
    resolved,
)

RUNS = [run for run in load() if run.config]
BASE = "base-r50-gn-scratch-6x"
# A run that no other one is compared with, so that a change of it breaks nothing but its own lines.
ALONE = "coco1k-searched-scratch-60k"
# Rules that look at one config alone, without building its network.
OF_ONE_CONFIG = [
    line for line in RULES if line.name in ("schedule", "pretraining_length", "evaluation", "traced")
]


def changed(changes):
    """The resolved configs, with other values: by run id, by dotted key."""

    def load_changed(run):
        cfg = resolved(run)
        if run.id in changes:
            cfg = cfg.clone()
            cfg.defrost()
            for key, value in changes[run.id].items():
                node = cfg
                *path, last = key.split(".")
                for part in path:
                    node = node[part]
                assert last in node
                node[last] = value
        return cfg

    return load_changed


def another(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, (list, tuple)):
        return [*value, *value] or [1]
    return 0.5 if value is None else value + ("?" if isinstance(value, str) else 1)


def first(line):
    return next(run for run in RUNS if line.applies(run))


@pytest.fixture(scope="module")
def results():
    return examine()


def test_the_configs_are_the_papers(results):
    assert [str(violation) for _, _, found in results for violation in found] == []


def test_every_line_is_about_some_run_and_every_run_has_lines(results):
    assert [line.name for line, runs, _ in results if not runs] == []
    assert {run.id for _, runs, _ in results for run in runs} == {run.id for run in RUNS}
    assert len({line.name for line, _, _ in results}) == len(results)


@pytest.mark.parametrize("line", SETTINGS, ids=lambda line: line.name)
def test_a_changed_key_breaks_its_setting_and_no_other(line):
    run, (key,) = first(line), line.covers
    load_changed = changed({run.id: {key: another(recipe.flatten(resolved(run))[key])}})
    (violation,) = check([run], load_changed, SETTINGS)
    assert (violation.line, violation.run) == (line.name, run.id)
    assert violation.message.startswith(f"{key} is ")


BOTH = ("base-r50-syncbn-scratch-6x", "base-r50-syncbn-pretrained-6x")
CASCADES = ("cascade-r50-scratch-9x", "cascade-r50-pretrained-6x")
TTA = ("tta-r50-scratch-9x", "tta-r50-pretrained-6x")
# Rule, run that breaks it, runs that are changed, key, value.
BREAKS = [
    ("schedule", BASE, [BASE], "SOLVER.STEPS", (470000, 520000)),
    ("schedule", BASE, [BASE], "SOLVER.MAX_ITER", 540001),
    ("schedule", BASE, [BASE], "SOLVER.SCHEDULE", "5x"),
    ("schedule", "voc-pretrained-18k", ["voc-pretrained-18k"], "SOLVER.STEPS", (12001, 16000)),
    ("pretraining_length", "imagenet-vgg16-pretrained-100ep", None, "SOLVER.MAX_ITER", 500400),
    ("pretraining_length", "imagenet-vgg16-pretrained-100ep", None, "SOLVER.STEPS", (1, 2, 3)),
    ("batch", ALONE, [ALONE], "SOLVER.IMS_PER_GROUP", 4),
    ("pair", BASE, [BASE], "SOLVER.BASE_LR", 0.01),
    ("pair", "base-r50-gn-pretrained-6x", [BASE], "SOLVER.BASE_LR", 0.01),
    ("scratch", BASE, [BASE], "MODEL.WEIGHTS", "detectron2://ImageNetPretrained/torchvision/R-50.pkl"),
    ("scratch", BASE, [BASE], "MODEL.BACKBONE.FREEZE_AT", 1),
    ("scratch", "imagenet-r50-gn-pretrained-100ep", None, "MODEL.BACKBONE.FREEZE_AT", 2),
    ("frozen", "base-r50-gn-pretrained-6x", None, "MODEL.BACKBONE.FREEZE_AT", 1),
    ("frozen", "vgg16-pretrained-9x", None, "MODEL.BACKBONE.FREEZE_AT", 3),
    ("norm_layers", ALONE, [ALONE], "MODEL.FPN.NORM", ""),
    ("norm_layers", ALONE, [ALONE], "MODEL.ROI_BOX_HEAD.NORM", "SyncBN"),
    (
        "weights",
        "base-r50-gn-pretrained-6x",
        None,
        "MODEL.WEIGHTS",
        "catalog://ImageNetPretrained/MSRA/R-50",
    ),
    ("weights", "base-r50-gn-pretrained-6x", None, "MODEL.WEIGHTS", "somewhere.pth"),
    ("weights", "vgg16-pretrained-9x", ["imagenet-vgg16-pretrained-100ep"], "MODEL.INIT.POLICY", "msra"),
    ("pixels", BOTH[0], BOTH, "INPUT.FORMAT", "BGR"),
    ("pixels", BOTH[1], BOTH, "MODEL.PIXEL_STD", [1.0, 1.0, 1.0]),
    ("pixels", BOTH[1], BOTH, "MODEL.PIXEL_MEAN", [102.9801, 115.9465, 122.7717]),
    ("trunk", "coco35k-default-pretrained-2x", None, "SOLVER.GAMMA", 0.2),
    ("trunk", "coco35k-default-pretrained-2x", ["coco35k-default-pretrained-6x"], "SOLVER.STEPS", (110000,)),
    ("cascade", CASCADES[0], [CASCADES[0]], "SOLVER.CASCADE_FROM", "5x"),
    ("cascade", CASCADES[0], CASCADES, "SOLVER.GAMMA", 0.2),
    ("cascade", CASCADES[0], ["aug-r50-scratch-9x"], "SOLVER.STEPS", (500000, 790000)),
    ("evaluation", TTA[0], [TTA[0]], "MODEL.WEIGHTS", "./output/aug-r50-scratch-9x/seed1/model_final.pth"),
    ("evaluation", TTA[0], TTA, "TEST.AUG.FLIP", False),
    ("evaluation", TTA[1], TTA, "TEST.AUG.MIN_SIZES", (400, 500, 600, 700, 800, 900, 1000, 1100, 1200)),
    ("evaluation", TTA[1], TTA, "TEST.DETECTIONS_PER_IMAGE", 50),
    ("traced", ALONE, [ALONE], "SOLVER.CLIP_GRADIENTS.ENABLED", True),
    ("traced", "imagenet-r50-gn-pretrained-100ep", None, "SOLVER.AMP.ENABLED", True),
]


@pytest.mark.parametrize(("name", "id", "ids", "key", "value"), BREAKS)
def test_a_changed_key_breaks_its_rule_and_no_other(name, id, ids, key, value):
    load_changed = changed({other: {key: value} for other in ids or [id]})
    found = check([find(id)], load_changed, RULES)
    assert {(violation.line, violation.run) for violation in found} == {(name, id)}


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_no_norm_of_one_gpu_or_frozen_from_random_weights(norm):
    found = check([find(ALONE)], changed({ALONE: {"MODEL.ROI_MASK_HEAD.NORM": norm}}), RULES)
    assert {violation.line for violation in found} == {"scratch", "norm_layers"}
    assert f"roi_heads.mask_head has 4 layers of {norm}" in {violation.message for violation in found}


def test_only_arms_with_a_cascade_may_differ_in_its_start():
    found = check([find(BASE)], changed({BASE: {"SOLVER.CASCADE_FROM": "3x"}}), RULES)
    assert "pair" in {violation.line for violation in found}


def test_a_search_must_start_from_its_own_data_and_arm():
    run = dataclasses.replace(find("search-coco1k-scratch"), arm="pretrained")
    (violation,) = check([run], lines=RULES)
    assert violation.line == "search"
    assert "coco1k-scratch-60k" in violation.message


def test_a_run_that_branches_too_late_is_named():
    run = dataclasses.replace(find("coco35k-default-pretrained-2x"), branch_iteration=130_000)
    assert [violation.line for violation in check([run], lines=RULES)] == ["trunk"]


def test_every_rule_is_tested():
    assert {rule.name for rule in RULES} == {name for name, *_ in BREAKS} | {"search"}


@given(st.data())
@hypothesis_settings(max_examples=60, deadline=None)
def test_no_key_that_changes_results_can_change_unnoticed(data):
    run = data.draw(st.sampled_from([run for run in RUNS if run.kind != "search"]))
    leaves = recipe.flatten(resolved(run))
    unused = UNUSED_BY_CLASSIFIERS if run.kind == "pretrain" else ()
    keys = [key for key in leaves if key not in recipe.FREE and not key.startswith(unused)]
    key = data.draw(st.sampled_from(keys))
    load_changed = changed({run.id: {key: another(leaves[key])}})
    assert check([run], load_changed, [*SETTINGS, *OF_ONE_CONFIG])


def test_the_message_says_who_wants_what():
    found = check([find(BASE)], changed({BASE: {"SOLVER.BASE_LR": 0.01}}))
    assert {violation.line for violation in found} == {"SOLVER.BASE_LR = 0.02 [* !imagenet-*]", "pair"}
    assert str(found[0]) == f"{BASE}: SOLVER.BASE_LR is 0.01, must be 0.02 (paper, section 4)"
    assert str(found[1]) == (
        f"{BASE}: SOLVER.BASE_LR is 0.01, but 0.02 in base-r50-gn-pretrained-6x (paper, sections 4 and 5)"
    )


def test_one_of_several_lengths():
    (setting,) = (s for s in settings.load() if s.key == "SOLVER.SCHEDULE" and s.scope == "keypoint-*")
    assert [setting.allows(text) for text in ("2x", "3x", "4x")] == [True, True, False]


def test_a_network_that_cannot_be_built_is_a_violation():
    found = check([find(ALONE)], changed({ALONE: {"MODEL.BACKBONE.NAME": "no_such_backbone"}}), RULES)
    assert {violation.line for violation in found} == {"scratch", "norm_layers"}
    assert all("could not be checked" in violation.message for violation in found)


@pytest.mark.parametrize(
    ("scope", "id", "fits"),
    [
        ("*", BASE, True),
        ("base-*/scratch", BASE, True),
        ("base-*/pretrained aug-*", BASE, False),
        ("* !base-*", BASE, False),
        ("*/scratch !*/*/evaluate", "tta-r50-scratch-9x", False),
        ("*/scratch !*/*/evaluate", "cascade-r50-scratch-9x", True),
    ],
)
def test_scope(scope, id, fits):
    setting = dataclasses.replace(settings.load()[0], scope=scope)
    assert setting.about(find(id)) == fits


def test_the_later_of_two_rows_counts():
    rows = [
        s for s in settings.load() if s.key == "MODEL.RESNETS.DEPTH" and s.about(find("x152-aug-scratch-9x"))
    ]
    assert len(rows) > 1
    assert settings.of(find("x152-aug-scratch-9x"))["MODEL.RESNETS.DEPTH"] is rows[-1]


def test_every_setting_has_words_and_a_source_or_a_reason():
    keys = recipe.flatten(recipe.default_config())
    for setting in settings.load():
        assert setting.key in keys
        assert setting.what and (setting.source or setting.choice)
        assert recipe.classify(setting.key) != "free"


def test_where_the_paper_leaves_it_open_the_reason_is_there():
    for setting in settings.load():
        assert setting.choice or "not named" not in setting.what


def test_resolved_configs_cannot_be_changed():
    assert isinstance(resolved(find(BASE)), CfgNode)
    assert resolved(find(BASE)).is_frozen()


def test_command_line(monkeypatch, capsys, results):
    monkeypatch.setattr(main, "examine", lambda: results)
    assert main.cli(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "OK    88 runs  batch" in lines
    assert lines[-1] == f"{len(SETTINGS) + len(RULES)} lines, 0 violations"


def test_command_line_with_violations(monkeypatch, capsys):
    found = examine([find(BASE)], changed({BASE: {"SOLVER.BASE_LR": 0.01}}), SETTINGS)
    monkeypatch.setattr(main, "examine", lambda: found)
    assert main.cli(["check"]) == 1
    out = capsys.readouterr().out
    assert "FAIL   1 runs  SOLVER.BASE_LR = 0.02 [* !imagenet-*]\n" in out
    assert f"{BASE}: SOLVER.BASE_LR is 0.01, must be 0.02 (paper, section 4)\n" in out
    assert main.cli(["check", "--json"]) == 1
    parsed = json.loads(capsys.readouterr().out)
    assert [violation["run"] for violation in parsed["violations"]] == [BASE]
    assert sum(line["violations"] for line in parsed["lines"]) == 1
