import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import yaml
from made_runs import make_run

from rethink_d2.report import pictures, write_report
from rethink_d2.report.__main__ import cli

HOSTILE = "<script>alert(1)</script>\"'</script><img src=x onerror=alert(2)>"
RUN = "base-r50-gn-scratch-2x"


class Page(HTMLParser):
    """What a browser would make of a page: its tags, texts, links, and the texts of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.scripts, self.text, self._script = [], [], [], "", None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self.links += [attrs[name] for name in ("href", "src") if name in attrs]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.lasttag in ("script", "style") and self.rawdata:
            if self.lasttag == "script":
                self.scripts[-1] += data
        else:
            self.text += data


def written(out):
    with open(write_report(str(out)), encoding="utf-8") as f:
        text = f.read()
    return text, Page(text)


@pytest.fixture(scope="module")
def whole(whole_paper):
    return whole_paper, *written(whole_paper)


def test_the_page_holds_everything_and_asks_the_network_for_nothing(whole):
    _, text, page = whole
    assert text.count("plotly.js v") == 1
    assert not [link for link in page.links if re.match(r"\w+:|//", link) and link != "data:,"]
    assert not any("src" in attrs for tag, attrs in page.tags if tag == "script")
    style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    assert "prefers-color-scheme: dark" in style and "url(" not in style and "@import" not in style
    assert any(attrs.get("name") == "viewport" for tag, attrs in page.tags if tag == "meta")


def test_verdicts_figures_tables_runs_in_this_order(whole):
    _, text, page = whole
    sections = [attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert sections == ["verdicts", "figures", "tables", "runs"]
    assert "Scratch catches up at 5x (difference -0.4 ± 3.0, 2 seeds); the interval" in page.text
    assert "less than 0.5 below the best that pre-training reaches" in page.text
    assert "miniature" not in page.text


def test_every_figure_is_drawn_and_linked(whole):
    out, _, page = whole
    charts = json.loads(page.scripts[0])
    places = [attrs["id"] for tag, attrs in page.tags if attrs.get("class") == "chart"]
    assert [chart["id"] for chart in charts] == places and len(places) == 14
    for number in range(1, 9):
        for kind in ("png", "pdf", "csv"):
            assert f"figure_{number}.{kind}" in page.links
            assert (out / "report" / f"figure_{number}.{kind}").stat().st_size > 100


def test_links_lead_to_files(whole):
    out, _, page = whole
    for link in page.links:
        if not link.startswith(("#", "data:")):
            assert (out / "report" / link).is_file(), link
    targets = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {link[1:] for link in page.links if link.startswith("#")} <= targets


def test_tables_for_a_readme(whole):
    out, _, _ = whole
    text = (out / "report/tables.md").read_text()
    assert text.startswith("- base-r50-gn (box AP): scratch catches up at 5x")
    assert "### Table 3" in text and (out / "report/tables.csv").read_text().count("\n") > 68


def test_hostile_texts_are_texts(tmp_path):
    make_run(tmp_path, RUN, {180_000: 36.0}, SOLVER__SCHEDULE=HOSTILE, DATASETS__TEST=[HOSTILE])
    make_run(tmp_path, HOSTILE, {10: 1.0}, folder="a b<i>#%?\udcff/seed1", state=ValueError(HOSTILE))
    path = tmp_path / RUN / "seed1" / "run.json"
    record = json.loads(path.read_text())
    strange = {"hardware": HOSTILE, "versions": {HOSTILE: HOSTILE}, "started": HOSTILE + "\ud800"}
    parent = {"run_id": HOSTILE, "iteration": HOSTILE, "folder": HOSTILE}
    path.write_text(json.dumps({**record, **strange, "world_size": HOSTILE, "parent": parent}))
    (tmp_path / "broken<b>").mkdir()
    (tmp_path / "broken<b>/run.json").write_text("{")
    text, page = written(tmp_path)
    assert len(page.scripts) == 3
    assert not any(tag == "i" or "onerror" in attrs for tag, attrs in page.tags)
    assert "alert(1)" not in "".join(page.scripts)
    assert page.text.count(HOSTILE) >= 8
    assert "broken<b>/run.json cannot be read" in page.text
    assert f"ValueError: {HOSTILE}" in page.text
    assert "../a%20b%3Ci%3E%23%25%3F%FF/seed1/run.json" in page.links


def test_charts_cannot_end_their_script(tmp_path, monkeypatch):
    make_run(tmp_path, RUN, {180_000: 36.0})
    monkeypatch.setattr("rethink_d2.report.figures.ARMS", {"scratch": HOSTILE, "pretrained": "p"})
    monkeypatch.setattr("rethink_d2.report.charts.ARMS", {"scratch": HOSTILE, "pretrained": "p"})
    _, page = written(tmp_path)
    assert len(page.scripts) == 3
    assert HOSTILE in json.dumps(json.loads(page.scripts[0]), ensure_ascii=False).replace('\\"', '"')


def test_a_miniature_says_so(tmp_path):
    make_run(tmp_path, RUN, {108: 70.0}, SOLVER__ONE_X=27)
    _, page = written(tmp_path)
    words = "in miniature, on built-in data: published numbers are of COCO and not comparable"
    assert words in page.text and words in (tmp_path / "report/tables.md").read_text()


def test_a_users_own_run_is_in_the_table_of_runs(tmp_path):
    make_run(tmp_path, "mine", {10: 12.3}, state="preempted", max_iter=100, SOLVER__BASE_LR=0.125)
    _, page = written(tmp_path)
    assert "mine/seed1" in page.text and "12.3" in page.text and "preempted" in page.text
    assert "0.125" in page.text and "10 / 100" in page.text
    assert "No run yet of Figure 1, 3, 4, 5, 6, 7, 8." in page.text


def test_galleries_are_linked(tmp_path):
    make_run(tmp_path, "mine", {10: 12.3})
    (tmp_path / "report/gallery").mkdir(parents=True)
    (tmp_path / "report/gallery/a b.html").write_text("")
    _, page = written(tmp_path)
    assert "gallery/a%20b.html" in page.links


def test_pictures_are_drawn_again_only_after_a_change(tmp_path):
    make_run(tmp_path, RUN, {180_000: 36.0})
    write_report(str(tmp_path))
    files = [tmp_path / "report" / f"figure_1.{kind}" for kind in ("png", "pdf", "csv")]
    before = [path.stat().st_mtime_ns for path in files]
    write_report(str(tmp_path))
    assert [path.stat().st_mtime_ns for path in files] == before
    make_run(tmp_path, RUN, {180_000: 37.0}, seed=2)
    write_report(str(tmp_path))
    assert all(path.stat().st_mtime_ns > then for path, then in zip(files, before, strict=True))


def test_pictures_show_what_the_data_do_not_say(tmp_path, monkeypatch):
    folder = make_run(tmp_path, RUN, {90_000: 30.0, 180_000: 36.0})
    second = make_run(tmp_path, RUN, {90_000: 30.0}, seed=2, max_iter=180_000, state="running")
    (second / "results.json").unlink()
    write_report(str(tmp_path))
    png, text = tmp_path / "report/figure_1.png", (tmp_path / "report/figure_1.csv").read_text()
    before = png.read_bytes()

    def changed():
        nonlocal before
        write_report(str(tmp_path))
        assert (tmp_path / "report/figure_1.csv").read_text() == text
        now, before = before, png.read_bytes()
        return now != before

    assert not changed()
    shutil.rmtree(second)  # the line is finished
    assert changed()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["SOLVER"]["STEPS"] = [120_000]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert changed()
    monkeypatch.setattr(pictures, "CODE", [b"other code"])
    assert changed() and not changed()
    png.write_bytes(b"no picture")
    assert not changed()  # since it is drawn again


def test_the_command(tmp_path, capsys):
    assert cli([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path} holds no run") and error.count("\n") == 1
    assert not (tmp_path / "report").exists()
    make_run(tmp_path, "mine", {10: 12.3})
    assert cli([str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report/index.html")
