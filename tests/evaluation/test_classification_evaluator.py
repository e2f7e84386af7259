import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.evaluation import inference_on_dataset
from detectron2.utils import comm
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rethink_d2 import model_zoo, recipe
from rethink_d2.data.classification import register_image_folder
from rethink_d2.data.mapper import build_mapper
from rethink_d2.evaluation.classification import ClassificationEvaluator


def evaluated(pairs):
    evaluator = ClassificationEvaluator()
    for label, scores in pairs:
        evaluator.process([{"label": label}], [{"scores": torch.tensor(scores)}])
    return evaluator


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 8), st.data())
def test_accuracy_by_the_rank_of_the_label(classes, data):
    ranks = data.draw(st.lists(st.integers(0, classes - 1), min_size=1))
    # The label's score is higher than that of all but `rank` classes.
    pairs = []
    for rank in ranks:
        order = data.draw(st.permutations(range(classes)))
        pairs.append((order[rank], [float(-order.index(c)) for c in range(classes)]))
    result = evaluated(pairs).evaluate()["classification"]
    assert result["top1"] == pytest.approx(100 * ranks.count(0) / len(ranks))
    assert result["top5"] == pytest.approx(100 * sum(rank < 5 for rank in ranks) / len(ranks))


def test_equal_scores_are_no_hit_for_every_label():
    result = evaluated([(label, [0.125] * 8) for label in range(8)]).evaluate()["classification"]
    assert result == {"top1": 12.5, "top5": 62.5}


def test_a_new_round_starts_from_nothing():
    evaluator = evaluated([(0, [0.0, 1.0])])
    evaluator.reset()
    evaluator.process([{"label": 1}], [{"scores": torch.tensor([0.0, 1.0])}])
    assert evaluator.evaluate() == {"classification": {"top1": 100.0, "top5": 100.0}}


def test_processes_share_counts_only(monkeypatch):
    """Two processes with unequal numbers of images, one of them with none that is right."""
    sent = []
    parts = [evaluated([(0, [1.0, 0.0])] * 3 + [(1, [1.0, 0.0])]), evaluated([(0, [0.0, 1.0])])]

    def gather(counts):
        sent.append(counts)
        return sent if comm.is_main_process() else []

    monkeypatch.setattr(comm, "gather", gather)
    with monkeypatch.context() as other:
        other.setattr(comm, "is_main_process", lambda: False)
        assert parts[1].evaluate() is None
    assert parts[0].evaluate()["classification"] == {"top1": 60.0, "top5": 100.0}
    assert all(isinstance(value, int) for counts in sent for value in counts.values())


class Brightness(torch.nn.Module):
    """Knows dark images from bright ones."""

    def forward(self, samples):
        bright = torch.tensor([s["image"].float().mean() / 255 for s in samples])
        return [{"scores": torch.tensor([1 - b, b])} for b in bright]


def test_evaluation_of_a_folder(tmp_path):
    # One image of "dark" is bright.
    for name, grey in (("bright/1", 200), ("bright/2", 220), ("dark/1", 30), ("dark/2", 240)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (12, 9), (grey,) * 3).save(tmp_path / f"{name}.png")
    register_image_folder("test_brightness", str(tmp_path), ["dark", "bright"])
    try:
        cfg = recipe.load(model_zoo.get_config_file("mini/imagenet_R_18_FPN_gn.yaml"), [])
        loader = build_detection_test_loader(cfg, "test_brightness", mapper=build_mapper(cfg, False))
        results = inference_on_dataset(Brightness(), loader, ClassificationEvaluator())
        assert results == {"classification": {"top1": 75.0, "top5": 100.0}}
    finally:
        DatasetCatalog.remove("test_brightness")
        MetadataCatalog.remove("test_brightness")
