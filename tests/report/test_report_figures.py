import csv
import io

import pytest
from made_runs import branch_of, make_run

from rethink_d2 import paper
from rethink_d2.engine.record import append_result
from rethink_d2.paper import samples
from rethink_d2.report.charts import charts
from rethink_d2.report.figures import COLORS, figures, to_csv
from rethink_d2.report.pictures import picture, render
from rethink_d2.report.runs import find_runs


@pytest.fixture(scope="module")
def everything(whole_paper):
    return figures(find_runs(str(whole_paper)))


def test_every_figure_of_the_manifest(everything):
    named = {name for run in paper.load() for name in run.figure.split("; ") if name.startswith("Fig")}
    assert {f"Fig {figure.number}" for figure in everything} == named
    assert [len(figure.panels) for figure in everything] == [1, 3, 1, 1, 2, 1, 3, 2]


def test_all_schedules_of_both_arms_overlaid(everything):
    (panel,) = everything[0].panels
    lines = [(line.arm, line.name) for line in panel.lines]
    assert lines == [(arm, f"{n}x") for arm in ("scratch", "pretrained") for n in range(2, 7)]
    longest = panel.lines[4]
    assert longest.x == (270_000, 540_000) and longest.y[-1] == pytest.approx(41.3)
    assert (longest.low[-1], longest.high[-1], longest.seeds[-1]) == (40.8, 41.8, 2)
    assert longest.notes[-1] == "540,000 iterations, 6.00x, 8,640,000 images" and longest.finished
    published = {(mark.arm, mark.x): mark.y for mark in panel.marks}
    assert published["scratch", 180_000] == 36.8 and len(published) == 10


def test_a_branch_is_drawn_from_the_start_and_leaps_at_its_drop(tmp_path):
    make_run(tmp_path, "base-r50-gn-scratch-6x", {60: 10.0, 120: 20.0, 540: 40.0}, steps=[480, 520])
    parent = branch_of("base-r50-gn-scratch-6x", 120)
    make_run(tmp_path, "base-r50-gn-scratch-2x", {180: 36.0}, parent=parent, steps=[120, 160])
    (panel,) = figures(find_runs(str(tmp_path)))[0].panels
    assert [line.x for line in panel.lines] == [(60, 120, 180), (60, 120, 540)]
    assert panel.drops == (120, 160, 480, 520)


def test_a_running_seed_ends_early_and_leaves_the_line_open(tmp_path):
    make_run(tmp_path, "base-r50-gn-scratch-2x", {10: 10.0, 20: 20.0})
    make_run(tmp_path, "base-r50-gn-scratch-2x", {10: 12.0}, seed=2, max_iter=20, state="running")
    (line,) = figures(find_runs(str(tmp_path)))[0].panels[0].lines
    assert line.y == (11.0, 20.0) and line.seeds == (2, 1) and not line.finished


def test_published_values_are_left_out_of_miniatures(tmp_path):
    make_run(tmp_path, "base-r50-gn-scratch-2x", {108: 70.0}, SOLVER__ONE_X=27, SOLVER__IMS_PER_BATCH=8)
    (panel,) = figures(find_runs(str(tmp_path)))[0].panels
    assert panel.marks == () and panel.lines[0].notes == ("108 iterations, 2.00x, 864 images",)


def test_captions_of_miniatures_say_so(tmp_path, everything):
    make_run(tmp_path, "base-r50-gn-scratch-2x", {108: 70.0}, SOLVER__ONE_X=27)
    captions = {figure.number: figure.caption for figure in figures(find_runs(str(tmp_path)))}
    assert captions[1].endswith("all schedules overlaid. (Here in miniature, on built-in data.)")
    assert "miniature" not in captions[2]  # the paper's arithmetic
    assert not any("miniature" in figure.caption for figure in everything)


def test_a_first_value_alone_is_an_open_dot(tmp_path):
    run = tmp_path, "base-r50-gn-scratch-2x"
    folder = make_run(*run, {20_000: 10.0}, max_iter=180_000, state="running")
    (figure,) = [figure for figure in figures(find_runs(str(tmp_path))) if figure.number == 1]
    marker = charts(figure)[0]["data"][0]["marker"]
    assert marker["size"] == [6] and marker["symbol"] == "circle-open"
    dots = [line for line in picture(figure).axes[0].lines if line.get_marker() == "o"]
    assert [(*dot.get_xdata(), dot.get_fillstyle()) for dot in dots] == [(20_000, "none")]
    append_result(str(folder), 40_000, "coco_2017_val", {"bbox/AP": 20.0})
    figure = figures(find_runs(str(tmp_path)))[0]
    assert charts(figure)[0]["data"][0]["marker"]["size"] == [0, 0]
    assert not [line for line in picture(figure).axes[0].lines if line.get_marker() == "o"]


