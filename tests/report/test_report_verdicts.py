import pytest
from made_runs import make_run

from rethink_d2 import paper
from rethink_d2.report.runs import find_runs
from rethink_d2.report.verdicts import verdicts


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
    assert found.missing == ("keypoint-r50-gn-pretrained-2x",)
    assert found.comparisons[0].catches_up is None


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
