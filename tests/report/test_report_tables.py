import csv
import io

import pytest
from made_runs import make_run

from rethink_d2 import paper
from rethink_d2.report.runs import find_runs
from rethink_d2.report.tables import metric_name, tables, to_csv, to_markdown


@pytest.fixture(scope="module")
def everything(whole_paper):
    return tables(find_runs(str(whole_paper)))


def rows_of(made, title):
    return next(table.rows for table in made if table.title == title)


def test_the_papers_tables(everything):
    assert [table.title for table in everything] == ["Table 1", "Table 2", "Table 3", "Numbers of the text"]
    sizes = [len(table.rows) for table in everything[:3]]
    # 2 networks x 2 arms x 5 schedules; 4 runs x 6 metrics; 4 models x 6 metrics.
    assert sizes == [20, 24, 24]
    assert {row.metric for row in rows_of(everything, "Table 1")} == {"bbox/AP"}
    assert {row.source for row in rows_of(everything, "Table 2")} == {"paper Table 2"}


def test_every_published_number_is_in_them_with_its_source(everything):
    shown = {(r.run.id, r.metric): r for table in everything for r in table.rows}
    for run in paper.load():
        for metric, published in {run.metric: run.published, **run.also_published}.items():
            if published is not None:
                row = shown[run.id, metric]
                assert row.published == published and row.source
    assert shown["base-r50-gn-scratch-3x", "segm/AP"].source == "Detectron GN model zoo"
    unknown = [row for row in shown.values() if row.published is None]
    assert unknown and all(row.cells[6:] == ("", "", "") for row in unknown)


def test_yours_beside_the_noise_of_your_seeds(everything):
    row = rows_of(everything, "Table 1")[0]
    assert row.cells == (
        "base-r50-gn",
        "random init",
        "2x",
        "box AP",
        "36.8",
        "± 0.71 (2 seeds)",
        "36.8",
        "+0.0",
        "paper Table 1",
    )


def test_localization_is_computed_from_the_best_schedules(everything):
    row = next(r for r in rows_of(everything, "Numbers of the text") if r.run.id == "localization-r50")
    # Of Table 2: 45.6 and 44.6; in the other schedules AP75 is 30.
    assert row.yours.value == pytest.approx(1.0) and row.published == 1.0


def test_what_is_missing_stays_empty(tmp_path):
    make_run(tmp_path, "base-r50-gn-scratch-2x", {90_000: 30.0}, max_iter=180_000, state="running")
    made = tables(find_runs(str(tmp_path)))
    assert all(row.yours is None and row.difference is None for table in made for row in table.rows)


def test_a_miniature_is_not_compared(tmp_path):
    make_run(tmp_path, "base-r50-gn-scratch-2x", {108: 70.0}, SOLVER__ONE_X=27)
    row = rows_of(tables(find_runs(str(tmp_path))), "Table 1")[0]
    assert row.cells[4:8] == ("70.0", "one seed", "36.8", "")


def test_markdown_and_csv(everything):
    text = to_markdown(everything)
    line = "| random init | 2x | box AP | 36.8 | ± 0.71 (2 seeds) | 36.8 | +0.0 | paper Table 1 |"
    assert f"| base-r50-gn {line}" in text.splitlines()
    rows = list(csv.DictReader(io.StringIO(to_csv(everything))))
    assert len(rows) == sum(len(table.rows) for table in everything)
    first = rows[0]
    assert first["id"] == "base-r50-gn-scratch-2x" and first["seeds"] == "2" and first["miniature"] == "False"
    assert float(first["noise"]) == pytest.approx(0.5**0.5)


@pytest.mark.parametrize(
    "metric, words",
    [
        ("bbox/AP", "box AP"),
        ("segm_TTA/AP75", "mask AP75, test aug"),
        ("test-challenge/bbox_TTA/AP", "box AP, test aug, test-challenge"),
        ("keypoints/AP", "keypoint AP"),
        ("other/AP", "other AP"),
    ],
)
def test_metrics_in_words(metric, words):
    assert metric_name(metric) == words
