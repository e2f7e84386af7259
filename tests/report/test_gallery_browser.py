"""The gallery in a real browser."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from in_browser import HOSTILE, PHONE, assert_fits_the_phone, assert_harmless, background, middle

from rethink_d2.report import gallery

pytest.importorskip("playwright.sync_api", reason="needs playwright")


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


def test_labels_at_the_right_edge_are_whole(visit, tmp_path):
    instances = Instances((480, 640))
    instances.pred_boxes = Boxes(torch.tensor([[600.0, 100, 639, 200], [10, 10, 90, 90]]))
    instances.pred_classes, instances.scores = torch.tensor([0, 0]), torch.tensor([0.9, 0.8])
    shown = gallery.picture(photograph(0), "a.jpg", [], instances, ["traffic light"])
    facts = {"title": "run", "weights": "w", "data": "d", "total": 1, "threshold": 0.5}
    (tmp_path / "page.html").write_text(gallery.page([shown], **facts))
    page = visit(tmp_path / "page.html")
    sides = "text => { const box = text.getBBox(); return [box.x, box.x + box.width]; }"
    ends = [text.evaluate(sides) for text in page.locator("svg text").all()]
    assert len(ends) == 2 and all(0 <= begin < end <= 640 for begin, end in ends)
    assert sorted(ends)[0][0] < 15 and sorted(ends)[1][1] > 620
