import pytest

from rethink_d2.paper import find, samples
from rethink_d2.paper.__main__ import cli
from rethink_d2.paper.check import resolved

SCRATCH, PRETRAINED = "base-r50-gn-scratch-6x", "base-r50-gn-pretrained-2x"


def test_the_papers_arithmetic():
    imagenet, fine_tuning, scratch = samples.paper_reading().values()
    assert (imagenet.images, imagenet.instances) == (128e6, 128e6)
    assert imagenet.pixels == 128e6 * 224 * 224
    assert (fine_tuning.images, fine_tuning.instances) == (2.76e6, 19.32e6)
    assert scratch.pixels == pytest.approx(8.28e6 * 800 * 1333)


@pytest.mark.parametrize("reading", [samples.paper_reading, samples.configs_reading])
def test_as_figure_2_shows(reading):
    """Section 3.2: considerably fewer images and instances; only in pixels they get close."""
    imagenet, fine_tuning, scratch = reading().values()
    ratio = scratch / (imagenet + fine_tuning)
    assert ratio.images < 0.1 < ratio.instances < 0.5 < 0.9 < ratio.pixels < 1
    # "3 times more iterations than its fine-tuning counterpart".
    assert (scratch / fine_tuning).images == pytest.approx(3)


def test_what_the_configs_see_is_counted_in_iterations():
    reading = samples.configs_reading()
    assert reading[SCRATCH].images == 540_000 * 16
    assert reading[PRETRAINED].images == 180_000 * 16
    assert reading["imagenet-r50-gn-pretrained-100ep"].images == pytest.approx(100 * 1_281_167, rel=1e-5)
    assert reading["imagenet-r50-gn-pretrained-100ep"].pixels == 500_456 * 256 * 224 * 224


def test_configs_are_what_is_read():
    def half_as_long(run):
        cfg = resolved(run).clone()
        cfg.defrost()
        cfg.SOLVER.MAX_ITER //= 2
        return cfg

    halved, whole = samples.configs_reading(load=half_as_long), samples.configs_reading()
    assert halved == {id: samples.Samples(*(x / 2 for x in vars(s).values())) for id, s in whole.items()}


def test_statistics_are_an_argument():
    cfg = resolved(find(SCRATCH))
    seen = samples.seen(cfg, samples.Statistics(instances=2.3, pixels=1000))
    assert seen == samples.Samples(8_640_000, 8_640_000 * 2.3, 8_640_000_000)


def test_scale_augmentation_is_assumed_at_its_largest():
    cfg = resolved(find("aug-r50-scratch-9x"))
    assert samples.seen(cfg, samples.COCO).pixels == 810_000 * 16 * 800 * 1333


def test_counting_a_data_set(real_data):
    counted = samples.count(resolved(find(SCRATCH)))
    augmented = samples.count(resolved(find("aug-r50-scratch-9x")))
    assert counted.instances == augmented.instances == pytest.approx(731 / 80)
    assert 0.6 * 800 * 1333 < augmented.pixels < counted.pixels < 800 * 1333


def test_counting_needs_a_list_of_sizes():
    cfg = resolved(find(SCRATCH)).clone()
    cfg.defrost()
    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "range"
    with pytest.raises(ValueError, match="INPUT.MIN_SIZE_TRAIN_SAMPLING"):
        samples.count(cfg)


def test_command_line(capsys):
    assert cli(["samples"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| COCO, 115k x 72 epochs | 8.28 | 57.96 | 8.83 |" in lines
    assert f"| {SCRATCH} | 8.64 | 60.48 | 9.21 |" in lines
    assert "| random init / pre-training | 0.06 | 0.39 | 0.94 |" in lines


def test_command_line_counts(capsys, real_data):
    assert cli(["samples", "--count"]) == 0
    out = capsys.readouterr().out
    assert "COCO counted" in out
    assert f"| {SCRATCH} | 8.64 | 60.48 | 9.21 |" not in out
