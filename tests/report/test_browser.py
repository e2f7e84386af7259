"""The gallery and the report in a real browser."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from made_runs import make_run

from rethink_d2.report import gallery, write_report

expect = pytest.importorskip("playwright.sync_api", reason="needs playwright").expect

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "device_scale_factor": 2}
# Says so if it ever runs.
HOSTILE = """</script></title><script>hacked = 1</script>"'><img src=x onerror="hacked = 1">&lt;{{ 7 * 7 }}"""

FILL = "element => getComputedStyle(element).fill"


def background(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def assert_fits_the_phone(page):
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= PHONE["viewport"]["width"]


def assert_harmless(page):
    assert page.evaluate("typeof hacked") == "undefined"


def middle(locator):
    """Where an element is, in pixels of the window."""
    locator.scroll_into_view_if_needed()
    box = locator.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def photograph(seed):
    """Coarse squares, as large as the images of COCO."""
    squares = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)
    return squares.repeat(40, 0).repeat(40, 1)


def a_picture(number, name, class_names):
    """One object found, `number` missed, and detections on nothing in every other picture."""
    instances = Instances((480, 640))
    boxes = [[10.0, 10, 100, 100]] + [[400.0, 300, 500, 400]] * (number % 2)
    instances.pred_boxes = Boxes(torch.tensor(boxes))
    instances.pred_classes = torch.zeros(len(boxes), dtype=torch.int64)
    instances.scores = torch.linspace(0.9, 0.6, len(boxes))
    missed = [([150 + 60 * i, 200, 190 + 60 * i, 240], 1, False) for i in range(number)]
    objects = [([10, 10, 100, 90], 0, False), *missed]
    return gallery.picture(photograph(number), name, objects, instances, class_names)


@pytest.fixture(scope="module")
def gallery_page(tmp_path_factory):
    def write(class_names=("cat", "dog"), prefix="", title="run"):
        pictures = [a_picture(i, f"{prefix}{9 - i}.jpg", class_names) for i in range(6)]
        path = tmp_path_factory.mktemp("gallery") / "page.html"
        facts = {"title": title, "weights": title, "data": title, "total": 9, "threshold": 0.5}
        path.write_text(gallery.page(pictures, **facts))
        return path

    return write


def names(page):
    return page.locator("figure:visible").evaluate_all("all => all.map(f => f.dataset.name)")


def test_gallery_is_sorted_and_filtered(visit, gallery_page):
    page = visit(gallery_page())
    assert names(page) == ["4.jpg", "6.jpg", "5.jpg", "8.jpg", "7.jpg", "9.jpg"]
    page.select_option("#sort", "background")
    assert {names(page)[i] for i in range(3)} == {"4.jpg", "6.jpg", "8.jpg"}
    page.select_option("#sort", "name")
    assert names(page) == sorted(names(page))
    page.click("button[data-kind=background]")
    assert names(page) == ["4.jpg", "6.jpg", "8.jpg"]
    assert page.inner_text("#count") == "3 images"
    page.click("button[data-kind=background]")
    assert len(names(page)) == 6


def test_gallery_shows_images_and_says_what_a_box_is(visit, gallery_page, tmp_path):
    page = visit(gallery_page(), viewport={"width": 1280, "height": 900})
    decoded = """async image => {
        const copy = new Image();
        copy.src = image.getAttribute("href");
        await copy.decode();
        return [copy.naturalWidth, copy.naturalHeight];
    }"""
    assert page.locator("image").first.evaluate(decoded) == [320, 240]
    figure = page.locator("figure").first
    page.mouse.move(*middle(figure.locator(".detection.correct rect")))
    assert page.inner_text("#tip").split("\n") == ["cat: matched", "cat 0.90, IoU 0.89 with cat: correct"]
    page.screenshot(path=tmp_path / "gallery.png")
    page.mouse.move(*middle(figure.locator(".truth.missed rect").first))
    assert page.inner_text("#tip") == "dog: missed"
    page.mouse.move(1, 1)
    assert not page.is_visible("#tip")


def test_gallery_hides_what_is_not_wanted(visit, gallery_page):
    page = visit(gallery_page())
    for kind, what in (("truth", ".truth"), ("detection", ".detection"), ("labels", "text")):
        assert page.locator(what).first.is_visible()
        page.uncheck(f"[data-hides={kind}]")
        assert not page.locator(what).first.is_visible()
        page.check(f"[data-hides={kind}]")


def test_gallery_in_the_dark_and_on_a_phone(visit, gallery_page, tmp_path):
    light = visit(gallery_page(), color_scheme="light")
    dark = visit(gallery_page(), color_scheme="dark", **PHONE)
    assert background(light) != background(dark)
    assert_fits_the_phone(dark)
    assert_fits_the_phone(visit(gallery_page(prefix="x" * 200, title="y" * 200), **PHONE))
    figure = dark.locator("figure").first
    dark.touchscreen.tap(*middle(figure.locator(".detection.correct rect")))
    assert "correct" in dark.inner_text("#tip")
    dark.screenshot(path=tmp_path / "gallery_phone.png")


def test_hostile_names_run_nothing_in_the_gallery(visit, gallery_page):
    page = visit(gallery_page((HOSTILE, HOSTILE), HOSTILE, HOSTILE))
    assert page.title() == f"Detections: {HOSTILE}"
    page.mouse.move(*middle(page.locator(".detection rect").first))
    page.select_option("#sort", "name")
    assert names(page)[0] == f"{HOSTILE}4.jpg"
    assert_harmless(page)


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


def test_report_draws_every_chart(visit, report):
    page = visit(report, viewport={"width": 1280, "height": 900})
    charts = page.locator(".chart").all()
    assert [chart.get_attribute("id") for chart in charts] == [
        *("chart-1-1", "chart-2-1", "chart-2-2", "chart-2-3", "chart-8-1", "chart-8-2")
    ]
    for chart in charts:
        drawn = chart.locator("svg .scatterlayer path.js-line, svg .barlayer path")
        lengths = drawn.evaluate_all("all => all.map(path => path.getTotalLength())")
        assert lengths and all(length > 20 for length in lengths)
    # Two arms of two schedules, and the band of each over its seeds.
    assert page.locator("#chart-1-1 .scatterlayer path.js-line").count() == 8
    names = page.locator("#chart-1-1 .legendtext").all_text_contents()
    curves = ["2x", "6x", "published"]
    assert names == ["random init", *curves, "w/ pre-training", *curves]


def test_report_says_the_value_under_the_pointer(visit, report, tmp_path):
    page = visit(report, viewport={"width": 1280, "height": 900})
    page.mouse.move(*middle(page.locator("#chart-1-1 .trace:has(.js-line) .point").last))
    said = page.locator("#chart-1-1 .hovertext")
    said.wait_for()
    assert "w/ pre-training, 6x41.55 (mean of 2 seeds, 41.4 to 41.7)" in said.text_content()
    page.screenshot(path=tmp_path / "report.png")
    page.mouse.move(*middle(page.locator("#chart-2-1 .barlayer path").first))
    page.locator("#chart-2-1 .hovertext").wait_for()


def test_a_click_on_a_name_hides_its_curve_alone(visit, report):
    page = visit(report, viewport={"width": 1280, "height": 900})
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
