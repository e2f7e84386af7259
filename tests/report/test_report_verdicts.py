import pytest
from made_runs import make_run

from rethink_d2 import paper
from rethink_d2.report import write_report
from rethink_d2.report.runs import find_runs
from rethink_d2.report.verdicts import RULE, verdicts


def verdict_of(out, family="keypoint-r50-gn"):
    return next(v for v in verdicts(find_runs(str(out))) if v.family == family)


def pair(out, scratch, pretrained, length=180_000, **options):
    """Seeds of the 2x pair of Figure 6."""
    for arm, values in (("scratch", scratch), ("pretrained", pretrained)):
        for seed, value in enumerate(values, 1):
            run_id = f"keypoint-r50-gn-{arm}-2x"
            make_run(out, run_id, {length: value}, seed=seed, metric="keypoints/AP", **options)


def test_published_numbers_give_the_papers_words(whole_paper):
    found = {v.family: v for v in verdicts(find_runs(str(whole_paper)))}
    # Section 5.1: "if a 5x or 6x schedule is used".
    assert found["base-r50-gn"].caught_up.run.schedule == "5x"
    assert found["base-r101-gn"].caught_up.run.schedule == "5x"
    for family in ("base-r50-syncbn", "tta-r50", "tta-r101", "x152-tta", "vgg16", "coco35k", "coco10k"):
        assert found[family].caught_up, family
    assert found["keypoint-r50-gn"].caught_up.run.schedule == "2x"
    for family in ("coco3.5k", "coco1k", "voc"):
        assert found[family].caught_up is None, family
    assert set(found) == {run.family for run in paper.load() if run.partner}


def test_all_schedules_are_compared_with_partner_and_best(whole_paper):
    found = verdict_of(whole_paper, "base-r50-gn")
    assert found.best.id == "base-r50-gn-pretrained-6x"
    assert [c.run.schedule for c in found.comparisons] == ["2x", "3x", "4x", "5x", "6x"]
    assert [round(c.to_partner.value, 1) for c in found.comparisons] == [-3.5, -1.3, -0.3, -0.2, 0.2]
    assert [round(c.to_best.value, 1) for c in found.comparisons] == [-4.3, -1.6, -0.5, -0.4, 0.2]
    assert [c.catches_up for c in found.comparisons] == [False, False, False, True, True]


@pytest.mark.parametrize(
    "scratch, pretrained, words",
    [
        ([65.6, 65.7, 65.8], [65.4, 65.5, 65.6], "catches up at 2x (difference +0.2 ± 0.2, 3 seeds)"),
        (
            [60.0, 60.1, 60.2],
            [65.4, 65.5, 65.6],
            "does not catch up (difference -5.4 ± 0.2, 3 seeds; best at",
        ),
        ([65.6], [65.5], "catches up at 2x (difference +0.1, one seed: no interval)"),
        # Subtracted as floats, it is a little more than -0.5.
        ([7.7], [8.2], "does not catch up (difference -0.5, one seed: no interval; best at 2x)"),
    ],
)
def test_sentences(tmp_path, scratch, pretrained, words):
    pair(tmp_path, scratch, pretrained)
    sentence = verdict_of(tmp_path).sentence
    assert sentence.startswith(f"scratch {words}") and "more seeds" not in sentence


def test_an_interval_over_the_border_is_said(tmp_path):
    pair(tmp_path, [65.0, 66.0], [65.2, 66.2])
    sentence = verdict_of(tmp_path).sentence
    assert "catches up at 2x" in sentence and sentence.endswith("more seeds may change this")


def test_only_finished_runs_count(tmp_path):
    pair(tmp_path, [65.6], [], length=180_000)
    make_run(
        tmp_path, "keypoint-r50-gn-pretrained-2x", {90_000: 60.0}, metric="keypoints/AP", max_iter=180_000
    )
    found = verdict_of(tmp_path)
    assert found.sentence == "not known yet: no finished run of pre-training"
    assert [run.id for run in found.missing] == ["keypoint-r50-gn-pretrained-2x"]
    assert found.comparisons[0].catches_up is None


BEGUN = None


