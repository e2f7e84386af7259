"""The served report in a real browser, while its runs go on."""

import os
import threading
import time

import pytest
from in_browser import DESK, middle
from made_runs import make_run

from rethink_d2.engine.record import append_result
from rethink_d2.report import serve, write_report

expect = pytest.importorskip("playwright.sync_api", reason="needs playwright").expect

LONG = "base-r50-gn-scratch-2x"
HIDDEN = "place => place.data.map(trace => [trace.name ?? trace.meta, trace.visible ?? true])"
CHART = "document.getElementById('chart-1-1')"
ZOOM = "place => [place._fullLayout.xaxis.range, place._fullLayout.yaxis.range]"
# Where in the window the table of runs is: what the reader looks at.
PLACE = "Math.round(document.getElementById('runs').getBoundingClientRect().top)"


@pytest.fixture
def output(tmp_path):
    """A running run and others, two seeds of one."""
    values = {90_000: 30.0, 100_000: 31.0}
    make_run(tmp_path, LONG, values, max_iter=180_000, state="running")
    for seed in (1, 2):
        make_run(tmp_path, "base-r50-gn-pretrained-2x", {90_000: 30.0, 180_000: 40.0 + seed}, seed=seed)
    write_report(str(tmp_path))
    return tmp_path


@pytest.fixture
def address(output, monkeypatch):
    """Of the output folder's report, whose page looks for a newer one ten times a second."""
    monkeypatch.setattr(serve, "RELOAD", serve.RELOAD.replace(f"{serve.SECONDS * 1000}", "100"))
    server = serve.make_server(str(output))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/report/index.html"
    server.shutdown()
    thread.join()
    server.server_close()


def made_again(output, iteration, value):
    """The report after another evaluation, a later second's."""
    append_result(str(output / LONG / "seed1"), iteration, "coco_2017_val", {"bbox/AP": value})
    path = write_report(str(output))
    later = time.time() + iteration / 1000
    os.utime(path, (later, later))


def test_a_new_report_is_shown_and_what_the_reader_did_stays(output, address, visit):
    page = visit(address, **DESK)
    place, runs = page.locator("#chart-1-1"), page.locator("#runs")
    name = place.locator(".traces", has_text="2x").last.locator(".legendtoggle")
    page.mouse.click(*middle(name))  # of the pre-trained arm, which has a band
    expect(place.locator(".scatterlayer .trace:has(.js-line)")).to_have_count(1)
    before = page.evaluate(f"JSON.stringify(({ZOOM})({CHART}))")
    box = place.locator(".nsewdrag").first.bounding_box()
    page.mouse.move(box["x"] + 30, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + 230, box["y"] + 200, steps=5)
    page.mouse.up()
    page.wait_for_function(f"before => JSON.stringify(({ZOOM})({CHART})) !== before", arg=before)
    page.locator(".verdict summary").first.click()
    runs.locator("summary", has_text=LONG).click()
    page.evaluate("scrollTo({ top: document.getElementById('runs').offsetTop - 20, behavior: 'instant' })")
    hidden, zoom, spot = place.evaluate(HIDDEN), place.evaluate(ZOOM), page.evaluate(PLACE)
    assert [name for name, shown in hidden if shown == "legendonly"] == ["band", "2x"]

    # Another figure comes in above what the reader looks at.
    make_run(output, "keypoint-r50-gn-scratch-2x", {90_000: 60.0, 180_000: 65.0}, metric="keypoints/AP")
    made_again(output, 120_000, 32.5)
    expect(runs).to_contain_text("120,000 / 180,000")
    expect(page.locator("#chart-6-1 .scatterlayer .js-line")).to_have_count(1)
    page.wait_for_function(f"spot => Math.abs({PLACE} - spot) < 3", arg=spot)
    assert place.evaluate(HIDDEN) == hidden
    assert place.evaluate(ZOOM) == zoom
    assert page.locator("details[open]").count() == 2
    assert runs.locator("details[open]").get_attribute("data-key") == f"run {LONG}/seed1"

    # And again, after all has been put back.
    page.mouse.dblclick(*middle(place.locator(".nsewdrag").first))
    page.mouse.click(*middle(name))
    expect(place.locator(".scatterlayer .trace:has(.js-line)")).to_have_count(3)
    for summary in page.locator("details[open] summary").all()[::-1]:
        summary.click()
    made_again(output, 140_000, 33.5)
    expect(runs).to_contain_text("140,000 / 180,000")
    expect(page.locator("#chart-6-1 .scatterlayer .js-line")).to_have_count(1)
    assert page.locator("details[open]").count() == 0
    assert {shown for _, shown in place.evaluate(HIDDEN)} == {True}


def test_a_page_opened_anew_is_as_made(address, visit):
    page = visit(address, **DESK)
    page.locator(".verdict summary").first.click()
    page.goto("about:blank")
    page.goto(f"{address}#tables")
    assert page.locator("details[open]").count() == 0
    page.wait_for_function("document.getElementById('tables').getBoundingClientRect().top < 50")
