import json

import pytest

from rethink_d2.paper import load
from rethink_d2.paper.__main__ import cli
from rethink_d2.paper.localization import localization, table

ITERATIONS = {f"{n}x": n * 90_000 for n in range(2, 7)}
BASE = [run for run in load() if run.family in ("base-r50-gn", "base-r101-gn")]


def write(root, id, ap, ap75, seed=1, iteration=None, dataset="coco_2017_val"):
    folder = root / id / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    iteration = iteration or ITERATIONS[id.rsplit("-", 1)[1]]
    row = {"iteration": iteration, "dataset": dataset, "bbox/AP": ap, "bbox/AP75": ap75}
    path.write_text(json.dumps([*rows, row]))


def published(root):
    """The paper's own Tables 1 and 2 as results; AP75 only of what Table 2 shows."""
    for run in BASE:
        write(root, run.id, run.published, run.also_published.get("bbox/AP75", 1.0))


def test_the_papers_numbers_give_the_papers_differences(tmp_path):
    published(tmp_path)
    r50, r101 = localization(tmp_path)
    assert (r50.scratch.run.id, r50.pretrained.run.id) == (
        "base-r50-gn-scratch-6x",
        "base-r50-gn-pretrained-6x",
    )
    # Two schedules reach 42.3: Table 2 shows the shorter one.
    assert r101.pretrained.run.id == "base-r101-gn-pretrained-3x"
    for result, difference in ((r50, 1.0), (r101, 0.8)):
        assert result.difference == pytest.approx(difference)
        assert result.analysis.published == difference
        assert result.missing == ()
    assert table([r50, r101]).count("+1.0 | +1.0") == 1


def test_the_mean_over_seeds_decides(tmp_path):
    write(tmp_path, "base-r50-gn-scratch-6x", 41.0, 45.0, seed=1)
    write(tmp_path, "base-r50-gn-scratch-6x", 42.0, 46.0, seed=2)
    write(tmp_path, "base-r50-gn-scratch-5x", 41.9, 40.0)  # below the mean's rival, above one of its seeds
    write(tmp_path, "base-r50-gn-scratch-4x", 41.4, 30.0)
    write(tmp_path, "base-r50-gn-pretrained-2x", 40.0, 44.0)
    best = localization(tmp_path)[0]
    assert (best.scratch.run.schedule, best.scratch.seeds) == ("5x", 1)
    write(tmp_path, "base-r50-gn-scratch-5x", 40.0, 40.0, seed=2)
    best = localization(tmp_path)[0]
    assert (best.scratch.run.schedule, best.scratch.seeds) == ("6x", 2)
    assert (best.scratch.ap, best.scratch.ap75, best.difference) == (41.5, 45.5, 1.5)
    assert "6x (AP 41.5, 2 seeds)" in table([best])


@pytest.mark.parametrize(
    "result",
    [
        {"iteration": 520_000},  # looked at on the way
        {"dataset": "coco_2017_val_100"},
        {"ap75": None},  # as a model without any detection is recorded
    ],
)
def test_only_the_final_evaluation_counts(tmp_path, result):
    write(tmp_path, "base-r50-gn-scratch-6x", 41.0, **{"ap75": 45.0, **result})
    r50 = localization(tmp_path)[0]
    assert (r50.scratch, r50.difference) == (None, None)
    assert "base-r50-gn-scratch-6x" in r50.missing


def test_missing_runs_are_named(tmp_path):
    published(tmp_path)
    (tmp_path / "base-r101-gn-scratch-4x/seed1/results.json").unlink()
    r50, r101 = localization(tmp_path)
    assert (r50.missing, r101.missing) == ((), ("base-r101-gn-scratch-4x",))
    assert table([r50, r101]).endswith("No result after the last iteration: base-r101-gn-scratch-4x")


def test_an_arm_without_any_run_is_a_dash(tmp_path):
    write(tmp_path, "base-r50-gn-scratch-6x", 41.3, 45.6)
    r50, r101 = localization(tmp_path)
    assert "| localization-r50 | 6x (AP 41.3) | 45.6 | - | - | - | +1.0 |" in table([r50, r101])
    assert "| localization-r101 | - | - | - | - | - | +0.8 |" in table([r50, r101])


@pytest.mark.parametrize("text", ["[", "[1]", '[{"iteration": 1}]', "null"])
def test_a_damaged_file_is_named(tmp_path, text):
    write(tmp_path, "base-r50-gn-scratch-6x", 41.3, 45.6)
    path = tmp_path / "base-r50-gn-scratch-6x/seed1/results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=str(path)):
        localization(tmp_path)


def test_command_line(tmp_path, capsys):
    assert cli(["localization", str(tmp_path)]) == 2
    assert f"{tmp_path} holds no finished run" in capsys.readouterr().err
    published(tmp_path)
    assert cli(["localization", str(tmp_path)]) == 0
    assert "+0.8 | +0.8" in capsys.readouterr().out