def test_figures_without_runs_have_no_panels(tmp_path):
    make_run(tmp_path, "my-own", {10: 1.0})
    assert [figure.number for figure in figures(find_runs(str(tmp_path))) if figure.panels] == [2]


def test_figure_2_is_the_papers_arithmetic(everything):
    pixels = everything[1].panels[2]
    heights = {bar.name: [y for y in bar.y if y is not None] for bar in pixels.bars}
    assert heights == {name: [seen.pixels / 1e12] for name, seen in samples.paper_reading().items()}
    assert pixels.stacked and pixels.position("w/ pre-training", "COCO, 115k x 24 epochs") == 1


def test_figure_5_has_both_arms_boxes_and_masks_and_begins_with_the_baseline(everything):
    top, bottom = everything[4].panels
    assert (top.title, bottom.title) == ("R50", "R101")
    assert top.categories == ("baseline", "train aug", "cascade + train aug", "cascade + train/test aug")
    assert [(bar.arm, bar.faded) for bar in top.bars] == [
        ("scratch", False),
        ("pretrained", False),
        ("scratch", True),
        ("pretrained", True),
    ]
    box, _, mask, _ = top.bars
    assert box.y[0] == pytest.approx(41.3) and mask.y[3] == pytest.approx(41.6)
    assert box.noise[0] == pytest.approx(0.5**0.5)
    assert {(m.name, m.x): m.y for m in top.marks}["mask AP, random init", "cascade + train/test aug"] == 41.6


def test_figure_8_has_loss_and_ap(everything):
    loss, ap = everything[7].panels
    assert (loss.title, ap.title) == ("training loss", "coco1k")
    assert loss.lines[0].y == (1.0, 0.5) and loss.lines[0].x == (30_001, 60_000) and loss.marks == ()


def test_charts_have_the_arms_colors_and_what_to_hover(everything):
    (chart,) = charts(everything[0])
    lines = [trace for trace in chart["data"] if trace["mode"] == "lines+markers"]
    assert {(t["legendgroup"], t["line"]["color"]) for t in lines} == set(COLORS.items())
    assert lines[4]["name"] == "6x" and lines[4]["marker"]["size"] == [0, 8]
    assert lines[4]["text"][1] == (
        "<b>random init, 6x</b><br>41.3 (mean of 2 seeds, 40.8 to 41.8)<br>"
        "540,000 iterations, 6.00x, 8,640,000 images"
    )
    for figure in everything:
        assert len(charts(figure)) == len(figure.panels)


def test_bars_stand_on_each_other_or_side_by_side(everything):
    stacked = charts(everything[1])[0]["data"]
    assert stacked[1]["base"] == [0, 128.0] and stacked[0]["base"] == [0, 0]
    beside = [trace["x"][0] for trace in charts(everything[4])[0]["data"] if trace["type"] == "bar"]
    assert beside == sorted(set(beside)) and -0.5 < beside[0] and beside[-1] < 0.5


def test_pictures(everything):
    files = render(everything[6])
    assert files["png"].startswith(b"\x89PNG") and files["pdf"].startswith(b"%PDF")
    assert files == render(everything[6])  # the same bytes, as long as nothing has changed
    for figure in everything:
        made = picture(figure)
        assert len(made.axes) == len(figure.panels)
        assert all(axes.lines or axes.patches for axes in made.axes)


def test_data(everything):
    rows = list(csv.DictReader(io.StringIO(to_csv(everything[0]))))
    first, last = rows[0], rows[-1]
    assert (first["arm"], first["curve"], first["x"], first["y"]) == ("scratch", "2x", "90000", "18.4")
    assert (last["drawn"], last["arm"], last["y"]) == ("published", "pretrained", "41.1")
    assert len(rows) == 10 * 2 + 10
    bars = list(csv.DictReader(io.StringIO(to_csv(everything[4]))))
    assert bars[0]["x"] == "baseline" and float(bars[0]["high"]) > float(bars[0]["y"])
    assert {row["seeds"] for row in bars if row["drawn"] == "yours"} == {"2"}
    assert {row["seeds"] for row in csv.DictReader(io.StringIO(to_csv(everything[1])))} == {""}


def test_bars_say_their_noise_and_seeds(everything, tmp_path):
    said = charts(everything[4])[0]["data"][0]["customdata"]
    assert said[0] == "baseline: 41.3 ± 0.71 (2 seeds)"
    assert charts(everything[1])[0]["data"][0]["customdata"][1] == "w/ pre-training: 128"
    make_run(tmp_path, "aug-r50-scratch-9x", {810_000: 42.0})
    figure = figures(find_runs(str(tmp_path)))[4]
    assert charts(figure)[0]["data"][0]["customdata"] == ["", "train aug: 42 (one seed)", "", ""]