@pytest.mark.parametrize(
    "runs, sentence",
    [
        (
            {"scratch-2x": 36.8, "scratch-6x": BEGUN, "pretrained-2x": 40.3, "pretrained-6x": BEGUN},
            "scratch has not caught up yet (difference -3.5, one seed: no interval; best at 2x); "
            "unfinished: scratch 6x",
        ),
        (
            {"scratch-6x": 40.0, "pretrained-2x": 40.3, "pretrained-6x": BEGUN},
            "so far scratch catches up at 6x (difference -0.3, one seed: no interval); "
            "unfinished: pre-training 6x",
        ),
        (
            {"scratch-4x": BEGUN, "scratch-5x": BEGUN, "scratch-6x": 41.3, "pretrained-6x": 41.1},
            "so far scratch catches up at 6x (difference +0.2, one seed: no interval); "
            "unfinished: scratch 4x, 5x",
        ),
        (
            {"scratch-4x": BEGUN, "scratch-6x": 39.0, "pretrained-6x": 41.1},
            "so far scratch does not catch up (difference -2.1, one seed: no interval; best at 6x); "
            "unfinished: scratch 4x",
        ),
        # These cannot change it.
        (
            {"scratch-5x": 41.0, "scratch-6x": BEGUN, "pretrained-6x": 41.1},
            "scratch catches up at 5x (difference -0.1, one seed: no interval)",
        ),
        (
            {"scratch-6x": 39.0, "pretrained-5x": BEGUN, "pretrained-6x": 41.1},
            "scratch does not catch up (difference -2.1, one seed: no interval; best at 6x)",
        ),
        (
            {"scratch-6x": 0.0, "pretrained-6x": 0.1},
            "not known: with pre-training nothing was learned (AP 0.1)",
        ),
        (
            {"scratch-6x": 0.0, "scratch-5x": BEGUN, "pretrained-6x": 0.94, "pretrained-5x": BEGUN},
            "not known yet: so far with pre-training nothing was learned (AP 0.9); "
            "unfinished: pre-training 5x",
        ),
        (
            {"scratch-6x": 0.9, "pretrained-6x": 1.0},
            "scratch catches up at 6x (difference -0.1, one seed: no interval)",
        ),
    ],
)
def test_what_unfinished_runs_and_nothing_learned_leave_open(tmp_path, runs, sentence):
    for name, value in runs.items():
        length = 90_000 * int(name[-2])
        done = {length: value} if value is not BEGUN else {20_000: 20.0}
        state = "running" if value is BEGUN else "done"
        make_run(tmp_path, f"base-r50-gn-{name}", done, max_iter=length, state=state)
    found = verdict_of(tmp_path, "base-r50-gn")
    assert found.sentence == sentence
    if "nothing" in sentence:
        assert all(c.catches_up is None and c.to_partner for c in found.comparisons if c.run.schedule == "6x")


def test_unfinished_seeds_leave_it_open_too(tmp_path):
    pair(tmp_path, [65.6], [65.5])
    make_run(
        tmp_path,
        "keypoint-r50-gn-scratch-2x",
        {90_000: 60.0},
        seed=2,
        metric="keypoints/AP",
        max_iter=180_000,
        state="running",
    )
    sentence = verdict_of(tmp_path).sentence
    assert sentence.startswith("so far scratch catches up at 2x") and sentence.endswith(
        "unfinished: scratch 2x"
    )
    write_report(str(tmp_path))
    assert f"- keypoint-r50-gn (keypoint AP): {sentence}\n" in (tmp_path / "report/tables.md").read_text()


def test_the_rule_states_its_numbers():
    assert "less than 0.5 below" in RULE and "reaches less than 1.0 nothing was learned" in RULE


def test_training_loss_where_the_paper_shows_it(tmp_path):
    for arm, length, loss in (("scratch-60k", 60_000, 0.42), ("pretrained-15k", 15_000, 0.41)):
        losses = {0: 3.0, length // 2: 1.0, length - 21: loss, length - 1: loss}
        make_run(tmp_path, f"coco1k-{arm}", {length: 5.0}, losses=losses)
    sentence = verdict_of(tmp_path, "coco1k").loss_sentence
    assert sentence == "training loss has caught up (0.42 from random weights, 0.41 with pre-training)"
    losses = {0: 3.0, 59_999: 0.6}
    make_run(tmp_path, "coco1k-scratch-60k", {60_000: 5.0}, losses=losses, seed=2)
    assert "has not caught up (0.51" in verdict_of(tmp_path, "coco1k").loss_sentence
    pair(tmp_path, [65.6], [65.5])
    assert verdict_of(tmp_path).loss_sentence == ""
