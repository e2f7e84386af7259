"""The report in a real browser."""

from pathlib import Path

import pytest
from in_browser import DESK, FILL, HOSTILE, PHONE, assert_fits_the_phone, assert_harmless, background, middle
from made_runs import make_run

from rethink_d2.report import write_report

expect = pytest.importorskip("playwright.sync_api", reason="needs playwright").expect


def curve(final, length):
    """Evaluations of a run: a rise, then a leap where the rate drops."""
    rise = {length * i // 10: 0.85 * final * (1 - 0.6**i) for i in range(1, 10)}
    return {**rise, length: final}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Figures 1, 2 and 8 with two arms, two schedules and two seeds, and a failed run of a hostile name."""
    out = tmp_path_factory.mktemp("output")
    for arm, schedule, ap in (
        ("scratch", "2x", 36.8),
        ("scratch", "6x", 41.3),
        ("pretrained", "2x", 40.3),
        ("pretrained", "6x", 41.1),
    ):
        length = 90_000 * int(schedule[0])
        for seed in (1, 2):
            evaluations = curve(ap + 0.3 * seed, length)
            steps = [length - 60_000, length - 20_000]
            make_run(out, f"base-r50-gn-{arm}-{schedule}", evaluations, seed=seed, steps=steps)
    for run_id, length, ap in (("coco1k-scratch-60k", 60_000, 3.5), ("coco1k-pretrained-15k", 15_000, 9.9)):
        losses = {x - 1: 2 - 1.7 * x / length for x in range(length // 20, length + 1, length // 20)}
        make_run(out, run_id, curve(ap, length), losses=losses)
    make_run(out, HOSTILE, {10: 1.0}, folder=HOSTILE.replace("/", ""), MODEL__WEIGHTS=HOSTILE)
    return Path(write_report(str(out)))


def drawn_charts(page):
    """Names of a page's charts, each of which has drawn something that can be seen."""
    charts = page.locator(".chart").all()
    for chart in charts:
        drawn = chart.locator("svg .scatterlayer path.js-line, svg .barlayer path")
        lengths = drawn.evaluate_all("all => all.map(path => path.getTotalLength())")
        assert lengths and all(length > 5 for length in lengths)
    return [chart.get_attribute("id").removeprefix("chart-") for chart in charts]


def test_report_draws_every_chart(visit, report):
    page = visit(report, **DESK)
    assert drawn_charts(page) == ["1-1", "2-1", "2-2", "2-3", "8-1", "8-2"]
    # Two arms of two schedules, and the band of each over its seeds.
    assert page.locator("#chart-1-1 .scatterlayer path.js-line").count() == 8
    names = page.locator("#chart-1-1 .legendtext").all_text_contents()
    curves = ["2x", "6x", "published"]
    assert names == ["random init", *curves, "w/ pre-training", *curves]


def test_every_figure_of_the_paper_is_drawn(visit, whole_paper):
    page = visit(Path(write_report(str(whole_paper))), **DESK)
    panels = {1: 1, 2: 3, 3: 1, 4: 1, 5: 2, 6: 1, 7: 3, 8: 2}
    assert drawn_charts(page) == [f"{n}-{i}" for n, count in panels.items() for i in range(1, count + 1)]
    page.mouse.move(*middle(page.locator("#chart-5-1 .barlayer path").first))
    said = page.locator("#chart-5-1 .hovertext")
    said.wait_for()
    assert "box AP, random initbaseline: 41.3 ± 0.71 (2 seeds)" in said.text_content()


def test_report_says_the_value_under_the_pointer(visit, report, tmp_path):
    page = visit(report, **DESK)
    page.mouse.move(*middle(page.locator("#chart-1-1 .trace:has(.js-line) .point").last))
    said = page.locator("#chart-1-1 .hovertext")
    said.wait_for()
    assert "w/ pre-training, 6x41.55 (mean of 2 seeds, 41.4 to 41.7)" in said.text_content()
    page.screenshot(path=tmp_path / "report.png")
    page.mouse.move(*middle(page.locator("#chart-2-1 .barlayer path").first))
    page.locator("#chart-2-1 .hovertext").wait_for()


def test_a_click_on_a_name_hides_its_curve_alone(visit, report):
    page = visit(report, **DESK)
    lines = page.locator("#chart-8-1 .scatterlayer .trace")
    assert lines.count() == 2
    name = page.locator("#chart-8-1 .legendtoggle").first
    for count in (1, 2):
        page.mouse.click(*middle(name))
        expect(lines).to_have_count(count)


def test_report_in_the_dark_and_on_a_phone(visit, report, tmp_path):
    light, dark = visit(report), visit(report, color_scheme="dark", **PHONE)
    assert background(light) != background(dark)
    title = "#chart-1-1 .gtitle"
    assert light.locator(title).evaluate(FILL) != dark.locator(title).evaluate(FILL)
    light.emulate_media(color_scheme="dark")
    expect(light.locator(title)).to_have_css("fill", dark.locator(title).evaluate(FILL))
    assert_fits_the_phone(dark)
    for details in dark.locator("details").all():
        details.evaluate("details => details.open = true")
    assert_fits_the_phone(dark)
    dark.screenshot(path=tmp_path / "report_phone.png")


def test_hostile_names_run_nothing_in_the_report(visit, report):
    page = visit(report)
    page.locator("#runs details", has_text="hacked").locator("summary").click()
    assert HOSTILE in page.locator("#runs").inner_text()
    assert_harmless(page)


def test_the_first_value_of_a_run_can_be_seen(visit, tmp_path):
    make_run(tmp_path, "base-r50-gn-scratch-2x", {20_000: 10.0}, max_iter=180_000, state="running")
    page = visit(Path(write_report(str(tmp_path))), **DESK)
    box = page.locator("#chart-1-1 .points path").first.bounding_box()
    assert 4 < box["width"] < 10


def test_a_finger_scrolls_the_page_over_a_chart(visit, report):
    page = visit(report, **PHONE, is_mobile=True)
    place = page.locator("#chart-1-1")
    place.evaluate("place => place.scrollIntoView({ behavior: 'instant', block: 'center' })")
    axes = "place => [place._fullLayout.xaxis.range, place._fullLayout.yaxis.range]"
    before, ranges = page.evaluate("scrollY"), place.evaluate(axes)
    box = place.locator(".nsewdrag").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + 0.8 * box["height"]
    finger = page.context.new_cdp_session(page)
    for kind, points in (
        ("touchStart", [(x, y)]),
        *(("touchMove", [(x, y - 20 * step)]) for step in range(1, 11)),
        ("touchEnd", []),
    ):
        points = [{"x": left, "y": top} for left, top in points]
        finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    page.wait_for_function("before => scrollY > before + 100", arg=before)
    assert place.evaluate(axes) == ranges
    point = page.locator("#chart-1-1 .trace:has(.js-line) .point").last
    page.touchscreen.tap(*middle(point))
    page.locator("#chart-1-1 .hovertext").wait_for()


def test_a_phone_shows_the_numbers_of_the_tables(visit, whole_paper):
    page = visit(Path(write_report(str(whole_paper))), **PHONE)
    for cells in page.locator(".numbers tbody tr:not(.group)").all()[:30]:
        box = cells.locator("td").nth(7).bounding_box()
        assert box["x"] + box["width"] <= PHONE["viewport"]["width"] and box["height"] < 60
    table = page.locator(".numbers").first
    assert table.locator(".group").first.inner_text() == "base-r50-gn, random init"
    assert not table.locator("tr.first td").first.is_visible()  # said by its group
    row = page.locator(".runs tbody tr").first
    assert all(cell.is_visible() for cell in row.locator("td").all()) and row.bounding_box()["width"] <= 390
    wide = visit(Path(write_report(str(whole_paper))), **DESK)
    assert not wide.locator(".group").first.is_visible()
    assert wide.locator("tr.first td").first.is_visible()


def test_long_names_and_errors_leave_room(visit, tmp_path):
    make_run(tmp_path, "x" * 200, {10: 1.0}, folder="y" * 200, state=ValueError("A " * 1500))
    page = visit(Path(write_report(str(tmp_path))), **DESK)
    assert page.locator(".note").bounding_box()["height"] < 150
    box = page.locator(".runs .files").last.bounding_box()
    assert box["x"] + box["width"] <= 1280
